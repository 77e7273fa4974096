"""The plots of a benchmark's report, as plotly's own figure descriptions: throughput, latency, policies, time by resource.

Plain dictionaries of `data` and `layout`, ready for JSON. Text colour, grid and background are the page's, which has a light
and a dark scheme; `INK`, `MUTED` and `SHADE` stand for its colours. Strategies keep one colour through all plots, Okabe and
Ito's, which are told apart under the common colour blindnesses, and nothing is told by colour alone. Knows nothing of HTML
pages or of files.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from harness.benchmark.table import Row, finite, range_of
from harness.benchmark.table_text import number, percent, seconds
from harness.results import RunResult
from harness.summary import position_medians

Figure = dict[str, Any]

INK, MUTED, SHADE = "$ink", "$muted", "$shade"
"""Colours that the page replaces by its own: text, secondary text, a shaded span."""

STRATEGY_COLOURS = {"accelerate": "#D55E00", "flexgen": "#0072B2", "autoflex": "#009E73"}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
TIERS = (("gpu", "device", "#CC79A7", ""), ("cpu", "host", "#56B4E9", "/"), ("disk", "disk", "#E69F00", "x"))
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
RESOURCE_MARKS = (
    ("circle", "#CC79A7"),
    ("triangle-up", "#E69F00"),
    ("triangle-down", "#56B4E9"),
    ("square", "#7F7F7F"),
    ("cross", "#0072B2"),
    ("star", "#D55E00"),
)

# Past this many times the longest bar a mark would squash the bars; words then tell it.
IN_VIEW = 3.0
# Below this ratio of the largest value to the least a linear axis from nought is the fairer picture.
LOG_FROM = 4.0
MAX_POINTS = 1000
NAME_CHARACTERS = 36
# Height of a bar, of the row that its cell has.
BAR = 0.66


def colours_of(strategies: Iterable[str]) -> dict[str, str]:
    """A colour for each strategy; the three that ship keep theirs in every benchmark."""
    others = [name for name in dict.fromkeys(strategies) if name not in STRATEGY_COLOURS]
    return STRATEGY_COLOURS | {
        name: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, name in enumerate(others)
    }


def throughput(rows: Sequence[Row]) -> Figure | None:
    """Bars of tokens per second with whiskers over launches, the prediction as a diamond, the limit as a line."""
    measured = [row for row in rows if row.generation_tok_s]
    if not measured:
        return None
    longest = max(row.high_tok_s or row.generation_tok_s or 0.0 for row in measured)
    top = longest * IN_VIEW
    traces = [_bars(strategy, rows) for strategy in dict.fromkeys(row.strategy for row in measured)]
    for strategy, trace in zip(dict.fromkeys(row.strategy for row in measured), traces, strict=True):
        trace["marker"]["color"] = colours_of(row.strategy for row in rows)[strategy]
    marks = [
        ("predicted", "predicted_tok_s", {"symbol": "diamond-open", "size": 12, "line": {"width": 2.5}}),
        ("physical limit", "limit_tok_s", {"symbol": "line-ns-open", "size": 30, "line": {"width": 3.5}}),
    ]
    for name, key, marker in marks:
        points = [
            (value, index) for index, row in enumerate(rows) if (value := getattr(row, key)) and value <= top
        ]
        if points:
            traces.append(
                _marks(
                    name, points, marker, [f"{label(rows[at].name)}: {number(x)} tok/s" for x, at in points]
                )
            )
            longest = max(longest, *(value for value, _ in points))
    return {
        "data": traces,
        "layout": {
            "height": 130 + 48 * len(rows),
            "barmode": "overlay",
            "xaxis": {"title": {"text": "generated tokens per second"}, "range": [0, longest * 1.06]},
            "yaxis": _cells_axis(rows, [_throughput_note(row, top) for row in rows]),
        },
    }


def latency(rows: Sequence[Row], results: Mapping[str, RunResult]) -> Figure | None:
    """How long each token took, by its position: the first one is TTFT, then the gap before each; medians of all repeats."""
    colours = colours_of(row.strategy for row in rows)
    traces: list[Figure] = []
    drawn: dict[str, int] = {}
    for row in rows:
        result = results.get(row.name)
        gaps_s = (
            position_medians([[x for x in gaps if math.isfinite(x)] for gaps in result.itl_s])
            if result
            else []
        )
        points: list[tuple[float, float]] = [(1, row.ttft_s)] if row.ttft_s else []
        points += thinned([(token, gap) for token, gap in enumerate(gaps_s, start=2) if gap > 0])
        if not points:
            continue
        order = drawn.get(row.strategy, 0)
        drawn[row.strategy] = order + 1
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(points) <= 64 else "lines",
                "name": label(row.name),
                "x": [token for token, _ in points],
                "y": [gap_s * 1e3 for _, gap_s in points],
                "line": {"color": colours[row.strategy], "dash": DASHES[order % len(DASHES)], "width": 2},
                "marker": {"size": 5, "color": colours[row.strategy]},
                "hovertemplate": "%{fullData.name}<br>token %{x}: %{y:.4~g} ms<extra></extra>",
            }
        )
    if not traces:
        return None
    values = [value for trace in traces for value in trace["y"]]
    vertical: Figure = {"title": {"text": "milliseconds"}, "rangemode": "tozero", "tickformat": ",~g"}
    if max(values) / min(values) > LOG_FROM:
        vertical |= {"type": "log", "rangemode": "normal", "title": {"text": "milliseconds, log scale"}}
        # Digits between the powers of ten, unless there are so many powers that they would collide.
        vertical["dtick"] = "D2" if max(values) / min(values) < 1e4 else 1
    return {
        "data": traces,
        "layout": {
            "height": 420 + 22 * math.ceil(len(traces) / 3),
            "hovermode": "closest",
            "xaxis": {"title": {"text": "generated token"}, "rangemode": "tozero"},
            "yaxis": vertical,
            "legend": _legend_below(330, 56),
            "margin": {"t": 16},
        },
    }


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
        "yaxis": _cells_axis(rows),
        "annotations": [],
        "margin": {"t": 32},
        "legend": _legend_below(34 * len(rows) + 60, 36),
    }
    traces: list[Figure] = []
    for column, (title, shares) in enumerate(kinds):
        axis = "" if column == 0 else str(column + 1)
        start, stop = column / len(kinds) + 0.02 * (column > 0), (column + 1) / len(kinds) - 0.04
        layout[f"xaxis{axis}"] = {"domain": [start, stop], "range": [0, 1], "tickformat": ".0%", "nticks": 4}
        layout["annotations"].append(_subtitle(title, (start + stop) / 2))
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
        "yaxis": _cells_axis(rows),
        "annotations": [],
        "margin": {"t": 32},
        "legend": _legend_below(40 * len(rows) + 40, 56),
    }
    traces: list[Figure] = []
    styles = _resource_styles(results.values())
    for column, phase in enumerate(("prefill", "decode")):
        axis = "" if column == 0 else "2"
        start, stop = ((0.0, 0.48), (0.52, 1.0))[column]
        found = _phase_traces(phase, rows, results, colours, styles)
        values = [x for trace in found for x in trace["x"] if x]
        horizontal: Figure = {
            "domain": [start, stop],
            "title": {"text": "seconds"},
            "tickformat": ",~g",
            "nticks": 6,
        }
        bars = [x for trace in found if trace["type"] == "bar" for x in trace["x"] if x]
        if bars and max(bars) / min(bars) > 25 * LOG_FROM:
            horizontal |= {"type": "log", "title": {"text": "seconds, log scale"}}
            horizontal["range"] = [math.log10(min(bars) / 10), math.log10(max(values) * 1.2)]
        else:
            horizontal["range"] = [0, max(values, default=1.0) * 1.06]
        layout[f"xaxis{axis}"] = horizontal
        layout["annotations"].append(_subtitle(phase, (start + stop) / 2))
        for trace in found:
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


def label(text: str) -> str:
    """A name as plotly shows it: a long one is cut in the middle, and nothing in it is markup."""
    text = " ".join(text.split())
    if len(text) > NAME_CHARACTERS:
        half = (NAME_CHARACTERS - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return html.escape(text, quote=False)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points; the median of each stretch stands for it."""
    stride = math.ceil(len(points) / MAX_POINTS) or 1
    if stride == 1:
        return list(points)
    stretches = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(stretch[0][0], median(value for _, value in stretch)) for stretch in stretches]


