"""Runs a policy on our own engine: what strategies `flexgen` and `autoflex` share.

From a policy and its placement to a Plan, and from the Plan to a loaded engine. Where a policy comes from is the
strategies' own business.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from flexllmgen.checkpoint import Checkpoint, RandomCheckpoint, SafetensorsCheckpoint
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import OutOfMemory, UsageError
from flexllmgen.loading import weight_pack
from flexllmgen.placement import PlacementPlan
from flexllmgen.policy import Placement, Policy
from flexllmgen.sampling import Greedy
from flexllmgen.spec import ModelSpec
from profiling.cost_model import engine_cost
from profiling.hardware import check_writable, free_disk_bytes
from profiling.layer_times import LayerShape, nearest_table
from profiling.limit import physical_limit, traffic_of
from profiling.profile import HardwareProfile
from strategies.base import Placed, Plan, PlanRequest, out_of_memory_reason

_ALWAYS_TOLD = ("micro_batch_size", "num_micro_batches", "overlap", "sep_layer", "pin_weight")


class FlexgenEngine:
    """flexllmgen's engine behind the Engine protocol."""

    def __init__(self, engine: FlexEngine, plan: Plan) -> None:
        self.engine, self.plan = engine, plan

    def generate(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, gen_tokens: int
    ) -> Iterator[torch.Tensor]:
        """Yield `gen_tokens` columns of int64 ids of shape (B,), greedily chosen; EOS ends nothing."""
        # A mask that hides nothing would only cost.
        mask = None if bool(mask_BT.all()) else mask_BT
        yield from self.engine.generate(ids_BT, mask, sampling=Greedy(), max_new_tokens=gen_tokens)

    def score(self, ids_BT: torch.Tensor, *, prompt_tokens: int) -> torch.Tensor:
        """Log-probabilities of each token after the first, those after the prompt predicted by steps."""
        return self.engine.score(ids_BT, prompt_tokens=prompt_tokens)

    def moved_bytes(self) -> dict[str, int]:
        """Bytes over each link since loading began."""
        return {f"moved_{link}_bytes": count for link, count in self.engine.moved_bytes().items()}

    def placed(self) -> Placed:
        """Bytes by tier as placed, and what has been moved since loading."""
        stats = self.engine.stats()
        return Placed(
            weight_bytes=self.engine.placement.weights.by_tier,
            offload_files_bytes=stats.disk_bytes,
            pinned_bytes=stats.pinned_bytes,
            counters={
                "engine_host_bytes": stats.host_bytes,
                "moved_h2d_bytes": stats.h2d_bytes,
                "moved_d2h_bytes": stats.d2h_bytes,
                "moved_disk_read_bytes": stats.disk_read_bytes,
                "moved_disk_write_bytes": stats.disk_write_bytes,
            },
        )


@contextmanager
def load_policy(plan: Plan, policy: Policy, folder: Path) -> Iterator[FlexgenEngine]:
    """Load as planned. Packed weights stay in the folder for the next run.

    Raises:
        OutOfMemory: device memory ran out although the plan fitted.
    """
    request = plan.request
    try:
        with FlexEngine.load(
            spec_of(request),
            make_checkpoint(request),
            policy,
            workload=request.workload,
            device=request.machine.device,
            dtype=request.dtype,
            offload_dir=folder,
            # As planned, without a cap too: by this limit the engine cuts prefill to fit.
            gpu_bytes=request.machine.gpu_bytes,
            cpu_bytes=request.machine.cpu_bytes,
        ) as engine:
            yield FlexgenEngine(engine, plan)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the GPU ran out of memory ({out_of_memory_reason(error)}); lower a gpu share or micro_batch_size"
        ) from error


