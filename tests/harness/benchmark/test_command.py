"""A benchmark from its options to its exit code, with processes and a store that are made up."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_workers import STRATEGIES, Script

from flexllmgen.errors import UsageError
from harness.benchmark import command
from harness.benchmark.command import Wanted, resume, start
from harness.benchmark.grid import Asked
from harness.benchmark.record import Benchmark
from harness.benchmark.runner import Runner
from harness.report import Report
from harness.results import RunStatus
from harness.store import DeliveryError


class FakeTracker:
    """A store; `away` names the calls that it does not answer."""

    away: tuple[str, ...] = ()
    calls: list[tuple[str, RunStatus, str | None]]

    def __init__(self, store: object) -> None:
        pass

    def reap(self) -> int:
        return 0

    def _call(self, name: str, folder: Path, run_id: str | None) -> str:
        self.calls.append((name, Benchmark.read(folder).status, run_id))
        if name in self.away:
            raise DeliveryError("the store is away")
        return "r1"

    def open_benchmark(self, folder: Path) -> str:
        return self._call("open", folder, None)

    def deliver_benchmark(self, folder: Path, run_id: str | None = None) -> str:
        return self._call("deliver", folder, run_id)


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start a benchmark of three strategies: `run(Script(), tracker={...}, options={...})` is the exit code."""
    monkeypatch.chdir(tmp_path)

    def start_one(
        script: Script,
        *,
        tracker: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        wanted: Wanted | None = None,
    ) -> int:
        monkeypatch.setattr(command, "Runner", partial(Runner, worker_type=script))
        fake = type("Tracker", (FakeTracker,), {"calls": [], **(tracker or {})})
        monkeypatch.setattr(command, "Tracker", fake)
        start_one.tracker = fake  # type: ignore[attr-defined]
        given = {"model": [str(tiny_model)], "input_len": ["16"], **(options or {})}
        asked = Asked(options=given)
        return start(asked, wanted or Wanted(as_json=True), Report(quiet=True), argv=["harness", "benchmark"])

    return start_one


def the_benchmark() -> tuple[Path, Benchmark]:
    (file,) = Path("results").glob("*/benchmark.json")
    return file.parent, Benchmark.read(file.parent)


def test_a_benchmark_that_ends_well(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = Script()
    assert run(script, wanted=Wanted(as_json=True, launches=2), options={"tag": ["team=a"]}) == 0
    assert script.started == [*STRATEGIES, *STRATEGIES]
    said = json.loads(capsys.readouterr().out)
    assert (said["status"], said["run_id"], said["delivered"]) == ("FINISHED", "r1", True)
    assert [row["name"] for row in said["rows"]] == list(STRATEGIES)
    assert [row["ratio_to_baseline"] for row in said["rows"]] == [1.0, 2.0, 3.0]
    assert [row["parity"] for row in said["rows"]] == [1.0, 1.0, 1.0]
    # The record is open before anything is measured, and delivered when all is.
    assert run.tracker.calls == [("open", RunStatus.RUNNING, None), ("deliver", RunStatus.FINISHED, "r1")]
    folder, benchmark = the_benchmark()
    assert benchmark.tags == {"team": "a"}
    assert {"table.md", "table.json", "report.html"} <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("away", [("deliver",), ("open", "deliver")])
def test_a_store_that_is_away_costs_nothing_measured(
    run: Any, capsys: pytest.CaptureFixture[str], away: tuple[str, ...]
) -> None:
    assert run(Script(), tracker={"away": away}) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["delivered"] is False
    assert "harness sync" in captured.err
    assert the_benchmark()[1].status is RunStatus.FINISHED


def test_a_store_that_comes_back_costs_nothing(run: Any) -> None:
    assert run(Script(), tracker={"away": ("open",)}) == 0
    assert run.tracker.calls[-1] == ("deliver", RunStatus.FINISHED, None)


def test_without_mlflow_there_is_no_store(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Script(), options={"no_mlflow": True}, wanted=Wanted()) == 0
    assert run.tracker.calls == []
    assert "harness sync" in capsys.readouterr().out


def test_exit_codes(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everywhere = {(name, 1): "refuses" for name in STRATEGIES}
    checked = Wanted(fail_on="parity")
    assert run(Script({("flexgen", 1): "fails"})) == 6
    assert run(Script(everywhere)) == 5
    assert run(Script(unequal=True)) == 0
    assert run(Script(unequal=True), wanted=checked) == 3
    assert "50.0% of the sequences equal" in capsys.readouterr().err
    assert run(Script(), wanted=checked) == 0
    assert run(Script({("flexgen", 1): "is interrupted"})) == 130


def test_no_password_is_written_down(run: Any) -> None:
    uri = "http://user:secret@localhost:1/x"
    run(Script(), options={"tracking_uri": uri}, tracker={"away": ("open", "deliver")})
    folder, benchmark = the_benchmark()
    assert benchmark.cells[0].common["tracking_uri"] == "http://localhost:1/x"
    assert not [file for file in folder.rglob("*.json") if "secret" in file.read_text()]


def test_resume_runs_the_rest_and_delivers_all(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Script({("flexgen", 1): "is interrupted"})) == 130
    folder, _ = the_benchmark()
    capsys.readouterr()
    again = Script()
    command.Runner.keywords["worker_type"] = again  # type: ignore[attr-defined]
    code = resume(folder.name, {}, Wanted(as_json=True), Report(quiet=True), argv=["harness"])
    assert code == 0
    assert again.started == ["flexgen", "autoflex"]
    assert json.loads(capsys.readouterr().out)["status"] == "FINISHED"
    assert run.tracker.calls[-1][:2] == ("deliver", RunStatus.FINISHED)
    # Nothing is missing now, and it does not take longer for having been asked again.
    ended_at_ms = the_benchmark()[1].ended_at_ms
    time.sleep(0.01)
    assert resume("@latest", {}, Wanted(), Report(quiet=True), argv=["harness"]) == 0
    assert again.started == ["flexgen", "autoflex"]
    assert the_benchmark()[1].ended_at_ms == ended_at_ms
    with pytest.raises(UsageError, match="--launches 2"):
        resume("@latest", {}, Wanted(launches=2), Report(quiet=True), argv=["harness"])


def test_a_disk_that_is_full_is_told_with_the_way_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    class Filling(Script):
        def __call__(self, job: Any) -> Any:
            monkeypatch.setattr(Benchmark, "write", full)
            return super().__call__(job)

    with pytest.raises(UsageError, match=r"No space left.*--resume"):
        run(Filling())
