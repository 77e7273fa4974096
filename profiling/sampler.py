"""Samples memory, load and power from a thread while a run goes on, and remembers named phases.

A sample costs tens of microseconds on the host and, with a GPU, a few NVML calls, so the default of ten a
second stays far under 1 % of a core. Knows nothing of what is running.
"""

import ctypes
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from profiling.hardware import nvml


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What a sampler saw: one value, or None, per time and series. Times count from `started_at_ms`."""

    started_at_ms: int
    time_s: list[float]
    series: dict[str, list[float | None]]
    phases: list[tuple[str, float, float]]


class Sampler:
    """Context manager that samples this process and the machine until it is left.

    >>> with Sampler(interval_s=0.05) as sampler, sampler.phase("work"):
    ...     total = sum(range(1000))
    >>> samples = sampler.samples()
    >>> samples.phases[0][0], len(samples.series["rss_bytes"]) >= 1
    ('work', True)
    """

    def __init__(self, *, interval_s: float = 0.1) -> None:
        self.interval_s = interval_s
        self.started_at_ms = int(time.time() * 1000)
        self._start = time.perf_counter()
        self._process = psutil.Process()
        self._rows: list[tuple[float, dict[str, float]]] = []
        self._phases: list[tuple[str, float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._resources = ExitStack()
        self._nvml: Any = None
        self._counters: Callable[[], Mapping[str, float]] | None = None

    def __enter__(self) -> "Sampler":
        self._nvml = self._resources.enter_context(nvml())
        psutil.cpu_percent()
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()
        self._resources.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Remember when a phase began and ended, however it ends."""
        begin = self._now()
        try:
            yield
        finally:
            self._phases.append((name, begin, self._now()))

    def watch(self, counters: Callable[[], Mapping[str, float]]) -> None:
        """Sample these figures too from now on, each a series by its name; they are read from the sampler's thread."""
        self._counters = counters

    def latest(self) -> Mapping[str, float]:
        """The last sample by series, for who shows how it goes; may be called while sampling."""
        return self._rows[-1][1] if self._rows else {}

    def samples(self) -> Samples:
        """Everything sampled so far."""
        rows = list(self._rows)
        names = list(dict.fromkeys(name for _, values in rows for name in values))
        return Samples(
            started_at_ms=self.started_at_ms,
            time_s=[at for at, _ in rows],
            series={name: [values.get(name) for _, values in rows] for name in names},
            phases=list(self._phases),
        )

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._take()

    def _take(self) -> None:
        memory = psutil.virtual_memory()
        values: dict[str, float] = {
            "rss_bytes": self._process.memory_info().rss,
            "cpu_percent": psutil.cpu_percent(),
            "system_memory_bytes": memory.used,
            "system_memory_percent": memory.percent,
        }
        disk = psutil.disk_io_counters()
        if disk is not None:
            values["disk_read_bytes"] = disk.read_bytes
            values["disk_write_bytes"] = disk.write_bytes
        values.update(self._take_gpus())
        if self._counters is not None:
            values.update(self._counters())
        self._rows.append((self._now(), values))

    def _take_gpus(self) -> dict[str, float]:
        values: dict[str, float] = {}
        lib = self._nvml
        for index in range(lib.nvmlDeviceGetCount() if lib is not None else 0):
            handle = lib.nvmlDeviceGetHandleByIndex(index)
            # A share of a GPU has no load of its own, an integrated one no memory: what is not told is left out.
            with suppress(lib.NVMLError):
                values[f"gpu_{index}_memory_bytes"] = lib.nvmlDeviceGetMemoryInfo(handle).used
            with suppress(lib.NVMLError):
                values[f"gpu_{index}_utilization_percent"] = lib.nvmlDeviceGetUtilizationRates(handle).gpu
            with suppress(lib.NVMLError):
                values[f"gpu_{index}_power_w"] = lib.nvmlDeviceGetPowerUsage(handle) / 1000
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            values["device_allocated_bytes"] = torch.cuda.memory_allocated()
            values["device_reserved_bytes"] = torch.cuda.memory_reserved()
        return values


def peak_rss_bytes() -> int:
    """The most host memory this process ever held resident, as the kernel counted it, since the last reset."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` count from now on, without what was freed; where the system cannot, nothing happens."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc's alone
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def device_peaks() -> dict[str, float]:
    """Peak device memory through torch's allocator since it was last reset; empty without CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    return {
        "peak_device_allocated_bytes": float(torch.cuda.max_memory_allocated()),
        "peak_device_reserved_bytes": float(torch.cuda.max_memory_reserved()),
    }


def energy_joules() -> float | None:
    """Energy all GPUs have used since the driver was loaded; None where NVML does not tell."""
    with nvml() as lib:
        if lib is None:
            return None
        try:
            handles = [lib.nvmlDeviceGetHandleByIndex(i) for i in range(lib.nvmlDeviceGetCount())]
            return float(sum(lib.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles)) / 1000
        except lib.NVMLError:
            return None
