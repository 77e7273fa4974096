"""What the plots of a benchmark's report share: colours, names as labels, axes of cells, marks.

A figure is plotly's own description, a plain dictionary of `data` and `layout`, ready for JSON. Text colour, grid and
background are the page's, which has a light and a dark scheme; `INK`, `MUTED` and `SHADE` stand for its colours.
Strategies keep one colour through all plots, Okabe and Ito's, which are told apart under the common colour blindnesses.
Knows nothing of pages or of files.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.benchmark.table import Row

Figure = dict[str, Any]

INK, MUTED, SHADE = "$ink", "$muted", "$shade"
"""Colours that the page replaces by its own: text, secondary text, a shaded span."""

STRATEGY_COLOURS = {"accelerate": "#D55E00", "flexgen": "#0072B2", "autoflex": "#009E73"}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")

# Below this ratio of the largest value to the least a linear axis from nought is the fairer picture.
LOG_FROM = 4.0
NAME_CHARACTERS = 36
# Height of a bar, of the row that its cell has.
BAR = 0.66


def colours_of(strategies: Iterable[str]) -> dict[str, str]:
    """A colour for each strategy; the three that ship keep theirs in every benchmark."""
    others = [name for name in dict.fromkeys(strategies) if name not in STRATEGY_COLOURS]
    return STRATEGY_COLOURS | {
        name: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, name in enumerate(others)
    }


def label(text: str) -> str:
    """A name as plotly shows it: a long one is cut in the middle, and nothing in it is markup."""
    text = " ".join(text.split())
    if len(text) > NAME_CHARACTERS:
        half = (NAME_CHARACTERS - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return html.escape(text, quote=False)


def marks(
    name: str, points: Sequence[tuple[float, int]], marker: Mapping[str, Any], texts: Sequence[str]
) -> Figure:
    """Marks at (value, row), each with its text for the pointer."""
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


def cells_axis(rows: Sequence[Row], notes: Sequence[str] = ()) -> Figure:
    """The axis of a row for each cell, from the top, named by the cells with `notes` below the names."""
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


def subtitle(text: str, x: float) -> Figure:
    """A title above one of several plots, `x` of the whole width."""
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


def legend_below(plot_height: float, below: float) -> Figure:
    """A legend `below` pixels under axes of about `plot_height` pixels: room for what stands at the axis."""
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": -below / plot_height, "yanchor": "top"}
