"""Lanes: ordered queues of copies that run beside the compute, and the events that order them against it.

On an accelerator a lane is a stream; where disk is involved, or without an accelerator, a lane is also a
thread, so that waiting for the disk does not hold up the main loop. A lane without either runs its work at
once: the same steps, one after another. An error inside a lane surfaces at whoever waits for the work, never
as a hang.
"""

import ctypes
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import torch


class Event:
    """The end of some work. On an accelerator, work counts as issued before it has ended there.

    Args:
        elsewhere: another thread issues the work, so that waiting for this may have to wait for that.
    """

    __slots__ = ("_cuda", "_error", "_issued")

    def __init__(self, *, elsewhere: bool = False) -> None:
        # Without a thread there is nothing to wait for, and a lock costs as much as starting a copy.
        self._issued: Future[None] | None = Future() if elsewhere else None
        self._cuda: torch.cuda.Event | None = None
        self._error: BaseException | None = None

    def set(self, cuda: torch.cuda.Event | None = None) -> None:
        """Marks the work as issued; `cuda` fires when the accelerator has done it."""
        self._cuda = cuda
        if self._issued is not None:
            self._issued.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Marks the work as failed; whoever waits gets the error."""
        self._error = error
        if self._issued is not None:
            self._issued.set_result(None)

    def order(self, stream: torch.cuda.Stream | None) -> None:
        """Later work of `stream` runs after this; without a stream, waits here. Raises the work's error."""
        if self._issued is not None:
            self._issued.result()
        if self._error is not None:
            raise self._error
        if self._cuda is not None:
            if stream is None:
                self._cuda.synchronize()
            else:
                stream.wait_event(self._cuda)

    def synchronize(self) -> None:
        """Waits until the work has ended. Raises the work's error."""
        self.order(None)


class Lane:
    """An ordered queue of work.

    Args:
        stream: the stream that the work is issued on; None without an accelerator.
        threaded: the work is issued by a thread of the lane's own, which may wait.
    """

    def __init__(self, name: str, stream: torch.cuda.Stream | None, *, threaded: bool) -> None:
        self.stream = stream
        self._work: queue.SimpleQueue[tuple[Callable[[], None], tuple[Event, ...], Event] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._serve, name=f"flexllmgen-{name}", daemon=True)
            self._thread.start()

    def submit(self, work: Callable[[], None], after: Iterable[Event | None] = ()) -> Event:
        """Queues `work`, to run after the events and all earlier work of this lane."""
        event = Event(elsewhere=self._thread is not None)
        needs = tuple(each for each in after if each is not None)
        if self._thread is None:
            self._run(work, needs, event)
        else:
            self._work.put((work, needs, event))
        return event

    def close(self) -> None:
        """Ends the lane after the work it has."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    @torch.inference_mode()  # The mode is a thread's own, and lanes write what engines made in it.
    def _serve(self) -> None:
        if self.stream is not None:
            torch.cuda.set_device(self.stream.device)
        while (item := self._work.get()) is not None:
            self._run(*item)

    def _run(self, work: Callable[[], None], needs: tuple[Event, ...], event: Event) -> None:
        try:
            for need in needs:
                need.order(self.stream)
            if self.stream is None:
                work()
                event.set()
            else:
                # In C++; torch.cuda.stream() asks for the current device, and that the environment.
                with self.stream:
                    work()
                done = torch.cuda.Event()
                done.record(self.stream)
                event.set(done)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            event.fail(error)


def mark(device: torch.device) -> Event:
    """An event after all compute issued so far on the current stream."""
    event = Event()
    if device.type == "cuda":
        cuda = torch.cuda.Event()
        cuda.record(current_stream(device))
        event.set(cuda)
    else:
        event.set()
    return event


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that work is now issued on; None without an accelerator.

    Args:
        device: with its index, as `devices.py` gives it: without one torch asks the environment for it at each call.
    """
    return torch.cuda.current_stream(device.index) if device.type == "cuda" else None


PACKET_BYTES = 64 << 20
"""Copies are cut into such pieces: long enough for the link's full rate, short enough to take turns."""


def copy_whole(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies a contiguous tensor onto another of its type and shape, on an accelerator without waiting.

    Between host memories the calling thread copies alone. torch would give it workers, and libgomp lets all idle workers
    of a process sleep between operations once they are more than its processors: decode steps then take three times as long.
    """
    if target.device.type == source.device.type == "cpu":
        assert target.is_contiguous()
        assert source.is_contiguous()
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source, non_blocking=True)


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> int:
    """Copies flat byte tensors in packets without waiting; returns the bytes."""
    size = source.numel()
    for start in range(0, size, PACKET_BYTES):
        stop = min(start + PACKET_BYTES, size)
        copy_whole(target[start:stop], source[start:stop])
    return size


class Traffic:
    """Bytes moved, per direction; lanes add to it from their threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes: dict[str, int] = {"h2d": 0, "d2h": 0, "disk_read": 0, "disk_write": 0}

    def add(self, direction: str, num_bytes: int) -> None:
        with self._lock:
            self.bytes[direction] += num_bytes
