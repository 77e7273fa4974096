"""Delivery to real MLflow stores: whole, once, quickly given up, and from any state a run can end in."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import START_MS, UUID, make_folder, make_result

from flexllmgen.errors import UsageError
from harness.folders import find_folders
from harness.provenance import process_identity
from harness.results import (
    RunError,
    RunStatus,
    Timeline,
    write_text,
)
from harness.store import DeliveryError, Store, resolve_store
from harness.summary import describe
from harness.tracking import Tracker


def everything(client: Any) -> dict[str, Any]:
    """All that a store holds of its runs, times of the store's own clock left out."""
    held = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            history = {
                name: [
                    (row.timestamp, row.step, row.value)
                    for row in client.get_metric_history(run.info.run_id, name)
                ]
                for name in run.data.metrics
            }
            held[run.info.run_id] = (
                experiment.name,
                run.info.status,
                run.info.end_time,
                run.data.params,
                run.data.tags,
                history,
                [one.dataset.digest for one in run.inputs.dataset_inputs],
            )
    return held


def test_find_folders(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    assert find_folders(tmp_path) == [folder]
    assert find_folders(folder) == [folder]
    for nothing, told in (
        (tmp_path / "missing", "there is no folder"),
        (folder / "detail", "holds no result"),
    ):
        with pytest.raises(UsageError, match=told):
            find_folders(nothing)


# What arrives


def test_delivery_brings_everything(tracker: Tracker, client: Any, store: Store, tmp_path: Path) -> None:
    result = make_result()
    run_id = tracker.open_run(result)
    assert client.get_run(run_id).info.status == "RUNNING"
    assert tracker.deliver(make_folder(tmp_path / "results"), run_id) == run_id

    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "accelerate-tiny")
    assert (run.info.start_time, run.info.end_time) == (START_MS, START_MS + 9000)

    params = run.data.params
    assert params["batch_size"] == "4"
    assert params["gpu_mem"] == "none"
    assert params["enable_offload"] == "true"
    assert len(params["note"]) == 6000
    assert params["note"].endswith("x…")
    assert params["top p ___"] == "1"
    assert (params["prompts_unique"], params["prompts_truncated"]) == ("8", "0")

    tags = run.data.tags
    expected = {
        "harness.run_uuid": UUID,
        "harness.strategy": "accelerate",
        "harness.model": "owner/tiny",
        "harness.hardware_fingerprint": "c0ffee",
        "harness.workload_key": "8x128+32",
        "harness.host": "gpu-box",
        "harness.delivered": "true",
        "mlflow.user": "someone",
        "mlflow.source.name": "harness eval",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "a" * 40,
        "mlflow.source.git.branch": "main",
        "mlflow.source.git.dirty": "true",
        "mlflow.source.git.repoURL": "https://git.example/code.git",
        "team": "inference",
    }
    assert {name: tags.get(name) for name in expected} == expected
    assert "harness.error" not in tags

    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.artifact_location == store.artifact_location

    files = {file.path for file in client.list_artifacts(run_id)}
    assert files == {"result.json", "requests.jsonl", "timeline.json", "memory.png", "detail"}
    assert [file.path for file in client.list_artifacts(run_id, "detail")] == ["detail/plan.json"]

    [given] = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("humaneval", ("0123456789" * 6)[:36])
    assert given.dataset.source_type == "hugging_face"
    assert json.loads(given.dataset.source)["path"] == "openai/openai_humaneval"
    assert json.loads(given.dataset.profile)["prompts_truncated"] == 0
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "eval")]


