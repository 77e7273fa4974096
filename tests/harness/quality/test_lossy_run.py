"""A lossy run from plan to record: figures against transformers' own, the reference kept, and what is told where it fails."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllmgen.compression import dequantise, quantise
from flexllmgen.errors import OffloadError
from harness.config import resolve
from harness.experiment import run_experiment
from harness.job import Job
from harness.quality import phase, reference
from harness.results import Provenance, RunResult, RunStatus
from harness.summary import describe, tags_of
from strategies.base import Plan, PlanRequest
from strategies.flexgen import FlexgenStrategy

INPUT_LEN, GEN_LEN, PROMPTS = 40, 12, 5
Run = Callable[..., tuple[int, RunResult]]


@pytest.fixture(scope="session")
def rounded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its layers' matrices kept in 4 bits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                dequantise(*quantise(weight, 4, 64), 4, 64, weight)
    folder = tmp_path_factory.mktemp("rounded")
    model.save_pretrained(folder)
    return folder


class RoundedStrategy(FlexgenStrategy):
    """Says that it is lossy, and runs the rounded model in place of the one that was asked for."""

    rounded: Path

    def plan(self, request: PlanRequest) -> Plan:
        plan = super().plan(request)
        policy = {**plan.details["policy"], "weight_bits": 4, "weight_group_size": 64, "kv_bits": None}
        return dataclasses.replace(plan, lossless=False, details={**plan.details, "policy": policy})

    @contextmanager
    def build(self, plan: Plan) -> Iterator[Any]:
        model = dataclasses.replace(plan.request.model, path=self.rounded)
        request = dataclasses.replace(plan.request, model=model)
        with super().build(dataclasses.replace(plan, request=request)) as engine:
            engine.plan = plan
            yield engine


@pytest.fixture
def run(
    tmp_path: Path,
    events: Any,
    tiny_model: Path,
    questions_file: Path,
    rounded_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """`run(*keys, **options)` gives the exit code and the result of a small run of the rounded model."""
    monkeypatch.chdir(tmp_path)
    # The text is then the one that an installed package carries, on every machine.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(RoundedStrategy, "rounded", rounded_model, raising=False)
    monkeypatch.setattr("strategies.flexgen.create", RoundedStrategy)

    count = itertools.count(1)

    def start(*keys: str, **options: Any) -> tuple[int, RunResult]:
        uuid = f"u{next(count)}"
        common = {
            "strategy": "flexgen",
            "model": str(tiny_model),
            "dataset": str(questions_file),
            "num_prompts": PROMPTS,
            "batch_size": 2,
            "input_len": INPUT_LEN,
            "gen_len": GEN_LEN,
            "repeats": 1,
            "offload_dir": str(tmp_path / "offload"),
            **options,
        }
        settings = resolve(common, config_file=None, assignments=list(keys), environ={})
        job = Job.of(
            settings, run_uuid=uuid, provenance=Provenance(command="test"), dry_run=False, verbose=False
        )
        code = run_experiment(job, events, lambda: None)
        return code, RunResult.read(tmp_path / "results" / uuid)

    return start


@pytest.fixture(autouse=True)
def _own_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is there from another test."""
    from harness.config import cache_dir as session_cache

    profiles = session_cache() / "profiles"
    profiles.mkdir(parents=True, exist_ok=True)
    own = tmp_path / "cache"
    own.mkdir()
    (own / "profiles").symlink_to(profiles)
    monkeypatch.setenv("HARNESS_CACHE_DIR", str(own))


