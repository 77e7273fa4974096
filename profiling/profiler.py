"""Takes a HardwareProfile: from the cache where one of this very machine lies there, else measured now.

Rates are measured once; how long a layer takes is added for each shape of model when it is first asked for.
"""

import gc
import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexllmgen import cpu_attention
from flexllmgen.errors import UsageError
from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec
from profiling.hardware import Hardware, available_memory_bytes, free_disk_bytes, nvml
from profiling.layer_times import LayerShape
from profiling.layer_timing import measure_layer_times
from profiling.profile import Capacity, HardwareProfile, profile_fingerprint
from profiling.rates import Progress, measure_rates
from profiling.sampler import energy_joules

log = logging.getLogger(__name__)

MAX_AGE_S = 7 * 24 * 3600
MAX_AGE_BUSY_S = 600
"""What was measured while others used the machine is measured again when they may have gone."""
FORCE_VARIABLE = "FORCE_RERUN_PROFILER"
LAYERS = "layers of the model"
BUILDING = "build the kernel of attention on the CPU (once)"
"""What a caller is told while the compiler runs, which takes about as long as the rates."""
_ROOM = 4
"""A model's layers are timed where one takes no more than this part of the device's free memory."""


def forced(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for a new profile, whatever is kept.

    >>> forced({"FORCE_RERUN_PROFILER": "1"}), forced({"FORCE_RERUN_PROFILER": "0"}), forced({})
    (True, False, False)
    """
    return environ.get(FORCE_VARIABLE, "") not in ("", "0")


def profile_path(cache: Path, fingerprint: str) -> Path:
    """Where the profile with this fingerprint is kept."""
    return cache / f"profile-{fingerprint}.json"


def take_profile(
    hardware: Hardware,
    spec: ModelSpec | None,
    *,
    device: str,
    dtype: str,
    offload_dir: Path,
    cache: Path,
    refresh: bool = False,
    on_progress: Progress | None = None,
) -> tuple[HardwareProfile, list[str]]:
    """The profile of this machine with the layer times of this model's shape, and warnings for the user.

    What is kept in `cache` is used for a week. A file that is damaged, of another version or another machine is
    measured anew, with a warning.

    Args:
        spec: the model; None for one whose dimensions are unknown.
        on_progress: called only when something is measured.

    Raises:
        OffloadDirError: the offload directory cannot be written, or is full.
    """
    fingerprint = profile_fingerprint(
        hardware, device=device, dtype=dtype, torch=torch.__version__, threads=torch.get_num_threads()
    )
    path = profile_path(cache, fingerprint)
    warnings: list[str] = []
    kept = None if refresh else _kept(path, fingerprint, warnings)
    taker = _Taker(hardware, device, dtype, offload_dir, on_progress)
    profile = taker.measure(fingerprint) if kept is None else taker.brought_up_to_date(kept)
    profile = taker.with_layers(profile, spec, warnings)
    if device == "cuda":
        _release_gpu()
    if kept is None or profile.layers != kept.layers:
        _keep(profile, path, warnings)
    return profile, warnings


@dataclass(slots=True)
class _Taker:
    """Measures on one device, in one number type; `done` parts so far."""

    hardware: Hardware
    device: str
    dtype: str
    offload_dir: Path
    on_progress: Progress | None
    done: int = 0

    def tell(self, title: str, done: int, total: int) -> None:
        """Layers come last: they are a part more than the rates have."""
        self.done = total
        if self.on_progress is not None:
            self.on_progress(title, done, total + 1)

    def measure(self, fingerprint: str) -> HardwareProfile:
        """Everything but layer times."""
        started = time.perf_counter()
        # The compiler works while the GPU starts and is measured. Where the CPU is the device there is nothing to build.
        with ThreadPoolExecutor(1) as host:
            attends = host.submit(str if self.device == "cpu" else cpu_attention.which)
            context_bytes = _start_gpu() if self.device == "cuda" else 0
            capacity = self._capacity(context_bytes, 0)
            if built := attends.done():
                attends.result()  # What is wrong with how it was asked for is told at once.
            measurements = measure_rates(
                device=self.device,
                dtype=self.dtype,
                offload_dir=self.offload_dir,
                on_progress=self.tell,
                aside=None if built else (BUILDING, attends.result),
            )
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            # The compiler may have had its share of host memory before.
            capacity = replace(
                capacity,
                gpu_allocator_bytes=torch.cuda.memory_reserved(),
                host_available_bytes=available_memory_bytes(),
            )
        return HardwareProfile(
            fingerprint=fingerprint,
            hardware=self.hardware,
            device=self.device,
            dtype=self.dtype,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            measured_at=time.time(),
            took_s=time.perf_counter() - started,
            energy_counter=energy_joules() is not None,
            capacity=capacity,
            measurements=measurements,
            cpu_attention=attends.result(),
        )

    def cpu_attends(self) -> str:
        """What attends on the CPU; "" where the CPU is the device, whose attention is torch's. Builds it if need be."""
        if self.device == "cpu":
            return ""
        if not cpu_attention.is_ready():
            self.tell(BUILDING, 0, 0)
        return cpu_attention.which()

    def brought_up_to_date(self, kept: HardwareProfile) -> HardwareProfile:
        """A kept profile with the memory and disk that are free now."""
        if kept.cpu_attention != "torch":
            # After an update there may be none: then it is built now, and not in silence while a model is loaded.
            self.cpu_attends()
        old = kept.capacity
        capacity = self._capacity(old.gpu_context_bytes, old.gpu_allocator_bytes)
        return replace(kept, hardware=self.hardware, capacity=capacity)

    def with_layers(
        self, profile: HardwareProfile, spec: ModelSpec | None, warnings: list[str]
    ) -> HardwareProfile:
        """The profile and the layer times of this model; of a small one if this one is too large to time here."""
        if spec is None or not self._fits(spec):
            if spec is not None:
                log.info("a layer of %s is too large to be timed here", spec.name)
            spec = None if profile.layers else small_spec()
        shapes = {table.shape for table in profile.layers}
        if spec is None or LayerShape.of(spec) in shapes:
            return profile
        self.tell(LAYERS, self.done, self.done)
        started = time.perf_counter()
        try:
            table = measure_layer_times(spec, dtype=self.dtype, device=self.device)
        except torch.OutOfMemoryError:
            warnings.append(
                f"memory ran out while layers of {spec.name} were timed; predictions are scaled from another model"
            )
            return profile
        took_s = profile.took_s + time.perf_counter() - started
        return replace(profile, layers=(*profile.layers, table), took_s=took_s)

    def _fits(self, spec: ModelSpec) -> bool:
        free = torch.cuda.mem_get_info()[0] if self.device == "cuda" else available_memory_bytes()
        size = int(getattr(torch, self.dtype).itemsize)
        return _ROOM * spec.layer_weight_bytes(size) <= free

    def _capacity(self, context_bytes: int, allocator_bytes: int) -> Capacity:
        free, total = torch.cuda.mem_get_info() if self.device == "cuda" else (0, 0)
        return Capacity(
            gpu_total_bytes=total,
            gpu_free_bytes=free,
            gpu_context_bytes=context_bytes,
            gpu_allocator_bytes=allocator_bytes,
            host_total_bytes=self.hardware.memory_bytes,
            host_available_bytes=available_memory_bytes(),
            disk_free_bytes=free_disk_bytes(self.offload_dir),
        )


def small_spec() -> ModelSpec:
    """The shape that is timed where no model was named."""
    return ModelSpec.from_hf_config(published_config("Qwen/Qwen2.5-0.5B"), "Qwen/Qwen2.5-0.5B")


def _start_gpu() -> int:
    """Bytes that this process's CUDA context takes; 0 where the driver does not tell."""
    if torch.cuda.is_initialized():
        return _context_bytes()
    before = _gpu_used_bytes()
    torch.cuda.mem_get_info()
    after = _gpu_used_bytes()
    return max(0, after - before)


def _release_gpu() -> None:
    """Give back what measuring took, workspaces of matrix products too: what runs next shall find the GPU free."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def _context_bytes() -> int:
    """What the driver counts for this process beyond what torch's allocator took."""
    with nvml() as lib:
        if lib is None:
            return 0
        try:
            handle = lib.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            processes = lib.nvmlDeviceGetComputeRunningProcesses(handle)
        except lib.NVMLError:
            return 0
        used = next((each.usedGpuMemory for each in processes if each.pid == os.getpid()), None)
    # In a container the driver's process ids are not ours, but whoever is alone has all that is used.
    if used is None and len(processes) <= 1:
        used = _gpu_used_bytes()
    return max(0, used - torch.cuda.memory_reserved()) if used else 0


def _gpu_used_bytes() -> int:
    with nvml() as lib:
        if lib is None:
            return 0
        try:
            return int(lib.nvmlDeviceGetMemoryInfo(lib.nvmlDeviceGetHandleByIndex(0)).used)
        except lib.NVMLError:
            return 0


def _kept(path: Path, fingerprint: str, warnings: list[str]) -> HardwareProfile | None:
    """The profile in the cache if it may be used; else None, with a warning if there was something."""
    try:
        profile = HardwareProfile.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, UsageError) as error:
        warnings.append(f"the hardware profile {path} cannot be used ({error}); measured anew")
        return None
    if profile.fingerprint != fingerprint:
        warnings.append(f"the hardware profile {path} is of another machine or version; measured anew")
        return None
    age_s = time.time() - profile.measured_at
    if profile.busy and age_s > MAX_AGE_BUSY_S:
        return None
    if not 0 <= age_s < MAX_AGE_S:
        warnings.append(f"the hardware profile {path} is {age_s / 86400:.0f} days old; measured anew")
        return None
    return profile


def _keep(profile: HardwareProfile, path: Path, warnings: list[str]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(profile.as_dict(), indent=2), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        warnings.append(f"the hardware profile cannot be kept in {path.parent} ({error.strerror})")
