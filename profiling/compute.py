"""How fast linear layers run at the shapes a model has: the compute half of every prediction."""

import math
import time
from collections.abc import Callable

import torch

from flexllmgen.compression import dequantise, quantise
from flexllmgen.spec import ModelSpec
from profiling.profile import Measurement

_ROTATED_BYTES = 256 << 20
_TRIALS = 8
_ENOUGH_S = 0.5


def linear_bytes_per_s(
    spec: ModelSpec,
    dtype: str,
    device: str,
    *,
    rows: int,
    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> float:
    """How many weight bytes a second linear layers of this width get through, with `rows` input rows.

    Goes round several matrices, together larger than any cache, as a model's layers do. `linear` is the engine's own.
    """
    kind = getattr(torch, dtype)
    matrix_bytes: int = spec.hidden_size * spec.intermediate_size * kind.itemsize
    count = min(64, max(2, _ROTATED_BYTES // matrix_bytes))
    # With many rows arithmetic and not memory sets the pace: a few matrices are then enough.
    if rows > 64:
        count = min(count, 4)
    weights = [
        torch.randn(spec.intermediate_size, spec.hidden_size, device=device).to(kind) for _ in range(count)
    ]
    x = torch.randn(rows, spec.hidden_size, device=device).to(kind)

    # Round after round, and of each matrix its quickest: on a busy machine no round is quick from end to end.
    quickest = [math.inf] * count
    started = time.perf_counter()
    for turn in range(_TRIALS + 1):
        for index, weight in enumerate(weights):
            seconds = _once(lambda weight=weight: linear(x, weight), device)  # type: ignore[misc]
            if turn:
                quickest[index] = min(quickest[index], seconds)
        if turn > 1 and time.perf_counter() - started > _ENOUGH_S:
            break
    return count * matrix_bytes / sum(quickest)


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


def best_s(action: Callable[[], object], device: str) -> float:
    """Seconds of the quickest of some runs after one that does not count.

    The quickest, because on a shared machine the others say how busy it was just then.
    """
    return min(timed_runs(action, device, _TRIALS))


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
