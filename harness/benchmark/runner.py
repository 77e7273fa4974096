"""Runs the cells of a benchmark, each launch in a process of its own, and writes down how far it came after each.

Launches are interleaved: launch 1 of every cell, then launch 2, so that a machine that drifts drifts for all alike. Knows
nothing of MLflow or of how a benchmark ends (ending.py).
"""

import resource
import shlex
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from flexllmgen.errors import OffloadError, UsageError
from harness.benchmark.live import LiveGrid
from harness.benchmark.merge import explain, launch_folder, merge, shown_launch, write_cell
from harness.benchmark.record import Benchmark, Cell, CellStatus, cell_folder
from harness.config import EvalConfig
from harness.job import Job
from harness.launch import Ended, Launch
from harness.results import UNWRITABLE, Provenance, RunError, RunResult, RunStatus
from harness.supervise import Worker


class Runner:
    """The loop over launches and cells.

    Args:
        folder: the benchmark's; its benchmark.json is kept up to date.
        provenance: of the code that runs now, where that may differ from what the benchmark was started with.
        worker_type: what starts a process for a Job.
    """

    def __init__(
        self,
        folder: Path,
        benchmark: Benchmark,
        live: LiveGrid,
        *,
        provenance: Provenance | None = None,
        verbose: bool = False,
        worker_type: Callable[[Job], Worker] = Worker,
    ) -> None:
        self.folder = folder
        self.benchmark = benchmark
        self.live = live
        self.provenance = provenance or benchmark.provenance
        self.verbose = verbose
        self.interrupted = False
        self._worker_type = worker_type
        self._worker: Worker | None = None
        self._hardware = ""
        self._memory: dict[str, int] = {}

    def run(self) -> Benchmark:
        """Run what is missing and return the benchmark as it then stands, still RUNNING unless it was interrupted.

        After a first SIGINT or SIGTERM the process that runs writes what it has and no other is started; after a second
        it is killed.

        Raises:
            OSError: benchmark.json or a cell's result cannot be written.
            UsageError: a launch's result cannot be written.
            KeyboardInterrupt: a second interruption while no process ran.
        """
        with self._signals(), self.live:
            while not self.interrupted and (following := next_launch(self.benchmark)) is not None:
                self._launch(*following)
        return self.benchmark

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Between processes a first signal is remembered, a second interrupts; a Worker has its own way with them."""

        def on_signal(_signum: int, _frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _launch(self, number: int, cell: Cell) -> None:
        run_uuid = uuid.uuid4().hex
        self.live.begin(cell.name, number)
        self._memory = {}
        peak_before = _peak_of_children_bytes()
        try:
            ended = self._run_worker(cell, number, run_uuid)
        except (OSError, OffloadError) as error:
            # No process to be had, or a result that it could not write whole.
            failure = RunError(
                type=type(error).__name__,
                message=f"the cell's process left no result: {error}",
                exit_code=getattr(error, "exit_code", 1),
            )
            ended = Ended(code=1, folder=None, result=None, error=failure, interrupted=False)
        peak = _peak_of_children_bytes()
        if peak > peak_before:
            # Only a process larger than all before it can be told from them.
            self._memory["cpu"] = peak
        self._take_up(cell, run_uuid, ended)

    def _run_worker(self, cell: Cell, number: int, run_uuid: str) -> Ended:
        job = job_of(self.folder, self.benchmark, cell, number, run_uuid, verbose=self.verbose)
        job = job.model_copy(update={"provenance": self.provenance})
        self._worker = self._worker_type(job)

        def on_event(event: Mapping[str, Any]) -> None:
            if self.interrupted and self._worker is not None and not self._worker.interrupted:
                # The signal came before the worker listened for it.
                self._worker.interrupt()
            if event["event"] == "planned":
                self._hardware = event["hardware"]
            for tier, size in (event.get("memory") or {}).items():
                self._memory[tier] = max(int(size), self._memory.get(tier, 0))
            self.live.event(cell.name, event)

        try:
            return Launch(self._worker, on_event, timeout_s=self.benchmark.cell_timeout_s).run()
        finally:
            self._worker = None

    def _take_up(self, cell: Cell, run_uuid: str, ended: Ended) -> None:
        """Write down what a launch came to."""
        if ended.error is not None and ended.error.type == UNWRITABLE:
            # The fault is not the cell's: it stays pending, and the next would fare no better.
            raise UsageError(
                f"{ended.error.message.partition('; ')[0]}; what was measured is kept: make room, then "
                f"harness benchmark --resume {shlex.quote(str(self.folder))}"
            )
        finished = ended.error is None and ended.result is not None
        stopped = ended.interrupted or (ended.error is not None and self.interrupted)
        self.interrupted |= ended.interrupted
        changes: dict[str, Any] = {}
        if finished:
            launches = [*cell.launches, run_uuid]
            done = len(launches) >= self.benchmark.launches
            changes = {
                "launches": launches,
                "status": CellStatus.FINISHED if done else CellStatus.PENDING,
            }
        elif not stopped:
            error = ended.error or RunError(type="NoResult", message="the cell's process left no result")
            changes = {
                "status": CellStatus.FAILED,
                "error": explain(error, ended.result, self._memory),
                "launches": [*cell.launches, run_uuid] if ended.result else cell.launches,
            }
        cell = cell.model_copy(update=changes)
        updates: dict[str, Any] = {
            "cells": [cell if one.name == cell.name else one for one in self.benchmark.cells],
            "hardware_summary": self._hardware or self.benchmark.hardware_summary,
        }
        if ended.result is not None:
            updates["hardware_fingerprint"] = ended.result.hardware_fingerprint
        if self.interrupted:
            updates["status"] = RunStatus.KILLED
        self.benchmark = self.benchmark.model_copy(update=updates)
        partial = [run_uuid] if stopped and not finished and ended.result is not None else []
        self.benchmark.write(self.folder)
        result = merge_cell(self.folder, self.benchmark, cell, also=partial)
        self.live.end(cell, result)


def next_launch(benchmark: Benchmark) -> tuple[int, Cell] | None:
    """The launch that comes next, as its number from 0 and its cell: the first cell with the fewest; None when done."""
    waiting = [cell for cell in benchmark.cells if cell.status is CellStatus.PENDING]
    cell = min(waiting, key=lambda one: len(one.launches), default=None)
    return None if cell is None else (len(cell.launches), cell)


def job_of(
    folder: Path,
    benchmark: Benchmark,
    cell: Cell,
    number: int,
    run_uuid: str,
    *,
    verbose: bool,
    dry_run: bool = False,
) -> Job:
    """What the process of a launch is told."""
    common = {**cell.common, "run_name": f"{cell.name} launch {number + 1}"}
    if not dry_run:
        common["results_dir"] = str(launch_folder(folder, cell.name, run_uuid).parent)
    return Job(
        run_uuid=run_uuid,
        common=EvalConfig.model_validate(common),
        strategy_config=cell.strategy_config,
        sources=cell.sources,
        provenance=benchmark.provenance,
        process=benchmark.process,
        dry_run=dry_run,
        verbose=verbose,
    )


def merge_cell(
    folder: Path, benchmark: Benchmark, cell: Cell, *, also: list[str] | None = None
) -> RunResult | None:
    """Write the cell's result from its launches and return it; None where none has a result.

    Args:
        also: launches that do not count, because they were cut short, and are shown all the same.
    """
    folders = [launch_folder(folder, cell.name, name) for name in [*cell.launches, *(also or [])]]
    there = [(one, RunResult.read(one)) for one in folders if (one / "result.json").exists()]
    if not there:
        return None
    launches = [one for _, one in there]
    result = merge(benchmark, cell, launches)
    shown = shown_launch(launches)
    write_cell(folder, result, next(path for path, one in there if one is shown))
    return result


def adopt(folder: Path, benchmark: Benchmark) -> tuple[Benchmark, list[str]]:
    """The benchmark with those launches counted that had finished when the process that ran it was killed.

    A launch whose result cannot be read does not count; why it cannot is the second value, a line each.
    """
    cells = []
    unread = []
    for cell in benchmark.cells:
        missing = benchmark.launches - len(cell.launches)
        found = []
        for path in sorted((cell_folder(folder, cell.name) / "launches").glob("*/result.json")):
            if cell.status is CellStatus.PENDING and path.parent.name not in cell.launches:
                try:
                    result = RunResult.read(path.parent)
                except UsageError as error:
                    unread.append(str(error))
                    continue
                if result.status is RunStatus.FINISHED:
                    found.append((result.started_at_ms, path.parent.name))
        launches = [*cell.launches, *(name for _, name in sorted(found)[:missing])]
        done = cell.status is CellStatus.PENDING and len(launches) >= benchmark.launches
        status = CellStatus.FINISHED if done else cell.status
        cells.append(cell.model_copy(update={"launches": launches, "status": status}))
    return benchmark.model_copy(update={"cells": cells}), unread


def _peak_of_children_bytes() -> int:
    """The largest resident set of any process this one has waited for."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak if sys.platform == "darwin" else peak * 1024
