"""The search keeps layer inputs instead of keys and values where that is faster, and nowhere else."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB
from flexllmgen.workload import Workload
from profiling.cost_model import engine_cost
from profiling.layer_times import layer_times_for
from strategies.choices import KINDS, Cut, Limits, Variant
from strategies.placement_program import A, K, PlacementProgram, W, X
from strategies.search import Found, find_policy

sys.path.append(str(Path(__file__).parents[1] / "profiling"))
from machines import machine

SPEC = ModelSpec.from_hf_config({**published_config("opt-6.7b"), "num_hidden_layers": 8}, "opt-6.7b")
WORKLOAD = Workload(num_sequences=24, prompt_tokens=1600, gen_tokens=32)
LIMITS = Limits(gpu_bytes=3 * GiB, cpu_bytes=100 * GiB, disk_bytes=0)
ATTENDS = {"cpu_attention_bytes_per_s": 8e10, "cpu_attention_under_copies_bytes_per_s": 5e10}


def search(spec: ModelSpec = SPEC, **rates: float) -> Found:
    return find_policy(
        spec, machine(spec, **{**ATTENDS, **rates}), WORKLOAD, LIMITS, dtype_bytes=2, batch_size=8
    )


def seconds(policy: Policy, **rates: float) -> float:
    profile = machine(SPEC, **{**ATTENDS, **rates})
    cost = engine_cost(plan_placement(SPEC, policy, WORKLOAD, 2, gpu_cap_bytes=LIMITS.gpu_bytes), profile)
    assert cost is not None
    return cost.prefill_s + cost.decode_s


@pytest.mark.parametrize("attends", [8e10, 1e9])
def test_inputs_are_kept_where_the_device_has_time(attends: float) -> None:
    """Beside attention on the CPU a part of them; where that is slow, most: half the bytes of keys and values."""
    found = search(cpu_attention_bytes_per_s=attends)
    best = found.best
    assert best.policy.recompute > 0.2
    assert best.placement.attends_on_host == (attends > 1e10)
    assert LIMITS.fits(best.placement)
    kept = dataclasses.replace(best.policy, recompute=0.0)
    assert best.seconds < 0.9 * seconds(kept, cpu_attention_bytes_per_s=attends)
    assert found.bound_s <= best.seconds


def test_a_device_without_time_keeps_none() -> None:
    """Its products take longer than the link does: 300 times as slow as an H200."""
    slow = machine(SPEC, **ATTENDS)
    times = dataclasses.replace(
        slow.layers[0],
        prompt=tuple(
            dataclasses.replace(each, attention_s=300 * each.attention_s, mlp_s=300 * each.mlp_s)
            for each in slow.layers[0].prompt
        ),
    )
    profile = dataclasses.replace(slow, layers=(times,))
    assert (
        find_policy(SPEC, profile, WORKLOAD, LIMITS, dtype_bytes=2, batch_size=8).best.policy.recompute == 0
    )


def test_heads_that_share_keys_keep_none() -> None:
    spec = dataclasses.replace(SPEC, num_kv_heads=SPEC.num_heads // 4)
    assert search(spec).best.policy.recompute == 0
    times = layer_times_for(spec, machine(spec).layers)
    assert times is not None
    program = PlacementProgram(spec, machine(spec), times, WORKLOAD, LIMITS, 2)
    solved = program.solve(Cut(size=6, count=4, chunk=8192), KINDS[0])
    assert solved is not None
    assert solved.shares[X] == 0


def test_what_fits_the_device_is_kept_as_it_is() -> None:
    roomy = dataclasses.replace(LIMITS, gpu_bytes=100 * GiB)
    best = find_policy(SPEC, machine(SPEC, **ATTENDS), WORKLOAD, roomy, dtype_bytes=2, batch_size=8).best
    assert best.policy.recompute == 0
    assert best.policy.kv_cache.gpu == 1


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("cpu_attention", [False, True])
@pytest.mark.parametrize("kv_cache", [ON_CPU, Placement(gpu=0.2, cpu=0.8)], ids=["host", "mixed"])
@pytest.mark.parametrize("window", [0, 64])
def test_no_bound_is_above_what_it_takes(
    kv_cache: Placement, cpu_attention: bool, share: float, window: int
) -> None:
    spec = dataclasses.replace(SPEC, sliding_windows=(window,) * SPEC.num_layers)
    profile, limits = machine(spec, **ATTENDS), dataclasses.replace(LIMITS, gpu_bytes=4 * GiB)
    times = layer_times_for(spec, profile.layers)
    assert times is not None
    policy = Policy(
        micro_batch_size=6,
        num_micro_batches=4,
        weights=ON_CPU,
        kv_cache=kv_cache,
        cpu_attention=cpu_attention,
        recompute=share,
    )
    plan = plan_placement(spec, policy, WORKLOAD, 2, gpu_cap_bytes=limits.gpu_bytes)
    cost = engine_cost(plan, profile)
    assert cost is not None
    program = PlacementProgram(spec, profile, times, WORKLOAD, limits, 2, variant=Variant.of(policy))
    cut = Cut(size=6, count=4, chunk=plan.chunk_tokens)
    solved = program.solve(cut, KINDS[0])
    assert solved is not None
    assert program.cheap_bound(cut) <= solved.bound_s <= cost.prefill_s + cost.decode_s
    # Nor are there bytes that it does not take, but for the rounding to whole sequences.
    rows, bounds = program._memory(cut)
    shares = np.zeros(len(rows[0]))
    shares[[*W, *K, *A, X]] = [
        0,
        1,
        0,
        kv_cache.gpu,
        kv_cache.cpu * (1 - share),
        0,
        1,
        0,
        0,
        kv_cache.cpu * share,
    ]
    one = spec.kv_bytes(plan.max_context, 2)
    for row, bound, limit, taken in zip(
        rows, bounds, (limits.gpu_bytes, limits.cpu_bytes), (plan.gpu_bytes, plan.cpu_bytes), strict=False
    ):
        assert limit - bound + row @ shares <= taken + one
