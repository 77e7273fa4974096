"""What MLflow shows of a benchmark: the parent run's params, metrics, tags and description, and what its cells add.

Pure functions, as summary.py's are for a run. Knows nothing of MLflow but its limits on names and lengths.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness.benchmark.record import Benchmark, Cell, CellStatus
from harness.benchmark.table import Row, as_markdown, fastest
from harness.benchmark.table_text import number, percent
from harness.results import CellLink, RunError, RunResult, RunStatus, Scalar
from harness.summary import PARAM_LIMIT, MetricRow, clean_name, origin_tags, param_text, shorten
from harness.words import counted

# Options that say where a process writes, not what it measures.
_PLUMBING = ("tracking_uri", "no_mlflow", "results_dir", "log_file", "run_name", "tag", "experiment")


def benchmark_params(benchmark: Benchmark, results: Mapping[str, RunResult]) -> dict[str, str]:
    """Params of the parent: options that all cells share; of an axis of the grid, all its values in a row.

    What an option came to in every cell (a dtype, where it said auto) stands in place of what was asked.
    """
    cells = benchmark.cells
    params: dict[str, Scalar] = {}
    for name in _in_order(cell.common for cell in cells):
        values = [cell.common.get(name) for cell in cells]
        if name not in _PLUMBING and all(value == values[0] for value in values):
            came_to = {result.params[name] for result in results.values() if name in result.params}
            params[name] = came_to.pop() if len(came_to) == 1 else _scalar(values[0])
    # Keys that one strategy alone has would read as if they held for all.
    for name in _in_order(cell.strategy_config for cell in cells):
        values = [cell.strategy_config.get(name, ...) for cell in cells]
        if all(value == values[0] for value in values):
            params[name] = _scalar(values[0])
    for name in _in_order(cell.axes for cell in cells):
        shown = dict.fromkeys(param_text(cell.axes[name]) for cell in cells if name in cell.axes)
        params[name] = ", ".join(shown)
    params |= {
        "suite": benchmark.suite,
        "baseline": benchmark.baseline,
        "launches": benchmark.launches,
        "cell_timeout_s": benchmark.cell_timeout_s,
    }
    return {clean_name(name): shorten(param_text(value), PARAM_LIMIT) for name, value in params.items()}


def benchmark_metrics(benchmark: Benchmark, rows: Sequence[Row], at_ms: int) -> list[MetricRow]:
    """How far the benchmark came, and the best of each strategy.

    A strategy's best cell is the one with the most generated tokens per second; ratio and attainment are that cell's.
    """
    states = [cell.status for cell in benchmark.cells]
    metrics: dict[str, float] = {
        "cells": len(states),
        "cells_finished": states.count(CellStatus.FINISHED),
        "cells_failed": states.count(CellStatus.FAILED),
    }
    for strategy in dict.fromkeys(row.strategy for row in rows):
        best = fastest([row for row in rows if row.strategy == strategy])
        for key, name in (
            ("generation_tok_s", "best_tok_s"),
            ("ratio_to_baseline", "best_ratio"),
            ("attainment", "best_attainment"),
        ):
            if best is not None and (value := getattr(best, key)) is not None:
                metrics[clean_name(f"{name}_{strategy}")] = value
    # Of a lossy cell other tokens are no fault; it has figures of its own.
    lossy = {row.name for row in rows if row.lossy}
    if shares := [
        row.parity for row in rows if row.parity is not None and not lossy & {row.name, row.baseline}
    ]:
        metrics["parity_lowest"] = min(shares)
    return [
        MetricRow(key=name, value=float(value), timestamp_ms=at_ms, step=0) for name, value in metrics.items()
    ]


def benchmark_tags(benchmark: Benchmark, error: RunError | None) -> dict[str, str]:
    """Tags of the parent: the user's, then ours and MLflow's own."""
    return origin_tags(
        benchmark.tags,
        {
            "harness.kind": "benchmark",
            "harness.run_uuid": benchmark.benchmark_uuid,
            "harness.benchmark_uuid": benchmark.benchmark_uuid,
            "harness.suite": benchmark.suite,
            "harness.hardware_fingerprint": benchmark.hardware_fingerprint,
        },
        benchmark.process,
        benchmark.provenance,
        error,
    )


def best_tag(rows: Sequence[Row]) -> dict[str, str]:
    """The fastest cell in few words: the row of a folded benchmark in the table of runs has no figures of its own."""
    if (row := fastest(rows)) is None:
        return {}
    ratio = "" if row.ratio_to_baseline is None else f", {number(row.ratio_to_baseline)}x {row.baseline}"
    return {"harness.best": f"{row.name}: {number(row.generation_tok_s or 0)} tok/s{ratio}"}


def describe_benchmark(
    benchmark: Benchmark,
    rows: Sequence[Row],
    error: RunError | None = None,
    *,
    cells: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> str:
    """The benchmark in a few lines of markdown and its comparison table; `cells` and `files` map names to links."""
    strategies = list(dict.fromkeys(row.strategy for row in rows))
    done = sum(cell.status is CellStatus.FINISHED for cell in benchmark.cells)
    failed = sum(cell.status is CellStatus.FAILED for cell in benchmark.cells)
    count = f"{done} of {counted(len(benchmark.cells), 'cell')} finished" + (
        f", {failed} failed" if failed else ""
    )
    lines = [f"**{' / '.join(strategies)}**: {count}, {_launches(benchmark)}"]
    if error:
        lines.append(f"**{error.type}**: {shorten(error.message, 600)}")
    if best := _best(rows):
        lines.append(f"**Best**: {best}")
    machine = benchmark.hardware_summary or str(benchmark.process.get("host") or "unknown")
    if commit := benchmark.provenance.git_commit:
        machine += f", commit `{commit[:8]}`" + (" with changes" if benchmark.provenance.git_dirty else "")
    lines.append(f"**Machine**: {machine}")
    for what, links in (("Files", files), ("Cells", cells)):
        if links:
            lines.append(f"**{what}**: " + ", ".join(f"[{name}]({link})" for name, link in links.items()))
    # The table of a grid of hundreds is an artifact; the description has a limit.
    return shorten("\n".join(f"- {line}" for line in lines) + f"\n\n{as_markdown(rows)}", 8000)


def cell_metrics(row: Row, at_ms: int) -> list[MetricRow]:
    """What a cell's run has beside its result's own metrics: how fast it is beside the baseline."""
    if row.ratio_to_baseline is None:
        return []
    return [MetricRow(key="ratio_to_baseline", value=row.ratio_to_baseline, timestamp_ms=at_ms, step=0)]


def cell_tags(benchmark: Benchmark, cell: Cell, row: Row) -> dict[str, str]:
    """Tags of a cell's run that tell where in the benchmark it stands."""
    tags = {
        "harness.kind": "cell",
        "harness.benchmark_uuid": benchmark.benchmark_uuid,
        "harness.benchmark": benchmark.name,
        "harness.cell": cell.name,
        "harness.baseline": row.baseline,
    }
    return {name: shorten(value, PARAM_LIMIT) for name, value in tags.items() if value}


