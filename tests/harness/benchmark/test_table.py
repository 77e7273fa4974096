"""The table of a benchmark: what a row holds, how it reads, and that it stays readable and valid JSON."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import (
    GIB,
    LAUNCHES,
    REPEATS,
    make_benchmark,
    make_benchmark_folder,
    make_cell,
    make_cell_result,
)

from harness.benchmark.record import Benchmark, CellStatus, Parity, read_cells
from harness.benchmark.table import Row, as_json, as_markdown, range_of, rows_of, write_tables
from harness.benchmark.table_text import blocks_of, columns_of, failures, number, percent
from harness.report import Report
from harness.results import Repeat, RunResult, RunStatus


def rows_in(folder: Path) -> list[Row]:
    benchmark = Benchmark.read(folder)
    return rows_of(benchmark, read_cells(folder, benchmark))


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def column(rows: list[Row], key: str) -> list[str]:
    return list(next(column for column in columns_of(rows) if column.key == key).cells)


def test_a_row_holds_what_was_measured(tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path)
    rows = rows_in(folder)
    assert [row.name for row in rows] == [cell.name for cell in make_benchmark().cells]
    row, result = by_name(rows)["autoflex-b4"], RunResult.read(folder / "cells" / "autoflex-b4")
    assert row.generation_tok_s == result.metrics["generation_tok_s"]
    assert (row.launches, row.repeats) == (LAUNCHES, LAUNCHES * REPEATS)
    assert row.ttft_s == result.metrics["ttft_s"]
    assert row.peak_host_bytes == result.metrics["peak_rss_bytes"]
    assert row.peak_device_bytes == result.metrics["peak_device_allocated_bytes"]
    assert row.predicted_peak_device_bytes == result.metrics["predicted_peak_gpu_bytes"]
    assert row.attainment == pytest.approx(1 / 1.6)
    assert (row.parity, row.first_divergence) == (0.875, 17)
    assert row.low_tok_s is not None
    assert row.high_tok_s is not None
    assert row.spread == pytest.approx((row.high_tok_s - row.low_tok_s) / row.generation_tok_s)
    assert row.reason is None


def test_each_batch_size_is_held_against_its_own_baseline(tmp_path: Path) -> None:
    rows = by_name(rows_in(make_benchmark_folder(tmp_path)))
    assert rows["flexgen-b4"].baseline == "accelerate-b4"
    assert rows["flexgen-b8"].baseline == "accelerate-b8"
    assert rows["accelerate-b8"].ratio_to_baseline == 1
    base, other = rows["accelerate-b8"].generation_tok_s, rows["flexgen-b8"].generation_tok_s
    assert base is not None
    assert other is not None
    assert rows["flexgen-b8"].ratio_to_baseline == pytest.approx(other / base)


def test_a_strategy_can_be_the_baseline(tmp_path: Path) -> None:
    rows = by_name(rows_in(make_benchmark_folder(tmp_path, make_benchmark(baseline="flexgen"))))
    assert rows["autoflex-b8"].baseline == "flexgen-b8"


@pytest.mark.parametrize("baseline", ["flexgen", "flexgen-mine-b4"])
def test_policies_of_one_strategy_are_held_against_the_baselines(baseline: str) -> None:
    """And not against themselves; at each batch size."""
    cells = [
        make_cell("flexgen", size, name=f"flexgen-{policy}-b{size}", axes=axes | {"batch_size": size})
        for size in (4, 8)
        for policy, axes in {
            "whole": {"strategy": "flexgen"},
            "mine": {"strategy": "flexgen", "policy": "mine", "overlap": 0},
            "other": {"strategy": "flexgen", "policy": "other", "overlap": 1},
        }.items()
    ]
    benchmark = make_benchmark(cells=cells, baseline=baseline)
    results = {cell.name: make_cell_result(cell, benchmark) for cell in cells}
    policy = "whole" if baseline == "flexgen" else "mine"
    for row in rows_of(benchmark, results):
        assert row.baseline == f"flexgen-{policy}-b{row.axes['batch_size']}"
    # Another policy's cell is not taken for the one that was named and failed.
    del results[f"flexgen-{policy}-b4"]
    bases = {row.name: row.baseline for row in rows_of(benchmark, results)}
    assert bases["flexgen-other-b4"] == (None if baseline != "flexgen" else "flexgen-mine-b4")
    assert bases["flexgen-other-b8"] == f"flexgen-{policy}-b8"


def test_another_workload_or_machine_is_no_baseline() -> None:
    benchmark = make_benchmark()
    results = {cell.name: make_cell_result(cell, benchmark) for cell in benchmark.cells}
    moved = {"flexgen-b4": {"workload_key": "another"}, "autoflex-b4": {"hardware_fingerprint": "another"}}
    for name, change in moved.items():
        results[name] = results[name].model_copy(update=change)
    rows = by_name(rows_of(benchmark, results))
    for name in moved:
        assert rows[name].baseline is None
        assert rows[name].ratio_to_baseline is None


def test_without_the_baseline_there_is_no_ratio(tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path, failed=["accelerate-b4"], lost=["accelerate-b8"])
    rows = by_name(rows_in(folder))
    assert rows["flexgen-b4"].ratio_to_baseline is None
    assert rows["flexgen-b4"].generation_tok_s is not None


def test_the_range_is_over_launches_or_else_over_repeats() -> None:
    def result(*values: tuple[int, float]) -> RunResult:
        repeats = [
            Repeat(index=index, launch=launch, ended_at_ms=1, metrics={"generation_tok_s": value})
            for index, (launch, value) in enumerate(values)
        ]
        return make_cell_result(make_cell("flexgen", 4), repeats=repeats)

    two = result((0, 10.0), (0, 11.0), (0, 99.0), (1, 20.0), (1, 21.0), (1, 1.0))
    assert range_of(two, "generation_tok_s") == (11.0, 20.0)
    assert range_of(result((0, 10.0), (0, 12.0), (0, 11.0)), "generation_tok_s") == (10.0, 12.0)
    assert range_of(result((0, 10.0)), "generation_tok_s") is None


def test_failed_and_pending_cells_have_rows_with_reasons(tmp_path: Path) -> None:
    pending = make_cell("autoflex", 8, status=CellStatus.PENDING)
    cells = [*make_benchmark().cells[:5], pending]
    folder = make_benchmark_folder(
        tmp_path,
        make_benchmark(cells=cells, status=RunStatus.RUNNING),
        failed=["flexgen-b8"],
        lost=["accelerate-b8"],
    )
    (folder / "cells" / "autoflex-b8" / "result.json").unlink()
    rows = by_name(rows_in(folder))
    failed = rows["flexgen-b8"]
    assert (failed.status, failed.generation_tok_s) == ("FAILED", None)
    assert failed.reason is not None
    assert failed.reason.startswith("OutOfMemory: CUDA ran out of memory")
    assert failed.peak_device_bytes == 7.9 * GIB
    told = dict(failures(list(rows.values())))
    assert "device peak predicted 5.76 GiB, actual 7.90 GiB" in told["flexgen-b8"]
    # What the runner has said already is not said twice.
    explained = replace(
        failed, reason="OutOfMemory: CUDA ran out of memory (peak on disk reached 1 GiB = 1073741824 bytes)"
    )
    assert dict(failures([explained])) == {"flexgen-b8": explained.reason}
    assert set(told) == {"flexgen-b8", "accelerate-b8"}
    assert rows["autoflex-b8"].status == "PENDING"
    assert column(list(rows.values()), "generation_tok_s")[3:] == ["failed", "failed", "pending"]


def test_without_a_gpu_both_memory_tiers_are_the_host() -> None:
    cell = make_cell("flexgen", 4)
    result = make_cell_result(cell)
    result = result.model_copy(update={"plan": {**result.plan, "device": "cpu"}})
    (row,) = rows_of(make_benchmark(cells=[cell]), {cell.name: result})
    tiers = [result.metrics[f"predicted_peak_{tier}_bytes"] for tier in ("gpu", "cpu")]
    assert row.predicted_peak_device_bytes is None
    assert row.predicted_peak_host_bytes == sum(tiers)


def test_json_has_null_for_the_unknown_and_never_nan(tmp_path: Path) -> None:
    cell = make_cell("flexgen", 4)
    result = make_cell_result(cell)
    result = result.model_copy(
        update={
            "metrics": {"generation_tok_s": math.nan, "ttft_s": math.inf, "load_s": 2.0},
            "spread": {"generation_tok_s": math.nan},
            "plan": {},
        }
    )
    benchmark = make_benchmark(cells=[cell], parity={cell.name: Parity(equal_share=math.nan)})
    rows = rows_of(benchmark, {cell.name: result})
    text = json.dumps(as_json(rows), allow_nan=False)
    (row,) = json.loads(text)["rows"]
    assert (row["generation_tok_s"], row["ttft_s"], row["spread"], row["parity"]) == (None, None, None, None)
    assert row["load_s"] == 2.0
    assert {"peak_host_bytes", "limit_tok_s", "predicted_tok_s", "tpot_s", "reason"} <= set(row)


def test_the_files_hold_the_same_table(tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path, failed=["flexgen-b8"])
    write_tables(folder)
    recorded = json.loads((folder / "table.json").read_text())
    assert recorded["baseline"] == "accelerate-b4"
    assert recorded["rows"] == json.loads(json.dumps(as_json(rows_in(folder))))["rows"]
    assert (folder / "table.md").read_text() == as_markdown(rows_in(folder))


def test_markdown_is_one_table_whatever_the_names(tmp_path: Path) -> None:
    names = {"a|b": "pipe", "x\ny": "line", "<b>*bold*_": "markup", "größe-大": "letters"}
    cells = [make_cell("flexgen", 4, name=name, launches=[]) for name in names]
    lines = as_markdown(rows_of(make_benchmark(cells=cells), {})).splitlines()
    assert len(lines) == 2 + len(cells)
    columns = lines[0].replace("\\|", "").count("|")
    assert all(line.replace("\\|", "").count("|") == columns for line in lines)
    assert "\\<b\\>\\*bold\\*\\_" in lines[4]
    assert "größe-大" in lines[5]


def test_columns_share_a_unit_that_suits_the_largest() -> None:
    def row(name: str, ttft_s: float, peak: float) -> Row:
        return Row(name=name, strategy="flexgen", status="FINISHED", ttft_s=ttft_s, peak_host_bytes=peak)

    titles = {column.key: column for column in columns_of([row("a", 0.5, 2**20), row("b", 9.0, 2**29)])}
    assert titles["ttft_s"].title == "TTFT ms"
    assert list(titles["ttft_s"].cells) == ["500", "9,000"]
    assert titles["peak_host_bytes"].title == "host MiB"
    titles = {column.key: column for column in columns_of([row("a", 0.5, 2**20), row("b", 90.0, 2**31)])}
    assert list(titles["ttft_s"].cells) == ["0.500", "90.0"]
    assert list(titles["peak_host_bytes"].cells) == ["0.000977", "2.00"]
    assert "limit_tok_s" not in titles


def test_cells_beside_which_others_were_busy_are_marked() -> None:
    def row(name: str, share: float | None) -> Row:
        return Row(name=name, strategy="flexgen", status="FINISHED", others_share=share)

    quiet, busy = row("quiet", 0.05), row("busy", 0.45)
    assert column([quiet, busy, row("older", None)], "others_share") == ["-", "45%", "-"]
    assert "others_share" not in {each.key for each in columns_of([quiet])}


def test_a_row_has_what_others_took(tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path)
    path = folder / "cells/autoflex-b4"
    result = RunResult.read(path)
    result.model_copy(update={"metrics": {**result.metrics, "others_share": 0.5}}).write(path)
    taken = {row.name: row.others_share for row in rows_in(folder)}
    assert taken["autoflex-b4"] == 0.5


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_terminal_table_fits_and_drops_nothing(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_in(make_benchmark_folder(tmp_path))
    long = "flexgen-" + "w_gpu_percent40-" * 8 + "大"
    rows[1] = Row(**{**{name: getattr(rows[1], name) for name in Row.__slots__}, "name": long})
    report = Report()
    report.out.width = width
    report.benchmark_rows("a [title]", rows)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == "a [title]"
    assert max(map(len, lines)) <= width
    for each in columns_of(rows)[1:]:
        assert any(each.title in line for line in lines), each.title
        for text in each.cells:
            assert text in printed
    # A long name wraps, whole.
    assert "大" in printed
    assert printed.count("w_gpu_percent40") >= 1


def test_blocks_begin_with_the_names_and_keep_the_order(tmp_path: Path) -> None:
    columns = columns_of(rows_in(make_benchmark_folder(tmp_path)))
    blocks = list(blocks_of(columns, 60))
    assert len(blocks) > 1
    assert all(block[0] is columns[0] for block in blocks)
    assert [one for block in blocks for one in block[1:]] == columns[1:]
    assert list(blocks_of(columns, 1000)) == [columns]


def test_a_reason_is_told_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Report().benchmark_rows("", rows_in(make_benchmark_folder(tmp_path, lost=["flexgen-b4"])))
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("failed  flexgen-b4: OutOfMemory: CUDA ran out")
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00001, "1.00e-05"), (9.996, "10.0"), (99.96, "100"), (999.6, "1,000"), (1e7, "10,000,000")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0%"), (0.001, "0.1%"), (0.0999, "10%"), (0.998, "99.8%"), (1.0, "100%"), (1.25, "125%")],
)
def test_a_share_below_one_never_reads_as_one(share: float, text: str) -> None:
    assert percent(share) == text


def test_runs_that_were_cut_short_are_counted(tmp_path: Path) -> None:
    def runs(**counts: Any) -> str:
        return column([Row(name="a", strategy="s", status="FINISHED", **counts)], "runs")[0]

    assert runs(launches=2, repeats=6) == "2x3"
    assert runs(launches=2, repeats=5) == "5 in 2"
    assert runs(launches=0, repeats=3) == "1x3"
