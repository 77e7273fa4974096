"""Delivery to real MLflow stores: whole, once, quickly given up, and from any state a run can end in."""

import contextlib
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexllmgen.errors import UsageError
from harness.provenance import process_identity
from harness.results import (
    DatasetRecord,
    Provenance,
    Repeat,
    RunError,
    RunResult,
    RunStatus,
    Timeline,
    write_json,
    write_jsonl,
    write_text,
)
from harness.store import DeliveryError, Store, resolve_store
from harness.tracking import (
    Tracker,
    find_result_folders,
)
from harness.ui import run_ui

START_MS = 1_790_000_000_000
UUID = "3f2b8c1e-0000-4000-8000-000000000001"


def make_result(**changes: Any) -> RunResult:
    fields: dict[str, Any] = {
        "run_uuid": UUID,
        "status": RunStatus.FINISHED,
        "experiment": "offload-eval",
        "run_name": "accelerate-tiny",
        "strategy": "accelerate",
        "model": "owner/tiny",
        "started_at_ms": START_MS,
        "ended_at_ms": START_MS + 9000,
        "process": {**process_identity(), "host": "gpu-box"},
        "params": {
            "batch_size": 4,
            "gpu_mem": None,
            "enable_offload": True,
            "note": "x" * 7000,
            "top p (%)": 1,
        },
        "metrics": {"ttft_s": 0.5, "load_s": 2.0, "bad": float("inf"), "worse": float("nan")},
        "spread": {"ttft_s": 0.2},
        "cold": {"ttft_s": 0.9},
        "repeats": [
            Repeat(index=n, ended_at_ms=START_MS + 4000 + n, metrics={"ttft_s": ttft_s})
            for n, ttft_s in enumerate((0.4, 0.5, 0.5))
        ],
        "itl_s": [[0.1, 0.2], [0.1, 0.4], [0.3, 0.4]],
        "tags": {"team": "inference"},
        "dataset": DatasetRecord(
            name="humaneval",
            source="openai/openai_humaneval",
            source_type="package",
            split="test",
            digest="0123456789" * 6,
            num_rows=164,
            num_prompts=8,
            prompts_unique=8,
            prompts_truncated=0,
            real_tokens=900,
            padded_tokens=100,
            prompt_mode="pad",
        ),
        "provenance": Provenance(
            git_commit="a" * 40,
            git_branch="main",
            git_dirty=True,
            git_remote="https://git.example/code.git",
            command="/somewhere/bin/harness eval -n 8",
            user="someone",
        ),
        "hardware_fingerprint": "c0ffee",
        "workload_key": "8x128+32",
        **changes,
    }
    return RunResult.model_validate(fields)


def make_folder(results: Path, result: RunResult | None = None) -> Path:
    result = result or make_result()
    folder = results / result.run_uuid
    # result.json refuses inf and nan on the way back in; the tracker must not rely on that.
    finite = {name: value for name, value in result.metrics.items() if abs(value) < 1e300}
    result.model_copy(update={"metrics": finite}).write(folder)
    times = [0.05 * step for step in range(180)]
    series: dict[str, list[float | None]] = {
        "rss_bytes": [1e9 + time for time in times],
        "cpu_percent": [50.0 for _ in times],
        "disk_read_bytes": [2e8 * time for time in times],
        "gpu_0_memory_bytes": [None for _ in times],
        "gpu_1_power_w": [300.0 for _ in times],
    }
    timeline = Timeline(started_at_ms=START_MS, time_s=times, series=series, phases=[("load", 0.0, 2.0)])
    write_text(folder / "timeline.json", timeline.model_dump_json())
    write_jsonl(folder / "requests.jsonl", [{"prompt_id": "HumanEval/0"}])
    write_json(folder / "detail" / "plan.json", {"device_map": {}})
    write_text(folder / ".half.json", "{")
    (folder / "memory.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables, made once: making them takes longer than a test."""
    base = tmp_path_factory.mktemp("template")
    store = resolve_store(None, base)
    assert Tracker(store).reap() == 0
    assert store.sqlite_path is not None
    return store.sqlite_path


@pytest.fixture(autouse=True)
def no_own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Store:
    store = resolve_store(None, tmp_path)
    assert store.sqlite_path is not None
    shutil.copy(empty_database, store.sqlite_path)
    return store


@pytest.fixture
def tracker(store: Store) -> Tracker:
    return Tracker(store)


@pytest.fixture
def client(store: Store) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.tracking_uri)


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


