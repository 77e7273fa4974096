"""How fast the disk under a folder is: past the page cache as the engine reads and writes it, and through it.

Files are removed again. On a disk that is nearly full half of what is free is taken: a plan that needs less must
not be refused for this.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch

from flexllmgen.errors import OffloadDirError
from flexllmgen.memory.arena import HostArena
from flexllmgen.memory.disk import READ_BYTES, DirectFile, DiskPool, wait_all
from flexllmgen.memory.transfer import Traffic
from flexllmgen.units import PAGE
from profiling.compute import timed_runs
from profiling.hardware import free_disk_bytes
from profiling.memory import MIB
from profiling.profile import Measurement

PoolAction = Callable[[DirectFile, torch.Tensor, int], list[tuple[int, int, Future[None]]]]
_TRIALS = 5
_ENOUGH_S = 1.5


def measure_disk(folder: Path, num_bytes: int = 256 * MIB) -> dict[str, Measurement]:
    """What the disk that holds `folder` does, by the names of Rates: read and write, and how it starts with little.

    Direct I/O of random content by the engine's own threads in its own pieces; a write ends when the disk has it.
    `..._alone_...` has one piece under way at a time, `disk_reads_per_s` and `disk_writes_per_s` one page.

    Raises:
        OffloadDirError: the folder cannot be written, or is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    path = folder / f".rate-{os.getpid()}"
    num_bytes = _that_fits(folder, num_bytes)
    arena = HostArena(register=False)
    region = arena.reserve(num_bytes)
    arena.commit()
    memory = arena.view(region).random_()
    pool = DiskPool(Traffic())
    try:
        file = DirectFile(path, writable=True, size=num_bytes)
        try:

            def write() -> None:
                wait_all(pool.write(file, memory, 0))
                file.sync()

            # The first time a file is written its blocks are laid out; that does not count.
            write()
            writes = _trials(write)
            reads = _trials(lambda: wait_all(pool.read(file, memory, 0)))
            offsets = range(0, num_bytes, READ_BYTES)

            def one_by_one(action: PoolAction, size: int) -> None:
                for offset in offsets:
                    wait_all(action(file, memory[offset : offset + size], offset))

            alone = _trials(lambda: one_by_one(pool.read, READ_BYTES))
            page_reads = _trials(lambda: one_by_one(pool.read, PAGE))
            page_writes = _trials(lambda: one_by_one(pool.write, PAGE))
        finally:
            file.close()
    finally:
        pool.close()
        path.unlink(missing_ok=True)
        arena.close()
    return {
        "disk_read_bytes_per_s": Measurement.of(num_bytes, reads),
        "disk_write_bytes_per_s": Measurement.of(num_bytes, writes),
        "disk_read_alone_bytes_per_s": Measurement.of(num_bytes, alone),
        "disk_reads_per_s": Measurement.of(len(offsets), page_reads),
        "disk_writes_per_s": Measurement.of(len(offsets), page_writes),
    }


def measure_cached_file(folder: Path, num_bytes: int = 128 * MIB) -> Measurement:
    """Reading a file that was just written, through the page cache, into memory already touched.

    Raises:
        OffloadDirError: the folder cannot be written, or is full.
    """
    path = folder / f".cached-{os.getpid()}"
    num_bytes = _that_fits(folder, num_bytes)
    target = bytearray(num_bytes)
    try:
        path.write_bytes(os.urandom(MIB) * (num_bytes // MIB))

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                file.readinto(target)

        return Measurement.of(num_bytes, timed_runs(read, "cpu", _TRIALS))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        path.unlink(missing_ok=True)


def _trials(action: Callable[[], object]) -> list[float]:
    """Seconds of each run, the first one included; two are enough on a slow disk."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < _TRIALS and sum(seconds) < _ENOUGH_S):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return seconds


def _that_fits(folder: Path, num_bytes: int) -> int:
    """As much of `num_bytes` as half of the free disk holds, in whole pieces of 16 MiB; one at least."""
    piece = 16 * MIB
    return max(piece, min(num_bytes, free_disk_bytes(folder) // 2 // piece * piece))


def _cannot_write(folder: Path, error: OSError) -> OffloadDirError:
    return OffloadDirError(f"{folder}: cannot be written ({error.strerror}); name another folder")
