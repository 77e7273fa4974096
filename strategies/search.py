"""The policy search: the fastest policy for a workload, and how far from the best it can be.

The integer choices (micro-batch, number of micro-batches, positions of prefill at once) are enumerated; for each the shares
are a linear program (placement_program.py), whose optimum bounds what the simulation of the engine's schedule can
say. Cuts are taken in the order of a cheap bound, solved while that is below the best so far, and the most
promising of them looked at: simulated where by the least that they take (profiling/least_time.py) they may be the preferred
one, or where it matters which of them is better. Pure: looks at no machine, loads nothing.
"""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from flexllmgen.errors import PlanInfeasible
from flexllmgen.placement import PlacementPlan
from flexllmgen.policy import Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.cost_model import least_seconds
from profiling.layer_times import layer_times_for
from profiling.profile import HardwareProfile
from strategies.candidates import (
    QUERY_ODD,
    Candidate,
    Outline,
    distinct,
    kind_of,
    lossy_odd,
    seconds_of,
    with_preference,
)
from strategies.choices import (
    Cut,
    Kind,
    Limits,
    Variant,
    alike,
    all_cuts,
    all_variants,
    cuts_beside,
    kinds_of,
)
from strategies.corners import corners
from strategies.fitting import fittings, least_change, place
from strategies.known import Known
from strategies.placement_program import PlacementProgram, Solved

Objective = Literal["throughput", "latency"]

_AT_ONCE = 24
_MOST_LOOKED_AT, _MOST_IN_DOUBT = 3, 12
"""Of so many cuts at once, so many are looked at at most; and where bounds are poor."""
_RUNNERS_UP = 5
_STEPS_UP, _WALKS, _FEWER = 4, 2, 2
_REFINED = 4
"""Of the best so many are tried with deeper prefetch and with attention and MLP apart."""
_CLOSE = 1.25
"""Variants whose best is at most so many times the best of all are looked at closely; a bound so far off proves little."""
_FAR, _POOR = 1.15, 1.75
"""A policy so many times its bound leaves room for narrower slots; so many times, and bounds hardly tell cuts apart."""
_WIDE, _WIDEST = 0.1, 0.2
"""Share of the device's memory from which on slots are wide: where the disk is used, and where it is not."""
_MOST_CHOSEN = 0.9
"""Share of the experts from which on it is not worth waiting for a step's choice."""
_WORTH = 0.005
"""A relative gain that is not worth looking for."""
_NARROWER = ((1, False), (1, True), (0, True))
"""Loads ahead, and attention and MLP apart: what is tried in turn until something fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to.

    Args:
        runners_up: other cuts that were simulated, the best first.
        bound_s: no placement of the cuts searched takes less, by the program's relaxation: of all cuts with the slots
            of the first prefetch that fits, of the best ones (of all where the disk is used meanwhile) with smaller slots too.
        cuts: how many cuts there are; `simulated` policies were looked at in full.
    """

    best: Candidate
    runners_up: tuple[Candidate, ...]
    bound_s: float
    cuts: int
    simulated: int

    @property
    def gap(self) -> float:
        """How much slower than the bound the best is, as a share of the bound: 0 is proven best."""
        return max(0.0, self.best.seconds / self.bound_s - 1)


def find_policy(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    limits: Limits,
    *,
    dtype_bytes: int,
    batch_size: int,
    objective: Objective = "throughput",
    pin_weight: bool = True,
    allow_lossy: bool = False,
    least_bits: int = 4,
) -> Found:
    """The policy that the cost model says is fastest for this workload's requests.

    Args:
        batch_size: sequences served at once when the objective is latency; throughput may cut as it likes.
        allow_lossy: weights and KV may be compressed, to `least_bits`.

    Raises:
        PlanInfeasible: nothing fits; names the least change that would.
    """
    times = layer_times_for(spec, profile.layers)
    if times is None:
        raise PlanInfeasible(
            "no layer of any model was timed on the machine, so that nothing can be predicted; use -s flexgen"
        )
    wanted = min(batch_size, workload.num_sequences) if objective == "latency" else None
    known, searches = Known(profile), list[_Search]()
    for depth, sep_layer in _NARROWER:
        of_depth = [
            _Search(
                PlacementProgram(
                    spec,
                    profile,
                    times,
                    workload,
                    limits,
                    dtype_bytes,
                    pin_weight=pin_weight,
                    depth=depth,
                    sep_layer=sep_layer,
                    variant=variant,
                ),
                known,
            )
            for variant in all_variants(spec, profile, times, least_bits if allow_lossy else None)
        ]
        # What is found under one variant spares the next whatever cannot be better.
        for search in of_depth:
            search.run(wanted)
        searches += of_depth
        if known.looked_at and not _cramped(searches, known):
            break
    if not known.looked_at:
        # The one that needs the least memory is the last that might have fitted.
        raise PlanInfeasible(least_change(of_depth[0].program, wanted))
    return _best_of(searches, known, wanted)


