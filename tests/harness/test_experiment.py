"""A run inside the worker, without the worker: what is refused, what is measured, what is left behind."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flexllmgen.spec import ModelSpec
from harness import experiment
from harness.config import resolve
from harness.experiment import run_experiment
from harness.job import Job
from harness.prepare import choose_dtype
from harness.results import Provenance, RunResult, RunStatus
from profiling import profiler
from profiling.contention import Others
from profiling.hardware import check_writable
from profiling.layer_times import LayerShape
from profiling.profile import HardwareProfile
from strategies.base import ModelSource

Run = Callable[..., tuple[int, Path]]


@pytest.fixture
def run(
    tmp_path: Path,
    events: Any,
    tiny_model: Path,
    questions_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """`run(**options)` gives the exit code and the result folder of a small run on a tiny model."""
    monkeypatch.chdir(tmp_path)

    def start(
        *, dry_run: bool = False, assignments: tuple[str, ...] = (), **options: Any
    ) -> tuple[int, Path]:
        common = {
            "model": str(tiny_model),
            "dataset": str(questions_file),
            "num_prompts": 5,
            "batch_size": 2,
            "input_len": 24,
            "gen_len": 6,
            "repeats": 2,
            "offload_dir": str(tmp_path / "offload"),
            **options,
        }
        settings = resolve(common, config_file=None, assignments=list(assignments), environ={})
        job = Job.of(
            settings, run_uuid="u1", provenance=Provenance(command="test"), dry_run=dry_run, verbose=False
        )
        # Through JSON, as it reaches the worker.
        job = Job.model_validate_json(job.model_dump_json())
        return run_experiment(job, events, lambda: None), tmp_path / "results" / "u1"

    return start


def refusal(run: Run, events: Any, code: int = 2, **options: Any) -> str:
    """The one line that a refused run gives; it leaves no folder."""
    got, folder = run(**options)
    assert got == code, events.sent
    assert not folder.exists()
    (error,) = events.of("error")
    assert error["exit_code"] == code
    assert "\n" not in error["message"]
    return str(error["message"])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def plain_tokens(model_folder: Path, rows: list[dict[str, Any]], input_len: int, gen_len: int) -> list[Any]:
    """What transformers alone generates for the recorded ids, one padded batch, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = [row["input_ids"] for row in rows]
    ids_BT = torch.tensor([[0] * (input_len - len(row)) + row for row in ids])
    mask_BT = torch.tensor([[0] * (input_len - len(row)) + [1] * len(row) for row in ids])
    with torch.inference_mode():
        out = model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=gen_len,
            min_new_tokens=gen_len,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[:, input_len:].tolist()  # type: ignore[no-any-return]


def test_the_profile_that_the_plan_rests_on_is_recorded(run: Run, events: Any, tiny_model: Path) -> None:
    code, folder = run(repeats=1)
    assert code == 0
    profile = HardwareProfile.from_dict(json.loads((folder / "hardware_profile.json").read_text()))
    assert (profile.device, profile.dtype) == ("cpu", "float32")
    assert profile.hardware.fingerprint == RunResult.read(folder).hardware_fingerprint
    spec = ModelSpec.from_hf_config(json.loads((tiny_model / "config.json").read_text()))
    assert LayerShape.of(spec) in {table.shape for table in profile.layers}


@pytest.mark.parametrize("strategy", ["accelerate", "flexgen"])
def test_the_peaks_that_were_planned_are_metrics(run: Run, strategy: str) -> None:
    code, folder = run(repeats=1, strategy=strategy)
    assert code == 0
    result = RunResult.read(folder)
    plan, metrics = result.plan, result.metrics
    planned = [metrics[f"predicted_peak_{tier}_bytes"] for tier in ("gpu", "cpu", "disk")]
    parts = [*plan["weight_bytes"].values(), *plan["kv_bytes"].values(), plan["workspace_bytes"]]
    activations = sum(plan.get("activation_bytes", {}).values())
    assert sum(planned) == sum(parts) + activations
    assert planned[2] == metrics["offload_disk_bytes"] == 0