def lost_result(benchmark: Benchmark, cell: Cell) -> RunResult:
    """Stands in for the result of a cell that failed before it could leave one."""
    return RunResult(
        run_uuid=f"{benchmark.benchmark_uuid}-{cell.name}",
        status=RunStatus.FAILED,
        experiment=benchmark.experiment,
        run_name=cell.name,
        strategy=str(cell.common.get("strategy") or cell.axes.get("strategy") or "unknown"),
        model=str(cell.common.get("model") or "unknown"),
        started_at_ms=benchmark.started_at_ms,
        ended_at_ms=benchmark.ended_at_ms,
        process=benchmark.process,
        params={name: _scalar(value) for name, value in {**cell.common, **cell.strategy_config}.items()},
        tags=benchmark.tags,
        provenance=benchmark.provenance,
        hardware_fingerprint=benchmark.hardware_fingerprint,
        cell=CellLink(benchmark_uuid=benchmark.benchmark_uuid, cell=cell.name, launches=list(cell.launches)),
        error=cell.error or RunError(type="NoResult", message="the cell failed and left no result"),
    )


def _best(rows: Sequence[Row]) -> str:
    if (row := fastest(rows)) is None:
        return ""
    words = [f"{row.name} with **{number(row.generation_tok_s or 0)} tokens/s**"]
    if row.ratio_to_baseline is not None and row.baseline != row.name:
        words.append(f"{number(row.ratio_to_baseline)}x {row.baseline}")
    if row.attainment is not None:
        words.append(f"{percent(row.attainment)} of its limit")
    return ", ".join(words)


def _launches(benchmark: Benchmark) -> str:
    processes = "one process" if benchmark.launches == 1 else f"{benchmark.launches} processes"
    return f"{processes} each, baseline {benchmark.baseline}"


def _in_order(mappings: Any) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _scalar(value: Any) -> Scalar:
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)
