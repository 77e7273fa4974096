"""Reads whole results back out of an MLflow store, for comparing: each run's own result.json, as it was delivered.

Writes nothing and creates nothing. Knows MLflow through `store.py` only, and the tags that `summary.py` gives a run.
"""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flexllmgen.errors import UsageError
from harness.benchmark.record import Benchmark, CellStatus
from harness.compare.measured import Measured, hardware_of_profile, lost_cell
from harness.results import RunResult, RunStatus
from harness.run_writer import PARENT_TAG, UUID_TAG
from harness.store import BULK_TIMEOUT_S, Connection, DeliveryError, Store
from harness.store_runs import pages

log = logging.getLogger(__name__)

_COMMIT_TAG = "mlflow.source.git.commit"
_PAGE = 200

Value = TypeVar("Value")


class StoreReader:
    """The results in one store. What cannot be read costs a warning."""

    def __init__(self, store: Store, warn: Callable[[str], None]) -> None:
        self.store = store
        self._warn = warn
        self._connection = Connection(store)
        self._benchmarks: dict[str, Benchmark | None] = {}

    def of_commit(self, commit: str) -> list[Measured]:
        """Results of a commit, clean or not; `commit` may be the beginning of one.

        Raises:
            UsageError: the store is unreachable.
        """
        return self._find(f"tags.`{_COMMIT_TAG}` LIKE '{commit}%'")

    def of_run(self, name: str) -> list[Measured]:
        """The result of a run by MLflow's id or ours; of a benchmark's parent those of its cells.

        Raises:
            UsageError: the store is unreachable.
        """
        found = self._call(lambda client: _run_of(client, name))
        if found is None:
            return []
        children = self._find(f"tags.`{PARENT_TAG}` = '{found.info.run_id}'")
        return children or self._call(partial(self._read_all, run=found))

    def newest(self, *, but: Collection[str] = ()) -> Iterator[Measured]:
        """All results but those of the uuids `but`, newest first, each read when it is asked for.

        Raises:
            UsageError: the store is unreachable.
        """
        for run in self._call(lambda client: list(_measuring(client, ""))):
            if run.data.tags[UUID_TAG] not in but:
                yield from self._call(partial(self._read_all, run=run))

    def commits(self) -> dict[str, int]:
        """Commits that have runs, to how many; without reading a result.

        Raises:
            UsageError: the store is unreachable.
        """
        found: dict[str, int] = {}
        for run in self._call(lambda client: list(_measuring(client, ""))):
            if commit := run.data.tags.get(_COMMIT_TAG):
                found[commit] = found.get(commit, 0) + 1
        return found

    def _find(self, query: str) -> list[Measured]:
        def read(client: Any) -> list[Measured]:
            return [one for run in _measuring(client, query) for one in self._read(client, run)][::-1]

        return self._call(read)

    def _call(self, action: Callable[[Any], Value]) -> Value:
        try:
            return self._connection.call(action, timeout_s=BULK_TIMEOUT_S)
        except DeliveryError as error:
            # Nothing was to be delivered: to whoever compares, it is a store that was wrongly named or is away.
            raise UsageError(f"{error}; name another one with --tracking-uri") from error

    def _read_all(self, client: Any, run: Any) -> list[Measured]:
        return [*self._read(client, run)]

    def _read(self, client: Any, run: Any) -> Iterator[Measured]:
        """The run's result, or what its benchmark says of a cell that left none; else nothing."""
        run_id, parent = run.info.run_id, run.data.tags.get(PARENT_TAG, "")
        try:
            result = _result(client, run_id, "result.json")
        except UsageError as error:
            self._warn(f"left out: run {run_id}: {error}")
            return
        benchmark = self._benchmark(client, parent) if parent else None
        baseline = benchmark.baseline if benchmark else ""
        if result is None:
            name = run.data.tags.get("harness.cell")
            for cell in benchmark.cells if benchmark else ():
                if benchmark and cell.name == name and cell.status is CellStatus.FAILED:
                    yield replace(lost_cell(benchmark, cell), run_ids=(run_id, parent))
            return
        launches = []
        for uuid in result.cell.launches if result.cell else ():
            with contextlib.suppress(UsageError):
                launch = _result(client, run_id, f"launches/{uuid}/result.json")
                if launch is not None and launch.status is RunStatus.FINISHED:
                    launches.append(launch)
        with contextlib.suppress(ValueError):
            profile = _artifact(client, run_id, "hardware_profile.json")
            if profile is None and result.cell and result.cell.launches:
                name = f"launches/{result.cell.launches[0]}/hardware_profile.json"
                profile = _artifact(client, run_id, name)
            yield Measured(
                result=result,
                launches=tuple(launches) or (result,),
                hardware=hardware_of_profile(profile) if profile else {},
                group=result.cell.benchmark_uuid if result.cell else result.run_uuid,
                baseline=baseline,
                run_ids=tuple(filter(None, (run_id, parent))),
                source=f"run {run_id}",
                patch=result.provenance.patch_digest or "",
            )

    def _benchmark(self, client: Any, parent: str) -> Benchmark | None:
        """The record of the benchmark that a parent run is of; None where it cannot be read."""
        if parent not in self._benchmarks:
            content = _artifact(client, parent, "benchmark.json")
            self._benchmarks[parent] = None
            with contextlib.suppress(ValueError):
                self._benchmarks[parent] = Benchmark.model_validate_json(content) if content else None
        return self._benchmarks[parent]


def _search(client: Any, query: str) -> Iterator[Any]:
    """Runs of ours that match, newest first."""
    experiments = [one.experiment_id for one in pages(client.search_experiments)]
    if not experiments:
        return
    order = ["attributes.start_time DESC"]
    for run in pages(
        client.search_runs,
        experiment_ids=experiments,
        filter_string=query,
        order_by=order,
        max_results=_PAGE,
    ):
        if UUID_TAG in run.data.tags:
            yield run


def _measuring(client: Any, query: str) -> Iterator[Any]:
    """Of those the ones that hold a result: not the parent of a benchmark's cells."""
    return (run for run in _search(client, query) if run.data.tags.get("harness.kind") != "benchmark")


def _run_of(client: Any, name: str) -> Any:
    for query in (f"tags.`{UUID_TAG}` = '{name}'", f"attributes.run_id = '{name}'"):
        if (found := next(_search(client, query), None)) is not None:
            return found
    return None


def _result(client: Any, run_id: str, path: str) -> RunResult | None:
    """A result among the run's artifacts; None where there is none.

    Raises:
        UsageError: it is damaged or of a newer schema.
    """
    content = _artifact(client, run_id, path)
    if content is None:
        return None
    return RunResult.parse(content, path)


def _artifact(client: Any, run_id: str, path: str) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run_id, path, folder)).read_bytes()
        except Exception as error:  # noqa: BLE001 - the artifact stores share no base class
            log.debug("run %s has no %s: %s", run_id, path, error)
            return None
