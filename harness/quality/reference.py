"""What the model does losslessly on a run's sample and prompts: kept from an earlier run, or made in a process of its own.

A process of its own, because a lossless model may need more memory than the lossy one that was measured: one that the
kernel kills costs the run a warning, not its figures. What it finds is kept in the cache under the model, the number format,
the device, the sample and the prompts, so that the cells of a benchmark pay once.
"""

import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from flexllmgen.errors import OffloadError
from harness.config import cache_dir
from harness.job import Job, ReferenceTask
from harness.launch import last_line
from harness.quality.sample import Sample
from harness.results import Record, write_text
from harness.supervise import Worker
from strategies.base import PlanRequest

log = logging.getLogger(__name__)

REFERENCE_STRATEGY = "autoflex"
"""Finds a lossless policy wherever there is one; which one it is does not change what is generated."""
_VERSION = 1
_PATIENCE_S = 60 * 60.0
"""A reference that is not there by then is given up: what its plan says (reference_run.py) may be wrong, and it may hang."""


class Reference(Record):
    """What the lossless model does.

    Args:
        loss: mean negative log-likelihood of the sample's scored tokens, in nats.
        output_ids: greedy tokens of the first prompts.
    """

    loss: float
    output_ids: list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A reference, and whether it was there already."""

    reference: Reference
    origin: Literal["kept", "measured"]


def find_reference(
    job: Job, request: PlanRequest, sample: Sample, prompts: Sequence[Sequence[int]], pad_token_id: int
) -> Found:
    """The lossless model's loss on the sample and tokens from the prompts, taken from the cache or made now.

    Args:
        job: the lossy run's.
        request: what its plan was made for.
        prompts: token ids without padding.

    Raises:
        OffloadError: it cannot be made: it does not fit, would take too long, or its process died.
        KeyboardInterrupt: the run was interrupted meanwhile.
    """
    task = ReferenceTask(
        windows=[list(window) for window in sample.windows],
        window_prompt_tokens=sample.prompt_tokens,
        window_digest=sample.digest,
        prompts=[list(prompt) for prompt in prompts],
        pad_token_id=pad_token_id,
    )
    file = cache_dir() / "references" / f"{_key(job, request, task)}.json"
    if (kept := _read(file, len(task.prompts))) is not None:
        return Found(reference=kept, origin="kept")
    reference = _measure(reference_job(job, task))
    try:
        write_text(file, reference.model_dump_json() + "\n")
    except OSError as error:
        log.warning("the lossless reference cannot be kept in %s: %s", file.parent, error)
    return Found(reference=reference, origin="measured")


def reference_job(job: Job, task: ReferenceTask) -> Job:
    """The job of the process that makes the reference: lossless, and without the caps, which only emulate a machine."""
    from strategies.registry import find_strategy

    _, keys = find_strategy(REFERENCE_STRATEGY).load_config()
    common = job.common.model_copy(
        update={
            "strategy": REFERENCE_STRATEGY,
            "allow_lossy": False,
            "gpu_mem": None,
            "cpu_mem": None,
            "num_prompts": max(len(task.prompts), len(task.windows)),
        }
    )
    return job.model_copy(
        # Nothing is timed, so that a policy which is not quite the fastest does.
        update={"common": common, "strategy_config": {**keys, "calibrate": False}, "reference": task}
    )


def _key(job: Job, request: PlanRequest, task: ReferenceTask) -> str:
    from strategies.flexgen_engine import make_checkpoint

    what = [
        _VERSION,
        make_checkpoint(request).fingerprint,
        request.dtype,
        request.machine.device,
        task.window_digest,
        task.prompts,
        job.common.input_len,
        job.common.gen_len,
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _read(file: Path, rows: int) -> Reference | None:
    try:
        kept = Reference.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("%s cannot be read and is made anew: %s", file, error)
        return None
    os.utime(file)
    return kept if len(kept.output_ids) == rows else None


def _measure(job: Job) -> Reference:
    worker = Worker(job)
    said: dict[str, dict[str, object]] = {}
    given_up = threading.Event()

    def give_up() -> None:
        given_up.set()
        worker.process.kill()

    timer = threading.Timer(_PATIENCE_S, give_up)
    timer.daemon = True
    with worker.interruptible():
        timer.start()
        try:
            code = worker.follow(lambda event: said.update({str(event["event"]): dict(event)}))
        finally:
            timer.cancel()
    if worker.interrupted:
        raise KeyboardInterrupt
    if (found := said.get("reference")) is not None and code == 0:
        return Reference.model_validate({"loss": found["loss"], "output_ids": found["output_ids"]})
    if (error := said.get("error")) is not None:
        raise OffloadError(str(error["message"]))
    if given_up.is_set():
        raise OffloadError(f"it was not there after {_PATIENCE_S / 60:.0f} minutes and is given up")
    if code == -signal.SIGKILL:
        raise OffloadError("its process was killed by signal 9; most likely the machine ran out of memory")
    raise OffloadError(f"its process ended with code {code}: {last_line(worker)}")
