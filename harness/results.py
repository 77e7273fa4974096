"""What a run leaves behind: the result, schema-versioned, and the folder that holds it.

    results/<run uuid>/
        result.json            this module's RunResult: everything but the bulk below
        requests.jsonl         a line per prompt: ids, text, generated ids, generated text
        plan.json              what the strategy planned, and what was really placed
        hardware_profile.json  the machine
        timeline.json          memory, load and power over time (Timeline)
        environment.txt        installed packages
        git.diff               uncommitted changes, where there are any
        run.log                this run's log
        error.txt              the traceback, where the run failed
        *.png                  pictures

The folder is complete by itself: MLflow is a projection of it, so a run measured on another machine
can be delivered later. Knows nothing of MLflow.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexllmgen.errors import UsageError

SCHEMA_VERSION: Literal[2] = 2

# The type of the RunError of a run that could not write its own folder.
UNWRITABLE = "ResultsUnwritable"

Scalar = str | int | float | bool | None


class RunStatus(StrEnum):
    """MLflow's own words for how a run stands."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


class Record(BaseModel):
    """What is written down as JSON: frozen, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


class DatasetRecord(Record):
    """Which prompts were used, precisely enough to find them again.

    Token counts are of the prompt rows of one repeat; `real_tokens` excludes padding.
    """

    name: str
    source: str
    source_type: Literal["hub", "package", "file"]
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    licence: str | None = None
    fingerprint: str | None = None
    digest: str
    num_rows: int
    num_prompts: int
    prompts_unique: int
    prompts_truncated: int
    real_tokens: int
    padded_tokens: int
    prompt_mode: str
    prompt_template: str | None = None
    chat_template: bool = False
    prompt_ids: list[str] = Field(default_factory=list)


class Provenance(Record):
    """Which code ran: the commit of the working directory and the versions of what matters.

    `patch_digest` is that of the uncommitted changes (`git.diff`), None for a clean tree; `versions_digest` that of Python
    and all installed packages (`environment.txt`).
    """

    git_commit: str | None = None
    git_branch: str | None = None
    git_dirty: bool | None = None
    git_remote: str | None = None
    patch_digest: str | None = None
    command: str = ""
    host: str = ""
    user: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    versions_digest: str | None = None


class RunError(Record):
    """Why a run failed: one line for people, the traceback for us."""

    type: str
    message: str
    traceback: str = ""
    exit_code: int = 1


class Repeat(Record):
    """The metrics of one timed pass over all prompts; `launch` counts the processes that a cell was measured in."""

    index: int
    launch: int = 0
    ended_at_ms: int
    metrics: dict[str, float]


class Timeline(Record):
    """Samples over the life of the run; `series` maps a metric name with its unit to values.

    `time_s` counts from the start of the run; `started_at_ms` is that start in Unix time. A series
    has one value per time, or None where the machine could not tell. `phases` names spans:
    (name, start_s, end_s).
    """

    started_at_ms: int
    time_s: list[float]
    series: dict[str, list[float | None]]
    phases: list[tuple[str, float, float]] = Field(default_factory=list)


class QualityRecord(Record):
    """What the quality figures of a lossy run rest on; the figures themselves are metrics.

    Args:
        text: the dataset that perplexity was measured on; `digest` is of its windows' token ids.
        scored_tokens: tokens that perplexity is the mean over, of all windows.
        compared_sequences: prompts of the run whose tokens were held against the lossless ones.
        reference: whether the lossless figures were measured for this run or kept from an earlier one; None without them.
        notes: why figures are missing.
    """

    text: str | None = None
    split: str | None = None
    revision: str | None = None
    digest: str | None = None
    windows: int = 0
    window_tokens: int = 0
    scored_tokens: int = 0
    compared_sequences: int = 0
    compared_tokens: int = 0
    reference: Literal["kept", "measured"] | None = None
    notes: list[str] = Field(default_factory=list)


class CellLink(Record):
    """Where a run stands in a benchmark: which one, which cell, and the processes it was measured in."""

    benchmark_uuid: str
    cell: str
    launches: list[str] = Field(default_factory=list, description="uuid of each launch's own result")


class RunResult(Record):
    """Everything about one run but its bulk; a number carries its cause.

    `metrics` holds the run's values: the median over `repeats` where a metric was repeated.
    `spread` is (max - min) / median over the repeats. `cold` is the first, unwarmed pass.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    run_uuid: str
    status: RunStatus
    experiment: str
    run_name: str
    strategy: str
    model: str
    started_at_ms: int
    ended_at_ms: int | None = None
    process: dict[str, Scalar] = Field(default_factory=dict)
    params: dict[str, Scalar] = Field(default_factory=dict)
    param_sources: dict[str, str] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    spread: dict[str, float] = Field(default_factory=dict)
    repeats: list[Repeat] = Field(default_factory=list)
    cold: dict[str, float] = Field(default_factory=dict)
    itl_s: list[list[float]] = Field(
        default_factory=list, description="per repeat, mean gap by token position"
    )
    tags: dict[str, str] = Field(default_factory=dict)
    dataset: DatasetRecord | None = None
    quality: QualityRecord | None = Field(default=None, description="of a lossy run")
    provenance: Provenance = Field(default_factory=Provenance)
    hardware_fingerprint: str = ""
    workload_key: str = ""
    cell: CellLink | None = None
    plan: dict[str, Any] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    error: RunError | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder/result.json`.

        Raises:
            UsageError: the file is missing, damaged, or of another schema version.
        """
        path = folder / "result.json"
        content = read_bytes(path, "name a folder results/<uuid> that `harness eval` wrote")
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """Read the content of a result file; `source` is what a message calls it.

        Raises:
            UsageError: it is damaged, or of another schema version.
        """
        return parse_record(cls, content, f"{source} is not a result", newest=SCHEMA_VERSION)

    def write(self, folder: Path) -> Path:
        """Write `folder/result.json` atomically and return its path."""
        return write_text(folder / "result.json", self.model_dump_json(indent=2) + "\n")


def read_bytes(path: Path, way_out: str) -> bytes:
    """The content of a record's file; `way_out` is what to do where there is none.

    Raises:
        UsageError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path.parent} holds no {path.name}; {way_out}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def parse_record(kind: type[AnyRecord], content: bytes, refusal: str, *, newest: int) -> AnyRecord:
    """A record from the content of its file; `refusal` begins the message, `newest` is the schema version known here.

    Raises:
        UsageError: it is damaged, or of another schema version.
    """
    try:
        return kind.model_validate_json(content)
    except ValueError as error:
        reason = why_unreadable(content, error, newest=newest)
        raise UsageError(f"{refusal} of schema version {newest}: {reason}") from error


def why_unreadable(content: bytes, error: ValueError, *, newest: int) -> str:
    """In words what is wrong with the content of a record that `error` refuses; `newest` is the schema version known here."""
    try:
        record = json.loads(content)
    except ValueError:
        return "it is no whole JSON; put back a copy, or move the folder away"
    version = record.get("schema_version") if isinstance(record, dict) else None
    if isinstance(version, int) and version > newest:
        return f"it is of version {version}, written by a newer harness; read it with that one"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the record'}: {first['msg']}"
    return str(error).splitlines()[0]


def unwritable(folder: Path, error: OSError) -> str:
    """What to tell of a result folder that cannot be written, with the way out."""
    return f"{folder} cannot be written ({error.strerror or error}); make room, or name another --results-dir"


def write_text(path: Path, text: str) -> Path:
    """Write a file so that readers see the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # Half of a surrogate pair, which a dataset may hold, has no UTF-8: it stays an escape, as JSON writes it.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Write a JSON object atomically."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line, atomically."""
    return write_text(
        path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    )
