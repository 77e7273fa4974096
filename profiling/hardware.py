"""What the machine is: the facts of a Hardware.

Facts only; what it can do per second is measured in rates.py. Knows nothing of models.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from flexllmgen.errors import OffloadDirError

SCHEMA_VERSION = 1
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "avx512_vnni")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA device as its driver describes it."""

    name: str
    memory_bytes: int
    compute_capability: str
    pcie_generation: int | None
    pcie_width: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system that holds the offload directory."""

    path: str
    device: str
    filesystem: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Everything about the machine that a figure may depend on. Sizes are bytes."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    cpu: str
    physical_cores: int
    logical_cores: int
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    driver: str | None
    disk: Disk
    system: str
    python: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready view, as recorded in hardware_profile.json."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """The machine in one line for people."""
        kinds = Counter(f"{gpu.name} {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in self.gpus)
        gpus = (
            ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()) or "no GPU"
        )
        return f"{self.cpu}, {self.logical_cores} cores, {self.memory_bytes / 2**30:.0f} GiB, {gpus}"


def read_hardware(offload_dir: Path) -> Hardware:
    """Look at the machine. `offload_dir` need not exist yet; its nearest existing parent counts.

    The fingerprint covers what sets the pace and does not change from run to run: processors, GPUs and their
    link, the kind of file system. Not free space or versions; and not the amount of memory, which in
    some virtual machines grows while it is used.
    """
    gpus, driver = _read_gpus()
    disk = _read_disk(offload_dir)
    cpu = _cpu_model()
    stable = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpus": [(gpu.name, gpu.memory_bytes, gpu.pcie_generation, gpu.pcie_width) for gpu in gpus],
        "filesystem": disk.filesystem,
    }
    fingerprint = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:16]
    return Hardware(
        fingerprint=fingerprint,
        cpu=cpu,
        physical_cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        logical_cores=os.cpu_count() or 1,
        cpu_flags=_cpu_flags(),
        memory_bytes=_memory_limit(),
        gpus=gpus,
        driver=driver,
        disk=disk,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def available_memory_bytes() -> int:
    """Host memory that a model may take now: what is free or reclaimable, within the control group's limit."""
    return min(psutil.virtual_memory().available, _memory_limit())


def free_disk_bytes(path: Path) -> int:
    """Free bytes of the disk that holds `path`, which need not exist yet."""
    return shutil.disk_usage(_existing(path)).free


def check_writable(folder: Path, option: str) -> None:
    """Make a folder and try to write into it.

    Raises:
        OffloadDirError: it cannot be made or written.
    """
    folder = folder.expanduser()
    probe = folder / f".write-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OffloadDirError(
            f"{option} {folder}: cannot be written ({error.strerror}); name another folder"
        ) from error


@contextmanager
def nvml() -> Iterator[Any]:
    """The NVML module between init and shutdown, or None where there is no NVIDIA driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # noqa: BLE001 - no package, no library, no driver: all mean no NVML
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _read_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    with nvml() as lib:
        if lib is None:
            return (), None
        gpus = []
        for index in range(lib.nvmlDeviceGetCount()):
            handle = lib.nvmlDeviceGetHandleByIndex(index)
            major, minor = lib.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(
                Gpu(
                    name=_text(lib.nvmlDeviceGetName(handle)),
                    # An integrated GPU has no memory of its own.
                    memory_bytes=_or_none(
                        lib, lambda handle: lib.nvmlDeviceGetMemoryInfo(handle).total, handle
                    )
                    or 0,
                    compute_capability=f"{major}.{minor}",
                    pcie_generation=_or_none(lib, lib.nvmlDeviceGetMaxPcieLinkGeneration, handle),
                    pcie_width=_or_none(lib, lib.nvmlDeviceGetMaxPcieLinkWidth, handle),
                )
            )
        return tuple(gpus), _text(lib.nvmlSystemGetDriverVersion())


def _or_none(lib: Any, read: Any, handle: Any) -> int | None:
    try:
        return int(read(handle))
    except lib.NVMLError:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_disk(path: Path) -> Disk:
    existing = _existing(path)
    partitions = sorted(psutil.disk_partitions(all=True), key=lambda part: len(part.mountpoint), reverse=True)
    holder = next((part for part in partitions if existing.resolve().is_relative_to(part.mountpoint)), None)
    usage = shutil.disk_usage(existing)
    return Disk(
        path=str(path),
        device=holder.device if holder else "unknown",
        filesystem=holder.fstype if holder else "unknown",
        total_bytes=usage.total,
        free_bytes=usage.free,
    )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _cpu_model() -> str:
    model = next((text for key, text in _cpuinfo() if key == "model name"), "")
    return model or platform.processor() or platform.machine()


def _cpu_flags() -> tuple[str, ...]:
    flags = next((text for key, text in _cpuinfo() if key == "flags"), "").split()
    return tuple(flag for flag in _CPU_FLAGS if flag in flags)


def _cpuinfo() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def _memory_limit() -> int:
    total = psutil.virtual_memory().total
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total
    return min(limit, total) if limit else total
