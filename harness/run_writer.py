"""Writes runs into an MLflow store: finds or makes one, fills it, closes it; what has arrived is not sent twice.

Knows nothing of how a run looks on disk or in a benchmark: it is given a `RunView` of what the store is to hold.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

from harness.results import DatasetRecord, RunStatus
from harness.run_view import RunView
from harness.runs_view import table_view
from harness.store import BULK_TIMEOUT_S, Connection, DeliveryError, Store

log = logging.getLogger(__name__)

METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
DIGEST_LIMIT = 36  # of a dataset, in MLflow

UUID_TAG, DELIVERED_TAG, CONTENT_TAG = "harness.run_uuid", "harness.delivered", "harness.content_digest"
ERROR_TAG, EXIT_TAG, NOTE_TAG = "harness.error", "harness.exit_code", "mlflow.note.content"
PARENT_TAG = "mlflow.parentRunId"
# Which layout the UI gives an experiment, and a view of its runs that a link can open.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
VIEW_NAME = "harness"
LAYOUT = "workflowType=machine_learning"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_NAME}"

Value = TypeVar("Value")


class RunWriter:
    """Writes runs into one store, whatever they are of."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.connection = Connection(store)

    def bring(self, view: RunView, run_id: str) -> None:
        """Make the run `run_id` hold what `view` says, unless it does.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        call = self.connection.call
        run = call(lambda client: client.get_run(run_id))
        if holds(run, view.digest):
            return
        call(lambda client: _begin(client, run, view))
        call(lambda client: _fill(client, run, view), timeout_s=BULK_TIMEOUT_S)
        call(lambda client: _finish(client, run, view))

    def find_or_create(
        self,
        client: Any,
        *,
        uuid: str,
        experiment: str,
        name: str,
        started_at_ms: int,
        tags: Mapping[str, str],
        known: str | None = None,
    ) -> str:
        """The id of the run `known`, or of the one tagged with `uuid`, or of a new RUNNING one with `tags`."""
        run = _get_run(client, known) if known else None
        if run is not None:
            held = run.data.tags
            # A run that was delivered and then deleted by hand stays deleted.
            usable = run.info.lifecycle_stage == "active" or held.get(DELIVERED_TAG) == "true"
            if usable and held.get(UUID_TAG) == uuid:
                return str(known)
        experiment_id = self._experiment(client, experiment)
        query = f"tags.`{UUID_TAG}` = {quoted(uuid)}"
        if found := client.search_runs([experiment_id], query, max_results=1):
            return str(found[0].info.run_id)
        run = client.create_run(experiment_id, start_time=started_at_ms, tags=dict(tags), run_name=name)
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
        if KIND_TAG not in found.tags:
            client.set_experiment_tag(found.experiment_id, KIND_TAG, KIND)
        # An experiment of an earlier version gets the columns that came since.
        if found.tags.get(VIEW_TAG) != (view := table_view()):
            client.set_experiment_tag(found.experiment_id, VIEW_TAG, view)
        return str(found.experiment_id)


def holds(run: Any, digest: str) -> bool:
    """Whether a run of the store has all of the content with this digest."""
    tags = run.data.tags
    return bool(tags.get(DELIVERED_TAG) == "true" and tags.get(CONTENT_TAG) == digest)


def log_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags in batches."""
    from mlflow.entities import RunTag

    for batch in _batches([RunTag(name, value) for name, value in tags.items()], PARAMS_PER_BATCH):
        client.log_batch(run_id, tags=batch)


def quoted(text: str) -> str:
    """A text as a literal of MLflow's filters, which know no escapes: one with both quotes has none."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _begin(client: Any, run: Any, view: RunView) -> None:
    """Params and prompts: little, so a store that takes no writes shows it here, and soon."""
    from mlflow.entities import Param

    logged = run.data.params
    for name, value in view.params.items():
        if logged.get(name, value) != value:
            log.warning("param %s stays %r in the store; MLflow lets none change", name, logged[name])
    new = [Param(name, value) for name, value in view.params.items() if name not in logged]
    for batch in _batches(new, PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=batch)
    if view.datasets:
        client.log_inputs(run.info.run_id, [_dataset_input(dataset) for dataset in view.datasets])


def _fill(client: Any, run: Any, view: RunView) -> None:
    """Metrics and files: all that is large."""
    from mlflow.entities import Metric

    # The store drops a row that it has already: same name, time, step and value.
    metrics = [Metric(row.key, row.value, row.timestamp_ms, row.step) for row in view.rows]
    for batch in _batches(metrics, METRICS_PER_BATCH):
        client.log_batch(run.info.run_id, metrics=batch)
    for file in view.files:
        parent = file.relative_to(view.folder).parent.as_posix()
        client.log_artifact(run.info.run_id, str(file), None if parent == "." else parent)


def _finish(client: Any, run: Any, view: RunView) -> None:
    """Tags, description and status."""
    run_id = run.info.run_id
    page = f"#/experiments/{run.info.experiment_id}/runs/{run_id}/artifacts"
    note = view.note(lambda name: f"{page}/{quote(name)}?{LAYOUT}")
    log_tags(client, run_id, {**view.tags, NOTE_TAG: note})
    for stale in (ERROR_TAG, EXIT_TAG):
        # A run that was reaped and then delivered whole did not fail after all.
        if stale in run.data.tags and stale not in view.tags:
            client.delete_tag(run_id, stale)
    if view.status is RunStatus.RUNNING:
        return
    client.set_terminated(run_id, status=view.status.value, end_time=view.ended_at_ms)
    if view.whole:
        # Last, so that it is true: without this tag the next delivery does everything again.
        log_tags(client, run_id, {CONTENT_TAG: view.digest, DELIVERED_TAG: "true"})


def _dataset_input(data: DatasetRecord) -> Any:
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
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "eval")])


def _get_run(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _batches(items: Sequence[Value], size: int) -> Iterator[Sequence[Value]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
