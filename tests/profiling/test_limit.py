"""The physical limit against values worked out by hand."""

import dataclasses
from typing import Any

import pytest

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.limit import Traffic, physical_limit, traffic_of
from profiling.profile import Rates

OPT_30B = ModelSpec.from_hf_config(published_config("opt-30b"))
# An H200 machine's measured rates (PCIe 5 x16).
H200 = Rates(
    compute_flops_per_s=761e12,
    device_bytes_per_s=4.1e12,
    host_bytes_per_s=94e9,
    h2d_bytes_per_s=55.1e9,
    d2h_bytes_per_s=55.1e9,
    h2d_pageable_bytes_per_s=6.5e9,
    disk_read_bytes_per_s=1.8e9,
    disk_write_bytes_per_s=1.9e9,
    cached_file_bytes_per_s=5e9,
)
LAPTOP = dataclasses.replace(
    H200, compute_flops_per_s=1e11, device_bytes_per_s=2e10, host_bytes_per_s=2e10, h2d_bytes_per_s=None,
    d2h_bytes_per_s=None, h2d_pageable_bytes_per_s=None,
)  # fmt: skip
WORKLOAD = Workload(num_sequences=48, prompt_tokens=512, gen_tokens=32)


def traffic(*, gpu: float, kv_cpu: float = 1.0, batch_size: int = 48, page_cached: bool = False) -> Traffic:
    weights = OPT_30B.weight_bytes(2)
    return Traffic(
        batch_size=batch_size,
        weight_bytes={"gpu": int(gpu * weights), "cpu": weights - int(gpu * weights), "disk": 0},
        kv_shares={"gpu": 1 - kv_cpu, "cpu": kv_cpu, "disk": 0.0},
        dtype_bytes=2,
        page_cached=page_cached,
    )


def test_streamed_weights_and_kv_bind_at_the_link() -> None:
    limit = physical_limit(OPT_30B, WORKLOAD, traffic(gpu=0.2), H200)
    kv = 48 * 48 * 2 * 7168 * (512 + 15) * 2
    step = (0.8 * OPT_30B.weight_bytes(2) + kv) / 55.1e9
    assert limit.decode_bound == "host to device link"
    assert limit.decode_s == pytest.approx(31 * step, rel=1e-3)
    assert limit.prefill_bound == "compute"
    assert limit.prefill_s == pytest.approx(48 * OPT_30B.prefill_flops(512) / 761e12)
    assert limit.generation_tok_s == pytest.approx(48 * 32 / (limit.prefill_s + limit.decode_s))


def test_all_on_the_device_binds_at_its_memory() -> None:
    limit = physical_limit(OPT_30B, WORKLOAD, traffic(gpu=1.0, kv_cpu=0.0), H200)
    assert limit.decode_bound == "device memory"


def test_smaller_batches_stream_the_weights_more_often() -> None:
    one = physical_limit(OPT_30B, WORKLOAD, traffic(gpu=0.0, kv_cpu=0.0), H200)
    three = physical_limit(OPT_30B, WORKLOAD, traffic(gpu=0.0, kv_cpu=0.0, batch_size=16), H200)
    assert three.decode_s == pytest.approx(3 * one.decode_s)


def test_disk_binds_unless_the_page_cache_holds_it() -> None:
    weights = OPT_30B.weight_bytes(2)
    on_disk = dataclasses.replace(traffic(gpu=0.0), weight_bytes={"gpu": 0, "cpu": 0, "disk": weights})
    limit = physical_limit(OPT_30B, WORKLOAD, on_disk, H200)
    assert limit.decode_bound == "disk"
    assert limit.decode_s == pytest.approx(31 * weights / 1.8e9)
    cached = physical_limit(OPT_30B, WORKLOAD, dataclasses.replace(on_disk, page_cached=True), H200)
    assert cached.decode_bound == "page cache"
    assert cached.decode_s == pytest.approx(31 * weights / 5e9)


