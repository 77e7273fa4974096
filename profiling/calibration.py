"""Corrects a profile by what a loaded engine measures on one of its layers. Pure."""

from dataclasses import dataclass, replace

from flexllmgen.executor import LayerProbe
from flexllmgen.placement import PlacementPlan, streamed_parts
from profiling.layer_times import LayerTimes, Point, layer_times_for
from profiling.profile import HardwareProfile, Measurement

_MOST = 3.0
"""A factor beyond this is a disturbance, not a correction."""
_LONG_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """By what a machine was slower than its profile said, where a probe could tell; 1 is as predicted."""

    compute: float = 1.0
    link: float = 1.0
    disk: float = 1.0


def calibrate(plan: PlacementPlan, profile: HardwareProfile, probe: LayerProbe) -> Calibration:
    """What the probe says about the profile: seconds measured over seconds predicted, per resource."""
    times, rates = layer_times_for(plan.spec, profile.layers), profile.typical
    assert times is not None
    compute = link = disk = 1.0
    expected = times.step_s(probe.kind, probe.sequences, probe.context)
    expected += times.issue_s if plan.in_place else 0.0
    # On an accelerator a few steps time their issuing as much as the device.
    if probe.compute_s is not None and plan.in_place:
        compute = probe.compute_s / expected
    if probe.load_s:
        parts = [
            streamed_parts(plan.images[index], in_place=plan.in_place, embedding=False)
            for index in plan.stages[probe.stage].images
        ]
        from_disk = sum(part.disk for part in parts)
        up = sum(part.cpu + part.disk for part in parts)
        link_s = 0.0 if plan.in_place or not rates.h2d_bytes_per_s else up / rates.h2d_bytes_per_s
        disk_s = from_disk / rates.disk_read_bytes_per_s
        # The slower of the two is what was seen; of a short load, mostly how it was started.
        if max(disk_s, link_s) > _LONG_S:
            if disk_s > link_s:
                disk = probe.load_s / disk_s
            else:
                link = probe.load_s / link_s
    return Calibration(compute=_within(compute), link=_within(link), disk=_within(disk))


def corrected(profile: HardwareProfile, calibration: Calibration) -> HardwareProfile:
    """The profile as the calibration found the machine."""
    factors = {
        "h2d_bytes_per_s": calibration.link,
        "disk_read_bytes_per_s": calibration.disk,
    }
    measurements = {
        name: _slower(each, factors[name]) if name in factors else each
        for name, each in profile.measurements.items()
    }
    layers = tuple(_slower_layers(table, calibration.compute) for table in profile.layers)
    return replace(profile, measurements=measurements, layers=layers)


def _slower(measurement: Measurement, factor: float) -> Measurement:
    return replace(measurement, median=measurement.median / factor)


def _slower_layers(table: LayerTimes, factor: float) -> LayerTimes:
    def slower(point: Point) -> Point:
        return replace(
            point,
            attention_s=point.attention_s * factor,
            per_position_s=point.per_position_s * factor,
            mlp_s=point.mlp_s * factor,
        )

    return replace(
        table,
        prompt=tuple(map(slower, table.prompt)),
        step=tuple(map(slower, table.step)),
    )


def _within(factor: float) -> float:
    return min(max(factor, 1 / _MOST), _MOST)
