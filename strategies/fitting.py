"""A program's shares as a policy that the engine would load; and where nothing fits, the least change that would."""

from collections.abc import Iterator
from dataclasses import replace

from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.units import gib
from flexllmgen.workspace import CHUNK_TOKENS, workspace_bytes
from strategies.choices import Cut, Limits, kinds_of
from strategies.placement_program import A, K, PlacementProgram, Solved, W, X

_REPAIRS = 24
_CRUMB = 5e-4


Fitting = tuple[Policy, PlacementPlan]


def fittings(program: PlacementProgram, solved: Solved) -> Iterator[Fitting]:
    """The cut's shares as the engine would place them, moved down a tier until they fit; none if they never do.

    As they are, and with room for the chunks of prompts that the cut counts on: the next smaller ones may take many times
    as long.
    """
    plain = _fit(program, solved, CHUNK_TOKENS[-1])
    if plain is not None:
        yield plain
    if plain is None or plain[1].chunk_tokens < solved.cut.chunk:
        roomy = _fit(program, solved, solved.cut.chunk)
        if roomy is not None:
            yield roomy


def _fit(program: PlacementProgram, solved: Solved, chunk: int) -> Fitting | None:
    cut, shares = solved.cut, list(solved.shares)
    for _ in range(_REPAIRS):
        gpu, cpu, disk = (shares[index] for index in K)
        inputs = shares[X] / (cpu + shares[X]) if shares[X] > _CRUMB else 0.0
        policy = replace(
            program.policy(cut.size, cut.count),
            weights=_placement(*(shares[index] for index in W)),
            kv_cache=_placement(gpu, cpu + shares[X], disk),
            activations=_placement(*(shares[index] for index in A)),
            recompute=_whole(inputs),
        )
        plan = place(program, policy)
        if policy.cpu_attention and not plan.attends_on_host:
            # Nothing is left for the CPU to attend to: plainly, it does not.
            policy = replace(policy, cpu_attention=False)
            plan = place(program, policy)
        more = _more_for(program, plan, chunk)
        if program.limits.fits(plan) and not more:
            return policy, plan
        if not _move_down(program, shares, plan, more):
            return None
    return None


def _more_for(program: PlacementProgram, plan: PlacementPlan, chunk: int) -> int:
    """Bytes of the device that a plan lacks to compute prompts in chunks of so many positions."""
    if plan.chunk_tokens >= chunk:
        return 0
    now, then = (
        workspace_bytes(plan.spec, plan.policy, plan.workload, program.size, tokens, not program.on_cpu)
        for tokens in (plan.chunk_tokens, chunk)
    )
    return max(1, then - now)


def place(program: PlacementProgram, policy: Policy) -> PlacementPlan:
    """A policy of the program as the engine would place it."""
    return plan_placement(
        program.spec,
        policy,
        program.workload,
        program.size,
        in_place=program.on_cpu,
        gpu_cap_bytes=program.limits.gpu_bytes,
    )


def _move_down(program: PlacementProgram, shares: list[float], plan: PlacementPlan, more: int) -> bool:
    """Takes what is over a tier's limit one tier down, with `more` on the device; false if there is nothing left to move."""
    limits = program.limits
    fillable, host = limits.fillable_gpu_bytes, plan.cpu_bytes + (plan.gpu_bytes if limits.shared else 0)
    over_host = host - limits.cpu_bytes
    if fillable is not None and plan.gpu_bytes + more > fillable:
        over, source, target = plan.gpu_bytes + more - fillable, 0, 1
    elif over_host > 0:
        over, target = over_host, 2
        source = 0 if limits.shared and shares[W[0]] + shares[K[0]] > 0 else 1
    else:
        return False  # The disk: nothing is below it.
    kv, hidden = plan.kv_cache.total, 0 if program.variant.cpu_attention else plan.activations.total
    kinds = ((W, plan.weights.total), (K, kv), ((K[0], X, K[2]), kv), (A, hidden))
    moves: list[tuple[int, int, float]] = [(kind[source], kind[target], total) for kind, total in kinds]
    if target == 2 and program.recompute and limits.disk_bytes < plan.disk_bytes + over:
        # There is no room below, but a layer's inputs take less of it than keys and values.
        moves.insert(0, (K[1], X, (1 - program.input_share) * kv))
    for giver, taker, freed in moves:
        if freed and shares[giver] > 0:
            # A little more than is over: cuts are rounded, and slots grow with what is streamed.
            moved = min(shares[giver], over * 1.05 / freed + 1e-4)
            shares[giver] -= moved
            shares[taker] += moved
            return True
    return False


def least_change(program: PlacementProgram, wanted: int | None) -> str:
    """What would make the smallest cut fit, for each tier that alone could, as the message to a user.

    Args:
        wanted: sequences that were to be served at once; None where that was free.
    """
    name = program.spec.name or program.spec.family
    if wanted is not None and _smallest_fits(program, program.limits):
        return (
            f"{name}: {wanted} sequences at a time do not fit; lower --batch-size, or --objective throughput"
        )
    ways = []
    for tier, text in (
        ("gpu_bytes", "on the compute device" if program.on_cpu else "on the GPU"),
        ("cpu_bytes", "of memory" if program.limits.shared else "of host memory"),
        ("disk_bytes", "in the offload directory"),
    ):
        if (extra := _extra_bytes(program, tier)) is not None:
            ways.append(f"{gib(extra)} more {text}")
    shorter = "--dtype float16 or bfloat16" if program.size > 2 else "a shorter --input-len"
    other = f"a smaller model or {shorter}"
    return (
        f"no policy fits {name}, not even one sequence at a time; "
        f"it would with {', or with '.join([*ways, other])}"
    )


def _extra_bytes(program: PlacementProgram, tier: str) -> int | None:
    """How much more of one tier alone lets the smallest cut fit, and up to two hundredths above that; None if none does."""
    limit = getattr(program.limits, tier)
    if limit is None:
        return None

    def fits(extra: int) -> bool:
        return _smallest_fits(program, replace(program.limits, **{tier: limit + extra}))

    least, most = 0, 2 * program.weights + (1 << 32)
    if not fits(most):
        return None
    while most - least > max(1 << 20, most // 100):
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle, most)
    # It is told in few digits: rounded down it must still be enough.
    return most + max(1 << 16, most // 100)


def _smallest_fits(program: PlacementProgram, limits: Limits) -> bool:
    """Whether one sequence at a time, in the smallest chunks, can be placed within these limits."""
    within, cut = program.replaced(limits=limits), Cut(size=1, count=1, chunk=CHUNK_TOKENS[-1])
    solved = (within.solve(cut, kind) for kind in kinds_of(program.variant))
    return any(each is not None and any(fittings(within, each)) for each in solved)


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
