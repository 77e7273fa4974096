"""The verb `profile`: its table, its JSON, what it refuses; and the profile that every run records."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from harness.cli import app
from profiling import profiler
from profiling.layer_times import LayerShape
from profiling.profile import HardwareProfile, Measurement

Run = Callable[..., Result]


@pytest.fixture
def measured(laptop_profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Measuring is made up, and the cache is the test's own; names what was measured."""
    done: list[str] = []

    def rates(*, on_progress: Any, **_: object) -> dict[str, Measurement]:
        on_progress("disk", 0, 1)
        done.append("rates")
        noisy = Measurement(median=5e9, best=9e9, spread=0.4, trials=5)
        return {**laptop_profile.measurements, "cached_file_bytes_per_s": noisy}

    def layers(spec: Any, **_: object) -> Any:
        done.append(spec.family)
        return dataclasses.replace(laptop_profile.layers[0], shape=LayerShape.of(spec))

    monkeypatch.setattr(profiler, "measure_rates", rates)
    monkeypatch.setattr(profiler, "measure_layer_times", layers)
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FORCE_RERUN_PROFILER", raising=False)
    return done


@pytest.fixture
def profile(tmp_path: Path) -> Run:
    def run(*arguments: object) -> Result:
        options = ["--device", "cpu", "--offload-dir", tmp_path / "offload", *arguments]
        return CliRunner().invoke(app, ["profile", *map(str, options)])

    return run


def test_the_table_has_tiers_rates_and_layers(profile: Run, measured: list[str], tmp_path: Path) -> None:
    done = profile("--model", "facebook/opt-125m")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "float32 on cpu" in lines[1]
    assert "energy counter: no" in lines[1]
    assert any(line.startswith("host memory ") and line.count("GiB") == 2 for line in lines)
    assert any(line.split()[:2] == ["disk,", "read"] and "1.00 GB/s" in line for line in lines)
    noisy = [line for line in lines if line.endswith("noisy")]
    assert len(noisy) == 1
    assert noisy[0].startswith("file in the page cache")
    assert any(line.startswith("one layer of opt, width 768") for line in lines)
    assert any(line.split()[:2] == ["decode", "64"] and line.endswith("TFLOP/s") for line in lines)
    assert str(tmp_path / "cache" / "profiles") in lines[-1]
    assert "disk ..." in done.stderr
    assert "cached_file_bytes_per_s" in done.stderr
    assert measured == ["rates", "opt"]


def test_json_is_the_profile_and_the_file_too(profile: Run, measured: list[str], tmp_path: Path) -> None:
    done = profile("--json", "--output", tmp_path / "profile.json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "profile.json").read_text())
    assert printed["noisy"] == ["cached_file_bytes_per_s"]
    assert HardwareProfile.from_dict(printed).device == "cpu"


def test_a_kept_profile_is_shown_and_refreshed_when_asked(
    profile: Run, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = profile().stdout
    assert profile().stdout.splitlines()[-1] == first.splitlines()[-1]
    assert measured.count("rates") == 1
    profile("--refresh")
    assert measured.count("rates") == 2
    monkeypatch.setenv("FORCE_RERUN_PROFILER", "0")
    profile()
    assert measured.count("rates") == 2
    monkeypatch.setenv("FORCE_RERUN_PROFILER", "1")
    profile()
    assert measured.count("rates") == 3


def test_a_damaged_profile_is_told_of_and_measured_anew(
    profile: Run, measured: list[str], tmp_path: Path
) -> None:
    profile()
    (file,) = (tmp_path / "cache" / "profiles").iterdir()
    file.write_text("{")
    done = profile()
    assert done.exit_code == 0
    assert "warning: the hardware profile" in done.stderr
    assert "measured anew" in done.stderr
    assert measured.count("rates") == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--dtype", "int3"), "--dtype"),
        (("--device", "tpu"), "--device"),
        (("--model", "./nowhere"), "no such folder"),
        (("--offload-dir", "/proc/nowhere"), "--offload-dir"),
        (("--output", "/proc/nowhere/profile.json"), "--output"),
    ],
)
def test_a_mistake_is_one_line(
    profile: Run, measured: list[str], arguments: tuple[str, ...], expected: str
) -> None:
    done = profile(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert expected in errors[0]


@pytest.mark.slow
def test_the_machine_is_profiled_within_half_a_minute(harness: Any, tmp_path: Path) -> None:
    done = harness(
        "profile", "--device", "cpu", "--json", cwd=tmp_path, env={"HARNESS_CACHE_DIR": str(tmp_path)}
    )
    assert done.code == 0, done.stderr
    profile = HardwareProfile.from_dict(json.loads(done.stdout))
    assert profile.took_s < 30
    assert profile.typical.disk_read_bytes_per_s > 0
    assert profile.cpu_attention == ""
    assert len(profile.layers) == 1
    assert list((tmp_path / "profiles").iterdir())
