"""A metric's history as people read it: a table with a line of bars for a terminal, and a page with a plot.

The page is one file, complete in itself, drawn with plotly. Knows nothing of how the history was worked out.
"""

import html
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError
from harness.compare.history import Point, Series
from harness.compare.verdict import direction
from harness.compare.view import share_text, table, value_text, wrapped
from harness.results import write_text

COLUMNS = ("commit", "date", "n", "median", "spread", "change", "verdict")
_BARS = "▁▂▃▄▅▆▇█"
_SUBJECT_MIN = 12
# Okabe and Ito's colours, told apart under the common colour blindnesses.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("solid", "dash", "dot", "dashdot")  # where there are more series than colours
_EXPLAINED = (
    "commits, oldest first; medians over launches; bars from the least to the largest; "
    "a triangle marks a step beyond the noise, pointing up where it is for the better"
)
# What a page in the dark changes of plotly_white, as the report of a benchmark does.
_DARK = {
    "paper_bgcolor": "#14181d", "plot_bgcolor": "#14181d", "font.color": "#e8eaed",
    **{f"{axis}.{part}": "#2c333b" for axis in ("xaxis", "yaxis") for part in ("gridcolor", "zerolinecolor", "linecolor")},
}  # fmt: skip
_SCHEME = """
const dark = window.matchMedia("(prefers-color-scheme: dark)"), plot = document.getElementById("{plot_id}");
const colours = COLOURS, plain = Object.fromEntries(Object.keys(colours).map((name) => [name, null]));
const paint = () => {
  document.body.style.background = dark.matches ? colours.paper_bgcolor : "";
  Plotly.relayout(plot, dark.matches ? colours : plain);
};
dark.addEventListener("change", paint);
if (dark.matches) paint();
"""
_MARKERS = {"": "circle", "better": "triangle-up", "worse": "triangle-down", "differs": "diamond"}


def as_text(all_series: Sequence[Series], width: int) -> str:
    """All series, in lines no longer than `width` where words allow it."""
    metric = all_series[0].metric
    sense = {1: "higher is better", -1: "lower is better", None: ""}[direction(metric)]
    lines = [f"{metric}, medians over launches" + (f"; {sense}" if sense else "")]
    for series in all_series:
        lines += ["", *wrapped(series.label, width), *wrapped(f"  on {series.machine}", width)]
        lines.append(f"  {sparkline([point.median for point in series.points])}")
        lines += _with_subjects(
            table(COLUMNS, [_row(series, one) for one in series.points], width), series, width
        )
    steps = [point.step for series in all_series for point in series.points if point.step is not None]
    if any(not step.change.can_tell for step in steps):
        note = "(in brackets): too few launches to test; marked where the step is larger than both spreads together"
        lines += ["", *wrapped(note, width)]
    return "\n".join(lines)


def sparkline(values: Sequence[float]) -> str:
    """A bar per value, from the least to the largest.

    >>> sparkline([1.0, 2.0, 3.0]), sparkline([5.0, 5.0])
    ('▁▅█', '▄▄')
    """
    low, high = min(values), max(values)
    if high == low:
        return "▄" * len(values)
    top = len(_BARS) - 1
    return "".join(_BARS[int((value - low) / (high - low) * top + 0.5)] for value in values)


def write_html(all_series: Sequence[Series], path: Path) -> Path:
    """Write the plot as one HTML file that opens offline, some 5 MB, nearly all of it plotly's code.

    Raises:
        UsageError: plotly is not installed, or the file cannot be written.
    """
    try:
        import plotly.graph_objects as graphs
    except ImportError:
        raise UsageError("--html needs plotly: pip install plotly") from None
    metric = all_series[0].metric
    figure = graphs.Figure(
        data=[graphs.Scatter(**_trace(series, number)) for number, series in enumerate(all_series)],
        layout={
            "title": {"text": f"{metric} by commit", "subtitle": {"text": _EXPLAINED}},
            "template": "plotly_white",
            "hovermode": "closest",
            "showlegend": True,
            "legend": {"orientation": "v", "xanchor": "left", "x": 0, "yref": "container", "yanchor": "bottom", "y": 0},
            "xaxis": {"type": "category", "tickangle": -45, "automargin": True,
                      "categoryorder": "array", "categoryarray": _categories(all_series)},
            "yaxis": {"title": {"text": _axis(metric)[0]}, "rangemode": "tozero"},
        },
    )  # fmt: skip
    page = figure.to_html(
        include_plotlyjs=True, full_html=True, default_height="96vh", config={"displaylogo": False},
        post_script=_SCHEME.replace("COLOURS", json.dumps(_DARK)),
    )  # fmt: skip
    page = page.replace("<head>", f"<head><title>{html.escape(metric)} by commit</title>", 1)
    try:
        return write_text(path.expanduser(), page)
    except OSError as error:
        raise UsageError(
            f"--html {path}: cannot be written ({error.strerror or error}); name another file"
        ) from error


