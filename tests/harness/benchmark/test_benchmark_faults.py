"""What may befall a benchmark: signals, a store that goes and comes back, another benchmark, odd records and names."""

import contextlib
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
from benchmark_records import make_benchmark, make_benchmark_folder
from records import make_folder, make_result
from servers import free_port, start_server

from harness.benchmark.record import Benchmark, CellStatus, cell_folder, read_cells
from harness.results import RunResult, RunStatus, write_json
from harness.store import Store

Harness = Callable[..., Any]
Start = Callable[..., "subprocess.Popen[str]"]
SMALL = ("-n", 2, "-b", 2, "--input-len", 16, "--gen-len", 4, "--warmup", 1)
TWO = ("-s", "accelerate", "-s", "flexgen")


def benchmark_of(cwd: Path) -> Path:
    return next((cwd / "results").glob("*/benchmark.json")).parent


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.05)


def measured(cwd: Path) -> list[RunResult]:
    """Launches that have a repeat on the disk; whatever is read while it is written is whole."""
    found = [RunResult.read(file.parent) for file in (cwd / "results").rglob("launches/*/result.json")]
    return [one for one in found if one.repeats]


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    assert "internal error" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.slow
def test_a_cells_process_that_is_killed_costs_its_cell_alone(
    harness: Harness, start_harness: Start, tmp_path: Path, tiny_model: Path
) -> None:
    many = tmp_path / "many.toml"
    many.write_text('[[cells]]\nstrategy = "accelerate"\nrepeats = 100000\n[[cells]]\nstrategy = "flexgen"\n')
    arguments = ("--suite", many, "--model", tiny_model, *SMALL, "--no-mlflow", "-q")
    process = start_harness("benchmark", *arguments, cwd=tmp_path)
    wait_for(lambda: bool(measured(tmp_path)), process)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 6, stderr
    assert "1 of 2 cells failed: accelerate" in one_line(stderr)
    folder = benchmark_of(tmp_path)
    benchmark = Benchmark.read(folder)
    assert [cell.status for cell in benchmark.cells] == [CellStatus.FAILED, CellStatus.FINISHED]
    error = benchmark.cells[0].error
    assert error is not None
    assert "signal 9" in error.message
    assert error.message.count("peak") == 1
    results = read_cells(folder, benchmark)
    killed = results[benchmark.cells[0].name]
    assert killed.status is RunStatus.FAILED
    assert len(killed.repeats) >= 1
    assert not list(folder.rglob(".reserve"))
    # Nothing is missing: what failed, failed.
    assert harness("benchmark", "--resume", "@latest", cwd=tmp_path).code == 6


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["eval", "benchmark"])
def test_a_second_interruption_kills_a_worker_that_does_not_answer(
    harness: Harness, start_harness: Start, tmp_path: Path, tiny_model: Path, verb: str
) -> None:
    long = (*SMALL, "--repeats", 1_000_000, "--no-mlflow", "-q")
    process = start_harness(verb, "--model", tiny_model, "-s", "accelerate", *long, cwd=tmp_path)

    def has_measured() -> bool:
        return any(
            RunResult.read(file.parent).repeats for file in (tmp_path / "results").rglob("result.json")
        )

    wait_for(has_measured, process)
    (worker,) = psutil.Process(process.pid).children()
    # As in a call into native code that never returns.
    worker.suspend()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in one_line(stderr)
    assert not psutil.wait_procs([worker], timeout=10)[1]
    results = [RunResult.read(file.parent) for file in (tmp_path / "results").rglob("result.json")]
    assert {one.status for one in results} == {RunStatus.KILLED}
    assert all(one.repeats for one in results)
    assert not list((tmp_path / "results").rglob(".reserve"))
    if verb == "benchmark":
        assert Benchmark.read(benchmark_of(tmp_path)).status is RunStatus.KILLED
    assert harness("sync", "results", cwd=tmp_path).code == 0


