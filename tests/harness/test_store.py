"""Stores: how they are named, and that one which is away, broken or stuck is told soon and in one line."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flexllmgen.errors import UsageError
from harness.store import TIMEOUT_VARIABLE, Connection, DeliveryError, Store, resolve_store


def test_import_leaves_mlflow_and_matplotlib_alone() -> None:
    code = "import sys, harness.tracking, harness.ui; sys.exit(bool({'mlflow', 'matplotlib', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def experiments(connection: Connection) -> int:
    """A use of a store: count its experiments."""
    return connection.call(lambda client: len(client.search_experiments()))


# Names


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


def test_what_mlflow_says_shows_no_credentials() -> None:
    store = Store(tracking_uri="http://me:secret@127.0.0.1:1", artifact_location=None)
    with pytest.raises(DeliveryError) as caught, Connection(store).translated():
        raise RuntimeError("API request to http://me:secret@127.0.0.1:1/api failed")
    assert str(caught.value).endswith("API request to http://127.0.0.1:1/api failed")


def test_credentials_are_not_shown() -> None:
    store = Store(tracking_uri="postgresql+psycopg2://me:secret@127.0.0.1:1/db", artifact_location=None)
    with pytest.raises(DeliveryError) as caught:
        experiments(Connection(store))
    assert "secret" not in str(caught.value)


# Stores that fail


def test_file_that_is_no_database(tmp_path: Path) -> None:
    store = resolve_store(None, tmp_path)
    assert store.sqlite_path is not None
    store.sqlite_path.write_text("this is not a database, but it is long enough to look like one" * 20)
    started = time.monotonic()
    with pytest.raises(DeliveryError, match="not a database") as caught:
        experiments(Connection(store))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_closed_port_is_told_at_once(closed_port: int, scheme: str) -> None:
    connection = Connection(
        Store(tracking_uri=f"{scheme}://127.0.0.1:{closed_port}/db", artifact_location=None)
    )
    started = time.monotonic()
    with pytest.raises(DeliveryError, match="unreachable"):
        experiments(connection)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("kind", ["immediate", "exclusive"])
def test_database_that_stays_locked_is_told_soon(store: Store, kind: str) -> None:
    connection = Connection(store)
    assert experiments(connection) == 1
    assert store.sqlite_path is not None
    with contextlib.closing(sqlite3.connect(store.sqlite_path)) as holder:
        holder.execute(f"begin {kind}")
        started = time.monotonic()
        for one in (connection, Connection(store)):
            with pytest.raises(DeliveryError, match="locked; end the process"):
                experiments(one)
        assert time.monotonic() - started < 5


def test_database_that_is_only_briefly_locked_is_waited_for(store: Store) -> None:
    connection = Connection(store)
    experiments(connection)
    code = (
        "import sqlite3, sys, time; file = sqlite3.connect(sys.argv[1]); "
        "file.execute('begin exclusive'); print(flush=True); time.sleep(0.5)"
    )
    command = [sys.executable, "-c", code, str(store.sqlite_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert experiments(connection) == 1


def test_failure_that_cost_time_is_not_paid_for_twice(silent_port: int) -> None:
    connection = Connection(Store(tracking_uri=f"http://127.0.0.1:{silent_port}", artifact_location=None))
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(DeliveryError, match="within 2 s"):
            experiments(connection)
    assert time.monotonic() - started < 2.6


def test_refusal_is_not_held_against_the_next_use(store: Store) -> None:
    connection = Connection(store)
    with pytest.raises(DeliveryError, match="not found"):
        connection.call(lambda client: client.get_run("0" * 32))
    assert connection.call(lambda client: len(client.search_experiments()), anew=False) == 1


def test_how_long_an_answer_may_take(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = Connection(store)

    def allowed(**options: Any) -> str | None:
        return connection.call(lambda _: os.environ.get(TIMEOUT_VARIABLE), **options)

    assert (allowed(), allowed(timeout_s=60)) == ("2", "60")
    assert TIMEOUT_VARIABLE not in os.environ
    monkeypatch.setenv(TIMEOUT_VARIABLE, "7")
    assert (allowed(), allowed(timeout_s=60)) == ("7", "7")
