"""Workers that are made up: they leave result folders as real ones do, and end in the way they are told to."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.job import Job
from harness.results import Repeat, RunError, RunResult, RunStatus, write_jsonl

STRATEGIES = ("accelerate", "flexgen", "autoflex")
SPEEDS = {"accelerate": 10.0, "flexgen": 20.0, "autoflex": 30.0}


class FakeProcess:
    """What a time limit does to a worker."""

    def __init__(self, *, obeys: bool = True) -> None:
        self.ended = threading.Event()
        self.signals: list[str] = []
        self.obeys = obeys

    def terminate(self) -> None:
        self.signals.append("terminate")
        if self.obeys:
            self.ended.set()

    def kill(self) -> None:
        self.signals.append("kill")
        self.ended.set()


class FakeWorker:
    """Leaves a result folder as a worker does, in the way that its cell's strategy is told to go."""

    def __init__(self, job: Job, script: "Script") -> None:
        self.job = job
        self.script = script
        self.process = FakeProcess(obeys=script.obeys)
        self.interrupted = False
        self.last_lines = ("Fatal error", "in native code")
        self.went = False

    def go(self) -> None:
        self.went = True

    def interrupt(self) -> None:
        if self.interrupted:
            self.process.kill()
        else:
            self.interrupted = True
            self.process.terminate()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        previous = signal.signal(signal.SIGINT, lambda *_: self.interrupt())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def follow(self, on_event: Callable[[Mapping[str, Any]], None]) -> int:
        strategy = self.job.common.strategy
        self.script.started.append(strategy)
        self.script.jobs.append(self.job)
        way = self.script.ways.get((strategy, self.script.started.count(strategy)), "ends well")
        if way == "refuses":
            message = {
                "event": "error",
                "message": "needs 3 GiB, has 1",
                "exit_code": 5,
                "type": "PlanInfeasible",
            }
            on_event(message)
            return 5
        folder = self.job.common.results_dir / self.job.run_uuid
        result = RunResult(
            run_uuid=self.job.run_uuid,
            status=RunStatus.RUNNING,
            experiment="e",
            run_name=self.job.common.run_name or "",
            strategy=strategy,
            model="m",
            started_at_ms=int(time.time() * 1000),
            process=self.job.process,
            hardware_fingerprint="h",
            workload_key="w",
            plan={"planned_peak_bytes": {"cpu": 1 << 30}},
        )
        result.write(folder)
        on_event(
            {
                "event": "planned",
                "plan": {},
                "folder": str(folder),
                "hardware": "a machine",
                "warnings": ["w"],
            }
        )
        on_event({"event": "phase", "name": "ready"})
        assert self.went
        on_event({"event": "phase", "name": "repeat 1/1", "total": 10})
        on_event({"event": "progress", "tokens": 5, "memory": {"cpu": 123 << 30}})
        repeat = Repeat(index=0, ended_at_ms=2, metrics={"generation_tok_s": SPEEDS[strategy]})
        measured = result.model_copy(
            update={"repeats": [repeat], "metrics": {"generation_tok_s": SPEEDS[strategy]}}
        )
        if way == "is killed":
            return -9
        if way == "hangs":
            measured.write(folder)
            assert self.process.ended.wait(20)
            if "kill" in self.process.signals:
                return -9
            return self._end(measured, folder, RunStatus.KILLED, "interrupted")
        if way == "is interrupted":
            os.kill(os.getpid(), signal.SIGINT)
            assert self.process.ended.wait(20)
            return self._end(measured, folder, RunStatus.KILLED, "interrupted")
        if way == "is interrupted twice":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert self.process.ended.wait(20)
            return -9
        if way == "fails":
            return self._end(measured, folder, RunStatus.FAILED, "it broke")
        if way == "kills the command":
            raise SystemExit("as if by kill -9")
        tokens = [[1, 2], [3, 4]] if strategy != "autoflex" or not self.script.unequal else [[1, 2], [3, 9]]
        rows = [{"input_ids": [7, row], "output_ids": tokens[row]} for row in range(2)]
        write_jsonl(folder / "requests.jsonl", rows)
        measured.model_copy(update={"status": RunStatus.FINISHED, "ended_at_ms": 9}).write(folder)
        return 0

    def _end(self, result: RunResult, folder: Path, status: RunStatus, message: str) -> int:
        error = RunError(type="E", message=message, exit_code=130 if status is RunStatus.KILLED else 1)
        result.model_copy(update={"status": status, "error": error, "ended_at_ms": 9}).write(folder)
        return error.exit_code


class Script:
    """How workers go, by strategy and which of its launches (from 1), and what was started."""

    def __init__(self, ways: Mapping[tuple[str, int], str] | None = None, **options: bool) -> None:
        self.ways = dict(ways or {})
        self.obeys = options.get("obeys", True)
        self.unequal = options.get("unequal", False)
        self.started: list[str] = []
        self.jobs: list[Job] = []

    def __call__(self, job: Job) -> Any:
        return FakeWorker(job, self)