@pytest.mark.slow
def test_the_stores_server_goes_while_cells_run_and_comes_back(
    harness: Harness, start_harness: Start, tmp_path: Path, tiny_model: Path, store: Store, client: Any
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    arguments = ("--model", tiny_model, *TWO, *SMALL, "--repeats", 2, "--tracking-uri", uri, "-q")

    def parent() -> Any:
        experiment = client.get_experiment_by_name("offload-eval")
        found = client.search_runs([experiment.experiment_id], "tags.`harness.kind` = 'benchmark'")
        assert len(found) == 1
        return found[0]

    with start_server(store, port) as server:
        process = start_harness("benchmark", *arguments, cwd=tmp_path)
        # The first cell is measured; the record is open.
        wait_for(lambda: bool(measured(tmp_path)), process)
        assert parent().info.status == "RUNNING"
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        assert process.poll() is None, "it went while cells ran"
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 4, stderr
    folder = benchmark_of(tmp_path)
    said = one_line(stderr)
    assert f"harness sync {folder}" in said
    assert uri in said
    benchmark = Benchmark.read(folder)
    assert {cell.status for cell in benchmark.cells} == {CellStatus.FINISHED}
    assert all(cell.repeats for cell in read_cells(folder, benchmark).values())
    opened = parent().info.run_id
    gone = harness("sync", folder, "--tracking-uri", uri, cwd=tmp_path)
    assert gone.code == 4
    with start_server(store, port):
        back = harness("sync", folder, "--tracking-uri", uri, cwd=tmp_path)
    assert back.code == 0, back.stderr
    run = parent()
    assert (run.info.run_id, run.info.status) == (opened, "FINISHED")
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{opened}'")
    assert {child.info.run_name: child.info.status for child in children} == {
        "accelerate": "FINISHED",
        "flexgen": "FINISHED",
    }


@pytest.mark.slow
def test_two_benchmarks_at_once_share_store_results_and_offload_folder(
    start_harness: Start, tmp_path: Path, tiny_model: Path, client: Any
) -> None:
    """Both spill the same model's weights to the same folder, where each finds its own or the shared pack."""
    spill = (
        "--set",
        "flexgen.w_gpu_percent=0",
        "--cpu-mem",
        "450kB",
        "--gpu-mem",
        "2MB",
        "--offload-dir",
        "spill",
    )
    arguments = ("--model", tiny_model, *TWO, *SMALL, "--repeats", 2, "--launches", 2, *spill, "--json")
    processes = [start_harness("benchmark", *arguments, cwd=tmp_path) for _ in range(2)]
    said = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=200)
        assert process.returncode == 0, stderr
        said.append(json.loads(stdout))
    assert len({one["benchmark_uuid"] for one in said}) == 2
    for one in said:
        folder = Path(one["folder"])
        results = read_cells(folder, Benchmark.read(folder))
        assert {name: len(result.repeats) for name, result in results.items()} == {
            "accelerate": 4,
            "flexgen": 4,
        }
        assert {result.metrics["parity"] for result in results.values()} == {1.0}
        assert results["flexgen"].metrics["weight_bytes_disk"] > 0
    experiment = client.get_experiment_by_name("offload-eval")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2 * 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    left = [path.name for path in (tmp_path / "spill").iterdir()]
    assert len(left) == 1, "only the pack that the next run uses again"
    assert left[0].startswith("weights-")


# Records that this version cannot read


@pytest.fixture
def with_newer(tmp_path: Path) -> Path:
    """A folder whose results/ hold a run, a benchmark, and one of each by a harness to come; the newest by time."""
    results = tmp_path / "results"
    make_folder(results, make_result(metrics={"generation_tok_s": 1.0}))
    make_benchmark_folder(results)
    newer = make_folder(results, make_result(run_uuid="e" * 32))
    write_json(newer / "result.json", {**RunResult.read(newer).model_dump(mode="json"), "schema_version": 99})
    later = make_benchmark(benchmark_uuid="f" * 32, started_at_ms=2_000_000_000_000)
    folder = make_benchmark_folder(results, later)
    write_json(
        folder / "benchmark.json", {**later.model_dump(mode="json"), "schema_version": 99, "of_tomorrow": 1}
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "skips"),
    [
        (("compare", "@latest", "@latest"), 0, 2),
        (("compare", "--strategies", "@latest"), 0, 2),
        (("history", "--metric", "generation_tok_s"), 0, 2),
        (("export", "--results-dir", "results", "-o", "out.csv"), 0, 2),
        (("sync", "results"), 2, 2),
        (("doctor",), None, 1),
        (("benchmark", "--resume", "@latest", "--no-mlflow"), None, 1),
        (("benchmark", "--resume", "f" * 32), 2, 1),
        (("compare", "results/" + "e" * 32, "@latest"), 2, 1),
        (("compare", "results/" + "e" * 32 + "/result.json", "@latest"), 2, 1),
        (("sync", "results/" + "f" * 32), 2, 1),
    ],
)
def test_a_newer_record_is_told_in_a_line_and_keeps_nothing_else_back(
    harness: Harness, with_newer: Path, arguments: tuple[str, ...], code: int | None, skips: int
) -> None:
    done = harness(*arguments, cwd=with_newer)
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert "internal error" not in said
    if code is not None:
        assert done.code == code, said
    words = " ".join(said.split())
    assert words.count("written by a newer harness") == skips, said
    if arguments[0] == "sync" and arguments[1] == "results":
        assert "is benchmark run" in done.stdout
    if arguments[0] == "export":
        assert len((with_newer / "out.csv").read_text().splitlines()) == 1 + 1 + 6


