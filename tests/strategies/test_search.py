"""The search: what it returns fits, nothing it saw was better, more of anything never hurts."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexllmgen.errors import PlanInfeasible
from flexllmgen.fits import check_fits
from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB
from flexllmgen.workload import Workload
from profiling.cost_model import engine_cost
from profiling.layer_times import layer_times_for
from strategies.candidates import Candidate
from strategies.choices import KINDS, Cut, Limits, Variant
from strategies.placement_program import PlacementProgram
from strategies.search import Found, find_policy

sys.path.append(str(Path(__file__).parents[1] / "profiling"))
from machines import machine


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.from_hf_config(published_config(name), name)


SMALL = ModelSpec.from_hf_config(
    {**published_config("opt-1.3b"), "num_hidden_layers": 6}, "opt-1.3b, 6 layers"
)
OPT_30B, OPT_175B = spec_of("opt-30b"), spec_of("opt-175b")
WORKLOAD = Workload(num_sequences=48, prompt_tokens=128, gen_tokens=16)


def search(
    spec: ModelSpec = SMALL,
    workload: Workload = WORKLOAD,
    *,
    gpu: float | None = 1.0,
    cpu: float = 16.0,
    disk: float = 100.0,
    device: str = "cuda",
    **rates: float,
) -> Found:
    shared = device == "cpu" and gpu is None
    limits = Limits(
        gpu_bytes=None if gpu is None else int(gpu * GiB),
        cpu_bytes=int(cpu * GiB),
        disk_bytes=int(disk * GiB),
        shared=shared,
    )
    return find_policy(spec, machine(spec, device, **rates), workload, limits, dtype_bytes=2, batch_size=8)


def test_what_fits_the_device_stays_there() -> None:
    best = search(gpu=40.0).best
    assert best.policy.weights.gpu == best.policy.kv_cache.gpu == best.policy.activations.gpu == 1.0


def test_a_model_larger_than_the_device_is_streamed_and_the_link_binds() -> None:
    found = search(OPT_30B, Workload(num_sequences=96, prompt_tokens=512, gen_tokens=32), gpu=16, cpu=110)
    assert found.best.cost.decode_bound == "host to device link"
    assert found.best.policy.block_size >= 48
    assert 0.99 * 16 * GiB < found.best.placement.gpu_bytes <= 16 * GiB
    assert 0 <= found.gap < 0.3


def test_it_beats_flexgens_published_policies_by_its_own_model() -> None:
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=32)
    found = search(OPT_30B, workload, gpu=16, cpu=110)
    for percents, size, count in (
        ((20, 80, 0, 100), 48, 1),
        ((0, 100, 0, 100), 48, 1),
        ((10, 90, 0, 100), 24, 2),
    ):
        policy = Policy(
            micro_batch_size=size,
            num_micro_batches=count,
            weights=Placement.from_percent(*percents[:2]),
            kv_cache=Placement.from_percent(*percents[2:]),
        )
        cost = engine_cost(plan_placement(OPT_30B, policy, workload, 2), machine(OPT_30B))
        assert cost is not None
        assert found.best.cost.generation_tok_s >= cost.generation_tok_s


def test_opt_175b_is_planned_within_two_seconds() -> None:
    workload = Workload(num_sequences=144, prompt_tokens=512, gen_tokens=32)
    taken = []
    for _ in range(3):
        started = time.process_time()
        found = search(OPT_175B, workload, gpu=16, cpu=200, disk=1000)
        taken.append(time.process_time() - started)
    assert min(taken) < 2
    assert found.best.placement.disk_bytes > 0


def test_disk_is_used_only_where_memory_ends() -> None:
    assert search(cpu=16.0).best.placement.disk_bytes == 0
    assert search(gpu=0.6, cpu=0.4).best.placement.disk_bytes > 0


def test_latency_serves_one_batch_at_a_time() -> None:
    limits = Limits(gpu_bytes=GiB, cpu_bytes=16 * GiB, disk_bytes=0)
    found = find_policy(
        SMALL, machine(SMALL), WORKLOAD, limits, dtype_bytes=2, batch_size=8, objective="latency"
    )
    policy = found.best.policy
    assert policy.block_size - policy.micro_batch_size < 8 <= policy.block_size


def test_without_a_gpu_memory_is_one_and_the_rest_is_disk() -> None:
    best = search(gpu=None, cpu=0.7, device="cpu").best
    assert best.placement.gpu_bytes + best.placement.cpu_bytes <= 0.7 * GiB
    assert best.placement.disk_bytes > 0


@pytest.mark.parametrize(
    ("limits", "way"),
    [
        ({"gpu": 0.05, "cpu": 16.0}, "more on the GPU"),
        ({"gpu": 0.16919439, "cpu": 1.05390214, "disk": 0.0}, "more on the GPU"),
        ({"gpu": 0.021833, "cpu": 1.837746, "disk": 0.0}, "more on the GPU"),
        ({"gpu": 0.120142, "cpu": 0.906621, "disk": 8.0}, "more on the GPU"),
        ({"gpu": 0.6, "cpu": 0.01, "disk": 0.01}, "more of host memory"),
    ],
)
def test_nothing_fits_names_the_least_change_that_would(limits: dict[str, float], way: str) -> None:
    with pytest.raises(PlanInfeasible, match=way) as refused:
        search(**limits)
    # What it names is enough.
    for amount, unit, where in re.findall(
        r"([\d.]+) (GiB|MiB) more (on the GPU|of host memory)", str(refused.value)
    ):
        tier = "gpu" if where == "on the GPU" else "cpu"
        more = float(amount) / (1 if unit == "GiB" else 1024)
        assert search(**{**limits, tier: limits[tier] + more}).best.placement.gpu_bytes > 0


@settings(max_examples=25, deadline=None)
@given(
    gpu=st.floats(0.3, 3.0),
    cpu=st.floats(0.2, 4.0),
    disk=st.sampled_from([0.0, 8.0]),
    sequences=st.integers(1, 48),
    more=st.sampled_from(["gpu", "cpu", "disk", "h2d_bytes_per_s"]),
)
@example(gpu=0.625, cpu=0.625, disk=0.0, sequences=39, more="cpu")
@example(gpu=0.484375, cpu=0.5625, disk=0.0, sequences=3, more="cpu")
@example(gpu=0.703125, cpu=1.3823154853716841, disk=8.0, sequences=44, more="h2d_bytes_per_s")
@example(gpu=0.375, cpu=3.93670800886532, disk=8.0, sequences=42, more="h2d_bytes_per_s")
@example(gpu=0.984375, cpu=2.009201209923461, disk=0.0, sequences=31, more="disk")
@example(gpu=1.0516680443700588, cpu=0.6810408298609356, disk=0.0, sequences=48, more="cpu")
@example(gpu=1.0625, cpu=1.0, disk=0.0, sequences=21, more="h2d_bytes_per_s")
@example(gpu=0.515625, cpu=0.515625, disk=0.0, sequences=47, more="disk")
@example(gpu=0.5, cpu=0.5, disk=0.0, sequences=3, more="h2d_bytes_per_s")
@example(gpu=1.0625, cpu=1.0, disk=0.0, sequences=29, more="h2d_bytes_per_s")
def test_every_policy_found_fits_and_more_never_hurts(
    gpu: float, cpu: float, disk: float, sequences: int, more: str
) -> None:
    workload = Workload(num_sequences=sequences, prompt_tokens=64, gen_tokens=8)
    limits = {"gpu": gpu, "cpu": cpu, "disk": disk}
    try:
        found = search(workload=workload, **limits)
    except PlanInfeasible:
        return
    for each in (found.best, *found.runners_up):
        for share in (each.policy.weights, each.policy.kv_cache, each.policy.activations):
            assert share.gpu + share.cpu + share.disk == pytest.approx(1)
        check_fits(
            each.placement,
            gpu_bytes=int(gpu * GiB),
            cpu_bytes=int(cpu * GiB),
            disk_free_bytes=int(disk * GiB),
        )
    assert found.best.seconds >= found.bound_s * 0.999
    if more in limits:
        larger = search(workload=workload, **{**limits, more: limits[more] * 1.5 + 0.1})
    else:
        larger = search(workload=workload, **limits, **{more: 8e10})
    # The same up to what is not worth looking for, and what plainness is preferred by.
    assert larger.best.seconds <= found.best.seconds * 1.05


def test_prompts_are_computed_in_the_chunks_that_were_counted_on() -> None:
    """A little less on the device where the next smaller chunk would make a prompt many times as slow."""
    workload = Workload(num_sequences=31, prompt_tokens=64, gen_tokens=8)
    best = search(workload=workload, gpu=0.984375, cpu=2.009201209923461, disk=0.0).best
    assert best.placement.chunk_tokens >= 1024
    assert best.placement.gpu_bytes > 0.9 * 0.984375 * GiB


@pytest.mark.parametrize(
    ("prompt", "sequences", "gpu"), [(250, 32, 1.511726), (1000, 8, 2.110152), (65, 32, 1.148754)]
)
def test_the_engine_places_a_policy_as_the_search_did(prompt: int, sequences: int, gpu: float) -> None:
    """A larger chunk of a prompt, which only what the search leaves free would hold, is not taken at loading either."""
    workload = Workload(num_sequences=sequences, prompt_tokens=prompt, gen_tokens=8)
    limits = Limits(gpu_bytes=int(gpu * GiB), cpu_bytes=64 * GiB, disk_bytes=0)
    best = find_policy(
        SMALL, machine(SMALL), workload, limits, dtype_bytes=2, batch_size=sequences, objective="latency"
    ).best
    assert plan_placement(SMALL, best.policy, workload, 2, gpu_cap_bytes=limits.gpu_bytes) == best.placement


CPU_ATTENTION = {"cpu_attention_bytes_per_s": 9e10, "cpu_attention_under_copies_bytes_per_s": 5e10}


def best_of(
    workload: Workload, *, allow_lossy: bool = False, least_bits: int = 4, **rates: float
) -> Candidate:
    return find_policy(
        OPT_30B,
        machine(OPT_30B, **rates),
        workload,
        Limits(gpu_bytes=16 * GiB, cpu_bytes=100 * GiB, disk_bytes=0),
        dtype_bytes=2,
        batch_size=8,
        allow_lossy=allow_lossy,
        least_bits=least_bits,
    ).best


def test_the_cpu_attends_where_that_is_faster() -> None:
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=16)
    fast, slow = best_of(workload, **CPU_ATTENTION), best_of(workload, cpu_attention_bytes_per_s=1e9)
    assert fast.policy.cpu_attention
    assert not slow.policy.cpu_attention
    assert fast.seconds < 0.8 * slow.seconds


def test_only_what_is_allowed_is_compressed() -> None:
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=16)
    exact, lossy, careful = (
        best_of(workload),
        best_of(workload, allow_lossy=True),
        best_of(workload, allow_lossy=True, least_bits=8),
    )
    assert exact.policy.lossless
    # The KV stays as it is where the CPU attends to it.
    assert {lossy.policy.weight_bits, lossy.policy.kv_bits} in ({4}, {4, None})
    assert {careful.policy.weight_bits, careful.policy.kv_bits} in ({8}, {8, None})
    assert lossy.seconds < careful.seconds < exact.seconds


def test_the_cpu_attends_to_codes_where_it_knows_how_fast() -> None:
    """Half the bytes of numbers; slow at codes, it is not asked."""
    workload = Workload(num_sequences=192, prompt_tokens=512, gen_tokens=16)
    profile = machine(OPT_30B, **CPU_ATTENTION)
    known = tuple(
        dataclasses.replace(
            table, cpu_attention_bytes_per_s=9e10, cpu_attention_codes_bytes_per_s=9e10, exchange_s=1e-5
        )
        for table in profile.layers
    )
    limits = Limits(gpu_bytes=12 * GiB, cpu_bytes=130 * GiB, disk_bytes=0)
    slow = tuple(dataclasses.replace(table, cpu_attention_codes_bytes_per_s=1e8) for table in known)
    found = [
        find_policy(
            OPT_30B,
            dataclasses.replace(profile, layers=layers),
            workload,
            limits,
            dtype_bytes=2,
            batch_size=8,
            allow_lossy=True,
            least_bits=8,
        )
        for layers in (known, slow)
    ]
    fast_policy, slow_policy = (each.best.policy for each in found)
    assert (fast_policy.kv_bits, fast_policy.cpu_attention) == (8, True)
    assert (slow_policy.kv_bits, slow_policy.cpu_attention) != (8, True)
    assert found[0].best.seconds < 0.9 * found[1].best.seconds


def test_nothing_is_compressed_for_nothing() -> None:
    """All on the device, compression would only cost."""
    found = find_policy(
        SMALL,
        machine(SMALL),
        Workload(num_sequences=8, prompt_tokens=64, gen_tokens=8),
        Limits(gpu_bytes=64 * GiB, cpu_bytes=64 * GiB, disk_bytes=0),
        dtype_bytes=2,
        batch_size=8,
        allow_lossy=True,
    )
    assert found.best.policy.lossless


@pytest.mark.parametrize("window", [0, 64])
def test_no_bound_is_above_what_attending_on_the_cpu_takes(window: int) -> None:
    """Where layers have a window, the CPU attends to that and not to all that lies in host memory."""
    spec = dataclasses.replace(SMALL, sliding_windows=(window,) * SMALL.num_layers)
    workload = Workload(num_sequences=96, prompt_tokens=1024, gen_tokens=32)
    profile, limits = (
        machine(spec, **CPU_ATTENTION),
        Limits(gpu_bytes=2 * GiB, cpu_bytes=100 * GiB, disk_bytes=0),
    )
    times = layer_times_for(spec, profile.layers)
    assert times is not None
    policy = Policy(
        micro_batch_size=24, num_micro_batches=4, weights=ON_CPU, kv_cache=ON_CPU, cpu_attention=True
    )
    plan = plan_placement(spec, policy, workload, 2, gpu_cap_bytes=limits.gpu_bytes)
    assert limits.fits(plan)
    cost = engine_cost(plan, profile)
    assert cost is not None
    program = PlacementProgram(spec, profile, times, workload, limits, 2, variant=Variant.of(policy))
    cut = Cut(size=24, count=4, chunk=plan.chunk_tokens)
    solved = program.solve(cut, KINDS[0])
    assert solved is not None
    assert program.cheap_bound(cut) <= solved.bound_s <= cost.prefill_s + cost.decode_s
