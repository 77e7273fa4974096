"""The simulated schedule: what hides, what waits, and what no change of the machine may do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import machine

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, ON_GPU, Placement, Policy
from flexllmgen.schedule import Action, Step
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling import simulation
from profiling.cost_model import CostEstimate, engine_cost
from profiling.durations import Durations

SPEC = ModelSpec.from_hf_config({**published_config("opt-1.3b"), "num_hidden_layers": 6}, "opt-1.3b")
WORKLOAD = Workload(num_sequences=16, prompt_tokens=128, gen_tokens=16)


def cost(policy: Policy, workload: Workload = WORKLOAD, device: str = "cuda", **rates: float) -> CostEstimate:
    plan = plan_placement(SPEC, policy, workload, 2, in_place=device == "cpu")
    estimate = engine_cost(plan, machine(SPEC, device, **rates))
    assert estimate is not None
    return estimate


def seconds(estimate: CostEstimate) -> float:
    return estimate.prefill_s + estimate.decode_s


def test_streaming_all_weights_takes_the_link_its_bytes() -> None:
    estimate = cost(Policy(micro_batch_size=16, weights=ON_CPU))
    # The token table serves as head and as embedding, and comes in for each.
    streamed = (SPEC.weight_bytes(2) + SPEC.vocab_size * SPEC.embed_size * 2) / 5.5e10
    assert estimate.decode_bound == "host to device link"
    assert estimate.decode_s == pytest.approx(15 * streamed, rel=0.15)
    assert estimate.decode_busy_s["host to device link"] <= estimate.decode_s * 1.001


def test_overlap_hides_loads_and_its_absence_adds_them() -> None:
    policy = Policy(micro_batch_size=16, weights=ON_CPU)
    hidden, in_turn = cost(policy), cost(dataclasses.replace(policy, overlap=0))
    assert in_turn.decode_s == pytest.approx(sum(in_turn.decode_busy_s.values()), rel=0.1)
    assert hidden.decode_s < in_turn.decode_s
    assert hidden.decode_s >= max(hidden.decode_busy_s.values()) * 0.999


def test_micro_batches_share_a_pass_over_the_weights() -> None:
    alone = cost(Policy(micro_batch_size=4, weights=ON_CPU))
    shared = cost(Policy(micro_batch_size=4, num_micro_batches=4, weights=ON_CPU))
    assert shared.decode_s < alone.decode_s / 2


def test_a_ragged_last_block_costs_less_than_a_full_one() -> None:
    policy = Policy(micro_batch_size=8, num_micro_batches=2, weights=ON_CPU)
    one, more, two = (
        seconds(cost(policy, dataclasses.replace(WORKLOAD, num_sequences=count))) for count in (16, 20, 32)
    )
    assert one < more < two


def test_the_disk_binds_where_all_weights_lie_on_it() -> None:
    estimate = cost(Policy(micro_batch_size=4, weights=ON_DISK), device="cpu")
    assert estimate.decode_bound == "disk"
    assert estimate.decode_s >= 4 * 15 * SPEC.num_layers * SPEC.layer_weight_bytes(2) / 8e8 * 0.99


def test_recorded_steps_are_issued_but_for_their_heads() -> None:
    resident = cost(Policy(micro_batch_size=16))
    table = machine(SPEC).layers[0]
    issued = 15 * (table.issue_s + table.chunk_issue_s)
    assert resident.decode_s <= resident.decode_busy_s["compute"] + issued * 1.001
    assert resident.decode_s >= resident.decode_busy_s["compute"] * 0.999


def test_a_prompt_is_issued_chunk_by_chunk() -> None:
    policy = Policy(micro_batch_size=16, weights=ON_CPU)
    roomy = plan_placement(SPEC, policy, WORKLOAD, 2)
    chunked = dataclasses.replace(roomy, chunk_tokens=1)
    whole, cut = (engine_cost(plan, machine(SPEC)) for plan in (roomy, chunked))
    assert whole is not None
    assert cut is not None
    # One sequence at a time is issued sixteen times as often, which is then what takes longest.
    assert cut.prefill_s > SPEC.num_layers * 16 * 2e-4 > whole.prefill_s


def test_one_token_has_no_decode() -> None:
    estimate = cost(Policy(micro_batch_size=16), dataclasses.replace(WORKLOAD, gen_tokens=1))
    assert estimate.decode_s == 0
    assert estimate.decode_bound == "none"


def test_peaks_are_those_of_the_placement() -> None:
    policy = Policy(micro_batch_size=16, weights=ON_CPU)
    plan = plan_placement(SPEC, policy, WORKLOAD, 2)
    assert cost(policy).peak_bytes == {"gpu": plan.gpu_bytes, "cpu": plan.cpu_bytes, "disk": plan.disk_bytes}


shares = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
    lambda pair: Placement.from_percent(100 * pair[0], 100 * pair[1] * (1 - pair[0]))
)


@settings(max_examples=60, deadline=None)
@given(
    weights=shares,
    kv=shares,
    hidden=st.sampled_from([Placement(gpu=1.0), ON_CPU]),
    size=st.integers(1, 8),
    count=st.integers(1, 4),
    overlap=st.integers(0, 3),
    faster=st.sampled_from(
        ["h2d_bytes_per_s", "d2h_bytes_per_s", "disk_read_bytes_per_s", "disk_write_bytes_per_s"]
    ),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_more_bandwidth_is_never_predicted_slower(
    weights: Placement,
    kv: Placement,
    hidden: Placement,
    size: int,
    count: int,
    overlap: int,
    faster: str,
    device: str,
) -> None:
    if device == "cpu" and faster in ("h2d_bytes_per_s", "d2h_bytes_per_s"):
        return
    policy = Policy(
        micro_batch_size=size,
        num_micro_batches=count,
        weights=weights,
        kv_cache=kv,
        activations=hidden,
        overlap=overlap,
    )
    rates: dict[str, Any] = {faster: 1e10}
    before = cost(policy, device=device, **rates)
    after = cost(policy, device=device, **{faster: 2e10})
    # A queue may meet another order, as every list schedule may (Graham 1969); no more than that.
    assert seconds(after) <= seconds(before) * 1.01
    assert seconds(before) > 0
    for estimate in (before, after):
        # Of the whole run, since a pass's first loads run in the pass before.
        for name in {**estimate.prefill_busy_s, **estimate.decode_busy_s}:
            busy = estimate.prefill_busy_s.get(name, 0.0) + estimate.decode_busy_s.get(name, 0.0)
            assert busy <= seconds(estimate) * 1.05


def test_bytes_over_the_links_are_those_of_the_placement() -> None:
    weights = Placement(gpu=0.0, cpu=0.5, disk=0.5)
    policy = Policy(micro_batch_size=8, num_micro_batches=2, weights=weights, kv_cache=ON_CPU)
    plan = plan_placement(SPEC, policy, WORKLOAD, 2)
    estimate = cost(policy)
    kv = [WORKLOAD.num_sequences * SPEC.kv_bytes(positions, 2) for positions in range(128, 128 + 15)]
    # The token table serves as head and as embedding, and comes in for each.
    streamed = plan.weights.total + SPEC.vocab_size * SPEC.embed_size * 2
    moved = estimate.decode_moved_bytes
    assert moved["h2d"] == pytest.approx(15 * streamed + sum(kv), rel=0.02)
    # Nothing will read the last token's KV, so it is not stored.
    assert moved["d2h"] == pytest.approx(14 * WORKLOAD.num_sequences * SPEC.kv_bytes(1, 2), rel=0.01)
    assert moved["disk_read"] == pytest.approx(15 * plan.weights.disk, rel=0.2)
    assert moved["disk_write"] == 0
    assert moved["h2d"] / 5.5e10 == pytest.approx(estimate.decode_busy_s["host to device link"])
    assert estimate.prefill_moved_bytes["d2h"] == pytest.approx(kv[0], rel=0.01)


def test_without_an_accelerator_only_the_disk_moves_bytes() -> None:
    moved = cost(Policy(micro_batch_size=4, weights=ON_DISK), device="cpu").decode_moved_bytes
    assert moved["disk_read"] > 0
    assert moved["h2d"] == moved["d2h"] == 0


def test_compressed_weights_take_fewer_bytes_and_some_compute() -> None:
    policy = Policy(micro_batch_size=16, weights=ON_CPU)
    plain, lossy = cost(policy), cost(dataclasses.replace(policy, weight_bits=4))
    dense = SPEC.num_layers * SPEC.layer_weight_bytes(2)
    # 4 bits and 4 bytes for each 64, of 16; the first step finds a layer loaded.
    saved = plain.decode_moved_bytes["h2d"] - lossy.decode_moved_bytes["h2d"]
    assert saved == pytest.approx(15 * dense * (1 - 4.5 / 16), rel=0.02)
    assert plain.decode_s - lossy.decode_s == pytest.approx(saved / 5.5e10, rel=0.1)
    # Unmeasured, a copy's rate stands for it: each of 15 steps turns all layers back once.
    extra = lossy.decode_busy_s["compute"] - plain.decode_busy_s["compute"]
    assert extra == pytest.approx(15 * dense / 1.9e12, rel=0.02)
    slow = cost(dataclasses.replace(policy, weight_bits=4), dequantise_4bit_bytes_per_s=1e9)
    assert slow.decode_bound == "compute"
    assert slow.decode_s == pytest.approx(15 * dense / 1e9, rel=0.1)
    # The rate of the other bits is another's.
    other = cost(dataclasses.replace(policy, weight_bits=4), dequantise_8bit_bytes_per_s=1e9)
    assert other.decode_s == lossy.decode_s


def test_micro_batches_share_what_is_turned_back() -> None:
    slow = {"dequantise_4bit_bytes_per_s": 1e10}
    one = cost(Policy(micro_batch_size=16, weights=ON_CPU, weight_bits=4), **slow)
    four = cost(Policy(micro_batch_size=4, num_micro_batches=4, weights=ON_CPU, weight_bits=4), **slow)
    assert four.decode_s == pytest.approx(one.decode_s, rel=0.1)


def test_attention_on_the_cpu_takes_kv_off_the_link() -> None:
    """Streaming weights and attending overlap: a step takes what the slower of the two does, and the KV stays in place."""
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=8)
    policy = Policy(micro_batch_size=24, num_micro_batches=4, weights=ON_CPU, kv_cache=ON_CPU)
    rates = {"cpu_attention_bytes_per_s": 9e10, "cpu_attention_under_copies_bytes_per_s": 5e10}
    lifted = cost(policy, workload, **rates)
    in_place = cost(dataclasses.replace(policy, cpu_attention=True), workload, **rates)
    saved = lifted.decode_moved_bytes["h2d"] - in_place.decode_moved_bytes["h2d"]
    assert saved == pytest.approx(7 * 96 * SPEC.kv_bytes(515, 2), rel=0.05)
    assert lifted.decode_s > 1.5 * in_place.decode_s
    busiest = max(in_place.decode_busy_s.values())
    assert in_place.decode_bound == "attention on the CPU"
    assert busiest <= in_place.decode_s < 1.35 * busiest


def test_copies_are_slower_while_the_cpu_attends() -> None:
    """And no longer than that: a step's copies take what they do alone, and what attention costs them."""
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=8)
    streams = Policy(micro_batch_size=24, num_micro_batches=4, weights=ON_CPU, kv_cache=ON_CPU)
    asks = dataclasses.replace(streams, cpu_attention=True)
    attends = {"cpu_attention_bytes_per_s": 5e11, "cpu_attention_under_copies_bytes_per_s": 5e11}
    slowed = {**attends, "h2d_under_attention_bytes_per_s": 4.4e10}
    estimates = [cost(asks, workload, **rates) for rates in (attends, slowed)]
    link_s = [each.decode_busy_s["host to device link"] for each in estimates]
    attention_s = estimates[0].decode_busy_s["attention on the CPU"]
    assert 0.2 * link_s[0] < attention_s < 0.8 * link_s[0]
    assert link_s[1] - link_s[0] == pytest.approx(attention_s * (1 - 4.4 / 5.5), rel=0.03)
    assert cost(streams, workload, **slowed).decode_s == cost(streams, workload, **attends).decode_s


