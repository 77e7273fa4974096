"""One run, inside the worker: load, warm up, measure, write the result folder.

Everything a user can get wrong is found before the folder is made (prepare.py); from then on, whatever
happens, the folder says so. Knows nothing of MLflow and prints nothing: it sends events (job.py).
"""

import logging
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexllmgen.errors import OffloadError, OutOfMemory
from harness import exit_codes
from harness.job import EventWriter, Job
from harness.measure import (
    Batch,
    BatchTimes,
    Pass,
    compare_with_plan,
    mean_itl_by_position,
    median_and_spread,
    metrics_of,
    run_pass,
)
from harness.prepare import Prepared, prepare
from harness.prompts import PromptSet
from harness.quality.phase import Quality
from harness.quality.words import loss_tags
from harness.results import (
    UNWRITABLE,
    Repeat,
    RunError,
    RunStatus,
    Timeline,
    unwritable,
)
from harness.run_folder import RunFolder, request_rows
from harness.run_settings import opening_result, policy_params
from profiling.contention import SHOWS_FROM_SHARE, Others, usable_cores
from profiling.sampler import Sampler, device_peaks, energy_joules, peak_rss_bytes
from strategies.base import CountsTraffic, Engine, Placed, Plan

log = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 0.1
# What the clock may make of a run at its limit.
_OVER_LIMIT = 0.02


def run_experiment(job: Job, events: EventWriter, wait_for_go: Callable[[], None]) -> int:
    """Run a job to its end and return the exit code.

    Args:
        wait_for_go: called between warm-up and the first timed pass; returns when the command is quiet.
    """
    config = job.common
    try:
        prepared = prepare(job, events)
    except OffloadError as error:
        events.send("error", message=str(error), exit_code=error.exit_code, type=type(error).__name__)
        log.error("%s", error)
        return error.exit_code
    if job.dry_run:
        _send_plan(events, prepared, folder=None)
        return 0
    folder = config.results_dir.absolute() / job.run_uuid
    run = _Run(job, prepared, folder, events)
    try:
        run.write_plan()
        _send_plan(events, prepared, folder=folder)
    except OSError as error:
        # Nothing is measured yet; half a folder is of use to nobody.
        shutil.rmtree(folder, ignore_errors=True)
        events.send("error", message=unwritable(folder, error), exit_code=2, type=UNWRITABLE)
        return 2
    return run.execute(wait_for_go)


def _send_plan(events: EventWriter, prepared: Prepared, *, folder: Path | None) -> None:
    events.send(
        "planned",
        plan=prepared.plan.as_dict(),
        folder=None if folder is None else str(folder),
        hardware=prepared.hardware.summary,
        warnings=prepared.warnings,
    )


