"""Direct disk I/O: a file opened past the page cache, read and written in pieces by several threads.

Reads and writes are whole pages from page-aligned memory, which is what O_DIRECT asks for; where a file
system does not know O_DIRECT, the same calls go through the page cache.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from flexllmgen.errors import OffloadDirError
from flexllmgen.memory.transfer import Traffic
from flexllmgen.units import DISK_THREADS, PAGE, GiB

READ_BYTES = 8 << 20
"""Bytes of one read: several in flight keep the device busy, and the first arrive early."""


class DirectFile:
    """A file read and written by page-aligned pieces.

    Args:
        size: the file is made this long at once, so that a full disk is found now and not later.
    """

    def __init__(self, path: Path, *, writable: bool = False, size: int | None = None) -> None:
        self.path = path
        flags = (os.O_RDWR | os.O_CREAT) if writable else os.O_RDONLY
        try:
            self._fd = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _dir_error(path, error) from error
            self._fd = os.open(path, flags, 0o644)
        if size:
            try:
                os.posix_fallocate(self._fd, 0, size)
            except OSError as error:
                os.close(self._fd)
                path.unlink(missing_ok=True)
                raise _dir_error(path, error, size) from error

    def read(self, target: torch.Tensor, offset: int) -> None:
        """Fills `target`, a flat byte tensor, from `offset`; both page-aligned, the length a whole number of
        pages.

        Raises:
            OffloadDirError: if the disk fails or the file is too short.
        """
        view, done = _memory(target), 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise _dir_error(self.path, error) from error
            if not count:
                raise OffloadDirError(
                    f"{self.path} ends at byte {offset + done}, wanted {offset + len(view)}"
                )
            done += count

    def write(self, source: torch.Tensor, offset: int) -> None:
        """Writes `source`, a flat byte tensor, at `offset`; aligned like `read`.

        Raises:
            OffloadDirError: if the disk fails or is full.
        """
        view, done = _memory(source), 0
        while done < len(view):
            try:
                done += os.pwritev(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise _dir_error(self.path, error, len(view)) from error

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def scratch_file(directory: Path, name: str, size: int) -> DirectFile:
    """A file of `size` bytes that no one else sees and that goes away with the process."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f".{name}-{os.getpid()}-{os.urandom(4).hex()}"
    file = DirectFile(path, writable=True, size=size)
    path.unlink()
    return file


class DiskPool:
    """Threads that read and write pieces of direct files."""

    def __init__(self, traffic: Traffic, threads: int = DISK_THREADS) -> None:
        self._traffic = traffic
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="flexllmgen-disk")

    def read(
        self, file: DirectFile, target: torch.Tensor, offset: int
    ) -> list[tuple[int, int, Future[None]]]:
        """Starts reading `target`'s pages; returns (start, stop, future) of each piece, in order."""
        return self._pieces(file.read, "disk_read", target, offset)

    def write(
        self, file: DirectFile, source: torch.Tensor, offset: int
    ) -> list[tuple[int, int, Future[None]]]:
        """Starts writing `source`'s pages; returns (start, stop, future) of each piece, in order."""
        return self._pieces(file.write, "disk_write", source, offset)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _pieces(
        self, action: Callable[[torch.Tensor, int], None], direction: str, memory: torch.Tensor, offset: int
    ) -> list[tuple[int, int, Future[None]]]:
        pieces = []
        for start in range(0, memory.numel(), READ_BYTES):
            stop = min(start + READ_BYTES, memory.numel())
            future = self._pool.submit(self._one, action, direction, memory[start:stop], offset + start)
            pieces.append((start, stop, future))
        return pieces

    def _one(
        self, action: Callable[[torch.Tensor, int], None], direction: str, memory: torch.Tensor, offset: int
    ) -> None:
        action(memory, offset)
        self._traffic.add(direction, memory.numel())


def wait_all(pieces: list[tuple[int, int, Future[None]]]) -> None:
    """Waits for every piece and raises the first error."""
    for _ in in_order(pieces):
        pass


Piece = TypeVar("Piece", bound=tuple[Any, ...])


def in_order(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yields each piece when its future, the last of its fields, is done; raises its error.

    Even then no piece is left under way: its memory may be used for something else next.
    """
    try:
        for piece in pieces:
            piece[-1].result()
            yield piece
    finally:
        wait([piece[-1] for piece in pieces])


def _memory(tensor: torch.Tensor) -> memoryview:
    address, size = tensor.data_ptr(), tensor.numel()
    assert address % PAGE == 0, "direct I/O from memory that is not page-aligned"
    assert size % PAGE == 0, "direct I/O of a part of a page"
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _dir_error(path: Path, error: OSError, need: int | None = None) -> OffloadDirError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need_text = f" needs {need / GiB:.2f} GiB more" if need else ""
        return OffloadDirError(
            f"no space left: {path.name}{need_text} in {path.parent}; free some or choose another"
        )
    return OffloadDirError(f"cannot use {path}: {error.strerror or error}")
