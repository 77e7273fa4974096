"""`harness sync`: brings result folders and benchmarks into an MLflow store, here or from another machine, once each."""

import contextlib
import logging
from pathlib import Path

from flexllmgen.errors import OffloadError, UsageError
from harness import exit_codes
from harness.benchmark.record import Benchmark, cell_folder
from harness.benchmark.table import write_tables
from harness.evaluation import try_pictures
from harness.folders import BENCHMARK, find_folders
from harness.provenance import process_is_alive
from harness.report import Report
from harness.results import RunResult, RunStatus
from harness.store import DeliveryError, resolve_store
from harness.tracking import Tracker

log = logging.getLogger(__name__)


def sync(folder: Path, tracking_uri: str | None, report: Report) -> int:
    """Deliver every run and every benchmark at `folder`; return the exit code.

    One that cannot be delivered does not keep the others from it. A cell of a benchmark arrives with its benchmark only.

    Raises:
        UsageError: there is no result folder.
    """
    folders = find_folders(folder)
    tracker = Tracker(resolve_store(tracking_uri, Path.cwd()))
    code = 0
    for one in folders:
        try:
            if (one / BENCHMARK).is_file():
                _complete(one, report)
                words = f"{one} is benchmark run {tracker.deliver_benchmark(one)}"
            else:
                try_pictures(one, RunResult.read(one), report.warn)
                words = f"{one} is run {tracker.deliver(one)}"
        except DeliveryError as error:
            report.error(f"{one}: {error}")
            return exit_codes.NOT_DELIVERED
        except OffloadError as error:
            report.error(f"{one}: {error}")
            code = error.exit_code
        else:
            report.text(words)
    return code


def _complete(folder: Path, report: Report) -> None:
    """Write what the folder lacks: pictures, tables, the report. A cell that cannot be read is told by its delivery."""
    benchmark = Benchmark.read(folder)
    if benchmark.status is RunStatus.RUNNING and process_is_alive(benchmark.process):
        return
    with contextlib.suppress(UsageError):
        for cell in benchmark.cells:
            inside = cell_folder(folder, cell.name)
            if (inside / "result.json").exists():
                try_pictures(inside, RunResult.read(inside), report.warn)
        try:
            if not (folder / "table.md").exists():
                write_tables(folder)
            if not (folder / "report.html").exists():
                _write_report(folder)
        except OSError as error:
            report.warn(f"tables and report of {folder} cannot be written: {error.strerror or error}")


def _write_report(folder: Path) -> None:
    """Write report.html; where the plotting library is not installed, a later `harness sync` does."""
    try:
        from harness.benchmark import html_report

        html_report.write_report(folder)
    except ImportError:
        log.info("plotly is not installed here: no report")
