"""What can be wrong within a store, and how it is mended: a damaged database, artifacts that moved, runs that died.

MLflow writes absolute places of artifacts into its database, so that a store that was moved with its folder loses
them. Knows MLflow's tables of places; everything else goes through its client.
"""

import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from harness.provenance import process_is_alive
from harness.run_writer import PARENT_TAG, UUID_TAG
from harness.store import PROBE_TIMEOUT_S, Connection, DeliveryError, Store, alone
from harness.store_runs import pages

# Where MLflow keeps places, by table; not every version has every one.
_PLACES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
}
_FOLDER = "artifacts"


def damage(database: Path) -> str:
    """What sqlite finds wrong with the file; empty where nothing is.

    Raises:
        DeliveryError: the file cannot be opened.
    """
    try:
        with _reading(database) as connection:
            verdict = str(connection.execute("pragma quick_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as error:
        return str(error)
    return "" if verdict == "ok" else verdict


def is_reachable(store: Store) -> None:
    """Ask the store for something small.

    Raises:
        DeliveryError: it does not answer, or its database is of another version of MLflow.
    """
    Connection(store).call(lambda client: client.search_experiments(max_results=1))


def stale_runs(store: Store) -> list[str]:
    """Names of the runs that a dead process of this host left RUNNING: those that `Tracker.reap` would close.

    Raises:
        DeliveryError: the store is unreachable.
    """
    return Connection(store).call(lambda client: [run.info.run_name for run, _ in find_stale(client)])


def find_stale(client: Any) -> list[tuple[Any, str]]:
    """The runs that a dead process of this host left RUNNING, each with why it counts as dead."""
    host = socket.gethostname()
    experiments = [one.experiment_id for one in pages(client.search_experiments)]
    if not experiments:
        return []
    query = f"attributes.status = 'RUNNING' and tags.`harness.host` = '{host}'"
    # Listed whole: runs that stop matching while they are paged through would shift the pages.
    running = list(pages(client.search_runs, experiment_ids=experiments, filter_string=query))
    stale: dict[str, tuple[Any, str]] = {}
    for run in running:
        if _is_stale(run.data.tags, host):
            pid = run.data.tags.get("harness.pid")
            stale[run.info.run_id] = (run, f"process died: pid {pid} on {host} is gone")
    # A child that names no process of its own, or an earlier one's, ends with its parent.
    for run in running:
        if run.info.run_id not in stale and run.data.tags.get(PARENT_TAG) in stale:
            stale[run.info.run_id] = (run, f"process died: that of its benchmark on {host} is gone")
    return [*stale.values()]


def moved_artifacts(database: Path) -> tuple[dict[str, str], list[str]]:
    """Places that are gone: with where they are now, and those that are nowhere to be found.

    A place counts as moved where its folder is not there, and the part of it from `artifacts` on is, or can be, in
    the folder `artifacts` beside the database. Places that are no local folders are never touched.
    """
    moves: dict[str, str] = {}
    lost: list[str] = []
    with _reading(database) as connection:
        for place in sorted(_roots(connection)):
            path = _local(place)
            if path is None or path.exists():
                continue
            new = _beside(path, database)
            if new is None:
                # Nothing was ever written there: MLflow's own first experiment names a folder it never makes.
                if _has_runs(connection, place):
                    lost.append(place)
            else:
                moves[place] = new.as_uri() if place.startswith("file:") else str(new)
    return moves, lost


def relocate_artifacts(database: Path, moves: Mapping[str, str]) -> tuple[int, Path]:
    """Write new places into the store, all or none; return how many were changed and the copy of what was.

    Raises:
        DeliveryError: the database is held by another process, or cannot be written.
    """
    backup = database.with_name(f"{database.name}.backup-{time.strftime('%Y%m%d-%H%M%S')}")
    changed = 0
    try:
        # The lock that runs take to open the store; then the database's own, against those that have it open.
        with (
            alone(database.parent / f".{database.name}.lock", os.O_RDWR | os.O_CREAT),
            contextlib.closing(sqlite3.connect(database, timeout=30.0, isolation_level=None)) as connection,
        ):
            connection.execute("begin immediate")
            try:
                with _reading(database) as source, contextlib.closing(sqlite3.connect(backup)) as copy:
                    source.backup(copy)
                for table, column in _tables(connection):
                    for old, new in moves.items():
                        # A prefix by its length: LIKE would take % and _ in a path for wildcards.
                        changed += connection.execute(
                            f"update {table} set {column} = ? || substr({column}, ?)"
                            f" where {column} = ? or substr({column}, 1, ?) = ?",
                            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                        ).rowcount
                connection.execute("commit")
            except BaseException:
                connection.execute("rollback")
                raise
    except (sqlite3.Error, OSError) as error:
        raise DeliveryError(
            f"MLflow store {database}: {error}; end the processes that use it and try again"
        ) from error
    return changed, backup


def _is_stale(tags: Mapping[str, str], host: str) -> bool:
    process = {
        "host": host,
        "pid": tags.get("harness.pid"),
        "pid_started": tags.get("harness.pid_started"),
    }
    return UUID_TAG in tags and process_is_alive(process) is False


@contextlib.contextmanager
def _reading(database: Path) -> Iterator[sqlite3.Connection]:
    uri = f"{database.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=PROBE_TIMEOUT_S)) as connection:
        yield connection


def _tables(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    for table, column in _PLACES.items():
        if any(row[1] == column for row in connection.execute(f"pragma table_info({table})")):
            yield table, column


def _roots(connection: sqlite3.Connection) -> set[str]:
    """The folders that experiments name, and those that hold runs' own folders."""
    tables = dict(_tables(connection))
    roots: set[str] = set()
    if "experiments" in tables:
        roots |= {row[0] for row in connection.execute("select artifact_location from experiments") if row[0]}
    if "runs" in tables:
        for (place,) in connection.execute("select artifact_uri from runs"):
            # <root>/<run id>/artifacts
            if place and place.count("/") > 2:
                roots.add(place.rsplit("/", 2)[0])
    return roots


def _has_runs(connection: sqlite3.Connection, place: str) -> bool:
    query = "select 1 from runs where substr(artifact_uri, 1, ?) = ? limit 1"
    return connection.execute(query, (len(place) + 1, f"{place}/")).fetchone() is not None


def _local(place: str) -> Path | None:
    """The folder that a place names; None for one that is no local folder."""
    parts = urlsplit(place)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(place) if place.startswith("/") else None


def _beside(path: Path, database: Path) -> Path | None:
    """Where a place of another folder is now that the database lies here."""
    parts = PurePosixPath(path).parts
    if _FOLDER not in parts:
        return None
    cut = len(parts) - parts[::-1].index(_FOLDER)
    root = database.absolute().parent / _FOLDER
    return root.joinpath(*parts[cut:]) if root.is_dir() else None
