"""What spares a search work: bounds without solving, and policies that are not simulated. None of it changes what is found."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB
from flexllmgen.workload import Workload
from profiling.cost_model import engine_cost
from profiling.layer_times import layer_times_for
from profiling.profile import HardwareProfile
from strategies import search
from strategies.candidates import with_preference
from strategies.choices import KINDS, Cut, Limits, Variant, all_cuts, kinds_of
from strategies.placement_program import PlacementProgram

sys.path.append(str(Path(__file__).parents[1] / "profiling"))
from machines import machine

OPT_30B = ModelSpec.from_hf_config(published_config("opt-30b"), "opt-30b")
WORKLOAD = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=16)
LIMITS = Limits(gpu_bytes=16 * GiB, cpu_bytes=70 * GiB, disk_bytes=200 * GiB)
ATTENDS = {"cpu_attention_bytes_per_s": 9e10, "cpu_attention_under_copies_bytes_per_s": 5e10}
PROFILE = machine(OPT_30B, **ATTENDS)


def program_of(
    variant: Variant,
    *,
    depth: int = 1,
    workload: Workload = WORKLOAD,
    profile: HardwareProfile = PROFILE,
    pin_weight: bool = True,
    limits: Limits = LIMITS,
) -> PlacementProgram:
    times = layer_times_for(OPT_30B, profile.layers)
    assert times is not None
    return PlacementProgram(
        OPT_30B, profile, times, workload, limits, 2, variant=variant, depth=depth, pin_weight=pin_weight
    )


@pytest.mark.parametrize("variant", [Variant(), Variant(cpu_attention=True), Variant(kv_bits=4)])
def test_no_solution_is_below_what_others_have_shown(variant: Variant) -> None:
    program, fresh = program_of(variant), program_of(variant)
    cuts = sorted(all_cuts(WORKLOAD, None, capped=True), key=program.cheap_bound)[::9]
    told = 0
    for kind in kinds_of(variant):
        for cut in cuts:
            least_s, solved = program.at_least(cut, kind), fresh.solve(cut, kind)
            if solved is None:
                continue
            assert least_s <= solved.bound_s
            told += least_s > 1.001 * program.cheap_bound(cut)
            program.solve(cut, kind)
    assert told > len(cuts)


def test_what_can_nowhere_lie_is_not_solved() -> None:
    program = program_of(Variant())
    plain, on_disk = KINDS[0], KINDS[2]
    cut = Cut(size=48, count=2, chunk=1)
    assert program.at_least(cut, plain) == float("inf")
    assert program.solve(cut, plain) is None
    assert program.at_least(cut, on_disk) < float("inf")


@pytest.mark.parametrize(("size", "count"), [(12, 4), (4, 1), (16, 1), (8, 2)])
def test_no_bound_without_overlap_is_above_what_it_takes(size: int, count: int) -> None:
    """Whether attention on the CPU outlasts the copies beside it or ends long before."""
    workload = replace(WORKLOAD, num_sequences=size * count) if size * count < 48 else WORKLOAD
    policy = Policy(
        micro_batch_size=size,
        num_micro_batches=count,
        weights=ON_CPU,
        kv_cache=ON_CPU,
        cpu_attention=True,
        overlap=0,
    )
    plan = plan_placement(OPT_30B, policy, workload, 2, gpu_cap_bytes=LIMITS.gpu_bytes)
    estimate = engine_cost(plan, PROFILE)
    assert estimate is not None
    cut = Cut(size=size, count=count, chunk=plan.chunk_tokens)
    in_turn, beside = (
        program_of(Variant(cpu_attention=True), depth=depth, workload=workload).solve(cut, KINDS[2])
        for depth in (0, 1)
    )
    assert in_turn is not None
    assert beside is not None
    assert beside.bound_s < in_turn.bound_s <= estimate.seconds


@pytest.mark.parametrize("attention", [3e10, 9e10, 3e11])
@pytest.mark.parametrize("pin_weight", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_no_bound_counts_what_attention_costs_copies_where_it_costs_them_nothing(
    depth: int, pin_weight: bool, attention: float
) -> None:
    """Only page-locked copies are slower while the CPU attends, and only where both run at once."""
    rates = {"cpu_attention_bytes_per_s": attention, "cpu_attention_under_copies_bytes_per_s": attention}
    profile = machine(OPT_30B, **rates, h2d_under_attention_bytes_per_s=2e10)
    for weights in (ON_CPU, Placement(gpu=0.2, cpu=0.8)):
        policy = Policy(
            micro_batch_size=24,
            num_micro_batches=2,
            weights=weights,
            kv_cache=ON_CPU,
            cpu_attention=True,
            overlap=depth,
            pin_weight=pin_weight,
        )
        limits = Limits(gpu_bytes=24 * GiB, cpu_bytes=200 * GiB, disk_bytes=0)
        plan = plan_placement(OPT_30B, policy, WORKLOAD, 2, gpu_cap_bytes=limits.gpu_bytes)
        assert limits.fits(plan)
        estimate = engine_cost(plan, profile)
        assert estimate is not None
        program = program_of(
            Variant(cpu_attention=True), depth=depth, profile=profile, pin_weight=pin_weight, limits=limits
        )
        solved = program.solve(Cut(size=24, count=2, chunk=plan.chunk_tokens), KINDS[0])
        assert solved is not None
        assert solved.bound_s <= estimate.seconds


@pytest.mark.parametrize("cpu", [70, 200])
@pytest.mark.parametrize("allow_lossy", [False, True])
def test_what_is_not_simulated_would_not_have_been_found(
    monkeypatch: pytest.MonkeyPatch, cpu: int, allow_lossy: bool
) -> None:
    def find() -> search.Found:
        limits = Limits(gpu_bytes=LIMITS.gpu_bytes, cpu_bytes=cpu * GiB, disk_bytes=LIMITS.disk_bytes)
        return search.find_policy(
            OPT_30B, PROFILE, WORKLOAD, limits, dtype_bytes=2, batch_size=96, allow_lossy=allow_lossy
        )

    found = find()

    def nothing(plan: object, profile: HardwareProfile) -> float:
        return 0.0

    monkeypatch.setattr(search, "least_seconds", nothing)
    all_simulated = find()
    assert found.simulated < all_simulated.simulated
    # The same, or as good up to what is not worth looking for.
    assert with_preference(found.best) <= 1.005 * with_preference(all_simulated.best)
    assert found.bound_s <= found.best.seconds