@pytest.mark.parametrize("strategy", ["accelerate", "flexgen"])
def test_what_the_links_carry_is_sampled_where_the_engine_counts_it(run: Run, strategy: str) -> None:
    code, folder = run(repeats=1, strategy=strategy)
    assert code == 0
    series = json.loads((folder / "timeline.json").read_text())["series"]
    counted = {name: values[-1] for name, values in series.items() if name.startswith("moved_")}
    metrics = RunResult.read(folder).metrics
    assert counted == {name: value for name, value in metrics.items() if name.startswith("moved_")}
    assert bool(counted) == (strategy == "flexgen")


def test_a_damaged_profile_is_measured_anew_and_the_user_is_told(
    run: Run, events: Any, laptop_profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(profiler, "measure_rates", lambda **_: dict(laptop_profile.measurements))
    monkeypatch.setattr(profiler, "measure_layer_times", lambda *_, **__: laptop_profile.layers[0])
    run(dry_run=True)
    (file,) = (tmp_path / "cache" / "profiles").iterdir()
    file.write_text("{")
    assert run(dry_run=True)[0] == 0
    first, second = (event["warnings"] for event in events.of("planned"))
    assert not [warning for warning in first if "hardware profile" in warning]
    assert len([warning for warning in second if "measured anew" in warning]) == 1


def test_a_profile_of_a_busy_machine_is_told_of(
    run: Run, events: Any, laptop_profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(tmp_path / "cache"))
    noisy = {
        name: dataclasses.replace(each, spread=0.5) for name, each in laptop_profile.measurements.items()
    }
    monkeypatch.setattr(profiler, "measure_rates", lambda **_: noisy)
    monkeypatch.setattr(profiler, "measure_layer_times", lambda *_, **__: laptop_profile.layers[0])
    run(dry_run=True)
    assert any("was busy" in warning for warning in events.of("planned")[0]["warnings"])


@pytest.mark.parametrize(("cores", "told"), [(0.1, False), (0.9, True)])
def test_others_on_the_processors_during_the_timed_passes_are_told_of(
    run: Run, monkeypatch: pytest.MonkeyPatch, cores: float, told: bool
) -> None:
    monkeypatch.setattr(Others, "cores", lambda _: cores)
    monkeypatch.setattr(experiment, "usable_cores", lambda: [0, 1])
    _, folder = run()
    result = RunResult.read(folder)
    assert result.metrics["others_cores"] == cores
    assert result.metrics["others_share"] == cores / 2
    words = "other processes kept 0.9 of the 2 cores busy during the timed passes"
    assert any(words in warning for warning in result.warnings) == told


@pytest.mark.parametrize(("slower", "told"), [(1.0, False), (1e6, True)])
def test_a_limit_that_was_surpassed_is_told_of(
    run: Run, laptop_profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch, slower: float, told: bool
) -> None:
    profile = dataclasses.replace(
        laptop_profile,
        measurements={
            name: dataclasses.replace(each, median=each.median / slower, best=each.best / slower)
            for name, each in laptop_profile.measurements.items()
        },
    )
    monkeypatch.setattr(profiler, "take_profile", lambda *_, **__: (profile, []))
    code, folder = run(repeats=1)
    assert code == 0
    result = RunResult.read(folder)
    assert (result.metrics["attainment"] > 1) == told
    assert any("harness profile --refresh" in warning for warning in result.warnings) == told


@pytest.mark.parametrize(("attainment", "told"), [(1.01, False), (1.03, True)])
def test_two_percent_above_the_limit_are_the_clocks(
    run: Run, monkeypatch: pytest.MonkeyPatch, attainment: float, told: bool
) -> None:
    ratios = {"attainment": attainment, "limit_tok_s": 0.0351}
    monkeypatch.setattr(experiment, "compare_with_plan", lambda *_: ratios)
    _, folder = run(repeats=1)
    warned = [each for each in RunResult.read(folder).warnings if "physical limit is 0.0351:" in each]
    assert bool(warned) == told


def test_building_a_kernel_and_measuring_are_phases_of_their_own(
    run: Run, events: Any, laptop_profile: HardwareProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_profile(*_: object, on_progress: Any, **__: object) -> tuple[HardwareProfile, list[str]]:
        for done, title in enumerate((profiler.BUILDING, "matrix products", "disk")):
            on_progress(title, done, 3)
        return laptop_profile, []

    monkeypatch.setattr(profiler, "take_profile", take_profile)
    run(dry_run=True)
    phases = [event["name"] for event in events.of("phase")]
    assert phases == ["prepare", profiler.BUILDING, "profile the machine (once a week)", "plan"]


def test_a_run_leaves_a_whole_folder(run: Run, events: Any, tiny_model: Path, tmp_path: Path) -> None:
    code, folder = run(tracking_uri="http://user:secret@host")
    assert code == 0
    assert RunResult.read(folder).params["tracking_uri"] == "http://host"
    assert not any(b"secret" in path.read_bytes() for path in folder.iterdir())
    names = {path.name for path in folder.iterdir()}
    assert {
        "result.json",
        "requests.jsonl",
        "plan.json",
        "hardware_profile.json",
        "timeline.json",
        "environment.txt",
        "run.log",
    } <= names
    assert not {name for name in names if name.startswith(".")}
    result = RunResult.read(folder)
    assert result.status is RunStatus.FINISHED
    assert len(result.repeats) == 2
    assert [len(gaps) for gaps in result.itl_s] == [5, 5]
    assert result.params["model_path"] == str(tiny_model)
    assert (result.params["dtype"], result.params["device"]) == ("float32", "cpu")
    assert result.params["enable_offload"] is True
    assert result.params["batch_size"] == 2
    assert set(result.param_sources) >= {"input_len", "enable_offload"}
    assert result.metrics["output_tokens"] == 30
    assert result.metrics["input_tokens"] + result.metrics["input_tokens_padded"] == 5 * 24
    assert result.metrics["repeats"] == 2
    assert result.metrics["weight_bytes_cpu"] > 0
    assert result.metrics["weight_bytes_disk"] == result.metrics["offload_disk_bytes"] == 0
    assert result.cold["ttft_s"] > 0
    assert result.spread["ttft_s"] >= 0
    assert "ttft_s" in result.metrics
    assert all(repeat.metrics["output_tokens"] == 30 for repeat in result.repeats)
    rows = rows_of(folder)
    assert len(rows) == 5
    assert all(len(row["output_ids"]) == 6 for row in rows)
    assert {"prompt_id", "prompt", "input_ids", "output_ids", "output_text"} <= set(rows[0])
    assert [one["name"] for one in events.of("passed")] == ["warm-up 1/1", "repeat 1/2", "repeat 2/2"]
    assert [one["tokens"] for one in events.of("passed")] == [12, 30, 30]
    assert events.sent[-1] == {"event": "done"}
    timeline = json.loads((folder / "timeline.json").read_text())
    assert [name for name, *_ in timeline["phases"]] == ["load", "warm-up", "repeat 1", "repeat 2"]
    assert list((tmp_path / "offload").iterdir()) == []


@pytest.mark.parametrize(
    ("batch_size", "caps"), [(2, {}), (5, {}), (1, {"cpu_mem": "500KB"}), (5, {"cpu_mem": "1500KB"})]
)
def test_tokens_are_those_of_transformers(
    run: Run, tiny_model: Path, caps: dict[str, str], batch_size: int, tmp_path: Path
) -> None:
    code, folder = run(batch_size=batch_size, repeats=1, input_len=60, **caps)
    assert code == 0
    rows = rows_of(folder)
    assert len({len(row["input_ids"]) for row in rows}) > 1, "the batch has padding"
    expected = plain_tokens(tiny_model, rows, 60, 6)
    assert [row["output_ids"] for row in rows] == expected
    assert len({token for row in expected for token in row}) > 3, "the model says more than one thing"
    result = RunResult.read(folder)
    on_disk = result.metrics["weight_bytes_disk"]
    assert (on_disk > 0) == bool(caps)
    # Files hold the weights and a short header each.
    assert on_disk <= result.metrics["offload_disk_bytes"] <= on_disk * 1.2
    assert result.plan["weight_bytes"] == result.plan["placed_weight_bytes"]
    assert list((tmp_path / "offload").iterdir()) == [], "nothing stays in the offload folder"


def test_eos_ends_nothing(run: Run, tiny_model: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """A model that says EOS at every step still gives exactly the tokens asked for."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        # The logits of EOS follow the hidden state's norm, those of the rest are nothing.
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.norm.register_parameter("bias", None)
        model.model.embed_tokens.weight.fill_(0.5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[2].fill_(1.0)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path / "says-eos")
    tiny_tokenizer.save_pretrained(tmp_path / "says-eos")
    code, folder = run(model=str(tmp_path / "says-eos"), gen_len=9, repeats=1)
    assert code == 0
    assert [row["output_ids"] for row in rows_of(folder)] == [[2] * 9] * 5
    assert RunResult.read(folder).metrics["output_tokens"] == 45


def test_random_weights_give_the_same_tokens_wherever_they_lie(run: Run, tmp_path: Path) -> None:
    tokens = []
    for caps in ({}, {"cpu_mem": "500KB"}):
        code, folder = run(weights="random", repeats=1, **caps)
        assert code == 0
        tokens.append([row["output_ids"] for row in rows_of(folder)])
        assert (RunResult.read(folder).metrics["weight_bytes_disk"] > 0) == bool(caps)
        folder.rename(tmp_path / f"kept-{len(tokens)}")
    assert tokens[0] == tokens[1]


def test_a_published_config_needs_no_files_and_no_network(
    run: Run, monkeypatch: pytest.MonkeyPatch, events: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, folder = run(model="facebook/opt-125m", weights="random", num_prompts=1, gen_len=2, repeats=1)
    assert code == 0, events.sent
    row = rows_of(folder)[0]
    assert len(row["output_ids"]) == 2
    assert row["output_text"] is None
    assert RunResult.read(folder).params["model_path"] is None
    assert any("no tokenizer" in warning for warning in events.of("planned")[0]["warnings"])


def test_a_dry_run_plans_and_leaves_no_folder(run: Run, events: Any) -> None:
    code, folder = run(dry_run=True)
    assert code == 0
    assert not folder.exists()
    (planned,) = events.of("planned")
    assert planned["plan"]["batch_size"] == 2
    assert planned["folder"] is None
    assert not events.of("passed")


def test_no_warm_up_is_told_and_leaves_no_cold_run(run: Run, events: Any) -> None:
    code, folder = run(warmup=0)
    assert code == 0
    assert RunResult.read(folder).cold == {}
    assert any("--warmup 0" in warning for warning in events.of("planned")[0]["warnings"])


def test_a_batch_larger_than_the_prompts_is_the_prompts(run: Run) -> None:
    code, folder = run(batch_size=64, repeats=1)
    assert code == 0
    assert RunResult.read(folder).params["batch_size"] == 5


def test_one_token_each(run: Run) -> None:
    code, folder = run(gen_len=1, repeats=1)
    assert code == 0
    result = RunResult.read(folder)
    assert "tpot_s" not in result.metrics
    assert result.metrics["output_tokens"] == 5


# What is refused


def test_more_than_the_models_context(run: Run, events: Any) -> None:
    message = refusal(run, events, input_len=100, gen_len=29)
    assert "129" in message
    assert "128" in message
    assert "--input-len" in message


def test_exactly_the_models_context_runs(run: Run) -> None:
    code, folder = run(input_len=122, gen_len=6, num_prompts=1, repeats=1)
    assert code == 0
    assert len(rows_of(folder)[0]["output_ids"]) == 6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "/nowhere/model"}, "no such folder"),
        ({"dataset": "humanevil"}, "humaneval"),
        ({"prompt_template": "{qestion}"}, "question"),
        ({"prompt_template": "{question"}, "template"),
        ({"device": "cuda"}, "--device cpu"),
    ],
)
def test_what_does_not_exist_is_named(
    run: Run, events: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], expected: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert expected in refusal(run, events, **options)


def test_a_column_that_nobody_named_and_an_empty_dataset(run: Run, events: Any, tmp_path: Path) -> None:
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"alpha": "x", "beta": 1}\n')
    assert "--prompt-template" in refusal(run, events, dataset=str(odd))
    events.sent.clear()
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in refusal(run, events, dataset=str(empty))


@pytest.mark.parametrize("option", ["offload_dir", "results_dir"])
def test_a_folder_that_cannot_be_written(run: Run, events: Any, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(run, events, **{option: str(tmp_path / "file" / "below")})
    assert message.startswith("--" + option.replace("_", "-"))


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "--offload-dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_cap_too_small_for_one_layer(run: Run, events: Any) -> None:
    message = refusal(run, events, code=5, cpu_mem="100KB")
    assert "KiB" in message
    assert "--cpu-mem" in message


def test_offloading_off_and_no_room(run: Run, events: Any) -> None:
    message = refusal(run, events, code=5, cpu_mem="500KB", assignments=("enable_offload=false",))
    assert "enable_offload" in message


def test_a_truncated_checkpoint(run: Run, events: Any, tmp_path: Path, tiny_model: Path) -> None:
    broken = copy_of(tiny_model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refusal(run, events, model=str(broken))
    assert "truncated" in message
    assert "model.safetensors" in message


def test_a_checkpoint_that_lacks_a_tensor(run: Run, events: Any, tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = copy_of(tiny_model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, folder = run(model=str(broken))
    assert code == 2
    assert "model.layers.1.mlp.up_proj.weight" in events.of("error")[0]["message"]
    assert RunResult.read(folder).status is RunStatus.FAILED


def test_a_checkpoint_of_another_shape(run: Run, events: Any, tmp_path: Path, tiny_model: Path) -> None:
    broken = copy_of(tiny_model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    code, _ = run(model=str(broken))
    assert code == 2
    (error,) = events.of("error")
    assert "\n" not in error["message"]
    assert "other shapes" in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no-such-architecture"},
        {"vocab_size": None},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
    ],
)
def test_a_config_that_makes_no_sense(
    run: Run, events: Any, tmp_path: Path, tiny_model: Path, change: dict[str, Any]
) -> None:
    broken = copy_of(tiny_model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **change}))
    assert str(broken) in refusal(run, events, model=str(broken))


def test_pickle_weights_only_when_asked_for(run: Run, events: Any, tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file

    pickled = copy_of(tiny_model, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "--allow-pickle" in refusal(run, events, model=str(pickled))
    events.sent.clear()
    code, folder = run(model=str(pickled), allow_pickle=True, repeats=1, cpu_mem="500KB")
    assert code == 0, events.sent
    rows = rows_of(folder)
    assert [row["output_ids"] for row in rows] == plain_tokens(tiny_model, rows, 24, 6)


def test_a_truncated_pickle_checkpoint(run: Run, events: Any, tmp_path: Path, tiny_model: Path) -> None:
    from safetensors.torch import load_file

    pickled = copy_of(tiny_model, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    whole = (pickled / "pytorch_model.bin").read_bytes()
    (pickled / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    code, _ = run(model=str(pickled), allow_pickle=True)
    assert code == 2, events.sent
    assert "damaged" in events.of("error")[0]["message"]


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# Runs that do not end well


class Breaking:
    """Makes the engine raise, in the third pass (the second repeat), after some columns."""

    def __init__(self, error: BaseException, *, passes: int, columns: int) -> None:
        self.error, self.passes, self.columns = error, passes, columns

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from strategies.accelerate_engine import AccelerateEngine

        whole = AccelerateEngine.generate
        calls = 0

        def generate(
            engine: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, gen_tokens: int
        ) -> Iterator[torch.Tensor]:
            nonlocal calls
            calls += 1
            for number, column in enumerate(whole(engine, ids_BT, mask_BT, gen_tokens)):
                if calls == self.passes and number == self.columns:
                    raise self.error
                yield column

        monkeypatch.setattr(AccelerateEngine, "generate", generate)


def test_an_engine_that_breaks_fails_the_run(
    run: Run, events: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Breaking(ValueError("the engine broke\nin two lines"), passes=1, columns=2).install(monkeypatch)
    code, folder = run(cpu_mem="500KB")
    assert code == 1
    result = RunResult.read(folder)
    assert result.status is RunStatus.FAILED
    assert result.error is not None
    assert result.error.message == "ValueError: the engine broke"
    assert "Traceback" in (folder / "error.txt").read_text()
    assert result.repeats == []
    assert result.metrics["load_s"] > 0
    assert (folder / "timeline.json").exists()
    assert len(rows_of(folder)) == 5
    assert events.of("error")[0]["exit_code"] == 1
    assert list((tmp_path / "offload").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), 5),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), 5),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 5),
    ],
)
def test_memory_that_runs_out_is_told_apart(
    run: Run, events: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    Breaking(error, passes=1, columns=1).install(monkeypatch)
    assert run()[0] == code
    assert events.of("error")[0]["message"]


def test_an_interrupted_run_keeps_whole_repeats(
    run: Run, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One warm-up batch, three batches of the first repeat, then the second batch of the second.
    Breaking(KeyboardInterrupt(), passes=6, columns=3).install(monkeypatch)
    code, folder = run()
    assert code == 130
    result = RunResult.read(folder)
    assert result.status is RunStatus.KILLED
    assert len(result.repeats) == 1
    assert result.metrics["output_tokens"] == 30
    assert [len(row["output_ids"]) for row in rows_of(folder)] == [6] * 5


def test_a_run_interrupted_in_its_first_repeat_keeps_the_batches_so_far(
    run: Run, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Breaking(KeyboardInterrupt(), passes=3, columns=3).install(monkeypatch)
    code, folder = run()
    assert code == 130
    result = RunResult.read(folder)
    assert len(result.repeats) == 1
    assert result.metrics["output_tokens"] == 2 * 6 + 2 * 3
    assert [len(row["output_ids"]) for row in rows_of(folder)] == [6, 6, 3, 3, 0]


def test_tokens_that_change_between_repeats_are_told(
    run: Run, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from strategies.accelerate_engine import AccelerateEngine

    calls = 0

    def generate(
        engine: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, gen_tokens: int
    ) -> Iterator[torch.Tensor]:
        nonlocal calls
        calls += 1
        for _ in range(gen_tokens):
            yield torch.full((ids_BT.shape[0],), calls)

    monkeypatch.setattr(AccelerateEngine, "generate", generate)
    code, folder = run()
    assert code == 0
    assert any("not deterministic" in warning for warning in RunResult.read(folder).warnings)


def test_dtypes() -> None:
    def source(**config: Any) -> ModelSource:
        return ModelSource(name="m", path=None, config=config, weights="random")

    assert choose_dtype("bfloat16", source(dtype="float16"), "cpu") == "bfloat16"
    assert choose_dtype("auto", source(dtype="float16"), "cpu") == "float32"
    assert choose_dtype("auto", source(dtype="bfloat16"), "cuda") == "bfloat16"
    assert choose_dtype("auto", source(torch_dtype="torch.float16"), "cuda") == "float16"
    assert choose_dtype("auto", source(text_config={"dtype": "bfloat16"}), "cuda") == "bfloat16"
    assert choose_dtype("auto", source(), "cuda") == "float16"


def test_a_narrow_type_halves_the_weights(run: Run, tmp_path: Path) -> None:
    totals = []
    for dtype, cap in (("bfloat16", "250KB"), ("float32", "500KB")):
        code, folder = run(dtype=dtype, repeats=1, num_prompts=1, cpu_mem=cap)
        assert code == 0
        result = RunResult.read(folder)
        assert result.params["dtype"] == dtype
        placed = result.plan["placed_weight_bytes"]
        assert result.plan["weight_bytes"] == placed
        assert placed["disk"] > 0
        totals.append(sum(placed.values()))
        folder.rename(tmp_path / dtype)
    assert totals[0] * 2 == totals[1]


def test_more_host_memory_than_there_is_counts_as_what_there_is(run: Run, events: Any) -> None:
    code, _ = run(cpu_mem="4096TiB", dry_run=True)
    assert code == 0
    assert events.of("planned")[0]["plan"]["cpu_cap_bytes"] < 2**50
