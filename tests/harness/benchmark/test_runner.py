"""The loop over launches and cells, with processes that are made up: order, failures, time limits, interruptions, resuming."""

import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import make_benchmark, make_cell
from fake_workers import SPEEDS, STRATEGIES, Script

from harness import launch as launch_module
from harness.benchmark.ending import close, exit_code, write_reports
from harness.benchmark.live import LiveGrid
from harness.benchmark.record import Benchmark, Cell, CellStatus, cell_folder, read_cells
from harness.benchmark.runner import Runner, adopt, merge_cell
from harness.job import Job
from harness.report import Report
from harness.results import RunStatus


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
    assert (metrics["parity"], metrics["first_divergence"]) == (0.5, 1.0)
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
    kept = adopt(tmp_path, Benchmark.read(tmp_path).model_copy(update={"status": RunStatus.RUNNING}))[0]
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
    kept = adopt(tmp_path, left.model_copy(update={"cells": forgotten}))[0]
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
    run(tmp_path, adopt(tmp_path, ended)[0], again)
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


def test_the_view_may_be_drawn_while_a_cell_reports() -> None:
    """The drawing thread is halfway through a cell's memory when the cell names another tier."""
    live = LiveGrid(Report(quiet=True), a_benchmark())
    live.event("flexgen", {"event": "progress", "tokens": 1, "memory": {"cpu": 1}})
    halfway = iter(live.memory["flexgen"].items())
    live.event("flexgen", {"event": "progress", "tokens": 2, "memory": {"gpu": 1}})
    assert [*halfway] == [("cpu", 1)]
    assert live.memory["flexgen"] == {"cpu": 1, "gpu": 1}


def test_the_report_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, a_benchmark(), Script())
    for name in ("harness.pictures", "harness.benchmark.pictures"):
        monkeypatch.setitem(sys.modules, name, None)
    assert write_reports(tmp_path) == []
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert (tmp_path / "table.md").exists()
    assert not list(tmp_path.rglob("*.png"))
