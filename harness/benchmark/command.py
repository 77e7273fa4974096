"""`harness benchmark` from what was asked to the exit code: start or resume, run, close, show, deliver."""

import os
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllmgen.errors import OffloadError, UsageError
from harness.benchmark.ending import close, exit_code, unequal, write_reports
from harness.benchmark.grid import Asked, Grid, make_grid
from harness.benchmark.live import LiveGrid
from harness.benchmark.names import short_model
from harness.benchmark.record import Benchmark, CellStatus, read_cells
from harness.benchmark.resume import find_benchmark, take_over
from harness.benchmark.runner import Runner, adopt, merge_cell
from harness.benchmark.table import as_json, rows_of
from harness.config import EvalConfig, resolve
from harness.evaluation import check_log_file
from harness.launch import one_signal_ignored
from harness.provenance import collect_provenance, process_identity, without_credentials
from harness.report import Report
from harness.results import Provenance, RunStatus
from harness.store import DeliveryError, resolve_store
from harness.tracking import Tracker
from harness.words import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How the benchmark is run and shown, beside its grid."""

    launches: int | None = None
    cell_timeout_s: float | None = None
    fail_on: str | None = None
    as_json: bool = False


def start(asked: Asked, wanted: Wanted, report: Report, *, argv: Sequence[str]) -> int:
    """Run a new benchmark; return the exit code.

    Raises:
        UsageError: something in the grid is wrong, or a folder or the store cannot be used.
    """
    grid = make_grid(asked, os.environ)
    benchmark = new_benchmark(grid, wanted, argv=argv)
    folder = grid.common.results_dir.absolute() / benchmark.benchmark_uuid
    return _Session(folder, benchmark, grid.common, wanted, report).run()


def show_cells(asked: Asked, wanted: Wanted, report: Report, *, argv: Sequence[str]) -> int:
    """List the cells and what their plans say, measuring nothing; return the exit code.

    Raises:
        UsageError: something in the grid is wrong.
    """
    from harness.benchmark.dry_run import dry_run

    grid = make_grid(asked, os.environ)
    check_log_file(grid.common.log_file)
    return dry_run(grid, new_benchmark(grid, wanted, argv=argv), report, as_json=wanted.as_json)


def new_benchmark(grid: Grid, wanted: Wanted, *, argv: Sequence[str]) -> Benchmark:
    """The record of a benchmark before its first launch; this process is its owner."""
    common, suite = grid.common, grid.suite
    models = list(dict.fromkeys(short_model(str(cell.common["model"])) for cell in grid.cells))
    strategies = list(dict.fromkeys(str(cell.common["strategy"]) for cell in grid.cells))
    return Benchmark(
        benchmark_uuid=uuid.uuid4().hex,
        name=common.run_name
        or (f"{suite.name}: " if suite else "") + f"{' / '.join(strategies)} on {', '.join(models)}",
        suite=suite.name if suite else None,
        experiment=common.experiment,
        status=RunStatus.RUNNING,
        started_at_ms=int(time.time() * 1000),
        launches=wanted.launches or (suite.launches if suite else None) or 1,
        cell_timeout_s=wanted.cell_timeout_s or (suite.cell_timeout_s if suite else None),
        baseline=grid.baseline,
        # What is written down may travel; a password may not.
        cells=[
            cell.model_copy(
                update={
                    "common": {
                        **cell.common,
                        "tracking_uri": without_credentials(cell.common["tracking_uri"] or "") or None,
                    }
                }
            )
            for cell in grid.cells
        ],
        process=process_identity(),
        provenance=collect_provenance(Path.cwd(), argv),
        tags=dict(
            pair
            for pair in common.tags().items()
            if all(pair in EvalConfig.model_validate(cell.common).tags().items() for cell in grid.cells)
        ),
    )


def resume(
    which: str,
    options: Mapping[str, Any],
    wanted: Wanted,
    report: Report,
    *,
    argv: Sequence[str],
    given: Sequence[str] = (),
) -> int:
    """Run what is missing of a benchmark; return the exit code.

    Args:
        which: its uuid or the beginning of it, its folder, or @latest.
        options: where results, the log and the store are, as the command line has them.
        given: options named on the command line that the grid has already.

    Raises:
        UsageError: there is none such, it is still running, or an option would change its grid.
    """
    if given:
        raise UsageError(
            f"--resume takes the grid from benchmark.json; leave out {', '.join(given)}, or start a new benchmark"
        )
    now = resolve(options, config_file=None, assignments=[], environ=os.environ)
    common, sources = now.common, now.sources
    folder = find_benchmark(which, common.results_dir, report)
    benchmark, provenance = take_over(folder, report, argv)
    if wanted.launches not in (None, benchmark.launches):
        raise UsageError(
            f"--launches {wanted.launches}: this benchmark has {benchmark.launches}; leave it out, or start a new one"
        )
    ended_at_ms = benchmark.ended_at_ms
    update: dict[str, Any] = {"process": process_identity(), "status": RunStatus.RUNNING, "ended_at_ms": None}
    if wanted.cell_timeout_s is not None:
        update["cell_timeout_s"] = wanted.cell_timeout_s
    benchmark, unread = adopt(folder, benchmark.model_copy(update=update))
    for reason in unread:
        report.warn(f"measured again: {reason}")
    if not any(cell.status is CellStatus.PENDING for cell in benchmark.cells):
        # Nothing is measured any more: it has taken as long as it took.
        benchmark = benchmark.model_copy(update={"ended_at_ms": ended_at_ms})
    for cell in benchmark.cells:
        merge_cell(folder, benchmark, cell)
    recorded = EvalConfig.model_validate(benchmark.cells[0].common)
    told = {
        name: getattr(common, name)
        for name in ("tracking_uri", "no_mlflow", "log_file")
        if sources[name] != "default"
    }
    recorded = recorded.model_copy(update=told)
    return _Session(folder, benchmark, recorded, wanted, report, provenance).run()


class _Session:
    """One go at a benchmark, from its record to its exit code."""

    def __init__(
        self,
        folder: Path,
        benchmark: Benchmark,
        common: EvalConfig,
        wanted: Wanted,
        report: Report,
        provenance: Provenance | None = None,
    ) -> None:
        self.folder = folder
        self.benchmark = benchmark
        self.common = common
        self.wanted = wanted
        self.report = report
        self.provenance = provenance
        self.run_id: str | None = None
        self.tracker: Tracker | None = None

    def run(self) -> int:
        check_log_file(self.common.log_file)
        if not self.common.no_mlflow:
            self.tracker = Tracker(resolve_store(self.common.tracking_uri, Path.cwd()))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.benchmark.write(self.folder)
            return self._run()
        except OSError as error:
            raise UsageError(
                f"{self.folder} cannot be written ({error.strerror or error}); what was measured is kept: make room, then "
                f"harness benchmark --resume {shlex.quote(str(self.folder))}"
            ) from error

    def _run(self) -> int:
        todo = sum(cell.status is CellStatus.PENDING for cell in self.benchmark.cells)
        self.report.say(
            f"{self.benchmark.name}: {todo} of {counted(len(self.benchmark.cells), 'cell')} to run, record {_shown(self.folder)}"
        )
        self._open()
        live = LiveGrid(self.report, self.benchmark)
        runner = Runner(
            self.folder, self.benchmark, live, provenance=self.provenance, verbose=self.report.verbose
        )
        runner.run()
        # Who has interrupted already may end this too; what was measured is written down.
        patient = nullcontext() if runner.interrupted else one_signal_ignored(self.report.warn)
        with patient:
            self.benchmark, warnings = close(self.folder, runner.benchmark)
            for warning in [*warnings, *write_reports(self.folder)]:
                self.report.warn(warning)
            delivered = self._deliver()
        self._show(delivered)
        return exit_code(self.benchmark, delivered=delivered, fail_on=self.wanted.fail_on)

    def _open(self) -> None:
        if self.tracker is None:
            return
        try:
            self.tracker.reap()
            self.run_id = self.tracker.open_benchmark(self.folder)
        except DeliveryError as error:
            self.report.warn(f"{error}; measuring goes on, delivery is tried again at the end")

    def _deliver(self) -> bool:
        if self.tracker is None:
            return True
        try:
            self.run_id = self.tracker.deliver_benchmark(self.folder, self.run_id)
        except (DeliveryError, OffloadError) as error:
            how = shlex.join(["harness", "sync", str(self.folder), *self._store_option()])
            self.report.error(f"{error}; the results are safe, deliver them with: {how}")
            return False
        return True

    def _show(self, delivered: bool) -> None:
        rows = rows_of(self.benchmark, read_cells(self.folder, self.benchmark))
        if self.wanted.as_json:
            self.report.json(
                {
                    "run_id": self.run_id,
                    "benchmark_uuid": self.benchmark.benchmark_uuid,
                    "name": self.benchmark.name,
                    "status": self.benchmark.status.value,
                    "delivered": delivered and self.tracker is not None,
                    "folder": str(self.folder),
                    "baseline": self.benchmark.baseline,
                    "launches": self.benchmark.launches,
                    **as_json(rows),
                }
            )
        else:
            self.report.benchmark_rows(self.benchmark.name, rows)
            self.report.text(f"record  {_shown(self.folder)} (open its report.html)")
            if self.tracker is not None and delivered:
                how = shlex.join(["harness", "ui", *self._store_option()])
                self.report.text(f"MLflow  run {self.run_id}; see it with: {how}")
            elif self.tracker is None:
                self.report.text(
                    f"MLflow  not asked; deliver it later with: harness sync {_shown(self.folder)}"
                )
        self._judge()

    def _judge(self) -> None:
        """What keeps the exit code from being 0, each in a line."""
        failed = [cell.name for cell in self.benchmark.cells if cell.status is CellStatus.FAILED]
        if failed:
            self.report.error(
                f"{len(failed)} of {counted(len(self.benchmark.cells), 'cell')} failed: {', '.join(failed)}"
            )
        if self.wanted.fail_on == "parity":
            for name, reason in unequal(self.benchmark).items():
                self.report.error(f"parity: {name}: {reason}")
        if self.benchmark.status is RunStatus.KILLED:
            self.report.error(
                "interrupted; run what is missing with: "
                + shlex.join(["harness", "benchmark", "--resume", _shown(self.folder)])
            )

    def _store_option(self) -> list[str]:
        """The option that names the store, where it must be named, without a password."""
        sources: Mapping[str, str] = self.benchmark.cells[0].sources
        if not sources.get("tracking_uri", "").startswith(("option", "file")):
            return []
        return ["--tracking-uri", without_credentials(str(self.common.tracking_uri))]


def _shown(path: Path) -> str:
    try:
        return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    except ValueError:
        return str(path)
