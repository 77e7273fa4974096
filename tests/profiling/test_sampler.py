"""The sampler: what it sees, that it ends, what it costs, and that a mute GPU cannot fail a run."""

import contextlib
import mmap
import threading
import time
from typing import Any

import pytest

from profiling import sampler as sampler_file
from profiling.sampler import Sampler, device_peaks, energy_joules, peak_rss_bytes


def test_it_sees_memory_come() -> None:
    with Sampler(interval_s=0.01) as sampler:
        time.sleep(0.05)
        # Mapped afresh: the heap may give memory that is resident already.
        with mmap.mmap(-1, 100_000_000) as block:
            for page in range(0, len(block), mmap.PAGESIZE):
                block[page] = 1
            time.sleep(0.05)
    rss = [value for value in sampler.samples().series["rss_bytes"] if value is not None]
    assert max(rss) - rss[0] > 80_000_000
    assert peak_rss_bytes() >= max(rss) * 0.95


def test_every_series_has_a_value_per_time() -> None:
    with Sampler(interval_s=0.01) as sampler:
        time.sleep(0.1)
    samples = sampler.samples()
    assert len(samples.time_s) >= 4
    assert samples.time_s == sorted(samples.time_s)
    assert samples.time_s[0] < 0.1
    assert all(len(values) == len(samples.time_s) for values in samples.series.values())
    assert {"rss_bytes", "cpu_percent", "system_memory_bytes"} <= set(samples.series)
    assert abs(samples.started_at_ms / 1000 - time.time()) < 10


def test_phases_are_kept_however_they_end() -> None:
    with Sampler() as sampler:
        with sampler.phase("load"):
            time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt), sampler.phase("repeat 1"):
            raise KeyboardInterrupt
    (load, start, end), (repeat, begin, _) = sampler.samples().phases
    assert (load, repeat) == ("load", "repeat 1")
    assert end - start >= 0.01
    assert begin >= end


def test_it_ends_with_its_block() -> None:
    before = threading.active_count()
    with Sampler(interval_s=0.01):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_it_costs_under_one_percent_of_a_core(record_property: Any) -> None:
    with Sampler() as sampler:
        trials = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(20):
                sampler._take()
            trials.append((time.perf_counter() - started) / 20)
    share = min(trials) / Sampler().interval_s
    record_property("sampler_share", f"{share:.3%} of a core")
    assert share < 0.01, f"{share:.3%} of a core"


class NotSupportedError(Exception):
    """As NVML raises for what a device cannot tell."""


class MuteNvml:
    """A driver whose GPU tells how much memory is used, if that, and nothing else."""

    NVMLError = NotSupportedError

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML's names
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object) -> Any:
            raise NotSupportedError(name)

        return refuse


def test_a_gpu_that_tells_nothing_fails_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of a GPU (MIG) have no utilisation, integrated ones no memory of their own."""
    monkeypatch.setattr(sampler_file, "nvml", lambda: contextlib.nullcontext(MuteNvml()))
    with Sampler(interval_s=0.01) as sampler:
        time.sleep(0.03)
    samples = sampler.samples()
    assert len(samples.time_s) >= 2
    assert not [name for name in samples.series if name.startswith("gpu_")]
    assert energy_joules() is None


def test_energy_is_summed_in_joules(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoGpus(MuteNvml):
        def nvmlDeviceGetCount(self) -> int:  # noqa: N802
            return 2

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
            return 1500 * (handle + 1)

    monkeypatch.setattr(sampler_file, "nvml", lambda: contextlib.nullcontext(TwoGpus()))
    assert energy_joules() == 4.5


def test_without_a_gpu_there_are_no_device_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_peaks() == {}


def test_what_an_engine_counts_is_sampled_from_then_on() -> None:
    with Sampler(interval_s=0.01) as sampler:
        time.sleep(0.02)
        sampler.watch(lambda: {"moved_h2d_bytes": 7.0})
        time.sleep(0.05)
    counted = sampler.samples().series["moved_h2d_bytes"]
    assert counted[0] is None
    assert counted[-1] == 7.0