def test_copies_are_slower_all_the_time_where_the_cpu_attends_for_longer() -> None:
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=8)
    asks = Policy(
        micro_batch_size=24, num_micro_batches=4, weights=ON_CPU, kv_cache=ON_CPU, cpu_attention=True
    )
    attends = {"cpu_attention_bytes_per_s": 4e10, "cpu_attention_under_copies_bytes_per_s": 4e10}
    alone, slowed = (
        cost(asks, workload, **attends, h2d_under_attention_bytes_per_s=rate).decode_busy_s
        for rate in (5.5e10, 4.4e10)
    )
    assert alone["attention on the CPU"] > slowed["host to device link"]
    ratio = slowed["host to device link"] / alone["host to device link"]
    assert ratio == pytest.approx(5.5 / 4.4, rel=0.01)


@pytest.mark.parametrize("change", [{"sep_layer": True}, {"overlap": 2}])
def test_it_does_not_matter_which_step_copies_are_for(change: dict[str, Any]) -> None:
    """Loads run ahead: those of an MLP that is a step of its own come while the CPU attends."""
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=8)
    asks = Policy(
        micro_batch_size=24, num_micro_batches=4, weights=ON_CPU, kv_cache=ON_CPU, cpu_attention=True
    )
    rates = {"cpu_attention_bytes_per_s": 3e11, "h2d_under_attention_bytes_per_s": 3e10}
    whole, other = (
        cost(each, workload, **rates).decode_busy_s for each in (asks, dataclasses.replace(asks, **change))
    )
    for resource in ("host to device link", "attention on the CPU"):
        assert other[resource] == pytest.approx(whole[resource], rel=1e-3)


