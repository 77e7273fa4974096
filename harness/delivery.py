"""`harness sync`: brings result folders and benchmarks into an MLflow store, here or from another machine, once each."""

from pathlib import Path

from flexllmgen.errors import OffloadError
from harness.benchmark.record import Benchmark, cell_folder, read_cells
from harness.evaluation import draw_pictures
from harness.folders import BENCHMARK, find_folders
from harness.report import Report
from harness.results import RunResult
from harness.store import DeliveryError, resolve_store
from harness.tracking import Tracker


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
                _draw_benchmark(one)
                words = f"{one} is benchmark run {tracker.deliver_benchmark(one)}"
            else:
                draw_pictures(one, RunResult.read(one))
                words = f"{one} is run {tracker.deliver(one)}"
        except DeliveryError as error:
            report.error(f"{one}: {error}")
            return 4
        except OffloadError as error:
            report.error(f"{one}: {error}")
            code = error.exit_code
        else:
            report.text(words)
    return code


def _draw_benchmark(folder: Path) -> None:
    """Draw and write what the benchmark's machine could not, for want of a library."""
    benchmark = Benchmark.read(folder)
    for name, result in read_cells(folder, benchmark).items():
        draw_pictures(cell_folder(folder, name), result)
