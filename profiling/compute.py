"""Work of the compute device, timed run by run; and how fast compressed numbers are turned back."""

import time
from collections.abc import Callable

import torch

from flexllmgen.compression import dequantise, quantise
from profiling.profile import Measurement

_TRIALS = 8
_ENOUGH_S = 0.5


def measure_dequantise(device: str, dtype: torch.dtype, bits: int) -> Measurement:
    """Bytes of numbers a second that a matrix is turned back into; larger than the caches, as a layer is."""
    rows, size = (8192, 8192) if device == "cuda" else (1024, 4096)
    dense = torch.empty(rows, size, dtype=dtype, device=device)
    some = torch.randn(64, size, device=device).to(dtype)
    parts = [part.repeat(rows // 64, 1) for part in quantise(some, bits, 64)]
    codes, scale, zero = parts

    def work() -> None:
        dequantise(codes, scale, zero, bits, 64, dense)

    return Measurement.of(dense.nbytes, timed_runs(work, device, _TRIALS))


def timed_runs(action: Callable[[], object], device: str, trials: int) -> list[float]:
    """Seconds of each run after one that does not count; waits for the device before and after each.

    Ends early when the runs take long, and then one or two say enough.
    """
    times: list[float] = []
    for _ in range(trials + 1):
        if len(times) > 1 and sum(times) > _ENOUGH_S:
            break
        times.append(_once(action, device))
    return times[1:]


def _once(action: Callable[[], object], device: str) -> float:
    """Seconds of one run, the device's work before it and after it waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
