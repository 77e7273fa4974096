"""What a plan does otherwise than usual or than asked, in words. Knows only what a plan's record holds."""

from collections.abc import Iterator, Mapping
from typing import Any


def special_words(policy: Mapping[str, Any]) -> Iterator[str]:
    """What a policy of the engine does otherwise; nothing for a plain one, or for none.

    >>> list(special_words({"cpu_attention": True, "recompute": 0.4}))
    ['attention on the CPU', '40% of the KV in host memory made anew']
    """
    if policy.get("sep_layer"):
        yield "attention and MLP apart"
    if policy.get("chosen_experts"):
        yield "experts by choice"
    if policy.get("cpu_attention"):
        yield "attention on the CPU"
    if policy.get("recompute"):
        yield f"{policy['recompute']:.0%} of the KV in host memory made anew"


def unused_leave(plan: Mapping[str, Any]) -> str | None:
    """What to tell whoever gave leave to a plan that nobody searched for; None where a search could use it.

    >>> unused_leave({"strategy": "flexgen"})
    '--allow-lossy has no effect on flexgen: it gives up what its own keys (--set) say'
    >>> unused_leave({"strategy": "autoflex", "search": {}})
    """
    if "search" in plan:
        return None
    return f"--allow-lossy has no effect on {plan['strategy']}: it gives up what its own keys (--set) say"


def batch_words(plan: Mapping[str, Any]) -> str:
    """How many sequences are run together, and whose choice that is where a search made another than the user.

    >>> batch_words({"batch_size": 72, "batch_size_asked": 24, "policy": {"num_micro_batches": 3}})
    '72'
    >>> batch_words({"batch_size": 8, "batch_size_asked": 4, "search": {}})
    "8 (the search's choice; --batch-size is 4)"
    """
    size, asked = plan["batch_size"], plan.get("batch_size_asked")
    if "search" not in plan or asked in (None, size):
        return str(size)
    return f"{size} (the search's choice; --batch-size is {asked})"
