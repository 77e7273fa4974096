"""Delivers result folders to an MLflow store.

The folder is the record and the store a projection of it, so delivery may fail, be repeated, or come
from another machine: a run is found again by the tag `harness.run_uuid`, and what has arrived is not
sent twice. Nothing here runs while a measurement does. Only this file, `store.py` and `ui.py` know MLflow.
"""

import contextlib
import hashlib
import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from flexllmgen.errors import UsageError
from harness.provenance import process_is_alive
from harness.results import RunError, RunResult, RunStatus, Timeline, write_json
from harness.store import BULK_TIMEOUT_S, Connection, DeliveryError, Store, alone
from harness.summary import (
    MetricRow,
    describe,
    metric_rows,
    params_of,
    system_rows,
    table_view,
    tags_of,
)

log = logging.getLogger(__name__)

MARKER = ".delivered.json"
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
DIGEST_LIMIT = 36  # of a dataset, in MLflow

UUID_TAG, DELIVERED_TAG, CONTENT_TAG = "harness.run_uuid", "harness.delivered", "harness.content_digest"
ERROR_TAG, EXIT_TAG, NOTE_TAG = "harness.error", "harness.exit_code", "mlflow.note.content"
# Which layout the UI gives an experiment, and a view of its runs that a link can open.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
VIEW_NAME = "harness"
LAYOUT = "workflowType=machine_learning"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_NAME}"

Value = TypeVar("Value")


def find_result_folders(path: Path) -> list[Path]:
    """The result folders at `path`: itself, or those directly in it, oldest first.

    Raises:
        UsageError: there are none.
    """
    if (path / "result.json").is_file():
        return [path]
    folders = [file.parent for file in path.glob("*/result.json")] if path.is_dir() else []
    if not folders:
        raise UsageError(f"{path} holds no result; name results/ or a folder results/<uuid> in it")
    return sorted(folders, key=lambda folder: (folder / "result.json").stat().st_mtime)


