"""Checks of result folders and of the store that they go to.

Knows the files of the record; what is wrong within a store is `harness/store_check.py`'s to know.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from flexllmgen.errors import UsageError
from harness.benchmark.record import Benchmark
from harness.doctor.finding import Finding, note, ok, problem
from harness.folders import BENCHMARK, MARKER, RESULT
from harness.provenance import process_is_alive
from harness.results import RunResult, RunStatus
from harness.store import DeliveryError, Store
from harness.store_check import (
    damage,
    is_reachable,
    moved_artifacts,
    relocate_artifacts,
    stale_runs,
)


def check_results(results_dir: Path) -> Iterator[Finding]:
    """Result folders that no store has, that nobody can read, or whose process is gone."""
    folders = sorted(path for path in results_dir.glob("*/") if _is_record(path))
    writable = _can_write(results_dir)
    if not writable:
        yield problem(
            "results",
            f"{results_dir} cannot be written",
            "work in another folder, or name one with --results-dir",
        )
    if not folders:
        if writable:
            yield ok("results", f"no result folder in {results_dir}")
        return
    damaged: list[str] = []
    running = undelivered = abandoned = 0
    for folder in folders:
        try:
            record = Benchmark.read(folder) if (folder / BENCHMARK).exists() else RunResult.read(folder)
        except UsageError as error:
            damaged.append(str(error))
            continue
        if record.status is RunStatus.RUNNING and process_is_alive(record.process) is not False:
            running += 1
            continue
        abandoned += record.status is RunStatus.RUNNING
        undelivered += not _is_delivered(folder)
    count = f"{len(folders)} folder{'s' if len(folders) > 1 else ''}"
    found = f"{count} in {results_dir}" + (f", {running} still running" if running else "")
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        way_out = "read it with the version that wrote it, or move the folder away"
        yield problem("results", f"{found}; {damaged[0]}{more}", way_out)
    if abandoned:
        yield note(
            "results",
            f"{abandoned} of {found} were left by a process that is gone; what they measured is kept",
            f"harness sync {results_dir} records them as FAILED",
        )
    if undelivered:
        yield note(
            "results", f"{undelivered} of {found} are in no MLflow store", f"harness sync {results_dir}"
        )
    if not (damaged or abandoned or undelivered):
        yield ok("results", f"{found}, all delivered")


def check_store(store: Store, *, fix: bool) -> Iterator[Finding]:
    """The store: is it there and whole, do its artifacts lie where it says, did runs die in it."""
    path = store.sqlite_path
    if path is not None and not path.exists():
        if _can_write(path.parent):
            yield ok("store", f"none yet at {path}; the first run makes it")
        else:
            yield problem(
                "store",
                f"none at {path}, and it cannot be made there",
                "work in another folder, or name a store with --tracking-uri",
            )
        return
    try:
        if path is not None and (broken := damage(path)):
            yield problem(
                "store",
                f"{path}: {broken}",
                "put back a copy, or move it away and run harness sync results, which fills a new one",
            )
            return
        is_reachable(store)
        yield ok("store", store.shown_uri)
        if path is not None:
            yield _artifacts_finding(path, fix=fix)
        yield _stale_finding(store, fix=fix)
    except DeliveryError as error:
        yield problem(
            "store", str(error), "start the server or mend the address (--tracking-uri, MLFLOW_TRACKING_URI)"
        )


def _artifacts_finding(database: Path, *, fix: bool) -> Finding:
    moves, lost = moved_artifacts(database)
    if moves and fix:
        changed, backup = relocate_artifacts(database, moves)
        return ok("artifacts", f"{changed} places now lead to {database.parent}; as it was: {backup}")
    if moves:
        old, new = next(iter(moves.items()))
        return problem(
            "artifacts",
            f"the store's folder was moved: it looks for them in {old}, they are in {new}",
            "harness doctor --fix writes the new place into the store (a copy of the database is kept)",
        )
    if lost:
        return problem(
            "artifacts",
            f"{lost[0]} is gone" + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""),
            f"put the folder back, or as {database.parent / 'artifacts'} and run harness doctor --fix",
        )
    return ok("artifacts", "all in place")


def _stale_finding(store: Store, *, fix: bool) -> Finding:
    stale = stale_runs(store)
    if not stale:
        return ok("running runs", "none was left by a dead process")
    if fix:
        from harness.tracking import Tracker

        return ok("running runs", f"{Tracker(store).reap()} that a dead process left are FAILED now")
    names = ", ".join(stale[:3]) + (" ..." if len(stale) > 3 else "")
    found = f"{len(stale)} are RUNNING, but their process is gone: {names}"
    return note("running runs", found, "harness doctor --fix closes them; so does the next run")


def _can_write(folder: Path) -> bool:
    """Whether files can be put there, be it that the folder is made first."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _is_record(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RESULT, BENCHMARK))


def _is_delivered(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MARKER).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
