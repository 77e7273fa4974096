"""`harness benchmark --dry-run`: the cells, and for each what its plan says, loading no weights.

All in this process, as `harness plan` does it: nothing is measured that its size could disturb.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from flexllmgen.errors import OffloadError
from flexllmgen.units import gib
from harness import exit_codes
from harness.benchmark.grid import Grid
from harness.benchmark.record import Benchmark, Cell
from harness.benchmark.table_text import UNKNOWN, number
from harness.config import EvalConfig, Settings
from harness.report import Report
from harness.words import counted
from strategies.base import Plan
from strategies.registry import find_strategy

_TIERS = ("gpu", "cpu", "disk")


def dry_run(grid: Grid, benchmark: Benchmark, report: Report, *, as_json: bool) -> int:
    """Plan each cell and list the cells in the order they would run; return the exit code.

    A cell whose plan does not fit is listed with the reason, and the exit code is 6, or its own where all are so.
    """
    from harness.planning import make_plan

    plans: dict[str, Plan] = {}
    errors: dict[str, OffloadError] = {}
    warnings: dict[str, None] = {}
    for number_done, cell in enumerate(grid.cells):
        report.part(f"plan {cell.name}", number_done, len(grid.cells))
        try:
            plans[cell.name], _, told = make_plan(_settings(cell), report, None)
        except OffloadError as error:
            errors[cell.name] = error
        else:
            warnings |= dict.fromkeys(told)
    report.end_progress()
    for warning in warnings:
        report.warn(warning)
    if as_json:
        report.json(_json(grid, benchmark, plans, errors))
    else:
        cells, launches = counted(len(grid.cells), "cell"), counted(benchmark.launches, "launch")
        report.rows(
            f"{benchmark.name}: {cells}, {launches} each, baseline {benchmark.baseline}",
            ("cell", "predicted tok/s", "limit tok/s", "peak on the device", "in host memory", "on disk", ""),
            [_row(cell, plans.get(cell.name), str(errors.get(cell.name, ""))) for cell in grid.cells],
        )
    if not errors:
        return 0
    return exit_codes.PARTIAL if plans else next(iter(errors.values())).exit_code


def _settings(cell: Cell) -> Settings:
    config_type, _ = find_strategy(str(cell.common["strategy"])).load_config()
    return Settings(
        common=EvalConfig.model_validate(cell.common),
        strategy=config_type.model_validate(cell.strategy_config),
        sources=cell.sources,
    )


def _row(cell: Cell, plan: Plan | None, reason: str) -> Sequence[str]:
    if plan is None:
        return (cell.name, *[UNKNOWN] * 5, reason)
    rates = [
        UNKNOWN if estimate is None else number(estimate.generation_tok_s)
        for estimate in (plan.predicted, plan.limit)
    ]
    peaks = plan.peak_bytes
    return (cell.name, *rates, *(gib(peaks[tier]) if peaks.get(tier) else UNKNOWN for tier in _TIERS), "")


def _json(
    grid: Grid, benchmark: Benchmark, plans: Mapping[str, Plan], errors: Mapping[str, OffloadError]
) -> dict[str, Any]:
    return {
        "name": benchmark.name,
        "suite": benchmark.suite,
        "baseline": benchmark.baseline,
        "launches": benchmark.launches,
        "cells": [
            {
                "name": cell.name,
                "axes": cell.axes,
                "plan": plans[cell.name].as_dict() if cell.name in plans else None,
                "error": str(errors[cell.name]) if cell.name in errors else None,
            }
            for cell in grid.cells
        ],
    }
