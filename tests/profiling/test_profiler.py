"""Taking a profile: measured once and kept, measured again when it should be, never another machine's."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec
from profiling import profiler
from profiling.hardware import Hardware, read_hardware
from profiling.layer_times import LayerShape, LayerTimes
from profiling.profile import HardwareProfile, Measurement
from profiling.profiler import MAX_AGE_S, small_spec, take_profile

OPT = ModelSpec.from_hf_config(published_config("opt-125m"))
Taken = tuple[HardwareProfile, list[str]]


class Measured:
    """Stands in for the measuring, and counts it."""

    def __init__(self, profile: HardwareProfile) -> None:
        self.profile = profile
        self.rates: list[str] = []
        self.layers: list[str] = []

    def measure_rates(self, *, dtype: str, on_progress: Any, **_: object) -> dict[str, Measurement]:
        on_progress("disk", 0, 1)
        self.rates.append(dtype)
        return dict(self.profile.measurements)

    def measure_layer_times(self, spec: ModelSpec, **_: object) -> LayerTimes:
        self.layers.append(spec.name)
        return dataclasses.replace(self.profile.layers[0], shape=LayerShape.of(spec))


@pytest.fixture
def measured(laptop_profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch) -> Measured:
    stand_in = Measured(laptop_profile)
    monkeypatch.setattr(profiler, "measure_rates", stand_in.measure_rates)
    monkeypatch.setattr(profiler, "measure_layer_times", stand_in.measure_layer_times)
    return stand_in


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., Taken]:
    def run(spec: ModelSpec | None = OPT, *, hardware: Hardware | None = None, **changes: Any) -> Taken:
        options: dict[str, Any] = {
            "device": "cpu",
            "dtype": "float32",
            "cache": tmp_path / "cache",
            **changes,
        }
        return take_profile(hardware or read_hardware(tmp_path), spec, offload_dir=tmp_path, **options)

    return run


def kept_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache").iterdir()
    return file


def test_a_profile_is_measured_once_and_kept(
    take: Callable[..., Taken], measured: Measured, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    first, warnings = take(on_progress=lambda *part: told.append(part))
    assert warnings == []
    assert told == [("disk", 0, 2), ("layers of the model", 1, 2)]
    assert kept_file(tmp_path).name == f"profile-{first.fingerprint}.json"
    again, warnings = take(on_progress=lambda *part: pytest.fail("nothing to measure"))
    assert warnings == []
    assert (len(measured.rates), len(measured.layers)) == (1, 1)
    assert again.measurements == first.measurements
    assert again.layers == first.layers
    assert again.measured_at == first.measured_at
    assert again.capacity.host_available_bytes > 0


def test_without_a_gpu_nothing_asks_for_the_kernel(
    take: Callable[..., Taken], measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("is_ready", "which"):
        monkeypatch.setattr(profiler.cpu_attention, name, lambda: pytest.fail("would build it"))
    assert take()[0].cpu_attention == ""
    assert take()[0].cpu_attention == ""


@pytest.mark.parametrize("ready", [False, True])
def test_the_kernel_is_built_while_the_gpu_starts(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    built, asides = threading.Event(), []

    def which() -> str:
        assert built.wait(10)
        return "avx2"

    def start() -> int:
        if ready:
            built.set()
            time.sleep(0.2)
        return 0

    def rates(*, aside: tuple[str, Callable[[], object]] | None, **_: object) -> dict[str, Measurement]:
        built.set()
        asides.append(None if aside is None else (aside[0], aside[1]()))
        return dict(measured.profile.measurements)

    monkeypatch.setattr(profiler.cpu_attention, "which", which)
    monkeypatch.setattr(profiler, "_start_gpu", start)
    monkeypatch.setattr(profiler, "measure_rates", rates)
    monkeypatch.setattr(profiler._Taker, "_capacity", lambda *_: measured.profile.capacity)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    taken = profiler._Taker(read_hardware(tmp_path), "cuda", "float16", tmp_path, None).measure("here")
    assert taken.cpu_attention == "avx2"
    assert asides == [None if ready else (profiler.BUILDING, "avx2")]


@pytest.mark.parametrize("ready", [False, True])
def test_beside_a_gpu_it_is_told_when_the_kernel_is_built(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(profiler.cpu_attention, "is_ready", lambda: ready)
    monkeypatch.setattr(profiler.cpu_attention, "which", lambda: "avx2")
    taker = profiler._Taker(
        read_hardware(tmp_path), "cuda", "float16", tmp_path, lambda *part: told.append(part)
    )
    assert taker.cpu_attends() == "avx2"
    assert told == ([] if ready else [(profiler.BUILDING, 0, 1)])
    # With a kept profile too; but not where it could not be built before.
    monkeypatch.setattr(profiler._Taker, "_capacity", lambda *_: measured.profile.capacity)
    for kept, more in (("avx2", 0 if ready else 1), ("torch", 0)):
        told.clear()
        taker.brought_up_to_date(dataclasses.replace(measured.profile, cpu_attention=kept))
        assert len(told) == more


def test_another_number_format_is_another_profile(take: Callable[..., Taken], measured: Measured) -> None:
    assert take()[0].fingerprint != take(dtype="float16")[0].fingerprint
    assert measured.rates == ["float32", "float16"]


def test_another_model_adds_its_layers_and_measures_no_rate(
    take: Callable[..., Taken], measured: Measured
) -> None:
    take()
    larger = dataclasses.replace(OPT, intermediate_size=4096)
    profile, _ = take(larger)
    assert [table.shape for table in profile.layers] == [LayerShape.of(OPT), LayerShape.of(larger)]
    deeper = dataclasses.replace(OPT, num_layers=96)
    assert take(deeper)[0].layers == profile.layers
    assert (len(measured.rates), len(measured.layers)) == (1, 2)


def test_without_a_model_a_small_one_is_timed(take: Callable[..., Taken], measured: Measured) -> None:
    profile, _ = take(None)
    assert [table.shape for table in profile.layers] == [LayerShape.of(small_spec())]
    take()
    assert take(None)[0].layers == take()[0].layers


def test_a_layer_that_does_not_fit_comfortably_is_not_timed(
    take: Callable[..., Taken], measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 3 * OPT.layer_weight_bytes(4)
    monkeypatch.setattr(profiler, "available_memory_bytes", lambda: free)
    profile, warnings = take()
    assert measured.layers == [small_spec().name]
    assert warnings == []
    assert LayerShape.of(OPT) not in {table.shape for table in profile.layers}


def test_memory_that_runs_out_is_a_warning(
    take: Callable[..., Taken], measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> LayerTimes:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(profiler, "measure_layer_times", run_out)
    profile, warnings = take()
    assert profile.layers == ()
    assert len(warnings) == 1
    assert "memory ran out" in warnings[0]


def test_refresh_measures_everything_again(take: Callable[..., Taken], measured: Measured) -> None:
    take()
    take(dataclasses.replace(OPT, intermediate_size=4096))
    profile, warnings = take(refresh=True)
    assert warnings == []
    assert len(measured.rates) == 2
    assert [table.shape for table in profile.layers] == [LayerShape.of(OPT)]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda kept: "{ damaged", "cannot be used"),
        (lambda kept: "[]", "cannot be used"),
        (lambda kept: json.dumps({**kept, "schema_version": 1}), "schema version 1"),
        (lambda kept: json.dumps({**kept, "capacity": 3}), "cannot be used"),
        (lambda kept: json.dumps({**kept, "fingerprint": "another"}), "another machine or version"),
        (lambda kept: json.dumps({**kept, "measured_at": kept["measured_at"] - MAX_AGE_S - 1}), "7 days old"),
        (lambda kept: json.dumps({**kept, "measured_at": kept["measured_at"] + 1e6}), "days old"),
    ],
    ids=["damaged", "no object", "old version", "no profile", "another machine", "old", "from the future"],
)
def test_what_must_not_be_used_is_measured_anew_with_a_warning(
    take: Callable[..., Taken],
    measured: Measured,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], str],
    warning: str,
) -> None:
    first, _ = take()
    file = kept_file(tmp_path)
    file.write_text(change(json.loads(file.read_text())))
    profile, warnings = take()
    assert len(measured.rates) == 2
    assert len(warnings) == 1
    assert warning in warnings[0]
    assert "measured anew" in warnings[0]
    assert profile.fingerprint == first.fingerprint
    assert take()[1] == []
    assert len(measured.rates) == 2


def test_another_machine_measures_its_own(
    take: Callable[..., Taken], measured: Measured, tmp_path: Path
) -> None:
    hardware = read_hardware(tmp_path)
    take(hardware=hardware)
    take(hardware=dataclasses.replace(hardware, driver="580.1"))
    assert len(measured.rates) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    take: Callable[..., Taken], measured: Measured, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    profile, warnings = take(cache=tmp_path / "file" / "cache")
    assert profile.layers
    assert any("cannot be kept" in warning for warning in warnings)


def test_a_small_model_is_really_measured(tmp_path: Path) -> None:
    """One unmocked pass over the layers' part."""
    small = {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64}
    small |= {"num_hidden_layers": 2, "vocab_size": 256}
    tiny = ModelSpec.from_hf_config({**published_config("opt-125m"), **small})
    table = profiler.measure_layer_times(tiny, dtype="float32", device="cpu")
    assert table.shape == LayerShape.of(tiny)
    assert 0 < table.step_s("layer", 1, 64) < 1
    assert table.prompt_s("layer", 1024, 64) > table.prompt_s("layer", 64, 64) > 0
    assert table.head_s(4) > 0
    assert table.issue_s >= 0
