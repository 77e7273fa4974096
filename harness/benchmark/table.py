"""The table that a benchmark ends with: one row per cell, and how the cells compare.

A row holds numbers in seconds, bytes and tokens per second, None for what is unknown; nothing in it is inf or NaN. How
they read is table_text.py's. Knows nothing of terminals, of HTML or of MLflow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from harness.benchmark.layers import AXES
from harness.benchmark.record import Benchmark, Cell, CellStatus, read_cells
from harness.quality.words import losses
from harness.results import RunResult, Scalar, write_json, write_text

TABLE_SCHEMA_VERSION = 1
_SHARED = tuple(axis for axis in AXES if axis != "strategy")
"""Axes that cells of every strategy may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A cell in the table.

    Args:
        reason: why the cell failed, in one line; None where it did not.
        low_tok_s, high_tok_s: the range of what `generation_tok_s` is the median of: medians of the launches where there
            are several, else the repeats. `spread` is (high - low) / median.
        peak_device_bytes: most device memory allocated; None without such a device. `peak_host_bytes` is the resident set
            of the process, `disk_bytes` what its offload files take.
        predicted_peak_...: what the plan said of the same three. The plan counts what the engine holds, the resident set
            also the interpreter and its libraries.
        attainment: measured / limit.
        baseline: the cell it is held against, with the same workload; None where there is none.
        ratio_to_baseline: measured / the baseline's; 1 for the baseline itself.
        parity: share of sequences whose tokens all equal the baseline's; `first_divergence` the earliest position
            (from 0) that differs.
        others_share: share of the processors that other processes kept busy during the timed passes, on average.
        lossy: what the cell's policy gives up, in words; None for a lossless one. The other three are beside what the same
            model does losslessly: perplexity, its ratio to the lossless one's, and the share of equal tokens.
    """

    name: str
    strategy: str
    model: str = ""
    axes: dict[str, Scalar] = field(default_factory=dict)
    workload_key: str | None = None
    status: str
    reason: str | None = None
    launches: int = 0
    repeats: int = 0
    generation_tok_s: float | None = None
    low_tok_s: float | None = None
    high_tok_s: float | None = None
    spread: float | None = None
    baseline: str | None = None
    ratio_to_baseline: float | None = None
    predicted_tok_s: float | None = None
    prediction_error: float | None = None
    limit_tok_s: float | None = None
    attainment: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    load_s: float | None = None
    peak_device_bytes: float | None = None
    peak_host_bytes: float | None = None
    disk_bytes: float | None = None
    predicted_peak_device_bytes: float | None = None
    predicted_peak_host_bytes: float | None = None
    predicted_disk_bytes: float | None = None
    parity: float | None = None
    first_divergence: int | None = None
    others_share: float | None = None
    lossy: str | None = None
    perplexity: float | None = None
    perplexity_ratio: float | None = None
    token_match_share: float | None = None


def rows_of(benchmark: Benchmark, results: Mapping[str, RunResult]) -> list[Row]:
    """A row for each cell of the grid, in its order; cells without a result have one too."""
    bases = {cell.name: baseline_of(cell, benchmark, results) for cell in benchmark.cells}
    return [_row(cell, benchmark, results, bases[cell.name]) for cell in benchmark.cells]


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    """JSON-ready: the units are in the keys, what is unknown is null."""
    return {"schema_version": TABLE_SCHEMA_VERSION, "rows": [asdict(row) for row in rows]}


def as_markdown(rows: Sequence[Row]) -> str:
    """The table in GitHub's markdown, and below it a line for each cell that failed."""
    from harness.benchmark.table_text import markdown

    return markdown(rows)


def write_tables(folder: Path) -> None:
    """Write table.md and table.json of the benchmark at `folder`, as far as it came.

    Raises:
        UsageError: benchmark.json or a cell's result cannot be read.
    """
    benchmark = Benchmark.read(folder)
    rows = rows_of(benchmark, read_cells(folder, benchmark))
    write_text(folder / "table.md", as_markdown(rows))
    write_json(
        folder / "table.json",
        {
            "benchmark_uuid": benchmark.benchmark_uuid,
            "name": benchmark.name,
            "status": benchmark.status.value,
            "baseline": benchmark.baseline,
            **as_json(rows),
        },
    )


def baseline_of(cell: Cell, benchmark: Benchmark, results: Mapping[str, RunResult]) -> str | None:
    """The cell that `cell` is held against: of the same workload and machine, batch size and caps where there is one.

    `benchmark.baseline` names a cell or a strategy. Where the grid has several workloads, batch sizes or caps, each has its
    own cell of the baseline's strategy, with the policy and keys of the named cell, else the first; one in whose grid that
    strategy has no part, its first cell.
    """
    cells = {one.name: one for one in benchmark.cells}
    named = cells.get(benchmark.baseline)
    if named is not None and named.name not in results and all(_equal(named, cell, axis) for axis in _SHARED):
        return None
    wanted = benchmark.baseline if named is None else _strategy(named, results)
    candidates = [
        one
        for one in benchmark.cells
        if one.name in results
        and _strategy(one, results) == wanted
        and cell.name in results
        and _same_workload(results[one.name], results[cell.name])
    ]
    if not candidates and not any(
        # It may have been of this workload.
        one.name not in results and _strategy(one, results) == wanted
        for one in benchmark.cells
    ):
        candidates = [
            one
            for one in benchmark.cells
            if one.name in results
            and cell.name in results
            and _same_workload(results[one.name], results[cell.name])
        ]
        # A cell that is alone with its workload has nothing to be held against.
        candidates = candidates[:1] if len(candidates) > 1 else []
    if not candidates:
        return None
    # A policy is held against another one and not against itself; so what is the cell's own does not count.
    return max(
        candidates,
        key=lambda one: (
            sum(_equal(one, cell, name) for name in _SHARED),
            0 if named is None else sum(_equal(one, named, name) for name in {*one.axes, *named.axes}),
            one.name == benchmark.baseline,
        ),
    ).name


