"""The plots that compare plans: where the bytes lie, and where the time was expected to go beside where it went.

See figure_parts.py for what a figure is. Knows nothing of pages or of files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from harness.benchmark.figure_parts import (
    BAR,
    INK,
    LOG_FROM,
    MUTED,
    Figure,
    cells_axis,
    colours_of,
    label,
    legend_below,
    marks,
    subtitle,
)
from harness.benchmark.table import Row, finite, range_of
from harness.benchmark.table_text import percent, seconds
from harness.results import RunResult

TIERS = (("gpu", "device", "#CC79A7", ""), ("cpu", "host", "#56B4E9", "/"), ("disk", "disk", "#E69F00", "x"))
RESOURCE_MARKS = (
    ("circle", "#CC79A7"),
    ("triangle-up", "#E69F00"),
    ("triangle-down", "#56B4E9"),
    ("square", "#7F7F7F"),
    ("cross", "#0072B2"),
    ("star", "#D55E00"),
)


def policies(rows: Sequence[Row], results: Mapping[str, RunResult]) -> Figure | None:
    """Where weights, KV cache and activations lie: stacked bars of the tiers' shares, the cells one below the other."""
    kinds = [
        (title, shares)
        for kind, title in (("weights", "weights"), ("kv_cache", "KV cache"), ("activations", "activations"))
        if any(shares := [shares_of(results.get(row.name), kind) for row in rows])
    ]
    if not kinds:
        return None
    layout: Figure = {
        "height": 140 + 34 * len(rows),
        "barmode": "stack",
        "yaxis": cells_axis(rows),
        "annotations": [],
        "margin": {"t": 32},
        "legend": legend_below(34 * len(rows) + 60, 36),
    }
    traces: list[Figure] = []
    for column, (title, shares) in enumerate(kinds):
        axis = "" if column == 0 else str(column + 1)
        start, stop = column / len(kinds) + 0.02 * (column > 0), (column + 1) / len(kinds) - 0.04
        layout[f"xaxis{axis}"] = {"domain": [start, stop], "range": [0, 1], "tickformat": ".0%", "nticks": 4}
        layout["annotations"].append(subtitle(title, (start + stop) / 2))
        layout["annotations"] += [_unknown(at, f"x{axis}") for at, one in enumerate(shares) if one is None]
        for tier, name, colour, pattern in TIERS:
            values = [one.get(tier, 0.0) if one else None for one in shares]
            if not any(values):
                continue
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "width": BAR,
                    "name": name,
                    "legendgroup": tier,
                    "showlegend": not any(trace["legendgroup"] == tier for trace in traces),
                    "x": values,
                    "y": list(range(len(rows))),
                    "xaxis": f"x{axis}",
                    "yaxis": "y",
                    # Dark on each of the three colours, in either scheme.
                    "text": [percent(value) if value and value >= 0.12 else "" for value in values],
                    "textposition": "inside",
                    "insidetextanchor": "middle",
                    "textangle": 0,
                    "textfont": {"color": "#111111"},
                    "marker": {
                        "color": colour,
                        "pattern": {"shape": pattern, "fillmode": "overlay", "solidity": 0.15},
                    },
                    "hovertext": [
                        f"{label(row.name)}<br>{title}, {name}: {'unknown' if value is None else percent(value)}"
                        for row, value in zip(rows, values, strict=True)
                    ],
                    "hoverinfo": "text",
                }
            )
    return {"data": traces, "layout": layout}


def time_by_resource(rows: Sequence[Row], results: Mapping[str, RunResult]) -> Figure | None:
    """Seconds of prefill and decode as measured (bars), predicted (diamonds), at the limit (lines); and, as marks, how long
    each resource was to be at work."""
    colours = colours_of(row.strategy for row in rows)
    layout: Figure = {
        "height": 170 + 40 * len(rows),
        "yaxis": cells_axis(rows),
        "annotations": [],
        "margin": {"t": 32},
        "legend": legend_below(40 * len(rows) + 40, 56),
    }
    traces: list[Figure] = []
    styles = _resource_styles(results.values())
    for column, phase in enumerate(("prefill", "decode")):
        axis = "" if column == 0 else "2"
        start, stop = ((0.0, 0.48), (0.52, 1.0))[column]
        drawn = _phase_traces(phase, rows, results, colours, styles)
        values = [x for trace in drawn for x in _ends(trace) if x]
        horizontal: Figure = {
            "domain": [start, stop],
            "title": {"text": "seconds"},
            "tickformat": ",~g",
            "nticks": 6,
        }
        bars = [x for trace in drawn if trace["type"] == "bar" for x in trace["x"] if x]
        if bars and max(bars) / min(bars) > 25 * LOG_FROM:
            horizontal |= {"type": "log", "title": {"text": "seconds, log scale"}}
            horizontal["range"] = [math.log10(min(bars) / 10), math.log10(max(values) * 1.2)]
        else:
            horizontal["range"] = [0, max(values, default=1.0) * 1.06]
        layout[f"xaxis{axis}"] = horizontal
        layout["annotations"].append(subtitle(phase, (start + stop) / 2))
        for trace in drawn:
            shown = any(trace["legendgroup"] == one["legendgroup"] for one in traces)
            traces.append({**trace, "xaxis": f"x{axis}", "yaxis": "y", "showlegend": not shown})
    return {"data": traces, "layout": layout} if traces else None


