"""The policy search: the fastest placement for every cut into micro-batches, and how far from the best it can be.

For a fixed cut (micro-batch, number of micro-batches, loads ahead, positions of prefill at once) the shares of weights, KV
cache and activations on each tier are a linear program (FlexGen, Sheng et al. 2023, section 4.3): every resource's
seconds and every tier's bytes are linear in them. HiGHS solves it. Its objective is what the cut would take if nothing
ever waited, so that it bounds what the simulation of the engine's schedule says; cuts are simulated in the order
of their bounds until none left could be better. Pure: looks at no machine, loads nothing.
"""

# W bytes of weights  K bytes of KV of a block  A bytes of hidden states of a block

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.optimize import linprog

from flexllmgen.errors import PlanInfeasible
from flexllmgen.placement import PlacementPlan, plan_placement, round_up, workspace_bytes
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import gib
from flexllmgen.workload import Workload
from profiling.cost_model import CostEstimate, engine_cost
from profiling.layer_times import LayerTimes, layer_times_for
from profiling.profile import HardwareProfile

Objective = Literal["throughput", "latency"]

_MICRO_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_DEPTH = 1
_CHUNKS = (8192, 2048, 1)
_AT_ONCE = 24
_MAX_SIMULATED = 3
"""Of so many cuts at once, so many are simulated at most."""
_REFINED = 2
"""Of the best so many are tried with deeper prefetch and with attention and MLP apart."""
_REPAIRS = 24
_ODD = 0.01
_HIDDEN_ODD = 0.1
_WORTH = 0.005
"""A relative gain that is not worth looking for."""
_CRUMB = 1e-4
"""Relative price of a share off the device, so that of equal solutions the nearest to it is taken."""
# Where each share stands among the program's variables. Last come the seconds of a prompt's pass and of a step, of a full
# block and of the ragged one at the end.
_W, _K, _A = (0, 1, 2), (3, 4, 5), (6, 7, 8)
_FULL, _RAGGED, _SIZE = (9, 10), (11, 12), 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes that a policy may take. With `shared` the first two tiers lie in the same memory of `cpu_bytes`.

    `gpu_bytes` is None where only that memory sets a limit.
    """

    gpu_bytes: int | None
    cpu_bytes: int
    disk_bytes: int
    shared: bool = False

    def fits(self, plan: PlacementPlan) -> bool:
        """Whether the engine would load this placement."""
        host = plan.cpu_bytes + (plan.gpu_bytes if self.shared else 0)
        return (
            (self.gpu_bytes is None or plan.gpu_bytes <= self.gpu_bytes)
            and host <= self.cpu_bytes
            and plan.disk_bytes <= self.disk_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A policy that was looked at in full."""

    policy: Policy
    placement: PlacementPlan
    cost: CostEstimate

    @property
    def seconds(self) -> float:
        return self.cost.prefill_s + self.cost.decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to.

    Args:
        runners_up: other cuts, the best first.
        bound_s: no policy of the search space takes less, by the program's relaxation.
        cuts: how many cuts were solved; `simulated` of them in full.
    """

    best: Candidate
    runners_up: tuple[Candidate, ...]
    bound_s: float
    cuts: int
    simulated: int

    @property
    def gap(self) -> float:
        """How much slower than the bound the best is, as a share of the bound: 0 is proven best."""
        return self.best.seconds / self.bound_s - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """The integer choices."""

    size: int
    count: int
    chunk: int


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a program may use beside the two memories."""

    disk: bool
    hidden_elsewhere: bool


