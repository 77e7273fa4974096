"""Everything a person reads in the terminal. The only file that prints.

Results go to standard output, progress and messages to standard error; where that is no terminal,
progress is plain lines.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from flexllmgen.units import gib
from harness.policy_words import batch_words, special_words
from harness.quality.words import losses
from harness.results import RunResult, RunStatus
from harness.words import counted

if TYPE_CHECKING:
    from harness.benchmark.table import Row as BenchmarkRow

# The rows of the result table: title, metric, how it reads.
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("generation throughput", "generation_tok_s", "tok/s"),
    ("  predicted", "predicted_tok_s", "tok/s"),
    ("  physical limit", "limit_tok_s", "tok/s"),
    ("prefill throughput", "prefill_tok_s", "tok/s"),
    ("decode throughput", "decode_tok_s", "tok/s"),
    ("time to first token (TTFT)", "ttft_s", "ms"),
    ("time per output token (TPOT)", "tpot_s", "ms"),
    ("inter-token latency p50", "itl_p50_s", "ms"),
    ("inter-token latency p99", "itl_p99_s", "ms"),
    ("end to end, all prompts", "e2e_s", "s"),
    ("perplexity", "perplexity", "number"),
    ("  lossless", "perplexity_lossless", "number"),
    ("tokens equal to lossless", "token_match_share", "share"),
    ("  before the first other one", "equal_prefix_tokens", "tokens"),
    ("load", "load_s", "s"),
    ("peak host memory (RSS)", "peak_rss_bytes", "bytes"),
    ("peak GPU memory allocated", "peak_device_allocated_bytes", "bytes"),
    ("peak GPU memory reserved", "peak_device_reserved_bytes", "bytes"),
    ("weights on the {device}", "weight_bytes_gpu", "bytes"),
    ("weights in host memory", "weight_bytes_cpu", "bytes"),
    ("weights on disk", "weight_bytes_disk", "bytes"),
    ("energy, timed passes", "energy_j", "J"),
)


# Without a GPU, the tier `gpu` of a plan is memory of the device that computes.
_DEVICE_NAMES = {"cuda": "GPU", "cpu": "compute device"}


_PIPED_WIDTH, _FILE_WIDTH = 1000, 120
_SAME = 0.01


def _before_loading(result: RunResult) -> float | None:
    """What the plan that was shown predicted, where a calibration found something else."""
    calibration = result.plan.get("calibration")
    before = calibration.get("predicted_before_tok_s") if isinstance(calibration, Mapping) else None
    now = result.metrics["predicted_tok_s"]
    return before if before and abs(now / before - 1) > _SAME else None


class _Out(Console):
    """Standard output. A reader that has gone is for the caller to know, not a reason to exit from here."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class _Err(Console):
    """Standard error. Nobody listening is no reason to stop measuring."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Report:
    """The terminal, as `-q` and `-v` want it."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        # Rows that go to a file or another program stay whole.
        width = None if sys.stdout.isatty() else _PIPED_WIDTH
        self.out = _Out(highlight=False, soft_wrap=width is not None, width=width)
        self.err = _Err(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def width(self) -> int:
        """Columns that a text on standard output may take: the terminal's; 120 in a file."""
        return self.out.width if sys.stdout.isatty() else _FILE_WIDTH

    def say(self, message: str) -> None:
        """A line of progress, unless quiet."""
        if not self.quiet:
            self.err.print(message, markup=False)

    def warn(self, message: str) -> None:
        """A warning, one line, also when quiet."""
        self.err.print(f"warning: {message}", style="yellow", markup=False)

    def error(self, message: str) -> None:
        """What went wrong and the way out, one line."""
        self.err.print(f"error: {' '.join(message.split())}", style="bold red", markup=False)

    def traceback(self) -> None:
        """The exception being handled, whole."""
        self.err.print(traceback.format_exc(), markup=False)

    def json(self, value: Mapping[str, Any]) -> None:
        """One JSON object on standard output."""
        # What the stream has no characters for would be escaped in another way than JSON's.
        plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=plain, allow_nan=False) + "\n")

    def text(self, text: str) -> None:
        """Plain text on standard output."""
        self.out.print(text, markup=False)

    def finding(self, level: str, check: str, found: str, way_out: str) -> None:
        """One line of `harness doctor`, and the way out below it."""
        style = {"ok": "green", "note": "yellow", "problem": "bold red"}[level]
        self.out.print(
            f"[{style}]{level:<8}[/{style}] {escape(check):<15} {escape(found)}",
            soft_wrap=True,
        )
        if way_out:
            self.out.print(f"{'':<8} {'':<15} -> {way_out}", markup=False, soft_wrap=True)

    def rows(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table on standard output; the first column never wraps."""
        table = Table(
            title=escape(title) or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for index, column in enumerate(columns):
            table.add_column(column, no_wrap=index == 0, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self._table(table)

    def figures(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of figures on standard output, under a title of its own and a blank line after it.

        The first column and those without a name hold words, which are flush left.
        """
        if title:
            self.text(title)
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for index, column in enumerate(columns):
            table.add_column(column, no_wrap=True, justify="right" if index and column else "left")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        self._table(table)
        self.text("")

    def plan(self, plan: Mapping[str, Any], hardware: str, *, to_stdout: bool) -> None:
        """What is going to happen, before a weight is loaded."""
        if self.quiet and not to_stdout:
            return
        device = _DEVICE_NAMES[plan["device"]]
        weights, kv = _tiers(plan["weight_bytes"], device), _tiers(plan["kv_bytes"], device)
        lines = [
            f"plan: {plan['strategy']}, {plan['model']}, {plan['dtype']} on {plan['device']} ({hardware})",
            f"  {counted(plan['num_sequences'], 'prompt')} x {plan['prompt_tokens']} tokens in batches of {batch_words(plan)}, "
            f"{plan['gen_tokens']} tokens each",
            f"  weights {weights}; KV cache {kv} a batch; workspace {gib(plan['workspace_bytes'])}",
        ]
        if special := ", ".join(special_words(plan.get("policy") or {})):
            lines.append(f"  {special}")
        if lossy := losses(plan):
            lines.append(f"  lossy: {lossy}")
        predicted, limit = plan.get("predicted"), plan.get("limit")
        if predicted and limit:
            lines.append(
                f"  predicted {predicted['generation_tok_s']:,.1f} tok/s; physical limit "
                f"{limit['generation_tok_s']:,.1f} tok/s (prefill bound by {limit['prefill_bound']}, "
                f"decode by {limit['decode_bound']})"
            )
        console = self.out if to_stdout else self.err
        for line in lines:
            console.print(line, markup=False)

    def phase(self, name: str, total: int | None) -> None:
        """A phase begins; one with a total shows a bar with tokens per second."""
        self.end_progress()
        if self.quiet:
            return
        if not self.err.is_terminal:
            if total is None:
                self.say(f"{name} ...")
            return
        columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")]
        # Four times a second: the drawing must not take the processor from what is measured.
        self._progress = Progress(
            *columns, TimeElapsedColumn(), console=self.err, transient=True, refresh_per_second=4
        )
        self._progress.start()
        self._task = self._progress.add_task(name, total=total, speed="")

    def progress(self, tokens: int) -> None:
        """Tokens made so far in the current phase."""
        if self._progress is not None and self._task is not None:
            task = self._progress.tasks[0]
            elapsed = task.elapsed or 0.0
            # Sooner it says when messages arrived, not how fast tokens were made.
            speed = f"{tokens / elapsed:.1f} tok/s" if elapsed > 0.5 else ""
            self._progress.update(self._task, completed=tokens, speed=speed)

    def part(self, name: str, done: int, total: int) -> None:
        """One of `total` parts begins, after `done` others: a bar, or a line where there is no terminal."""
        if self._progress is None:
            self.phase(name, total)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=name, completed=done, total=total)
        elif not self.err.is_terminal:
            self.say(f"{name} ...")

    def passed(self, name: str, tokens: int, tok_s: float) -> None:
        """A pass has ended."""
        self.end_progress()
        if self.verbose:
            # The log says so already.
            return
        self.say(f"{name}: {tokens} tokens, {tok_s:.2f} tok/s")

    def end_progress(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def result(self, result: RunResult, folder: Path, how_to_see: str | None) -> None:
        """The figures of a run, and where its record is."""
        if not result.repeats:
            self.out.print(f"{result.run_name}: {result.status.value}, nothing measured", markup=False)
            self._where(folder, how_to_see)
            return
        repeats = len(result.repeats)
        status = "" if result.status is RunStatus.FINISHED else f" ({result.status.value})"
        title = f"{result.run_name}: median of {repeats} repeat{'s' if repeats != 1 else ''}{status}"
        table = Table(
            title=escape(title),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 3, 0, 0),
        )
        table.add_column("metric")
        table.add_column("value", justify="right")
        table.add_column("spread", justify="right")
        for label, name, unit in _ROWS:
            value = result.metrics.get(name)
            if value is None or (value == 0 and name.startswith("weight_bytes")):
                continue
            spread = result.spread.get(name)
            label = label.format(device=_DEVICE_NAMES.get(str(result.params.get("device")), "GPU"))
            if name == "predicted_tok_s" and (shown := _before_loading(result)) is not None:
                label += f" ({_reading(shown, unit)} before loading)"
            table.add_row(label, _reading(value, unit), "" if spread is None else f"{spread:.1%}")
        self._table(table)
        self._where(folder, how_to_see)

    def benchmark_rows(self, title: str, rows: "Sequence[BenchmarkRow]") -> None:
        """The table that a benchmark ends with, folded to the terminal's width, and why cells failed."""
        from harness.benchmark.table_text import blocks_of, columns_of, failures, name_limit

        if title:
            self.out.print(title, style="bold", markup=False)
        for block in blocks_of(columns_of(rows), self.out.width):
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            # A long name wraps rather than push a column out of sight.
            table.add_column(block[0].title, overflow="fold", max_width=name_limit(self.out.width))
            for column in block[1:]:
                table.add_column(column.title, justify="right", no_wrap=True)
            for cells in zip(*(column.cells for column in block), strict=True):
                table.add_row(*(escape(cell) for cell in cells))
            self._table(table)
            self.text("")
        for name, why in failures(rows):
            self.out.print(f"failed  {name}: {why}", markup=False)

    def _table(self, table: Table) -> None:
        if self.out.is_terminal:
            self.out.print(table)
            return
        with self.out.capture() as capture:
            self.out.print(table)
        # Cells are padded to their column; in a file that is only blank space.
        self.out.print("\n".join(line.rstrip() for line in capture.get().splitlines()), markup=False)

    def _where(self, folder: Path, how_to_see: str | None) -> None:
        self.out.print(f"record  {_shown(folder)}", markup=False)
        if how_to_see:
            self.out.print(how_to_see, markup=False)


def _reading(value: float, unit: str) -> str:
    if unit == "ms":
        return f"{value * 1000:.1f} ms"
    if unit == "bytes":
        return gib(value)
    if unit == "number":
        return f"{value:#,.4g}".rstrip(".")
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:,.2f} {unit}"


def _tiers(sizes: Mapping[str, int], device: str) -> str:
    names = {"gpu": device, "cpu": "host", "disk": "disk"}
    return " + ".join(f"{gib(size)} {names[tier]}" for tier, size in sizes.items() if size) or "none"


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
