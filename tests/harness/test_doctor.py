"""The doctor: each verdict, what --fix mends in a real store, what --prune takes and leaves."""

import fcntl
import json
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import make_folder, make_result

from harness.doctor.cache import check_cache, leftovers, packs, prune
from harness.doctor.disk import check_disk, disk_class, kept_rates, room_finding
from harness.doctor.finding import Level
from harness.doctor.record import check_results, check_store
from harness.doctor.system import (
    TorchState,
    files_finding,
    packages_finding,
    pinned_finding,
    python_finding,
    torch_findings,
)
from harness.results import RunStatus
from harness.store import Store, resolve_store
from harness.store_check import damage, moved_artifacts, relocate_artifacts
from harness.tracking import Tracker

OLD_S = 30 * 24 * 3600


def torch_state(**changes: Any) -> TorchState:
    fields: dict[str, Any] = {
        "version": "2.13.0",
        "cuda": "12.8",
        "works": True,
        "gpus": ("H200 139 GiB",),
        "driver": "570.1",
        "driver_cuda": "12.8",
        "capabilities": ("9.0",),
        "architectures": ("sm_80", "sm_90"),
        **changes,
    }
    return TorchState(**fields)


def level_of(name: str, state: TorchState) -> tuple[Level, str]:
    finding = next(one for one in torch_findings(state) if one.check == name)
    return finding.level, f"{finding.found} {finding.way_out}"


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, Level.OK, "CUDA 12.8"),
        ({"cuda": None, "works": False}, Level.PROBLEM, "install the CUDA build"),
        ({"works": False, "driver_cuda": "11.4"}, Level.PROBLEM, "update the driver"),
        ({"works": False}, Level.PROBLEM, "CUDA_VISIBLE_DEVICES"),
        ({"capabilities": ("12.0",)}, Level.PROBLEM, "no code for compute capability 12.0"),
        ({"capabilities": ("8.6",)}, Level.OK, ""),
        ({"capabilities": ("12.0",), "architectures": ("sm_90a", "compute_90")}, Level.OK, ""),
        ({"gpus": (), "works": False}, Level.NOTE, "machine without GPU"),
        ({"gpus": (), "works": False, "cuda": None}, Level.OK, "CPU only"),
    ],
)
def test_torch_fits_the_machine_or_not(changes: dict[str, Any], level: Level, words: str) -> None:
    found, text = level_of("torch", torch_state(**changes))
    assert (found, words in text) == (level, True), text


def test_a_driver_that_does_not_answer_is_a_problem() -> None:
    silent = torch_state(gpus=(), works=False, device_files=True)
    assert level_of("GPU and driver", silent)[0] is Level.PROBLEM
    assert level_of("GPU and driver", torch_state(gpus=(), works=False))[0] is Level.NOTE


def test_python_packages_and_limits() -> None:
    assert python_finding((3, 11), "3.11.7").level is Level.OK
    assert python_finding((3, 15), "3.15.0").level is Level.PROBLEM
    assert python_finding((3, 10), "3.10.1").level is Level.PROBLEM
    assert packages_finding("no-such-distribution").level is Level.PROBLEM
    assert packages_finding().level is Level.OK
    infinite = resource.RLIM_INFINITY
    assert pinned_finding(infinite, gpu=True).level is Level.OK
    assert pinned_finding(8 << 20, gpu=False).level is Level.OK
    assert "memlock" in pinned_finding(8 << 20, gpu=True).way_out
    assert files_finding(1 << 16, 1 << 20).level is Level.OK
    assert files_finding(infinite, infinite).level is Level.OK
    assert files_finding(512, 1 << 20).way_out == "ulimit -n 4096"
    assert files_finding(64, 64).level is Level.PROBLEM
    assert "administrator" in files_finding(64, 64).way_out


def test_a_package_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    wanted = ["numpy>=999", "no-such-package", "pytest; extra == 'dev'", "rich>=1"]
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    finding = packages_finding()
    assert finding.level is Level.PROBLEM
    assert "wanted >=999; no-such-package is missing" in finding.found