def test_without_a_gpu_there_are_no_links() -> None:
    limit = physical_limit(OPT_30B, WORKLOAD, traffic(gpu=0.5), LAPTOP)
    assert {limit.prefill_bound, limit.decode_bound} <= {"compute", "host memory"}


def test_one_token_has_no_decode() -> None:
    limit = physical_limit(OPT_30B, dataclasses.replace(WORKLOAD, gen_tokens=1), traffic(gpu=0.2), H200)
    assert limit.decode_s == 0
    assert limit.decode_bound == "none"


def test_busy_seconds_are_of_the_whole_phase() -> None:
    limit = physical_limit(OPT_30B, WORKLOAD, traffic(gpu=0.2, batch_size=16), H200)
    assert limit.decode_busy_s[limit.decode_bound] == pytest.approx(limit.decode_s)
    assert limit.prefill_busy_s[limit.prefill_bound] == pytest.approx(limit.prefill_s)


def test_tables_that_are_looked_up_are_not_read_whole() -> None:
    tables = 1 << 30
    whole, looked_up = (
        physical_limit(OPT_30B, WORKLOAD, dataclasses.replace(traffic(gpu=0.2), lookup_bytes=bytes_), H200)
        for bytes_ in ({}, {"cpu": tables})
    )
    steps = WORKLOAD.gen_tokens - 1
    assert whole.decode_bound == "host to device link"
    blocks = -(-WORKLOAD.num_sequences // traffic(gpu=0.2).batch_size)
    assert whole.decode_s - looked_up.decode_s == pytest.approx(blocks * steps * tables / 55.1e9)


def test_compressed_kv_moves_and_is_read_compressed() -> None:
    plan = traffic(gpu=1.0, kv_cpu=1.0)
    whole = physical_limit(OPT_30B, WORKLOAD, plan, H200)
    less = physical_limit(OPT_30B, WORKLOAD, dataclasses.replace(plan, kv_bytes_share=4.5 / 16), H200)
    assert whole.decode_bound == less.decode_bound == "host to device link"
    assert less.decode_s == pytest.approx(whole.decode_s * 4.5 / 16)


# A layer, and by hand: hidden 8, 2 query heads and 1 key head of 4 each, so that a position's key or value is 4 numbers of
# 2 bytes, 16 bytes both; 4 layers, 64 for all.
WINDOWED = ModelSpec.from_hf_config(
    {
        "model_type": "mistral",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "max_position_embeddings": 256,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
)
PLAIN = dataclasses.replace(WINDOWED, sliding_windows=())
# Prompt 6, 4 steps, which attend to 7, 8, 9 and 10 positions: 6, 7, 8 and 9 of them from the cache.
SHORT = Workload(num_sequences=3, prompt_tokens=6, gen_tokens=5)
# All that counts is the link.
LINKED = dataclasses.replace(
    H200, h2d_bytes_per_s=1.0, d2h_bytes_per_s=1.0, compute_flops_per_s=1e30, device_bytes_per_s=1e30
)


def streamed(**changes: Any) -> Traffic:
    on_host = {"kv_shares": {"cpu": 1.0}, "weight_bytes": {"gpu": 0}, "dtype_bytes": 2, "batch_size": 3}
    return Traffic(**{**on_host, **changes})


def up_bytes(spec: ModelSpec, traffic: Traffic, workload: Workload = SHORT) -> float:
    return physical_limit(spec, workload, traffic, LINKED).decode_busy_s["host to device link"]


def test_each_step_brings_in_what_was_cached_before_it() -> None:
    assert up_bytes(PLAIN, streamed()) == pytest.approx(3 * 4 * 16 * (6 + 7 + 8 + 9))


def test_streamed_kv_of_a_window_is_no_more_than_the_window() -> None:
    """A step attends to 8 positions of two of the four layers: 7 that are cached, and its own."""
    assert up_bytes(WINDOWED, streamed()) == pytest.approx(
        3 * 16 * (2 * (6 + 7 + 8 + 9) + 2 * (6 + 7 + 7 + 7))
    )


def test_of_a_prompt_only_what_a_window_still_sees_is_stored() -> None:
    prompt = dataclasses.replace(SHORT, prompt_tokens=20)
    down = physical_limit(WINDOWED, prompt, streamed(), LINKED).prefill_busy_s["device to host link"]
    assert down == pytest.approx(3 * 16 * (2 * 20 + 2 * 7))


def test_the_last_steps_kv_is_not_stored() -> None:
    down = physical_limit(PLAIN, SHORT, streamed(), LINKED).decode_busy_s["device to host link"]
    assert down == pytest.approx(3 * 64 * 3)


def test_a_sparse_step_reads_all_keys_and_a_share_of_the_values() -> None:
    """Of 7, 8, 9 and 10 positions a quarter is 2 (1.75, 2, 2.25, 2.5 to the even): one of the cache and its own, at least."""
    keys, values = 6 + 7 + 8 + 9, 4 * 1
    assert up_bytes(PLAIN, streamed(attn_sparsity=0.25)) == pytest.approx(3 * 4 * 8 * (keys + values))


def test_a_sparse_step_reads_as_little_where_the_kv_is_resident() -> None:
    slow = dataclasses.replace(LINKED, device_bytes_per_s=1.0)
    limit = physical_limit(PLAIN, SHORT, streamed(kv_shares={"gpu": 1.0}, attn_sparsity=0.25), slow)
    # And writes the keys and values of all but the last step.
    assert limit.decode_busy_s["device memory"] == pytest.approx(3 * 4 * (8 * (30 + 4) + 16 * 3))


def test_a_sparse_step_computes_less() -> None:
    traffic, slow = streamed(kv_shares={"gpu": 1.0}), dataclasses.replace(LINKED, compute_flops_per_s=1.0)
    whole, sparse = (
        physical_limit(PLAIN, SHORT, dataclasses.replace(traffic, attn_sparsity=share), slow).decode_busy_s
        for share in (1.0, 0.25)
    )
    # Two operations for each of a value's numbers, of 8 query numbers, of 3 sequences and 4 layers; 34 values or 8.
    assert whole["compute"] - sparse["compute"] == pytest.approx(2 * 8 * 3 * 4 * (34 - 4 * 2))


def test_each_layer_counts_with_its_own_window() -> None:
    """Even layers have the window, and lie on the device: nothing of theirs crosses the link."""
    rows = {"gpu": {8: 6.0}, "cpu": {0: 6.0}}
    traffic = streamed(kv_shares={}, kv_rows=lambda block: rows)
    assert up_bytes(WINDOWED, traffic) == pytest.approx(6 * 16 * (6 + 7 + 8 + 9))


def test_what_slots_hold_may_come_early_and_leave_late() -> None:
    limit = physical_limit(PLAIN, SHORT, streamed(slot_bytes=100), LINKED)
    assert limit.decode_busy_s["host to device link"] == pytest.approx(3 * 4 * 16 * 30 - 100)
    assert limit.prefill_busy_s["device to host link"] == pytest.approx(3 * 64 * 6 - 100)
    assert limit.prefill_busy_s["host to device link"] == 0


def test_of_a_smaller_last_block_what_lies_first_counts() -> None:
    """Four sequences in two micro-batches, half of each on the device; the fifth and sixth are alone, and on the device."""
    workload = dataclasses.replace(SHORT, num_sequences=6)
    half = Placement(gpu=0.5, cpu=0.5)
    plan = plan_placement(PLAIN, Policy(micro_batch_size=4, kv_cache=half), workload, 2)
    traffic = dataclasses.replace(traffic_of(plan), slot_bytes=0, weight_bytes={"gpu": 0}, lookup_bytes={})
    assert up_bytes(PLAIN, traffic, workload) == pytest.approx(2 * 4 * 16 * 30)


def test_layer_inputs_come_in_instead_and_keys_and_values_are_made_of_them() -> None:
    """Of 4 key heads' worth, so that inputs are half: 8 numbers of 2 bytes a position, 4 layers, and of a window no more."""
    for spec, positions in ((PLAIN, 4 * 30), (WINDOWED, 2 * 30 + 2 * (6 + 7 + 7 + 7))):
        own = dataclasses.replace(spec, num_kv_heads=2)
        policy = Policy(micro_batch_size=3, kv_cache=ON_CPU, recompute=1.0)
        kept = dataclasses.replace(policy, recompute=0.0)
        anew, plain = (
            dataclasses.replace(
                traffic_of(plan_placement(own, each, SHORT, 2)), slot_bytes=0, weight_bytes={"gpu": 0}
            )
            for each in (policy, kept)
        )
        assert up_bytes(own, anew) == pytest.approx(3 * 16 * positions)
        assert up_bytes(own, plain) == pytest.approx(2 * 3 * 16 * positions)
        slow = dataclasses.replace(LINKED, compute_flops_per_s=1.0)
        more, less = (physical_limit(own, SHORT, each, slow).decode_busy_s for each in (anew, plain))
        # Two products of 8 by 8 numbers for each cached position.
        assert more["compute"] - less["compute"] == pytest.approx(2 * 2 * 8 * 8 * 3 * positions)
        assert 2 * more["device to host link"] == pytest.approx(less["device to host link"])


def test_beside_attention_on_the_cpu_only_inputs_come_in() -> None:
    own = dataclasses.replace(PLAIN, num_kv_heads=2)
    policy = Policy(micro_batch_size=3, kv_cache=ON_CPU, recompute=1 / 3, cpu_attention=True)
    plan = plan_placement(own, policy, SHORT, 2)
    traffic = dataclasses.replace(traffic_of(plan), slot_bytes=0, weight_bytes={"gpu": 0}, lookup_bytes={})
    # And of the two others what was found, 8 numbers a layer and step.
    assert up_bytes(own, traffic) == pytest.approx(16 * 4 * 30 + 2 * 16 * 4 * 4)


def test_a_placement_tells_the_limit_its_settings() -> None:
    policy = Policy(micro_batch_size=3, kv_cache=ON_CPU, attn_sparsity=0.25)
    plan = plan_placement(WINDOWED, policy, SHORT, 2)
    traffic = dataclasses.replace(traffic_of(plan), slot_bytes=0)
    # Of windows of 7 or 8 positions a quarter is 2 too.
    keys = 2 * 30 + 2 * (6 + 7 + 7 + 7)
    assert up_bytes(WINDOWED, traffic) == pytest.approx(3 * 8 * (keys + 4 * 4))
    assert traffic_of(plan).slot_bytes == plan.slot_bytes + plan.staging_bytes > 0


def test_host_memory_gives_no_less_than_the_links_were_seen_to_take() -> None:
    fast = dataclasses.replace(H200, h2d_bytes_per_s=4e11, d2h_bytes_per_s=1e11)
    assert fast.host_in_all_bytes_per_s == 4e11
    both = dataclasses.replace(fast, h2d_both_ways_bytes_per_s=3e11, d2h_both_ways_bytes_per_s=2e11)
    assert both.host_in_all_bytes_per_s == 5e11
    assert H200.host_in_all_bytes_per_s == 94e9


def test_a_mixture_reads_what_one_token_needs_and_no_table_of_embeddings() -> None:
    """Of the four experts of each of the four layers a token is sent to one: three matrices of 8 by 16 numbers each."""
    shape = dataclasses.replace(PLAIN, num_experts=4, experts_per_token=1)
    slow = dataclasses.replace(LINKED, device_bytes_per_s=1.0)
    table = 2 * PLAIN.vocab_size * PLAIN.hidden_size
    weights = shape.weight_bytes(2)
    expert = 2 * 3 * PLAIN.hidden_size * PLAIN.intermediate_size
    on_device = streamed(kv_shares={"gpu": 1.0}, weight_bytes={"gpu": weights}, lookup_bytes={"gpu": table})
    read = physical_limit(shape, SHORT, on_device, slow).prefill_busy_s["device memory"]
    # Beside the weights the prompts' KV is written.
    assert read == pytest.approx(weights - table - 4 * 3 * expert + 3 * 64 * 6)