def _closest(searches: "Sequence[_Search]") -> Iterator["_Search"]:
    """Of each variant the search with slots as its best policy has them, else the last one."""
    for variant in dict.fromkeys(search.program.variant for search in searches):
        same = [search for search in searches if search.program.variant == variant]
        found = (each for each in same[-1]._mine() if isinstance(each, Candidate))
        best = min(found, key=seconds_of, default=None)
        slots = best and (best.policy.overlap, best.policy.sep_layer)
        alike = (each for each in same if (each.program.depth, each.program.sep_layer) == slots)
        yield next(alike, same[-1])


def _cramped(searches: "Sequence[_Search]", known: Known) -> bool:
    """Whether slots take much of the device and a bound is far: with smaller slots more may fit, or without the disk."""
    best = min(known.found, key=seconds_of)
    least = _WIDE if best.placement.disk_bytes else _WIDEST
    wide = _slot_share(best.placement, searches[0].program.limits) > least
    far = best.seconds > _FAR * min(each.bound_s for each in searches)
    return wide and far


def _slot_share(placement: PlacementPlan, limits: Limits) -> float:
    """The share of the device's memory that slots take."""
    return placement.slot_bytes / (limits.gpu_bytes or placement.gpu_bytes)


def _best_of(searches: "Sequence[_Search]", known: Known, wanted: int | None) -> Found:
    """The best of all variants, after a closer look around those that came near it."""
    near_s = _CLOSE * min(map(seconds_of, known.found))
    for search in _closest(searches):
        mine = search._mine()
        # What is simulated already mostly answers this.
        if any(each.seconds <= near_s for each in mine if isinstance(each, Candidate)) or any(
            each.seconds <= near_s for each in islice(known.in_order(mine, seconds_of), 1)
        ):
            search.look_around(wanted)
    best, best_s = min(known.found, key=with_preference), min(map(seconds_of, known.found))
    others = sorted((each for each in known.found if each is not best), key=seconds_of)
    return Found(
        best=best,
        runners_up=tuple(islice(distinct(others), _RUNNERS_UP)),
        # Cuts that were passed over may be better than what was found by what is not worth looking for.
        bound_s=min(best_s, *(each.bound_s for each in searches)) / (1 + _WORTH),
        cuts=sum(each.num_cuts for each in searches),
        simulated=known.simulated,
    )


