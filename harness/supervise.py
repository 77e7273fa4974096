"""Starts a worker, follows its events, passes on interruptions, and notices when it dies.

Knows how a worker is run, not what it runs or how the run is recorded.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from harness.job import Job, read_events

_KEPT_LINES = 40
_LAST_WORDS_S = 15


class Worker:
    """A worker process and the pipes to it.

    A first SIGINT or SIGTERM to this process asks the worker to stop and write what it has; a second
    kills it.
    """

    def __init__(self, job: Job) -> None:
        # A session of its own: Ctrl-C reaches the command alone, which decides what the worker gets.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            # Whatever the terminal speaks: between the two it is UTF-8.
            env={**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"},
            start_new_session=True,
        )
        self.interrupted = False
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._echo = job.verbose
        self._stderr = threading.Thread(target=self._drain, name="worker-stderr", daemon=True)
        self._stderr.start()
        self._write(job.model_dump_json() + "\n")

    def go(self) -> None:
        """Tell the worker that timing may begin."""
        self._write("go\n")

    def follow(self, on_event: Callable[[Mapping[str, Any]], None]) -> int:
        """Pass events on until the worker has ended; return its exit code, negative for a signal."""
        assert self.process.stdout is not None
        for event in read_events(self.process.stdout):
            on_event(event)
        code = self.process.wait()
        self._stderr.join(timeout=5)
        return code

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While in here, SIGINT and SIGTERM go to the worker."""
        previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self.process.poll() is None:
                # Something went wrong here; the worker may still write what it has.
                self.process.terminate()
                try:
                    self.process.wait(timeout=_LAST_WORDS_S)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        self.interrupt()

    def interrupt(self) -> None:
        """Ask the worker to stop and write what it has; the second time, kill it."""
        if self.interrupted:
            self.process.kill()
        else:
            self.interrupted = True
            self.process.terminate()

    def _write(self, text: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text)
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            # It has died already; `follow` will tell how.
            pass

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last_lines.append(line.rstrip())
            if self._echo:
                sys.stderr.write(line)