def _bars(strategy: str, rows: Sequence[Row]) -> Figure:
    mine = [(at, row, row.generation_tok_s) for at, row in enumerate(rows) if row.strategy == strategy]
    known = [(at, row, value) for at, row, value in mine if value]
    return {
        "type": "bar",
        "orientation": "h",
        "name": label(strategy),
        "x": [value for _, _, value in known],
        "y": [at for at, _, _ in known],
        "width": BAR,
        "marker": {},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, (row.high_tok_s or value) - value) for _, row, value in known],
            "arrayminus": [max(0.0, value - (row.low_tok_s or value)) for _, row, value in known],
            "color": INK,
            "thickness": 1.6,
            "width": 5,
        },
        "hovertext": [_throughput_hover(row) for _, row, _ in known],
        "hoverinfo": "text",
    }


def _throughput_hover(row: Row) -> str:
    facts = [f"<b>{label(row.name)}</b>", f"{number(row.generation_tok_s or 0)} tok/s"]
    if row.low_tok_s is not None and row.high_tok_s is not None:
        facts.append(f"from {number(row.low_tok_s)} to {number(row.high_tok_s)}")
    if row.ratio_to_baseline is not None and row.baseline:
        facts.append(f"{number(row.ratio_to_baseline)}x {label(row.baseline)}")
    if row.attainment is not None:
        facts.append(f"{percent(row.attainment)} of the physical limit")
    return "<br>".join(facts)


