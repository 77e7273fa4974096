"""The policy search: the fastest policy for a workload, and how far from the best it can be.

The integer choices (micro-batch, number of micro-batches, positions of prefill at once) are enumerated; for each the shares
are a linear program (placement_program.py), whose optimum bounds what the simulation of the engine's schedule can
say. Cuts are taken in the order of a cheap bound, solved while that is below the best so far, and the most
promising of them simulated. Pure: looks at no machine, loads nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flexllmgen.errors import PlanInfeasible
from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import gib
from flexllmgen.workload import Workload
from flexllmgen.workspace import CHUNK_TOKENS
from profiling.cost_model import CostEstimate, engine_cost
from profiling.layer_times import LayerTimes, layer_times_for
from profiling.profile import HardwareProfile
from strategies.placement_program import (
    KINDS,
    A,
    Cut,
    K,
    Kind,
    Limits,
    PlacementProgram,
    Solved,
    Variant,
    W,
    X,
)

Objective = Literal["throughput", "latency"]

_MICRO_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_AT_ONCE = 24
_MAX_SIMULATED = 3
"""Of so many cuts at once, so many are simulated at most."""
_STEPS_UP, _WALKS, _FEWER = 4, 2, 2
_REFINED = 4
"""Of the best so many are tried with deeper prefetch and with attention and MLP apart."""
_CLOSE = 1.25
"""Variants whose best is at most so many times the best of all are looked at closely."""
_REPAIRS = 24
_SPARE = 0.003
"""Share of the device's memory that is left free: measured peaks were up to so much above the planned."""
_WIDE = 0.1
"""Share of the device's memory from which on slots are wide."""
_ODD = 0.01
_HIDDEN_ODD = 0.1
_QUERY_ODD = 0.003
"""For each micro-batch that asks the CPU in a layer: on an H200 machine more of them ran ever slower than predicted."""
_LOSSY_ODD = 0.05
_MOST_CHOSEN = 0.9
"""Share of the experts from which on it is not worth waiting for a step's choice."""
_CRUMB = 5e-4
_WORTH = 0.005
"""A relative gain that is not worth looking for."""
_NARROWER = ((1, False), (1, True), (0, True))
"""Loads ahead, and attention and MLP apart: what is tried in turn until something fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A policy that was looked at in full."""

    policy: Policy
    placement: PlacementPlan
    cost: CostEstimate
    cut: Cut

    @property
    def seconds(self) -> float:
        return self.cost.prefill_s + self.cost.decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to.

    Args:
        runners_up: other cuts, the best first.
        bound_s: no placement of the cuts searched takes less, by the program's relaxation: of all cuts with the slots
            of the first prefetch that fits, of the best ones with smaller slots too.
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
    if limits.gpu_bytes is not None:
        limits = replace(limits, gpu_bytes=limits.gpu_bytes - int(_SPARE * limits.gpu_bytes))
    for depth, sep_layer in _NARROWER:
        found: list[Candidate] = []
        searches = [
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
                found,
            )
            for variant in _variants(spec, profile, times, least_bits if allow_lossy else None)
        ]
        # What is found under one variant spares the next whatever cannot be better.
        for search in searches:
            search.run(wanted)
        if found:
            return _best_of(searches, found, wanted)
    # The one that needs the least memory is the last that might have fitted.
    raise PlanInfeasible(searches[0].least_change(wanted))


def _variants(
    spec: ModelSpec, profile: HardwareProfile, times: LayerTimes, bits: int | None
) -> Iterator[Variant]:
    """What is searched; the ones that move least first, since what they come to rules out most of the others."""
    accelerated = profile.device != "cpu"
    for weight_bits in (bits, None) if bits else (None,):
        for kv_bits, cpu_attention in _kept_and_read(times, bits):
            # Without an accelerator the CPU attends anyway.
            if cpu_attention and not accelerated:
                continue
            # Experts by choice are for small blocks, and whole layers bound more of those.
            for chosen_experts in (False, True) if accelerated and spec.num_experts else (False,):
                yield Variant(
                    cpu_attention=cpu_attention,
                    weight_bits=weight_bits,
                    kv_bits=kv_bits,
                    chosen_experts=chosen_experts,
                )


