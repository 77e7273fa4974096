"""Plots of one cell over the life of its process: memory, and what the links and the disk carried.

From a Timeline; counters become rates. See figure_parts.py for what a figure is. Knows nothing of HTML pages or of files.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from harness.benchmark.figure_parts import INK, MUTED, SHADE, Figure
from harness.results import Timeline

MIB, GIB = 2.0**20, 2.0**30
BUCKETS = 240

_MEMORY = (
    ("rss_bytes", "process RSS", "#0072B2", "solid"),
    ("device_allocated_bytes", "device, allocated", "#D55E00", "solid"),
    ("device_reserved_bytes", "device, reserved", "#E69F00", "dash"),
    ("gpu_0_memory_bytes", "GPU 0, all processes", "#CC79A7", "dot"),
)
_TRAFFIC = (
    ("moved_h2d_bytes", "host to device", "#D55E00", "solid"),
    ("moved_d2h_bytes", "device to host", "#CC79A7", "solid"),
    ("disk_read_bytes", "disk, read", "#0072B2", "dash"),
    ("disk_write_bytes", "disk, written", "#009E73", "dot"),
)


def memory_over_time(timeline: Timeline, *, top_bytes: float | None = None) -> Figure | None:
    """Resident and device memory, phases shaded; `top_bytes` is the axis' end, for cells that stand side by side."""
    series = [(points_of(timeline, key), style) for key, *style in _MEMORY]
    # A device series that is nought throughout is a machine without a device.
    known = [(points, style) for points, style in series if any(value for _, value in points)]
    if not known:
        return None
    top = max([top_bytes or 0.0, *(value for points, _ in known for _, value in points)])
    unit, factor = ("GiB", GIB) if top >= GIB else ("MiB", MIB)
    traces = [_line(_peaks(points), factor, unit, *style) for points, style in known]
    return _figure(timeline, traces, f"memory, {unit}", top / factor)


def traffic_over_time(timeline: Timeline) -> Figure | None:
    """Rates over the links and the disk; the disk's are the whole machine's, the links' the engine's own count.

    The axis is this cell's own: what another process did to the disk may not flatten all the others.
    """
    known = [(rates, style) for key, *style in _TRAFFIC if (rates := rates_of(timeline, key))]
    if not any(value for rates, _ in known for _, value in rates):
        return None
    top = max(value for rates, _ in known for _, value in rates)
    unit, factor = ("GiB/s", GIB) if top >= GIB else ("MiB/s", MIB)
    traces = [
        _line(rates, factor, unit, *style) for rates, style in known if any(value for _, value in rates)
    ]
    return _figure(timeline, traces, unit, top / factor)


def highest_memory(timelines: Sequence[Timeline]) -> float:
    """The most bytes of any kind of memory in several cells."""
    return max(
        (value for one in timelines for key, *_ in _MEMORY for _, value in points_of(one, key)), default=0.0
    )


def points_of(timeline: Timeline, key: str) -> list[tuple[float, float]]:
    """Times and values of a series, without what the machine could not tell."""
    values = timeline.series.get(key, [])
    return [
        (time, value)
        for time, value in zip(timeline.time_s, values, strict=False)
        if value is not None and math.isfinite(value) and math.isfinite(time)
    ]


def rates_of(timeline: Timeline, key: str) -> list[tuple[float, float]]:
    """A counter's mean rate over each of at most `BUCKETS` stretches, at the stretch's middle.

    A counter that falls began anew: that stretch has no rate.
    """
    points = points_of(timeline, key)
    if len(points) < 2:
        return []
    shortest = (points[-1][0] - points[0][0]) / BUCKETS
    rates: list[tuple[float, float]] = []
    before_s, before = points[0]
    for time, value in points[1:]:
        if time - before_s <= max(shortest, 0.0):
            continue
        if value >= before:
            rates.append(((time + before_s) / 2, (value - before) / (time - before_s)))
        before_s, before = time, value
    return rates


def _peaks(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Fewer points, in which a short peak survives."""
    stride = math.ceil(len(points) / (2 * BUCKETS)) or 1
    stretches = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [max(stretch, key=lambda point: point[1]) for stretch in stretches]


def _line(
    points: Sequence[tuple[float, float]], factor: float, unit: str, name: str, colour: str, dash: str
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [round(time, 3) for time, _ in points],
        "y": [value / factor for _, value in points],
        "line": {"color": colour, "dash": dash, "width": 2},
        "hovertemplate": f"%{{fullData.name}}<br>%{{x:.4~g}} s: %{{y:.3~g}} {unit}<extra></extra>",
    }


def _figure(timeline: Timeline, traces: list[Figure], unit: str, top: float) -> Figure:
    end_s = max([*timeline.time_s, *(stop for _, _, stop in timeline.phases), 1e-3])
    shapes: list[dict[str, Any]] = []
    words: list[dict[str, Any]] = []
    for number, (name, start_s, stop_s) in enumerate(timeline.phases):
        if number % 2 == 0:
            shapes.append(
                {
                    "type": "rect",
                    "layer": "below",
                    "line": {"width": 0},
                    "fillcolor": SHADE,
                    "xref": "x",
                    "yref": "paper",
                    "x0": start_s,
                    "x1": stop_s,
                    "y0": 0,
                    "y1": 1,
                }
            )
        if text := _fitting(name, (stop_s - start_s) / end_s):
            words.append(
                {
                    "text": text,
                    "x": (start_s + stop_s) / 2,
                    "y": 1,
                    "xref": "x",
                    "yref": "paper",
                    "yanchor": "bottom",
                    "showarrow": False,
                    "font": {"size": 11, "color": MUTED},
                }
            )
    return {
        "data": traces,
        "layout": {
            "height": 300,
            "hovermode": "closest",
            "shapes": shapes,
            "annotations": words,
            "xaxis": {
                "title": {"text": "seconds since the process began"},
                "range": [0, end_s],
                "color": INK,
            },
            "yaxis": {"title": {"text": unit}, "range": [0, top * 1.08 or 1], "tickformat": ",~g"},
            "margin": {"t": 24},
            "legend": {"orientation": "h", "y": -0.28, "yanchor": "top", "x": 0},
            "showlegend": True,
        },
    }


def _fitting(name: str, share: float) -> str:
    """The phase's name where some 60 characters a plot leave room for it, else its number, else nothing."""
    room = int(60 * share)
    digits = "".join(re.findall(r"\d+$", name))
    return name if len(name) <= room else digits if len(digits) <= room else ""
