"""The policies that a search has looked at, in full or in outline, and which of them is to be preferred."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flexllmgen.placement import PlacementPlan
from flexllmgen.policy import Policy
from profiling.cost_model import CostEstimate
from strategies.choices import Cut, Kind, Variant

_ODD = 0.01
_HIDDEN_ODD = 0.1
QUERY_ODD = 0.003
"""For each micro-batch that asks the CPU in a layer: on an H200 machine more of them ran ever slower than predicted."""
_LOSSY_ODD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A policy that was looked at in full."""

    policy: Policy
    placement: PlacementPlan
    cost: CostEstimate
    cut: Cut

    @property
    def seconds(self) -> float:
        return self.cost.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A policy that was not simulated, since at the least that this would have said it is not the preferred one.

    Args:
        seconds: that it takes at least: mostly a hundredth below what it does.
    """

    policy: Policy
    placement: PlacementPlan
    cut: Cut
    seconds: float


def kind_of(candidate: Candidate | Outline) -> Kind:
    plan = candidate.placement
    return Kind(disk=plan.disk_bytes > 0, hidden_elsewhere=plan.hidden_slots > 0)


def distinct(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    """One of each cut and kind: neighbours of a policy say nothing new."""
    seen = set()
    for each in candidates:
        policy, plan = each.policy, each.placement
        key = (
            policy.micro_batch_size,
            policy.num_micro_batches,
            policy.overlap,
            policy.sep_layer,
            Variant.of(policy),
            plan.disk_bytes > 0,
            plan.hidden_slots > 0,
        )
        if key not in seen:
            seen.add(key)
            yield each


def seconds_of(candidate: Candidate | Outline) -> float:
    return candidate.seconds


def with_preference(candidate: Candidate | Outline) -> float:
    """Its seconds, and a little for what is odd about it: of policies that are as good as equal the plainest is taken."""
    return candidate.seconds * (1 + oddness(candidate.policy, candidate.placement))


def oddness(policy: Policy, plan: PlacementPlan) -> float:
    """A little for each thing that can go wrong in ways that no model sees, as a share of a policy's seconds."""
    odd = _ODD * ((plan.disk_bytes > 0) + policy.sep_layer + (policy.overlap > 1) + plan.attends_on_host)
    odd += _ODD * (policy.chosen_experts + (policy.recompute > 0) + (plan.weight_slots + plan.kv_slots > 0))
    odd += QUERY_ODD * policy.num_micro_batches * plan.attends_on_host
    odd += lossy_odd(policy)
    # Hidden states are small and wanted at once: behind the copies of weights they wait longer than predicted.
    return odd + _HIDDEN_ODD * (plan.hidden_slots > 0)


def lossy_odd(compressed: Policy | Variant) -> float:
    """A loss of precision must be worth it."""
    return _LOSSY_ODD * ((compressed.weight_bits is not None) + (compressed.kv_bits is not None))