def test_what_does_not_run_beside_attention_is_not_slowed_by_it() -> None:
    """Without overlap, and where weights are not page-locked and no KV is copied."""
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=8)
    asks = Policy(
        micro_batch_size=24, num_micro_batches=4, weights=ON_CPU, kv_cache=ON_CPU, cpu_attention=True
    )
    attends = {"cpu_attention_bytes_per_s": 9e10, "cpu_attention_under_copies_bytes_per_s": 5e10}
    for change in ({"overlap": 0}, {"pin_weight": False}):
        policy = dataclasses.replace(asks, **change)
        alone = cost(policy, workload, **{**attends, "cpu_attention_under_copies_bytes_per_s": 9e10})
        beside = cost(policy, workload, **attends, h2d_under_attention_bytes_per_s=2e10)
        assert beside.decode_s == pytest.approx(alone.decode_s, rel=0.01)


@pytest.mark.parametrize("first", [0, 2])
def test_units_that_load_nothing_are_not_taken_for_others(first: int) -> None:
    """Of sequences that are on disk some micro-batches have one and others none, whichever is asked about first."""
    workload = Workload(num_sequences=12, prompt_tokens=64, gen_tokens=8)
    policy = Policy(micro_batch_size=4, num_micro_batches=3, kv_cache=Placement(gpu=0.9, disk=0.1))
    plan = plan_placement(SPEC, policy, workload, 2, in_place=False)
    profile = machine(SPEC)
    times = dataclasses.replace(profile.layers[0], kv_issue_s=5e-3)
    durations = Durations(plan, times, profile.typical, plan.micro_batches, (65, 66, 67))
    stage = next(index for index, each in enumerate(plan.stages) if each.has_kv)
    order = [first, *({0, 1, 2} - {first})]
    steps = [Step(Action.COMPUTE, 2, stage, index, -1, 0) for index in order]
    worked = {step.micro_batch: durations.work(step)[1] for step in steps}
    loaded = [any(row) for row in durations.loaded_row[plan.stages[stage].layer]]
    assert len(set(loaded)) == 2
    assert worked == {step.micro_batch: durations.issue_s(step) for step in steps}
    assert len({worked[index] for index in range(3)}) == 2


