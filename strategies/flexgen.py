"""Strategy `flexgen`: our own engine, under the policy that the user sets.

Translates the strategy's keys into a Policy, the plan into what every plan shows, and hands the rest to
flexllmgen. Where weights go is the user's word here; finding the best policy is `autoflex`'s.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

from flexllmgen.errors import PolicyError
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_GPU, Placement, Policy
from strategies.base import Plan, PlanRequest
from strategies.flexgen_config import KEY_OF, SHORT, Config, share_key
from strategies.flexgen_engine import (
    FlexgenEngine,
    disk_room,
    dtype_bytes,
    load_policy,
    make_checkpoint,
    offload_folder,
    plan_of,
    spec_of,
)
from strategies.flexgen_limits import check_limits

_CHOICES = (
    "pin_weight",
    "overlap",
    "sep_layer",
    "chosen_experts",
    "attn_sparsity",
    "recompute",
    "cpu_attention",
    "copy_threads",
)
"""Fields of a policy that are a key of their own, with the same default."""
_SWITCHES = {
    "compress_weight": {"weight_bits": 4, "weight_group_size": 64},
    "compress_cache": {"cache_bits": 4, "cache_group_size": 64},
}
"""Keys that say something beside another one only, and their defaults."""


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
            PolicyError: shares over 100 %, or keys that rule each other out.
            UnsupportedModelError: an architecture the engine does not have.
            CheckpointError: the checkpoint is not the model's.
            PlanInfeasible: some tier is too small; the message has the numbers.
        """
        machine, spec = request.machine, spec_of(request)
        policy = make_policy(self.config, request.batch_size)
        make_checkpoint(request).validate(spec)
        placement = plan_placement(
            spec,
            policy,
            request.workload,
            dtype_bytes(request),
            in_place=machine.device == "cpu",
            gpu_cap_bytes=machine.gpu_bytes,
        )
        folder = offload_folder(request, self.config.path)
        room = disk_room(request, placement, folder, self.config.path)
        check_limits(placement, machine, self.config, folder, room)
        plan = plan_of(request, placement, strategy=self.name)
        return replace(plan, warnings=(*plan.warnings, *unused_keys(self.config)))

    def build(self, plan: Plan) -> AbstractContextManager[FlexgenEngine]:
        """Load as planned. Packed weights stay in the offload directory for the next run.

        Raises:
            OutOfMemory: device memory ran out although the plan fitted.
        """
        request = plan.request
        policy = make_policy(self.config, request.batch_size)
        return load_policy(plan, policy, offload_folder(request, self.config.path))


def make_policy(config: Config, batch_size: int) -> Policy:
    """The engine's policy from the strategy's keys.

    Raises:
        PolicyError: shares of one kind sum to more than 100 %, or keys rule each other out.
    """
    activations = _shares(config, "activations")
    if config.cpu_cache_compute:
        # What the engine would refuse in its own words.
        others = {
            "cache_bits=8": config.compress_cache and config.cache_bits != 8,
            "cache_group_size=64": config.compress_cache and config.cache_group_size < 64,
            "attn_sparsity=1": config.attn_sparsity < 1,
            "act_gpu_percent=100": activations != ON_GPU,
        }
        reason = (
            "reads all keys and values, as they are or in 8 bits and groups of 64 or 128, "
            "and needs all hidden states on the GPU"
        )
        _refuse_beside("cpu_cache_compute", reason, others, off="false")
    if config.recompute:
        others = {"compress_cache=false": config.compress_cache, "attn_sparsity=1": config.attn_sparsity < 1}
        _refuse_beside("recompute", "makes keys and values anew and uses all of them", others, off="0")
    return Policy(
        micro_batch_size=config.micro_batch_size or batch_size,
        num_micro_batches=config.num_micro_batches,
        weights=_shares(config, "weights"),
        kv_cache=_shares(config, "kv_cache"),
        activations=activations,
        pin_weight=config.pin_weight,
        overlap=config.overlap,
        sep_layer=config.sep_layer,
        weight_bits=config.weight_bits if config.compress_weight else None,
        weight_group_size=config.weight_group_size,
        cpu_attention=config.cpu_cache_compute,
        copy_threads=config.num_copy_threads,
        kv_bits=config.cache_bits if config.compress_cache else None,
        kv_group_size=config.cache_group_size,
        attn_sparsity=config.attn_sparsity,
        recompute=config.recompute,
        chosen_experts=config.chosen_experts,
    )


def keys_of(policy: Policy) -> dict[str, bool | int | float]:
    """The keys that make `make_policy` give this policy; without those that say nothing in it.

    >>> keys_of(Policy(micro_batch_size=4, weights=Placement(gpu=0.3, cpu=0.7), kv_bits=8))["cache_bits"]
    8
    """
    keys: dict[str, bool | int | float] = {
        "micro_batch_size": policy.micro_batch_size,
        "num_micro_batches": policy.num_micro_batches,
    }
    for kind in SHORT:
        for tier in ("gpu", "cpu"):
            # As many digits as tell the share again, and no 78.98280000000001.
            keys[share_key(kind, tier)] = float(f"{100 * getattr(getattr(policy, kind), tier):.12g}")
    if policy.weight_bits is not None:
        keys |= {"compress_weight": True, "weight_bits": policy.weight_bits}
        keys["weight_group_size"] = policy.weight_group_size
    if policy.kv_bits is not None:
        keys |= {"compress_cache": True, "cache_bits": policy.kv_bits}
        keys["cache_group_size"] = policy.kv_group_size
    plain = Policy(micro_batch_size=1)
    for field in _CHOICES:
        if (value := getattr(policy, field)) != getattr(plain, field):
            keys[KEY_OF.get(field, field)] = value
    return keys


def unused_keys(config: Config) -> Iterator[str]:
    """A warning for each key that has no effect beside the others."""
    if not config.cache_cpu_percent:
        for key, asked in (("cpu_cache_compute", config.cpu_cache_compute), ("recompute", config.recompute)):
            if asked:
                yield (
                    f"{key} has no effect: no KV cache lies in host memory; give it a share there "
                    "(--set cache_gpu_percent=0 --set cache_cpu_percent=100)"
                )
    for switch, keys in _SWITCHES.items():
        if not getattr(config, switch):
            for key, default in keys.items():
                if getattr(config, key) != default:
                    yield f"{key} has no effect without --set {switch}=true"


def _refuse_beside(key: str, reason: str, others: dict[str, bool], *, off: str) -> None:
    """Refuses a key beside others that are set; what would mend it is told in the words of the keys."""
    if ways := [f"--set {way}" for way, needed in others.items() if needed]:
        raise PolicyError(f"{key} {reason}; {' and '.join(ways)}, or --set {key}={off}")


def _shares(config: Config, kind: str) -> Placement:
    on_gpu, on_cpu = share_key(kind, "gpu"), share_key(kind, "cpu")
    return Placement.from_percent(getattr(config, on_gpu), getattr(config, on_cpu), f"{on_gpu}, {on_cpu}")