def measured_rows(rows: Sequence[Row]) -> list[Row]:
    """The cells that have figures and did not fail: what a failed one measured until then makes no winner."""
    return [row for row in rows if row.generation_tok_s and row.status != CellStatus.FAILED]


def fastest(rows: Sequence[Row]) -> Row | None:
    """The measured cell with most generated tokens per second; None without one."""
    return max(measured_rows(rows), key=lambda row: row.generation_tok_s or 0.0, default=None)


def finite(value: object) -> float | None:
    """A number that JSON can hold, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def range_of(result: RunResult, metric: str) -> tuple[float, float] | None:
    """Lowest and highest value of `metric` over the launches' medians, or over the repeats of the only launch."""
    by_launch: dict[int, list[float]] = {}
    for repeat in result.repeats:
        if (value := finite(repeat.metrics.get(metric))) is not None:
            by_launch.setdefault(repeat.launch, []).append(value)
    if len(by_launch) > 1:
        values = [median(one) for one in by_launch.values()]
    else:
        values = [value for one in by_launch.values() for value in one]
    return (min(values), max(values)) if len(values) > 1 else None


def _row(cell: Cell, benchmark: Benchmark, results: Mapping[str, RunResult], baseline: str | None) -> Row:
    result = results.get(cell.name)
    error = cell.error or (result.error if result else None)
    failed = cell.status is CellStatus.FAILED
    reason = f"{error.type}: {' '.join(error.message.split())}" if error else None
    head: dict[str, Any] = {
        "name": cell.name,
        "strategy": _strategy(cell, results),
        "model": result.model if result else str(cell.common.get("model") or ""),
        "axes": {name: _clean(value) for name, value in cell.axes.items()},
        "status": cell.status.value,
        "reason": reason or ("no reason was recorded" if failed else None),
    }
    if result is None:
        return Row(**head, launches=len(cell.launches))
    get = {name: finite(value) for name, value in result.metrics.items()}.get
    measured = get("generation_tok_s")
    low, high = range_of(result, "generation_tok_s") or (None, None)
    parity = benchmark.parity.get(cell.name)
    base = results[baseline].metrics.get("generation_tok_s") if baseline else None
    device_bytes, host_bytes, disk_bytes = predicted_peaks(result)
    return Row(
        **head,
        workload_key=result.workload_key or None,
        launches=max(len(cell.launches), len({repeat.launch for repeat in result.repeats})),
        repeats=len(result.repeats),
        generation_tok_s=measured,
        low_tok_s=low,
        high_tok_s=high,
        spread=finite(result.spread.get("generation_tok_s")),
        baseline=baseline,
        ratio_to_baseline=_ratio(measured, finite(base)),
        predicted_tok_s=get("predicted_tok_s"),
        prediction_error=get("prediction_error"),
        limit_tok_s=get("limit_tok_s"),
        attainment=get("attainment"),
        ttft_s=get("ttft_s"),
        tpot_s=get("tpot_s"),
        load_s=get("load_s"),
        peak_device_bytes=get("peak_device_allocated_bytes"),
        peak_host_bytes=get("peak_rss_bytes"),
        disk_bytes=get("offload_disk_bytes"),
        predicted_peak_device_bytes=device_bytes,
        predicted_peak_host_bytes=host_bytes,
        predicted_disk_bytes=disk_bytes,
        parity=None if parity is None else finite(parity.equal_share),
        first_divergence=None if parity is None else parity.first_divergence,
        others_share=get("others_share"),
        lossy=losses(result.plan) or None,
        perplexity=get("perplexity"),
        perplexity_ratio=get("perplexity_ratio"),
        token_match_share=get("token_match_share"),
    )


def predicted_peaks(result: RunResult) -> tuple[float | None, float | None, float | None]:
    """Planned peaks of device, host and disk. Without a GPU the plan's tier `gpu` is host memory too."""
    planned = (
        result.plan.get("planned_peak_bytes") or (result.plan.get("predicted") or {}).get("peak_bytes") or {}
    )
    gpu, cpu, disk = (
        value if (value := finite(result.metrics.get(f"predicted_peak_{tier}_bytes"))) is not None
        else finite(planned.get(tier))
        for tier in ("gpu", "cpu", "disk")
    )  # fmt: skip
    if (result.plan.get("device") or result.params.get("device")) == "cuda":
        return gpu, cpu, disk
    return None, None if gpu is None and cpu is None else (gpu or 0.0) + (cpu or 0.0), disk


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else finite(value / base)


def _strategy(cell: Cell, results: Mapping[str, RunResult]) -> str:
    if cell.name in results:
        return results[cell.name].strategy
    return str(cell.axes.get("strategy") or cell.common.get("strategy") or "unknown")


def _same_workload(one: RunResult, other: RunResult) -> bool:
    return (one.workload_key, one.hardware_fingerprint) == (other.workload_key, other.hardware_fingerprint)


def _equal(one: Cell, other: Cell, axis: str) -> bool:
    return one.axes.get(axis) == other.axes.get(axis)


def _clean(value: Scalar) -> Scalar:
    return None if isinstance(value, float) and not math.isfinite(value) else value