def test_import_leaves_mlflow_and_matplotlib_alone() -> None:
    code = (
        "import sys, harness.tracking; sys.exit(bool({'mlflow', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Which store


def test_default_store_lies_under_mlruns(tmp_path: Path) -> None:
    store = resolve_store(None, tmp_path)
    assert store.tracking_uri == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert store.artifact_location == f"file://{tmp_path}/mlruns/artifacts"
    assert (tmp_path / "mlruns" / "artifacts").is_dir()


def test_option_comes_before_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve_store(None, tmp_path) == Store(tracking_uri="http://server:5000", artifact_location=None)
    own = resolve_store(f"sqlite:///{tmp_path}/own/runs.db", tmp_path)
    assert own.artifact_location == f"file://{tmp_path}/own/artifacts"
    assert own.sqlite_path == tmp_path / "own" / "runs.db"


def test_relative_sqlite_address_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_store("sqlite:///runs.db", tmp_path).tracking_uri == f"sqlite:///{tmp_path}/runs.db"


@pytest.mark.parametrize(
    "uri", ["mlruns", "/data/mlruns", "file:///data/mlruns", "ftp://host/x", "sqlite:///"]
)
def test_address_that_is_no_store_names_the_sqlite_form(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UsageError, match=r"sqlite:///.*\.db"):
        resolve_store(uri, tmp_path)


def test_credentials_are_not_shown() -> None:
    store = Store(tracking_uri="postgresql+psycopg2://me:secret@127.0.0.1:1/db", artifact_location=None)
    with pytest.raises(DeliveryError) as caught:
        Tracker(store).reap()
    assert "secret" not in str(caught.value)


def test_find_result_folders(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    assert find_result_folders(tmp_path) == [folder]
    assert find_result_folders(folder) == [folder]
    for nothing in (tmp_path / "missing", folder / "detail"):
        with pytest.raises(UsageError, match="holds no result"):
            find_result_folders(nothing)


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
    assert len(client.get_run(run_id).data.params) == 250
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


def test_file_that_is_no_database(tmp_path: Path) -> None:
    store = resolve_store(None, tmp_path)
    assert store.sqlite_path is not None
    store.sqlite_path.write_text("this is not a database, but it is long enough to look like one" * 20)
    started = time.monotonic()
    with pytest.raises(DeliveryError, match="not a database") as caught:
        Tracker(store).open_run(make_result())
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 5


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
    for connection in held:
        connection.close()


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_closed_port_is_told_at_once(tmp_path: Path, closed_port: int, scheme: str) -> None:
    tracker = Tracker(Store(tracking_uri=f"{scheme}://127.0.0.1:{closed_port}/db", artifact_location=None))
    started = time.monotonic()
    with pytest.raises(DeliveryError, match="unreachable"):
        tracker.open_run(make_result())
    with pytest.raises(DeliveryError):
        tracker.deliver(make_folder(tmp_path))
    assert time.monotonic() - started < 4


def test_silent_server_costs_little(tmp_path: Path, silent_port: int) -> None:
    tracker = Tracker(Store(tracking_uri=f"http://127.0.0.1:{silent_port}", artifact_location=None))
    folder = make_folder(tmp_path)
    started = time.monotonic()
    with pytest.raises(DeliveryError, match="within 2 s"):
        tracker.reap()
    with pytest.raises(DeliveryError) as caught:
        tracker.open_run(make_result())
    assert time.monotonic() - started < 2.6
    with pytest.raises(DeliveryError):
        tracker.deliver(folder)
    assert time.monotonic() - started < 5
    assert "\n" not in str(caught.value)
    assert not (folder / ".delivered.json").exists()


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


# The UI


@pytest.mark.slow
def test_ui_serves_and_is_a_store_itself(tmp_path: Path, store: Store, tracker: Tracker) -> None:
    """Its server takes the next port where one is taken, delivers over HTTP, and ends with its parent."""
    import requests

    tracker.deliver(make_folder(tmp_path / "results"))
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from harness.store import resolve_store
        from harness.ui import run_ui
        store, say = resolve_store(None, Path(sys.argv[1])), lambda words: print(words, flush=True)
        run_ui(store, port=int(sys.argv[2]), open_browser=False, announce=say)
    """)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-c", code, str(tmp_path), str(taken.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout is not None
            assert "is taken" in child.stdout.readline()
            page = child.stdout.readline().split()[3]
            assert "/#/experiments/1/runs?viewStateShareKey=harness" in page
            address = page.partition("/#")[0]
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    if requests.get(f"{address}/health", timeout=1).ok:
                        break
                except requests.RequestException:
                    time.sleep(0.2)
            remote = Tracker(Store(tracking_uri=address, artifact_location=None))
            folder = make_folder(tmp_path / "more", make_result(run_uuid="over http"))
            assert remote.deliver(folder) == remote.deliver(folder)
            assert remote.reap() == 0
            child.terminate()
            assert child.wait(timeout=20) == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{address}/health", timeout=1)


def test_ui_of_a_server_is_its_own(closed_port: int) -> None:
    store = Store(tracking_uri=f"http://127.0.0.1:{closed_port}", artifact_location=None)
    with pytest.raises(DeliveryError, match="unreachable"):
        run_ui(store, port=5000, open_browser=False)
