"""A metric over many commits: per setup and machine the median of each commit's launches, in the order of the commits.

Order is git's where the repository knows the commits, else time. Knows nothing of how it is shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from flexllmgen.errors import UsageError
from harness.compare.commits import Commit, describe, in_order
from harness.compare.differences import machine_of
from harness.compare.measured import Measured, Revision
from harness.compare.pairing import Group, groups_of
from harness.compare.verdict import (
    Mark,
    MetricComparison,
    compare_values,
    direction,
    spread_of,
    unknown_metric,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A commit's launches of one setup.

    Args:
        at_ms: when the commit was made; of one the repository does not know, when it first ran.
        values: one per launch.
        spread: (max - min) / median over launches, or over the repeats of a single one.
        step: the change from the point before; None for the first.
    """

    revision: Revision
    subject: str
    at_ms: int
    values: tuple[float, ...]
    spread: float | None
    step: MetricComparison | None

    @property
    def median(self) -> float:
        """Of the launches."""
        return median(self.values)

    @property
    def mark(self) -> str:
        """What the step means: a verdict, in brackets where no test could tell; empty within the noise.

        With too few launches to test, a step counts as beyond the noise where it is larger than the spreads of both
        points together; without a spread nothing is known of the noise.
        """
        if self.step is None or self.step.mark is Mark.SAME:
            return ""
        if self.step.mark is not Mark.UNKNOWN:
            return self.step.mark.value
        change, sign = self.step.change.change, direction(self.step.metric)
        if change is None or None in self.step.spreads:
            return ""
        if abs(change) <= sum(spread for spread in self.step.spreads if spread is not None):
            return ""
        return f"({Mark.DIFFERENT if sign is None else Mark.BETTER if sign * change > 0 else Mark.WORSE})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The points of one setup on one machine, oldest commit first."""

    label: str
    machine: str
    metric: str
    points: tuple[Point, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers as measured, shares as fractions."""
        return {
            "setup": self.label,
            "machine": self.machine,
            "metric": self.metric,
            "points": [
                {
                    "revision": str(point.revision),
                    "commit": point.revision.commit or None,
                    "dirty": point.revision.dirty,
                    "subject": point.subject,
                    "at_ms": point.at_ms,
                    "values": list(point.values),
                    "median": point.median,
                    "spread": point.spread,
                    "change": point.step.change.change if point.step else None,
                    "p": point.step.change.p if point.step else None,
                    "beyond_noise": bool(point.mark),
                    "verdict": point.mark or None,
                }
                for point in self.points
            ],
        }


def history(
    measured: Sequence[Measured],
    metric: str,
    *,
    cwd: Path,
    workload: str | None = None,
    strategy: str | None = None,
) -> list[Series]:
    """The metric of every setup over the commits; those with most commits first.

    Args:
        workload: a part of the workload key that it must have.

    Raises:
        UsageError: nothing matches; the message says what there is.
    """
    chosen = [
        one
        for one in measured
        if strategy in (None, one.result.strategy) and (workload or "") in one.result.workload_key
    ]
    if not chosen:
        raise UsageError(_nothing(measured, workload, strategy))
    if not any(one.values(metric) for one in chosen):
        raise UsageError(unknown_metric(metric, {name for one in chosen for name in one.result.metrics}))
    series = [_series(group, metric, cwd) for group in groups_of(chosen)]
    return sorted((one for one in series if one.points), key=lambda one: -len(one.points))


def _series(group: Group, metric: str, cwd: Path) -> Series:
    by_revision: dict[Revision, list[Measured]] = {}
    for one in group.members:
        if one.values(metric):
            by_revision.setdefault(one.revision, []).append(one)
    known = describe(cwd, [revision.commit for revision in by_revision])
    points: list[Point] = []
    before: Group | None = None
    for revision, at_ms in _ordered(by_revision, known, cwd):
        now = Group(members=tuple(by_revision[revision]))
        step = None
        if before is not None:
            spreads = (spread_of(before, metric), spread_of(now, metric))
            step = compare_values(metric, before.values(metric), now.values(metric), spreads)
        commit = known.get(revision.commit)
        points.append(
            Point(
                revision=revision,
                subject=commit.subject if commit else "",
                at_ms=at_ms,
                values=tuple(now.values(metric)),
                spread=spread_of(now, metric),
                step=step,
            )
        )
        before = now
    return Series(label=group.label, machine=machine_of(group.first), metric=metric, points=tuple(points))


def _ordered(
    by_revision: Mapping[Revision, list[Measured]], known: Mapping[str, Commit], cwd: Path
) -> Iterator[tuple[Revision, int]]:
    """Revisions with their time: commits that git knows each after its ancestors, dirty states after their commit, the
    unknown where their time puts them."""
    first_ms = {
        revision: min(one.result.started_at_ms for one in found) for revision, found in by_revision.items()
    }
    listed = {sha: place for place, sha in enumerate(in_order(cwd, list(known)))}
    ordered = sorted(
        (one for one in by_revision if one.commit in listed),
        key=lambda one: (listed[one.commit], one.dirty, first_ms[one]),
    )
    strangers = sorted(
        (one for one in by_revision if one.commit not in listed), key=lambda one: first_ms[one]
    )
    for revision in ordered:
        at_ms = known[revision.commit].committed_s * 1000
        while strangers and first_ms[strangers[0]] < at_ms:
            yield strangers[0], first_ms[strangers.pop(0)]
        yield revision, at_ms
    for revision in strangers:
        yield revision, first_ms[revision]


def _nothing(measured: Sequence[Measured], workload: str | None, strategy: str | None) -> str:
    if not measured:
        return "there are no finished runs here: run `harness eval` or `harness benchmark` first"
    strategies = sorted({one.result.strategy for one in measured})
    workloads = list(dict.fromkeys(one.result.workload_key for one in reversed(measured)))
    wanted = " ".join(
        f"{flag} {value}" for flag, value in (("--strategy", strategy), ("--workload", workload)) if value
    )
    more = f" and {len(workloads) - 4} more" if len(workloads) > 4 else ""
    return (
        f"no finished run for {wanted}; there are strategies {', '.join(strategies)} "
        f"and workloads {', '.join(workloads[:4])}{more}"
    )
