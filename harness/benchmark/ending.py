"""What a benchmark comes to when its last process has ended: statuses, parity, table, report, and the exit code.

Knows nothing of MLflow.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from harness import exit_codes
from harness.benchmark.parity import parity_of, with_parity
from harness.benchmark.record import Benchmark, CellStatus, cell_folder, read_cells
from harness.benchmark.runner import merge_cell
from harness.benchmark.table import write_tables
from harness.results import RunResult, RunStatus

log = logging.getLogger(__name__)

# Cells that agree in these must have the same prompts.
_PROMPT_OPTIONS = (
    "model",
    "dataset",
    "num_prompts",
    "prompt_mode",
    "prompt_template",
    "chat_template",
    "input_len",
    "seed",
)


def close(folder: Path, benchmark: Benchmark) -> tuple[Benchmark, list[str]]:
    """Settle the benchmark's status and its parity, write both, and return it with a line for each thing to warn of.

    KILLED where launches are missing, FAILED where no cell came to anything, else FINISHED.

    Raises:
        OSError: the folder cannot be written.
    """
    states = [cell.status for cell in benchmark.cells]
    if CellStatus.PENDING in states:
        status = RunStatus.KILLED
    else:
        status = RunStatus.FINISHED if CellStatus.FINISHED in states else RunStatus.FAILED
    ended_at_ms = benchmark.ended_at_ms or int(time.time() * 1000)
    benchmark = benchmark.model_copy(update={"status": status, "ended_at_ms": ended_at_ms})
    # At once: what follows takes seconds, and an impatient user may end it.
    benchmark.write(folder)
    for cell in benchmark.cells:
        path = cell_folder(folder, cell.name)
        if (path / "result.json").exists() and RunResult.read(path).status is RunStatus.RUNNING:
            merge_cell(folder, benchmark, cell)
    results = read_cells(folder, benchmark)
    parities, warnings = parity_of(folder, benchmark, results)
    for name, parity in parities.items():
        with_parity(results[name], parity).write(cell_folder(folder, name))
    benchmark = benchmark.model_copy(update={"parity": parities})
    benchmark.write(folder)
    return benchmark, warnings + _different_prompts(benchmark, results)


def write_reports(folder: Path) -> list[str]:
    """Draw each cell's pictures, write table.md, table.json and report.html; return a line for what could not be made.

    The figures are safe already, so that nothing that goes wrong here may cost the benchmark its end, nor one of these
    the others.
    """
    problems: list[str] = []
    for what, make in (
        ("tables", write_tables),
        ("pictures", _draw_pictures),
        ("report", _write_report),
    ):
        try:
            make(folder)
        except ImportError as error:
            log.info("%s: %s is not installed here", what, error.name)
        except Exception as error:
            log.debug(what, exc_info=True)
            problems.append(f"the {what} could not be made: {' '.join(str(error).split())}")
    return problems


def _draw_pictures(folder: Path) -> None:
    from harness.benchmark.pictures import draw_benchmark
    from harness.evaluation import draw_pictures

    for name, result in read_cells(folder, Benchmark.read(folder)).items():
        draw_pictures(cell_folder(folder, name), result)
    draw_benchmark(folder)


def _write_report(folder: Path) -> None:
    from harness.benchmark.html_report import write_report

    write_report(folder)


def exit_code(benchmark: Benchmark, *, delivered: bool, fail_on: str | None) -> int:
    """130 interrupted; the error's own where every cell failed; 3 a check failed; 6 some failed; 4 not delivered; 0."""
    failed = [cell for cell in benchmark.cells if cell.status is CellStatus.FAILED]
    if benchmark.status is RunStatus.KILLED:
        return exit_codes.INTERRUPTED
    if failed and len(failed) == len(benchmark.cells):
        error = failed[0].error
        return error.exit_code if error is not None else 1
    if fail_on == "parity" and unequal(benchmark):
        return exit_codes.CHECK_FAILED
    if failed:
        return exit_codes.PARTIAL
    return 0 if delivered else exit_codes.NOT_DELIVERED


def unequal(benchmark: Benchmark) -> dict[str, str]:
    """Why each cell that did not fail has no full parity with its baseline, by name; lossy ones need none."""
    reasons = {}
    for cell in benchmark.cells:
        if cell.status is not CellStatus.FINISHED:
            continue
        parity = benchmark.parity.get(cell.name)
        if parity is None:
            reasons[cell.name] = "there is no baseline on the same prompts to compare it with"
        elif parity.equal_share < 1 and parity.expected:
            where = "" if parity.first_divergence is None else f", first at token {parity.first_divergence}"
            reasons[cell.name] = f"{parity.equal_share:.1%} of the sequences equal the baseline's{where}"
    return reasons


def _different_prompts(benchmark: Benchmark, results: Mapping[str, RunResult]) -> list[str]:
    """A line for each cell whose prompts are not those of the first one with the same options."""
    first: dict[str, tuple[str, str]] = {}
    lines = []
    for cell in benchmark.cells:
        result = results.get(cell.name)
        if result is None or result.dataset is None:
            continue
        key = repr([cell.common.get(name) for name in _PROMPT_OPTIONS])
        name, digest = first.setdefault(key, (cell.name, result.dataset.digest))
        if digest != result.dataset.digest:
            lines.append(f"{cell.name} had other prompts than {name}: did the dataset or the model change?")
    return lines
