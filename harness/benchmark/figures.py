"""The plots that compare what was measured: throughput with its limits, latency over token position.

See figure_parts.py for what a figure is. Knows nothing of pages or of files.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from harness.benchmark.figure_parts import (
    BAR,
    INK,
    LOG_FROM,
    Figure,
    cells_axis,
    colours_of,
    label,
    legend_below,
    marks,
)
from harness.benchmark.table import Row
from harness.benchmark.table_text import number, percent
from harness.results import RunResult
from harness.summary import position_medians

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
# Past this many times the longest bar a mark would squash the bars; words then tell it.
IN_VIEW = 5.0
MAX_POINTS = 1000


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
    kinds = [
        ("predicted", "predicted_tok_s", {"symbol": "diamond-open", "size": 12, "line": {"width": 2.5}}),
        ("physical limit", "limit_tok_s", {"symbol": "line-ns-open", "size": 30, "line": {"width": 3.5}}),
    ]
    for name, key, marker in kinds:
        points = [
            (value, index) for index, row in enumerate(rows) if (value := getattr(row, key)) and value <= top
        ]
        if points:
            traces.append(
                marks(
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
            "yaxis": cells_axis(rows, [_throughput_note(row, top) for row in rows]),
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
            "legend": legend_below(330, 56),
            "margin": {"t": 16},
        },
    }


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