class _Run:
    """The part of a run that leaves a folder behind."""

    def __init__(self, job: Job, prepared: Prepared, folder: Path, events: EventWriter) -> None:
        self.job = job
        self.prepared = prepared
        self.folder = RunFolder(folder, self._warn)
        self.events = events
        self.repeats: list[Repeat] = []
        self.passes: list[list[BatchTimes]] = []
        self.cold: dict[str, float] = {}
        self.once: dict[str, float] = {"plan_s": prepared.plan_s}
        self.output_ids: list[list[int]] = []
        self.warnings = list(prepared.warnings)
        self.placed: Placed | None = None
        self.plan = prepared.plan
        self.sampler: Sampler | None = None
        self.quality: Quality | None = None
        self.result = opening_result(job, prepared)

    def write_plan(self) -> None:
        """Make the folder, with all that is known before a weight is loaded."""
        self.folder.open(self.prepared.plan.as_dict(), self.prepared.profile.as_dict())
        self.result.write(self.folder.path)

    def execute(self, wait_for_go: Callable[[], None]) -> int:
        """Load, measure, write; returns the exit code."""
        status, error = RunStatus.FINISHED, None
        with Sampler() as sampler:
            self.sampler = sampler
            try:
                self._measure(sampler, wait_for_go)
            except (Exception, KeyboardInterrupt) as problem:  # noqa: BLE001 - the folder says what happened
                status, error = self._failure(problem)
        try:
            try:
                self._finish(sampler, status, error)
            except KeyboardInterrupt:
                # The first signal came this late; the worker ignores further ones, so this time it is written.
                self._finish(sampler, status, error)
        except OSError as problem:
            log.exception("the result cannot be written")
            error = RunError(type=UNWRITABLE, message=unwritable(self.folder.path, problem), exit_code=2)
        if error is not None:
            self.events.send("error", message=error.message, exit_code=error.exit_code, type=error.type)
            return error.exit_code
        self.events.send("done")
        return 0

    def _failure(self, problem: BaseException) -> tuple[RunStatus, RunError]:
        """How a run that was left by an exception ends."""
        if isinstance(problem, KeyboardInterrupt):
            kept = "; what was measured until then is kept" if self.repeats else ""
            error = RunError(
                type="Interrupted", message=f"interrupted{kept}", exit_code=exit_codes.INTERRUPTED
            )
            return RunStatus.KILLED, error
        message, exit_code = str(problem), 1
        if isinstance(problem, OffloadError):
            exit_code = problem.exit_code
        elif isinstance(problem, MemoryError):
            message = "host memory ran out; lower --batch-size or --cpu-mem"
            exit_code = OutOfMemory.exit_code
        else:
            log.error("the run failed", exc_info=problem)
            # torch reports a failed host allocation as a plain RuntimeError.
            exit_code = OutOfMemory.exit_code if "DefaultCPUAllocator" in message else 1
            message = f"{type(problem).__name__}: {(message.splitlines() or [''])[0]}"
        return RunStatus.FAILED, RunError(
            type=type(problem).__name__,
            message=message,
            traceback="".join(traceback.format_exception(problem)),
            exit_code=exit_code,
        )

    def _measure(self, sampler: Sampler, wait_for_go: Callable[[], None]) -> None:
        config = self.job.common
        self.events.send("phase", name="load")
        started = time.perf_counter()
        with ExitStack() as stack:
            # A phase left early is remembered too, so the picture shows where the run ended.
            with sampler.phase("load"):
                # What goes wrong later is for the strategy to see too: it knows what ran out.
                engine = stack.enter_context(self.prepared.strategy.build(self.prepared.plan))
            self.once["load_s"] = time.perf_counter() - started
            if isinstance(engine, CountsTraffic):
                sampler.watch(engine.moved_bytes)
            self._note_plan(engine.plan)
            self._note_placed(engine)
            batches = make_batches(self.prepared.prompts, self.plan.batch_size)
            for index in range(config.warmup):
                measured = Pass()
                with sampler.phase("warm-up"):
                    self._pass(f"warm-up {index + 1}/{config.warmup}", engine, batches[:1], measured)
                if index == 0:
                    self.cold = metrics_of(measured.batches)
            self.events.send("phase", name="ready")
            wait_for_go()
            energy_before, others = energy_joules(), Others()
            for index in range(config.repeats):
                with sampler.phase(f"repeat {index + 1}"):
                    self._repeat(index, engine, batches)
            energy_after = energy_joules()
            self._note_others(others.cores())
            self._note_limit()
            if energy_before is not None and energy_after is not None:
                self.once["energy_j"] = energy_after - energy_before
                tokens = config.repeats * config.num_prompts * config.gen_len
                self.once["energy_j_per_token"] = self.once["energy_j"] / tokens
            self.once.update(device_peaks())
            self._note_placed(engine)
            if not self.plan.lossless:
                # From here on nothing counts as the run's any more: not its memory, not what it moves.
                self.once["peak_rss_bytes"] = float(peak_rss_bytes())
                self.quality = Quality(self.job, self.plan, self.prepared.prompts, self.prepared.tokenizer)
                self.events.send("phase", name="quality: perplexity")
                with sampler.phase("quality"):
                    self.quality.score(engine)
        if self.quality is not None:
            self.events.send("phase", name="quality: tokens and perplexity of the lossless model")
            with sampler.phase("reference"):
                self.quality.compare(self.output_ids)
            for note in self.quality.notes:
                self._warn(note)

    def _note_others(self, cores: float) -> None:
        """Keep what other processes used during the timed passes, and tell of it where it is much."""
        total = len(usable_cores())
        self.once["others_cores"], self.once["others_share"] = cores, cores / total
        if cores >= SHOWS_FROM_SHARE * total:
            self._warn(
                f"other processes kept {cores:.1f} of the {total} cores busy during the timed passes; where the CPU "
                "computes, the figures are lower for it: measure again when the machine is idle"
            )

    def _note_limit(self) -> None:
        """Tell of a limit that was surpassed: what it rests on does not hold."""
        metrics = self._figures()["metrics"]
        if metrics.get("attainment", 0.0) > 1 + _OVER_LIMIT:
            self._warn(
                f"{metrics['generation_tok_s']:,.4g} tok/s were measured where the physical limit is "
                f"{metrics['limit_tok_s']:,.4g}: the machine was slower when its profile was taken (`harness profile "
                "--refresh` takes it anew), or its caches hold the model"
            )

    def _repeat(self, index: int, engine: Engine, batches: Sequence[Batch]) -> None:
        measured = Pass()
        try:
            self._pass(f"repeat {index + 1}/{self.job.common.repeats}", engine, batches, measured)
        except BaseException:
            # Better some batches than nothing; but a part of a pass is no repeat beside whole ones.
            if not self.repeats and measured.batches:
                self._keep(index, measured)
            raise
        if self.output_ids and measured.output_ids != self.output_ids:
            self._warn(
                f"repeat {index + 1} generated other tokens than the first: this setup is not deterministic"
            )
        self._keep(index, measured)

    def _keep(self, index: int, measured: Pass) -> None:
        self.repeats.append(
            Repeat(index=index, ended_at_ms=int(time.time() * 1000), metrics=metrics_of(measured.batches))
        )
        self.passes.append(measured.batches)
        self.output_ids = self.output_ids or measured.output_ids
        # Whoever kills this process cannot be caught; what is on the disk by then is what remains.
        with self.folder.unless_full("result.json"):
            self.result.model_copy(update=self._figures()).write(self.folder.path)

    def _pass(self, name: str, engine: Engine, batches: Sequence[Batch], measured: Pass) -> None:
        gen_len = self.job.common.gen_len
        total = sum(batch.size for batch in batches) * gen_len
        self.events.send("phase", name=name, total=total)
        state = {"tokens": 0, "sent_s": time.perf_counter()}

        def on_column(tokens: int) -> None:
            state["tokens"] += tokens
            now = time.perf_counter()
            if now - state["sent_s"] >= _PROGRESS_INTERVAL_S:
                state["sent_s"] = now
                self.events.send("progress", tokens=state["tokens"], memory=self._memory())

        run_pass(engine, batches, gen_len, into=measured, on_column=on_column)
        speed = metrics_of(measured.batches)["generation_tok_s"]
        self.events.send("passed", name=name, tokens=total, tok_s=speed)
        log.info("%s: %.2f tok/s", name, speed)

    def _memory(self) -> dict[str, float]:
        """Bytes held now by tier, as sampled last; what cannot be known is left out."""
        latest = self.sampler.latest() if self.sampler is not None else {}
        gpus = [
            size
            for name, size in latest.items()
            if name.startswith("gpu_") and name.endswith("_memory_bytes")
        ]
        held = {"gpu": sum(gpus)} if gpus else {}
        return {**held, "cpu": latest["rss_bytes"]} if "rss_bytes" in latest else held

    def _note_plan(self, plan: Plan) -> None:
        """Take over the plan that the engine really runs."""
        for warning in plan.warnings:
            self._warn(warning)
        self.plan = plan
        self.result = self.result.model_copy(
            update={
                "plan": plan.as_dict(),
                # Only now: what is recorded as a parameter cannot be changed.
                "params": {**self.result.params, **policy_params(plan)},
                "param_sources": {
                    **self.result.param_sources,
                    **({} if plan.lossless else {"lossy": "the plan"}),
                },
                "tags": {**self.result.tags, **loss_tags(plan.as_dict())},
                "warnings": self.warnings,
            }
        )

    def _warn(self, message: str) -> None:
        """Tell of something, once."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.events.send("warning", message=message)

    def _note_placed(self, engine: Engine) -> None:
        self.placed = placed = engine.placed()
        self.once["pinned_bytes"] = float(placed.pinned_bytes)
        self.once["offload_disk_bytes"] = float(placed.offload_files_bytes)
        self.once.update({name: float(count) for name, count in placed.counters.items()})
        for tier, num_bytes in placed.weight_bytes.items():
            self.once[f"weight_bytes_{tier}"] = float(num_bytes)

    def _finish(self, sampler: Sampler, status: RunStatus, error: RunError | None) -> None:
        plan = {**self.result.plan, **self._read_back()}
        prepared = self.prepared
        self.folder.end(
            plan,
            Timeline.model_validate(asdict(sampler.samples())),
            request_rows(prepared.prompts, self.output_ids, prepared.tokenizer),
            error.traceback if error is not None else None,
        )
        # Last, since it says that the run has ended.
        result = self.result.model_copy(
            update={
                "status": status,
                "ended_at_ms": int(time.time() * 1000),
                **self._figures(),
                "plan": plan,
                "warnings": self.warnings,
                "error": error,
            }
        )
        result.write(self.folder.path)

    def _figures(self) -> dict[str, Any]:
        """The fields of the result that hold what was measured so far."""
        metrics = dict(self.once)
        spread: dict[str, float] = {}
        if self.repeats:
            medians, spread = median_and_spread([repeat.metrics for repeat in self.repeats])
            metrics.update(medians)
            metrics["repeats"] = float(len(self.repeats))
        metrics.setdefault("peak_rss_bytes", float(peak_rss_bytes()))
        if self.quality is not None:
            metrics.update(self.quality.metrics)
        metrics.update(compare_with_plan(self.plan, metrics.get("generation_tok_s")))
        return {
            "metrics": metrics,
            "spread": spread,
            "repeats": self.repeats,
            "cold": self.cold,
            "quality": None if self.quality is None else self.quality.record,
            "itl_s": [mean_itl_by_position(batches) for batches in self.passes],
        }

    def _read_back(self) -> dict[str, Any]:
        if self.placed is None:
            return {}
        return {
            "placed_weight_bytes": dict(self.placed.weight_bytes),
            "placed_offload_files_bytes": self.placed.offload_files_bytes,
            "placed_pinned_bytes": self.placed.pinned_bytes,
            **self.placed.details,
        }


def make_batches(prompts: PromptSet, batch_size: int) -> list[Batch]:
    """Cut the rows into batches of `batch_size`; the last may be smaller."""
    total = len(prompts.prompts)
    batches = []
    for start in range(0, total, batch_size):
        ids_BT, mask_BT = prompts.batch(start, min(start + batch_size, total))
        batches.append(Batch(ids_BT=ids_BT, mask_BT=mask_BT))
    return batches
