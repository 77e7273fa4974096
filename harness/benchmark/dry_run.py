"""`harness benchmark --dry-run`: the cells, and for each what its plan says, loading no weights."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexllmgen.units import gib
from harness.benchmark.grid import Grid
from harness.benchmark.record import Benchmark, Cell
from harness.benchmark.runner import job_of
from harness.benchmark.table_text import UNKNOWN, number
from harness.launch import EXIT_INTERRUPTED, Launch
from harness.report import Report
from harness.results import RunError
from harness.supervise import Worker

EXIT_PARTIAL = 6
_TIERS = ("gpu", "cpu", "disk")


def dry_run(grid: Grid, benchmark: Benchmark, report: Report, *, as_json: bool) -> int:
    """Plan each cell in a process of its own and list the cells in the order they would run; return the exit code.

    A cell whose plan does not fit is listed with the reason, and the exit code is 6, or its own where all are so.
    """
    plans: dict[str, Mapping[str, Any]] = {}
    errors: dict[str, RunError] = {}
    for cell in grid.cells:
        report.part(f"plan {cell.name}", len(plans) + len(errors), len(grid.cells))
        plan, error, interrupted = _plan(benchmark, cell, report)
        if interrupted:
            report.end_progress()
            report.error("interrupted")
            return EXIT_INTERRUPTED
        if plan is not None:
            plans[cell.name] = plan
        elif error is not None:
            errors[cell.name] = error
    report.end_progress()
    if as_json:
        report.json(_json(grid, benchmark, plans, errors))
    else:
        report.rows(
            f"{benchmark.name}: {len(grid.cells)} cells, {benchmark.launches} launch(es) each, "
            f"baseline {benchmark.baseline}",
            ("cell", "predicted tok/s", "limit tok/s", "on the device", "in host memory", "on disk", ""),
            [
                _row(cell, plans.get(cell.name), errors[cell.name].message if cell.name in errors else "")
                for cell in grid.cells
            ],
        )
    if not errors:
        return 0
    return EXIT_PARTIAL if plans else next(iter(errors.values())).exit_code


def _plan(
    benchmark: Benchmark, cell: Cell, report: Report
) -> tuple[Mapping[str, Any] | None, RunError | None, bool]:
    found: list[Mapping[str, Any]] = []

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] == "planned":
            found.append(event["plan"])

    job = job_of(Path(), benchmark, cell, 0, uuid.uuid4().hex, verbose=report.verbose, dry_run=True)
    ended = Launch(Worker(job), on_event, timeout_s=benchmark.cell_timeout_s).run()
    return (found[0] if found else None), ended.error, ended.interrupted


def _row(cell: Cell, plan: Mapping[str, Any] | None, reason: str) -> Sequence[str]:
    if plan is None:
        return (cell.name, *[UNKNOWN] * 5, reason)
    rates = [_rate(plan.get(name)) for name in ("predicted", "limit")]
    peaks = _peaks(plan)
    return (cell.name, *rates, *(gib(peaks[tier]) if peaks.get(tier) else UNKNOWN for tier in _TIERS), reason)


def _rate(estimate: Mapping[str, Any] | None) -> str:
    return number(float(estimate["generation_tok_s"])) if estimate else UNKNOWN


def _peaks(plan: Mapping[str, Any]) -> Mapping[str, float]:
    return plan.get("planned_peak_bytes") or (plan.get("predicted") or {}).get("peak_bytes") or {}


def _json(
    grid: Grid, benchmark: Benchmark, plans: Mapping[str, Any], errors: Mapping[str, RunError]
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
                "plan": plans.get(cell.name),
                "error": errors[cell.name].message if cell.name in errors else None,
            }
            for cell in grid.cells
        ],
    }
