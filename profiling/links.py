"""How fast copies between host and GPU are: alone, both ways at once, and while the CPU reads memory.

From host memory locked as the engine locks its own. Copies that run beside others are timed on their own stream,
by the device's clock.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, repeat

import torch

from flexllmgen.memory.arena import HostArena
from profiling.compute import timed_runs
from profiling.memory import MIB, HostWork
from profiling.profile import Measurement

COPY_BYTES = 256 * MIB
SOURCE_BYTES = 1024 * MIB
"""What is copied up, in turn: more than a processor keeps near, so that copies compete for memory as an engine's do."""
_TRIALS = 5
_SIDE_BY_SIDE_S = 0.25
"""How long copies and the CPU run beside each other: some rounds of what the CPU does."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy over the link, on a stream of its own; its sources take turns."""

    sources: Iterator[torch.Tensor]
    target: torch.Tensor
    stream: torch.cuda.Stream

    def start(self, times: int = 1) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            begin.record()
            for _ in range(times):
                self.target.copy_(next(self.sources), non_blocking=True)
            end.record()
        return begin, end


@dataclass(frozen=True, slots=True)
class Links:
    """The two directions of one GPU's link."""

    up: _Copy
    down: _Copy

    def alone(self) -> dict[str, Measurement]:
        """Rates of each direction while nothing else runs, and from memory that is not page-locked."""
        pageable = torch.ones(COPY_BYTES, dtype=torch.uint8)
        return {
            "h2d_bytes_per_s": _measure(self.up.start),
            "d2h_bytes_per_s": _measure(self.down.start),
            "h2d_pageable_bytes_per_s": _measure(lambda: self.up.target.copy_(pageable)),
        }

    def both_ways(self) -> dict[str, Measurement]:
        """Rates of each direction while the other runs too."""
        return {
            "h2d_both_ways_bytes_per_s": _beside(self.up, self.down),
            "d2h_both_ways_bytes_per_s": _beside(self.down, self.up),
        }

    def beside(self, work: HostWork) -> tuple[Measurement, Measurement]:
        """Rates of copies up and of what the CPU does, both at once."""
        copies = self._copies_for(work)
        up_s, host_s = [], []
        for _ in range(_TRIALS + 1):
            torch.cuda.synchronize()
            begin, end = self.up.start(copies)
            started, rounds = time.perf_counter(), 0
            while not end.query():
                work.run()
                rounds += 1
            host_s.append((time.perf_counter() - started) / max(1, rounds))
            up_s.append(begin.elapsed_time(end) / 1e3)
        return Measurement.of(copies * COPY_BYTES, up_s[1:]), Measurement.of(work.num_bytes, host_s[1:])

    def _copies_for(self, work: HostWork) -> int:
        """Copies that outlast many rounds of the work, so that how the last one ends does not matter."""
        copy_s = min(timed_runs(self.up.start, "cuda", 2))
        work_s = min(timed_runs(work.run, "cpu", 2))
        return max(1, round(max(_SIDE_BY_SIDE_S, 8 * work_s) / copy_s))


@contextmanager
def open_links() -> Iterator[Links]:
    """Memory on both sides, page-locked on the host, for as long as the context lasts."""
    arena = HostArena(register=True)
    regions = [arena.reserve(num_bytes) for num_bytes in (SOURCE_BYTES, COPY_BYTES)]
    arena.commit()
    try:
        source, target = (arena.view(region).fill_(1) for region in regions)
        on_gpu = [torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
        yield Links(
            up=_Copy(cycle(source.split(COPY_BYTES)), on_gpu[0], torch.cuda.Stream()),
            down=_Copy(repeat(on_gpu[1]), target, torch.cuda.Stream()),
        )
    finally:
        torch.cuda.synchronize()
        arena.close()


def _measure(copy: Callable[[], object]) -> Measurement:
    return Measurement.of(COPY_BYTES, timed_runs(copy, "cuda", _TRIALS))


def _beside(copy: _Copy, other: _Copy) -> Measurement:
    seconds = []
    for _ in range(_TRIALS + 1):
        torch.cuda.synchronize()
        # So many that they outlast the copy whose time is taken, however the two share the link.
        other.start(6)
        begin, end = copy.start(2)
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return Measurement.of(2 * COPY_BYTES, seconds[1:])