def _row(series: Series, point: Point) -> list[str]:
    return [
        str(point.revision),
        time.strftime("%Y-%m-%d", time.localtime(point.at_ms / 1000)),
        str(len(point.values)),
        value_text(series.metric, point.median),
        "-" if point.spread is None else f"{point.spread:.1%}",
        "" if point.step is None else share_text(point.step.change.change),
        point.mark or _within_noise(point),
    ]


def _within_noise(point: Point) -> str:
    if point.step is None:
        return ""
    return "~" if point.step.change.can_tell else "(~)"


def _with_subjects(lines: Sequence[str], series: Series, width: int) -> list[str]:
    """The commits' subjects after the table, as much of them as there is room for."""
    start = max(map(len, lines)) + 2
    room = width - start
    if room < _SUBJECT_MIN:
        return list(lines)
    found = [lines[0]]
    for line, point in zip(lines[1:], series.points, strict=True):
        subject = point.subject if len(point.subject) <= room else point.subject[: room - 1] + "…"
        found.append(f"{line.ljust(start)}{subject}".rstrip())
    return found


def _categories(all_series: Sequence[Series]) -> list[str]:
    """Every commit once, such that each series keeps its order; they agree where their commits do."""
    order: list[str] = []
    for series in all_series:
        place = 0
        for name in (str(point.revision) for point in series.points):
            if name in order:
                place = order.index(name) + 1
            else:
                order.insert(place, name)
                place += 1
    return order


def _axis(metric: str) -> tuple[str, float]:
    """What an axis of the metric is called, with its unit, and by what values are divided for it."""
    if metric.endswith("_bytes"):
        return f"{metric.removesuffix('_bytes')} (GiB)", float(1 << 30)
    if metric.endswith("tok_s"):
        return f"{metric} (tokens per second)", 1.0
    return (f"{metric} (seconds)" if metric.endswith("_s") else metric), 1.0


def _trace(series: Series, number: int) -> Mapping[str, Any]:
    unit = _axis(series.metric)[1]
    return {
        "name": html.escape(f"{series.label}, {series.machine}"),
        "x": [str(point.revision) for point in series.points],
        "y": [point.median / unit for point in series.points],
        "mode": "lines+markers",
        "line": {
            "color": _COLOURS[number % len(_COLOURS)],
            "dash": _DASHES[number // len(_COLOURS) % len(_DASHES)],
        },
        "marker": {
            "size": [15 if point.mark else 8 for point in series.points],
            "symbol": [_MARKERS.get(point.mark.strip("()"), "circle") for point in series.points],
        },
        "error_y": {
            "type": "data",
            "symmetric": False,
            "thickness": 1,
            "array": [(max(point.values) - point.median) / unit for point in series.points],
            "arrayminus": [(point.median - min(point.values)) / unit for point in series.points],
        },
        "text": [_hover(series, point) for point in series.points],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _hover(series: Series, point: Point) -> str:
    lines = [
        f"<b>{html.escape(str(point.revision))}</b> {html.escape(point.subject)}",
        f"{value_text(series.metric, point.median)}, {len(point.values)} launch{'es' if len(point.values) != 1 else ''}"
        + ("" if point.spread is None else f", spread {point.spread:.1%}"),
    ]
    if point.step is not None:
        p = "" if point.step.change.p is None else f", p {point.step.change.p:.3f}"
        lines.append(f"{share_text(point.step.change.change)} to the one before {html.escape(point.mark)}{p}")
    return "<br>".join(lines)
