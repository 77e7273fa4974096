"""The simulated schedule and the limit where decode steps bring in only the experts that were chosen."""

from __future__ import annotations

import dataclasses

import pytest
from machines import machine

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.cost_model import CostEstimate, engine_cost
from profiling.limit import Traffic, physical_limit

SPEC = ModelSpec.from_hf_config({**published_config("qwen3-30b-a3b"), "num_hidden_layers": 6}, "qwen3-moe")
EXPERT_BYTES = 6 * 3 * SPEC.hidden_size * SPEC.intermediate_size * 2
"""One expert of every layer."""


def cost(sequences: int, weights: Placement, *, device: str = "cuda", **choices: int | bool) -> CostEstimate:
    workload = Workload(num_sequences=sequences, prompt_tokens=64, gen_tokens=8)
    policy = Policy(**{"micro_batch_size": sequences, "weights": weights, **choices})  # type: ignore[arg-type]
    plan = plan_placement(SPEC, policy, workload, 2, in_place=device == "cpu")
    estimate = engine_cost(plan, machine(SPEC, device))
    assert estimate is not None
    return estimate


@pytest.mark.parametrize("sequences", [1, 4, 32])
def test_a_step_moves_as_many_experts_as_are_expected(sequences: int) -> None:
    whole = cost(sequences, ON_CPU)
    chosen = cost(sequences, ON_CPU, chosen_experts=True)
    assert chosen.prefill_moved_bytes == pytest.approx(whole.prefill_moved_bytes)
    idle = SPEC.num_experts - SPEC.expected_experts(sequences)
    # What is loaded while the prompt is read is a whole layer no more.
    spared = whole.decode_moved_bytes["h2d"] - chosen.decode_moved_bytes["h2d"]
    assert spared == pytest.approx(7 * idle * EXPERT_BYTES, rel=1e-3)


def test_the_same_experts_whatever_the_micro_batches() -> None:
    moved = [
        cost(8, ON_CPU, micro_batch_size=size, num_micro_batches=8 // size, chosen_experts=True)
        for size in (8, 4, 1)
    ]
    for each in moved[1:]:
        assert each.decode_moved_bytes["h2d"] == pytest.approx(moved[0].decode_moved_bytes["h2d"])


def test_few_sequences_gain_and_many_lose() -> None:
    times = {
        sequences: [cost(sequences, ON_CPU, chosen_experts=chosen).decode_s for chosen in (False, True)]
        for sequences in (1, 8, 256)
    }
    assert times[1][1] < times[1][0] / 5
    assert times[8][1] < times[8][0]
    # All experts are chosen, and their loads begin only when the router has computed.
    assert times[256][1] > times[256][0]


def test_loads_of_chosen_experts_are_not_hidden() -> None:
    estimate = cost(32, ON_CPU, chosen_experts=True)
    share = SPEC.expected_experts(32) / SPEC.num_experts
    loads = 7 * share * SPEC.num_experts * EXPERT_BYTES / 5.5e10
    assert estimate.decode_s > loads + 0.9 * estimate.decode_busy_s["compute"]


def test_what_is_resident_is_not_moved() -> None:
    half = Placement(gpu=0.5, cpu=0.5)
    all_, some = (cost(2, weights, chosen_experts=True) for weights in (ON_CPU, half))
    assert some.decode_moved_bytes["h2d"] < 0.6 * all_.decode_moved_bytes["h2d"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_disk_is_read_for_those_only(device: str) -> None:
    whole, chosen = (
        cost(1, ON_DISK, device=device, chosen_experts=chosen).decode_moved_bytes["disk_read"]
        for chosen in (False, True)
    )
    idle = SPEC.num_experts - SPEC.experts_per_token
    assert whole - chosen == pytest.approx(7 * idle * EXPERT_BYTES, rel=1e-3)


def test_compressed_experts_are_turned_back_by_choice() -> None:
    placed = Placement(gpu=1.0)
    whole, chosen = (cost(1, placed, weight_bits=4, chosen_experts=chosen) for chosen in (False, True))
    assert chosen.decode_busy_s["compute"] < whole.decode_busy_s["compute"] / 2


@pytest.mark.parametrize("cpu_attention", [False, True])
def test_no_policy_is_faster_than_its_limit(cpu_attention: bool) -> None:
    profile = machine(SPEC, cpu_attention_bytes_per_s=9e10)
    for sequences in (1, 8):
        workload = Workload(num_sequences=sequences, prompt_tokens=64, gen_tokens=8)
        policy = Policy(
            micro_batch_size=sequences,
            weights=ON_CPU,
            kv_cache=ON_CPU,
            cpu_attention=cpu_attention,
            chosen_experts=True,
        )
        plan = plan_placement(SPEC, policy, workload, 2)
        traffic = Traffic(
            batch_size=sequences,
            weight_bytes={"gpu": 0, "cpu": plan.weights.cpu, "disk": 0},
            kv_shares={"gpu": 0.0, "cpu": 1.0, "disk": 0.0},
            dtype_bytes=2,
            host_attention=cpu_attention,
            lookup_bytes={"cpu": plan.images[0].cpu_bytes},
            chosen_expert_bytes={"cpu": SPEC.num_experts * EXPERT_BYTES},
        )
        limit = physical_limit(SPEC, workload, traffic, profile.best)
        every = physical_limit(
            SPEC, workload, dataclasses.replace(traffic, chosen_expert_bytes={}), profile.best
        )
        idle = SPEC.num_experts - SPEC.expected_experts(sequences)
        link = "host to device link"
        assert every.decode_busy_s[link] - limit.decode_busy_s[link] == pytest.approx(
            7 * idle * EXPERT_BYTES / 5.5e10
        )
        assert limit.prefill_s == every.prefill_s
        estimate = engine_cost(plan, profile)
        assert estimate is not None
        assert limit.decode_s < estimate.decode_s
