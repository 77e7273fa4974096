"""A benchmark in an MLflow store: one parent run, and a child run for each cell that has ended.

Children are found again through their parent and the tag `harness.cell`; what has arrived is not sent twice. How a run is
written is run_writer.py's.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError
from harness.benchmark.record import Benchmark, Cell, CellStatus, cell_folder
from harness.benchmark.summary import (
    benchmark_metrics,
    benchmark_params,
    benchmark_tags,
    best_tag,
    cell_metrics,
    cell_tags,
    describe_benchmark,
    lost_result,
)
from harness.benchmark.table import Row, rows_of
from harness.folders import digest_of, files_of, mark, marked_run
from harness.provenance import process_is_alive
from harness.results import DatasetRecord, RunError, RunResult, RunStatus
from harness.run_view import RunView, view_of_result
from harness.run_writer import (
    DELIVERED_TAG,
    ERROR_TAG,
    EXIT_TAG,
    LAYOUT,
    NOTE_TAG,
    PARENT_TAG,
    UUID_TAG,
    RunWriter,
    holds,
    log_tags,
    quoted,
)
from harness.store import alone
from harness.store_runs import pages

CELL_TAG, LAUNCHES_TAG = "harness.cell", "harness.launches"


def open_benchmark(writer: RunWriter, folder: Path) -> str:
    """See `Tracker.open_benchmark`."""
    benchmark = Benchmark.read(folder)

    def open_parent(client: Any) -> str:
        run_id = _find_or_create(writer, client, benchmark, marked_run(folder, writer.store.shown_uri))
        run = client.get_run(run_id)
        if run.info.status != RunStatus.RUNNING.value:
            # Resumed: it is this process's now, and there is more to come.
            log_tags(client, run_id, {**benchmark_tags(benchmark, None), DELIVERED_TAG: "false"})
            for stale in (ERROR_TAG, EXIT_TAG):
                if stale in run.data.tags:
                    client.delete_tag(run_id, stale)
            client.update_run(run_id, status=RunStatus.RUNNING.value)
        return run_id

    return writer.connection.call(open_parent, anew=False)


def deliver_benchmark(writer: RunWriter, folder: Path, run_id: str | None) -> str:
    """See `Tracker.deliver_benchmark`."""
    benchmark = Benchmark.read(folder)
    alive = bool(process_is_alive(benchmark.process))
    mine = alive and benchmark.process.get("pid") == os.getpid()
    if benchmark.status is RunStatus.RUNNING and alive and not mine:
        raise UsageError(
            f"{folder} is still running (pid {benchmark.process.get('pid')}); deliver it when it has ended"
        )
    call = writer.connection.call
    with writer.connection.translated(), alone(folder):
        known = run_id or marked_run(folder, writer.store.shown_uri)
        parent_id = call(lambda client: _find_or_create(writer, client, benchmark, known))
        digest = digest_of(folder, files_of(folder))
        if not holds(call(lambda client: client.get_run(parent_id)), digest):
            results, problems = _read_cells(folder, benchmark)
            rows = {row.name: row for row in rows_of(benchmark, results)}
            delivery = _Delivery(writer, folder, benchmark, results, rows, parent_id)
            children = delivery.bring_children()
            view = delivery.parent(children, digest, live=mine)
            writer.bring(replace(view, whole=not problems), parent_id)
            if problems:
                raise problems[0]
        mark(folder, writer.store.shown_uri, parent_id)
        return parent_id


@dataclass(frozen=True, slots=True)
class _Delivery:
    """One benchmark on its way into the store; `results` and `rows` are by cell."""

    writer: RunWriter
    folder: Path
    benchmark: Benchmark
    results: Mapping[str, RunResult]
    rows: Mapping[str, Row]
    parent_id: str

    def bring_children(self) -> dict[str, str]:
        """Deliver each cell that has ended; return the runs' ids by cell."""
        there = self.writer.connection.call(self._children)
        found: dict[str, str] = {}
        for cell in self.benchmark.cells:
            result = self.results.get(cell.name)
            if (cell_folder(self.folder, cell.name) / "result.json").exists() and result is None:
                continue  # it cannot be read; that it failed is not known
            if cell.status is CellStatus.PENDING and (result is None or self._goes_on):
                continue
            view = self._cell(cell, result or lost_result(self.benchmark, cell))
            found[cell.name] = self._child(view, there.get(cell.name))
            self.writer.bring(view, found[cell.name])
        return found

    @property
    def _goes_on(self) -> bool:
        return self.benchmark.status is RunStatus.RUNNING and bool(process_is_alive(self.benchmark.process))

    def _children(self, client: Any) -> dict[str, Any]:
        experiment_id = client.get_run(self.parent_id).info.experiment_id
        query = f"tags.`{PARENT_TAG}` = {quoted(self.parent_id)}"
        runs = pages(client.search_runs, experiment_ids=[experiment_id], filter_string=query)
        return {run.data.tags.get(CELL_TAG, ""): run for run in runs}

    def _child(self, view: RunView, there: Any) -> str:
        if there is not None:
            held = there.data.tags
            same = all(held.get(tag) == view.tags[tag] for tag in (UUID_TAG, LAUNCHES_TAG))
            if same or held.get(DELIVERED_TAG) != "true":
                return str(there.info.run_id)
            # Params cannot change and steps cannot be taken back: a cell measured again is another run.
            self.writer.connection.call(lambda client: client.delete_run(there.info.run_id))

        def create(client: Any) -> str:
            experiment_id = client.get_run(self.parent_id).info.experiment_id
            run = client.create_run(
                experiment_id, start_time=view.started_at_ms, tags=dict(view.tags), run_name=view.name
            )
            return str(run.info.run_id)

        return self.writer.connection.call(create)

    def _cell(self, cell: Cell, result: RunResult) -> RunView:
        row, inside = self.rows[cell.name], cell_folder(self.folder, cell.name)
        if cell.status is CellStatus.FAILED:
            error = cell.error or result.error
            result = result.model_copy(update={"status": RunStatus.FAILED, "error": error})
        elif cell.status is CellStatus.PENDING:
            missing = f"{len(cell.launches)} of {self.benchmark.launches} launches were measured"
            error = RunError(type="Interrupted", message=f"{missing}; resume the benchmark", exit_code=130)
            result = result.model_copy(update={"status": RunStatus.KILLED, "error": error})
        result = result.model_copy(update={"experiment": self.benchmark.experiment, "run_name": cell.name})
        view = view_of_result(inside, result)
        at_ms = self.benchmark.ended_at_ms or view.ended_at_ms or view.started_at_ms
        more = cell_metrics(row, at_ms)
        launches = {repeat.launch for repeat in result.repeats}
        return replace(
            view,
            rows=[*view.rows, *more],
            params={**view.params, "cell": cell.name},
            tags={
                **view.tags,
                **cell_tags(self.benchmark, cell, row),
                PARENT_TAG: self.parent_id,
                LAUNCHES_TAG: str(len(launches)),
            },
            digest=digest_of(inside, view.files, more=f"{cell.status} {cell.error} {more}"),
        )

    def parent(self, children: Mapping[str, str], digest: str, *, live: bool) -> RunView:
        """What the store is to hold of the benchmark itself; `live`: this process is still at it."""
        benchmark, folder = self.benchmark, self.folder
        status, error = benchmark.status, None
        if status is RunStatus.RUNNING and not live:
            pid, host = benchmark.process.get("pid"), benchmark.process.get("host")
            status = RunStatus.FAILED
            words = f"process died without a word (pid {pid} on {host}); resume it to measure what is missing"
            error = RunError(type="ProcessDied", message=words)
        files = files_of(folder, without=("cells",))
        rows = list(self.rows.values())
        shown = [
            file.name for file in files if file.parent == folder and file.suffix in (".html", ".md", ".png")
        ]
        ended = [result.ended_at_ms for result in self.results.values() if result.ended_at_ms]
        ended_ms = benchmark.ended_at_ms or max([benchmark.started_at_ms, *ended])

        def note(link: Any) -> str:
            page = link("").partition(f"/runs/{self.parent_id}")[0]
            cells = {name: f"{page}/runs/{run_id}?{LAYOUT}" for name, run_id in children.items()}
            links = {name: link(name) for name in shown}
            return describe_benchmark(benchmark, rows, error, cells=cells, files=links)

        return RunView(
            uuid=benchmark.benchmark_uuid,
            experiment=benchmark.experiment,
            name=benchmark.name,
            status=status,
            started_at_ms=benchmark.started_at_ms,
            ended_at_ms=ended_ms,
            # A param cannot change: what the options came to is known when all cells have ended.
            params={} if status is RunStatus.RUNNING else benchmark_params(benchmark, self.results),
            rows=benchmark_metrics(benchmark, rows, ended_ms),
            tags={**benchmark_tags(benchmark, error), **best_tag(rows)},
            note=note,
            datasets=list(_datasets(self.results)),
            folder=folder,
            files=files,
            digest=digest,
        )