def issued(policy: Policy, **table: float | None) -> float:
    """Seconds of a decode step that takes nothing but what it takes to issue it."""
    workload = Workload(num_sequences=8, prompt_tokens=64, gen_tokens=8)
    profile = machine(SPEC, cpu_attention_bytes_per_s=9e15, h2d_bytes_per_s=9e15, device_bytes_per_s=9e15)
    times = dataclasses.replace(profile.layers[0], exchange_s=0.0, **table)
    estimate = engine_cost(
        plan_placement(SPEC, policy, workload, 2, in_place=False),
        dataclasses.replace(profile, layers=(times,)),
    )
    assert estimate is not None
    return estimate.decode_s / 7


def test_making_keys_anew_is_issued_too() -> None:
    """As measured, and else as half of a layer's operations."""
    policy = Policy(micro_batch_size=4, num_micro_batches=2, kv_cache=ON_CPU, cpu_attention=True)
    anew = dataclasses.replace(policy, recompute=0.5)
    costs = {"issue_s": 1e-3, "chunk_issue_s": 4e-3, "kv_issue_s": 2e-3}
    kept_s, *anew_s = (
        issued(policy, **costs),
        issued(anew, **costs),
        issued(anew, **costs, recompute_issue_s=5e-3),
    )
    units = 2 * SPEC.num_layers
    assert anew_s[0] - kept_s == pytest.approx(units * (2e-3 + 2e-3), rel=0.02)
    assert anew_s[1] - kept_s == pytest.approx(units * (2e-3 + 5e-3), rel=0.02)
    # Of three in a micro-batch there is none whose inputs are kept, and no load either.
    rare = dataclasses.replace(policy, micro_batch_size=3, num_micro_batches=3)
    assert issued(dataclasses.replace(rare, recompute=1e-3), **costs) == pytest.approx(issued(rare, **costs))