def test_the_disk_is_written_and_timed_without_a_profile(tmp_path: Path) -> None:
    folder = tmp_path / "offload"
    findings = {one.check: one for one in check_disk(folder, tmp_path / "profiles")}
    assert list(findings) == ["offload dir", "direct I/O", "disk speed"]
    assert "measured now" in findings["disk speed"].found
    assert not folder.exists()


def test_the_disk_of_a_kept_profile_is_not_timed_again(tmp_path: Path) -> None:
    def keep(name: str, read: float, measured_at: float, device: str = "/dev/sda") -> None:
        rates = {f"disk_{way}_bytes_per_s": {"median": read} for way in ("read", "write")}
        hardware = {"fingerprint": "f", "disk": {"device": device}}
        profile = {"hardware": hardware, "measurements": rates, "measured_at": measured_at}
        (tmp_path / f"profile-{name}.json").write_text(json.dumps(profile))

    keep("a", 1e9, 1.0)
    keep("b", 2e9, 2.0)
    keep("c", 9e9, 3.0, device="/dev/other")
    (tmp_path / "profile-d.json").write_text("{")
    assert kept_rates(tmp_path, "f", "/dev/sda") == (2e9, 2e9, 2.0)
    assert kept_rates(tmp_path, "other", "/dev/sda") is None


def test_a_folder_that_is_no_good_disk(tmp_path: Path) -> None:
    assert room_finding(tmp_path, "ext4", 1 << 40).level is Level.OK
    assert "memory, not disk" in room_finding(tmp_path, "tmpfs", 1 << 40).found
    assert "over a network" in room_finding(tmp_path, "nfs4", 1 << 40).found
    assert room_finding(tmp_path, "ext4", 1 << 20).level is Level.NOTE
    assert disk_class(1e8) == "hard disk or network"
    assert disk_class(7e9).startswith("fast NVMe")
    (tmp_path / "file").touch()
    (only,) = check_disk(tmp_path / "file" / "offload", tmp_path)
    # A mistyped folder leaves nothing behind, one that was there stays.
    (tmp_path / "here").mkdir()
    assert {one.check for one in check_disk(tmp_path / "here" / "mistyped" / "offload", tmp_path)} >= {
        "offload dir"
    }
    assert list((tmp_path / "here").iterdir()) == []
    assert only.level is Level.PROBLEM


def test_a_moved_store_is_found_and_mended(tmp_path: Path, empty_database: Path) -> None:
    old = tmp_path / "old place %41? é"
    store = resolve_store(None, old)
    assert store.sqlite_path is not None
    shutil.copy(empty_database, store.sqlite_path)
    folder = make_folder(tmp_path / "results", make_result(metrics={"ttft_s": 0.5}))
    run_id = Tracker(store).deliver(folder)
    assert moved_artifacts(store.sqlite_path) == ({}, [])
    (tmp_path / "new").mkdir()
    (old / "mlruns").rename(tmp_path / "new" / "mlruns")

    moved = resolve_store(None, tmp_path / "new", create=False)
    database = moved.sqlite_path
    assert database is not None
    findings = {one.check: one for one in check_store(moved, fix=False)}
    assert findings["artifacts"].level is Level.PROBLEM
    assert "--fix" in findings["artifacts"].way_out
    findings = {one.check: one for one in check_store(moved, fix=True)}
    assert findings["artifacts"].level is Level.OK

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=moved.tracking_uri)
    names = {one.path for one in client.list_artifacts(run_id)}
    assert "result.json" in names
    text = Path(client.download_artifacts(run_id, "result.json", str(tmp_path))).read_text()
    assert json.loads(text)["run_uuid"] == make_result().run_uuid
    # New runs of the same experiment go to the new place too.
    experiment = client.get_experiment_by_name("offload-eval")
    assert client.create_run(experiment.experiment_id).info.artifact_uri.startswith(
        (tmp_path / "new" / "mlruns" / "artifacts").as_uri()
    )
    (backup,) = database.parent.glob("mlflow.db.backup-*")
    assert damage(backup) == ""
    with sqlite3.connect(backup) as connection:
        before = connection.execute("select artifact_uri from runs where run_uuid = ?", [run_id]).fetchone()
    assert before[0].startswith((old / "mlruns").as_uri())
    assert not (old / "mlruns").exists()
    again = {one.check: one for one in check_store(moved, fix=True)}
    assert again["artifacts"].found == "all in place"


