"""`harness benchmark` as its user meets it, with real processes and a tiny model."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.benchmark.record import Benchmark, CellStatus, cell_folder, read_cells
from harness.results import RunResult, RunStatus

Harness = Callable[..., Any]
SMALL = ("-n", 2, "-b", 2, "--input-len", 16, "--gen-len", 4, "--repeats", 2, "--warmup", 1)


def options(model: Path, *more: object) -> tuple[object, ...]:
    return ("benchmark", "--model", model, *SMALL, "--no-mlflow", "--offload-dir", "spill", *more)


@pytest.mark.slow
def test_two_strategies_and_a_cell_that_does_not_fit(
    harness: Harness, tmp_path: Path, tiny_model: Path
) -> None:
    small = tmp_path / "small.toml"
    # Its cap is for the whole file's cell alone.
    small.write_text('strategy = "flexgen"\ngpu_mem = "10kB"\n')
    done = harness(
        *options(tiny_model, "-s", "accelerate", "-s", "flexgen", "--policy", small, "--launches", 2),
        "--json",
        cwd=tmp_path,
    )
    assert done.code == 6, done.stderr
    said = json.loads(done.stdout)
    folder = Path(said["folder"])
    benchmark = Benchmark.read(folder)
    assert [cell.status for cell in benchmark.cells] == [
        CellStatus.FINISHED,
        CellStatus.FINISHED,
        CellStatus.FAILED,
    ]
    failed = benchmark.cells[2]
    assert failed.name.startswith("flexgen-small")
    assert failed.error is not None
    assert "has" in failed.error.message
    assert "needs" in failed.error.message
    assert failed.name in done.errors[0]

    results = read_cells(folder, benchmark)
    assert [one.launch for one in results["accelerate"].repeats] == [0, 0, 1, 1]
    # The very same prompts, and without loss the very same tokens.
    assert results["accelerate"].workload_key == results["flexgen"].workload_key
    assert {name: one.metrics["parity"] for name, one in results.items()} == {
        "accelerate": 1.0,
        "flexgen": 1.0,
    }
    pids = set()
    for cell in benchmark.cells[:2]:
        inside = cell_folder(folder, cell.name)
        for name in ("requests.jsonl", "timeline.json", "plan.json", "memory.png", "token_latency.png"):
            assert (inside / name).exists(), name
        for uuid in cell.launches:
            one = RunResult.read(inside / "launches" / uuid)
            assert one.status is RunStatus.FINISHED
            pids.add(uuid)
    assert len(pids) == 4
    started = [
        RunResult.read(cell_folder(folder, name) / "launches" / cell.launches[launch]).started_at_ms
        for launch in range(2)
        for name, cell in ((cell.name, cell) for cell in benchmark.cells[:2])
    ]
    assert started == sorted(started)
    for name in ("table.md", "table.json", "report.html"):
        assert (folder / name).stat().st_size > 100
    rows = {row["name"]: row for row in said["rows"]}
    assert rows["flexgen"]["ratio_to_baseline"] > 0
    assert rows["accelerate"]["ratio_to_baseline"] == 1.0
    assert not (tmp_path / "mlruns").exists()


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_missing_is_run_later(
    harness: Harness,
    start_harness: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
    tiny_model: Path,
    number: signal.Signals,
) -> None:
    results = tmp_path / "results"
    process = start_harness(*options(tiny_model, "-s", "accelerate", "-s", "flexgen", "-q"), cwd=tmp_path)

    def one_is_done() -> bool:
        files = list(results.glob("*/benchmark.json"))
        return bool(files) and Benchmark.read(files[0].parent).cells[0].status is CellStatus.FINISHED

    wait_for(one_is_done, process)
    wait_for(lambda: bool(psutil.Process(process.pid).children()), process)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    # A worker does not outlive its command.
    assert not psutil.wait_procs(children, timeout=30)[1]
    folder = next(results.glob("*/benchmark.json")).parent
    left = Benchmark.read(folder)
    assert [cell.status for cell in left.cells] == [CellStatus.FINISHED, CellStatus.PENDING]
    if number is signal.SIGKILL:
        assert left.status is RunStatus.RUNNING
    else:
        assert process.returncode == 130
        assert left.status is RunStatus.KILLED
        assert "--resume" in stderr
        assert "Traceback" not in stderr
        assert (folder / "table.md").exists()
    first = read_cells(folder, left)["accelerate"]

    done = harness("benchmark", "--resume", "@latest", cwd=tmp_path)
    assert done.code == 0, done.stderr
    ended = Benchmark.read(folder)
    assert ended.status is RunStatus.FINISHED
    assert [len(cell.launches) for cell in ended.cells] == [1, 1]
    again = read_cells(folder, ended)
    assert again["accelerate"].repeats == first.repeats
    assert again["flexgen"].metrics["parity"] == 1.0
    assert "flexgen" in done.stdout


@pytest.mark.slow
def test_a_dry_run_lists_the_cells_and_leaves_nothing(
    harness: Harness, tmp_path: Path, tiny_model: Path
) -> None:
    done = harness(*options(tiny_model, "--gpu-mem", "1GiB", "--gpu-mem", "10kB", "--dry-run"), cwd=tmp_path)
    assert done.code == 6, done.stderr
    for name in ("accelerate-gpu1GiB", "flexgen-gpu1GiB", "autoflex-gpu1GiB", "flexgen-gpu10"):
        assert name in done.stdout
    assert "predicted" in done.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--suite", "smok"), "did you mean 'smoke'"),
        (("--fail-on", "speed"), "parity"),
        (("--cell-timeout", "soon"), "10m"),
        (("--resume", "@latest"), "holds no benchmark"),
        (("--resume", "nothing"), "no such benchmark"),
        (("--resume", "@latest", "--batch-size", "4"), "leave out --batch-size"),
        (("--model", "./nowhere"), "no such folder"),
        (
            ("--baseline", "nobody", "--model", "facebook/opt-125m", "--weights", "random"),
            "--baseline nobody",
        ),
    ],
)
def test_a_mistake_is_one_line(
    harness: Harness, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = harness("benchmark", *arguments, cwd=tmp_path)
    assert done.code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert words in line


def test_one_that_is_running_is_not_resumed(harness: Harness, tmp_path: Path) -> None:
    from benchmark_records import make_benchmark

    from harness.provenance import process_identity

    # This test's own process stands for the one that runs it.
    running = make_benchmark(status=RunStatus.RUNNING, process=process_identity())
    running.write(tmp_path / "results" / running.benchmark_uuid)
    done = harness("benchmark", "--resume", running.benchmark_uuid[:6], cwd=tmp_path)
    assert done.code == 2
    assert f"still running (pid {os.getpid()})" in done.stderr
