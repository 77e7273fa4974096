"""Whether two runs did the same thing: their plans' policies and placements held side by side.

A figure moves because another plan was made, or because the same plan was carried out in another way; this tells which.
Knows only the plan as a result holds it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.compare.differences import told
from harness.results import RunResult

# What was decided; where that reads the same, what it came to.
_DECIDED = ("batch_size", "policy", "shares", "device_map")
_PLACED = ("weight_bytes", "kv_bytes", "activation_bytes")
_LAYERS = 8  # entries of a device map that are named one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChange:
    """How the plans of two groups of launches relate.

    Args:
        known: whether both sides recorded a plan.
        changed: key, as `policy.overlap` or `shares.weights.gpu`, to both values; empty for the same plan.
        variants: how many plans the launches of base and new followed.
        same_runs: whether both sides are the very same launches.
    """

    known: bool
    changed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    variants: tuple[int, int] = (1, 1)
    same_runs: bool = False

    def __str__(self) -> str:
        """The line that people read."""
        if self.same_runs:
            return "the same runs"
        if not self.known:
            return "plan unknown"
        if not self.changed:
            return "the same plan: what changed is its execution"
        if self.variants != (1, 1):
            few, many = self.variants
            return f"the plan varies between launches ({few} and {many} plans): {told(self.changed, between=' -> ')}"
        return f"the plan changed: {told(self.changed, between=' -> ')}"


def plan_change(base: Sequence[RunResult], new: Sequence[RunResult]) -> PlanChange:
    """Compare the plans of launches, oldest first."""
    ones, others = _plans(base), _plans(new)
    if not ones or not others:
        return PlanChange(known=False)
    variants = (len(ones), len(others))
    if set(ones) == set(others):
        same_runs = {one.run_uuid for one in base} == {one.run_uuid for one in new}
        return PlanChange(known=True, variants=variants, same_runs=same_runs)
    # Those that only one side has show what changed.
    one = next((plan for key, plan in reversed(ones.items()) if key not in others), [*ones.values()][-1])
    other = next((plan for key, plan in reversed(others.items()) if key not in ones), [*others.values()][-1])
    return PlanChange(known=True, changed=_differences(one, other), variants=variants)


def _plans(results: Sequence[RunResult]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for result in results:
        plan = {name: result.plan[name] for name in (*_DECIDED, *_PLACED) if name in result.plan}
        if plan:
            found[json.dumps(plan, sort_keys=True, default=str)] = plan
    return found


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for names in (_DECIDED, _PLACED):
        for name in names:
            flat, flat_other = _flat(one.get(name), name), _flat(other.get(name), name)
            keys = [key for key in {**flat, **flat_other} if flat.get(key) != flat_other.get(key)]
            if name == "device_map" and len(keys) > _LAYERS:
                found[name] = (_places(flat), _places(flat_other))
                continue
            found |= {key: (_text(flat.get(key)), _text(flat_other.get(key))) for key in keys}
        if found:
            break
    return found


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {} if value is None else {name: value}
    return {key: leaf for inner, one in value.items() for key, leaf in _flat(one, f"{name}.{inner}").items()}


def _places(flat: Mapping[str, Any]) -> str:
    """How many modules lie where: `12 on cpu + 20 on 0`."""
    counts: dict[str, int] = {}
    for place in flat.values():
        counts[str(place)] = counts.get(str(place), 0) + 1
    return " + ".join(f"{count} on {place}" for place, count in sorted(counts.items()))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
