"""What the command hands to its worker, and what the worker tells it on the way.

    command  --Job (one JSON line)-->  worker
    command  <--events (JSON lines)--  worker      planned, phase, progress, warning, error, done, reference
    command  --"go"------------------> worker      the record is open; timing may begin

The worker is a process of its own so that its memory figures are the engine's alone, and so that a
worker the kernel kills is still recorded. When the command dies, the worker sees its standard input end
and stops.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict

from harness.config import EvalConfig, Settings
from harness.provenance import process_identity
from harness.results import Provenance, Scalar


class ReferenceTask(BaseModel):
    """What a worker does in place of a run: score windows of text and generate from prompts, losslessly.

    Args:
        windows: token ids, all of one length; `window_prompt_tokens` of each are read at once. `window_digest` names them.
        prompts: token ids without padding, at most the job's input length of each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    windows: list[list[int]]
    window_prompt_tokens: int
    window_digest: str
    prompts: list[list[int]]
    pad_token_id: int


class Job(BaseModel):
    """Everything a worker needs to run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_uuid: str
    common: EvalConfig
    strategy_config: dict[str, Any]
    sources: dict[str, str]
    provenance: Provenance
    process: dict[str, Scalar]
    dry_run: bool = False
    verbose: bool = False
    reference: ReferenceTask | None = None

    @classmethod
    def of(
        cls, settings: Settings, *, run_uuid: str, provenance: Provenance, dry_run: bool, verbose: bool
    ) -> "Job":
        """The job of effective settings; `process` names this process, which owns the record."""
        return cls(
            run_uuid=run_uuid,
            common=settings.common,
            strategy_config=settings.strategy.model_dump(mode="json"),
            sources=dict(settings.sources),
            provenance=provenance,
            process=process_identity(),
            dry_run=dry_run,
            verbose=verbose,
        )


class EventWriter:
    """Writes events as JSON lines; a reader that has gone is no reason to stop measuring."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def send(self, event: str, **fields: Any) -> None:
        """Write one event."""
        try:
            self.stream.write(json.dumps({"event": event, **fields}) + "\n")
            self.stream.flush()
        except (BrokenPipeError, ValueError):
            pass


def read_events(stream: Iterable[str]) -> Iterable[Mapping[str, Any]]:
    """Yield the events of a worker; lines that are none (a library that prints) are skipped."""
    for line in stream:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event
