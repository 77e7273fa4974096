"""A run with compressed weights, from the command line to its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Harness = Callable[..., Any]
SMALL = ("--num-prompts", 2, "--batch-size", 2, "--input-len", 12, "--gen-len", 4, "--repeats", 1)
ON_HOST = ("-s", "flexgen", "--set", "w_gpu_percent=0", "--set", "w_cpu_percent=100")


def run(harness: Harness, cwd: Path, model: Path, *keys: str) -> dict[str, Any]:
    sets = [word for key in keys for word in ("--set", key)]
    done = harness(
        "eval",
        "--model",
        model,
        *SMALL,
        *ON_HOST,
        *sets,
        "--offload-dir",
        "off",
        "--no-mlflow",
        "--json",
        cwd=cwd,
    )
    assert done.code == 0, done.stderr
    result: dict[str, Any] = json.loads(Path(json.loads(done.stdout)["result_path"]).read_text())
    return result


def test_bits_are_recorded_and_fewer_bytes_placed(harness: Harness, tmp_path: Path, tiny_model: Path) -> None:
    plain = run(harness, tmp_path, tiny_model)
    lossy = run(harness, tmp_path, tiny_model, "compress_weight=true", "weight_bits=8")
    assert lossy["plan"]["policy"]["weight_bits"] == 8
    assert lossy["plan"]["policy"]["weight_group_size"] == 64
    assert not plain["plan"]["policy"].get("weight_bits")
    assert lossy["plan"]["weight_bytes"]["cpu"] < plain["plan"]["weight_bytes"]["cpu"]
    # Quantised once, and kept for the next run.
    assert list((tmp_path / "off").glob("quantised-*/layer-0.bin"))


@pytest.mark.parametrize("key", ["weight_bits=5", "weight_group_size=96", "weight_bits=four"])
def test_other_bits_are_one_line(harness: Harness, tmp_path: Path, tiny_model: Path, key: str) -> None:
    arguments = ("eval", "--model", tiny_model, *ON_HOST, "--set", "compress_weight=true", "--set", key)
    done = harness(*arguments, cwd=tmp_path)
    assert done.code == 2
    assert key.split("=")[0] in done.stderr
    assert "Traceback" not in done.stderr
