"""What a lossless policy does otherwise than usual, in words. Knows only the policy as a plan's record holds it."""

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
