"""The command as its user meets it: whole runs through the worker, refusals, interruptions, stores away.

A run through the worker takes seconds, so the runs that end well are made once and looked at by many tests.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.results import RunResult, RunStatus

Harness = Callable[..., Any]
SMALL = ("-n", 5, "-b", 2, "--input-len", 32, "--gen-len", 6, "--repeats", 2)
NAMED_METRICS = {
    "load_s",
    "plan_s",
    "ttft_s",
    "tpot_s",
    "itl_p50_s",
    "itl_p90_s",
    "itl_p95_s",
    "itl_p99_s",
    "e2e_s",
    "prefill_tok_s",
    "decode_tok_s",
    "generation_tok_s",
    "input_tokens",
    "input_tokens_padded",
    "output_tokens",
    "peak_rss_bytes",
    "pinned_bytes",
    "offload_disk_bytes",
    "predicted_peak_gpu_bytes",
    "predicted_peak_cpu_bytes",
    "predicted_peak_disk_bytes",
}


@dataclass(frozen=True)
class Recorded:
    """A finished run: its folder to look at, and what the command said."""

    cwd: Path
    printed: dict[str, Any]
    stderr: str

    @property
    def folder(self) -> Path:
        return Path(self.printed["result_path"]).parent

    @property
    def tokens(self) -> list[list[int]]:
        lines = (self.folder / "requests.jsonl").read_text().splitlines()
        return [json.loads(line)["output_ids"] for line in lines]


def evaluate(harness: Harness, cwd: Path, *arguments: object, env: dict[str, str] | None = None) -> Recorded:
    done = harness("eval", *arguments, "--json", cwd=cwd, env=env)
    assert done.code == 0, done.stderr
    return Recorded(cwd=cwd, printed=json.loads(done.stdout), stderr=done.stderr)


@pytest.fixture(scope="module")
def builtin_run(harness: Harness, tmp_path_factory: pytest.TempPathFactory, builtin_model: Path) -> Recorded:
    """The built-in model on real prompts, recorded in a store of its own."""
    cwd = tmp_path_factory.mktemp("builtin")
    return evaluate(harness, cwd, "--model", "builtin", *SMALL, "--tag", "team=tests")


@pytest.fixture(scope="module")
def mlflow_trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH whose mlflow leaves a trace and cannot be imported."""
    folder = tmp_path_factory.mktemp("trap")
    trace = f"open({str(folder / 'imported')!r}, 'w').close()"
    (folder / "mlflow.py").write_text(f"{trace}\nraise ImportError('not installed here')\n")
    return folder


@pytest.fixture(scope="module")
def offloaded_run(
    harness: Harness, tmp_path_factory: pytest.TempPathFactory, builtin_model: Path, mlflow_trap: Path
) -> Recorded:
    """The same with most of the model on disk, where there is no MLflow."""
    cwd = tmp_path_factory.mktemp("offloaded")
    small = (*SMALL[:-1], 1)
    return evaluate(
        harness,
        cwd,
        "--model",
        "builtin",
        *small,
        "--cpu-mem",
        "200MB",
        "--offload-dir",
        "spill",
        "--no-mlflow",
        env={"PYTHONPATH": str(mlflow_trap)},
    )


def test_one_json_object_says_it_all(builtin_run: Recorded, builtin_model: Path) -> None:
    printed = builtin_run.printed
    assert printed["status"] == "FINISHED"
    assert printed["delivered"] is True
    assert len(printed["run_id"]) == 32
    assert Path(printed["result_path"]).parent.name == printed["run_uuid"]
    assert Path(printed["result_path"]).is_absolute()
    assert printed["params"]["strategy"] == "accelerate"
    assert Path(printed["params"]["model_path"]) == builtin_model
    assert set(printed["metrics"]) >= NAMED_METRICS
    assert printed["metrics"]["output_tokens"] == 5 * 6
    assert printed["metrics"]["input_tokens"] + printed["metrics"]["input_tokens_padded"] == 5 * 32
    assert printed["plan"]["device_map"]
    assert printed["error"] is None
    assert all(isinstance(value, (int, float)) for value in printed["metrics"].values())


