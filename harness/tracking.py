"""Delivers result folders and benchmarks to an MLflow store.

The folder is the record and the store a projection of it, so delivery may fail, be repeated, or come
from another machine: a run is found again by the tag `harness.run_uuid`, and what has arrived is not
sent twice. Nothing here runs while a measurement does. How a run is written is run_writer.py's, how a benchmark becomes
runs tracking_benchmark.py's.
"""

import logging
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError
from harness.folders import mark, marked_run
from harness.provenance import process_is_alive
from harness.results import RunResult, RunStatus
from harness.run_view import view_of_result
from harness.run_writer import (
    ERROR_TAG,
    LAYOUT,
    NOTE_TAG,
    VIEW_NAME,
    VIEW_TAG,
    RunWriter,
)
from harness.store import Store, alone
from harness.store_check import find_stale
from harness.store_runs import pages
from harness.summary import describe, tags_of
from harness.tracking_benchmark import deliver_benchmark, open_benchmark

log = logging.getLogger(__name__)


class Tracker:
    """Writes runs into one store. Safe to use from several processes at once on the same store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._writer = RunWriter(store)
        self._connection = self._writer.connection

    def open_run(self, result: RunResult) -> str:
        """Create a RUNNING run for `result`, in an experiment created when needed, and return its id.

        A store that is away or hangs costs some 2 s, not counting the import of MLflow, and nothing where
        `reap` has waited for it already.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        # `deliver` asks again: one wait in vain is enough before the measurement.
        return self._connection.call(lambda client: self._find_or_create(client, result, None), anew=False)

    def deliver(self, folder: Path, run_id: str | None = None) -> str:
        """Bring the run in `folder` into the store, whole, and return its id.

        The run is `run_id`, or the one tagged with the result's uuid, or a new one. What is there already
        is not sent again, so a delivery that broke off can be repeated. A result left RUNNING by a
        process that is gone counts as FAILED.

        A store that is away or hangs costs some 2 s. One that has answered so far is given longer for files
        and metrics, which a slow server takes slowly.

        Raises:
            DeliveryError: the store is unreachable or refuses.
            UsageError: the folder holds no readable result, or its run is still going on.
        """
        result = RunResult.read(folder)
        if result.status is RunStatus.RUNNING and process_is_alive(result.process):
            raise UsageError(
                f"{folder} is still running (pid {result.process.get('pid')}); deliver it when it has ended"
            )
        # Alone with the folder, lest two who deliver it at once make two runs of it.
        with self._connection.translated(), alone(folder):
            view = view_of_result(folder, result)
            known = run_id or marked_run(folder, self.store.shown_uri)
            found = self._connection.call(lambda client: self._find_or_create(client, result, known))
            self._writer.bring(view, found)
            mark(folder, self.store.shown_uri, found)
            return found

    def open_benchmark(self, folder: Path) -> str:
        """Create a RUNNING parent run for the benchmark at `folder`, or take up the one it has, and return its id.

        A store that is away costs what it costs `open_run`.

        Raises:
            DeliveryError: the store is unreachable or refuses.
            UsageError: the folder holds no readable benchmark.
        """
        return open_benchmark(self._writer, folder)

    def deliver_benchmark(self, folder: Path, run_id: str | None = None) -> str:
        """Bring the benchmark at `folder` into the store and return its parent run's id; each cell is a child of it.

        The parent is `run_id`, or the one tagged with the benchmark's uuid, or a new one. It can be repeated, like
        `deliver`, and the process that runs the benchmark may call it in between: cells that have ended arrive, and the
        parent stays RUNNING. A cell that was measured again since, by a resumed benchmark, replaces its run.

        Raises:
            DeliveryError: the store is unreachable or refuses.
            UsageError: the folder holds no readable benchmark; another process is running it; a cell's result cannot be
                read, which keeps no other cell from the store.
        """
        return deliver_benchmark(self._writer, folder, run_id)

    def reap(self) -> int:
        """Mark FAILED the runs that a dead process of this host left RUNNING, with their children; return how many.

        They have no end time: nobody knows it.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        return self._connection.call(_reap)

    def runs_page(self) -> str:
        """The part of the UI's address that shows the runs beside the one that started last, with figures.

        The UI's own defaults hide every metric and lay the page out for tracing chat applications.
        Empty while there is no run of ours.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        latest = self._connection.call(_latest_run)
        if latest is None:
            return ""
        return f"/#/experiments/{latest.info.experiment_id}/runs?viewStateShareKey={VIEW_NAME}&{LAYOUT}"

    def _find_or_create(self, client: Any, result: RunResult, known: str | None) -> str:
        # The error is unknown yet: `deliver` sets it, or finds that there is none.
        note = describe(result, None) if result.metrics else "Running."
        return self._writer.find_or_create(
            client,
            uuid=result.run_uuid,
            experiment=result.experiment,
            name=result.run_name,
            started_at_ms=result.started_at_ms,
            tags={**tags_of(result, None), NOTE_TAG: note},
            known=known,
        )


def _reap(client: Any) -> int:
    stale = find_stale(client)
    for run, message in stale:
        client.set_tag(run.info.run_id, ERROR_TAG, message)
        client.update_run(run.info.run_id, status="FAILED")
        log.info("run %s was left by a dead process; it is FAILED now", run.info.run_name)
    return len(stale)


def _latest_run(client: Any) -> Any:
    """The run that started last in the experiments of ours, or None."""
    ours = [one.experiment_id for one in pages(client.search_experiments) if VIEW_TAG in one.tags]
    # An experiment's own time of change does not move with its runs.
    newest = {"order_by": ["attributes.start_time DESC"], "max_results": 1}
    return next(iter(client.search_runs(ours, **newest)), None) if ours else None