def test_all_is_issued_more_slowly_while_the_cpu_attends() -> None:
    asks = Policy(micro_batch_size=4, num_micro_batches=2, kv_cache=ON_CPU, cpu_attention=True)
    costs = {"issue_s": 1e-3, "chunk_issue_s": 4e-3}
    alone_s, beside_s = issued(asks, **costs), issued(asks, **costs, beside_attention=1.5)
    assert beside_s - alone_s == pytest.approx(0.5 * 2 * SPEC.num_layers * (1e-3 + 4e-3), rel=0.02)
    lifts = dataclasses.replace(asks, cpu_attention=False)
    assert issued(lifts, **costs, beside_attention=1.5) == issued(lifts, **costs)


def test_the_models_own_rate_of_attention_is_what_counts() -> None:
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=8)
    policy = Policy(micro_batch_size=24, num_micro_batches=4, kv_cache=ON_CPU, cpu_attention=True)
    plan = plan_placement(SPEC, policy, workload, 2, in_place=False)
    profile = machine(SPEC, cpu_attention_bytes_per_s=9e10)
    slow = [dataclasses.replace(table, cpu_attention_bytes_per_s=3e10) for table in profile.layers]
    general, own = engine_cost(plan, profile), engine_cost(plan, dataclasses.replace(profile, layers=slow))
    assert general is not None
    assert own is not None
    busy = "attention on the CPU"
    assert own.decode_busy_s[busy] == pytest.approx(3 * general.decode_busy_s[busy])


def test_each_call_of_the_cpu_takes_its_time_beside_its_bytes() -> None:
    """One for each layer, micro-batch and step, where something lies in host memory."""
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=8)
    policy = Policy(micro_batch_size=24, num_micro_batches=4, kv_cache=ON_CPU, cpu_attention=True)
    profile = machine(SPEC, cpu_attention_bytes_per_s=9e10)
    calling = [dataclasses.replace(table, cpu_attention_call_s=1e-3) for table in profile.layers]
    for kv, calls in ((ON_CPU, 4), (Placement(gpu=0.875, cpu=0.125), 4), (ON_GPU, 0)):
        plan = plan_placement(SPEC, dataclasses.replace(policy, kv_cache=kv), workload, 2, in_place=False)
        before, after = (
            engine_cost(plan, profile),
            engine_cost(plan, dataclasses.replace(profile, layers=calling)),
        )
        assert before is not None
        assert after is not None
        busy = "attention on the CPU"
        more = after.decode_busy_s.get(busy, 0.0) - before.decode_busy_s.get(busy, 0.0)
        assert more == pytest.approx(1e-3 * calls * SPEC.num_layers * 7)


