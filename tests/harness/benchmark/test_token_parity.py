"""Whether cells made the same tokens: found, not found, and refused where the prompts differ."""

from pathlib import Path
from typing import Any

import pytest
from benchmark_records import make_benchmark, make_benchmark_folder

from flexllmgen.errors import UsageError
from harness.benchmark.ending import exit_code, unequal
from harness.benchmark.merge import launch_folder
from harness.benchmark.parity import Sequences, compare, parity_of, read_sequences, with_parity
from harness.benchmark.record import Benchmark, Parity, cell_folder, read_cells
from harness.benchmark.report_facts import verdicts
from harness.benchmark.summary import benchmark_metrics
from harness.benchmark.table import baseline_of, rows_of
from harness.benchmark.table_text import columns_of
from harness.results import RunResult, write_jsonl

PROMPTS = [[1, 2], [3, 4], [5, 6], [7, 8]]
TOKENS = [[10, 11, 12], [20, 21, 22], [30, 31, 32], [40, 41, 42]]


def sequences(outputs: list[list[int]], inputs: list[list[int]] = PROMPTS) -> Sequences:
    return Sequences(input_ids=inputs, output_ids=outputs)


def changed(row: int, position: int) -> list[list[int]]:
    rows = [list(tokens) for tokens in TOKENS]
    rows[row][position] = 99
    return rows


def test_equal_tokens() -> None:
    assert compare(sequences(TOKENS), sequences(TOKENS)) == Parity(equal_share=1.0)


def test_the_earliest_divergence_of_any_row() -> None:
    rows = changed(1, 2)
    rows[3][1] = 99
    assert compare(sequences(TOKENS), sequences(rows)) == Parity(equal_share=0.5, first_divergence=1)
    assert compare(sequences(TOKENS), sequences(changed(0, 0))).first_divergence == 0


def test_a_row_that_is_shorter_differs_where_it_ends() -> None:
    rows = [TOKENS[0][:2], *TOKENS[1:]]
    assert compare(sequences(TOKENS), sequences(rows)) == Parity(equal_share=0.75, first_divergence=2)


@pytest.mark.parametrize("inputs", [PROMPTS[:3], [*PROMPTS[:3], [7, 9]], [*PROMPTS[1:], PROMPTS[0]]])
def test_other_prompts_are_refused(inputs: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="token ids differ"):
        compare(sequences(TOKENS), sequences(TOKENS[: len(inputs)], inputs))


