"""Reads runs back out of a store: each as one flat row, under the names that `export.py` gives a result folder's.

Writes nothing and creates nothing. Knows the tags that `summary.py` gives a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError
from harness.run_writer import PARENT_TAG, UUID_TAG
from harness.store import BULK_TIMEOUT_S, Connection, Store

_PAGE = 500
_BENCHMARK = "harness.benchmark_uuid"
# Tags that are columns of their own; the rest of MLflow's describe the UI, not the run.
_COLUMNS = {
    UUID_TAG: "run_uuid",
    "harness.strategy": "strategy",
    "harness.model": "model",
    _BENCHMARK: "benchmark_uuid",
    "harness.benchmark": "benchmark",
    "harness.cell": "cell",
    "harness.kind": "kind",
    "harness.hardware_fingerprint": "hardware_fingerprint",
    "harness.workload_key": "workload_key",
    "harness.host": "host",
    "harness.error": "error",
    "harness.exit_code": "exit_code",
    "mlflow.user": "user",
    "mlflow.source.git.commit": "git_commit",
    "mlflow.source.git.branch": "git_branch",
    "mlflow.source.git.dirty": "git_dirty",
    "mlflow.source.git.repoURL": "git_remote",
}


def store_rows(store: Store, experiments: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The runs of a store, oldest first; of the experiments named, or of all.

    Params are texts, as the store keeps them. Left out are runs that were deleted in the UI, and the parent runs of
    benchmarks: they hold no measurement of their own.

    Raises:
        UsageError: there is no such store or experiment.
        DeliveryError: the store is unreachable.
    """
    path = store.sqlite_path
    if path is not None and not path.exists():
        raise UsageError(
            f"there is no store at {path}; name one with --tracking-uri, or result folders with --results-dir"
        )
    return Connection(store).call(lambda client: _rows(client, experiments, path), timeout_s=BULK_TIMEOUT_S)


def _rows(client: Any, experiments: Sequence[str], path: Path | None) -> list[dict[str, Any]]:
    known = {one.name: one.experiment_id for one in pages(client.search_experiments)}
    if missing := [name for name in experiments if name not in known]:
        where = f" in {path}" if path is not None else ""
        raise UsageError(f"no experiment {missing[0]!r}{where}; there are: {', '.join(sorted(known))}")
    names = {known[name]: name for name in experiments or known}
    order = ["attributes.start_time ASC"]
    runs = list(pages(client.search_runs, experiment_ids=[*names], order_by=order, max_results=_PAGE))
    uuids = {run.info.run_id: run.data.tags.get(UUID_TAG) for run in runs}
    uuids |= {run.info.run_id: run.data.tags[_BENCHMARK] for run in runs if _BENCHMARK in run.data.tags}
    return [
        _row(run, names[run.info.experiment_id], uuids)
        for run in runs
        if run.data.tags.get("harness.kind") != "benchmark"
    ]


def _row(run: Any, experiment: str, uuids: Mapping[str, str | None]) -> dict[str, Any]:
    info, data = run.info, run.data
    parent = data.tags.get(PARENT_TAG)
    row: dict[str, Any] = {
        "run_id": info.run_id,
        "parent_run_id": parent,
        "kind": "run",
        "benchmark_uuid": uuids.get(parent) if parent else None,
        "experiment": experiment,
        "run_name": info.run_name,
        "status": info.status,
        "started_at_ms": info.start_time,
        "ended_at_ms": info.end_time,
    }
    for name, value in data.tags.items():
        if name in _COLUMNS:
            row[_COLUMNS[name]] = value
        elif not name.startswith("mlflow."):
            row[f"tags.{name}"] = value
    if "git_dirty" in row:
        row["git_dirty"] = row["git_dirty"] == "true"
    if "exit_code" in row:
        row["exit_code"] = int(row["exit_code"])
    row |= {f"params.{name}": value for name, value in data.params.items()}
    return row | {f"metrics.{name}": value for name, value in data.metrics.items()}


def pages(search: Any, **arguments: Any) -> Iterator[Any]:
    """All that one of the client's searches finds, page after page."""
    token: str | None = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
