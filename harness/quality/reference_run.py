"""The process that makes a lossless reference (reference.py): plans losslessly, loads, generates and scores once.

Started as a worker whose job has a `reference`. Leaves no folder: what it finds goes to whoever started it.
"""

import logging
from dataclasses import replace

from flexllmgen.errors import OffloadError
from flexllmgen.workload import Workload
from harness.job import EventWriter, Job, ReferenceTask
from harness.measure import Batch, Pass, run_pass
from harness.models import resolve_model
from harness.prepare import choose_machine, local_profile, make_request, quiet_transformers
from harness.prompts import left_padded
from harness.quality.figures import loss_of
from harness.quality.sample import Sample
from profiling.hardware import read_hardware
from strategies.base import Plan, Scores, Strategy
from strategies.registry import find_strategy

log = logging.getLogger(__name__)

LIMIT_S = 20 * 60.0
"""A reference that is predicted to take longer is not made."""


def run_reference(job: Job, events: EventWriter) -> int:
    """Make the reference and send it; the exit code says whether there is one."""
    assert job.reference is not None
    try:
        strategy, plan = _plan(job, events)
        seconds = _predicted_s(plan)
        if seconds > LIMIT_S:
            raise OffloadError(f"the lossless model would take about {seconds / 60:.0f} minutes for it")
        log.info("lossless reference: %s", plan.as_dict())
        with strategy.build(plan) as engine:
            assert isinstance(engine, Scores)
            loss = loss_of(engine, _sample(job.reference), by_steps=False)
            made = Pass()
            run_pass(
                engine, _batches(job, job.reference, engine.plan.batch_size), job.common.gen_len, into=made
            )
    except OffloadError as error:
        events.send("error", message=str(error), exit_code=error.exit_code, type=type(error).__name__)
        return error.exit_code
    except MemoryError:
        events.send(
            "error", message="host memory ran out for the lossless model", exit_code=5, type="MemoryError"
        )
        return 5
    events.send("reference", loss=loss, output_ids=made.output_ids)
    return 0


def _plan(job: Job, events: EventWriter) -> tuple[Strategy, Plan]:
    config = job.common
    source = resolve_model(
        config.model,
        weights=config.weights,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    quiet_transformers()
    machine, _ = choose_machine(config)
    request = make_request(config, source, machine)
    request = replace(
        request,
        workload=Workload(
            num_sequences=config.num_prompts, prompt_tokens=config.input_len, gen_tokens=config.gen_len
        ),
    )
    profile, _ = local_profile(
        request, read_hardware(config.offload_dir), lambda phase: events.send("phase", name=phase)
    )
    entry = find_strategy(config.strategy)
    config_type, _ = entry.load_config()
    strategy = entry.create(config_type.model_validate(job.strategy_config))
    return strategy, strategy.plan(replace(request, profile=profile))


def _predicted_s(plan: Plan) -> float:
    """What generating takes by the plan, and scoring about as long again."""
    return 0.0 if plan.predicted is None else 2 * plan.predicted.seconds


def _sample(task: ReferenceTask) -> Sample:
    return Sample(
        text="",
        split=None,
        revision=None,
        windows=tuple(map(tuple, task.windows)),
        prompt_tokens=task.window_prompt_tokens,
        digest=task.window_digest,
    )


def _batches(job: Job, task: ReferenceTask, size: int) -> list[Batch]:
    made = []
    for start in range(0, len(task.prompts), size):
        rows = task.prompts[start : start + size]
        ids_BT, mask_BT = left_padded(rows, job.common.input_len, task.pad_token_id)
        made.append(Batch(ids_BT=ids_BT, mask_BT=mask_BT))
    return made