def _kept_and_read(times: LayerTimes, bits: int | None) -> Iterator[tuple[int | None, bool]]:
    """Bits of the KV, and whether the CPU attends to what lies in host memory: as it is, or in 8 bits."""
    if bits:
        yield bits, False
        if times.cpu_attention_codes_bytes_per_s:
            yield 8, True
    yield None, True
    yield None, False


def _best_of(searches: "Sequence[_Search]", found: list[Candidate], wanted: int | None) -> Found:
    """The best of all variants, after a closer look around those that came near it."""
    best_s = min(each.seconds for each in found)
    for search in searches:
        mine = [each.seconds for each in search._mine()]
        if mine and min(mine) <= _CLOSE * best_s:
            search.look_around(wanted)
    best = min(found, key=_with_preference)
    others = sorted((each for each in found if each is not best), key=lambda each: each.seconds)
    return Found(
        best=best,
        runners_up=tuple(_distinct(others))[:5],
        # Cuts that were passed over may be better by what is not worth looking for.
        bound_s=min(each.bound_s for each in searches) / (1 + _WORTH),
        cuts=sum(each.num_cuts for each in searches),
        simulated=sum(each.simulated for each in searches),
    )


class _Search:
    """The search of one variant.

    Args:
        found: the candidates found so far, of this variant and of others.
    """

    def __init__(self, program: PlacementProgram, found: list[Candidate]) -> None:
        self.program, self.found = program, found
        self.bound_s, self.simulated, self.num_cuts = float("inf"), 0, 0

    def run(self, wanted: int | None) -> None:
        """Adds the best policies; with `wanted`, of those that serve blocks of so many."""
        cuts = self._all_cuts(wanted)
        self.num_cuts = len(cuts)
        for kind in self._kinds():
            # Some at a time: what is found early spares the rest.
            for start in range(0, len(cuts), _AT_ONCE):
                best_s = self._best_s()
                hopeful = [
                    cut
                    for cut in cuts[start : start + _AT_ONCE]
                    if self.program.cheap_bound(cut) * (1 + _WORTH) < best_s
                ]
                solved = [
                    each for each in (self.program.solve(cut, kind) for cut in hopeful) if each is not None
                ]
                self._simulate(sorted(solved, key=lambda each: each.bound_s), most=_MAX_SIMULATED)

    def _kinds(self) -> Iterator[Kind]:
        # Where the CPU attends, hidden states stay on the device.
        return (kind for kind in KINDS if not (kind.hidden_elsewhere and self.program.variant.cpu_attention))

    def look_around(self, wanted: int | None) -> None:
        """Adds what is near the best: other cuts beside it, deeper prefetch, attention and MLP apart."""
        self._climb(self._all_cuts(wanted))
        self._refine()

    def _all_cuts(self, wanted: int | None) -> list[Cut]:
        capped, workload = self.program.limits.gpu_bytes is not None, self.program.workload
        cuts = _cuts(workload, wanted, capped=capped)
        if self.program.variant.chosen_experts:
            cuts = (
                cut
                for cut in cuts
                if self.program.expert_share(min(cut.size * cut.count, workload.num_sequences)) < _MOST_CHOSEN
            )
        return sorted(cuts, key=self.program.cheap_bound)

    def _mine(self) -> list[Candidate]:
        return [each for each in self.found if Variant.of(each.policy) == self.program.variant]

    def _best_s(self) -> float:
        """What a policy of this variant must be faster than; where less is lost than by the best it may be a little slower."""
        mine = _lossy_odd(self.program.variant)
        return min(
            (
                each.seconds * (1 + max(0.0, _lossy_odd(Variant.of(each.policy)) - mine))
                for each in self.found
            ),
            default=float("inf"),
        )

    def _simulate(self, solved: Sequence[Solved], *, most: int, slack: float = 0.0) -> None:
        """Prices what its bound says may be better than the best, or no more than `slack` worse."""
        priced = 0
        for each in solved:
            self.bound_s = min(self.bound_s, each.bound_s)
            if priced == most or each.bound_s * (1 + _WORTH) >= self._best_s() * (1 + slack):
                continue
            fitting = self._fit(each)
            # Other variants, kinds and chunks may come to a policy that is known.
            if fitting is not None and all(fitting[0] != known.policy for known in self.found):
                priced += 1
                self.found.append(self._priced(*fitting, cut=each.cut))

    def _climb(self, cuts: Sequence[Cut]) -> None:
        """Walks to cuts beside while they are better: what bounds cannot tell apart, simulation can."""
        tried = {each.cut for each in self._mine()}
        for start in self._starts():
            best = start
            for _ in range(_STEPS_UP):
                beside = [cut for cut in _beside(best.cut, cuts) if cut not in tried]
                tried |= set(beside)
                kind = _kind_of(best)
                solved = [
                    each for each in (self.program.solve(cut, kind) for cut in beside) if each is not None
                ]
                known = len(self.found)
                self._simulate(sorted(solved, key=lambda each: each.bound_s), most=len(solved))
                if best.placement.attends_on_host:
                    priced = {each.cut for each in self.found[known:]}
                    fewer = [
                        each for each in solved if each.cut.count < best.cut.count and each.cut not in priced
                    ]
                    slack = _QUERY_ODD * best.cut.count
                    self._simulate(sorted(fewer, key=lambda each: each.cut.count), most=_FEWER, slack=slack)
                reached = min([best, *self.found[known:]], key=_with_preference)
                if reached is best:
                    break
                best = reached

    def _starts(self) -> list[Candidate]:
        """The best candidates whose blocks differ: a walk does not leave its block's neighbourhood."""
        starts: list[Candidate] = []
        for each in sorted(self._mine(), key=_with_preference):
            block = each.cut.size * each.cut.count
            if all(not _alike(block, other.cut.size * other.cut.count) for other in starts):
                starts.append(each)
        return starts[:_WALKS]

    def _refine(self) -> None:
        """The best with deeper prefetch, and with attention and MLP apart; where slots are wide, placed anew with others."""
        for near in sorted(self._mine(), key=lambda each: each.seconds)[:_REFINED]:
            for policy in (replace(near.policy, overlap=2), replace(near.policy, sep_layer=True)):
                placement = self._place(policy)
                if policy != near.policy and self.program.limits.fits(placement):
                    self.found.append(self._priced(policy, placement, cut=near.cut))
            if near.placement.slot_bytes > _WIDE * (
                self.program.limits.gpu_bytes or near.placement.gpu_bytes
            ):
                self._narrow(near)

    def _narrow(self, near: Candidate) -> None:
        for depth, sep_layer in _NARROWER:
            if (depth, not sep_layer) >= (near.policy.overlap, not near.policy.sep_layer):
                continue
            search = _Search(self._program(depth=depth, sep_layer=sep_layer), self.found)
            if (solved := search.program.solve(near.cut, _kind_of(near))) is not None:
                search._simulate([solved], most=1)
            self.simulated += search.simulated
            self.bound_s = min(self.bound_s, search.bound_s)

    def _program(
        self, *, limits: Limits | None = None, depth: int | None = None, sep_layer: bool | None = None
    ) -> PlacementProgram:
        """This search's program with something else in it."""
        mine = self.program
        return PlacementProgram(
            mine.spec,
            mine.profile,
            mine.times,
            mine.workload,
            mine.limits if limits is None else limits,
            mine.size,
            pin_weight=mine.pin_weight,
            depth=mine.depth if depth is None else depth,
            sep_layer=mine.sep_layer if sep_layer is None else sep_layer,
            variant=mine.variant,
        )

    def _fit(self, solved: Solved) -> tuple[Policy, PlacementPlan] | None:
        """The cut's shares as the engine would place them, moved down a tier until they fit."""
        cut, shares = solved.cut, list(solved.shares)
        for _ in range(_REPAIRS):
            gpu, cpu, disk = (shares[index] for index in K)
            inputs = shares[X] / (cpu + shares[X]) if shares[X] > _CRUMB else 0.0
            policy = replace(
                self.program.policy(cut.size, cut.count),
                weights=_placement(*(shares[index] for index in W)),
                kv_cache=_placement(gpu, cpu + shares[X], disk),
                activations=_placement(*(shares[index] for index in A)),
                recompute=_whole(inputs),
            )
            placement = self._place(policy)
            if policy.cpu_attention and not placement.attends_on_host:
                # Nothing is left for the CPU to attend to: plainly, it does not.
                policy = replace(policy, cpu_attention=False)
                placement = self._place(policy)
            if self.program.limits.fits(placement):
                return policy, placement
            if not self._move_down(shares, placement):
                return None
        return None

    def _place(self, policy: Policy) -> PlacementPlan:
        program = self.program
        return plan_placement(
            program.spec,
            policy,
            program.workload,
            program.size,
            in_place=program.on_cpu,
            gpu_cap_bytes=program.limits.gpu_bytes,
        )

    def _priced(self, policy: Policy, placement: PlacementPlan, *, cut: Cut) -> Candidate:
        self.simulated += 1
        cost = engine_cost(placement, self.program.profile)
        assert cost is not None
        return Candidate(policy=policy, placement=placement, cost=cost, cut=cut)

    def _move_down(self, shares: list[float], plan: PlacementPlan) -> bool:
        """Takes what is over a tier's limit one tier down; false if there is nothing left to move."""
        limits = self.program.limits
        host = plan.cpu_bytes + (plan.gpu_bytes if limits.shared else 0)
        over_host = host - limits.cpu_bytes
        if limits.gpu_bytes is not None and plan.gpu_bytes > limits.gpu_bytes:
            over, source, target = plan.gpu_bytes - limits.gpu_bytes, 0, 1
        elif over_host > 0:
            over, target = over_host, 2
            source = 0 if limits.shared and shares[W[0]] + shares[K[0]] > 0 else 1
        else:
            return False  # The disk: nothing is below it.
        for kind, total in (
            (W, plan.weights.total),
            (K, plan.kv_cache.total),
            ((K[0], X, K[2]), plan.kv_cache.total),
            (A, 0 if self.program.variant.cpu_attention else plan.activations.total),
        ):
            if total and shares[kind[source]] > 0:
                # A little more than is over: cuts are rounded, and slots grow with what is streamed.
                moved = min(shares[kind[source]], over * 1.05 / total + 1e-4)
                shares[kind[source]] -= moved
                shares[kind[target]] += moved
                return True
        return False

    def least_change(self, wanted: int | None) -> str:
        """What would make the smallest cut fit, for each tier that alone could."""
        program = self.program
        name = program.spec.name or program.spec.family
        if wanted is not None and self._smallest_fits(program.limits):
            return f"{name}: {wanted} sequences at a time do not fit; lower --batch-size, or --objective throughput"
        ways = []
        for tier, text in (
            ("gpu_bytes", "on the compute device" if program.on_cpu else "on the GPU"),
            ("cpu_bytes", "of memory" if program.limits.shared else "of host memory"),
            ("disk_bytes", "in the offload directory"),
        ):
            if (extra := self._extra_bytes(tier)) is not None:
                ways.append(f"{gib(extra)} more {text}")
        other = "a smaller model, a shorter --dtype or --input-len"
        return (
            f"no policy fits {name}, not even one sequence at a time; "
            f"it would with {', or with '.join([*ways, other])}"
        )

    def _extra_bytes(self, tier: str) -> int | None:
        """How much more of one tier alone lets the smallest cut fit, to about a hundredth; None if none does."""
        limit = getattr(self.program.limits, tier)
        if limit is None:
            return None

        def fits(extra: int) -> bool:
            return self._smallest_fits(replace(self.program.limits, **{tier: limit + extra}))

        least, most = 0, 2 * self.program.weights + (1 << 32)
        if not fits(most):
            return None
        while most - least > max(1 << 20, most // 100):
            middle = (least + most) // 2
            least, most = (least, middle) if fits(middle) else (middle, most)
        return most

    def _smallest_fits(self, limits: Limits) -> bool:
        """Whether one sequence at a time, in the smallest chunks, can be placed within these limits."""
        search, cut = _Search(self._program(limits=limits), []), Cut(size=1, count=1, chunk=CHUNK_TOKENS[-1])
        solved = (search.program.solve(cut, kind) for kind in search._kinds())
        return any(each is not None and search._fit(each) for each in solved)


def _kind_of(candidate: Candidate) -> Kind:
    plan = candidate.placement
    return Kind(disk=plan.disk_bytes > 0, hidden_elsewhere=plan.hidden_slots > 0)


def _beside(cut: Cut, cuts: Sequence[Cut]) -> list[Cut]:
    """Cuts of about the same block in other micro-batches, and the same with another chunk."""
    block, near = cut.size * cut.count, []
    for other in cuts:
        alike = _alike(other.size * other.count, block) and 0.4 <= other.size / cut.size <= 2.5
        if other != cut and alike and (other.chunk == cut.chunk or other.size == cut.size):
            near.append(other)
    return near


def _alike(block: int, other: int) -> bool:
    return 0.75 <= block / other <= 1.34


def _distinct(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
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


def _with_preference(candidate: Candidate) -> float:
    """Its seconds, and a little for each thing that can go wrong in ways that no model sees.

    Of policies that are as good as equal the plainest is taken.
    """
    policy, plan = candidate.policy, candidate.placement
    odd = _ODD * ((plan.disk_bytes > 0) + policy.sep_layer + (policy.overlap > 1) + plan.attends_on_host)
    odd += _ODD * (policy.chosen_experts + (policy.recompute > 0))
    odd += _QUERY_ODD * policy.num_micro_batches * plan.attends_on_host
    odd += _lossy_odd(Variant.of(policy))
    # Hidden states are small and wanted at once: behind the copies of weights they wait longer than predicted.
    return candidate.seconds * (1 + odd + _HIDDEN_ODD * (plan.hidden_slots > 0))


def _lossy_odd(variant: Variant) -> float:
    """A loss of precision must be worth it."""
    return _LOSSY_ODD * ((variant.weight_bits is not None) + (variant.kv_bits is not None))


def _cuts(workload: Workload, wanted: int | None, *, capped: bool) -> Iterator[Cut]:
    """The integer choices for a workload; with `wanted`, only blocks of so many sequences.

    Args:
        capped: the device's memory has a limit of its own; without one prefill is never cut smaller.
    """
    total = workload.num_sequences
    sizes = {size for size in _MICRO_BATCHES if size <= total}
    sizes |= {-(-total // count) for count in _COUNTS}
    if wanted is not None:
        sizes = {-(-wanted // count) for count in _COUNTS}
    for size in sorted(sizes):
        for count in _COUNTS:
            block = size * count
            # A last micro-batch may be ragged, but none may be empty; nor may a block be larger than wanted.
            if block - size >= total or (wanted is not None and min(block, total) != wanted):
                continue
            rows = size * workload.prompt_tokens
            # Of those that hold the whole micro-batch one is enough.
            smaller = [chunk for chunk in CHUNK_TOKENS if chunk < rows]
            whole = [chunk for chunk in CHUNK_TOKENS if chunk >= rows][-1:]
            for chunk in [*whole, *smaller] if capped else CHUNK_TOKENS[:1]:
                yield Cut(size=size, count=count, chunk=chunk)


def _whole(share: float) -> float:
    """A share without the crumbs of the solver."""
    share = round(share, 6)
    return 0.0 if share < _CRUMB else 1.0 if share > 1 - _CRUMB else share


def _placement(gpu: float, cpu: float, disk: float) -> Placement:
    gpu, cpu, disk = (max(0.0, round(share, 6)) for share in (gpu, cpu, disk))
    # Crumbs of the solver are no placement.
    gpu, cpu, disk = (0.0 if share < _CRUMB else share for share in (gpu, cpu, disk))
    total = gpu + cpu + disk
    gpu, cpu = gpu / total, cpu / total
    if not disk:
        return Placement(gpu=gpu, cpu=1 - gpu)
    return Placement(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu))
