"""A probe corrects the resource that it saw, and no other."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest
from machines import machine

from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.engine import FlexEngine, Probe
from flexllmgen.models.published import published_config
from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.calibration import Calibration, calibrate, corrected
from profiling.layer_times import layer_times_for
from profiling.profile import HardwareProfile
from profiling.simulation import simulate_block

SPEC = ModelSpec.from_hf_config(published_config("opt-6.7b"), "opt-6.7b")
WORKLOAD = Workload(num_sequences=8, prompt_tokens=128, gen_tokens=16)


def probe(load_s: float | None, step_s: float | None, context: int = 3) -> Probe:
    return Probe(stage=5, load_s=load_s, step_s=step_s, context=context)


def step_s(plan: PlacementPlan, profile: HardwareProfile, context: int = 3) -> float:
    times = layer_times_for(plan.spec, profile.layers)
    assert times is not None
    passes = simulate_block(
        plan, times, profile.typical, micro_batches=plan.micro_batches, contexts=(context,) * 3
    )
    return statistics.median(passes.seconds[2:])


@pytest.mark.parametrize(("weights", "seen", "rate"), [(ON_CPU, "link", 5.5e10), (ON_DISK, "disk", 1.75e9)])
def test_a_slow_load_slows_what_it_came_over(weights: Placement, seen: str, rate: float) -> None:
    plan = plan_placement(SPEC, Policy(micro_batch_size=8, weights=weights), WORKLOAD, 2)
    load_s = SPEC.layer_weight_bytes(2) / rate
    found = calibrate(plan, machine(SPEC), probe(1.25 * load_s, None))
    assert getattr(found, seen) == pytest.approx(1.25, rel=0.01)
    assert {found.pace, found.link, found.disk} == {1.0, getattr(found, seen)}


@pytest.mark.parametrize("pace", [0.5, 1.4, 2.5])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_that_take_longer_are_explained_by_the_pace(device: str, pace: float) -> None:
    profile = machine(SPEC, device)
    # On the GPU as many micro-batches as it takes for the host to be what the steps wait for.
    policy = Policy(micro_batch_size=1, num_micro_batches=8, kv_cache=ON_CPU)
    plan = plan_placement(SPEC, policy, WORKLOAD, 2, in_place=device == "cpu")
    seen = step_s(plan, corrected(profile, Calibration(pace=pace), plan))
    found = calibrate(plan, profile, probe(None, seen))
    assert step_s(plan, corrected(profile, found, plan)) == pytest.approx(seen, rel=0.03)


@pytest.mark.parametrize("own", [False, True], ids=["of any model", "of this model"])
@pytest.mark.parametrize("factor", [0.8, 1.2, 2.0])
def test_steps_that_wait_for_the_cpu_are_explained_by_its_attention(factor: float, own: bool) -> None:
    profile = machine(SPEC, cpu_attention_bytes_per_s=9e10, cpu_attention_under_copies_bytes_per_s=5e10)
    if own:
        tables = (dataclasses.replace(each, cpu_attention_bytes_per_s=7e10) for each in profile.layers)
        profile = dataclasses.replace(profile, layers=tuple(tables))
    policy = Policy(micro_batch_size=32, num_micro_batches=2, kv_cache=ON_CPU, cpu_attention=True)
    plan = plan_placement(SPEC, policy, Workload(num_sequences=64, prompt_tokens=512, gen_tokens=16), 2)
    slower = corrected(profile, Calibration(attention=factor), plan)
    times = layer_times_for(plan.spec, slower.layers)
    assert times is not None
    passes = simulate_block(
        plan, times, slower.typical, micro_batches=plan.micro_batches, contexts=(520, 520, 520)
    )
    seen = Probe(stage=5, load_s=None, step_s=passes.seconds[2], context=520)
    found = calibrate(plan, profile, seen)
    assert found.attention == pytest.approx(factor, rel=0.05)
    assert found.pace == 1.0


@pytest.mark.parametrize(
    ("size", "true"),
    [(64, Calibration(attention=1.5)), (1, Calibration(pace=1.5)), (8, Calibration(link=1.5))],
)
def test_the_cause_is_the_one_that_would_have_to_be_wrong_by_least(size: int, true: Calibration) -> None:
    """Many queries to the CPU are slow to issue, few that are large slow to attend to: neither is taken for the other."""
    profile = machine(SPEC, cpu_attention_bytes_per_s=9e10, cpu_attention_under_copies_bytes_per_s=5e10)
    tables = (
        dataclasses.replace(each, issue_s=1e-4, chunk_issue_s=4e-4, exchange_s=4e-4)
        for each in profile.layers
    )
    profile = dataclasses.replace(profile, layers=tuple(tables))
    weights = ON_CPU if true.link != 1 else Placement(gpu=1.0)
    policy = Policy(
        micro_batch_size=size,
        num_micro_batches=64 // size if weights != ON_CPU else 1,
        weights=weights,
        kv_cache=ON_CPU,
        cpu_attention=True,
    )
    context = 1000 if true.attention != 1 else 64
    workload = Workload(num_sequences=policy.block_size, prompt_tokens=context - 4, gen_tokens=16)
    plan = plan_placement(SPEC, policy, workload, 2)
    seen = step_s(plan, corrected(profile, true, plan), context)
    found = calibrate(plan, profile, probe(None, seen, context))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(true), rel=0.05)


@pytest.mark.parametrize(("weights", "seen"), [(ON_CPU, "link"), (ON_DISK, "disk")])
def test_a_load_that_is_slower_alone_than_in_a_step_gives_way_to_the_step(
    weights: Placement, seen: str
) -> None:
    """What it takes to start a short load is hidden by others: the steps say what the rate is."""
    profile = machine(SPEC)
    plan = plan_placement(SPEC, Policy(micro_batch_size=8, weights=weights), WORKLOAD, 2)
    rate = 5.5e10 if seen == "link" else 1.75e9
    alone_s = 2.6 * SPEC.layer_weight_bytes(2) / rate
    true = Calibration(**{seen: 1.1})
    found = calibrate(plan, profile, probe(alone_s, step_s(plan, corrected(profile, true, plan))))
    assert getattr(found, seen) == pytest.approx(1.1, rel=0.03)
    assert (found.pace, found.attention) == (1.0, 1.0)


def test_a_cpu_may_be_slower_by_much() -> None:
    profile = machine(SPEC, "cpu")
    plan = plan_placement(SPEC, Policy(micro_batch_size=8), WORKLOAD, 2, in_place=True)
    assert calibrate(plan, profile, probe(None, 5 * step_s(plan, profile))).pace == pytest.approx(5, rel=0.05)


def test_what_a_pace_cannot_explain_changes_nothing() -> None:
    profile = machine(SPEC)
    plan = plan_placement(SPEC, Policy(micro_batch_size=8, weights=ON_CPU), WORKLOAD, 2)
    # The link binds: a step cannot have been faster than its bytes.
    assert calibrate(plan, profile, probe(None, 0.5 * step_s(plan, profile))) == Calibration()
    assert calibrate(plan, profile, probe(None, 1.01 * step_s(plan, profile))) == Calibration()
    assert calibrate(plan, profile, probe(None, 1000.0)) == Calibration()


def test_correcting_changes_the_rates_and_nothing_else() -> None:
    profile = machine(SPEC)
    plan = plan_placement(SPEC, Policy(micro_batch_size=8), WORKLOAD, 2)
    slower = corrected(profile, Calibration(pace=2.0, link=1.25, disk=0.5), plan)
    assert slower.typical.h2d_bytes_per_s == pytest.approx(5.5e10 / 1.25)
    assert slower.typical.disk_read_bytes_per_s == pytest.approx(2 * 1.75e9)
    assert slower.typical.d2h_bytes_per_s == 5.5e10
    assert slower.layers[0].issue_s == 2 * profile.layers[0].issue_s
    assert slower.layers[0].step == profile.layers[0].step
    assert slower.best == profile.best
    on_cpu = machine(SPEC, "cpu")
    plan = plan_placement(SPEC, Policy(micro_batch_size=8), WORKLOAD, 2, in_place=True)
    again = corrected(on_cpu, Calibration(pace=2.0), plan)
    assert again.layers[0].step_s("layer", 8, 9) == pytest.approx(2 * on_cpu.layers[0].step_s("layer", 8, 9))


@pytest.mark.parametrize("weights", [Placement(gpu=1.0), Placement(gpu=0.5, disk=0.5)])
def test_a_loaded_engine_probes_itself_and_still_gives_the_same_tokens(
    tmp_path: Path, weights: Placement
) -> None:
    import torch

    spec = ModelSpec.from_hf_config({**published_config("opt-125m"), "num_hidden_layers": 3}, "opt")
    workload = Workload(num_sequences=4, prompt_tokens=9, gen_tokens=5)
    policy = Policy(micro_batch_size=2, num_micro_batches=2, weights=weights)
    ids = torch.randint(5, 1000, (4, 9), generator=torch.Generator().manual_seed(0))
    with FlexEngine.load(
        spec, RandomCheckpoint(seed=0), policy, workload=workload, device="cpu", offload_dir=tmp_path
    ) as engine:
        before = torch.stack(list(engine.generate(ids)))
        found = engine.probe()
        assert (found.load_s is not None) == (weights.disk > 0)
        assert found.step_s is not None
        assert found.step_s > 0
        assert engine.probe(steps=False).step_s is None
        assert torch.equal(torch.stack(list(engine.generate(ids))), before)