def test_only_the_places_that_moved_are_rewritten(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    (tmp_path / "artifacts").mkdir()
    stays = tmp_path / "elsewhere"
    stays.mkdir()
    places = {
        "1": "file:///gone/a_b/artifacts",
        "2": "file:///gone/a_b/artifacts/2",
        "3": "file:///gone/aXb/artifacts-old",
        "4": stays.as_uri(),
        "5": "s3://bucket/artifacts",
        "6": "mlflow-artifacts:/6",
    }
    with sqlite3.connect(database) as connection:
        connection.execute("create table experiments (id text, artifact_location text)")
        connection.execute("create table runs (id text, artifact_uri text)")
        connection.executemany("insert into experiments values (?, ?)", places.items())
        runs = [(name, f"{place}/r{name}/artifacts") for name, place in places.items()]
        connection.executemany("insert into runs values (?, ?)", runs)
    connection.close()
    moves, lost = moved_artifacts(database)
    root = (tmp_path / "artifacts").as_uri()
    assert moves == {"file:///gone/a_b/artifacts": root, "file:///gone/a_b/artifacts/2": f"{root}/2"}
    assert lost == ["file:///gone/aXb/artifacts-old"]
    relocate_artifacts(database, moves)
    with sqlite3.connect(database) as connection:
        after = dict(connection.execute("select * from experiments").fetchall())
        uris = dict(connection.execute("select * from runs").fetchall())
    connection.close()
    assert after == {**places, "1": root, "2": f"{root}/2"}
    assert uris["1"] == f"{root}/r1/artifacts"
    assert uris["2"] == f"{root}/2/r2/artifacts"
    assert uris["5"] == "s3://bucket/artifacts/r5/artifacts"


def test_a_dead_run_is_told_and_closed(store: Store, tracker: Tracker, client: Any) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    host = os.uname().nodename
    dead = {"host": host, "pid": child.pid, "pid_started": time.time() - 100}
    run_id = tracker.open_run(make_result(status=RunStatus.RUNNING, process=dead, metrics={}))
    found = {one.check: one for one in check_store(store, fix=False)}["running runs"]
    assert found.level is Level.NOTE
    assert "accelerate-tiny" in found.found
    mended = {one.check: one for one in check_store(store, fix=True)}["running runs"]
    assert mended.level is Level.OK
    assert client.get_run(run_id).info.status == "FAILED"


def test_a_store_that_is_damaged_or_away(tmp_path: Path, closed_port: int) -> None:
    absent = resolve_store(None, tmp_path, create=False)
    assert [one.level for one in check_store(absent, fix=False)] == [Level.OK]
    assert not (tmp_path / "mlruns").exists()
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(b"this is no database" * 100)
    (broken,) = check_store(absent, fix=True)
    assert (broken.level, broken.check) == (Level.PROBLEM, "store")
    away = Store(tracking_uri=f"http://127.0.0.1:{closed_port}", artifact_location=None)
    (refused,) = check_store(away, fix=True)
    assert refused.level is Level.PROBLEM


def test_results_that_no_store_has(tmp_path: Path) -> None:
    assert [one.level for one in check_results(tmp_path / "none")] == [Level.OK]
    folder = make_folder(tmp_path, make_result(metrics={}))
    (found,) = check_results(tmp_path)
    assert (found.level, found.way_out) == (Level.NOTE, f"harness sync {tmp_path}")
    (folder / ".delivered.json").write_text('{"run_id": "r", "tracking_uri": "u"}')
    (found,) = check_results(tmp_path)
    assert found.level is Level.OK
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"schema_version": 99}')
    (found,) = check_results(tmp_path)
    assert found.level is Level.PROBLEM


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder would have to be made")
    (found,) = check_results(tmp_path / "file" / "results")
    assert (found.level, found.check) == (Level.PROBLEM, "results")
    assert "--results-dir" in found.way_out
    absent = resolve_store(f"sqlite:///{tmp_path}/file/mlruns/mlflow.db", tmp_path, create=False)
    (found,) = check_store(absent, fix=False)
    assert (found.level, found.check) == (Level.PROBLEM, "store")
    assert "--tracking-uri" in found.way_out


