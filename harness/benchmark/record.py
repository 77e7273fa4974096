"""What a benchmark leaves behind: its grid, how far it came, and a result for each cell.

    results/<benchmark uuid>/
        benchmark.json               this module's Benchmark
        table.md, table.json         the comparison table
        report.html                  the same with plots, complete in one file
        cells/<cell>/                a result folder like that of `harness eval`: all launches of the cell together
            result.json              RunResult with `cell` set; repeats of all launches
            *.png                    pictures
            launches/<run uuid>/     the result folder of each process that measured the cell, whole

The folder is complete by itself: what an interruption left is resumed from it, and MLflow is a projection of it (one
parent run, one child per cell). Knows nothing of MLflow.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from harness.results import (
    Provenance,
    Record,
    RunError,
    RunResult,
    RunStatus,
    Scalar,
    parse_record,
    read_bytes,
    write_text,
)

SCHEMA_VERSION: Literal[1] = 1


class CellStatus(StrEnum):
    """How a cell stands; PENDING until its last launch has ended."""

    PENDING = "PENDING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"


class Cell(Record):
    """One combination of the grid.

    Args:
        name: its folder and what `--baseline` may name: readable, unique within the benchmark, stable between benchmarks of the
            same grid.
        axes: what tells it from the other cells, option or strategy key to value, in the grid's order.
        common: its effective common options; `strategy_config` its strategy's keys.
    """

    name: str
    axes: dict[str, Scalar]
    common: dict[str, Any]
    strategy_config: dict[str, Any]
    sources: dict[str, str]
    status: CellStatus = CellStatus.PENDING
    launches: list[str] = Field(default_factory=list, description="uuid of each launch that ended, in order")
    error: RunError | None = None


class Parity(Record):
    """A cell's generated tokens beside the baseline's, on identical prompts.

    Args:
        equal_share: share of the sequences that are equal in every token; 1 for the baseline itself.
        first_divergence: the earliest position (from 0) at which any sequence differs; None where none does.
        expected: false where the cell or its baseline is lossy, so that other tokens are no fault.
    """

    equal_share: float
    first_divergence: int | None = None
    expected: bool = True


class Benchmark(Record):
    """A benchmark: what was asked for, and how far it came."""

    schema_version: Literal[1] = SCHEMA_VERSION
    benchmark_uuid: str
    name: str
    suite: str | None = None
    experiment: str
    status: RunStatus
    started_at_ms: int
    ended_at_ms: int | None = None
    launches: int = 1
    cell_timeout_s: float | None = None
    baseline: str
    cells: list[Cell]
    parity: dict[str, Parity] = Field(default_factory=dict, description="by cell name")
    process: dict[str, Scalar] = Field(default_factory=dict)
    provenance: Provenance = Field(default_factory=Provenance)
    tags: dict[str, str] = Field(default_factory=dict)
    hardware_fingerprint: str = ""
    hardware_summary: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder/benchmark.json`.

        Raises:
            UsageError: the file is missing, damaged, or of another schema version.
        """
        path = folder / "benchmark.json"
        content = read_bytes(path, "name a folder that `harness benchmark` wrote")
        return parse_record(cls, content, f"{path} is not a benchmark", newest=SCHEMA_VERSION)

    def write(self, folder: Path) -> Path:
        """Write `folder/benchmark.json` atomically and return its path."""
        return write_text(folder / "benchmark.json", self.model_dump_json(indent=2) + "\n")


def cell_folder(folder: Path, cell: str) -> Path:
    """The result folder of a cell of the benchmark at `folder`."""
    return folder / "cells" / cell


def read_cells(folder: Path, benchmark: Benchmark) -> Mapping[str, RunResult]:
    """The merged results of the cells that have one, by name, in the grid's order.

    Raises:
        UsageError: a result is damaged or of a newer schema.
    """
    return {
        cell.name: RunResult.read(cell_folder(folder, cell.name))
        for cell in benchmark.cells
        if (cell_folder(folder, cell.name) / "result.json").exists()
    }