def windows_of(tiny_tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Windows of HumanEval as the module's docstring defines them, drawn anew."""
    from harness.prompt_source import load_rows

    table = load_rows("humaneval").table
    text = "\n\n".join((row["prompt"] + row["canonical_solution"]).strip("\n") for row in table)
    ids = tiny_tokenizer(text[: 20 * count * length])["input_ids"]
    return [ids[first : first + length] for first in range(0, count * length, length)]


def plain_perplexity(folder: Path, windows: Sequence[Sequence[int]], scored: int) -> float:
    """transformers' perplexity of the last `scored` tokens of each window, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(windows)
    with torch.inference_mode():
        logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return math.exp(losses[:, -scored:].double().mean().item())


def greedy(folder: Path, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """transformers' greedy tokens of padded rows, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[0] * (INPUT_LEN - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (INPUT_LEN - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=GEN_LEN, min_new_tokens=GEN_LEN, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    tokens: list[list[int]] = out[:, INPUT_LEN:].tolist()
    return tokens


def test_a_lossy_run_measures_what_transformers_does(
    run: Run, events: Any, tiny_model: Path, rounded_model: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    code, result = run()
    assert code == 0, events.sent
    metrics, record = result.metrics, result.quality
    assert record is not None
    assert record.notes == []
    assert (record.text, record.split, record.reference) == ("humaneval", "test", "measured")
    # Of 40 positions half are scored; 4 windows for each sequence of a batch.
    scored = record.scored_tokens // record.windows
    assert (record.windows, record.window_tokens, scored) == (8, 40, 20)
    windows = windows_of(tiny_tokenizer, 8, 40)
    want = {folder: plain_perplexity(folder, windows, scored) for folder in (tiny_model, rounded_model)}
    assert metrics["perplexity"] == pytest.approx(want[rounded_model], rel=1e-4)
    assert metrics["perplexity_lossless"] == pytest.approx(want[tiny_model], rel=1e-4)
    assert metrics["perplexity_ratio"] == pytest.approx(want[rounded_model] / want[tiny_model], rel=2e-4)

    rows = [json.loads(line) for line in (tmp_path / "results/u1/requests.jsonl").read_text().splitlines()]
    mine, theirs = (
        greedy(folder, [row["input_ids"] for row in rows]) for folder in (rounded_model, tiny_model)
    )
    assert [row["output_ids"] for row in rows] == mine
    same = [
        [a == b for a, b in zip(one, other, strict=True)] for one, other in zip(mine, theirs, strict=True)
    ]
    assert metrics["token_match_share"] == sum(map(sum, same)) / (PROMPTS * GEN_LEN)
    assert 0 < metrics["token_match_share"] < 1
    prefixes = [row.index(False) if False in row else GEN_LEN for row in same]
    assert metrics["equal_prefix_tokens"] == sum(prefixes) / PROMPTS
    assert (record.compared_sequences, record.compared_tokens) == (PROMPTS, PROMPTS * GEN_LEN)

    assert result.params["lossy"] is True
    assert result.params["policy_weight_bits"] == 4
    tags = tags_of(result, None)
    assert (tags["lossy"], tags["weight_bits"], tags["kv_bits"]) == ("true", "4", "none")
    words = describe(result, None)
    assert "weights in 4 bits (groups of 64)" in words
    assert f"perplexity {metrics['perplexity']:.4g}" in words


def test_the_reference_is_made_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = run()
    monkeypatch.setattr(reference, "_measure", lambda _: pytest.fail("made again"))
    _, second = run()
    assert (first.quality and first.quality.reference, second.quality and second.quality.reference) == (
        "measured",
        "kept",
    )
    for name in ("perplexity", "perplexity_lossless", "token_match_share", "equal_prefix_tokens"):
        assert first.metrics[name] == second.metrics[name], name


def test_other_prompts_need_another_reference(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run()[0] == 0

    def refuse(_: Job) -> None:
        raise OffloadError("asked for another")

    monkeypatch.setattr(reference, "_measure", refuse)
    code, result = run(seed=1)
    assert code == 0
    assert result.quality is not None
    assert result.quality.notes == ["nothing lossless to compare with: asked for another"]
    assert result.warnings[-1:] == result.quality.notes


@pytest.mark.parametrize("problem", [OffloadError("does not fit"), RuntimeError("torn"), MemoryError()])
def test_what_goes_wrong_costs_a_warning_and_no_figure(
    run: Run, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(phase, "find_reference", fail)
    code, result = run()
    assert (code, result.status) == (0, RunStatus.FINISHED)
    assert result.metrics["generation_tok_s"] > 0
    assert result.metrics["perplexity"] > 1
    assert "perplexity_lossless" not in result.metrics
    assert [text for text in result.warnings if "nothing lossless to compare with" in text]


def test_a_reference_whose_process_dies_is_told_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Doomed(reference.Worker):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            started.append(job)
            self.process.kill()

    monkeypatch.setattr(reference, "Worker", Doomed)
    code, result = run(gpu_mem="300MB", cpu_mem="300MB")
    assert code == 0
    assert result.quality is not None
    assert result.quality.notes[0].endswith("most likely the machine ran out of memory")
    (job,) = started
    # The lossless model gets the whole machine: caps emulate one for what is timed.
    assert (job.common.strategy, job.common.allow_lossy) == ("autoflex", False)
    assert (job.common.gpu_mem, job.common.cpu_mem) == (None, None)


def test_a_reference_that_hangs_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(reference.Worker):
        def _write(self, text: str) -> None:
            """Says nothing, so that the process waits for its job for ever."""

    monkeypatch.setattr(reference, "Worker", Hanging)
    monkeypatch.setattr(reference, "_PATIENCE_S", 0.5)
    code, result = run()
    assert code == 0
    assert result.quality is not None
    assert "was not there after 0 minutes" in result.quality.notes[0]
    assert result.metrics["generation_tok_s"] > 0


def test_an_interruption_of_the_reference_ends_the_run_and_keeps_its_figures(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(phase, "find_reference", interrupt)
    code, result = run()
    assert (code, result.status) == (130, RunStatus.KILLED)
    assert result.metrics["generation_tok_s"] > 0
    assert result.metrics["perplexity"] > 1


def test_random_weights_have_no_quality(run: Run, rounded_model: Path) -> None:
    code, result = run(weights="random")
    assert code == 0
    assert not {"perplexity", "token_match_share"} & set(result.metrics)
    assert [text for text in result.warnings if "random weights" in text]


def test_the_engines_own_compression_is_lossy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.flexgen.create", FlexgenStrategy)
    by_steps = []
    score = phase.loss_of

    def noted(*arguments: Any, **options: Any) -> float:
        by_steps.append(options["by_steps"])
        return score(*arguments, **options)

    monkeypatch.setattr(phase, "loss_of", noted)
    code, weights = run("compress_weight=true", "weight_bits=8")
    assert code == 0
    _, both = run("compress_weight=true", "weight_bits=8", "compress_cache=true", "cache_bits=4")
    # KV that is computed and never read back would show nothing.
    assert by_steps == [False, True]
    assert {name: weights.tags.get(name) for name in ("lossy", "weight_bits", "kv_bits")} == {
        "lossy": "true",
        "weight_bits": "8",
        "kv_bits": "none",
    }
    assert (both.tags["weight_bits"], both.tags["kv_bits"]) == ("8", "4")
    assert (both.params["policy_weight_bits"], both.params["policy_cache_bits"]) == (8, 4)
    off = [abs(one.metrics["perplexity_ratio"] - 1) for one in (weights, both)]
    assert 0 < off[0] < off[1] < 0.2
    assert weights.metrics["perplexity_lossless"] == both.metrics["perplexity_lossless"]


@pytest.mark.parametrize("leave", [True, False])
def test_leave_to_be_lossy_reaches_the_strategy(
    run: Run, monkeypatch: pytest.MonkeyPatch, *, leave: bool
) -> None:
    asked = []

    class Asked(FlexgenStrategy):
        def plan(self, request: PlanRequest) -> Plan:
            asked.append(request.allow_lossy)
            return super().plan(request)

    monkeypatch.setattr("strategies.flexgen.create", Asked)
    _, result = run(allow_lossy=leave)
    assert asked == [leave]
    assert result.params["allow_lossy"] is leave


def test_a_lossless_run_measures_nothing_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.flexgen.create", FlexgenStrategy)
    code, result = run()
    assert code == 0
    assert result.quality is None
    assert not [name for name in result.metrics if "perplexity" in name or "match" in name]
    assert "lossy" not in {**result.params, **result.tags}


def test_what_the_quality_costs_is_not_the_runs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []

    def score(self: Any, engine: Any) -> None:
        held.append((engine.moved_bytes(), torch.ones(200 << 18)))

    monkeypatch.setattr(phase.Quality, "score", score)
    _, result = run()
    from profiling.sampler import peak_rss_bytes

    assert result.metrics["peak_rss_bytes"] < peak_rss_bytes() - (100 << 20)
