"""Work of the compute device, timed run by run; and how fast compressed numbers are turned back."""

import functools
import time
from collections.abc import Callable

import torch

from flexllmgen.compressed_size import compressed_bytes
from flexllmgen.compression import BITS, dequantise, quantise
from flexllmgen.kv_compression import CompressedSegment, KVCodec
from profiling.profile import Measurement

_TRIALS = 8
_ENOUGH_S = 0.5
_ROW_BITS = 4
"""Rows in 8 bits are compressed by an operation or two less."""


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


def measure_kv(dtype: torch.dtype) -> dict[str, Measurement]:
    """On the CPU, where no kernel does it: how fast compressed KV of a step is turned back, and its new row compressed.

    Of 8 sequences, 8 heads of 64; a row is little, so that it is the operations that take the time, whatever the model.
    """
    heads, size, sequences, positions, group = 8, 64, 8, 256, 64
    scratch = torch.empty(2 * positions * sequences * heads * size, dtype=dtype)
    prompt = torch.randn(sequences, positions, heads, size).to(dtype)
    row = prompt[:, -1:].contiguous()
    rates: dict[str, Measurement] = {}
    for bits in BITS:
        codec = KVCodec(
            bits=bits, group_size=group, kv_heads=heads, head_dim=size, scratch=scratch, sequences=sequences
        )
        rows = torch.zeros(
            positions, compressed_bytes((sequences, 2, heads * size), bits, group), dtype=torch.uint8
        )
        segment = codec.segment(rows, 0, torch.zeros(sequences, heads, size, dtype=dtype))
        codec.begin(0, positions)
        codec.write_prompt(segment, prompt, prompt, 0, None)
        read = timed_runs(functools.partial(codec.read, segment, 0, positions), "cpu", _TRIALS)
        rates[f"kv_{bits}bit_bytes_per_s"] = Measurement.of(scratch.nbytes, read)
        if bits == _ROW_BITS:
            write = functools.partial(_compress_row, codec, segment, row, positions - 1)
            rates["kv_rows_per_s"] = Measurement.of(1, timed_runs(write, "cpu", _TRIALS))
    return rates


def _compress_row(codec: KVCodec, segment: CompressedSegment, row_B1KH: torch.Tensor, position: int) -> None:
    """What a step does with the key and value of one layer; both are `row_B1KH` here."""
    codec.turned(row_B1KH)
    codec.write_step(segment, row_B1KH, row_B1KH, position)


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
