"""The physical limit against values worked out by hand, and the prediction beside it."""

import dataclasses

import pytest

from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.cost_model import Traffic, physical_limit
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