def test_progress_goes_to_stderr_as_plain_lines(builtin_run: Recorded) -> None:
    lines = builtin_run.stderr.splitlines()
    assert any(line.startswith("repeat 2/2: 30 tokens") for line in lines)
    assert "\x1b" not in builtin_run.stderr
    assert "\r" not in builtin_run.stderr


def test_metrics_agree_with_each_other(builtin_run: Recorded) -> None:
    metrics = builtin_run.printed["metrics"]
    assert metrics["ttft_s"] < metrics["e2e_s"]
    assert metrics["itl_p50_s"] <= metrics["itl_p90_s"] <= metrics["itl_p95_s"] <= metrics["itl_p99_s"]
    assert metrics["weight_bytes_cpu"] == 134_515_008 * 4
    assert metrics["peak_rss_bytes"] > metrics["weight_bytes_cpu"]
    result = RunResult.read(builtin_run.folder)
    for name in ("ttft_s", "e2e_s", "generation_tok_s"):
        values = [repeat.metrics[name] for repeat in result.repeats]
        assert metrics[name] == pytest.approx(sum(values) / 2)


def test_the_tokens_are_those_of_transformers(builtin_run: Recorded, builtin_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    lines = (builtin_run.folder / "requests.jsonl").read_text().splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    ids_BT = torch.tensor([[0] * (32 - len(row)) + row for row in rows])
    mask_BT = torch.tensor([[0] * (32 - len(row)) + [1] * len(row) for row in rows])
    model = AutoModelForCausalLM.from_pretrained(builtin_model, dtype=torch.float32)
    with torch.inference_mode():
        out = model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert builtin_run.tokens == out[:, 32:].tolist()


def test_offloading_changes_where_weights_are_and_not_what_is_said(
    builtin_run: Recorded, offloaded_run: Recorded
) -> None:
    metrics = offloaded_run.printed["metrics"]
    assert offloaded_run.tokens == builtin_run.tokens
    assert metrics["weight_bytes_disk"] > 0
    assert metrics["offload_disk_bytes"] >= metrics["weight_bytes_disk"]
    assert metrics["weight_bytes_cpu"] <= 200_000_000
    assert metrics["weight_bytes_cpu"] + metrics["weight_bytes_disk"] == 134_515_008 * 4
    plan = json.loads((offloaded_run.folder / "plan.json").read_text())
    assert plan["placed_weight_bytes"] == plan["weight_bytes"]
    assert "disk" in plan["device_map"].values()
    assert list((offloaded_run.cwd / "spill").iterdir()) == []


def test_without_mlflow_neither_process_imports_it(offloaded_run: Recorded, mlflow_trap: Path) -> None:
    assert not (mlflow_trap / "imported").exists()
    assert offloaded_run.printed["run_id"] is None
    assert offloaded_run.printed["delivered"] is False
    assert not (offloaded_run.cwd / "mlruns").exists()
    # The trap works.
    sprung = subprocess.run(
        [sys.executable, "-c", "import mlflow"],
        env={**os.environ, "PYTHONPATH": str(mlflow_trap)},
        capture_output=True,
        check=False,
    )
    assert sprung.returncode != 0
    assert (mlflow_trap / "imported").exists()


def test_the_mlflow_run_holds_all_that_is_named(builtin_run: Recorded) -> None:
    from mlflow import MlflowClient

    printed = builtin_run.printed
    client = MlflowClient(f"sqlite:///{builtin_run.cwd / 'mlruns' / 'mlflow.db'}")
    run = client.get_run(printed["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["input_len"] == "32"
    assert run.data.params["enable_offload"].lower() == "true"
    assert run.data.params["model_path"] == printed["params"]["model_path"]
    for name in ("ttft_s", "generation_tok_s", "e2e_s"):
        history = client.get_metric_history(run.info.run_id, name)
        assert len(history) == 3, "two repeats, then the median"
        last = max(history, key=lambda one: one.step)
        assert last.value == pytest.approx(printed["metrics"][name])
    assert set(run.data.metrics) >= NAMED_METRICS
    tags = run.data.tags
    assert tags["harness.run_uuid"] == printed["run_uuid"]
    assert tags["team"] == "tests"
    assert any("fingerprint" in name for name in tags)
    assert any("workload" in name for name in tags)
    assert tags["mlflow.note.content"].count("\n") >= 4
    assert any(name.startswith("system/") for name in run.data.metrics)
    (dataset,) = run.inputs.dataset_inputs
    assert "humaneval" in dataset.dataset.name
    assert dataset.dataset.digest
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names >= {
        "result.json",
        "requests.jsonl",
        "plan.json",
        "hardware_profile.json",
        "environment.txt",
        "run.log",
        "token_latency.png",
        "memory.png",
        "plan_vs_measured.png",
    }


# What is refused before a worker starts, or by it


def assert_refused(done: Any, code: int, *expected: str) -> None:
    """One line on stderr that names the trouble, nothing on stdout."""
    assert done.code == code, done.stderr
    assert done.stdout == ""
    assert len(done.errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for text in expected:
        assert text in done.errors[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--gen-len", "0"), ("--gen-len",)),
        (("-b", "-3"), ("--batch-size",)),
        (("--cpu-mem", "lots"), ("--cpu-mem", "16GiB")),
        (("-s", "acelerate"), ("did you mean 'accelerate'",)),
        (("--prompt-mode", "fil"), ("'fill'",)),
        (("--set", "enable_ofload=true"), ("enable_offload",)),
        (("--config", "missing.toml"), ("no such file",)),
        (("--log-file", "file/x.log"), ("--log-file",)),
        (("--tag", "nothing"), ("KEY=VALUE",)),
        (("--tracking-uri", "ftp://store"), ("ftp://store",)),
        (("--inputlen", "3"), ("--input-len",)),
        (("--input-len",), ("--input-len",)),
        (("stray",), ("stray",)),
    ],
)
def test_a_bad_option_is_one_line(
    harness: Harness, tmp_path: Path, arguments: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    assert_refused(harness("eval", "--model", "builtin", *arguments, cwd=tmp_path), 2, *expected)
    assert time.monotonic() - started < 5


def test_an_unknown_verb_is_one_line(harness: Harness, tmp_path: Path) -> None:
    assert_refused(harness("evil", cwd=tmp_path), 2, "evil")


def test_a_worker_that_refuses_says_one_line(harness: Harness, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = ("eval", "--model", tiny_model, "--offload-dir", "file/x")
    assert_refused(harness(*arguments, cwd=tmp_path), 2, "--offload-dir")
    assert not (tmp_path / "results").exists()


def test_a_cap_too_small_is_five(harness: Harness, tmp_path: Path, tiny_model: Path) -> None:
    arguments = ("--model", tiny_model, "--input-len", 32, "--cpu-mem", "50KB", "--no-mlflow")
    assert_refused(harness("eval", *arguments, cwd=tmp_path), 5, "--cpu-mem", "KiB")


def test_the_traceback_is_for_those_who_ask(harness: Harness, tmp_path: Path) -> None:
    done = harness("eval", "--gen-len", "0", "-v", cwd=tmp_path)
    assert done.code == 2
    assert "Traceback" in done.stderr
    assert len(done.errors) == 1


# The small verbs


def test_config_show_tells_every_source(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("gen_len = 7\nenable_offload = false\n")
    done = harness(
        "config", "show", "--json", "-b", 4, "--config", "run.toml", cwd=tmp_path, env={"HARNESS_SEED": "9"}
    )
    shown = json.loads(done.stdout)
    assert shown["gen_len"] == {"value": 7, "source": "file run.toml"}
    assert shown["enable_offload"] == {"value": False, "source": "file run.toml"}
    assert shown["batch_size"] == {"value": 4, "source": "option --batch-size"}
    assert shown["seed"] == {"value": 9, "source": "environment HARNESS_SEED"}
    assert shown["model"]["source"] == "default"


def test_a_table_that_is_piped_has_a_line_a_row(harness: Harness, tmp_path: Path) -> None:
    long = "/somewhere/" + "far/" * 40
    done = harness("config", "show", "--offload-dir", long, cwd=tmp_path)
    line = next(line for line in done.stdout.splitlines() if line.startswith("offload_dir"))
    assert long.rstrip("/") in line
    assert "option --offload-dir" in line


def test_a_config_file_may_be_named_by_the_environment(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("gen_len = 7\n")
    done = harness("config", "show", cwd=tmp_path, env={"HARNESS_CONFIG": "run.toml", "HARNESS_GENLEN": "1"})
    assert done.code == 0
    assert "HARNESS_GENLEN" in done.stderr
    assert "HARNESS_CONFIG" not in done.stderr


@pytest.mark.parametrize(
    ("verb", "expected"),
    [("models", "builtin"), ("datasets", "humaneval"), ("strategies", "accelerate")],
)
def test_what_can_be_named(harness: Harness, tmp_path: Path, verb: str, expected: str) -> None:
    done = harness(verb, cwd=tmp_path)
    assert done.code == 0
    assert expected in done.stdout
    assert done.stderr == ""


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    line = f"{sys.executable} -m harness.cli models | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


# Runs that are cut short, and stores that are away


@pytest.fixture
def long_run(
    start_harness: Callable[..., "subprocess.Popen[str]"], tmp_path: Path, tiny_model: Path
) -> Iterator["subprocess.Popen[str]"]:
    """A run that goes on for ever, in the middle of its repeats."""
    process = start_harness(
        "eval",
        "--model",
        tiny_model,
        "-n",
        4,
        "-b",
        2,
        "--input-len",
        32,
        "--gen-len",
        8,
        "--repeats",
        1_000_000,
        "--json",
        cwd=tmp_path,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("repeat 4/"):  # Told as it begins.
            break
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def the_result(cwd: Path) -> tuple[Path, RunResult]:
    (path,) = (cwd / "results").iterdir()
    return path, RunResult.read(path)


def store_client(cwd: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{cwd / 'mlruns' / 'mlflow.db'}")


def the_run(cwd: Path) -> Any:
    client = store_client(cwd)
    experiment = client.get_experiment_by_name("offload-eval")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_measured(
    long_run: "subprocess.Popen[str]", tmp_path: Path, number: int
) -> None:
    workers = psutil.Process(long_run.pid).children()
    long_run.send_signal(number)
    stdout, stderr = long_run.communicate(timeout=60)
    assert long_run.returncode == 130
    assert len([line for line in stderr.splitlines() if line.startswith("error:")]) == 1
    assert "Traceback" not in stderr
    printed = json.loads(stdout)
    assert printed["status"] == "KILLED"
    folder, result = the_result(tmp_path)
    assert result.status is RunStatus.KILLED
    assert len(result.repeats) >= 3
    assert printed["metrics"]["repeats"] == len(result.repeats)
    assert (folder / "token_latency.png").exists()
    run = the_run(tmp_path)
    assert run.info.status == "KILLED"
    assert run.data.metrics["ttft_s"] > 0
    assert not any(worker.is_running() for worker in workers)


def test_a_worker_that_is_killed_is_recorded(long_run: "subprocess.Popen[str]", tmp_path: Path) -> None:
    (worker,) = psutil.Process(long_run.pid).children()
    worker.kill()
    _, stderr = long_run.communicate(timeout=60)
    assert long_run.returncode == 5
    assert "signal 9" in stderr
    assert "--cpu-mem" in stderr
    _, result = the_result(tmp_path)
    assert result.status is RunStatus.FAILED
    assert result.error is not None
    assert result.error.type == "WorkerDied"
    run = the_run(tmp_path)
    assert run.info.status == "FAILED"
    assert "signal 9" in run.data.tags["harness.error"]


def test_a_worker_does_not_outlive_its_command(
    long_run: "subprocess.Popen[str]", tmp_path: Path, harness: Harness, tiny_model: Path
) -> None:
    """The command is killed: the worker stops by itself, and the next start closes the run."""
    (worker,) = psutil.Process(long_run.pid).children()
    long_run.kill()
    long_run.wait()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    _, result = the_result(tmp_path)
    assert result.status is RunStatus.KILLED
    assert len(result.repeats) >= 3
    assert the_run(tmp_path).info.status == "RUNNING"
    run_id = the_run(tmp_path).info.run_id
    small = ("-n", 1, "--input-len", 8, "--gen-len", 2, "--repeats", 1, "--warmup", 0)
    done = harness("eval", "--model", tiny_model, *small, cwd=tmp_path)
    assert done.code == 0
    run = store_client(tmp_path).get_run(run_id)
    assert run.info.status == "FAILED"
    assert "process died" in run.data.tags["harness.error"]


def test_a_store_that_is_away_costs_nothing_measured(
    harness: Harness, tmp_path: Path, tiny_model: Path
) -> None:
    away = "http://127.0.0.1:9"
    arguments = ("--model", tiny_model, *SMALL)
    done = harness("eval", *arguments, "--tracking-uri", away, "--json", cwd=tmp_path)
    assert done.code == 4
    printed = json.loads(done.stdout)
    assert printed["status"] == "FINISHED"
    assert printed["delivered"] is False
    assert printed["run_id"] is None
    assert f"harness sync {printed['result_path'].removesuffix('/result.json')}" in done.errors[0]
    assert f"--tracking-uri {away}" in done.errors[0], "or it would go to another store than was asked for"
    folder, result = the_result(tmp_path)
    assert len(result.repeats) == 2
    assert harness("sync", folder, cwd=tmp_path, env={"HARNESS_TRACKING_URI": away}).code == 4
    first = harness("sync", folder, cwd=tmp_path)
    assert first.code == 0, first.stderr
    before = row_counts(tmp_path)
    second = harness("sync", "results", cwd=tmp_path)
    assert second.code == 0
    assert second.stdout.split()[-1] == first.stdout.split()[-1]
    assert row_counts(tmp_path) == before
    run = the_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["ttft_s"] == pytest.approx(result.metrics["ttft_s"])


def row_counts(cwd: Path) -> dict[str, int]:
    with sqlite3.connect(cwd / "mlruns" / "mlflow.db") as database:
        tables = ("runs", "metrics", "params", "tags", "inputs", "datasets")
        return {table: database.execute(f"select count(*) from {table}").fetchone()[0] for table in tables}


def test_sync_of_a_folder_without_results(harness: Harness, tmp_path: Path) -> None:
    assert_refused(harness("sync", tmp_path, cwd=tmp_path), 2, "holds no result")


@pytest.mark.parametrize("verb", [("history",), ("compare", "@latest~1", "@latest")])
def test_a_results_folder_that_is_not_there(harness: Harness, tmp_path: Path, verb: tuple[str, ...]) -> None:
    done = harness(*verb, "--results-dir", tmp_path / "nope", cwd=tmp_path)
    assert_refused(done, 2, "there is no such folder")


def test_a_shell_is_offered_the_suites() -> None:
    from harness.cli.benchmarking import suites_beginning

    assert suites_beginning("s") == ["seed", "smoke"]


def test_a_dry_run_prints_the_plan(harness: Harness, tmp_path: Path, tiny_model: Path) -> None:
    done = harness("eval", "--model", tiny_model, *SMALL, "--dry-run", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert plan["batch_size"] == 2
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "mlruns").exists()


def test_no_network_names_the_built_in_model(harness: Harness, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    started = time.monotonic()
    done = harness("eval", cwd=tmp_path, env=env)
    assert_refused(done, 2, "facebook/opt-1.3b", "--model builtin")
    # Imports of this machine under load included; the network's share is held to 3 s in test_models.
    assert time.monotonic() - started < 15


def test_quiet_says_results_only(harness: Harness, tmp_path: Path, tiny_model: Path) -> None:
    done = harness("eval", "--model", tiny_model, *SMALL, "--no-mlflow", "-q", cwd=tmp_path)
    assert done.code == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning:")] == []
    assert "generation throughput" in done.stdout
    assert "harness sync results/" in done.stdout
    assert os.fspath(next((tmp_path / "results").iterdir()).relative_to(tmp_path)) in done.stdout