class _Search:
    """The search of one variant.

    Args:
        known: the candidates known so far, of this variant and of others.
    """

    def __init__(self, program: PlacementProgram, known: Known) -> None:
        self.program, self.known = program, known
        self.bound_s, self.num_cuts = float("inf"), 0

    def run(self, wanted: int | None) -> None:
        """Adds the best policies; with `wanted`, of those that serve blocks of so many."""
        cuts = self._all_cuts(wanted)
        self.num_cuts = len(cuts)
        for kind in kinds_of(self.program.variant):
            # Some at a time: what is found early spares the rest.
            for start in range(0, len(cuts), _AT_ONCE):
                some = cuts[start : start + _AT_ONCE]
                self._look_at(self._by_bound(some, kind), most=_MOST_LOOKED_AT)

    def look_around(self, wanted: int | None) -> None:
        """Adds what is near the best: other cuts beside it, deeper prefetch, attention and MLP apart."""
        self._climb(self._all_cuts(wanted))
        self._refine()

    def _all_cuts(self, wanted: int | None) -> list[Cut]:
        program, workload = self.program, self.program.workload
        cuts = all_cuts(workload, wanted, capped=program.limits.gpu_bytes is not None)
        if program.variant.chosen_experts:
            cuts = (
                cut
                for cut in cuts
                if program.expert_share(min(cut.size * cut.count, workload.num_sequences)) < _MOST_CHOSEN
            )
        return sorted(cuts, key=program.cheap_bound)

    def _mine(self) -> list[Candidate | Outline]:
        return [each for each in self.known.looked_at if Variant.of(each.policy) == self.program.variant]

    def _best_s(self) -> float:
        """What a policy of this variant must be faster than; where less is lost than by the best it may be a little slower."""
        mine = lossy_odd(self.program.variant)
        return min(
            (each.seconds * (1 + max(0.0, lossy_odd(each.policy) - mine)) for each in self.known.found),
            default=float("inf"),
        )

    def _by_bound(self, cuts: Sequence[Cut], kind: Kind) -> Iterator[Solved]:
        """The cuts' best shares, the lowest bound first, while they may be better than the best.

        Only what must be is solved: most are seen to come later by bounds that take nothing to solve.
        """
        program, results = self.program, dict[int, Solved]()
        waiting = [(program.cheap_bound(cut), index) for index, cut in enumerate(cuts)]
        heapq.heapify(waiting)
        while waiting:
            bound_s, index = heapq.heappop(waiting)
            if not self._hopeful(bound_s):
                return
            if index in results:
                yield results[index]
                continue
            # What was solved meanwhile may have shown more.
            least_s = program.at_least(cuts[index], kind)
            if waiting and least_s > max(bound_s, waiting[0][0]):
                heapq.heappush(waiting, (least_s, index))
            elif self._hopeful(least_s) and (solved := program.solve(cuts[index], kind)) is not None:
                results[index] = solved
                heapq.heappush(waiting, (solved.bound_s, index))

    def _hopeful(self, bound_s: float, slack: float = 0.0) -> bool:
        """Whether a bound leaves room for something better than the best, or no more than `slack` worse."""
        return bound_s * (1 + _WORTH) < self._best_s() * (1 + slack)

    def _look_at(
        self, solved: Iterable[Solved], *, most: int, slack: float = 0.0
    ) -> list[Candidate | Outline]:
        """Prices what its bound says may be better than the best, or no more than `slack` worse."""
        looked_at, beside = list[Candidate | Outline](), list[Candidate | Outline]()
        for each in solved:
            self.bound_s = min(self.bound_s, each.bound_s)
            if not self._hopeful(each.bound_s, slack):
                continue
            if (best := self._fitted(each)) is not None:
                looked_at.append(best)
            # Corners may fit where it does not.
            fitted = (self._fitted(corner) for corner in corners(self.program, each))
            beside += filter(None, fitted)
            # A bound far below all that was found says little about which cut is best.
            in_doubt = self._best_s() > _POOR * each.bound_s
            if len(looked_at) >= (max(most, _MOST_IN_DOUBT) if in_doubt else most):
                break
        return looked_at + beside

    def _fitted(self, solved: Solved) -> Candidate | Outline | None:
        """The best policy that a cut's shares come to, priced; None if all are known already or do not fit."""
        new = (each for each in fittings(self.program, solved) if self._is_new(each[0]))
        return min((self._priced(*each, cut=solved.cut) for each in new), key=seconds_of, default=None)

    def _is_new(self, policy: Policy) -> bool:
        """Whether it was not looked at: other variants, kinds and chunks may come to it too."""
        return all(policy != known.policy for known in self.known.looked_at)

    def _climb(self, cuts: Sequence[Cut]) -> None:
        """Walks to cuts beside while they are better: what bounds cannot tell apart, simulation can."""
        tried = {each.cut for each in self._mine()}
        for start in self._starts():
            best = start
            for _ in range(_STEPS_UP):
                beside = [cut for cut in cuts_beside(best.cut, cuts) if cut not in tried]
                tried |= set(beside)
                kind = kind_of(best)
                looked_at = self._look_at(self._by_bound(beside, kind), most=len(beside))
                if best.placement.attends_on_host:
                    priced = {each.cut for each in looked_at}
                    fewer = [cut for cut in beside if cut.count < best.cut.count and cut not in priced]
                    slack = QUERY_ODD * best.cut.count
                    solved = (
                        self.program.solve(cut, kind)
                        for cut in sorted(fewer, key=lambda cut: cut.count)
                        if self._hopeful(self.program.at_least(cut, kind), slack)
                    )
                    looked_at += self._look_at(filter(None, solved), most=_FEWER, slack=slack)
                reached = next(self.known.in_order([best, *looked_at], with_preference))
                if reached is best:
                    break
                best = reached

    def _starts(self) -> list[Candidate]:
        """The best candidates whose blocks differ: a walk does not leave its block's neighbourhood."""
        starts: list[Candidate] = []
        mine = self._mine()
        while mine and len(starts) < _WALKS:
            start = next(self.known.in_order(mine, with_preference))
            starts.append(start)
            block = start.cut.size * start.cut.count
            mine = [each for each in mine if not alike(each.cut.size * each.cut.count, block)]
        return starts

    def _refine(self) -> None:
        """The best with deeper prefetch, and with attention and MLP apart; where slots are wide, placed anew with others."""
        for near in self._best_few():
            for policy in (replace(near.policy, overlap=2), replace(near.policy, sep_layer=True)):
                placement = place(self.program, policy)
                if self._is_new(policy) and self.program.limits.fits(placement):
                    self._priced(policy, placement, cut=near.cut)
            if _slot_share(near.placement, self.program.limits) > _WIDE:
                self._narrow(near)

    def _best_few(self) -> list[Candidate]:
        """The preferred ones; and the fastest that leave their hidden states where the preferred one does."""
        mine = self._mine()
        few = list(islice(self.known.in_order(mine, with_preference), _REFINED))
        hidden = [kind_of(each).hidden_elsewhere for each in few[:1]]
        plain = [each for each in self._mine() if [kind_of(each).hidden_elsewhere] == hidden]
        fastest = islice(self.known.in_order(plain, seconds_of), _REFINED)
        return few + [each for each in fastest if all(each is not other for other in few)]

    def _narrow(self, near: Candidate) -> None:
        for depth, sep_layer in _NARROWER:
            if (depth, not sep_layer) >= (near.policy.overlap, not near.policy.sep_layer):
                continue
            search = _Search(self.program.replaced(depth=depth, sep_layer=sep_layer), self.known)
            if (solved := search.program.solve(near.cut, kind_of(near))) is not None:
                search._look_at([solved], most=1)
            self.bound_s = min(self.bound_s, search.bound_s)

    def _priced(self, policy: Policy, placement: PlacementPlan, *, cut: Cut) -> Candidate | Outline:
        least_s = least_seconds(placement, self.program.profile)
        return self.known.add(Outline(policy=policy, placement=placement, cut=cut, seconds=least_s))
