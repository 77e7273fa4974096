"""The command's side of a run, with a worker that is made up: what is recorded when it ends badly."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flexllmgen.errors import UsageError
from harness import evaluation
from harness.config import Settings, resolve
from harness.evaluation import check_log_file, draw_pictures, evaluate
from harness.job import Job
from harness.report import Report
from harness.results import Repeat, RunError, RunResult, RunStatus
from harness.store import DeliveryError

PLAN = {
    "strategy": "accelerate",
    "model": "m",
    "dtype": "float32",
    "device": "cpu",
    "num_sequences": 1,
    "prompt_tokens": 1,
    "gen_tokens": 1,
    "batch_size": 1,
    "weight_bytes": {},
    "kv_bytes": {},
    "workspace_bytes": 0,
}


class FakeWorker:
    """Writes a result folder as a worker does, up to where it is told to stop."""

    code = 0
    status = RunStatus.FINISHED
    error: RunError | None = None
    planned = True
    interrupted = False
    last_lines: tuple[str, ...] = ("Fatal error", "in native code")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.went = False

    def go(self) -> None:
        self.went = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        yield

    def follow(self, on_event: Callable[[Mapping[str, Any]], None]) -> int:
        if not self.planned:
            return self.code
        folder = self.job.common.results_dir.absolute() / self.job.run_uuid
        result = RunResult(
            run_uuid=self.job.run_uuid,
            status=RunStatus.RUNNING,
            experiment="e",
            run_name="r",
            strategy="accelerate",
            model="m",
            started_at_ms=1,
            process=self.job.process,
            params={"model_path": None},
        )
        result.write(folder)
        on_event({"event": "planned", "plan": PLAN, "folder": str(folder), "hardware": "h", "warnings": []})
        on_event({"event": "phase", "name": "ready"})
        assert self.went, "the worker waits for the command before it times anything"
        if self.status is not RunStatus.RUNNING:
            repeats = [Repeat(index=0, ended_at_ms=2, metrics={"ttft_s": 0.5})]
            ended = {
                "status": self.status,
                "error": self.error,
                "metrics": {"ttft_s": 0.5},
                "repeats": repeats,
            }
            result.model_copy(update=ended).write(folder)
        return self.code


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    return resolve({"no_mlflow": True}, config_file=None, assignments=[], environ={})


def run_with(
    worker: dict[str, Any], settings: Settings, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> int:
    monkeypatch.setattr(evaluation, "Worker", type("Worker", (FakeWorker,), worker))
    given = {"argv": ["harness"], "dry_run": False, "as_json": True, **options}
    return evaluate(settings, Report(quiet=True), **given)


def the_result() -> RunResult:
    (folder,) = Path("results").iterdir()
    return RunResult.read(folder)


def test_a_run_that_ends_well(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with({}, settings, monkeypatch) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["status"], printed["run_id"], printed["delivered"]) == ("FINISHED", None, False)


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        (-9, 5, ("signal 9", "memory", "--batch-size")),
        (-11, 1, ("signal 11",)),
        (3, 1, ("code 3",)),
    ],
)
def test_a_worker_that_dies(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    exit_code: int,
    words: tuple[str, ...],
) -> None:
    worker = {"code": code, "status": RunStatus.RUNNING}
    assert run_with(worker, settings, monkeypatch) == exit_code
    result = the_result()
    assert result.status is RunStatus.FAILED
    assert result.error is not None
    assert result.ended_at_ms is not None
    assert all(word in result.error.message for word in words)
    assert ("memory" in result.error.message) == (code == -9)
    assert "in native code" in (next(Path("results").iterdir()) / "error.txt").read_text()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_worker_that_had_to_be_killed_was_interrupted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = {"code": -9, "status": RunStatus.RUNNING, "interrupted": True}
    assert run_with(worker, settings, monkeypatch) == 130
    assert the_result().status is RunStatus.KILLED


@pytest.mark.parametrize(
    ("worker", "exit_code", "words"),
    [
        ({"planned": False, "code": 1}, 1, "in native code"),
        ({"planned": False, "code": -15, "interrupted": True}, 130, "interrupted"),
        ({"planned": False, "code": -9}, 5, "--batch-size"),
    ],
)
def test_a_worker_that_dies_before_it_has_planned(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    worker: dict[str, Any],
    exit_code: int,
    words: str,
) -> None:
    assert run_with(worker, settings, monkeypatch) == exit_code
    captured = capsys.readouterr()
    # Whoever reads JSON gets JSON.
    printed = json.loads(captured.out)
    assert printed["status"] == "FAILED"
    assert words in printed["error"]
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not Path("results").exists()


def test_a_failed_run_has_its_own_exit_code(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RunError(type="OutOfMemory", message="too small", exit_code=5)
    assert run_with({"status": RunStatus.FAILED, "error": error, "code": 5}, settings, monkeypatch) == 5


class FakeTracker:
    """A store that refuses."""

    def __init__(self, store: object) -> None:
        pass

    def reap(self) -> int:
        raise DeliveryError("away")

    def open_run(self, result: RunResult) -> str:
        raise DeliveryError("away")

    def deliver(self, folder: Path, run_id: str | None) -> str:
        raise DeliveryError("away")


def test_a_store_that_refuses_is_four_and_names_the_way(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "Tracker", FakeTracker)
    changes = {"no_mlflow": False, "tracking_uri": "http://user:secret@host:1/a b"}
    settings = Settings(
        common=settings.common.model_copy(update=changes),
        strategy=settings.strategy,
        sources={**settings.sources, "tracking_uri": "option --tracking-uri"},
    )
    assert run_with({}, settings, monkeypatch) == 4
    captured = capsys.readouterr()
    assert json.loads(captured.out)["delivered"] is False
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert "--tracking-uri 'http://host:1/a b'" in error
    assert the_result().status is RunStatus.FINISHED


def test_a_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    check_log_file(tmp_path / "logs" / "run.log")
    assert (tmp_path / "logs" / "run.log").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run.log", tmp_path):
        with pytest.raises(UsageError, match="--log-file"):
            check_log_file(path)


def test_pictures_are_drawn_once_and_only_of_what_there_is(tmp_path: Path) -> None:
    result = RunResult(
        run_uuid="u",
        status=RunStatus.FINISHED,
        experiment="e",
        run_name="r",
        strategy="s",
        model="m",
        started_at_ms=1,
        repeats=[Repeat(index=0, ended_at_ms=2, metrics={"ttft_s": 0.5})],
        itl_s=[[0.1, 0.2]],
    )
    draw_pictures(tmp_path, result.model_copy(update={"repeats": []}))
    assert list(tmp_path.iterdir()) == []
    draw_pictures(tmp_path, result)
    picture = tmp_path / "token_latency.png"
    drawn = picture.stat().st_mtime_ns
    draw_pictures(tmp_path, result)
    assert picture.stat().st_mtime_ns == drawn
    assert not (tmp_path / "memory.png").exists()
    assert not (tmp_path / "plan_vs_measured.png").exists()
    phases = {"prefill_s": 0.4, "decode_s": 0.3, "prefill_busy_s": {"compute": 0.4}}
    draw_pictures(tmp_path, result.model_copy(update={"plan": {"predicted": phases, "limit": phases}}))
    assert (tmp_path / "plan_vs_measured.png").exists()