@pytest.mark.slow
def test_a_launch_that_cannot_be_read_is_measured_again(
    harness: Harness, tmp_path: Path, tiny_model: Path
) -> None:
    done = harness(
        "benchmark", "--model", tiny_model, *TWO, *SMALL, "--repeats", 1, "--no-mlflow", cwd=tmp_path
    )
    assert done.code == 0, done.stderr
    folder = benchmark_of(tmp_path)
    benchmark = Benchmark.read(folder)
    # As if the command had died before it counted the last launch.
    cell = benchmark.cells[1]
    forgotten = cell.model_copy(update={"launches": [], "status": CellStatus.PENDING})
    benchmark.model_copy(update={"cells": [benchmark.cells[0], forgotten], "status": RunStatus.KILLED}).write(
        folder
    )
    launch = cell_folder(folder, cell.name) / "launches" / cell.launches[0] / "result.json"
    launch.write_bytes(launch.read_bytes()[:300])
    again = harness("benchmark", "--resume", "@latest", cwd=tmp_path)
    assert again.code == 0, again.stderr
    assert "measured again" in again.stderr
    assert "no whole JSON" in again.stderr
    ended = Benchmark.read(folder)
    assert ended.status is RunStatus.FINISHED
    assert ended.cells[1].launches != cell.launches


# Names and prompts of every kind


ROWS = [
    None,
    "",
    "naïve 日本語 \U0001f680 \u202eabc'\"%() \u0301",
    "e\u0301 \u200b\ufeff\U000e0001 \ue000",
    "nul \x00 and bell \a",
    "[red]no markup[/red] {braces} </script>",
    "\u2028 line \x85 ends \r\n",
]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_rows_that_are_none_and_every_kind_of_unicode(
    harness: Harness, tmp_path: Path, tiny_model: Path, encoding: str
) -> None:
    base = tmp_path / "ordner ü 日本 \U0001f680 %41 'q'"
    base.mkdir()
    (base / "modell ñ \U0001f680").symlink_to(tiny_model)
    (base / "prompts ü.jsonl").write_text("".join(json.dumps({"question": row}) + "\n" for row in ROWS))
    environment = {"PYTHONIOENCODING": encoding}
    name = "bench \U0001f680 [bold]x[/] ' \" %"

    def run(*arguments: object) -> Any:
        done = harness(*arguments, cwd=base, env=environment)
        assert done.code == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done

    asked = (
        "--model",
        "modell ñ \U0001f680",
        "--dataset",
        "prompts ü.jsonl",
        "-n",
        5,
        "-b",
        5,
        "--input-len",
        32,
    )
    asked += (
        "--gen-len",
        4,
        "--repeats",
        1,
        "--run-name",
        name,
        "--experiment",
        "exp 日本",
        "--tag",
        "tüg=\U0001f680",
    )
    said = json.loads(run("benchmark", *asked, *TWO, "--json").stdout)
    assert said["name"] == name
    folder = Path(said["folder"])
    assert folder.parent.parent == base
    results = read_cells(folder, Benchmark.read(folder))
    assert {one.metrics["parity"] for one in results.values()} == {1.0}
    assert results["flexgen"].dataset is not None
    assert (results["flexgen"].dataset.num_prompts, results["flexgen"].tags["tüg"]) == (5, "\U0001f680")
    assert any("2 rows" in warning and "skipped" in warning for warning in results["flexgen"].warnings)
    lines = (cell_folder(folder, "flexgen") / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = {
        json.loads(line)["prompt"]
        for line in (folder / "cells/flexgen/requests.jsonl").open(encoding="utf-8")
    }
    assert len(prompts) == 5, lines
    one = json.loads(run("eval", *asked, "-s", "flexgen", "--json").stdout)
    assert (one["strategy"], one["status"], one["delivered"]) == ("flexgen", "FINISHED", True)
    for more in (
        ("eval", *asked, "-s", "flexgen", "-q"),
        ("benchmark", "--resume", folder),
        ("compare", "--strategies", folder),
        ("compare", one["run_uuid"], "@latest:flexgen"),
        ("history", "--metric", "generation_tok_s"),
        ("export", "-o", "x.csv"),
        ("export",),
        ("sync", "results"),
    ):
        run(*more)
    assert "Traceback" not in harness("doctor", cwd=base, env=environment).stderr
    with contextlib.suppress(FileNotFoundError):
        assert "\U0001f680" in (base / "x.csv").read_text(encoding="utf-8")
