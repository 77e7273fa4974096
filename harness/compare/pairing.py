"""Which results are held against which: launches of one setup together, setups by workload key, strategy, keys and machine.

Knows nothing of where results came from, nor of what is compared in them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flexllmgen.errors import UsageError
from harness.compare.differences import (
    hardware_differences,
    key_differences,
    setting_text,
    setup_differences,
    setup_of,
    told,
)
from harness.compare.measured import Measured
from harness.results import RunResult

Side = Literal["base", "new"]
# Of a setup, what strategies have in common.
_COMMON = ("batch_size", "device", "gpu_mem", "cpu_mem", "weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Results of one setup on one machine: their launches are the sample."""

    members: tuple[Measured, ...]

    @property
    def first(self) -> Measured:
        """Any of them, for what all have in common."""
        return self.members[0]

    @property
    def result(self) -> RunResult:
        """The newest result."""
        return self.members[-1].result

    @property
    def label(self) -> str:
        """The setup in one line: strategy, workload, batch size, and what is not at its default."""
        return label_of(self.result)

    def values(self, metric: str) -> list[float]:
        """One value per launch."""
        return [value for one in self.members for value in one.values(metric)]

    def repeated(self, metric: str) -> list[float]:
        """One value per repeat."""
        return [value for one in self.members for value in one.repeated(metric)]

    def metrics(self) -> set[str]:
        """Metrics that it has."""
        return {name for one in self.members for launch in one.launches for name in launch.metrics} | {
            name for one in self.members for name in one.result.metrics
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two groups that may be compared; `differs` is what --force looked past."""

    base: Group
    new: Group
    differs: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpaired:
    """A setup that only one side has finished; `failed` where the other side has it, but without figures."""

    side: Side
    label: str
    reason: str
    failed: bool = False


def groups_of(measured: Iterable[Measured]) -> list[Group]:
    """Put the launches of each setup together, in the order in which setups first ran."""
    found: list[list[Measured]] = []
    seen: set[str] = set()
    for one in measured:
        if one.result.run_uuid in seen:
            continue
        seen.add(one.result.run_uuid)
        for members in found:
            if not setup_differences(members[0].result, one.result) and not hardware_differences(
                members[0], one
            ):
                members.append(one)
                break
        else:
            found.append([one])
    return [Group(members=tuple(members)) for members in found]


def pair_up(
    base: Sequence[Measured],
    new: Sequence[Measured],
    *,
    base_failed: Sequence[Measured] = (),
    new_failed: Sequence[Measured] = (),
    force: bool = False,
) -> tuple[list[Pair], list[Unpaired]]:
    """Find for each setup of `base` the same in `new`, on the same machine.

    With `force` also on another machine; and where each side has one setup only, these two, whatever they are.

    Raises:
        UsageError: nothing can be compared; the message says what differs.
    """
    bases, news = groups_of(base), groups_of(new)
    pairs: list[Pair] = []
    left = list(news)
    unpaired: list[Unpaired] = []
    for group in bases:
        same_setup = [one for one in left if not setup_differences(group.result, one.result)]
        differs = [(hardware_differences(group.first, one.first), one) for one in same_setup]
        match = next((one for difference, one in differs if not difference), None)
        if match is None and differs and force:
            match = differs[0][1]
        if match is not None:
            left.remove(match)
            pairs.append(Pair(base=group, new=match, differs=hardware_differences(group.first, match.first)))
        elif differs:
            reason = f"on another machine: {told(differs[0][0])} (--force compares all the same)"
            unpaired.append(Unpaired(side="base", label=group.label, reason=reason))
        else:
            unpaired.append(_without_match(group, news, new_failed, "base"))
    if not pairs and force and len(bases) == len(news) == 1:
        differences = setup_differences(bases[0].result, news[0].result)
        differences |= hardware_differences(bases[0].first, news[0].first)
        return [Pair(base=bases[0], new=news[0], differs=differences)], []
    unpaired += [
        _without_match(group, bases, base_failed, "new")
        for group in left
        # One that lies on both sides, on two machines, has been told of already.
        if all(setup_differences(group.result, one.result) for one in bases)
    ]
    if not pairs:
        raise UsageError(_nothing_to_compare(bases, news, unpaired))
    return pairs, unpaired


def pair_strategies(measured: Sequence[Measured], baseline: str) -> tuple[list[Pair], list[Unpaired]]:
    """Hold every setup against the baseline strategy's with the same workload, batch size, caps and machine.

    `baseline` names a cell or a strategy; empty: accelerate where there is one, else the first strategy.

    Raises:
        UsageError: there is nothing to compare.
    """
    groups = groups_of(measured)
    named = next((one for one in groups if any(baseline == member.name for member in one.members)), None)
    strategies = list(dict.fromkeys(one.result.strategy for one in groups))
    base = named.result.strategy if named else baseline
    if base not in strategies:
        base = "accelerate" if "accelerate" in strategies else strategies[0]
    bases = [one for one in groups if one.result.strategy == base]
    if named is not None:
        bases.sort(key=lambda one: one is not named)
    pairs: list[Pair] = []
    unpaired: list[Unpaired] = []
    for group in groups:
        match = next((one for one in bases if not _common_differences(one, group)), None)
        if match is None:
            reason = f"{base} has no cell with the same workload, batch size and caps"
            unpaired.append(Unpaired(side="new", label=group.label, reason=reason))
        elif match is not group:
            pairs.append(Pair(base=match, new=group))
    if not pairs:
        there = "; ".join(one.label for one in groups)
        raise UsageError(
            f"no two strategies ran on the same workload, batch size and caps; there is: {there}"
        )
    return pairs, unpaired


def label_of(result: RunResult) -> str:
    """A setup in one line, for people."""
    words = [result.strategy, result.workload_key or result.model]
    for name, value in setup_of(result).items():
        is_default = result.param_sources.get(name, "default").startswith("default")
        if name == "batch_size" or not (is_default or name in ("model", "device")):
            words.append(f"{name}={setting_text(name, value)}")
    return " ".join(words)


def _common_differences(base: Group, new: Group) -> bool:
    one, other = base.result, new.result
    if one.workload_key != other.workload_key or hardware_differences(base.first, new.first):
        return True
    keys = [
        {name: value for name, value in setup_of(each).items() if name in _COMMON} for each in (one, other)
    ]
    return bool(key_differences(one, other, *keys))


def _without_match(group: Group, others: Sequence[Group], failed: Sequence[Measured], side: Side) -> Unpaired:
    """Why a setup has no counterpart: it failed there, it comes nearest to another one, or it is not there."""
    for one in failed:
        if _is_same_cell(group, one):
            error = one.result.error.message if one.result.error else one.result.status.value
            return Unpaired(side=side, label=group.label, reason=f"failed there: {error}", failed=True)
    nearest = min(_differences(group, others), key=len, default=None)
    reason = "no such run there" if nearest is None else f"the nearest there has {told(nearest)}"
    return Unpaired(side=side, label=group.label, reason=reason)


def _is_same_cell(group: Group, failed: Measured) -> bool:
    # A cell that failed early has no workload key; its name is stable between benchmarks of the same grid.
    if failed.result.workload_key:
        return not setup_differences(group.result, failed.result)
    return failed.result.cell is not None and failed.name in {one.name for one in group.members}


def _differences(group: Group, others: Sequence[Group]) -> Iterator[dict[str, tuple[str, str]]]:
    """What tells the other side's setups of the strategy from this one, theirs first."""
    for one in others:
        if one.result.strategy == group.result.strategy:
            yield setup_differences(one.result, group.result)


def _nothing_to_compare(bases: Sequence[Group], news: Sequence[Group], unpaired: Sequence[Unpaired]) -> str:
    if machine := next((one for one in unpaired if one.reason.startswith("on another machine")), None):
        return f"{machine.label}: {machine.reason}"
    if len(bases) == len(news) == 1:
        differences = setup_differences(bases[0].result, news[0].result)
        return (
            f"these are two different setups: {told(differences)} (--force compares all the same; "
            "--strategies compares the strategies of a benchmark)"
        )
    words = "; ".join(f"{one.label} ({one.reason})" for one in unpaired[:2])
    more = f"; and {len(unpaired) - 2} more" if len(unpaired) > 2 else ""
    return f"no setup is on both sides: {words}{more}; run the same benchmark at both"