class Tracker:
    """Writes runs into one store. Safe to use from several processes at once on the same store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._connection = Connection(store)

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
            files = _files(folder)
            digest = _digest(folder, files)
            known = run_id or _marked_run(folder, self.store)
            call = self._connection.call
            run = call(lambda client: client.get_run(self._find_or_create(client, result, known)))
            tags = run.data.tags
            if tags.get(DELIVERED_TAG) != "true" or tags.get(CONTENT_TAG) != digest:
                rows = metric_rows(result) + _timeline_rows(folder)
                call(lambda client: _begin(client, run, result))
                call(lambda client: _fill(client, run, folder, files, rows), timeout_s=BULK_TIMEOUT_S)
                call(lambda client: _finish(client, run, folder, files, result, rows, digest))
            _mark(folder, self.store, run.info.run_id)
            return str(run.info.run_id)

    def reap(self) -> int:
        """Mark FAILED the runs that a dead process of this host left RUNNING; return how many.

        They have no end time: nobody knows it.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        return self._connection.call(self._reap)

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

    def _reap(self, client: Any) -> int:
        host = socket.gethostname()
        experiments = [one.experiment_id for one in _pages(client.search_experiments)]
        if not experiments:
            return 0
        query = f"attributes.status = 'RUNNING' and tags.`harness.host` = '{host}'"
        reaped = 0
        # Listed first: runs that stop matching while they are paged through would shift the pages.
        for run in list(_pages(client.search_runs, experiment_ids=experiments, filter_string=query)):
            tags = run.data.tags
            process = {
                "host": host,
                "pid": tags.get("harness.pid"),
                "pid_started": tags.get("harness.pid_started"),
            }
            if UUID_TAG not in tags or process_is_alive(process) is not False:
                continue
            client.set_tag(
                run.info.run_id, ERROR_TAG, f"process died: pid {process['pid']} on {host} is gone"
            )
            client.update_run(run.info.run_id, status="FAILED")
            log.info("run %s was left by a dead process; it is FAILED now", run.info.run_name)
            reaped += 1
        return reaped

    def _find_or_create(self, client: Any, result: RunResult, run_id: str | None) -> str:
        run = _get_run(client, run_id) if run_id else None
        if run is not None:
            tags = run.data.tags
            # A run that was delivered and then deleted by hand stays deleted.
            usable = run.info.lifecycle_stage == "active" or tags.get(DELIVERED_TAG) == "true"
            if usable and tags.get(UUID_TAG) == result.run_uuid:
                return str(run_id)
        experiment_id = self._experiment(client, result.experiment)
        query = f"tags.`{UUID_TAG}` = '{result.run_uuid}'"
        if found := client.search_runs([experiment_id], query, max_results=1):
            return str(found[0].info.run_id)
        # The error is unknown yet: `deliver` sets it, or finds that there is none.
        tags = {**tags_of(result, None), NOTE_TAG: describe(result, None) if result.metrics else "Running."}
        run = client.create_run(
            experiment_id, start_time=result.started_at_ms, tags=tags, run_name=result.run_name
        )
        return str(run.info.run_id)

    def _experiment(self, client: Any, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                location = self.store.artifact_location
                tags = {KIND_TAG: KIND, VIEW_TAG: table_view()}
                return str(client.create_experiment(name, artifact_location=location, tags=tags))
            except MlflowException:
                # Another process may have been quicker.
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            uri = f"MLFLOW_TRACKING_URI={self.store.shown_uri}"
            restore = f"{uri} mlflow experiments restore --experiment-id {found.experiment_id}"
            raise DeliveryError(
                f"experiment {name!r} was deleted; restore it with `{restore}` "
                "or name another one with --experiment"
            )
        for tag, value in ((KIND_TAG, KIND), (VIEW_TAG, table_view())):
            if tag not in found.tags:
                client.set_experiment_tag(found.experiment_id, tag, value)
        return str(found.experiment_id)


def _latest_run(client: Any) -> Any:
    """The run that started last in the experiments of ours, or None."""
    ours = [one.experiment_id for one in _pages(client.search_experiments) if VIEW_TAG in one.tags]
    # An experiment's own time of change does not move with its runs.
    newest = {"order_by": ["attributes.start_time DESC"], "max_results": 1}
    return next(iter(client.search_runs(ours, **newest)), None) if ours else None


def _begin(client: Any, run: Any, result: RunResult) -> None:
    """Params and prompts: little, so a store that takes no writes shows it here, and soon."""
    from mlflow.entities import Param

    params, logged = params_of(result), run.data.params
    for name, value in params.items():
        if logged.get(name, value) != value:
            log.warning("param %s stays %r in the store; MLflow lets none change", name, logged[name])
    new = [Param(name, value) for name, value in params.items() if name not in logged]
    for batch in _batches(new, PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=batch)
    _log_dataset(client, run.info.run_id, result)


def _fill(client: Any, run: Any, folder: Path, files: Sequence[Path], rows: Sequence[MetricRow]) -> None:
    """Metrics and files: all that is large."""
    from mlflow.entities import Metric

    # The store drops a row that it has already: same name, time, step and value.
    metrics = [Metric(row.key, row.value, row.timestamp_ms, row.step) for row in rows]
    for batch in _batches(metrics, METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=batch)
    for file in files:
        parent = file.relative_to(folder).parent.as_posix()
        client.log_artifact(run.info.run_id, str(file), None if parent == "." else parent)


def _finish(
    client: Any,
    run: Any,
    folder: Path,
    files: Sequence[Path],
    result: RunResult,
    rows: Sequence[MetricRow],
    digest: str,
) -> None:
    """Tags, description and status."""
    run_id = run.info.run_id
    status, error = _ending(result)
    names = [file.name for file in files if file.suffix == ".png" and file.parent == folder]
    page = f"#/experiments/{run.info.experiment_id}/runs/{run_id}/artifacts"
    pictures = {name: f"{page}/{quote(name)}?{LAYOUT}" for name in names}
    _log_tags(client, run_id, {**tags_of(result, error), NOTE_TAG: describe(result, error, pictures)})
    for stale in (ERROR_TAG, EXIT_TAG) if error is None else ():
        # A run that was reaped and then delivered whole did not fail after all.
        if stale in run.data.tags:
            client.delete_tag(run_id, stale)
    client.set_terminated(run_id, status=status.value, end_time=_ended_ms(result, rows))
    # Last, so that it is true: without this tag the next delivery does everything again.
    _log_tags(client, run_id, {CONTENT_TAG: digest, DELIVERED_TAG: "true"})


def _log_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for batch in _batches([RunTag(name, value) for name, value in tags.items()], PARAMS_PER_BATCH):
        client.log_batch(run_id, tags=batch)


def _ending(result: RunResult) -> tuple[RunStatus, RunError | None]:
    """How the run ended. One that never said so ended with its process."""
    if result.status is not RunStatus.RUNNING:
        return result.status, result.error
    pid, host = result.process.get("pid"), result.process.get("host")
    return RunStatus.FAILED, result.error or RunError(
        type="ProcessDied", message=f"process died without a word (pid {pid} on {host})"
    )


def _ended_ms(result: RunResult, rows: Sequence[MetricRow]) -> int:
    return result.ended_at_ms or max([result.started_at_ms, *(row.timestamp_ms for row in rows)])


def _timeline_rows(folder: Path) -> list[MetricRow]:
    path = folder / "timeline.json"
    if not path.exists():
        return []
    try:
        return system_rows(Timeline.model_validate_json(path.read_bytes()))
    except ValueError as error:
        log.warning(
            "%s is damaged, the run goes without system metrics: %s", path, str(error).splitlines()[0]
        )
        return []


def _log_dataset(client: Any, run_id: str, result: RunResult) -> None:
    data = result.dataset
    if data is None:
        return
    from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if data.source_type == "file":
        # By name, since the file may lie on another machine: nothing is opened.
        source, kind = json.dumps({"uri": data.source}), "local"
    else:
        origin = HuggingFaceDatasetSource(
            path=data.source, config_name=data.config, split=data.split, revision=data.revision
        )
        source, kind = origin.to_json(), origin._get_source_type()
    profile = {
        "num_prompts": data.num_prompts,
        "num_rows": data.num_rows,
        "prompts_unique": data.prompts_unique,
        "prompts_truncated": data.prompts_truncated,
        "real_tokens": data.real_tokens,
        "padded_tokens": data.padded_tokens,
        "prompt_mode": data.prompt_mode,
        "licence": data.licence,
        "fingerprint": data.fingerprint,
    }
    dataset = Dataset(
        name=data.name,
        digest=data.digest[:DIGEST_LIMIT],
        source_type=kind,
        source=source,
        profile=json.dumps(profile),
    )
    tags = [InputTag("mlflow.data.context", "eval")]
    client.log_inputs(run_id, [DatasetInput(dataset, tags)])


def _files(folder: Path) -> list[Path]:
    """Files of the record: all but hidden ones, which are markers and halves of files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _digest(folder: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder)}\0{inner}\0".encode())
    return digest.hexdigest()[:32]


def _marked_run(folder: Path, store: Store) -> str | None:
    """The run that this folder became in this store, as its marker says; only a hint, the store decides."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return str(marker["run_id"]) if marker["tracking_uri"] == store.shown_uri else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mark(folder: Path, store: Store, run_id: str) -> None:
    # A folder that cannot be written to, on a mounted medium say, is delivered all the same.
    with contextlib.suppress(OSError):
        write_json(folder / MARKER, {"tracking_uri": store.shown_uri, "run_id": run_id})


def _get_run(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _batches(items: Sequence[Value], size: int) -> Iterator[Sequence[Value]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
