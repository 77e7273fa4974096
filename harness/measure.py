"""Holds the clock: times token columns as they arrive, and turns the times into metrics.

    request in          first column          second            last
        |------ TTFT ------|------- ITL -------|----- ... ---------|
        |---------------------------- e2e -------------------------|

Definitions are those of docs/metrics.md. Engines know nothing of this file.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from strategies.base import Engine, Plan

if TYPE_CHECKING:
    import torch

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows that go to the engine in one call: ids and mask of shape (B, T), and how many ids are real."""

    ids_BT: "torch.Tensor"
    mask_BT: "torch.Tensor"

    @property
    def size(self) -> int:
        """Sequences in the batch."""
        return int(self.ids_BT.shape[0])

    @property
    def real_tokens(self) -> int:
        """Input tokens that are not padding."""
        return int(self.mask_BT.sum())

    @property
    def padded_tokens(self) -> int:
        """Input tokens that are padding."""
        return int(self.mask_BT.numel()) - self.real_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """When one batch began and when each of its columns was on the host; clock seconds."""

    sequences: int
    real_tokens: int
    padded_tokens: int
    started_s: float
    arrived_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """Request in until the first token column; every row of the batch shares it."""
        return self.arrived_s[0] - self.started_s

    @property
    def e2e_s(self) -> float:
        """Request in until the last token column."""
        return self.arrived_s[-1] - self.started_s

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive columns."""
        return [later - earlier for earlier, later in zip(self.arrived_s, self.arrived_s[1:], strict=False)]


@dataclass(slots=True)
class Pass:
    """One run through the batches: times, and the generated ids of each row; grows batch by batch."""

    batches: list[BatchTimes] = field(default_factory=list)
    output_ids: list[list[int]] = field(default_factory=list)

    def add(
        self, batch: Batch, started_s: float, arrived_s: Sequence[float], columns: "Sequence[torch.Tensor]"
    ) -> None:
        """Take up a batch as far as it came."""
        self.batches.append(
            BatchTimes(
                sequences=batch.size,
                real_tokens=batch.real_tokens,
                padded_tokens=batch.padded_tokens,
                started_s=started_s,
                arrived_s=tuple(arrived_s),
            )
        )
        self.output_ids.extend(
            list(row) for row in zip(*(column.tolist() for column in columns), strict=True)
        )


def run_pass(
    engine: Engine,
    batches: Sequence[Batch],
    gen_tokens: int,
    *,
    into: Pass | None = None,
    on_column: Callable[[int], None] | None = None,
    clock: Clock = time.perf_counter,
) -> Pass:
    """Send every batch through the engine, timing each column.

    Args:
        into: filled as batches end; what was measured stays there when the pass is cut short.
        on_column: told how many tokens each column held, after its time was taken (for progress).

    Raises:
        RuntimeError: the engine yielded another number of columns than asked for.
    """
    measured = Pass() if into is None else into
    for batch in batches:
        columns: list[torch.Tensor] = []
        arrived: list[float] = []
        started = clock()
        try:
            for column_B in engine.generate(batch.ids_BT, batch.mask_BT, gen_tokens):
                arrived.append(clock())
                columns.append(column_B)
                if on_column is not None:
                    on_column(batch.size)
        except BaseException:
            if arrived:
                measured.add(batch, started, arrived, columns)
            raise
        if len(columns) != gen_tokens:
            raise RuntimeError(
                f"the engine yielded {len(columns)} token columns, {gen_tokens} were asked for"
            )
        measured.add(batch, started, arrived, columns)
    return measured


def metrics_of(batches: Sequence[BatchTimes]) -> dict[str, float]:
    """The metrics of one pass; see docs/metrics.md for each definition.

    Prefill time is the sum of the batches' TTFT, decode time the sum of what follows. Throughputs count
    tokens really processed: `prefill_tok_s` real input tokens, `decode_tok_s` tokens after the first,
    `generation_tok_s` all generated tokens over prefill plus decode time (FlexGen's definition).
    """
    prefill = sum(batch.ttft_s for batch in batches)
    decode = sum(batch.e2e_s - batch.ttft_s for batch in batches)
    real = sum(batch.real_tokens for batch in batches)
    padded = sum(batch.padded_tokens for batch in batches)
    output = sum(batch.sequences * len(batch.arrived_s) for batch in batches)
    gaps = sorted(gap for batch in batches for gap in batch.itl_s)
    metrics = {
        "ttft_s": statistics.median(batch.ttft_s for batch in batches),
        "e2e_s": prefill + decode,
        "prefill_s": prefill,
        "decode_s": decode,
        "prefill_tok_s": real / prefill,
        "prefill_padded_tok_s": (real + padded) / prefill,
        "generation_tok_s": output / (prefill + decode),
        "input_tokens": float(real),
        "input_tokens_padded": float(padded),
        "output_tokens": float(output),
    }
    if gaps:
        steps = [(batch.e2e_s - batch.ttft_s) / len(batch.itl_s) for batch in batches if batch.itl_s]
        metrics["tpot_s"] = statistics.median(steps)
        metrics["decode_tok_s"] = (output - sum(batch.sequences for batch in batches)) / decode
        for percent in (50, 90, 95, 99):
            metrics[f"itl_p{percent}_s"] = percentile(gaps, percent)
    return metrics


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of sorted values, linear between neighbours (Hyndman and Fan 1996, definition 7).

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    """
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def mean_itl_by_position(batches: Sequence[BatchTimes]) -> list[float]:
    """Mean gap before each token after the first, over the batches of a pass."""
    return [statistics.fmean(gaps) for gaps in zip(*(batch.itl_s for batch in batches), strict=False)]


def median_and_spread(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Per metric the median over repeats or launches, those that have it, and its spread where that means something."""
    medians: dict[str, float] = {}
    spreads: dict[str, float] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        medians[name] = statistics.median(values)
        spread = relative_spread(values)
        if spread is not None and not name.startswith(("input_tokens", "output_tokens")):
            spreads[name] = spread
    return medians, spreads


def relative_spread(values: Sequence[float]) -> float | None:
    """(max - min) / median; None of a single value or about zero.

    >>> relative_spread([9.0, 10.0, 11.0])
    0.2
    """
    middle = statistics.median(values) if values else 0.0
    return (max(values) - min(values)) / middle if len(values) > 1 and middle > 0 else None


def compare_with_plan(plan: Plan, measured_tok_s: float | None) -> dict[str, float]:
    """The three numbers side by side: predicted, measured, limit, and how they relate; and the peaks planned."""
    metrics: dict[str, float] = {}
    steps = plan.request.workload.gen_tokens - 1
    batches = -(-plan.request.workload.num_sequences // plan.batch_size)
    for name, estimate in (("predicted", plan.predicted), ("limit", plan.limit)):
        if estimate is not None:
            metrics[f"{name}_tok_s"] = estimate.generation_tok_s
            metrics[f"{name}_ttft_s"] = estimate.prefill_s / batches
            if steps:
                metrics[f"{name}_tpot_s"] = estimate.decode_s / batches / steps
    for tier, peak in plan.peak_bytes.items():
        metrics[f"predicted_peak_{tier}_bytes"] = float(peak)
    return metrics | ratios_to_plan({**metrics, "generation_tok_s": measured_tok_s or 0.0})


def ratios_to_plan(metrics: Mapping[str, float]) -> dict[str, float]:
    """How the measured `generation_tok_s` relates to what was predicted and to the limit, where these are known.

    `prediction_error` is predicted / measured - 1, `attainment` measured / limit.
    """
    ratios: dict[str, float] = {}
    if measured := metrics.get("generation_tok_s"):
        if predicted := metrics.get("predicted_tok_s"):
            ratios["prediction_error"] = predicted / measured - 1
        if limit := metrics.get("limit_tok_s"):
            ratios["attainment"] = measured / limit
    return ratios
