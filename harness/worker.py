"""The worker process: `python -m harness.worker`, started by the command (supervise.py), never by hand.

Reads a Job from standard input, runs it, sends events on standard output. SIGTERM and SIGINT end it as
an interruption, and so does the end of standard input, which means that the command is gone.
"""

import logging
import os
import signal
import sys
import threading
from types import FrameType

from harness import exit_codes
from harness.experiment import run_experiment
from harness.job import EventWriter, Job
from harness.quality.reference_run import run_reference
from harness.run_folder import LOG_FORMAT


def main() -> int:
    """Run the job on standard input and return its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    # Events keep the real standard output for themselves; what a library prints goes to standard error.
    events = EventWriter(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    line = sys.stdin.readline()
    if not line:
        return 2
    job = Job.model_validate_json(line)
    _set_up_logging(job)
    go = threading.Event()
    threading.Thread(target=_watch_input, args=(go,), name="watch-input", daemon=True).start()
    try:
        if job.reference is not None:
            return run_reference(job, events)
        return run_experiment(job, events, lambda: _wait(go))
    except KeyboardInterrupt:
        events.send(
            "error",
            message="interrupted before anything was loaded",
            exit_code=exit_codes.INTERRUPTED,
            type="Interrupted",
        )
        return exit_codes.INTERRUPTED
    except Exception as error:
        logging.getLogger(__name__).exception("internal error")
        events.send("error", message=f"internal error: {error!r}", exit_code=1, type=type(error).__name__)
        return 1


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    # Once is enough: a second signal must not cut short the writing of what was measured.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _watch_input(go: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip() == "go":
            go.set()
    os.kill(os.getpid(), signal.SIGTERM)


def _wait(go: threading.Event) -> None:
    while not go.wait(0.2):
        pass


def _set_up_logging(job: Job) -> None:
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    file = logging.FileHandler(job.common.log_file, encoding="utf-8")
    file.setFormatter(logging.Formatter(LOG_FORMAT))
    root.addHandler(file)
    if job.verbose:
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(logging.Formatter(LOG_FORMAT))
        root.addHandler(stream)
    logging.captureWarnings(True)
    for name in ("httpx", "urllib3", "filelock", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
