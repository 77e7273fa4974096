"""How fast memory is read and copied, on the host and on the device, and how fast the CPU attends to KV.

Sizes are larger than caches are. Copy rates count each byte once, though it is read and written.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flexllmgen.compressed_size import compressed_bytes
from flexllmgen.cpu_attention import prepare_attention
from flexllmgen.host_attention import attention_threads
from flexllmgen.kv_cache import by_sequence
from flexllmgen.memory.arena import HostArena
from profiling.compute import timed_runs
from profiling.profile import Measurement

MIB = 1 << 20
READ_BYTES = 512 * MIB
COPY_BYTES = 256 * MIB
_KV_BYTES = 1024 * MIB
_POSITIONS = 512
_MICRO_BATCHES = 16
CODES_GROUP = 64
"""Numbers of compressed KV that share a scale, unless told otherwise."""
_TRIALS = 7
_GPU_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class HostWork:
    """Something the CPU does, and the bytes of host memory that it reads; `parts` do the same one after the other."""

    run: Callable[[], object]
    num_bytes: int
    parts: tuple[Callable[[], object], ...] = ()

    def measure(self) -> Measurement:
        """Its rate when nothing else runs."""
        return Measurement.of(self.num_bytes, timed_runs(self.run, "cpu", _TRIALS))

    def call_s(self) -> float:
        """Seconds that each of the parts takes beyond its share: all of them, in turns with the whole."""
        if len(self.parts) < 2:
            return 0.0
        beyond_s = [_seconds(*self.parts) - _seconds(self.run) for _ in range(1 + _TRIALS)][1:]
        return max(0.0, statistics.median(beyond_s)) / (len(self.parts) - 1)


def _seconds(*actions: Callable[[], object]) -> float:
    started = time.perf_counter()
    for action in actions:
        action()
    return time.perf_counter() - started


def host_read() -> HostWork:
    """All cores sum an array."""
    data = torch.ones(READ_BYTES // 4, dtype=torch.float32)
    return HostWork(data.sum, data.nbytes)


def host_attention(
    dtype: torch.dtype,
    *,
    num_heads: int = 32,
    num_kv_heads: int = 32,
    head_dim: int = 128,
    codes: bool = False,
) -> HostWork:
    """A decode step's attention, by the engine's kernel, with its threads, on KV as its cache lays it out; its parts are
    micro-batches.

    Args:
        codes: of KV in 8 bits, in groups of CODES_GROUP.
    """
    numbers = 2 * num_kv_heads * head_dim
    position_bytes = (
        compressed_bytes((2, numbers // 2), 8, CODES_GROUP) if codes else numbers * dtype.itemsize
    )
    batch = max(1, _KV_BYTES // (position_bytes * _POSITIONS))
    arena = HostArena(register=False)
    region = arena.reserve(batch * _POSITIONS * position_bytes)
    arena.commit()
    # Small numbers as any type.
    rows_BSC = arena.view(region).fill_(0x1C).view(batch, _POSITIONS, -1)
    query_BNH = torch.ones(batch, num_heads, head_dim, dtype=dtype)
    out_BNH, threads = torch.empty_like(query_BNH), attention_threads()

    def attending(first: int, stop: int) -> Callable[[], object]:
        mine = slice(first, stop)
        kv_S2BKH, *sides = by_sequence(
            rows_BSC[mine], num_kv_heads, head_dim, dtype=None if codes else dtype, group_size=CODES_GROUP
        )
        more: dict[str, Any] = {}
        if codes:
            more = {"scale_S2BKG": sides[0], "zero_S2BKG": sides[1], "group_size": CODES_GROUP}
        return prepare_attention(
            query_BNH[mine], kv_S2BKH, _POSITIONS, out_BNH=out_BNH[mine], threads=threads, **more
        )

    bounds = [batch * part // _MICRO_BATCHES for part in range(_MICRO_BATCHES + 1)]
    parts = tuple(attending(first, stop) for first, stop in itertools.pairwise(bounds) if first < stop)
    return HostWork(attending(0, batch), rows_BSC.nbytes, parts)


def measure_read(device: str) -> Measurement:
    """Reading memory of the device."""
    num_bytes = READ_BYTES if device == "cpu" else _gpu_bytes(1024 * MIB)
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return _measure(data.sum, data.nbytes, device)


def measure_copy(device: str) -> Measurement:
    """Copying within memory of the device."""
    num_bytes = COPY_BYTES if device == "cpu" else _gpu_bytes(COPY_BYTES)
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return _measure(lambda: target.copy_(source), num_bytes, device)


def _measure(action: Callable[[], object], num_bytes: int, device: str) -> Measurement:
    # Several launches a trial on a GPU, where one is over before the next could be timed well.
    rounds = _GPU_ROUNDS if device == "cuda" else 1

    def run() -> None:
        for _ in range(rounds):
            action()

    return Measurement.of(rounds * num_bytes, timed_runs(run, device, _TRIALS))


def _gpu_bytes(wanted: int) -> int:
    """As much of `wanted` as leaves nearly all of the GPU's free memory free."""
    free, _ = torch.cuda.mem_get_info()
    return max(MIB, min(wanted, free // 8 // MIB * MIB))
