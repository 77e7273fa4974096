"""`harness sync`: brings result folders into an MLflow store, here or from another machine, once each."""

from pathlib import Path

from flexllmgen.errors import OffloadError
from harness.evaluation import draw_pictures
from harness.report import Report
from harness.results import RunResult
from harness.store import DeliveryError, resolve_store
from harness.tracking import Tracker, find_result_folders


def sync(folder: Path, tracking_uri: str | None, report: Report) -> int:
    """Deliver every result folder at `folder`; return the exit code.

    One that cannot be delivered does not keep the others from it.

    Raises:
        UsageError: there is no result folder.
    """
    folders = find_result_folders(folder)
    tracker = Tracker(resolve_store(tracking_uri, Path.cwd()))
    code = 0
    for one in folders:
        try:
            draw_pictures(one, RunResult.read(one))
            run_id = tracker.deliver(one)
        except DeliveryError as error:
            report.error(f"{one}: {error}")
            return 4
        except OffloadError as error:
            report.error(f"{one}: {error}")
            code = error.exit_code
        else:
            report.text(f"{one} is run {run_id}")
    return code