def make_pack(offload: Path, name: str, age_s: float, kind: str = "weights") -> Path:
    folder = offload / f"{kind}-{name}"
    folder.mkdir(parents=True)
    for file in ("layer-0.bin", ".lock"):
        (folder / file).write_bytes(b"x" * 1000)
        os.utime(folder / file, (time.time() - age_s,) * 2)
    os.utime(folder, (time.time() - age_s,) * 2)
    return folder


def test_prune_takes_what_is_old_and_leaves_what_is_used(tmp_path: Path) -> None:
    offload, cache = tmp_path / "offload", tmp_path / "cache"
    old = make_pack(offload, "old", OLD_S, "quantised")
    opened = make_pack(offload, "opened", OLD_S)
    locked = make_pack(offload, "locked", OLD_S)
    recent = make_pack(offload, "recent", 3600)
    fresh = make_pack(offload, "fresh", 1)
    (cache / "profiles").mkdir(parents=True)
    (kept := cache / "profiles" / "profile-1.json").write_text("{}")
    code = "import sys; f = open(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen([sys.executable, "-c", code, str(opened / "layer-0.bin")], **pipes) as user,
        (locked / ".lock").open("r+b") as lock,
    ):
        assert user.stdout is not None
        user.stdout.readline()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert {one.path: one.in_use for one in packs(offload)} == {
            old: False, opened: True, locked: True, recent: False, fresh: True,
        }  # fmt: skip
        told = {one.check: one for one in check_cache(cache, offload, days=7, left=[])}
        assert told["packed weights"].level is Level.NOTE
        removed = prune(cache, offload, days=7, left=[])
        assert [(one.path, one.num_bytes) for one in removed] == [(old, 2000)]
        removed = prune(cache, offload, days=0, left=[])
        assert {one.path for one in removed} == {recent, kept}
        assert user.stdin is not None
        user.stdin.close()
    assert sorted(path.name for path in offload.iterdir()) == [
        "weights-fresh",
        "weights-locked",
        "weights-opened",
    ]


def test_leftovers_are_those_of_processes_that_are_gone(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    gone = [tmp_path / f".rate-{child.pid}", tmp_path / "weights-a" / f".layer-0-{child.pid}.tmp"]
    alive = [tmp_path / f".rate-{os.getpid()}"]
    half = [tmp_path / "run" / ".result.json.abcd1234"]
    young = [tmp_path / "run" / ".plan.json.abcd1234"]
    others = [tmp_path / ".delivered.json", tmp_path / "run" / ".delivered.json", tmp_path / ".mine"]
    for path in (*gone, *alive, *half, *young, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    for path in (*half, *others):
        os.utime(path, (time.time() - OLD_S,) * 2)
    for name in ("accelerate-000000000001", "accelerate-000000000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").touch()
    with (tmp_path / "accelerate-000000000002" / ".lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left = leftovers([tmp_path])
        expected = {*gone, *half, tmp_path / "accelerate-000000000001"}
        assert {one.path for one in left} == expected
        assert {one.path for one in prune(tmp_path, tmp_path, days=7, left=left)} == expected
    assert not any(path.exists() for path in expected)
    assert all(path.exists() for path in (*alive, *young, *others))


def test_a_pack_says_when_it_was_last_used(tmp_path: Path) -> None:
    from flexllmgen.memory.pack import WeightPack

    folder = make_pack(tmp_path, "key", OLD_S)
    assert packs(tmp_path)[0].old(time.time(), days=7)
    with WeightPack(tmp_path, "key").locked():
        pass
    assert folder.exists()
    assert not packs(tmp_path)[0].old(time.time(), days=0)


def test_the_command_and_its_exit_codes(harness: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--offload-dir", tmp_path / "offload", "--results-dir", tmp_path / "results")
    done = harness("doctor", *options, "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    checks = [one["check"] for one in said["findings"]]
    assert {"Python", "torch", "disk speed", "packed weights", "results", "store"} <= set(checks)
    assert said["healthy"] == (done.code == 0)
    assert not (tmp_path / "mlruns").exists()
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(b"this is no database" * 100)
    done = harness("doctor", *options, "--prune", cwd=tmp_path)
    assert done.code == 3, done.stderr
    assert "problem  store" in done.stdout
    assert "0 B freed" in done.stdout
