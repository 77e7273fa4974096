"""What a store is to hold of a run: names, numbers, words and files, worked out from the run's folder.

Knows nothing of MLflow; run_writer.py brings it there.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.folders import digest_of, files_of
from harness.results import DatasetRecord, RunError, RunResult, RunStatus, Timeline
from harness.summary import MetricRow, describe, metric_rows, params_of, system_rows, tags_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """All that the store is to hold of one run.

    Args:
        note: makes the description, given what turns a file's name into its address in the UI.
        files: what is uploaded, each under its path within `folder`.
        digest: of all this; a run that holds it already is left alone.
        whole: whether all is here; else the next delivery looks again.
    """

    uuid: str
    experiment: str
    name: str
    status: RunStatus
    started_at_ms: int
    ended_at_ms: int | None
    params: Mapping[str, str]
    rows: Sequence[MetricRow]
    tags: Mapping[str, str]
    note: Callable[[Callable[[str], str]], str]
    datasets: Sequence[DatasetRecord]
    folder: Path
    files: Sequence[Path]
    digest: str
    whole: bool = True


def view_of_result(folder: Path, result: RunResult) -> RunView:
    """What the store is to hold of the run in `folder`."""
    status, error = _ending(result)
    files = files_of(folder)
    rows = metric_rows(result) + _timeline_rows(folder)
    pictures = [file.name for file in files if file.suffix == ".png" and file.parent == folder]
    return RunView(
        uuid=result.run_uuid,
        experiment=result.experiment,
        name=result.run_name,
        status=status,
        started_at_ms=result.started_at_ms,
        ended_at_ms=result.ended_at_ms or max([result.started_at_ms, *(row.timestamp_ms for row in rows)]),
        params=params_of(result),
        rows=rows,
        tags=tags_of(result, error),
        note=lambda link: describe(result, error, {name: link(name) for name in pictures}),
        datasets=[result.dataset] if result.dataset else [],
        folder=folder,
        files=files,
        digest=digest_of(folder, files),
    )


def _ending(result: RunResult) -> tuple[RunStatus, RunError | None]:
    """How the run ended. One that never said so ended with its process."""
    if result.status is not RunStatus.RUNNING:
        return result.status, result.error
    pid, host = result.process.get("pid"), result.process.get("host")
    return RunStatus.FAILED, result.error or RunError(
        type="ProcessDied", message=f"process died without a word (pid {pid} on {host})"
    )


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