def _find_or_create(writer: RunWriter, client: Any, benchmark: Benchmark, known: str | None) -> str:
    return writer.find_or_create(
        client,
        uuid=benchmark.benchmark_uuid,
        experiment=benchmark.experiment,
        name=benchmark.name,
        started_at_ms=benchmark.started_at_ms,
        tags={
            **benchmark_tags(benchmark, None),
            NOTE_TAG: describe_benchmark(benchmark, rows_of(benchmark, {})),
        },
        known=known,
    )


def _read_cells(folder: Path, benchmark: Benchmark) -> tuple[dict[str, RunResult], list[UsageError]]:
    """The results that can be read, by cell, and what is wrong with the others."""
    results: dict[str, RunResult] = {}
    problems: list[UsageError] = []
    for cell in benchmark.cells:
        inside = cell_folder(folder, cell.name)
        if (inside / "result.json").exists():
            try:
                results[cell.name] = RunResult.read(inside)
            except UsageError as error:
                problems.append(error)
    return results, problems


def _datasets(results: Mapping[str, RunResult]) -> Iterator[DatasetRecord]:
    """Each set of prompts once."""
    seen = set()
    for result in results.values():
        if result.dataset and result.dataset.digest not in seen:
            seen.add(result.dataset.digest)
            yield result.dataset