def shares_of(result: RunResult | None, kind: str) -> dict[str, float] | None:
    """Shares of tiers (0..1) of `weights`, `kv_cache` or `activations`: of bytes placed, else planned, else asked for."""
    if result is None or not result.plan:
        return None
    keys = {
        "weights": ("placed_weight_bytes", "weight_bytes"),
        "kv_cache": ("kv_bytes",),
        "activations": ("activation_bytes",),
    }
    asked = (result.plan.get("shares") or {}).get(kind)
    for sizes in (*(result.plan.get(key) for key in keys[kind]), asked):
        if isinstance(sizes, Mapping):
            known = {
                tier: value
                for tier in ("gpu", "cpu", "disk")
                if (value := finite(sizes.get(tier))) is not None
            }
            if total := sum(known.values()):
                return {tier: value / total for tier, value in known.items()}
    return None


def _phase_traces(
    phase: str,
    rows: Sequence[Row],
    results: Mapping[str, RunResult],
    colours: Mapping[str, str],
    styles: Mapping[str, tuple[str, str]],
) -> list[Figure]:
    bars: dict[str, list[tuple[float, int]]] = {}
    found: dict[str, list[tuple[float, int]]] = {}
    spans: dict[int, tuple[float, float]] = {}
    for at, row in enumerate(rows):
        if (result := results.get(row.name)) is None:
            continue
        if measured := finite(result.metrics.get(f"{phase}_s")):
            bars.setdefault(row.strategy, []).append((measured, at))
            spans[at] = range_of(result, f"{phase}_s") or (measured, measured)
        for name in ("predicted", "limit"):
            estimate = result.plan.get(name) or {}
            if value := finite(estimate.get(f"{phase}_s")):
                found.setdefault(name, []).append((value, at))
            if name == "predicted":
                for resource, busy_s in (estimate.get(f"{phase}_busy_s") or {}).items():
                    if value := finite(busy_s):
                        found.setdefault(f"busy {resource}", []).append((value, at))
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": f"{label(strategy)}, measured",
            "legendgroup": strategy,
            "x": [value for value, _ in points],
            "y": [at for _, at in points],
            "width": BAR,
            "marker": {"color": colours[strategy], "opacity": 0.75},
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [max(0.0, spans[at][1] - value) for value, at in points],
                "arrayminus": [max(0.0, value - spans[at][0]) for value, at in points],
                "color": INK,
                "thickness": 1.4,
                "width": 4,
            },
            "hovertext": [f"{label(rows[at].name)}: {phase} took {seconds(value)}" for value, at in points],
            "hoverinfo": "text",
        }
        for strategy, points in bars.items()
    ]
    fixed = {
        "predicted": ({"symbol": "diamond-open", "size": 12, "line": {"width": 2.5}}, "predicted"),
        "limit": ({"symbol": "line-ns-open", "size": 26, "line": {"width": 3.5}}, "physical limit"),
    }
    for name, points in found.items():
        if name in fixed:
            marker, title = fixed[name]
        else:
            resource = name.removeprefix("busy ")
            symbol, colour = styles[resource]
            marker = {"symbol": symbol, "size": 9, "color": colour, "line": {"width": 1, "color": INK}}
            title = f"{label(resource)} at work, predicted"
        texts = [f"{label(rows[at].name)}: {title} {seconds(value)}" for value, at in points]
        traces.append({**marks(title, points, marker, texts), "legendgroup": name})
    return traces


def _ends(trace: Figure) -> list[float]:
    """How far to the right the trace reaches, whiskers included."""
    whiskers = trace.get("error_x", {}).get("array", [0.0] * len(trace["x"]))
    return [x + more for x, more in zip(trace["x"], whiskers, strict=True)]


def _resource_styles(results: Iterable[RunResult]) -> dict[str, tuple[str, str]]:
    names: dict[str, None] = {}
    for result in results:
        for phase in ("prefill", "decode"):
            names |= dict.fromkeys((result.plan.get("predicted") or {}).get(f"{phase}_busy_s") or {})
    return {name: RESOURCE_MARKS[index % len(RESOURCE_MARKS)] for index, name in enumerate(names)}


def _unknown(at: int, axis: str) -> Figure:
    """No bar would look like nought."""
    return {
        "text": "unknown",
        "x": 0.02,
        "y": at,
        "xref": axis,
        "yref": "y",
        "xanchor": "left",
        "showarrow": False,
        "font": {"size": 11, "color": MUTED},
    }