def _throughput_note(row: Row, top: float) -> str:
    if row.generation_tok_s is None:
        return row.status.lower()
    words = [f"{number(row.generation_tok_s)} tok/s"]
    for value, name in ((row.predicted_tok_s, "predicted"), (row.limit_tok_s, "limit")):
        if value and value > top:
            words.append(f"{name} {number(value)} off scale")
    return ", ".join(words)


def _phase_traces(
    phase: str,
    rows: Sequence[Row],
    results: Mapping[str, RunResult],
    colours: Mapping[str, str],
    styles: Mapping[str, tuple[str, str]],
) -> list[Figure]:
    bars: dict[str, list[tuple[float, int]]] = {}
    marks: dict[str, list[tuple[float, int]]] = {}
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
                marks.setdefault(name, []).append((value, at))
            if name == "predicted":
                for resource, busy_s in (estimate.get(f"{phase}_busy_s") or {}).items():
                    if value := finite(busy_s):
                        marks.setdefault(f"busy {resource}", []).append((value, at))
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
    for name, points in marks.items():
        if name in fixed:
            marker, title = fixed[name]
        else:
            resource = name.removeprefix("busy ")
            symbol, colour = styles[resource]
            marker = {"symbol": symbol, "size": 9, "color": colour, "line": {"width": 1, "color": INK}}
            title = f"{label(resource)} at work, predicted"
        texts = [f"{label(rows[at].name)}: {title} {seconds(value)}" for value, at in points]
        traces.append({**_marks(title, points, marker, texts), "legendgroup": name})
    return traces


def _resource_styles(results: Iterable[RunResult]) -> dict[str, tuple[str, str]]:
    names: dict[str, None] = {}
    for result in results:
        for phase in ("prefill", "decode"):
            names |= dict.fromkeys((result.plan.get("predicted") or {}).get(f"{phase}_busy_s") or {})
    return {name: RESOURCE_MARKS[index % len(RESOURCE_MARKS)] for index, name in enumerate(names)}


def _marks(
    name: str, points: Sequence[tuple[float, int]], marker: Mapping[str, Any], texts: Sequence[str]
) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [value for value, _ in points],
        "y": [at for _, at in points],
        "marker": {"color": INK, **marker},
        "hovertext": list(texts),
        "hoverinfo": "text",
        "cliponaxis": False,
    }


def _cells_axis(rows: Sequence[Row], notes: Sequence[str] = ()) -> Figure:
    texts = [label(row.name) for row in rows]
    if notes:
        texts = [
            f"{text}<br><span style='font-size:11px'>{note}</span>"
            for text, note in zip(texts, notes, strict=True)
        ]
    return {
        "tickvals": list(range(len(rows))),
        "ticktext": texts,
        "range": [len(rows) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
        "fixedrange": True,
    }


def _subtitle(text: str, x: float) -> Figure:
    return {
        "text": f"<b>{text}</b>",
        "x": x,
        "y": 1,
        "yshift": 6,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "showarrow": False,
    }


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


def _legend_below(plot_height: float, below: float) -> Figure:
    """A legend `below` pixels under axes of about `plot_height` pixels: room for what stands at the axis."""
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": -below / plot_height, "yanchor": "top"}
