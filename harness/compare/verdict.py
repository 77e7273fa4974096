"""A comparison: per setup and metric base, new, change and verdict; and the checks that a CI fails on.

The sample is one value per launch (statistics.py). Knows nothing of where results came from or how they are shown.
"""

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

from flexllmgen.errors import UsageError
from harness.compare.differences import version_differences
from harness.compare.pairing import Group, Pair, Unpaired
from harness.compare.plans import PlanChange, plan_change
from harness.compare.statistics import Change, compare
from harness.measure import relative_spread
from harness.quality.words import losses

DEFAULT_METRICS = (
    "generation_tok_s",
    "ttft_s",
    "tpot_s",
    "peak_rss_bytes",
    "peak_device_allocated_bytes",
    "perplexity_ratio",
    "token_match_share",
)
_USUAL = (*DEFAULT_METRICS, "prefill_tok_s", "decode_tok_s", "e2e_s", "load_s", "attainment")


class Mark(StrEnum):
    """The verdict on one metric."""

    BETTER = "better"
    WORSE = "worse"
    DIFFERENT = "differs"  # significant, of a metric that has no better or worse
    SAME = "~"
    UNKNOWN = "?"  # too few launches to tell


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricComparison:
    """One metric of one setup; `base` and `new` are medians over launches, spreads (max - min) / median.

    The spread is that of the launches, or of the repeats where there is one launch.
    """

    metric: str
    base: float
    new: float
    launches: tuple[int, int]
    spreads: tuple[float | None, float | None]
    change: Change
    mark: Mark

    @property
    def worse_by(self) -> float:
        """By what share the new is worse, negative where it is better; infinite beyond all shares."""
        sign = direction(self.metric)
        assert sign is not None
        if self.change.change is None:
            return math.inf if sign * (self.base - self.new) > 0 else -math.inf
        return -sign * self.change.change


