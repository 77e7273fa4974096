"""`harness eval` from settings to exit code: open the record, run the worker, deliver what it measured."""

import logging
import os
import shlex
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexllmgen.errors import OffloadError, UsageError
from harness import exit_codes
from harness.config import Settings
from harness.job import Job
from harness.launch import Launch, one_signal_ignored
from harness.policy_words import unused_leave
from harness.provenance import collect_provenance, without_credentials
from harness.report import Report
from harness.results import RunResult, Timeline
from harness.store import DeliveryError, preload, resolve_store
from harness.supervise import Worker
from harness.tracking import Tracker

log = logging.getLogger(__name__)


def evaluate(settings: Settings, report: Report, *, argv: Sequence[str], dry_run: bool, as_json: bool) -> int:
    """Run one strategy on the prompts, record it, report it; return the exit code.

    Raises:
        UsageError: the log file or the store cannot be used.
    """
    config = settings.common
    check_log_file(config.log_file)
    tracker = None
    if not (config.no_mlflow or dry_run):
        tracker = Tracker(resolve_store(config.tracking_uri, Path.cwd()))
    job = Job.of(
        settings,
        run_uuid=uuid.uuid4().hex,
        provenance=collect_provenance(Path.cwd(), argv),
        dry_run=dry_run,
        verbose=report.verbose,
    )
    run = _Evaluation(job, report, tracker, as_json=as_json)
    return run.run()


class _Evaluation:
    def __init__(self, job: Job, report: Report, tracker: Tracker | None, *, as_json: bool) -> None:
        self.job = job
        self.report = report
        self.tracker = tracker
        self.as_json = as_json
        self.run_id: str | None = None

    def run(self) -> int:
        worker = Worker(self.job)
        if self.tracker is not None:
            # While the worker imports its libraries; both take seconds, and a mistake must not wait for MLflow.
            threading.Thread(target=preload, name="import-mlflow", daemon=True).start()
        ended = Launch(worker, self._on_event).run()
        self.report.end_progress()
        if ended.folder is None or ended.result is None:
            if ended.error is None:
                return 0
            if self.as_json:
                # Whoever reads JSON gets JSON, also where there is nothing else to tell.
                self.report.json(
                    {
                        "run_id": None,
                        "run_uuid": None,
                        "strategy": self.job.common.strategy,
                        "status": "FAILED",
                        "error": ended.error.message,
                    }
                )
            self.report.error(ended.error.message)
            return ended.error.exit_code
        folder, result = ended.folder, ended.result
        with one_signal_ignored(self.report.warn):
            try_pictures(folder, result, self.report.warn)
            delivered = self._deliver(folder)
        self._show(result, folder, delivered)
        if result.error is not None:
            self.report.error(result.error.message)
            return result.error.exit_code
        return 0 if delivered else exit_codes.NOT_DELIVERED

    def _on_event(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "phase" if event["name"] == "ready":
                self.report.end_progress()
            case "phase":
                self.report.phase(event["name"], event.get("total"))
            case "progress":
                self.report.progress(event["tokens"])
            case "passed":
                self.report.passed(event["name"], event["tokens"], event["tok_s"])
            case "warning":
                self.report.end_progress()
                self.report.warn(event["message"])
            case "planned":
                self._on_plan(event)

    def _on_plan(self, event: Mapping[str, Any]) -> None:
        self.report.end_progress()
        if self.job.dry_run and self.as_json:
            self.report.json({"plan": event["plan"], "warnings": event["warnings"]})
        else:
            self.report.plan(event["plan"], event["hardware"], to_stdout=self.job.dry_run)
        for warning in event["warnings"]:
            self.report.warn(warning)
        if self.job.common.allow_lossy and (words := unused_leave(event["plan"])):
            self.report.warn(words)
        if self.job.dry_run:
            return
        if self.tracker is not None:
            try:
                if reaped := self.tracker.reap():
                    self.report.say(f"{reaped} run(s) left by a dead process marked FAILED")
                self.run_id = self.tracker.open_run(RunResult.read(Path(event["folder"])))
            except DeliveryError as error:
                self.report.warn(f"{error}; measuring goes on, delivery is tried again at the end")

    def _deliver(self, folder: Path) -> bool:
        if self.tracker is None:
            return True
        try:
            self.run_id = self.tracker.deliver(folder, self.run_id)
        except (DeliveryError, OffloadError) as error:
            how = shlex.join(["harness", "sync", str(folder), *self._store_option()])
            self.report.error(f"{error}; the result is safe, deliver it with: {how}")
            return False
        return True

    def _show(self, result: RunResult, folder: Path, delivered: bool) -> None:
        if self.as_json:
            self.report.json(
                {
                    "run_id": self.run_id,
                    "run_uuid": result.run_uuid,
                    "strategy": result.strategy,
                    "status": result.status.value,
                    "delivered": delivered and self.tracker is not None,
                    "result_path": str(folder / "result.json"),
                    "params": {**result.params, "strategy": result.strategy},
                    "metrics": result.metrics,
                    "plan": result.plan,
                    "warnings": result.warnings,
                    "error": None if result.error is None else result.error.message,
                }
            )
        else:
            seen = None
            if self.tracker is not None and delivered:
                seen = f"MLflow  run {self.run_id}; see it with: {shlex.join(['harness', 'ui', *self._store_option()])}"
            elif self.tracker is None:
                seen = f"MLflow  not asked; deliver it later with: harness sync {os.path.relpath(folder)}"
            self.report.result(result, folder, seen)

    def _store_option(self) -> list[str]:
        """The option that names this run's store, where it must be named, without a password."""
        if not self.job.sources["tracking_uri"].startswith(("option", "file")):
            return []
        return ["--tracking-uri", without_credentials(str(self.job.common.tracking_uri))]


def draw_pictures(folder: Path, result: RunResult) -> None:
    """Draw the pictures that the folder lacks; where matplotlib is not installed, `harness sync` draws them later.

    Raises:
        UsageError: the folder cannot be written, or its timeline is damaged.
    """
    try:
        from harness.pictures import draw_memory, draw_plan, draw_token_latency
    except ImportError:
        log.info("matplotlib is not installed here: no pictures")
        return
    latency, memory, timeline = folder / "token_latency.png", folder / "memory.png", folder / "timeline.json"
    plan = folder / "plan_vs_measured.png"
    try:
        if result.repeats and not latency.exists():
            draw_token_latency(result, latency)
        if timeline.exists() and not memory.exists():
            draw_memory(Timeline.model_validate_json(timeline.read_bytes()), result, memory)
        if result.repeats and result.plan.get("predicted") and not plan.exists():
            draw_plan(result, plan)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UsageError(f"pictures of {folder} cannot be drawn: {reason}") from error


def try_pictures(folder: Path, result: RunResult, warn: Callable[[str], None]) -> None:
    """As `draw_pictures`; what goes wrong costs a warning, since the figures are in the record."""
    try:
        draw_pictures(folder, result)
    except UsageError as error:
        warn(str(error))


def check_log_file(path: Path) -> None:
    """Open the log file for appending.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(
            f"--log-file {path}: cannot be written ({error.strerror}); name another file"
        ) from error