# The plain kinds first: what they come to rules most of the others out.
_KINDS = (_Kind(False, False), _Kind(False, True), _Kind(True, False), _Kind(True, True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Solved:
    cut: _Cut
    bound_s: float
    shares: tuple[float, ...]


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
) -> Found:
    """The policy that the cost model says is fastest for this workload's requests.

    Args:
        batch_size: sequences served at once when the objective is latency; throughput may cut as it likes.

    Raises:
        PlanInfeasible: nothing fits; names the least change that would.
    """
    times = layer_times_for(spec, profile.layers)
    if times is None:
        raise PlanInfeasible("the hardware profile has no layer times; measure one with `harness profile`")
    problem = _Problem(spec, profile, times, workload, limits, dtype_bytes)
    wanted = min(batch_size, workload.num_sequences) if objective == "latency" else None
    cuts = sorted(_cuts(workload, wanted), key=problem.cheap_bound)
    found: list[Candidate] = []
    bound_s, simulated = float("inf"), 0
    for kind in _KINDS:
        # In the order of a bound that costs nothing, some at a time: what is found early spares the rest.
        for start in range(0, len(cuts), _AT_ONCE):
            best_s = min((each.seconds for each in found), default=float("inf"))
            hopeful = [
                cut
                for cut in cuts[start : start + _AT_ONCE]
                if problem.cheap_bound(cut) * (1 + _WORTH) < best_s
            ]
            solved = [each for each in (problem.solve(cut, kind) for cut in hopeful) if each is not None]
            solved.sort(key=lambda each: each.bound_s)
            bound_s = min([bound_s, *(each.bound_s for each in solved)])
            priced = 0
            for each in solved:
                best_s = min((other.seconds for other in found), default=float("inf"))
                if priced == _MAX_SIMULATED or each.bound_s * (1 + _WORTH) >= best_s:
                    break
                if (candidate := problem.realise(each, pin_weight=pin_weight)) is not None:
                    priced += 1
                    found.append(candidate)
            simulated += priced
    if not found:
        raise PlanInfeasible(problem.least_change())
    found.sort(key=lambda each: each.seconds)
    for near in found[:_REFINED]:
        for policy in (replace(near.policy, overlap=2), replace(near.policy, sep_layer=True)):
            simulated += 1
            if (candidate := problem.evaluate(policy)) is not None:
                found.append(candidate)
    best = min(found, key=_with_preference)
    others = _distinct(sorted((each for each in found if each is not best), key=lambda each: each.seconds))
    return Found(
        best=best,
        runners_up=tuple(others)[:5],
        bound_s=min(bound_s, best.seconds),
        cuts=len(cuts),
        simulated=simulated,
    )


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
    odd = _ODD * ((plan.disk_bytes > 0) + policy.sep_layer + (policy.overlap > 1))
    # Hidden states are small and wanted at once: behind the copies of weights they wait longer than predicted.
    return candidate.seconds * (1 + odd + _HIDDEN_ODD * (plan.hidden_slots > 0))


def _cuts(workload: Workload, wanted: int | None) -> Iterator[_Cut]:
    """The integer choices for a workload; with `wanted`, only blocks of so many sequences."""
    total = workload.num_sequences
    sizes = {size for size in _MICRO_BATCHES if size <= total}
    sizes |= {-(-total // count) for count in _COUNTS}
    if wanted is not None:
        sizes = {-(-wanted // count) for count in _COUNTS if count <= wanted}
    for size in sorted(sizes):
        for count in _COUNTS:
            block = size * count
            # A last micro-batch may be ragged, but none may be empty.
            if block - size >= total or (wanted is not None and not block - size < wanted <= block):
                continue
            chunks = [chunk for chunk in _CHUNKS if chunk < size * workload.prompt_tokens]
            # One that holds the whole micro-batch is enough.
            whole = [_CHUNKS[0]] if len(chunks) < len(_CHUNKS) else []
            for chunk in dict.fromkeys([*whole, *chunks]):
                yield _Cut(size=size, count=count, chunk=chunk)


class _Problem:
    """Everything about a search but the cut."""

    def __init__(
        self,
        spec: ModelSpec,
        profile: HardwareProfile,
        times: LayerTimes,
        workload: Workload,
        limits: Limits,
        dtype_bytes: int,
    ) -> None:
        self.spec, self.profile, self.times = spec, profile, times
        self.workload, self.limits, self.size = workload, limits, dtype_bytes
        self.rates = profile.typical
        self.on_cpu = profile.device == "cpu"
        self.weights = spec.weight_bytes(dtype_bytes)
        self.layer = spec.layer_weight_bytes(dtype_bytes)
        # The head is streamed like a layer; an embedding of its own is read by rows where it lies.
        streamable = self.layer * spec.num_layers + spec.vocab_size * spec.embed_size * dtype_bytes
        self.rest = max(0, self.weights - streamable)
        self._cheap: dict[_Cut, float] = {}

    def cheap_bound(self, cut: _Cut) -> float:
        """Seconds that this cut takes at least, without solving anything: compute, and what no memory can hold."""
        if cut not in self._cheap:
            steps = self.workload.gen_tokens - 1
            self._cheap[cut] = 0.0
            for count, block, _ in self._blocks(cut):
                compute, fetched = self._compute(cut, block), self._fetched(block)
                prompt_s, step_s = (max(pair) for pair in zip(compute, fetched, strict=True))
                self._cheap[cut] += count * (prompt_s + steps * step_s)
        return self._cheap[cut]

    def _fetched(self, block: int) -> tuple[float, float]:
        """Seconds to bring in what a memory cannot hold: a pass reads all weights, and a step the KV of its block."""
        workload, limits = self.workload, self.limits
        weights = self.weights - self.rest
        context = workload.prompt_tokens + workload.gen_tokens // 2
        needed = weights + block * self.spec.kv_bytes(context, self.size)
        held = limits.cpu_bytes + (0 if limits.shared else limits.gpu_bytes or 0)
        sources = [(self.rates.disk_read_bytes_per_s, held)]
        if not self.on_cpu and self.rates.h2d_bytes_per_s and limits.gpu_bytes is not None:
            sources.append((self.rates.h2d_bytes_per_s, limits.gpu_bytes))
        return (
            max(0.0, *((weights - memory) / rate for rate, memory in sources)),
            max(0.0, *((needed - memory) / rate for rate, memory in sources)),
        )

    def solve(self, cut: _Cut, kind: _Kind) -> _Solved | None:
        """The best shares for a cut, as if nothing ever waited; None if it cannot fit."""
        rows, bounds = self._memory(cut)
        for row, bound in self._time(cut):
            rows.append(row)
            bounds.append(bound)
        objective = np.zeros(_SIZE)
        for count, _, (prefill, step) in self._blocks(cut):
            objective[prefill] = count
            objective[step] = count * (self.workload.gen_tokens - 1)
        crumb = _CRUMB * self.cheap_bound(cut)
        for index in (_W[1], _K[1], _A[1]):
            objective[index] = crumb
        for index in (_W[2], _K[2], _A[2]):
            objective[index] = 2 * crumb
        equal = np.zeros((3, _SIZE))
        for index, variables in enumerate((_W, _K, _A)):
            equal[index, list(variables)] = 1.0
        matrix, limit = np.array(rows), np.array(bounds)
        # Bytes beside seconds would be badly scaled.
        scale = np.maximum(np.abs(matrix).max(axis=1), 1e-30)
        most = [1.0] * 9
        if not kind.disk:
            most[_W[2]] = most[_K[2]] = most[_A[2]] = 0.0
        if not kind.hidden_elsewhere:
            most[_A[1]] = most[_A[2]] = 0.0
        result = linprog(
            objective,
            A_ub=matrix / scale[:, None],
            b_ub=limit / scale,
            A_eq=equal,
            b_eq=np.ones(3),
            bounds=[(0.0, each) for each in most] + [(0.0, None)] * (_SIZE - 9),
            method="highs",
        )
        if result.status != 0:
            return None
        return _Solved(
            cut=cut,
            bound_s=max(float(result.fun) - 6 * crumb, self.cheap_bound(cut)),
            shares=tuple(float(share) for share in result.x[:9]),
        )

    def realise(self, solved: _Solved, *, pin_weight: bool) -> Candidate | None:
        """What the engine would make of a cut's shares, and its simulated cost; None if they cannot be made to fit."""
        fitting = self._fit(solved, pin_weight=pin_weight)
        return None if fitting is None else self._priced(*fitting)

    def _fit(self, solved: _Solved, *, pin_weight: bool) -> tuple[Policy, PlacementPlan] | None:
        """The cut's shares as the engine would place them, moved down a tier until they fit."""
        cut, shares = solved.cut, list(solved.shares)
        for _ in range(_REPAIRS):
            policy = Policy(
                micro_batch_size=cut.size,
                num_micro_batches=cut.count,
                weights=_placement(shares, _W),
                kv_cache=_placement(shares, _K),
                activations=_placement(shares, _A),
                pin_weight=pin_weight,
                overlap=_DEPTH,
            )
            placement = self._place(policy)
            if self.limits.fits(placement):
                return policy, placement
            if not self._move_down(shares, placement):
                return None
        return None

    def evaluate(self, policy: Policy) -> Candidate | None:
        """A policy as it is, if it fits."""
        placement = self._place(policy)
        return self._priced(policy, placement) if self.limits.fits(placement) else None

    def _place(self, policy: Policy) -> PlacementPlan:
        return plan_placement(
            self.spec,
            policy,
            self.workload,
            self.size,
            in_place=self.on_cpu,
            gpu_cap_bytes=self.limits.gpu_bytes,
        )

    def _priced(self, policy: Policy, placement: PlacementPlan) -> Candidate:
        cost = engine_cost(placement, self.profile)
        assert cost is not None
        return Candidate(policy=policy, placement=placement, cost=cost)

    def _move_down(self, shares: list[float], plan: PlacementPlan) -> bool:
        """Takes what is over a tier's limit one tier down; false if there is nothing left to move."""
        limits = self.limits
        host = plan.cpu_bytes + (plan.gpu_bytes if limits.shared else 0)
        over_host = host - limits.cpu_bytes
        if limits.gpu_bytes is not None and plan.gpu_bytes > limits.gpu_bytes:
            over, source, target = plan.gpu_bytes - limits.gpu_bytes, 0, 1
        elif over_host > 0:
            over, target = over_host, 2
            source = 0 if limits.shared and shares[_W[0]] + shares[_K[0]] > 0 else 1
        else:
            return False  # The disk: nothing is below it.
        for kind, total in (
            (_W, plan.weights.total),
            (_K, plan.kv_cache.total),
            (_A, plan.activations.total),
        ):
            if total and shares[kind[source]] > 0:
                # A little more than is over: cuts are rounded, and slots grow with what is streamed.
                moved = min(shares[kind[source]], over * 1.05 / total + 1e-4)
                shares[kind[source]] -= moved
                shares[kind[target]] += moved
                return True
        return False

    def least_change(self) -> str:
        """What would make the smallest cut fit, for each tier that alone could."""
        shared = self.limits.shared
        ways = []
        for tier, name in (
            ("gpu_bytes", "on the compute device" if self.on_cpu else "on the GPU"),
            ("cpu_bytes", "of memory" if shared else "of host memory"),
            ("disk_bytes", "in the offload directory"),
        ):
            if (extra := self._extra_bytes(tier)) is not None:
                ways.append(f"{gib(extra)} more {name}")
        lead = f"no policy fits {self.spec.name or self.spec.family}, not even one sequence at a time"
        other = "a smaller model, a shorter --dtype or --input-len"
        return f"{lead}; it would with {', or with '.join([*ways, other])}"

    def _extra_bytes(self, tier: str) -> int | None:
        """How much more of one tier alone lets the smallest cut fit, to about a hundredth; None if none does."""
        limit = getattr(self.limits, tier)
        if limit is None:
            return None

        def fits(extra: int) -> bool:
            limits = replace(self.limits, **{tier: limit + extra})
            problem = _Problem(self.spec, self.profile, self.times, self.workload, limits, self.size)
            cut = _Cut(size=1, count=1, chunk=_CHUNKS[-1])
            solved = (problem.solve(cut, kind) for kind in _KINDS)
            return any(each is not None and problem._fit(each, pin_weight=True) for each in solved)

        most = 2 * self.weights + (1 << 32)
        if not fits(most):
            return None
        least = 0
        while most - least > max(1 << 20, most // 100):
            middle = (least + most) // 2
            least, most = (least, middle) if fits(middle) else (middle, most)
        return most

    # The program

    def _memory(self, cut: _Cut) -> tuple[list[np.ndarray], list[float]]:
        """Bytes of each tier, at most its limit. Less than the engine takes, never more: this bounds."""
        workload = self.workload
        block = min(cut.size * cut.count, workload.num_sequences)
        size = min(cut.size, workload.num_sequences)
        context = round_up(workload.max_context, 8)
        kv = block * self.spec.kv_bytes(context, self.size)
        kv_unit = size * self.spec.kv_bytes(context, self.size) / self.spec.num_layers
        hidden = block * self.spec.hidden_bytes(workload.prompt_tokens, self.size)
        policy = Policy(micro_batch_size=cut.size, num_micro_batches=cut.count, overlap=_DEPTH)
        work = workspace_bytes(
            self.spec, policy, workload, self.size, chunk_tokens=cut.chunk, accelerated=not self.on_cpu
        )
        slots = _DEPTH + 1
        gpu, cpu, disk = (np.zeros(_SIZE) for _ in range(3))
        for row, tier in ((gpu, 0), (cpu, 1), (disk, 2)):
            row[_W[tier]], row[_K[tier]], row[_A[tier]] = self.weights, kv, hidden
        rows, bounds = [], []
        if self.on_cpu:
            cpu[_W[2]] += slots * self.layer
            cpu[_K[2]] += slots * kv_unit
        else:
            for tier in (1, 2):
                gpu[_W[tier]] += slots * self.layer
                gpu[_K[tier]] += slots * kv_unit
            cpu[_W[2]] += slots * self.layer
            cpu[_K[2]] += slots * kv_unit
        if self.limits.gpu_bytes is not None:
            rows.append(gpu)
            bounds.append(self.limits.gpu_bytes - work)
        rows.append(cpu + gpu if self.limits.shared else cpu)
        bounds.append(self.limits.cpu_bytes - (work if self.limits.shared else 0))
        rows.append(disk)
        bounds.append(self.limits.disk_bytes)
        return rows, [float(bound) for bound in bounds]

    def _blocks(self, cut: _Cut) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """How many blocks there are, of how many sequences, and the variables of their two passes."""
        full, ragged = divmod(self.workload.num_sequences, cut.size * cut.count)
        if full:
            yield full, cut.size * cut.count, _FULL
        if ragged:
            yield 1, ragged, _RAGGED

    def _time(self, cut: _Cut) -> Iterator[tuple[np.ndarray, float]]:
        """Each resource's seconds, at most those of its pass."""
        for _, block, variables in self._blocks(cut):
            yield from self._block_time(cut, block, variables)

    def _block_time(
        self, cut: _Cut, block: int, variables: tuple[int, int]
    ) -> Iterator[tuple[np.ndarray, float]]:
        workload, spec, rates = self.workload, self.spec, self.rates
        compute = self._compute(cut, block)
        prompt = workload.prompt_tokens
        context = prompt + workload.gen_tokens / 2
        token_kv = block * spec.kv_bytes(1, self.size)
        passes = ((0.0, prompt, prompt), (context - 1, 1, 1))
        for variable, busy, (read, written, columns) in zip(variables, compute, passes, strict=True):
            hidden = 2 * (spec.num_layers + 1) * block * spec.hidden_bytes(columns, self.size)
            yield self._at_most(variable, {}, busy)
            if not self.on_cpu and rates.h2d_bytes_per_s and rates.d2h_bytes_per_s:
                up = 1 / rates.h2d_bytes_per_s
                loads = {}
                for tier in (1, 2):
                    loads[_W[tier]] = self.weights * up
                    loads[_K[tier]] = token_kv * read * up
                    loads[_A[tier]] = hidden / 2 * up
                # What of the weights is never streamed takes host memory first.
                yield self._at_most(variable, loads, -self.rest * up)
                down = 1 / rates.d2h_bytes_per_s
                stores = {}
                for tier in (1, 2):
                    stores[_K[tier]] = token_kv * written * down
                    stores[_A[tier]] = hidden / 2 * down
                yield self._at_most(variable, stores, 0.0)
            from_disk, to_disk = 1 / rates.disk_read_bytes_per_s, 1 / rates.disk_write_bytes_per_s
            yield self._at_most(
                variable,
                {
                    _W[2]: self.weights * from_disk,
                    _K[2]: token_kv * (read * from_disk + written * to_disk),
                    _A[2]: hidden / 2 * (from_disk + to_disk),
                },
                0.0,
            )

    def _compute(self, cut: _Cut, block: int) -> tuple[float, float]:
        """Seconds that the compute device needs for a block's prompts, and for a step in the middle."""
        workload, layers, times = self.workload, self.spec.num_layers, self.times
        context = workload.prompt_tokens + workload.gen_tokens // 2
        prompt_s = step_s = 0.0
        whole, rest = divmod(block, cut.size)
        for count, size in ((whole, cut.size), (1, rest)):
            if not count or not size:
                continue
            head_s, chunks = times.head_s(size), -(-size // max(1, cut.chunk // workload.prompt_tokens))
            mine, issue_s = self._prompt_s(cut, size), layers * (times.issue_s + chunks * times.chunk_issue_s)
            # On an accelerator issued beside the device's work. A step may be recorded, and then costs nothing.
            mine = mine + issue_s if self.on_cpu else max(mine, issue_s)
            step = layers * (times.step_s("layer", size, context) + (times.issue_s if self.on_cpu else 0.0))
            prompt_s, step_s = prompt_s + count * (mine + head_s), step_s + count * (step + head_s)
        return prompt_s, step_s

    def _prompt_s(self, cut: _Cut, size: int) -> float:
        prompt = self.workload.prompt_tokens
        at_once = max(1, cut.chunk // prompt)
        seconds = 0.0
        for start in range(0, size, at_once):
            rows = min(at_once, size - start) * prompt
            seconds += self.times.prompt_s("layer", rows, prompt)
        return seconds * self.spec.num_layers

    def _at_most(self, variable: int, shares: dict[int, float], constant: float) -> tuple[np.ndarray, float]:
        """constant + sum of shares' seconds <= the pass's seconds, as a row of the program."""
        row = np.zeros(_SIZE)
        for index, seconds in shares.items():
            row[index] = seconds
        row[variable] = -1.0
        return row, -constant


def _placement(shares: Sequence[float], kind: tuple[int, int, int]) -> Placement:
    gpu, cpu, disk = (max(0.0, round(shares[index], 6)) for index in kind)
    # Crumbs of the solver are no placement.
    gpu, cpu, disk = (0.0 if share < 5e-4 else share for share in (gpu, cpu, disk))
    total = gpu + cpu + disk
    gpu, cpu = gpu / total, cpu / total
    if not disk:
        return Placement(gpu=gpu, cpu=1 - gpu)
    return Placement(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu))
