"""Runs one worker to its end: what it says on the way, where its folder is, and why it ended if it ended badly.

Knows nothing of how a run is recorded or shown: the verbs that launch a worker (`eval`, `benchmark`) do that.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flexllmgen.errors import OutOfMemory
from harness import exit_codes
from harness.results import UNWRITABLE, RunError, RunResult, RunStatus, unwritable, write_text
from harness.supervise import Worker

log = logging.getLogger(__name__)

TIMED_OUT = "CellTimeout"
_OUT_OF_MEMORY = "the worker was killed by signal 9; most likely the machine ran out of memory: lower --batch-size or --cpu-mem"
# A worker that is asked to stop may write what it has; one that does not come back from native code is killed.
_LAST_WORDS_S = 15.0

OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a worker ended.

    Args:
        code: its exit code, negative for a signal.
        result: what it left; None where it had not planned yet, or was to plan only.
        error: why it failed; None where it did not.
        interrupted: whether SIGINT or SIGTERM to this process ended it.
    """

    code: int
    folder: Path | None
    result: RunResult | None
    error: RunError | None
    interrupted: bool


@contextmanager
def one_signal_ignored(tell: Callable[[str], None]) -> Iterator[None]:
    """While in here, a first SIGINT or SIGTERM is answered with a word; a second interrupts."""

    def on_signal(_signum: int, _frame: FrameType | None) -> None:
        tell("delivering what was measured; interrupt again to leave it to `harness sync`")
        for number in previous:
            signal.signal(number, signal.default_int_handler)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def last_line(worker: Worker) -> str:
    """The last words of a worker that has ended."""
    return next((line for line in reversed(worker.last_lines) if line.strip()), "no output")


class Launch:
    """One worker, from its start to its end.

    Args:
        worker: the process, just started.
        on_event: told every event; after it has seen `ready`, the worker's timed passes begin.
        timeout_s: how long the worker may take in all; None for as long as it likes.
    """

    def __init__(self, worker: Worker, on_event: OnEvent, *, timeout_s: float | None = None) -> None:
        self.worker = worker
        self.folder: Path | None = None
        self.timed_out = False
        self._on_event = on_event
        self._timeout_s = timeout_s
        self._error: Mapping[str, Any] | None = None
        self._ended = threading.Event()

    def run(self) -> Ended:
        """Follow the worker to its end; this process sleeps on the pipe meanwhile."""
        with self.worker.interruptible():
            if self._timeout_s is not None:
                threading.Thread(target=self._watch_time, name="cell-timeout", daemon=True).start()
            try:
                code = self.worker.follow(self._take)
            finally:
                self._ended.set()
        if self.folder is None:
            error = self._early_end(code)
            return Ended(
                code=code, folder=None, result=None, error=error, interrupted=self.worker.interrupted
            )
        result = self._read_result(self.folder, code)
        return Ended(
            code=code,
            folder=self.folder,
            result=result,
            error=result.error,
            interrupted=self.worker.interrupted,
        )

    def _take(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "planned" if event["folder"] is not None:
                self.folder = Path(event["folder"])
            case "error":
                self._error = event
        self._on_event(event)
        if event["event"] == "phase" and event["name"] == "ready":
            # Whoever listens is done by now; nothing of this process runs while timing does.
            self.worker.go()

    def _watch_time(self) -> None:
        if self._ended.wait(self._timeout_s):
            return
        self.timed_out = True
        self.worker.process.terminate()
        if not self._ended.wait(_LAST_WORDS_S):
            self.worker.process.kill()

    def _read_result(self, folder: Path, code: int) -> RunResult:
        result = RunResult.read(folder)
        # One that had ended well by itself before its time was up has nothing to answer for.
        late = self.timed_out and result.status is not RunStatus.FINISHED
        if result.status is not RunStatus.RUNNING and not late:
            return result
        status = RunStatus.FAILED
        if late:
            error = self._timeout_error(bool(result.repeats))
        elif self.worker.interrupted:
            # The worker could not write its own end.
            status = RunStatus.KILLED
            error = RunError(
                type="Interrupted", message="interrupted and killed", exit_code=exit_codes.INTERRUPTED
            )
        elif self._error is not None and self._error.get("type") == UNWRITABLE:
            # It could not write its own end, for want of room; nor may this process be able to.
            return self._unwritten(result)
        else:
            if code == -signal.SIGKILL:
                reason = _OUT_OF_MEMORY
            else:
                how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
                reason = f"the worker {how} and wrote no result"
            error = RunError(
                type="WorkerDied",
                message=reason,
                traceback="\n".join(self.worker.last_lines),
                exit_code=OutOfMemory.exit_code if code == -signal.SIGKILL else 1,
            )
        ended_at_ms = result.ended_at_ms or int(time.time() * 1000)
        result = result.model_copy(update={"status": status, "error": error, "ended_at_ms": ended_at_ms})
        # What the worker set aside for its end serves for this one.
        (folder / ".reserve").unlink(missing_ok=True)
        try:
            result.write(folder)
            if error.traceback:
                write_text(folder / "error.txt", error.traceback + "\n")
        except OSError as problem:
            log.warning("%s", unwritable(folder, problem))
        return result

    def _unwritten(self, result: RunResult) -> RunResult:
        assert self._error is not None
        message = str(self._error["message"]) + (
            "; what was written until then is kept" if result.repeats else ""
        )
        error = RunError(type=UNWRITABLE, message=message, exit_code=int(self._error["exit_code"]))
        return result.model_copy(update={"status": RunStatus.FAILED, "error": error})

    def _early_end(self, code: int) -> RunError | None:
        """Why there is no run; None where there was to be none."""
        if self.timed_out:
            return self._timeout_error(False)
        if self._error is not None:
            kind = str(self._error.get("type", "Error"))
            return RunError(
                type=kind, message=str(self._error["message"]), exit_code=int(self._error["exit_code"])
            )
        if code == 0:
            return None
        if self.worker.interrupted:
            return RunError(type="Interrupted", message="interrupted", exit_code=exit_codes.INTERRUPTED)
        if code == -signal.SIGKILL:
            return RunError(type="WorkerDied", message=_OUT_OF_MEMORY, exit_code=OutOfMemory.exit_code)
        last = last_line(self.worker)
        return RunError(
            type="WorkerDied", message=f"the worker ended with code {code} before it had planned: {last}"
        )

    def _timeout_error(self, measured: bool) -> RunError:
        kept = "; what was measured until then is kept" if measured else ""
        return RunError(
            type=TIMED_OUT,
            message=f"took longer than --cell-timeout {self._timeout_s:g}s and was ended{kept}",
        )
