"""The verb `plan`: for a machine that only a file is here of, what it shows, what it refuses, what it leaves alone."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec
from harness.cli import app
from profiling.profile import SCHEMA_VERSION

sys.path.append(str(Path(__file__).parents[1] / "profiling"))
from machines import machine

Run = Callable[..., Result]
GIB = 2**30


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with profiles of a GPU machine, of one with little of everything, and of one without a GPU."""
    folder = tmp_path_factory.mktemp("profiles")
    opt_30b = ModelSpec.from_hf_config(published_config("opt-30b"), "opt-30b")
    opt_1b = ModelSpec.from_hf_config(published_config("opt-1.3b"), "opt-1.3b")
    # The CPU attends to what host memory gives beside the link.
    attends = {"cpu_attention_bytes_per_s": 9.4e10, "cpu_attention_under_copies_bytes_per_s": 3.9e10}
    gpu = machine(opt_30b, **attends)
    little = dataclasses.replace(gpu.capacity, host_available_bytes=8 * GIB, disk_free_bytes=16 * GIB)
    for name, profile in {
        "gpu": gpu,
        "little": dataclasses.replace(gpu, capacity=little),
        "laptop": machine(opt_1b, "cpu"),
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(profile.as_dict()))
    return folder


@pytest.fixture
def plan(profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The verb in a folder of its own; `plan("gpu", ...)` plans for that machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(tmp_path / "cache"))

    def run(name: str | None, *arguments: object) -> Result:
        hardware = [] if name is None else ["--hardware", str(profiles / f"{name}.json")]
        return CliRunner().invoke(app, ["plan", *hardware, *map(str, arguments)])

    return run


def row(done: Result, title: str) -> str:
    """The line of the output that begins so."""
    return next(line for line in done.stdout.splitlines() if line.startswith(title))


def assert_refused(done: Result, code: int, *expected: str) -> None:
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for text in expected:
        assert text in errors[0]


def test_the_largest_model_is_planned_for_a_machine_elsewhere(plan: Run, tmp_path: Path) -> None:
    done = plan("gpu", "-m", "facebook/opt-175b", "-n", 32)
    assert done.exit_code == 0, done.stderr
    assert "autoflex, facebook/opt-175b, float16 on cuda" in row(done, "plan: ")
    assert row(done, "weights ").count("GiB (") == 3
    assert row(done, "headroom ").count("iB") == 3
    assert row(done, "disk, read ").count("GiB") == 3
    binds = [line for line in done.stdout.splitlines() if line.endswith("# binds")]
    assert [line.split()[0] for line in binds] == ["disk", "disk"]
    assert "100%" in binds[1]
    assert "decode by disk" in row(done, "bound ")
    assert "none of them takes less than" in row(done, "search ")
    runners_up = done.stdout[done.stdout.index("runners-up ") :].splitlines()
    # A line on how fast and why, and one on the policy.
    assert len(runners_up) % 2 == 1
    assert 1 + 2 * 2 <= len(runners_up) <= 1 + 2 * 5
    assert all("more " in line or "less plain" in line for line in runners_up[1::2])
    assert done.stderr.count("warning:") == 2
    assert "faster with --allow-lossy: weights in 4 bits and KV cache in 4 bits, predicted " in done.stderr
    assert "scaled from a layer of opt, width 7168" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_holds_the_numbers(plan: Run, tmp_path: Path) -> None:
    arguments = ("-m", "facebook/opt-30b", "--gpu-mem", "16GiB", "-n", 96, "--input-len", 512)
    done = plan("gpu", *arguments, "--json")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    made, predicted = shown["plan"], shown["plan"]["predicted"]
    assert made["strategy"] == "autoflex"
    assert made["model_path"] is None
    assert shown["predicted_tok_s"] == predicted["generation_tok_s"] <= shown["limit_tok_s"] * 1.05
    assert shown["bytes_per_token"]["h2d"] == pytest.approx(
        predicted["decode_moved_bytes"]["h2d"] / (96 * 31)
    )
    assert shown["binding"]["decode"]["resource"] == predicted["decode_bound"]
    assert 0.5 < shown["binding"]["decode"]["busy"] <= 1
    gpu = shown["memory"]["GPU"]
    assert gpu["limit_bytes"] == 16 * GIB
    assert gpu["headroom_bytes"] == gpu["limit_bytes"] - gpu["peak_bytes"] >= 0
    assert gpu["peak_bytes"] == sum(sizes["gpu"] for sizes in shown["placement_bytes"].values())
    assert shown["memory"]["disk"]["limit_bytes"] == 1 << 40
    assert made["search"]["runners_up"]
    assert shown["warnings"] == []
    assert list(tmp_path.iterdir()) == []


