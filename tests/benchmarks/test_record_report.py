"""The record's table and plot from results that are written here, and a whole run of its command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import record_table
from peers import PEERS
from processes import measure
from record_report import asked, best_peer, described, draw, not_run, ours, read, report, table
from record_rows import ENGINE, ROWS, TITLES

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
    text = "\n".join(report([{"gpu": "a GPU", "driver": ""}], RESULTS))
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
    machines, results = read([first, second])
    assert [machine["gpu"] for machine in machines] == ["a GPU", "a GPU"]
    assert [(each["engine"], each["tok_s"]) for each in results] == [(ENGINE, 60.0), ("flexgen", 20.0)]


def test_a_peer_of_another_run_is_marked(tmp_path: Path) -> None:
    alone = written(tmp_path / "a.json", [own("opt-30b", 60.0, 80.0), own("opt-6.7b", 200.0, 300.0)])
    peers = written(tmp_path / "b.json", [peer("opt-30b", "flexgen", 20.0)])
    beside = written(tmp_path / "c.json", [own("opt-6.7b", 210.0, 300.0), peer("opt-6.7b", "flexgen", 70.0)])
    text = "\n".join(report(*read([alone, peers, beside])))
    assert "Run 2: gpu a GPU" in text
    assert "| FlexGen 0.1.8 20 (run 2) | 3 |" in text
    assert "| FlexGen 0.1.8 70 | 3 |" in text


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


def test_the_command_writes_as_it_goes_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, markdown = tmp_path / "record.json", tmp_path / "record.md"
    seen: list[tuple[list[str], int]] = []

    def fake(_script: Path, arguments: list[str], _seconds: float) -> dict[str, Any]:
        there = json.loads(out.read_text())["results"]
        seen.append((arguments, len(there)))
        row, engine = arguments[:2]
        if engine == "diffusers":
            return {"error": "ImportError: none"}
        return own(row, 70.0, 80.0) if engine == ENGINE else peer(row, engine, 10.0)

    def command(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["record_table.py", "--out", str(out), "--rows", "opt-30b", *more])
        record_table.main()

    monkeypatch.setattr(record_table, "measure", fake)
    command("--engines", ENGINE, "diffusers", "--set", "cpu_gib=112", "--markdown", str(markdown))
    assert seen == [
        (["opt-30b", ENGINE, "--set", "cpu_gib=112"], 0),
        (["opt-30b", "diffusers", "--set", "cpu_gib=112"], 1),
    ]
    assert "diffusers' group offloading: ImportError: none" in markdown.read_text()
    command("--engines", ENGINE, "diffusers", "prefetch")
    assert [arguments[1] for arguments, _ in seen[2:]] == ["prefetch", "diffusers"]
    command("--engines", ENGINE, "--again")
    assert len(seen) == 5
    command("--again", "--seconds", "5")
    assert len(seen) == 5


def test_a_measurement_that_fails_or_hangs_says_why(tmp_path: Path) -> None:
    script = tmp_path / "case.py"
    script.write_text(
        "import sys, time; print('{\"tok_s\": 5}'); time.sleep(float(sys.argv[1])); sys.exit(sys.argv[2])"
    )
    assert measure(script, ["0", "0"], 60)["error"] == "0"
    assert measure(script, ["30", ""], 1)["error"] == "over 1 s"
    script.write_text('import time; print(\'{"tok_s": 5, "so_far": true}\', flush=True); time.sleep(30)')
    assert measure(script, [], 1) == {"tok_s": 5, "so_far": True, "over_s": 1}
    script.write_text("print('{\"tok_s\": 5}'); print('{not ours')")
    assert measure(script, [], 60)["tok_s"] == 5


def test_a_measurement_ends_with_whoever_started_it(tmp_path: Path) -> None:
    script, parent, started = tmp_path / "case.py", tmp_path / "parent.py", tmp_path / "started"
    folder = str(Path(processes.__file__).parent)
    script.write_text(
        f"import os, pathlib, sys, time; sys.path.append({folder!r}); import processes; processes.end_with_parent()\n"
        f"pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent.write_text(
        f"import pathlib, sys; sys.path.append({folder!r}); import processes\n"
        f"processes.measure(pathlib.Path({str(script)!r}), [], 60)"
    )
    with subprocess.Popen([sys.executable, str(parent)]) as process:
        until(lambda: started.exists() and started.read_text() != "")
        process.kill()
    until(lambda: _ended(int(started.read_text())))


def _ended(pid: int) -> bool:
    """Whether a process is but a table's entry that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(holds: Callable[[], bool]) -> None:
    """Waits some seconds at most."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