def test_repeats_are_steps_and_the_median_comes_last(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    run_id = tracker.deliver(make_folder(tmp_path))

    def rows(name: str) -> list[tuple[int, float]]:
        return sorted((row.step, row.value) for row in client.get_metric_history(run_id, name))

    assert rows("ttft_s") == [(0, 0.4), (1, 0.5), (2, 0.5), (3, 0.5)]
    assert rows("load_s") == [(0, 2.0)]
    assert rows("ttft_s_spread") == [(0, 0.2)]
    assert rows("ttft_s_cold") == [(0, 0.9)]
    assert rows("itl_by_position_s") == [(2, 0.1), (3, 0.4)]
    metrics = client.get_run(run_id).data.metrics
    assert metrics["ttft_s"] == 0.5
    assert not {"bad", "worse"} & set(metrics)


def test_system_metrics_have_the_names_and_times_of_mlflow(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    run_id = tracker.deliver(make_folder(tmp_path))
    rss = client.get_metric_history(run_id, "system/process_rss_megabytes")
    assert [row.step for row in rss] == list(range(9))
    assert all(row.timestamp == START_MS + 950 + 1000 * row.step for row in rss)
    metrics = client.get_run(run_id).data.metrics
    assert metrics["system/cpu_utilization_percentage"] == 50.0
    assert metrics["system/gpu_1_power_usage_watts"] == 300.0
    assert metrics["system/disk_read_megabytes_per_second"] == pytest.approx(200.0)
    assert "system/gpu_0_memory_usage_megabytes" not in metrics


def test_short_run_still_has_a_curve(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    timeline = Timeline(started_at_ms=START_MS, time_s=[0.0, 0.1, 0.2], series={"rss_bytes": [1e9, 2e9, 3e9]})
    write_text(folder / "timeline.json", timeline.model_dump_json())
    run_id = tracker.deliver(folder)
    assert len(client.get_metric_history(run_id, "system/process_rss_megabytes")) >= 2


def test_description_says_what_ran_and_what_came_out(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    metrics = {"generation_tok_s": 41.9, "predicted_tok_s": 50.0, "limit_tok_s": 80.0, "attainment": 0.52}
    run_id = tracker.deliver(make_folder(tmp_path, make_result(metrics=metrics)))
    note = client.get_run(run_id).data.tags["mlflow.note.content"]
    assert len(note.splitlines()) == 5
    for words in (
        "accelerate",
        "owner/tiny",
        "humaneval",
        "41.9 tokens/s",
        "predicted 50",
        "limit 80",
        "memory.png",
    ):
        assert words in note


def test_description_tells_the_batch_that_ran() -> None:
    result = make_result(params={"batch_size": 4}, plan={"batch_size": 8})
    assert "batch 8" in describe(result, None)


@pytest.mark.parametrize(("cut", "mode", "told"), [(3, "pad", True), (0, "pad", False), (3, "fill", False)])
def test_description_tells_prompts_that_were_cut(cut: int, mode: str, told: bool) -> None:
    """A filled row is cut by design; a prompt of its own is not."""
    dataset = make_result().dataset
    assert dataset is not None
    dataset = dataset.model_copy(update={"prompts_truncated": cut, "prompt_mode": mode})
    assert ("(3 cut)" in describe(make_result(dataset=dataset), None)) is told


# The page that opens


def test_page_is_of_the_experiment_whose_run_started_last(tracker: Tracker, client: Any) -> None:
    assert tracker.runs_page() == ""
    tracker.open_run(make_result(run_uuid="1", experiment="old"))
    tracker.open_run(make_result(run_uuid="2", experiment="new", started_at_ms=START_MS + 1))
    assert "/experiments/2/" in tracker.runs_page()
    # A later run does not change its experiment's own time of change.
    tracker.open_run(make_result(run_uuid="3", experiment="old", started_at_ms=START_MS + 2))
    assert "/experiments/1/" in tracker.runs_page()
    client.create_run(client.create_experiment("somebody else's"), start_time=START_MS + 3)
    assert "/experiments/1/" in tracker.runs_page()


def test_page_of_experiments_without_runs_is_none(tracker: Tracker, client: Any) -> None:
    client.delete_run(tracker.open_run(make_result()))
    assert tracker.runs_page() == ""


# Once


def test_second_delivery_changes_nothing(tracker: Tracker, client: Any, store: Store, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "results")
    run_id = tracker.deliver(folder)
    before = everything(client)
    assert tracker.deliver(folder) == run_id
    (folder / ".delivered.json").unlink()  # the store knows by itself
    assert Tracker(store).deliver(folder) == run_id
    assert everything(client) == before


def test_delivery_that_broke_off_is_completed(
    tracker: Tracker, client: Any, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "results")
    whole = tracker.deliver(folder)
    expected = everything(client)[whole]

    other = make_result(run_uuid="other", experiment="offload-eval")
    second = make_folder(tmp_path / "second", other)
    from mlflow import MlflowClient

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", fail)
        with pytest.raises(DeliveryError, match="No space left"):
            tracker.deliver(second)
    assert (
        "harness.delivered" not in client.search_runs(["1"], "tags.`harness.run_uuid` = 'other'")[0].data.tags
    )
    run_id = Tracker(store).deliver(second)
    held = everything(client)
    assert set(held) == {whole, run_id}
    assert held[run_id][1] == "FINISHED"
    assert held[run_id][5] == expected[5]  # no row of any metric is doubled
    assert held[run_id][3] == expected[3]


def test_changed_folder_is_delivered_again_into_the_same_run(
    tracker: Tracker, client: Any, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path)
    run_id = tracker.deliver(folder)
    (folder / "token_latency.png").write_bytes(b"\x89PNG")
    assert tracker.deliver(folder) == run_id
    assert "token_latency.png" in {file.path for file in client.list_artifacts(run_id)}
    assert len(everything(client)) == 1


def test_folder_goes_to_a_second_store_too(tracker: Tracker, tmp_path: Path, empty_database: Path) -> None:
    folder = make_folder(tmp_path / "results")
    first = tracker.deliver(folder)
    elsewhere = resolve_store(None, tmp_path / "elsewhere")
    assert elsewhere.sqlite_path is not None
    shutil.copy(empty_database, elsewhere.sqlite_path)
    assert Tracker(elsewhere).deliver(folder) != first


def test_deleted_run_stays_deleted(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    run_id = tracker.deliver(folder)
    client.delete_run(run_id)
    assert tracker.deliver(folder) == run_id
    assert everything(client) == {}


def test_many_params_and_metrics_go_in_batches(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    params = {f"p{number}": number for number in range(250)}
    result = make_result(params=params, itl_s=[[0.1 + 1e-5 * number for number in range(2100)]])
    run_id = tracker.deliver(make_folder(tmp_path, result))
    assert len([name for name in client.get_run(run_id).data.params if name[1:].isdigit()]) == 250
    assert len(client.get_metric_history(run_id, "itl_by_position_s")) == 2100


# How runs end


@pytest.mark.parametrize("status", [RunStatus.FAILED, RunStatus.KILLED])
def test_run_that_ended_badly(tracker: Tracker, client: Any, tmp_path: Path, status: RunStatus) -> None:
    error = RunError(type="OutOfMemory", message="needs 21.4 GiB, has 15.0", traceback="...", exit_code=5)
    result = make_result(status=status, error=error, metrics={}, repeats=[], itl_s=[], dataset=None)
    folder = make_folder(tmp_path, result)
    write_text(folder / "error.txt", "Traceback ...")
    run = client.get_run(tracker.deliver(folder))
    assert run.info.status == status.value
    assert run.data.tags["harness.error"] == "OutOfMemory: needs 21.4 GiB, has 15.0"
    assert run.data.tags["harness.exit_code"] == "5"
    assert "needs 21.4 GiB" in run.data.tags["mlflow.note.content"]
    assert "error.txt" in {file.path for file in client.list_artifacts(run.info.run_id)}


def dead_process() -> dict[str, Any]:
    """The identity of a real process of this host, killed."""
    code = (
        "import json, harness.provenance as p; print(json.dumps(p.process_identity()), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        identity: dict[str, Any] = json.loads(child.stdout.readline())
        child.kill()
    return identity


def test_runs_of_dead_processes_are_reaped_and_no_others(tracker: Tracker, client: Any) -> None:
    running = {"status": RunStatus.RUNNING, "ended_at_ms": None}
    dead = tracker.open_run(make_result(run_uuid="dead", process=dead_process(), **running))
    alive = tracker.open_run(make_result(run_uuid="alive", process=process_identity(), **running))
    remote = tracker.open_run(make_result(run_uuid="remote", **running))
    assert tracker.reap() == 1
    status = {run_id: client.get_run(run_id).info.status for run_id in (dead, alive, remote)}
    assert status == {dead: "FAILED", alive: "RUNNING", remote: "RUNNING"}
    assert "process died" in client.get_run(dead).data.tags["harness.error"]
    assert tracker.reap() == 0


def test_reaped_run_that_did_finish_loses_its_error(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    process = dead_process()
    run_id = tracker.open_run(make_result(process=process))
    assert tracker.reap() == 1
    assert tracker.deliver(make_folder(tmp_path, make_result(process=process))) == run_id
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "harness.error" not in run.data.tags


def test_result_of_a_dead_process_counts_as_failed(tracker: Tracker, client: Any, tmp_path: Path) -> None:
    result = make_result(status=RunStatus.RUNNING, ended_at_ms=None, process=dead_process())
    run = client.get_run(tracker.deliver(make_folder(tmp_path, result)))
    assert run.info.status == "FAILED"
    assert "process died" in run.data.tags["harness.error"]
    assert run.info.end_time > START_MS


def test_result_of_a_running_process_is_not_delivered(tracker: Tracker, tmp_path: Path) -> None:
    result = make_result(status=RunStatus.RUNNING, process=process_identity())
    with pytest.raises(UsageError, match="still running"):
        tracker.deliver(make_folder(tmp_path, result))


# Stores that fail


def test_deleted_experiment_names_the_way_out(tracker: Tracker, client: Any) -> None:
    tracker.open_run(make_result())
    client.delete_experiment(client.get_experiment_by_name("offload-eval").experiment_id)
    with pytest.raises(DeliveryError, match=r"was deleted.*restore.*--experiment"):
        tracker.open_run(make_result(run_uuid="next"))


@pytest.mark.parametrize("fault", ["silent", "api", "reads", "writes", "batches", "locked"])
def test_bad_store_costs_little_in_all(
    tmp_path: Path, store: Store, silent_port: int, fake_server: Any, fault: str
) -> None:
    """Whatever hangs, one wait before the measurement and one after it; MLflow is imported already."""
    import mlflow  # noqa: F401

    hangs: dict[str, Callable[[str, str], bool]] = {
        "api": lambda method, path: path != "/health",
        "reads": lambda method, path: path.endswith("runs/search"),
        "writes": lambda method, path: path.endswith(("create", "update")),
        "batches": lambda method, path: path.endswith("log-batch"),
    }
    if fault == "silent":
        store = Store(tracking_uri=f"http://127.0.0.1:{silent_port}", artifact_location=None)
    elif fault in hangs:
        store = fake_server(lambda method, path: 60.0 if hangs[fault](method, path) else 0.0).store
    folder = make_folder(tmp_path / "results")
    tracker = Tracker(store)
    spent_s: list[float] = []
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        if fault == "locked":
            assert store.sqlite_path is not None
            holder = stack.enter_context(contextlib.closing(sqlite3.connect(store.sqlite_path)))
            holder.execute("begin immediate")
        for use in (tracker.reap, lambda: tracker.open_run(make_result()), lambda: tracker.deliver(folder)):
            if len(spent_s) == 2:
                tracker._connection._failed_at -= 60  # the measurement
            started = time.monotonic()
            try:
                use()
            except DeliveryError as error:
                failed.append(str(error))
            spent_s.append(time.monotonic() - started)
    assert failed
    assert not any("\n" in words for words in failed)
    # Seconds where minutes would be, also on a machine that is busy.
    assert sum(spent_s[:2]) < 4
    assert sum(spent_s) < 7
    assert not (folder / ".delivered.json").exists()


def test_slow_upload_arrives(tmp_path: Path, fake_server: Any) -> None:
    """A server that hands each file on to a store of its own may take its time with it."""
    server = fake_server(lambda method, path: 3.0 if path.endswith("result.json") else 0.0)
    assert Tracker(server.store).deliver(make_folder(tmp_path)) == "r1"
    assert any(path.endswith("/artifacts/1/r1/artifacts/result.json") for path in server.paths)


DELIVER = """
import sys
from pathlib import Path
from harness.tracking import Tracker
from harness.store import resolve_store
base, folder = map(Path, sys.argv[1:])
Tracker(resolve_store(None, base)).deliver(folder)
"""


@pytest.mark.parametrize("names", [("one", "two"), ("same", "same")])
def test_two_processes_create_the_store_at_once(tmp_path: Path, names: tuple[str, str]) -> None:
    """Both find no database and no experiment, both deliver, and neither says a word."""
    folders = [make_folder(tmp_path, make_result(run_uuid=name)) for name in names]
    commands = [[sys.executable, "-c", DELIVER, str(tmp_path), str(folder)] for folder in folders]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands
    ]
    assert [child.communicate()[0] for child in children] == [b"", b""]
    assert [child.returncode for child in children] == [0, 0]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=resolve_store(None, tmp_path).tracking_uri)
    assert {one.name for one in client.search_experiments()} == {"offload-eval", "Default"}
    assert [run[1] for run in everything(client).values()] == ["FINISHED"] * len(set(names))


def test_database_that_cannot_be_written_is_one_line(tracker: Tracker, store: Store, tmp_path: Path) -> None:
    tracker.open_run(make_result())
    assert store.sqlite_path is not None
    with contextlib.closing(sqlite3.connect(store.sqlite_path)) as file:
        file.execute("drop table params")
    with pytest.raises(DeliveryError) as caught:
        tracker.deliver(make_folder(tmp_path / "results"))
    assert "params" in str(caught.value)
    assert "SQL:" not in str(caught.value)
    assert "\n" not in str(caught.value)
