"""Corrects a profile by what a loaded engine measures of itself in a few seconds. Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexllmgen.engine import Probe
from flexllmgen.images import streamed_parts
from flexllmgen.placement import PlacementPlan
from profiling.layer_times import LayerTimes, Point, layer_times_for
from profiling.profile import HardwareProfile, Measurement
from profiling.simulation import simulate_block

_MOST = 3.0
"""More than this is not believed: a disturbance rather than the machine."""
_MOST_IN_PLACE = 10.0
"""Of a CPU's layers: those of models that were not timed, or that turn numbers back, may be off by as much."""
_LONG_S = 1e-3
_ENOUGH = 0.02
_HALVINGS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """By what the machine was slower than its profile said; 1 is as predicted.

    `pace` is of decode steps, in what computes them: the layers on a CPU, where disk reads take their share of the cores;
    on an accelerator how work is issued and started. `attention` is of that on the CPU, beside an accelerator. Prompts were
    not tried and stay as profiled.
    """

    pace: float = 1.0
    link: float = 1.0
    disk: float = 1.0
    attention: float = 1.0


def calibrate(plan: PlacementPlan, profile: HardwareProfile, probe: Probe) -> Calibration:
    """What the probe says about the profile: how loads compare, then what else explains the steps.

    Of several causes that would, it is the one whose figure would have to be wrong by least.
    """
    link, disk = _loads(plan, profile, probe)
    found = Calibration(link=_within(link), disk=_within(disk))
    if probe.step_s is None:
        return found
    causes = ["pace", *(["attention", "link"] if plan.attends_on_host else [])]
    # A load takes longer alone than it does among others, and beside attention than alone.
    causes += [name for name in ("link", "disk") if getattr(found, name) != 1 and name not in causes]
    explained = []
    for cause in causes:
        factor = _explaining(plan, profile, found, cause, probe.step_s, probe.context)
        if factor is not None:
            explained.append((abs(math.log(factor / getattr(found, cause))), cause, factor))
    if not explained:
        return found
    _, cause, factor = min(explained)
    return replace(found, **{cause: factor})


def _explaining(
    plan: PlacementPlan, profile: HardwareProfile, found: Calibration, cause: str, step_s: float, context: int
) -> float | None:
    """The factor of a cause with which steps are predicted to take `step_s`; None if none does."""

    def predicted(factor: float) -> float:
        return _step_s(plan, corrected(profile, replace(found, **{cause: factor}), plan), context)

    as_profiled = predicted(1.0)
    if abs(as_profiled / step_s - 1) <= _ENOUGH:
        return 1.0
    most = _MOST_IN_PLACE if cause == "pace" and plan.in_place else _MOST
    low, high = (1.0, most) if step_s > as_profiled else (1 / most, 1.0)
    # What binds may be a link that was corrected already: then nothing else makes up for the rest.
    if predicted(low) - step_s > _ENOUGH * step_s or step_s - predicted(high) > _ENOUGH * step_s:
        return None
    for _ in range(_HALVINGS):
        middle: float = (low * high) ** 0.5
        low, high = (middle, high) if predicted(middle) < step_s else (low, middle)
    factor: float = (low * high) ** 0.5
    return factor


def corrected(profile: HardwareProfile, calibration: Calibration, plan: PlacementPlan) -> HardwareProfile:
    """The profile as the calibration found the machine, running `plan`'s model."""
    factors = {
        "h2d_bytes_per_s": calibration.link,
        "h2d_under_attention_bytes_per_s": calibration.link,
        "disk_read_bytes_per_s": calibration.disk,
        "cpu_attention_bytes_per_s": calibration.attention,
        "cpu_attention_under_copies_bytes_per_s": calibration.attention,
    }
    measurements = {
        name: _slower(each, factors[name]) if name in factors else each
        for name, each in profile.measurements.items()
    }
    pace, computes = calibration.pace, calibration.pace if plan.in_place else 1.0
    layers = tuple(
        _attending(_slower_layers(table, computes, pace), calibration.attention) for table in profile.layers
    )
    return replace(profile, measurements=measurements, layers=layers)


def _loads(plan: PlacementPlan, profile: HardwareProfile, probe: Probe) -> tuple[float, float]:
    """How much longer than profiled the load took: the link, the disk."""
    if not probe.load_s:
        return 1.0, 1.0
    rates = profile.typical
    parts = [
        streamed_parts(plan.images[index], in_place=plan.in_place, embedding=False)
        for index in plan.stages[probe.stage].images
    ]
    up = sum(part.cpu + part.disk for part in parts)
    link_s = 0.0 if plan.in_place or not rates.h2d_bytes_per_s else up / rates.h2d_bytes_per_s
    disk_s = sum(part.disk for part in parts) / rates.disk_read_bytes_per_s
    # The slower of the two is what was seen; of a short load, mostly how it was started.
    if max(disk_s, link_s) <= _LONG_S:
        return 1.0, 1.0
    return (1.0, probe.load_s / disk_s) if disk_s > link_s else (probe.load_s / link_s, 1.0)


def _step_s(plan: PlacementPlan, profile: HardwareProfile, context: int) -> float:
    """Seconds of a step of a full block, as simulated."""
    times = layer_times_for(plan.spec, profile.layers)
    assert times is not None
    passes = simulate_block(
        plan,
        times,
        profile.typical,
        micro_batches=plan.micro_batches,
        contexts=(context, context, context),
    )
    return statistics.median(passes.seconds[2:])


def _slower(measurement: Measurement, factor: float) -> Measurement:
    return replace(measurement, median=measurement.median / factor)


def _slower_layers(table: LayerTimes, computes: float, issues: float) -> LayerTimes:
    def slower(points: Sequence[Point]) -> tuple[Point, ...]:
        return tuple(
            replace(
                point,
                attention_s=point.attention_s * computes,
                per_position_s=point.per_position_s * computes,
                mlp_s=point.mlp_s * computes,
            )
            for point in points
        )

    return replace(
        table,
        issue_s=table.issue_s * issues,
        chunk_issue_s=table.chunk_issue_s * issues,
        kv_issue_s=table.kv_issue_s * issues,
        recompute_issue_s=table.making_issue_s * issues,
        exchange_s=table.exchange_s * issues,
        replay_s=table.replay_s * issues,
        step=slower(table.step),
        head=tuple(replace(point, head_s=point.head_s * computes) for point in table.head),
    )


def _attending(table: LayerTimes, factor: float) -> LayerTimes:
    names = ("cpu_attention_bytes_per_s", "cpu_attention_codes_bytes_per_s")
    rates = {name: getattr(table, name) for name in names}
    slower = {name: rate / factor for name, rate in rates.items() if rate is not None}
    return replace(table, cpu_attention_call_s=table.cpu_attention_call_s * factor, **slower)


def _within(factor: float) -> float:
    return min(max(factor, 1 / _MOST), _MOST)