def test_compressed_kv_takes_fewer_bytes_and_some_compute() -> None:
    policy = Policy(micro_batch_size=8, num_micro_batches=2, kv_cache=ON_CPU)
    plain, lossy = cost(policy), cost(dataclasses.replace(policy, kv_bits=4))
    for link in ("h2d", "d2h"):
        assert lossy.decode_moved_bytes[link] == pytest.approx(
            plain.decode_moved_bytes[link] * 4.5 / 16, rel=0.01
        )
    # Each of 15 steps turns back all that it attends to.
    positions = sum(WORKLOAD.prompt_tokens + step for step in range(1, 16))
    dense = positions * WORKLOAD.num_sequences * SPEC.kv_bytes(1, 2)
    slow = cost(dataclasses.replace(policy, kv_bits=4), dequantise_4bit_bytes_per_s=1e9)
    assert slow.decode_bound == "compute"
    extra = slow.decode_busy_s["compute"] - lossy.decode_busy_s["compute"]
    assert extra == pytest.approx(dense * (1 / 1e9 - 1 / 1.9e12), rel=0.02)
    # As fast as was measured of KV, where it was; and a row of each layer and micro-batch is compressed.
    measured = cost(dataclasses.replace(policy, kv_bits=4), kv_4bit_bytes_per_s=1e9, kv_rows_per_s=1e3)
    blocks = WORKLOAD.num_sequences / policy.block_size
    rows = blocks * 15 * SPEC.num_layers * policy.num_micro_batches
    more = measured.decode_busy_s["compute"] - slow.decode_busy_s["compute"]
    assert more == pytest.approx(rows / 1e3, rel=0.02)


def test_codes_that_the_cpu_attends_to_are_not_turned_back() -> None:
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=8)
    policy = Policy(micro_batch_size=24, num_micro_batches=4, kv_cache=ON_CPU, cpu_attention=True)
    plan = plan_placement(SPEC, dataclasses.replace(policy, kv_bits=8), workload, 2, in_place=False)
    rates = {"cpu_attention_bytes_per_s": 9e10, "dequantise_8bit_bytes_per_s": 1e6}
    profile = machine(SPEC, **rates)
    known = [dataclasses.replace(table, cpu_attention_codes_bytes_per_s=9e10) for table in profile.layers]
    codes = engine_cost(plan, dataclasses.replace(profile, layers=known))
    unknown, numbers = engine_cost(plan, profile), cost(policy, workload, **rates)
    assert codes is not None
    assert unknown is not None
    busy = "attention on the CPU"
    # Eight bits and a scale and a zero for 64: 8.5 of 16.
    assert codes.decode_busy_s[busy] == pytest.approx(numbers.decode_busy_s[busy] * 8.5 / 16, rel=0.02)
    assert unknown.decode_busy_s[busy] == pytest.approx(2 * codes.decode_busy_s[busy], rel=0.02)
    assert codes.decode_busy_s["compute"] == pytest.approx(numbers.decode_busy_s["compute"], rel=0.01)


def test_the_cpu_attends_to_the_sequences_that_there_are() -> None:
    """In a ragged block fewer than there is room for; and single sequences lie here or there, layer by layer."""
    rates = {"cpu_attention_bytes_per_s": 1e9, "h2d_bytes_per_s": 1e12}
    policy = Policy(micro_batch_size=8, num_micro_batches=2, kv_cache=ON_CPU, cpu_attention=True)
    few, many = (
        cost(policy, dataclasses.replace(WORKLOAD, num_sequences=16 + ragged), **rates) for ragged in (1, 16)
    )
    cpu = "attention on the CPU"
    assert few.decode_busy_s[cpu] / many.decode_busy_s[cpu] == pytest.approx(17 / 32, rel=0.05)

    half = Policy(
        micro_batch_size=1,
        num_micro_batches=2,
        kv_cache=Placement(gpu=0.5, cpu=0.5),
        cpu_attention=True,
    )
    long = Workload(num_sequences=2, prompt_tokens=2000, gen_tokens=2)
    device, none = (
        cost(dataclasses.replace(half, kv_cache=shares), long).decode_busy_s["compute"]
        for shares in (ON_GPU, ON_CPU)
    )
    assert device > 1.1 * none
    assert cost(half, long).decode_busy_s["compute"] == pytest.approx((device + none) / 2, rel=0.02)


