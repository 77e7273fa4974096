"""The loop over launches and cells, with processes that are made up: order, failures, time limits, interruptions, resuming."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import make_benchmark, make_cell

from harness import launch as launch_module
from harness.benchmark.ending import close, exit_code, write_reports
from harness.benchmark.live import LiveGrid
from harness.benchmark.record import Benchmark, Cell, CellStatus, cell_folder, read_cells
from harness.benchmark.runner import Runner, adopt, merge_cell
from harness.job import Job
from harness.report import Report
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


def a_benchmark(**changes: Any) -> Benchmark:
    cells = [make_cell(name, 4, status=CellStatus.PENDING, launches=[], name=name) for name in STRATEGIES]
    fields = {
        "status": RunStatus.RUNNING,
        "cells": cells,
        "parity": {},
        "baseline": "accelerate",
        "launches": 1,
    }
    return make_benchmark(**{**fields, "cell_timeout_s": None, **changes})


def run(folder: Path, benchmark: Benchmark, script: Script) -> Benchmark:
    """The loop and the end of a benchmark."""
    runner = Runner(folder, benchmark, LiveGrid(Report(quiet=True), benchmark), worker_type=script)
    runner.run()
    return close(folder, runner.benchmark)[0]


def cells_of(benchmark: Benchmark) -> dict[str, Cell]:
    return {cell.name: cell for cell in benchmark.cells}


def test_launches_are_interleaved_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    script = Script()
    ended = run(tmp_path, a_benchmark(launches=2), script)
    assert script.started == [*STRATEGIES, *STRATEGIES]
    assert len({job.run_uuid for job in script.jobs}) == 6
    assert Benchmark.read(tmp_path) == ended
    assert ended.status is RunStatus.FINISHED
    assert (ended.hardware_fingerprint, ended.hardware_summary) == ("h", "a machine")
    results = read_cells(tmp_path, ended)
    assert {name: [one.launch for one in result.repeats] for name, result in results.items()} == {
        name: [0, 1] for name in STRATEGIES
    }
    assert {name: result.metrics["generation_tok_s"] for name, result in results.items()} == SPEEDS
    assert all(result.status is RunStatus.FINISHED for result in results.values())
    for cell in ended.cells:
        assert len(list((cell_folder(tmp_path, cell.name) / "launches").iterdir())) == 2
    assert exit_code(ended, delivered=True, fail_on=None) == 0
    assert exit_code(ended, delivered=False, fail_on=None) == 4


def test_it_is_written_after_every_launch(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watching(Script):
        def __call__(self, job: Job) -> Any:
            if (tmp_path / "benchmark.json").exists():
                seen.append(sum(len(cell.launches) for cell in Benchmark.read(tmp_path).cells))
            return super().__call__(job)

    run(tmp_path, a_benchmark(launches=2), Watching())
    assert seen == [1, 2, 3, 4, 5]


def test_parity_is_in_the_record_and_on_each_cell(tmp_path: Path) -> None:
    ended = run(tmp_path, a_benchmark(), Script(unequal=True))
    assert (ended.parity["autoflex"].equal_share, ended.parity["autoflex"].first_divergence) == (0.5, 1)
    assert ended.parity["flexgen"].equal_share == 1.0
    metrics = read_cells(tmp_path, ended)["autoflex"].metrics
    assert (metrics["parity_equal_share"], metrics["parity_first_divergence"]) == (0.5, 1.0)
    assert exit_code(ended, delivered=True, fail_on="parity") == 3
    assert exit_code(ended, delivered=True, fail_on=None) == 0


@pytest.mark.parametrize(
    ("way", "words", "exit_of_all"),
    [
        ("fails", ("it broke", "predicted 1.00 GiB", "reached"), 1),
        ("is killed", ("signal 9", "memory", "predicted 1.00 GiB", "123.00 GiB"), 5),
        ("refuses", ("needs 3 GiB, has 1",), 5),
    ],
)
def test_a_cell_that_fails_leaves_the_others_alone(
    tmp_path: Path, way: str, words: tuple[str, ...], exit_of_all: int
) -> None:
    script = Script({("flexgen", 1): way})
    ended = run(tmp_path / "one", a_benchmark(launches=2), script)
    # Once is enough to know that it fails.
    assert script.started == ["accelerate", "flexgen", "autoflex", "accelerate", "autoflex"]
    cells = cells_of(ended)
    assert cells["flexgen"].status is CellStatus.FAILED
    assert cells["autoflex"].status is CellStatus.FINISHED
    error = cells["flexgen"].error
    assert error is not None
    assert all(word in error.message for word in words), error.message
    assert ended.status is RunStatus.FINISHED
    assert exit_code(ended, delivered=True, fail_on=None) == 6
    assert write_reports(tmp_path / "one") == []
    assert words[0] in (tmp_path / "one" / "table.md").read_text()

    all_fail = run(tmp_path / "all", a_benchmark(), Script({(name, 1): way for name in STRATEGIES}))
    assert all_fail.status is RunStatus.FAILED
    assert exit_code(all_fail, delivered=True, fail_on=None) == exit_of_all


def test_what_a_cell_measured_before_it_failed_is_kept(tmp_path: Path) -> None:
    ended = run(tmp_path, a_benchmark(launches=2), Script({("flexgen", 2): "fails"}))
    result = read_cells(tmp_path, ended)["flexgen"]
    assert result.status is RunStatus.FAILED
    assert [one.launch for one in result.repeats] == [0, 1]


@pytest.mark.parametrize("obeys", [True, False])
def test_a_cell_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obeys: bool
) -> None:
    monkeypatch.setattr(launch_module, "_LAST_WORDS_S", 0.1)
    script = Script({("flexgen", 1): "hangs"}, obeys=obeys)
    ended = run(tmp_path, a_benchmark(cell_timeout_s=0.2), script)
    cell = cells_of(ended)["flexgen"]
    assert cell.status is CellStatus.FAILED
    assert cell.error is not None
    assert cell.error.type == "CellTimeout"
    assert "--cell-timeout 0.2s" in cell.error.message
    assert "is kept" in cell.error.message
    result = read_cells(tmp_path, ended)["flexgen"]
    assert (result.status, len(result.repeats)) == (RunStatus.FAILED, 1)
    assert cells_of(ended)["autoflex"].status is CellStatus.FINISHED
    assert exit_code(ended, delivered=True, fail_on=None) == 6


@pytest.mark.parametrize("way", ["is interrupted", "is interrupted twice"])
def test_an_interruption_ends_it_and_the_rest_can_be_run_later(tmp_path: Path, way: str) -> None:
    script = Script({("flexgen", 2): way})
    ended = run(tmp_path, a_benchmark(launches=2), script)
    assert script.started == [*STRATEGIES, "accelerate", "flexgen"]
    assert ended.status is RunStatus.KILLED
    assert exit_code(ended, delivered=True, fail_on=None) == 130
    assert {cell.name: (cell.status.value, len(cell.launches)) for cell in ended.cells} == {
        "accelerate": ("FINISHED", 2),
        "flexgen": ("PENDING", 1),
        "autoflex": ("PENDING", 1),
    }
    results = read_cells(tmp_path, ended)
    assert [results[name].status.value for name in STRATEGIES] == ["FINISHED", "KILLED", "KILLED"]

    again = Script()
    kept = adopt(tmp_path, Benchmark.read(tmp_path).model_copy(update={"status": RunStatus.RUNNING}))
    resumed = run(tmp_path, kept, again)
    assert again.started == ["flexgen", "autoflex"]
    assert resumed.status is RunStatus.FINISHED
    results = read_cells(tmp_path, resumed)
    assert all([one.launch for one in result.repeats] == [0, 1] for result in results.values())
    assert all(result.status is RunStatus.FINISHED for result in results.values())


def test_a_command_that_dies_loses_no_launch_that_had_ended(tmp_path: Path) -> None:
    script = Script({("flexgen", 2): "kills the command"})
    benchmark = a_benchmark(launches=2)
    with pytest.raises(SystemExit):
        run(tmp_path, benchmark, script)
    left = Benchmark.read(tmp_path)
    assert left.status is RunStatus.RUNNING
    # As if it had died between a launch's end and the writing of it.
    forgotten = [
        cell.model_copy(update={"launches": cell.launches[:-1], "status": CellStatus.PENDING})
        if cell.name == "accelerate"
        else cell
        for cell in left.cells
    ]
    kept = adopt(tmp_path, left.model_copy(update={"cells": forgotten}))
    assert kept == left
    for cell in kept.cells:
        assert merge_cell(tmp_path, kept, cell) is not None
    again = Script()
    resumed = run(tmp_path, kept, again)
    assert again.started == ["flexgen", "autoflex"]
    assert resumed.status is RunStatus.FINISHED


def test_a_failed_cell_is_not_missing(tmp_path: Path) -> None:
    ended = run(tmp_path, a_benchmark(), Script({("flexgen", 1): "fails"}))
    again = Script()
    run(tmp_path, adopt(tmp_path, ended), again)
    assert again.started == []


def test_progress_is_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = a_benchmark()
    report = Report()
    script = Script({("flexgen", 1): "fails"})
    Runner(tmp_path, benchmark, LiveGrid(report, benchmark), worker_type=script).run()
    lines = capsys.readouterr().err.splitlines()
    assert "cell 1 of 3: accelerate ..." in lines
    assert any("FAILED: it broke" in line for line in lines)
    # What is true of every cell is said once.
    assert len([line for line in lines if line.startswith("warning:")]) == 1


def test_the_view_shows_state_speed_and_memory() -> None:
    from rich.console import Console

    benchmark = a_benchmark()
    live = LiveGrid(Report(quiet=True), benchmark)
    live.begin("flexgen", 0)
    live.event("flexgen", {"event": "phase", "name": "repeat 1/3", "total": 200})
    live.event("flexgen", {"event": "progress", "tokens": 50, "memory": {"cpu": 3 << 30, "gpu": 1 << 30}})
    live.event("accelerate", {"event": "passed", "name": "repeat 1/3", "tokens": 9, "tok_s": 12.5})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(live._table())
    text = capture.get()
    assert "repeat 1/3, 25%" in text
    assert "host 3.00 GiB" in text
    assert "GPU 1.00 GiB" in text
    assert "12.50" in text
    assert text.count("waiting") == 2
