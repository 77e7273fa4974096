"""How a lossy policy reads. Knows only the plan as a result holds it, so that older records read as lossless."""

from collections.abc import Iterator, Mapping
from typing import Any


def is_lossy(plan: Mapping[str, Any]) -> bool:
    """Whether a recorded plan changes what is generated.

    >>> is_lossy({"lossless": False}), is_lossy({})
    (True, False)
    """
    return plan.get("lossless") is False


def changes_kv(plan: Mapping[str, Any]) -> bool:
    """Whether a lossy plan's steps read other keys and values than were computed; true where nothing says so."""
    policy = plan.get("policy")
    if policy is None:
        return "quantize" not in plan
    return policy.get("kv_bits") is not None or policy.get("attn_sparsity", 1.0) < 1


def losses(plan: Mapping[str, Any]) -> str:
    """What a recorded plan gives up, in words; empty for a lossless one.

    >>> losses({"lossless": False, "policy": {"weight_bits": 4, "weight_group_size": 64, "kv_bits": None}})
    'weights in 4 bits (groups of 64)'
    """
    if not is_lossy(plan):
        return ""
    words = list(policy_losses(plan.get("policy") or {}))
    if quantize := plan.get("quantize"):
        words.append(f"weights in {quantize} by bitsandbytes")
    return ", ".join(words) or "its strategy says no more"


def loss_tags(plan: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a run of this plan: that it is lossy, and in how many bits it keeps what; none for a lossless one."""
    if not is_lossy(plan):
        return {}
    policy = plan.get("policy") or {}
    kept = {name: policy.get(name) for name in ("weight_bits", "kv_bits")}
    if digits := str(plan.get("quantize") or "").removeprefix("int"):
        kept["weight_bits"] = int(digits)
    if (sparsity := policy.get("attn_sparsity", 1.0)) < 1:
        kept["attn_sparsity"] = sparsity
    return {"lossy": "true"} | {
        name: "none" if value is None else f"{value:g}" for name, value in kept.items()
    }


def policy_losses(policy: Mapping[str, Any]) -> Iterator[str]:
    """What a policy of the engine gives up; nothing for a lossless one."""
    for name, what in (("weight", "weights"), ("kv", "KV cache")):
        if bits := policy.get(f"{name}_bits"):
            group = policy.get(f"{name}_group_size")
            yield f"{what} in {bits} bits" + (f" (groups of {group})" if group else "")
    if (sparsity := policy.get("attn_sparsity", 1.0)) < 1:
        yield f"attention reads {sparsity:.0%} of the values"