@dataclass(frozen=True, slots=True, kw_only=True)
class CellComparison:
    """One setup: its metrics, its plan, and what else differs between the two sides.

    `losses` is what each side gives up, in words; empty for a lossless one.
    """

    label: str
    against: str
    metrics: tuple[MetricComparison, ...]
    plan: PlanChange | None
    differs: Mapping[str, tuple[str, str]]
    versions: Mapping[str, tuple[str, str]]
    losses: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Base against new; `base` and `new` are names with what they came to."""

    base: tuple[str, str]
    new: tuple[str, str]
    cells: tuple[CellComparison, ...]
    unpaired: tuple[Unpaired, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers as measured, shares as fractions."""
        return {
            "base": {"name": self.base[0], "is": self.base[1]},
            "new": {"name": self.new[0], "is": self.new[1]},
            "cells": [_cell_dict(cell) for cell in self.cells],
            "unpaired": [
                {"side": one.side, "setup": one.label, "reason": one.reason, "failed": one.failed}
                for one in self.unpaired
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A check: the metric may get worse by this share and no more."""

    metric: str
    share: float


def direction(metric: str) -> int | None:
    """1 where higher is better, -1 where lower is; None where neither, as of what was planned.

    >>> direction("generation_tok_s"), direction("ttft_s"), direction("predicted_tok_s")
    (1, -1, None)
    """
    if metric.startswith(("predicted_", "limit_", "prediction_error", "repeats")):
        return None
    if metric.endswith("_tok_s") or metric in (
        "attainment",
        "parity",
        "token_match_share",
        "equal_prefix_tokens",
    ):
        return 1
    if metric.startswith("perplexity"):
        return -1
    return -1 if metric.endswith(("_s", "_bytes")) or metric.startswith("energy") else None


def parse_gate(text: str) -> Gate:
    """Read `generation_tok_s:5%`.

    Raises:
        UsageError: it is not written so, or the metric has no better and worse.
    """
    match = re.fullmatch(r"(?P<metric>\w+):(?P<percent>\d+(\.\d+)?)%?", text.strip())
    if match is None:
        raise UsageError(f"--fail-on {text!r}: write METRIC:PERCENT%, as generation_tok_s:5%")
    if direction(match["metric"]) is None:
        raise UsageError(
            f"--fail-on {text!r}: {match['metric']} is neither better nor worse when it changes; "
            "name a measured rate, time, size or energy"
        )
    return Gate(metric=match["metric"], share=float(match["percent"]) / 100)


def compare_pairs(
    pairs: Sequence[Pair], metrics: Sequence[str], *, named: Sequence[str] = (), plans: bool = True
) -> tuple[CellComparison, ...]:
    """Compare each pair in `metrics`; those that a pair lacks are left out of it.

    Args:
        named: metrics that somebody asked for, so that one which no pair has is a mistake.
        plans: whether to compare plans; of two strategies they always differ.

    Raises:
        UsageError: no pair has a metric that was named.
    """
    there = set().union(*(pair.base.metrics() & pair.new.metrics() for pair in pairs)) if pairs else set()
    for metric in named:
        if metric not in there:
            raise UsageError(unknown_metric(metric, there))
    return tuple(_compare_pair(pair, metrics, plans=plans) for pair in pairs)


def unknown_metric(metric: str, there: Collection[str]) -> str:
    """What to say of a metric that none of the runs has: the nearest, or else the usual ones."""
    near = difflib.get_close_matches(metric, there, n=3) or [one for one in _USUAL if one in there]
    return f"these runs have no metric {metric!r}; there are {', '.join(near)} and others"


def failures(comparison: Comparison, gates: Sequence[Gate]) -> list[str]:
    """What fails the checks, a line each; empty where all hold.

    A metric fails when it got worse by more than its share, and significantly so. Where there are too few launches
    to tell, being worse by more than its share is enough: a check that could never fail would be none. A setup that
    base finished and new did not fails too.
    """
    found = []
    for gate in gates:
        for cell in comparison.cells:
            for one in cell.metrics:
                if one.metric != gate.metric or one.worse_by <= gate.share:
                    continue
                if one.change.can_tell and not one.change.significant:
                    continue
                told = "significantly" if one.change.can_tell else "too few launches to test"
                by = f"by {one.worse_by:.1%}" if math.isfinite(one.worse_by) else "from nothing"
                found.append(
                    f"{gate.metric} is worse {by} ({told}), allowed are {gate.share:.1%}: {cell.label}"
                )
    if gates:
        found += [
            f"finished in the base, {one.reason}: {one.label}"
            for one in comparison.unpaired
            if one.failed and one.side == "base"
        ]
    return found


def _compare_pair(pair: Pair, metrics: Sequence[str], *, plans: bool) -> CellComparison:
    compared = []
    for metric in metrics:
        base, new = pair.base.values(metric), pair.new.values(metric)
        if base and new and all(map(math.isfinite, (*base, *new))):
            compared.append(compare_values(metric, base, new, _spreads(pair, metric)))
    return CellComparison(
        label=pair.new.label,
        against=pair.base.label,
        metrics=tuple(compared),
        plan=plan_change(_launches(pair.base), _launches(pair.new)) if plans else None,
        differs=pair.differs,
        versions=version_differences(pair.base.members[-1], pair.new.members[-1]),
        losses=(losses(pair.base.result.plan), losses(pair.new.result.plan)),
    )


def compare_values(
    metric: str,
    base: Sequence[float],
    new: Sequence[float],
    spreads: tuple[float | None, float | None] = (None, None),
) -> MetricComparison:
    """Compare a metric's values, one per launch."""
    change = compare(base, new)
    return MetricComparison(
        metric=metric,
        base=median(base),
        new=median(new),
        launches=(len(base), len(new)),
        spreads=spreads,
        change=change,
        mark=_mark(metric, median(base), median(new), change),
    )


def spread_of(group: Group, metric: str) -> float | None:
    """Of the launches; of the repeats where there is one launch."""
    values = group.values(metric)
    return relative_spread(values if len(values) > 1 else group.repeated(metric))


def _spreads(pair: Pair, metric: str) -> tuple[float | None, float | None]:
    return spread_of(pair.base, metric), spread_of(pair.new, metric)


def _mark(metric: str, base: float, new: float, change: Change) -> Mark:
    if not change.can_tell:
        return Mark.UNKNOWN
    # With ties the test may find what the estimate does not show: that is no change to speak of.
    moved = (new - base) if change.change is None else change.change
    if not change.significant or moved == 0:
        return Mark.SAME
    sign = direction(metric)
    if sign is None:
        return Mark.DIFFERENT
    return Mark.BETTER if sign * moved > 0 else Mark.WORSE


def _launches(group: Group) -> list[Any]:
    return [launch for one in group.members for launch in one.launches]


def _cell_dict(cell: CellComparison) -> dict[str, Any]:
    plan = cell.plan
    return {
        "setup": cell.label,
        "against": cell.against,
        "plan": None
        if plan is None
        else {
            "known": plan.known,
            "same": plan.known and not plan.changed,
            "changed": {name: list(values) for name, values in plan.changed.items()},
            "variants": list(plan.variants),
        },
        "differs": {name: list(values) for name, values in cell.differs.items()},
        "versions": {name: list(values) for name, values in cell.versions.items()},
        "lossy": [words or None for words in cell.losses],
        "metrics": {
            one.metric: {
                "base": one.base,
                "new": one.new,
                "launches": list(one.launches),
                "spreads": list(one.spreads),
                "change": one.change.change,
                "low": one.change.low,
                "high": one.change.high,
                "p": one.change.p,
                "verdict": {"~": "no change", "?": "too few launches"}.get(one.mark.value, one.mark.value),
            }
            for one in cell.metrics
        },
    }
