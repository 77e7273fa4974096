"""The record's table and plot from results that are written here, and a whole run of its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import PEERS
from record_report import asked, best_peer, described, draw, not_run, ours, read, report, table
from record_rows import ENGINE, ROWS, TITLES

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
POLICY = {
    "micro_batch_size": 24,
    "num_micro_batches": 3,
    "weights": {"gpu": 0.125, "cpu": 0.875, "disk": 0.0},
    "kv_cache": {"gpu": 0.0, "cpu": 1.0, "disk": 0.0},
    "activations": {"gpu": 1.0, "cpu": 0.0, "disk": 0.0},
    "weight_bits": 4,
    "kv_bits": None,
    "cpu_attention": True,
}


def own(row: str, tok_s: float, limit: float) -> dict[str, Any]:
    return {
        "row": row,
        "engine": ENGINE,
        "tok_s": tok_s,
        "limit_tok_s": limit,
        "limit_bound": "host to device link",
        "predicted_tok_s": 1.1 * tok_s,
        "prediction_error": 0.1,
        "peak_gpu_gib": 15.5,
        "cut": "24x3",
        "policy": POLICY,
        "sequences": 72,
        "steps": 5,
        "prefill_s": [4.0, 3.9],
        "step_s": [0.9, 0.8],
        "load_s": 2.5,
    }


def peer(row: str, engine: str, tok_s: float) -> dict[str, Any]:
    return {
        "row": row,
        "engine": engine,
        "tok_s": tok_s,
        "prefill_s": 10.5,
        "decode_step_s": 2.17,
        "columns": 4,
        "peak_gpu_gib": 15.0,
        "load_s": 8.0,
        "sequences": 48,
        "cut": "48x1",
        "policy": "20 80 0 100 0 100",
    }


RESULTS = [
    own("opt-30b", 66.0, 82.5),
    peer("opt-30b", "flexgen", 19.7),
    peer("opt-30b", "prefetch", 11.0),
    {"row": "opt-30b", "engine": "flextensor", "error": "ModuleNotFoundError: No module | named flextensor"},
    own("opt-175b-4bit", 12.0, 16.0),
    {"row": "qwen3-30b-a3b", "engine": ENGINE, "error": "over 150 s"},
    peer("qwen3-30b-a3b", "accelerate", 9.0),
]


def written(path: Path, results: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"machine": {"gpu": "a GPU", "torch": "2"}, "results": results}))
    return path


def test_a_row_says_measured_asked_ratio_limit_and_attainment() -> None:
    line = next(line for line in table(RESULTS) if line.startswith("| OPT-30B"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:8] == ["66", "65", "FlexGen 0.1.8 19.7", "3.35", "82.5", "80%", "host to device link"]
    assert cells[8:11] == ["72.6", "+10.0%", "15.50 / 16"]
    assert cells[11] == "24x3, weights 12/88/0, KV 0/100/0, 4-bit weights, attention on the CPU"


def test_rows_without_peers_or_without_ours_are_told() -> None:
    lines = list(table(RESULTS))
    assert any("OPT-175B" in line and "FlexGen's paper 1.12 on a T4" in line for line in lines)
    assert any("Qwen3" in line and "did not run" in line and "accelerate 9" in line for line in lines)
    assert not any("Mixtral" in line for line in lines)
    assert len({line.count("|") for line in lines}) == 1


def test_what_did_not_run_is_named_with_its_reason() -> None:
    text = "\n".join(report({"gpu": "a GPU", "driver": ""}, RESULTS))
    assert text.startswith("gpu a GPU.")
    assert (
        "- OPT-30B, 16 GiB, lossless, FlexTensor 0.5: ModuleNotFoundError: No module / named flextensor"
        in text
    )
    assert list(not_run(RESULTS))[-1].endswith("autoflex: over 150 s")


def test_the_best_peer_is_the_fastest_that_ran() -> None:
    best = best_peer(RESULTS, "opt-30b")
    assert best is not None
    assert best["engine"] == "flexgen"
    assert best_peer(RESULTS, "opt-175b-4bit") is None
    assert ours(RESULTS, "qwen3-30b-a3b") is None


def test_files_are_merged_and_a_failure_replaces_no_figure(tmp_path: Path) -> None:
    first = written(tmp_path / "a.json", [own("opt-30b", 60.0, 80.0), peer("opt-30b", "flexgen", 19.0)])
    failed = {"row": "opt-30b", "engine": ENGINE, "error": "over 1 s"}
    second = written(tmp_path / "b.json", [failed, peer("opt-30b", "flexgen", 20.0)])
    machine, results = read([first, second])
    assert machine["gpu"] == "a GPU"
    assert [(each["engine"], each["tok_s"]) for each in results] == [(ENGINE, 60.0), ("flexgen", 20.0)]


def test_what_is_plain_in_a_policy_is_not_said() -> None:
    plain = {**POLICY, "weight_bits": None, "cpu_attention": False}
    assert described(plain) == "weights 12/88/0, KV 0/100/0"
    assert "top 10% of the values" in described({**plain, "attn_sparsity": 0.1})
    assert "4-bit KV" in described({**plain, "kv_bits": 4})


def test_each_row_asks_something_and_knows_its_peers() -> None:
    for name, row in ROWS.items():
        assert asked(row)
        assert next(iter(row.measures)) == ENGINE
        assert set(row.measures) - {ENGINE} <= set(PEERS)
        assert row.options(ENGINE)["sequences"] == row.sequences, name
    assert set(TITLES) == {ENGINE, *PEERS}


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(RESULTS, tmp_path / "record.png")
    assert (tmp_path / "record.png").read_bytes().startswith(b"\x89PNG")


TINY = "model=opt-125m layers=2 dtype=float32 gpu_gib=0 sequences=2 prompt=8 gen=4 steps=3"


def test_the_command_measures_reports_and_does_not_measure_again(tmp_path: Path) -> None:
    out, table_file = tmp_path / "record.json", tmp_path / "record.md"
    command = [
        sys.executable,
        SCRIPTS / "record_table.py",
        "--out",
        out,
        "--rows",
        "opt-30b",
        "--markdown",
        table_file,
    ]
    command += ["--engines", "prefetch", "deepspeed", "--set", *TINY.split()]
    first = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    results = {each["engine"]: each for each in json.loads(out.read_text())["results"]}
    assert results["prefetch"]["columns"] == 4
    assert results["prefetch"]["projected"] is False
    text = table_file.read_text()
    assert "prefetch hook on transformers" in text
    if "error" in results["deepspeed"]:
        assert "DeepSpeed ZeRO-Inference: ModuleNotFoundError" in text
    assert '"engine": "prefetch"' in first.stdout
    again = subprocess.run(
        [*command, "--engines", "prefetch"], capture_output=True, text=True, check=True, timeout=300
    )
    assert '"engine": "prefetch"' not in again.stdout