def test_one_thread_reads_at_the_rate_of_one() -> None:
    policy = Policy(micro_batch_size=16, weights=ON_DISK)
    rates = {"disk_read_bytes_per_s": 2e9, "disk_read_alone_bytes_per_s": 1e9}
    four, one = cost(policy, **rates), cost(dataclasses.replace(policy, copy_threads=1), **rates)
    assert one.decode_s == pytest.approx(2 * four.decode_s, rel=0.05)


def test_layer_inputs_take_half_the_bytes_and_the_products() -> None:
    """Per layer and step, what is kept of each sequence over the link, and two products over all its positions."""
    policy = Policy(micro_batch_size=8, num_micro_batches=2, kv_cache=ON_CPU)
    kept, anew = cost(policy), cost(dataclasses.replace(policy, recompute=1.0))
    for link in ("h2d", "d2h"):
        assert anew.decode_moved_bytes[link] == pytest.approx(kept.decode_moved_bytes[link] / 2)
        assert anew.prefill_moved_bytes[link] == pytest.approx(kept.prefill_moved_bytes[link] / 2)
    extra = anew.decode_busy_s["compute"] - kept.decode_busy_s["compute"]
    # Of all there is room for: a few more than are attended to.
    positions = WORKLOAD.num_sequences * 15 * WORKLOAD.max_context
    assert extra == pytest.approx(SPEC.num_layers * SPEC.key_value_flops(positions) / 7e14, rel=0.01)
    half = cost(dataclasses.replace(policy, recompute=0.5))
    halfway = (kept.decode_moved_bytes["h2d"] + anew.decode_moved_bytes["h2d"]) / 2
    assert half.decode_moved_bytes["h2d"] == pytest.approx(halfway)


def test_beside_attention_on_the_cpu_only_the_inputs_are_loaded() -> None:
    policy = Policy(micro_batch_size=16, kv_cache=ON_CPU, cpu_attention=True)
    rates = {"cpu_attention_bytes_per_s": 9e10}
    asked, both, anew = (
        cost(dataclasses.replace(policy, recompute=share), **rates) for share in (0.0, 0.5, 1.0)
    )
    cpu = "attention on the CPU"
    assert both.decode_busy_s[cpu] == pytest.approx(asked.decode_busy_s[cpu] / 2, rel=0.1)
    assert cpu not in anew.decode_busy_s
    more = both.decode_moved_bytes["h2d"] - asked.decode_moved_bytes["h2d"] / 2
    inputs = (
        8
        * SPEC.num_layers
        * sum(WORKLOAD.prompt_tokens + step for step in range(15))
        * SPEC.hidden_bytes(1, 2)
    )
    assert more == pytest.approx(inputs, rel=0.02)


def test_a_ragged_block_makes_anew_what_there_is() -> None:
    slow = {"h2d_bytes_per_s": 1e12}
    policy = Policy(micro_batch_size=8, num_micro_batches=2, kv_cache=ON_CPU, recompute=1.0)
    extra = []
    for count in (17, 32):
        workload = dataclasses.replace(WORKLOAD, num_sequences=count)
        anew, kept = (
            cost(each, workload, **slow).decode_busy_s["compute"]
            for each in (policy, dataclasses.replace(policy, recompute=0.0))
        )
        extra.append(anew - kept)
    assert extra[0] / extra[1] == pytest.approx(17 / 32, rel=0.1)


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize(
    "weights", [ON_CPU, Placement(gpu=0.3, cpu=0.5, disk=0.2), Placement(gpu=0.4, disk=0.6)]
)
def test_parts_of_a_load_may_be_simulated_at_once(
    monkeypatch: pytest.MonkeyPatch, weights: Placement, overlap: int
) -> None:
    """Where nothing comes between them they end when they would one by one."""
    policy = Policy(micro_batch_size=4, num_micro_batches=4, weights=weights, overlap=overlap)
    at_once = cost(policy)
    made = simulation._Simulation.__init__

    def one_by_one(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        assert self.in_one
        self.in_one = False

    monkeypatch.setattr(simulation._Simulation, "__init__", one_by_one)
    parts = cost(policy)
    assert at_once.decode_s == pytest.approx(parts.decode_s, rel=1e-9)
    assert at_once.prefill_s == pytest.approx(parts.prefill_s, rel=1e-9)
    assert at_once.decode_moved_bytes == pytest.approx(parts.decode_moved_bytes)