def test_nothing_fits_tells_the_least_change(plan: Run, tmp_path: Path) -> None:
    done = plan("little", "-m", "facebook/opt-175b")
    assert_refused(done, 5, "no policy fits facebook/opt-175b", "more on the GPU", "more in the offload dir")
    done = plan("little", "-m", "facebook/opt-175b", "--json")
    assert done.exit_code == 5
    assert json.loads(done.stdout)["error"].startswith("no policy fits")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("strategy", "told"), [("flexgen", True), ("autoflex", False)])
def test_leave_that_no_search_could_use_is_told_of(plan: Run, strategy: str, told: bool) -> None:
    done = plan("gpu", "--model", "opt-30b", "--strategy", strategy, "--batch-size", 8, "--allow-lossy")
    assert (f"--allow-lossy has no effect on {strategy}" in done.stderr) is told


def test_a_cap_of_more_than_a_machine_without_a_gpu_has_is_told_of(plan: Run) -> None:
    done = plan("laptop", "--model", "opt-1.3b", "--gpu-mem", "1000TiB")
    assert "--gpu-mem is more than the " in done.stderr
    assert "that can be had here, which count" in done.stderr


@pytest.mark.parametrize("lossy", [(), ("--allow-lossy", "--set", "least_bits=8")])
def test_what_a_search_finds_is_asked_for_by_hand(plan: Run, lossy: tuple[str, ...]) -> None:
    run = ("-m", "facebook/opt-30b", "--gpu-mem", "16GiB", "-n", 96, "--input-len", 512)
    done = plan("gpu", *run, *lossy)
    assert "attention on the CPU" in row(done, "  policy:")
    _, _, after = done.stdout.partition("the same by hand\n")
    options, _, runners_up = after.partition("\n\n")
    assert ("weights in 8 bits" in runners_up) == bool(lossy)
    by_hand = plan("gpu", *run, *shlex.split(options.replace("\\\n", " ")))
    assert by_hand.exit_code == 0, by_hand.stderr
    for title in ("weights ", "KV cache ", "takes at most ", "predicted ", "physical limit "):
        assert row(by_hand, title) == row(done, title)
    assert "by hand" not in by_hand.stdout


def test_a_policy_by_hand_is_shown_without_runners_up(plan: Run) -> None:
    shares = ("--set", "w_gpu_percent=20", "--set", "w_cpu_percent=80")
    done = plan("gpu", "-s", "flexgen", "-m", "facebook/opt-30b", "-b", 8, *shares)
    assert done.exit_code == 0, done.stderr
    assert "1 micro-batch of 8" in done.stdout
    assert "(80%)" in row(done, "weights ")
    assert "runners-up" not in done.stdout
    assert_refused(plan("gpu", "-s", "flexgen", "-m", "facebook/opt-175b"), 5, "w_gpu_percent")


def test_accelerate_shows_the_limit_alone(plan: Run, tmp_path: Path) -> None:
    done = plan("gpu", "-s", "accelerate", "-m", "facebook/opt-30b", "-b", 8, "--gpu-mem", "16GiB")
    assert done.exit_code == 0, done.stderr
    assert "in host memory" in row(done, "  policy")
    assert any(line.startswith("decode at the limit") for line in done.stdout.splitlines())
    assert "predicted       nothing" in done.stdout
    assert done.stderr.splitlines() == [
        "warning: no prediction: accelerate's own cost is timed where it runs; the limit holds for that machine"
    ]
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_there_is_one_memory(plan: Run) -> None:
    done = plan("laptop", "-m", "facebook/opt-1.3b", "-n", 4)
    assert done.exit_code == 0, done.stderr
    assert row(done, "room").split() == ["room", "memory", "disk"]
    assert "float32 on cpu" in row(done, "plan: ")
    assert "bytes over each link" not in done.stdout
    assert "measured in float16" not in done.stderr