def write_tokens(folder: Path, cell: str, uuid: str, outputs: list[list[int]], **changes: Any) -> None:
    inputs = changes.get("inputs", PROMPTS)
    write_jsonl(
        launch_folder(folder, cell, uuid) / "requests.jsonl",
        [{"input_ids": prompt, "output_ids": out} for prompt, out in zip(inputs, outputs, strict=True)],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_benchmark_folder(tmp_path)
    for cell in Benchmark.read(folder).cells:
        for uuid in cell.launches:
            write_tokens(folder, cell.name, uuid, TOKENS)
    return folder


def parities(folder: Path) -> tuple[dict[str, Parity], list[str]]:
    benchmark = Benchmark.read(folder)
    return parity_of(folder, benchmark, read_cells(folder, benchmark))


def test_every_cell_beside_its_baseline(folder: Path) -> None:
    # One launch of several is enough to break it.
    write_tokens(folder, "autoflex-b8", "autoflex-b8-launch1", changed(2, 1))
    found, refused = parities(folder)
    assert refused == []
    assert len(found) == 6
    assert found.pop("autoflex-b8") == Parity(equal_share=0.75, first_divergence=1)
    assert all(parity == Parity(equal_share=1.0) for parity in found.values())


def test_a_cell_with_other_prompts_has_no_parity_and_is_told(folder: Path) -> None:
    for launch in (0, 1):
        write_tokens(
            folder, "flexgen-b4", f"flexgen-b4-launch{launch}", TOKENS, inputs=[[0, 0], *PROMPTS[1:]]
        )
    found, refused = parities(folder)
    assert "flexgen-b4" not in found
    assert len(found) == 5
    assert len(refused) == 1
    assert "flexgen-b4 and accelerate-b4" in refused[0]


def test_a_workload_without_the_baselines_strategy_has_its_first_cell(folder: Path) -> None:
    benchmark = Benchmark.read(folder)
    results = dict(read_cells(folder, benchmark))
    for name in ("flexgen-b8", "autoflex-b8"):
        results[name] = results[name].model_copy(update={"workload_key": "another"})
    assert baseline_of(benchmark.cells[5], benchmark, results) == "flexgen-b8"
    assert baseline_of(benchmark.cells[4], benchmark, results) == "flexgen-b8"
    assert baseline_of(benchmark.cells[1], benchmark, results) == "accelerate-b4"
    # A baseline that failed before it had a workload may have been of this one.
    del results["accelerate-b8"]
    assert baseline_of(benchmark.cells[5], benchmark, results) is None


def test_a_launch_that_was_cut_short_is_not_compared(folder: Path) -> None:
    for launch in (0, 1):
        write_tokens(folder, "flexgen-b4", f"flexgen-b4-launch{launch}", [*TOKENS[:3], []])
    assert "flexgen-b4" not in parities(folder)[0]


def test_damage_is_told(tmp_path: Path) -> None:
    assert read_sequences(tmp_path) is None
    (tmp_path / "requests.jsonl").write_text('{"input_ids": [1]}\n')
    with pytest.raises(UsageError, match="damaged"):
        read_sequences(tmp_path)


def make_lossy(folder: Path, name: str) -> None:
    """A cell whose recorded plan is lossy."""
    result = RunResult.read(cell_folder(folder, name))
    plan = {**result.plan, "lossless": False, "policy": {"weight_bits": 4, "weight_group_size": 64}}
    metrics = {**result.metrics, "perplexity": 20.0, "perplexity_ratio": 1.0125, "token_match_share": 0.9}
    result.model_copy(update={"plan": plan, "metrics": metrics}).write(cell_folder(folder, name))


def test_of_a_lossy_cell_the_share_is_told_and_is_no_fault(folder: Path) -> None:
    write_tokens(folder, "autoflex-b8", "autoflex-b8-launch1", changed(2, 1))
    make_lossy(folder, "autoflex-b8")
    found, _ = parities(folder)
    assert found["autoflex-b8"] == Parity(equal_share=0.75, first_divergence=1, expected=False)
    benchmark = Benchmark.read(folder).model_copy(update={"parity": found})
    assert unequal(benchmark) == {}
    assert exit_code(benchmark, delivered=True, fail_on="parity") == 0
    # A lossless cell that differs still is one.
    write_tokens(folder, "autoflex-b4", "autoflex-b4-launch1", changed(2, 1))
    found, _ = parities(folder)
    assert set(unequal(benchmark.model_copy(update={"parity": found}))) == {"autoflex-b4"}


def test_beside_a_lossy_baseline_nobody_is_at_fault(folder: Path) -> None:
    write_tokens(folder, "accelerate-b4", "accelerate-b4-launch0", changed(0, 0))
    write_tokens(folder, "accelerate-b4", "accelerate-b4-launch1", changed(0, 0))
    make_lossy(folder, "accelerate-b4")
    found, _ = parities(folder)
    assert found["flexgen-b4"] == Parity(equal_share=0.75, first_divergence=0, expected=False)
    assert found["flexgen-b8"] == Parity(equal_share=1.0)


def test_the_table_and_the_verdicts_say_that_a_cell_is_lossy(folder: Path) -> None:
    write_tokens(folder, "autoflex-b8", "autoflex-b8-launch1", changed(2, 1))
    make_lossy(folder, "autoflex-b8")
    found, _ = parities(folder)
    benchmark = Benchmark.read(folder).model_copy(update={"parity": found})
    rows = rows_of(benchmark, read_cells(folder, benchmark))
    columns = {
        column.title: dict(zip([row.name for row in rows], column.cells, strict=True))
        for column in columns_of(rows)
    }
    assert columns["parity"]["autoflex-b8"] == "75% from 1 (lossy)"
    assert (columns["tokens"]["autoflex-b8"], columns["tokens"]["flexgen-b8"]) == ("90%", "-")
    assert columns["perplexity"]["autoflex-b8"] == "+1.25%"
    told = list(verdicts(rows))
    assert (
        "autoflex-b8 is lossy: weights in 4 bits (groups of 64); perplexity +1.25% of lossless, 90% of the tokens equal."
        in told
    )
    assert not [line for line in told if line.startswith("Not all tokens equal")]
    lowest = [row.value for row in benchmark_metrics(benchmark, rows, 0) if row.key == "parity_lowest"]
    assert lowest == [1.0]


def test_parity_is_a_metric(folder: Path) -> None:
    result = read_cells(folder, Benchmark.read(folder))["flexgen-b4"]
    apart = with_parity(result, Parity(equal_share=0.5, first_divergence=3))
    assert apart.metrics["parity"] == 0.5
    assert apart.metrics["first_divergence"] == 3.0
    again = with_parity(apart, Parity(equal_share=1.0))
    assert again.metrics == {**result.metrics, "parity": 1.0}


def test_fail_on_parity() -> None:
    benchmark = make_benchmark()
    assert set(unequal(benchmark)) == {"autoflex-b4", "autoflex-b8"}
    assert exit_code(benchmark, delivered=True, fail_on="parity") == 3
    assert exit_code(benchmark, delivered=True, fail_on=None) == 0
    equal = make_benchmark(parity={cell.name: Parity(equal_share=1.0) for cell in benchmark.cells})
    assert exit_code(equal, delivered=True, fail_on="parity") == 0
    # Nothing to compare with is no proof of anything.
    assert exit_code(make_benchmark(parity={}), delivered=True, fail_on="parity") == 3
