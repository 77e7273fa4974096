"""Runs as one flat table: from folders and stores alike, whatever their values are."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from benchmark_records import make_benchmark_folder
from records import START_MS, UUID, make_folder, make_result

from flexllmgen.errors import UsageError
from harness.benchmark.record import Benchmark, Cell, CellStatus, cell_folder
from harness.export import check_format, export, folder_rows, make_table, select
from harness.report import Report
from harness.results import CellLink, RunStatus
from harness.store import Store
from harness.store_runs import store_rows
from harness.tracking import Tracker

ODD = 'naïve "quoted", 日本語 🚀\nsecond line, \u202eright to left'


def read_back(table: pandas.DataFrame, output: Path) -> pandas.DataFrame:
    match output.suffix:
        case ".csv":
            return pandas.read_csv(output)
        case ".parquet":
            return pandas.read_parquet(output)
        case _:
            return pandas.DataFrame(json.loads(output.read_text(encoding="utf-8")))


def make_benchmark(results: Path) -> Path:
    uuid = "be9c0000-0000-4000-8000-000000000001"
    cells = [
        Cell(name=name, axes={"strategy": name}, common={}, strategy_config={}, sources={}, status=status)
        for name, status in (("accelerate", CellStatus.FINISHED), ("flexgen", CellStatus.FAILED))
    ]
    benchmark = Benchmark(
        benchmark_uuid=uuid,
        name="nightly",
        experiment="bench",
        status=RunStatus.FINISHED,
        started_at_ms=START_MS,
        baseline="accelerate",
        cells=cells,
    )
    folder = results / uuid
    benchmark.write(folder)
    link = CellLink(benchmark_uuid=uuid, cell="accelerate", launches=["l1", "l2"])
    result = make_result(cell=link, run_uuid="cell-1", experiment="bench", metrics={"ttft_s": 0.25})
    result.write(cell_folder(folder, "accelerate"))
    return folder


def test_a_folder_of_results_is_a_row_per_run_and_cell(tmp_path: Path) -> None:
    make_folder(tmp_path, make_result(metrics={"ttft_s": 0.5}))
    benchmark = make_benchmark(tmp_path)
    table = make_table(folder_rows(tmp_path, Report(quiet=True)))
    assert len(table) == 3
    cell = table[table["cell"] == "accelerate"].iloc[0]
    assert cell["benchmark_uuid"] == benchmark.name
    assert cell["benchmark"] == "nightly"
    assert cell["launches"] == 2
    assert cell["metrics.ttft_s"] == 0.25
    alone = table[table["run_uuid"] == UUID].iloc[0]
    assert pandas.isna(alone["benchmark_uuid"])
    assert alone["metrics.ttft_s_spread"] == 0.2
    assert alone["metrics.ttft_s_cold"] == 0.9
    assert alone["git_commit"] == "a" * 40
    assert alone["started_at"] == pandas.Timestamp(START_MS, unit="ms", tz="UTC")
    assert table.columns[:4].to_list() == ["run_name", "strategy", "model", "status"]
    # One folder alone, and a benchmark alone.
    assert [row["run_uuid"] for row in folder_rows(tmp_path / UUID, Report(quiet=True))] == [UUID]
    assert {row["cell"] for row in folder_rows(benchmark, Report(quiet=True))} == {"accelerate", "flexgen"}


def test_a_damaged_or_newer_record_costs_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path, make_result(metrics={}))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "result.json").write_text('{"schema_version": 99')
    assert len(folder_rows(tmp_path, Report(quiet=True))) == 1
    assert "torn" in capsys.readouterr().err
    with pytest.raises(UsageError, match="there is no folder"):
        folder_rows(tmp_path / "torn" / "nowhere", Report(quiet=True))


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_every_format_holds_the_same(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [
        {"run_name": ODD, "started_at_ms": START_MS, "params.a": 1, "params.b": True, "metrics.x": 0.1},
        {"run_name": "b", "started_at_ms": START_MS, "params.a": "two", "params.b": None, "metrics.x": None},
        {"run_name": "\ud800half", "started_at_ms": None, "params.a": None, "metrics.x": 3, "params.c": None},
    ]
    output = tmp_path / "deep" / f"runs{suffix}"
    assert export(rows, output, Report(quiet=True)) == 0
    table = read_back(make_table(rows), output)
    assert "params.c" not in table
    assert table["run_name"].to_list() == [ODD, "b", "\\ud800half"]
    assert [None if pandas.isna(value) else value for value in table["params.a"]] == ["1", "two", None]
    assert [None if pandas.isna(value) else bool(value) for value in table["params.b"]] == [True, None, None]
    assert [None if pandas.isna(value) else float(value) for value in table["metrics.x"]] == [0.1, None, 3.0]
    started = pandas.to_datetime(table["started_at"], utc=True)
    assert started[0] == pandas.Timestamp(START_MS, unit="ms", tz="UTC")
    assert pandas.isna(started[2])
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_figures_that_are_no_numbers_are_empty() -> None:
    table = make_table([{"metrics.x": float("nan")}, {"metrics.x": float("inf")}, {"metrics.x": 2.0}])
    assert table["metrics.x"].isna().to_list() == [True, True, False]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["4", "8"], "Int64"),
        (["4", "0.5", "1e-3"], "Float64"),
        (["true", "false"], "boolean"),
        (["007", "1"], "string"),
        (["1_000", "2"], "string"),
        (["nan", "1"], "string"),
        ([2**70, 1], "Float64"),
        ([True, 3], "string"),
    ],
)
def test_a_column_has_one_type(values: list[Any], kind: str) -> None:
    assert str(make_table([{"params.x": value} for value in values])["params.x"].dtype) == kind


def test_the_store_gives_what_the_folder_gives(store: Store, tracker: Tracker, tmp_path: Path) -> None:
    result = make_result(
        metrics={"ttft_s": 0.5},
        params={"batch_size": 4, "gpu_mem": None, "quantize": "none", "enable_offload": True},
        tags={"team": ODD},
    )
    tracker.deliver(make_folder(tmp_path / "results", result))
    ours = make_table(folder_rows(tmp_path / "results", Report(quiet=True)))
    theirs = make_table(store_rows(store))
    for name in ("run_uuid", "strategy", "model", "status", "experiment", "git_commit", "git_dirty", "started_at",
                 "host", "user", "workload_key", "metrics.ttft_s", "metrics.ttft_s_spread", "params.batch_size",
                 "params.quantize", "params.enable_offload", "tags.team"):  # fmt: skip
        assert theirs[name][0] == ours[name][0], name
    assert "params.gpu_mem" not in theirs
    assert "params.gpu_mem" not in ours
    assert store_rows(store, ["offload-eval"])
    with pytest.raises(UsageError, match="no experiment 'other'"):
        store_rows(store, ["other"])


def test_cells_of_a_benchmark_in_the_store_name_it(store: Store, tracker: Tracker, tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path)
    tracker.deliver_benchmark(folder)
    ours, theirs = (
        make_table(rows).set_index("cell")
        for rows in (folder_rows(tmp_path, Report(quiet=True)), store_rows(store))
    )
    assert set(ours.index) <= set(theirs.index)
    assert len(ours) >= 4
    for cell in ours.index:
        for name in ("benchmark_uuid", "benchmark", "kind", "strategy", "metrics.generation_tok_s"):
            mine, other = ours.loc[cell].get(name), theirs.loc[cell].get(name)
            assert (pandas.isna(mine) and pandas.isna(other)) or mine == other, (cell, name)
    assert set(theirs["benchmark_uuid"]) == {folder.name}
    assert set(theirs["kind"]) == {"cell"}


def test_a_cell_that_left_no_result_is_a_row_all_the_same(tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path, lost=["flexgen-b8"])
    rows = {row["cell"]: row for row in folder_rows(folder, Report(quiet=True))}
    assert len(rows) == 6
    lost = rows["flexgen-b8"]
    assert (lost["status"], lost["strategy"], lost["exit_code"]) == ("FAILED", "flexgen", 5)
    assert "out of memory" in lost["error"]
    assert make_table([*rows.values()])["metrics.generation_tok_s"].notna().sum() == 5


def test_only_what_was_asked_for() -> None:
    rows = [
        {"strategy": "flexgen", "model": "owner/tiny", "experiment": "e"},
        {"strategy": "accelerate", "model": "owner/large", "experiment": "e"},
    ]
    assert select(rows) == rows
    assert select(rows, strategies=["flexgen"]) == rows[:1]
    assert select(rows, models=["tiny"]) == select(rows, models=["owner/tiny"]) == rows[:1]
    assert select(rows, strategies=["flexgen"], models=["owner/large"]) == []
    assert select(rows, experiments=["f"]) == []


def test_mistakes_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.parquet"):
        check_format(tmp_path / "runs.xlsx")
    with pytest.raises(UsageError, match="no run matches"):
        export([], None, Report(quiet=True))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        export([{"run_name": "a"}], tmp_path / "file" / "runs.csv", Report(quiet=True))


def test_the_command(harness: Callable[..., Any], tmp_path: Path) -> None:
    make_folder(tmp_path / "results", make_result(metrics={"ttft_s": 0.5}, tags={"odd": ODD}))
    done = harness("export", "--results-dir", "results", cwd=tmp_path)
    assert done.code == 0, done.stderr
    table = pandas.read_csv(io.StringIO(done.stdout))
    assert table["tags.odd"][0] == ODD
    # Reading makes no store.
    refused = harness("export", cwd=tmp_path)
    assert refused.code == 2
    assert "there is no store" in refused.errors[0]
    assert not (tmp_path / "mlruns").exists()
    assert harness("export", "-o", "runs.xlsx", cwd=tmp_path).code == 2
