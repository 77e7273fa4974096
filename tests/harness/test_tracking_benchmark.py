"""A benchmark in an MLflow store: a parent, a child for each cell, once each, from any state it can end in."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import (
    BENCHMARK_UUID,
    GEN_LEN,
    LAUNCHES,
    REPEATS,
    make_benchmark,
    make_benchmark_folder,
    make_cell,
)
from servers import free_port, start_server
from test_tracking import dead_process, everything

from flexllmgen.errors import UsageError
from harness.benchmark.record import Benchmark, CellStatus, cell_folder
from harness.delivery import sync
from harness.provenance import process_identity
from harness.report import Report
from harness.results import RunResult, RunStatus, write_json, write_jsonl, write_text
from harness.store import DeliveryError, Store
from harness.store_check import stale_runs
from harness.tracking import Tracker


def runs_by_name(client: Any) -> dict[str, Any]:
    """Every run of the store."""
    experiments = [one.experiment_id for one in client.search_experiments()]
    return {run.info.run_name: run for run in client.search_runs(experiments)}


# What arrives


def test_parent_and_children_arrive_whole(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path / "results")
    write_text(folder / "report.html", "<html></html>")
    opened = tracker.open_benchmark(folder)
    assert client.get_run(opened).info.status == "RUNNING"
    assert tracker.deliver_benchmark(folder, opened) == opened

    parent = client.get_run(opened)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "seed opt-6.7b")
    assert parent.data.params["batch_size"] == "4, 8"
    assert parent.data.params["input_len"] == "128"
    assert parent.data.params["dtype"] == "float16"  # what auto came to
    assert "w_gpu_percent" not in parent.data.params  # of one strategy only
    assert (parent.data.metrics["cells"], parent.data.metrics["cells_failed"]) == (6, 0)
    assert parent.data.metrics["best_ratio_accelerate"] == 1.0
    assert parent.data.metrics["best_ratio_autoflex"] > 2
    tags = parent.data.tags
    assert (tags["harness.kind"], tags["harness.benchmark_uuid"]) == ("benchmark", BENCHMARK_UUID)
    assert tags["mlflow.source.git.commit"].startswith("4f1c2d9")
    assert tags["harness.best"].startswith("autoflex-b8: 20.5 tok/s, 2.38x accelerate-b8")
    note = tags["mlflow.note.content"]
    assert "| autoflex-b4 | 11.2 |" in note
    assert "[report.html](#/experiments/" in note
    assert {file.path for file in client.list_artifacts(opened)} == {"benchmark.json", "report.html"}

    runs = runs_by_name(client)
    assert len(runs) == 7
    child = runs["autoflex-b4"]
    assert child.data.tags["mlflow.parentRunId"] == opened
    assert child.data.tags["harness.kind"] == "cell"
    assert f"/runs/{child.info.run_id}?" in note
    assert child.data.params["cell"] == "autoflex-b4"
    assert child.data.params["input_len"] == "128"
    assert child.data.metrics["ratio_to_baseline"] == pytest.approx(2.399, abs=0.01)
    assert (child.data.metrics["parity"], child.data.metrics["first_divergence"]) == (0.875, 17)
    assert "first_divergence" not in runs["flexgen-b4"].data.metrics
    history = client.get_metric_history(child.info.run_id, "generation_tok_s")
    assert [row.step for row in history] == list(range(LAUNCHES * REPEATS + 1))  # the median comes last
    assert len(client.get_metric_history(child.info.run_id, "itl_by_position_s")) == GEN_LEN - 1
    assert [one.dataset.name for one in child.inputs.dataset_inputs] == ["humaneval"]
    assert {"result.json", "launches"} <= {file.path for file in client.list_artifacts(child.info.run_id)}


def test_failed_cells_are_failed_children_with_the_reason(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    folder = make_benchmark_folder(tmp_path, failed=["flexgen-b8"], lost=["autoflex-b8"])
    parent = client.get_run(tracker.deliver_benchmark(folder))
    assert parent.data.metrics["cells_failed"] == 2
    runs = runs_by_name(client)
    for name in ("flexgen-b8", "autoflex-b8"):
        run = runs[name]
        assert run.info.status == "FAILED"
        assert run.data.tags["harness.error"].startswith("OutOfMemory: CUDA ran out of memory")
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["batch_size"] == "8"
        assert "CUDA ran out" in run.data.tags["mlflow.note.content"]
    note = runs["flexgen-b8"].data.tags["mlflow.note.content"]
    assert "**Planned**: predicted" in note
    assert "peak device 7.9 GiB (predicted 5.76 GiB)" in note
    metrics = runs["flexgen-b8"].data.metrics
    assert metrics["peak_device_allocated_bytes"] > metrics["predicted_peak_gpu_bytes"]


# Once


def test_second_delivery_changes_nothing(tracker: Tracker, client: Any, store: Store, tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path / "results", lost=["autoflex-b8"])
    run_id = tracker.deliver_benchmark(folder)
    before = everything(client)
    assert tracker.deliver_benchmark(folder) == run_id
    (folder / ".delivered.json").unlink()
    assert Tracker(store).deliver_benchmark(folder) == run_id
    assert everything(client) == before


def test_cells_arrive_while_it_goes_on_and_measured_again_after_a_resume(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    cells = make_benchmark().cells
    pending = [cell.model_copy(update={"status": CellStatus.PENDING, "launches": []}) for cell in cells[2:]]
    running = make_benchmark(
        status=RunStatus.RUNNING, ended_at_ms=None, process=process_identity(), cells=[*cells[:2], *pending]
    )
    folder = make_benchmark_folder(tmp_path / "results", make_benchmark(), launch_folders=False)
    for cell in pending:
        shutil.rmtree(cell_folder(folder, cell.name))
    running.write(folder)
    run_id = tracker.open_benchmark(folder)
    tracker.deliver_benchmark(folder, run_id)
    assert {name: run.info.status for name, run in runs_by_name(client).items()} == {
        "seed opt-6.7b": "RUNNING",
        "accelerate-b4": "FINISHED",
        "flexgen-b4": "FINISHED",
    }
    # Interrupted after the first launch of the third cell.
    make_benchmark_folder(tmp_path / "again", make_benchmark(benchmark_uuid=BENCHMARK_UUID))
    third = cell_folder(folder, "autoflex-b4")
    shutil.copytree(cell_folder(tmp_path / "again" / BENCHMARK_UUID, "autoflex-b4"), third)
    whole = RunResult.read(third)
    whole.model_copy(update={"repeats": whole.repeats[:REPEATS]}).write(third)
    running.model_copy(
        update={"status": RunStatus.KILLED, "ended_at_ms": running.started_at_ms + 1000}
    ).write(folder)
    assert tracker.deliver_benchmark(folder) == run_id
    runs = runs_by_name(client)
    assert runs["seed opt-6.7b"].info.status == "KILLED"
    assert runs["autoflex-b4"].info.status == "KILLED"
    assert "resume" in runs["autoflex-b4"].data.tags["harness.error"]
    # Resumed, by whatever process, and finished.
    assert tracker.open_benchmark(folder) == run_id
    assert client.get_run(run_id).info.status == "RUNNING"
    finished = make_benchmark_folder(tmp_path / "results")
    assert finished == folder
    assert tracker.deliver_benchmark(folder) == run_id
    runs = runs_by_name(client)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len(runs) == 7
    history = client.get_metric_history(runs["autoflex-b4"].info.run_id, "generation_tok_s")
    assert [row.step for row in history] == list(range(LAUNCHES * REPEATS + 1))


def test_sync_brings_both_kinds_and_no_cell_twice(client: Any, store: Store, tmp_path: Path) -> None:
    from records import make_folder

    results = tmp_path / "results"
    folder = make_benchmark_folder(results)
    make_folder(results)
    launch = next((cell_folder(folder, "flexgen-b4") / "launches").iterdir())
    for path in (results, folder, folder / "cells", cell_folder(folder, "flexgen-b4"), launch):
        assert sync(path, store.tracking_uri, Report()) == 0
    runs = runs_by_name(client)
    assert len(runs) == 8
    assert sorted(run.data.tags["harness.kind"] for run in runs.values()) == [
        *["benchmark"],
        *["cell"] * 6,
        "eval",
    ]


# How benchmarks end


def test_parent_of_a_dead_process_is_reaped_with_its_children(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    benchmark = make_benchmark(status=RunStatus.RUNNING, ended_at_ms=None, process=dead_process())
    folder = make_benchmark_folder(tmp_path, benchmark)
    run_id = tracker.open_benchmark(folder)
    experiment = client.get_run(run_id).info.experiment_id
    tags = {"mlflow.parentRunId": run_id, "harness.host": str(benchmark.process["host"])}
    child = client.create_run(experiment, tags=tags).info.run_id
    assert len(stale_runs(tracker.store)) == 2
    assert tracker.reap() == 2
    assert stale_runs(tracker.store) == []
    assert {client.get_run(one).info.status for one in (run_id, child)} == {"FAILED"}
    # What it measured until then arrives all the same.
    assert tracker.deliver_benchmark(folder) == run_id
    parent = client.get_run(run_id)
    assert parent.info.status == "FAILED"
    assert "resume" in parent.data.tags["harness.error"]
    assert runs_by_name(client)["autoflex-b8"].info.status == "FINISHED"


def test_benchmark_of_another_running_process_is_not_delivered(tracker: Tracker, tmp_path: Path) -> None:
    code = (
        "import json, harness.provenance as p; print(json.dumps(p.process_identity()), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        process = json.loads(child.stdout.readline())
        folder = make_benchmark_folder(tmp_path, make_benchmark(status=RunStatus.RUNNING, process=process))
        with pytest.raises(UsageError, match="still running"):
            tracker.deliver_benchmark(folder)
        child.kill()


# Faults


def test_newer_schema_of_a_cell_is_one_line_and_keeps_no_other_back(
    client: Any, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_benchmark_folder(tmp_path / "results")
    path = cell_folder(folder, "flexgen-b4")
    write_json(path / "result.json", {**RunResult.read(path).model_dump(mode="json"), "schema_version": 99})
    assert sync(folder, store.tracking_uri, Report()) == 2
    said = capsys.readouterr().err.strip()
    assert "flexgen-b4" in said
    assert "schema version" in said
    assert len([line for line in said.splitlines() if line.startswith("error")]) == 1
    assert set(runs_by_name(client)) == {cell.name for cell in make_benchmark().cells} - {"flexgen-b4"} | {
        "seed opt-6.7b"
    }


def test_newer_schema_of_a_benchmark_is_one_line(tracker: Tracker, tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path)
    write_json(
        folder / "benchmark.json", {**Benchmark.read(folder).model_dump(mode="json"), "schema_version": 99}
    )
    with pytest.raises(UsageError, match="schema version") as caught:
        tracker.deliver_benchmark(folder)
    assert "\n" not in str(caught.value)


def test_full_disk_in_the_store_is_told_and_made_good(
    tracker: Tracker, client: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third file of an upload does not fit; when there is room again, everything arrives, once."""
    folder = make_benchmark_folder(tmp_path / "results", launch_folders=False)
    from mlflow import MlflowClient

    sent: list[str] = []
    upload = MlflowClient.log_artifact

    def fill(self: Any, run_id: str, file: str, *rest: Any) -> None:
        sent.append(file)
        if len(sent) > 2:
            raise OSError(28, "No space left on device")
        upload(self, run_id, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", fill)
        with pytest.raises(DeliveryError, match="No space left") as caught:
            tracker.deliver_benchmark(folder)
    assert "\n" not in str(caught.value)
    run_id = Tracker(store).deliver_benchmark(folder)
    runs = runs_by_name(client)
    assert len(runs) == 7
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert client.get_run(run_id).data.tags["harness.delivered"] == "true"


def test_full_database_is_one_line(tracker: Tracker, store: Store, tmp_path: Path) -> None:
    """A database that may not grow by a page says what a full disk says."""
    folder = make_benchmark_folder(tmp_path / "results", launch_folders=False)
    tracker.open_benchmark(folder)
    import sqlalchemy

    def limit(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            pages = connection.execute("pragma page_count").fetchone()[0]
            connection.execute(f"pragma max_page_count = {pages}")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", limit)
    try:
        with pytest.raises(DeliveryError, match="full") as caught:
            Tracker(
                Store(
                    tracking_uri=store.tracking_uri + "?timeout=5", artifact_location=store.artifact_location
                )
            ).deliver_benchmark(folder)
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", limit)
    assert "\n" not in str(caught.value)
    assert Tracker(store).deliver_benchmark(folder)


STRANGE = "naïve 日本語 \U0001f680 \u202eabc'\"%() \u0301 a//b"


def test_every_kind_of_unicode_arrives(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    cells = [make_cell(strategy, 4) for strategy in ("accelerate", "flexgen")]
    odd = cells[1].model_copy(update={"name": "flexgen 日本語 \U0001f680 '\"%"})
    benchmark = make_benchmark(
        name=STRANGE, cells=[cells[0], odd], tags={STRANGE: STRANGE}, hardware_summary=STRANGE, parity={}
    )
    folder = make_benchmark_folder(tmp_path / "results 日本語 \U0001f680", benchmark)
    prompts = [{"prompt": STRANGE}, {"prompt": "half a pair \ud800"}]
    requests = write_jsonl(cell_folder(folder, odd.name) / "requests.jsonl", prompts)
    assert [json.loads(line) for line in requests.read_text(encoding="utf-8").splitlines()] == prompts
    run_id = tracker.deliver_benchmark(folder)
    assert tracker.deliver_benchmark(folder) == run_id
    parent = client.get_run(run_id)
    assert parent.info.run_name == STRANGE
    assert STRANGE in parent.data.tags.values()
    runs = runs_by_name(client)
    assert set(runs) == {STRANGE, cells[0].name, odd.name}
    assert runs[odd.name].data.params["cell"] == odd.name


DELIVER = """
import sys
from pathlib import Path
from harness.tracking import Tracker
from harness.store import resolve_store
base, folder = map(Path, sys.argv[1:])
tracker = Tracker(resolve_store(None, base))
tracker.deliver_benchmark(folder, tracker.open_benchmark(folder))
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", [("one", "two"), ("same", "same")])
def test_two_benchmarks_at_once_to_one_store(
    tmp_path: Path, client: Any, store: Store, names: tuple[str, str]
) -> None:
    folders = [
        make_benchmark_folder(tmp_path, make_benchmark(benchmark_uuid=name, name=name)) for name in names
    ]
    commands = [[sys.executable, "-c", DELIVER, str(tmp_path), str(folder)] for folder in folders]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands
    ]
    assert [child.communicate()[0] for child in children] == [b"", b""]
    assert [child.returncode for child in children] == [0, 0]
    held = everything(client)
    assert len(held) == 7 * len(set(names))
    assert {run[1] for run in held.values()} == {"FINISHED"}


@pytest.mark.slow
def test_server_gone_at_the_start_in_the_middle_and_back_later(
    tmp_path: Path, store: Store, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_benchmark_folder(tmp_path / "results", launch_folders=False)
    port = free_port()
    remote = Store(tracking_uri=f"http://127.0.0.1:{port}", artifact_location=None)
    with pytest.raises(DeliveryError, match="unreachable"):
        Tracker(remote).open_benchmark(folder)
    with start_server(store, port) as server:
        tracker = Tracker(remote)
        run_id = tracker.open_benchmark(folder)
        from mlflow import MlflowClient

        upload, sent = MlflowClient.log_artifact, list[str]()

        def die(self: Any, run: str, file: str, *rest: Any) -> None:
            sent.append(file)
            if len(sent) == 6:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            upload(self, run, file, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_artifact", die)
            with pytest.raises(DeliveryError) as caught:
                tracker.deliver_benchmark(folder, run_id)
        assert "\n" not in str(caught.value)
    assert not (folder / ".delivered.json").exists()
    with start_server(store, port):
        assert Tracker(remote).deliver_benchmark(folder) == run_id
    runs = runs_by_name(client)
    assert len(runs) == 7
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    with contextlib.suppress(KeyError):
        del runs["seed opt-6.7b"]
    for run in runs.values():
        history = client.get_metric_history(run.info.run_id, "generation_tok_s")
        assert [row.step for row in history] == list(range(LAUNCHES * REPEATS + 1))
