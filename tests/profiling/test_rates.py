"""Measured rates: plausible for any machine, and nothing of the measuring stays."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from machines import machine

from flexllmgen.errors import OffloadDirError
from flexllmgen.memory.disk import DirectFile
from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec
from profiling import disk, layer_timing, links, memory
from profiling.compute import timed_runs
from profiling.disk import measure_disk
from profiling.profile import NOISY, Measurement, Rates
from profiling.rates import _measure_compute, measure_rates

OPT = ModelSpec.from_hf_config(published_config("opt-1.3b"))
GPU_ONLY = {"h2d", "d2h", "under", "attention"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes for a test's time, not for good figures."""
    monkeypatch.setattr(memory, "READ_BYTES", 16 << 20)
    monkeypatch.setattr(memory, "COPY_BYTES", 16 << 20)
    monkeypatch.setattr(memory, "_KV_BYTES", 16 << 20)
    monkeypatch.setattr(links, "COPY_BYTES", 16 << 20)
    for function in (disk.measure_disk, disk.measure_cached_file):
        monkeypatch.setattr(function, "__defaults__", (16 << 20,))


def test_rates_are_plausible_for_any_machine(small: None, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    measured = measure_rates(
        device="cpu", dtype="float32", offload_dir=tmp_path, on_progress=lambda *part: told.append(part)
    )
    rates = Rates(**{name: each.median for name, each in measured.items()})
    assert 1e9 < rates.compute_flops_per_s < 1e15
    assert 1e8 < rates.host_bytes_per_s < 1e13
    assert 1e6 < rates.disk_read_bytes_per_s < 1e12
    assert 1e6 < rates.disk_write_bytes_per_s < 1e12
    assert rates.device_bytes_per_s == rates.host_bytes_per_s
    for bits in (8, 4):
        assert 1e5 < rates.dequantise_bytes_per_s(bits) < 1e13
        assert rates.dequantise_bytes_per_s(bits) == measured[f"dequantise_{bits}bit_bytes_per_s"].median
        assert 1e5 < rates.kv_bytes_per_s(bits) < 1e13
        assert rates.kv_bytes_per_s(bits) == measured[f"kv_{bits}bit_bytes_per_s"].median
        unmeasured = dataclasses.replace(rates, kv_8bit_bytes_per_s=None, kv_4bit_bytes_per_s=None)
        assert unmeasured.kv_bytes_per_s(bits) == rates.dequantise_bytes_per_s(bits)
    assert rates.kv_rows_per_s is not None
    assert 1 < rates.kv_rows_per_s < 1e7
    assert rates.h2d_bytes_per_s is None
    assert "h2d_bytes_per_s" not in rates.as_dict()
    assert all(each.best >= each.median > 0 and each.trials > 1 for each in measured.values())
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert {total for _, _, total in told} == {len(told)}
    assert list(tmp_path.iterdir()) == []


def test_what_the_host_does_aside_has_ended_before_it_is_measured(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def read() -> memory.HostWork:
        order.append("host memory")
        return memory.HostWork(lambda: None, 1)

    monkeypatch.setattr("profiling.rates.host_read", read)
    measure_rates(
        device="cpu",
        dtype="float32",
        offload_dir=tmp_path,
        on_progress=lambda title, *_: order.append(title),
        aside=("build", lambda: order.append("built")),
    )
    assert order[:7] == [
        "matrix products",
        "compressed weights",
        "compressed KV cache",
        "build",
        "built",
        "host memory",
        "host memory",
    ]


def test_arithmetic_in_half_precision_is_as_fast_as_layers_are() -> None:
    """A CPU may have a quick kernel for a layer's product and none for a plain one: the limit is the layer's."""
    x, weight = torch.randn(1024, 1024).half(), torch.randn(1024, 1024).half()
    layer_s = min(timed_runs(lambda: torch.nn.functional.linear(x, weight), "cpu", 4))
    assert _measure_compute("cpu", torch.float16).best > 0.2 * 2 * 1024**3 / layer_s


def test_attention_is_as_fast_as_it_was_measured_for_the_model() -> None:
    """Beside copies in the proportion of the general figures, which serve where there is nothing better."""
    table = machine(OPT).layers[0]
    own = dataclasses.replace(table, cpu_attention_bytes_per_s=6e10)
    rates = dataclasses.replace(machine(OPT).typical, host_bytes_per_s=9e10)
    assert rates.attention_bytes_per_s(table) == (9e10, 9e10)
    assert rates.attention_bytes_per_s(own) == (6e10, 6e10)
    rates = dataclasses.replace(
        rates, cpu_attention_bytes_per_s=8e10, cpu_attention_under_copies_bytes_per_s=4e10
    )
    assert rates.attention_bytes_per_s(table) == (8e10, 4e10)
    assert rates.attention_bytes_per_s(own) == (6e10, 3e10)


def test_a_models_own_attention_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KV_BYTES", 8 << 20)
    spec = dataclasses.replace(OPT, num_heads=16, num_kv_heads=2)
    work = memory.host_attention(torch.bfloat16, num_heads=16, num_kv_heads=2, head_dim=64)
    assert work.num_bytes == 8 << 20
    assert 1e8 < layer_timing._attention(spec, "bfloat16").measure().median < 1e13


@pytest.mark.parametrize("codes", [False, True])
def test_micro_batches_attend_to_what_one_call_attends_to(
    monkeypatch: pytest.MonkeyPatch, codes: bool
) -> None:
    monkeypatch.setattr(memory, "_KV_BYTES", 6 << 20)
    monkeypatch.setattr(memory, "_MICRO_BATCHES", 5)
    asked: list[torch.Tensor] = []

    def prepare(q_BNH: torch.Tensor, *_: object, **__: object) -> Callable[[], None]:
        return lambda: asked.append(q_BNH)

    monkeypatch.setattr(memory, "prepare_attention", prepare)
    work = memory.host_attention(torch.float16, num_heads=4, num_kv_heads=2, head_dim=64, codes=codes)
    work.run()
    (whole,) = asked
    assert len(work.parts) == 5
    for part in work.parts:
        part()
    assert torch.equal(torch.cat(asked[1:]), whole)
    assert [each.data_ptr() for each in asked[1:]] == sorted(each.data_ptr() for each in asked[1:])


def test_what_a_call_takes_beyond_its_share_is_measured() -> None:
    def waits(seconds: float) -> Callable[[], None]:
        return lambda: time.sleep(seconds)

    work = memory.HostWork(waits(0.01), 1, tuple(waits(0.004) for _ in range(5)))
    assert 0.002 < work.call_s() < 0.01
    assert memory.HostWork(waits(0.02), 1, tuple(waits(0.001) for _ in range(5))).call_s() == 0.0
    assert memory.HostWork(waits(0.0), 1).call_s() == 0.0


def test_what_only_a_gpu_has_is_all_that_a_cpu_lacks(small: None, tmp_path: Path) -> None:
    measured = measure_rates(device="cpu", dtype="float32", offload_dir=tmp_path)
    missing = {field.name for field in dataclasses.fields(Rates)} - set(measured)
    assert missing
    assert all(GPU_ONLY & set(name.split("_")) for name in missing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_has_every_rate(tmp_path: Path) -> None:
    measured = measure_rates(device="cuda", dtype="float16", offload_dir=tmp_path)
    assert set(measured) == {field.name for field in dataclasses.fields(Rates)}
    assert measured["h2d_bytes_per_s"].best > measured["h2d_pageable_bytes_per_s"].best


def test_a_measurement_is_noisy_when_its_trials_disagree() -> None:
    steady, noisy = Measurement.of(100, [1.0, 1.01, 1.02]), Measurement.of(100, [1.0, 1.01, 2.0])
    assert steady.spread < NOISY < noisy.spread
    assert (steady.noisy, noisy.noisy) == (False, True)
    assert noisy.best == 100
    assert noisy.median == pytest.approx(100 / 1.01)


def test_a_nearly_full_disk_is_measured_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    class Counted(DirectFile):
        def __init__(self, path: Path, *, writable: bool = False, size: int | None = None) -> None:
            written.append(size)
            super().__init__(path, writable=writable, size=size)

    monkeypatch.setattr(disk, "DirectFile", Counted)
    monkeypatch.setattr(disk, "free_disk_bytes", lambda path: 70 << 20)
    measured = measure_disk(tmp_path)
    assert written == [32 << 20]
    assert min(each.median for each in measured.values()) > 0


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OffloadDirError, match="cannot be written"):
        measure_disk(file / "below", num_bytes=16 << 20)