def test_batches_that_a_search_chose_are_told_of(plan: Run) -> None:
    done = plan("laptop", "-m", "facebook/opt-1.3b", "-n", 4, "-b", 2)
    assert "4 (the search's choice; --batch-size is 2) at a time" in done.stdout
    done = plan("laptop", "-m", "facebook/opt-1.3b", "-n", 4, "-b", 2, "--set", "objective=latency")
    assert "32 tokens each, 2 at a time" in done.stdout
    by_hand = ("-s", "flexgen", "--set", "num_micro_batches=2", "--set", "micro_batch_size=2")
    done = plan("laptop", "-m", "facebook/opt-1.3b", "-n", 4, "-b", 2, *by_hand)
    assert "32 tokens each, 4 at a time" in done.stdout


def test_this_machine_is_planned_for_with_its_own_profile(
    plan: Run, laptop_profile: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("harness.planning.local_profile", lambda *_: (laptop_profile, ["told"]))
    done = plan(None, "-m", "facebook/opt-125m", "-n", 2, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert "warning: told" in done.stderr
    assert {each.name for each in tmp_path.iterdir()} <= {"cache"}


def test_caps_beyond_the_machine_are_told_of(plan: Run) -> None:
    done = plan("gpu", "-m", "facebook/opt-30b", "--gpu-mem", "1TB", "--cpu-mem", "1TB")
    assert done.exit_code == 0, done.stderr
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["--gpu-mem", "--cpu-mem"]
    assert row(done, "may take").split()[2:5:2] == ["79.00", "108.00"]


def test_another_number_format_than_the_profiles_is_told_of(plan: Run) -> None:
    done = plan("gpu", "-m", "facebook/opt-1.3b", "--dtype", "float32")
    assert "measured in float16, this plan is for float32" in done.stderr


def test_the_profile_that_the_readme_names_plans_for_a_machine_that_is_not_here(plan: Run) -> None:
    file = Path(__file__).parents[2] / "benchmarks/h200/profile-float16.json"
    done = plan(
        None, "--hardware", file, "-m", "facebook/opt-30b", "--gpu-mem", "16GiB", "-n", 96, "--input-len", 512
    )
    assert done.exit_code == 0, done.output
    assert "NVIDIA H200" in done.stdout
    assert "attention on the CPU" in done.stdout
    assert str(file.relative_to(file.parents[2])) in (file.parents[2] / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "not a hardware profile"),
        ('{"schema_version": 1}', "schema version 1"),
        (json.dumps({"schema_version": SCHEMA_VERSION}), "not a hardware profile"),
        ("\udcff", "not JSON"),
    ],
)
def test_a_file_that_is_no_profile_is_one_line(
    plan: Run, tmp_path: Path, content: str | None, expected: str
) -> None:
    file = tmp_path / "profile.json"
    if content is not None:
        file.write_text(content, errors="surrogateescape")
    done = plan(None, "--hardware", file, "-m", "facebook/opt-30b")
    assert_refused(done, 2, "--hardware", str(file), expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-m", "./nowhere"), "no such folder"),
        (("--device", "cpu"), "--device cpu"),
        (("--input-len", 4096), "--input-len"),
        (("--gpu-mem", "much"), "--gpu-mem"),
        (("--objective", "speed"), "objective"),
        (("-s", "accelerate", "--objective", "latency"), "it is a key of autoflex"),
        (("-s", "flexgen", "--no-calibrate"), "it is a key of autoflex"),
    ],
)
def test_a_mistake_is_one_line(plan: Run, arguments: tuple[object, ...], expected: str) -> None:
    assert_refused(plan("gpu", "-m", "facebook/opt-30b", *arguments), 2, expected)


def test_the_objective_and_calibration_have_options(plan: Run) -> None:
    def effective(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, ["config", "show", "-s", "autoflex", "--json", *arguments])
        return {name: each["value"] for name, each in json.loads(done.stdout).items()}

    plain, given = effective(), effective("--objective", "latency", "--no-calibrate")
    assert {name for name in plain if plain[name] != given[name]} == {"objective", "calibrate"}
    done = plan("gpu", "-m", "facebook/opt-30b", "-n", 64, "-b", 4, "--objective", "latency", "--json")
    assert json.loads(done.stdout)["plan"]["batch_size"] == 4


def test_the_strategy_may_be_named_in_every_way(
    plan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text('strategy = "flexgen"\nw_gpu_percent = 50\nw_cpu_percent = 50\n')
    done = plan("gpu", "-m", "facebook/opt-30b", "--config", "run.toml")
    assert row(done, "plan: ").startswith("plan: flexgen")
    monkeypatch.setenv("HARNESS_STRATEGY", "accelerate")
    done = plan("gpu", "-m", "facebook/opt-30b")
    assert row(done, "plan: ").startswith("plan: accelerate")