def plan_of(
    request: PlanRequest, placement: PlacementPlan, *, strategy: str, details: Mapping[str, Any] | None = None
) -> Plan:
    """What a placement comes to: bytes, shares, prediction and limit."""
    block = min(placement.policy.block_size, request.workload.num_sequences)
    predicted = limit = None
    if request.profile is not None:
        limit = physical_limit(placement.spec, request.workload, traffic_of(placement), request.profile.best)
        predicted = engine_cost(placement, request.profile)
    return Plan(
        request=request,
        strategy=strategy,
        batch_size=block,
        weight_bytes=placement.weights.by_tier,
        kv_bytes=placement.kv_cache.by_tier,
        workspace_bytes=placement.workspace_bytes + placement.slot_bytes,
        details={
            "policy": policy_details(placement.policy),
            "shares": _share_details(placement),
            "activation_bytes": placement.activations.by_tier,
            "planned_peak_bytes": {
                "gpu": placement.gpu_bytes,
                "cpu": placement.cpu_bytes,
                "disk": placement.disk_bytes,
            },
            **(details or {}),
        },
        predicted=predicted,
        limit=limit,
        warnings=tuple(_scaled_warning(placement.spec, request.profile)),
        lossless=placement.policy.lossless,
    )


def _scaled_warning(spec: ModelSpec, profile: HardwareProfile | None) -> Iterator[str]:
    table = None if profile is None else nearest_table(spec, profile.layers)
    if table is not None and table.shape != LayerShape.of(spec):
        yield (
            f"the machine's profile has no layer times of {spec.name or spec.family}; they are scaled from a layer of "
            f"{table.shape.family}, width {table.shape.hidden_size}"
        )


def spec_of(request: PlanRequest) -> ModelSpec:
    """The model's dimensions.

    Raises:
        UnsupportedModelError: an architecture the engine does not have.
    """
    return request.spec or ModelSpec.from_hf_config(request.model.config, request.model.name)


def dtype_bytes(request: PlanRequest) -> int:
    """Bytes of one number."""
    return int(getattr(torch, request.dtype).itemsize)


def offload_folder(request: PlanRequest, path: str) -> Path:
    """Where disk shares go: the strategy's `path`, else the run's offload directory."""
    return Path(path).expanduser().absolute() if path else request.machine.offload_dir


def disk_room(request: PlanRequest, placement: PlacementPlan, folder: Path, path: str) -> int:
    """Bytes that a placement's disk shares may take: what is free, and what an earlier run has packed already.

    Raises:
        OffloadDirError: the folder cannot be written.
    """
    if request.machine.disk_bytes is not None:
        return request.machine.disk_bytes
    if not placement.disk_bytes:
        return 0
    check_writable(folder, "--set path" if path else "--offload-dir")
    dtype = getattr(torch, request.dtype)
    pack = weight_pack(
        placement, make_checkpoint(request), folder, torch.device(request.machine.device), dtype
    )
    return free_disk_bytes(folder) + pack.num_bytes()


def make_checkpoint(request: PlanRequest) -> Checkpoint:
    """Where the weights come from.

    Raises:
        UsageError: a checkpoint in a form that the engine does not read.
    """
    source = request.model
    if source.weights == "random":
        return RandomCheckpoint(seed=request.seed)
    assert source.path is not None
    if not any(source.path.glob("*.safetensors")):
        raise UsageError(
            f"model {source.name}: our engine reads safetensors only, {source.path} has none; "
            "convert the checkpoint, or use -s accelerate"
        )
    return SafetensorsCheckpoint(source.path)


def policy_details(policy: Policy) -> dict[str, object]:
    """The integer choices and flags of a policy; `Policy(**details, ...)` with its shares is the policy again.

    What is at its default in a lossless policy is left out, so that records stay comparable when choices are added.
    """
    chosen = {}
    for field in fields(policy):
        value = getattr(policy, field.name)
        known = field.name in _ALWAYS_TOLD or not policy.lossless or value != field.default
        if known and not isinstance(value, Placement):
            chosen[field.name] = value
    return chosen


def _share_details(placement: PlacementPlan) -> dict[str, dict[str, float]]:
    """The shares that came out, in percent; within 2 % of those asked for."""
    kinds = {
        "weights": placement.weights,
        "kv_cache": placement.kv_cache,
        "activations": placement.activations,
    }
    return {
        name: {tier: round(100 * size / max(sizes.total, 1), 3) for tier, size in sizes.by_tier.items()}
        for name, sizes in kinds.items()
    }
