"""What a run's record says before anything is measured: which run it is, and every setting as it came to be."""

import json
import time

from harness.job import Job
from harness.prepare import Prepared
from harness.provenance import without_credentials
from harness.results import RunResult, RunStatus, Scalar
from strategies.base import Plan
from strategies.flexgen_config import KEY_OF, share_key


def opening_result(job: Job, prepared: Prepared) -> RunResult:
    """The record of a run that has not begun."""
    config, request = job.common, prepared.plan.request
    record = prepared.prompts.record
    return RunResult(
        run_uuid=job.run_uuid,
        status=RunStatus.RUNNING,
        experiment=config.experiment,
        run_name=config.run_name
        or f"{config.strategy} {_short_name(config.model)} b{prepared.plan.batch_size}",
        strategy=config.strategy,
        model=config.model,
        started_at_ms=int(time.time() * 1000),
        process=job.process,
        params=_params(job, prepared),
        param_sources=job.sources,
        tags=config.tags(),
        dataset=record,
        provenance=job.provenance,
        hardware_fingerprint=prepared.hardware.fingerprint,
        workload_key=(
            f"{_short_name(config.model)}/{record.name}-{record.digest[:8]}/n{config.num_prompts}"
            f"/in{config.input_len}/gen{config.gen_len}/{request.dtype}"
        ),
        plan=prepared.plan.as_dict(),
        warnings=list(prepared.warnings),
    )


def _params(job: Job, prepared: Prepared) -> dict[str, Scalar]:
    """Every effective value. Where an option says auto, the value is what it came to."""
    request = prepared.plan.request
    params: dict[str, Scalar] = {}
    for key, value in {**job.common.model_dump(mode="json"), **job.strategy_config}.items():
        params[key] = (
            value if isinstance(value, (str, int, float, bool)) or value is None else json.dumps(value)
        )
    params["tracking_uri"] = without_credentials(job.common.tracking_uri or "") or None
    params["dtype"] = request.dtype
    params["device"] = request.machine.device
    params["batch_size"] = request.batch_size
    params["model_path"] = None if request.model.path is None else str(request.model.path)
    params["model_revision"] = request.model.revision
    return params


def policy_params(plan: Plan) -> dict[str, Scalar]:
    """The policy that a plan runs, by the keys of strategy flexgen; nothing for a strategy that has none."""
    params: dict[str, Scalar] = {
        f"policy_{KEY_OF.get(name, name)}": value for name, value in plan.details.get("policy", {}).items()
    }
    for kind, shares in plan.details.get("shares", {}).items():
        for tier, percent in shares.items():
            params[f"policy_{share_key(kind, tier)}"] = percent
    # Where it stands among the settings, runs with and without it are two setups.
    return params if plan.lossless else {**params, "lossy": True}


def _short_name(model: str) -> str:
    """The last part of a model's name, as it reads in a run name."""
    return model.rstrip("/").rsplit("/", 1)[-1]
