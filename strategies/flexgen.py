"""Strategy `flexgen`: our own engine, under the policy that the user sets.

Translates the strategy's keys into a Policy, the plan into what every plan shows, and hands the rest to
flexllmgen. Where weights go is the user's word here; finding the best policy is `autoflex`'s.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flexllmgen.checkpoint import Checkpoint, RandomCheckpoint, SafetensorsCheckpoint
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import OutOfMemory, UsageError
from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.sampling import Greedy
from flexllmgen.spec import ModelSpec
from flexllmgen.weights import weight_pack
from profiling.cost_model import Traffic, overlapped_cost, physical_limit
from profiling.hardware import check_writable, free_disk_bytes
from strategies.base import Placed, Plan, PlanRequest, out_of_memory_reason
from strategies.flexgen_config import Config
from strategies.flexgen_limits import check_limits


def create(config: Config) -> "FlexgenStrategy":
    """The strategy under its configuration."""
    return FlexgenStrategy(config)


class FlexgenStrategy:
    """Plans exact shares, loads them, generates block by block."""

    name = "flexgen"

    def __init__(self, config: Config) -> None:
        self.config = config

    def plan(self, request: PlanRequest) -> Plan:
        """Place every byte by the shares that were asked for.

        Raises:
            PolicyError: shares over 100 %.
            UnsupportedModelError: an architecture the engine does not have.
            CheckpointError: the checkpoint is not the model's.
            PlanInfeasible: some tier is too small; the message has the numbers.
        """
        machine = request.machine
        spec = request.spec or ModelSpec.from_hf_config(request.model.config, request.model.name)
        policy = make_policy(self.config, request.batch_size)
        checkpoint = make_checkpoint(request)
        checkpoint.validate(spec)
        size = int(getattr(torch, request.dtype).itemsize)
        on_cpu = machine.device == "cpu"
        placement = plan_placement(
            spec, policy, request.workload, size, in_place=on_cpu, gpu_cap_bytes=machine.gpu_bytes
        )
        folder = self._folder(request)
        room = 0
        if placement.disk_bytes:
            check_writable(folder, "--set path" if self.config.path else "--offload-dir")
            # What an earlier run has packed is not written again.
            dtype = getattr(torch, request.dtype)
            pack = weight_pack(placement, checkpoint, folder, torch.device(machine.device), dtype)
            room = free_disk_bytes(folder) + pack.num_bytes()
        check_limits(placement, machine, self.config, folder, room)
        traffic = Traffic(
            batch_size=min(policy.block_size, request.workload.num_sequences),
            weight_bytes=_tiers(placement.weights),
            kv_shares={
                "gpu": placement.kv_cache.shares.gpu,
                "cpu": placement.kv_cache.shares.cpu,
                "disk": placement.kv_cache.shares.disk,
            },
            dtype_bytes=size,
        )
        predicted = limit = None
        if request.profile is not None:
            limit = physical_limit(spec, request.workload, traffic, request.profile.best)
            predicted = overlapped_cost(
                spec,
                request.workload,
                traffic,
                request.profile.typical,
                micro_batch_size=min(policy.micro_batch_size, request.workload.num_sequences),
                device=machine.device,
                dtype=request.dtype,
                overlap=policy.overlap > 0,
            )
        return Plan(
            request=request,
            strategy=self.name,
            batch_size=traffic.batch_size,
            weight_bytes=_tiers(placement.weights),
            kv_bytes=_tiers(placement.kv_cache),
            workspace_bytes=placement.workspace_bytes + placement.slot_bytes,
            details={"policy": _policy_details(policy), "shares": _share_details(placement)},
            predicted=predicted,
            limit=limit,
        )

    @contextmanager
    def build(self, plan: Plan) -> Iterator["FlexgenEngine"]:
        """Load as planned. Packed weights stay in the offload directory for the next run.

        Raises:
            OutOfMemory: device memory ran out although the plan fitted.
        """
        request = plan.request
        spec = request.spec or ModelSpec.from_hf_config(request.model.config, request.model.name)
        try:
            with FlexEngine.load(
                spec,
                make_checkpoint(request),
                make_policy(self.config, request.batch_size),
                workload=request.workload,
                device=request.machine.device,
                dtype=request.dtype,
                offload_dir=self._folder(request),
                # As planned, without a cap too: by this limit the engine cuts prefill to fit.
                gpu_bytes=request.machine.gpu_bytes,
                cpu_bytes=request.machine.cpu_bytes,
            ) as engine:
                yield FlexgenEngine(engine)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"the GPU ran out of memory ({out_of_memory_reason(error)}); lower a gpu share or micro_batch_size"
            ) from error

    def _folder(self, request: PlanRequest) -> Path:
        return (
            Path(self.config.path).expanduser().absolute()
            if self.config.path
            else request.machine.offload_dir
        )


class FlexgenEngine:
    """flexllmgen's engine behind the Engine protocol."""

    def __init__(self, engine: FlexEngine) -> None:
        self.engine = engine

    def generate(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, gen_tokens: int
    ) -> Iterator[torch.Tensor]:
        """Yield `gen_tokens` columns of int64 ids of shape (B,), greedily chosen; EOS ends nothing."""
        # A mask that hides nothing would only cost.
        mask = None if bool(mask_BT.all()) else mask_BT
        yield from self.engine.generate(ids_BT, mask, sampling=Greedy(), max_new_tokens=gen_tokens)

    def placed(self) -> Placed:
        """Bytes by tier as placed, and what has been moved since loading."""
        stats = self.engine.stats()
        return Placed(
            weight_bytes=_tiers(self.engine.placement.weights),
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


def make_policy(config: Config, batch_size: int) -> Policy:
    """The engine's policy from the strategy's keys.

    Raises:
        PolicyError: shares of one kind sum to more than 100 %.
    """
    return Policy(
        micro_batch_size=config.micro_batch_size or batch_size,
        num_micro_batches=config.num_micro_batches,
        weights=_shares(config, "w"),
        kv_cache=_shares(config, "cache"),
        activations=_shares(config, "act"),
        pin_weight=config.pin_weight,
        overlap=config.overlap,
        sep_layer=config.sep_layer,
    )


def _shares(config: Config, kind: str) -> Placement:
    on_gpu, on_cpu = f"{kind}_gpu_percent", f"{kind}_cpu_percent"
    return Placement.from_percent(getattr(config, on_gpu), getattr(config, on_cpu), f"{on_gpu}, {on_cpu}")


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
            f"model {source.name}: strategy flexgen reads safetensors only, {source.path} has none; "
            "convert the checkpoint, or use -s accelerate"
        )
    return SafetensorsCheckpoint(source.path)


def _tiers(sizes: object) -> dict[str, int]:
    return {tier: int(getattr(sizes, tier)) for tier in ("gpu", "cpu", "disk")}


def _policy_details(policy: Policy) -> dict[str, object]:
    return {
        "micro_batch_size": policy.micro_batch_size,
        "num_micro_batches": policy.num_micro_batches,
        "overlap": policy.overlap,
        "sep_layer": policy.sep_layer,
        "pin_weight": policy.pin_weight,
    }


def _share_details(placement: PlacementPlan) -> dict[str, dict[str, float]]:
    """The shares that came out, in percent; within 1 % of those asked for."""
    kinds = {
        "weights": placement.weights,
        "kv_cache": placement.kv_cache,
        "activations": placement.activations,
    }
    return {
        name: {tier: round(100 * size / max(sizes.total, 1), 3) for tier, size in _tiers(sizes).items()}
        for name, sizes in kinds.items()
    }
