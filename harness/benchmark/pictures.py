"""Drawn pictures of a benchmark, for where no script runs: throughput with its limits, latency over token position.

PNG files like those of a run (harness/pictures.py), in the colours of the report. Knows nothing of MLflow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from harness.benchmark.figure_parts import LOG_FROM, colours_of
from harness.benchmark.figures import IN_VIEW
from harness.benchmark.record import Benchmark, read_cells
from harness.benchmark.table import Row, rows_of
from harness.benchmark.table_text import number
from harness.pictures import draw_legend, new_figure, save_figure, write_instead
from harness.results import RunResult
from harness.summary import position_medians, shorten

BLACK = "#1b1f24"
_DASHES = ((0, ()), (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))
# More lines than this cannot be told apart in a legend.
NAMED_LINES = 12


def draw_benchmark(folder: Path) -> list[Path]:
    """Draw throughput.png and latency.png of the benchmark at `folder`, as far as it came; returns their paths.

    Raises:
        UsageError: benchmark.json or a cell's result cannot be read.
    """
    benchmark = Benchmark.read(folder)
    results = read_cells(folder, benchmark)
    rows = rows_of(benchmark, results)
    return [
        draw_throughput(rows, folder / "throughput.png", benchmark.name),
        draw_latency(rows, results, folder / "latency.png", benchmark.name),
    ]


def draw_throughput(rows: Sequence[Row], path: Path, name: str) -> Path:
    """Bars of tokens per second with the range over launches, the prediction as a diamond, the limit as a line."""
    figure = new_figure(f"Throughput: {_plain(shorten(name, 60))}")
    axes = figure.subplots()
    measured = [row.high_tok_s or row.generation_tok_s for row in rows if row.generation_tok_s]
    if not measured:
        write_instead(axes, "no cell has a measurement")
        axes.set(xticks=[], yticks=[])
        return save_figure(figure, path)
    # Thirty names need more height than three; the width stays that of all pictures.
    figure.set_size_inches(12, max(6.0, 1.8 + 0.38 * len(rows)))
    colours = colours_of(row.strategy for row in rows)
    top = IN_VIEW * max(measured)
    marks = [
        value for row in rows for value in (row.predicted_tok_s, row.limit_tok_s) if value and value <= top
    ]
    end = max(*measured, *marks, 0.0)
    for at, row in enumerate(rows):
        value = row.generation_tok_s
        words = row.status.lower() if value is None else number(value)
        if value:
            axes.barh(at, value, height=0.66, color=colours[row.strategy])
            if row.low_tok_s is not None and row.high_tok_s is not None:
                axes.plot([row.low_tok_s, row.high_tok_s], [at, at], color=BLACK, linewidth=1.8, marker="|")
        if row.limit_tok_s and row.limit_tok_s <= top:
            axes.plot([row.limit_tok_s] * 2, [at - 0.4, at + 0.4], color=BLACK, linewidth=3.5)
        elif row.limit_tok_s:
            words += f", limit {number(row.limit_tok_s)} off scale"
        if row.predicted_tok_s and row.predicted_tok_s <= top:
            axes.plot(row.predicted_tok_s, at, "D", markersize=9, mfc="white", mec=BLACK, mew=2)
        # At the right edge, where no mark can lie.
        axes.text(end * 1.05, at, words, va="center", fontsize=13)
    axes.set_yticks(range(len(rows)), [_plain(shorten(row.name, 40)) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="generated tokens per second", xlim=(0, end * (1.35 if top < _largest(rows) else 1.18)))
    handles: list[Patch | Line2D] = [
        Patch(color=colours[strategy], label=_plain(strategy))
        for strategy in dict.fromkeys(row.strategy for row in rows)
    ]
    handles.append(
        Line2D([], [], color=BLACK, marker="D", mfc="white", mew=2, linestyle="", label="predicted")
    )
    handles.append(
        Line2D([], [], color=BLACK, marker="|", markersize=18, mew=3.5, linestyle="", label="physical limit")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=13)
    return save_figure(figure, path, grid="x")


def draw_latency(rows: Sequence[Row], results: Mapping[str, RunResult], path: Path, name: str) -> Path:
    """The first token and the gap before every following one, a line for each cell: medians of all repeats."""
    figure = new_figure(f"Token latency: {_plain(shorten(name, 60))}")
    axes = figure.subplots()
    axes.set(xlabel="generated token (the first is the time to first token)", ylabel="milliseconds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    colours = colours_of(row.strategy for row in rows)
    drawn: dict[str, int] = {}
    values: list[float] = []
    for row in rows:
        gaps_s = position_medians(results[row.name].itl_s) if row.name in results else []
        points = [(1, row.ttft_s * 1e3)] if row.ttft_s else []
        points += [(token, gap_s * 1e3) for token, gap_s in enumerate(gaps_s, start=2) if gap_s > 0]
        if not points:
            continue
        order = drawn[row.strategy] = drawn.get(row.strategy, -1) + 1
        label = _plain(shorten(row.name, 32)) if sum(drawn.values()) + len(drawn) <= NAMED_LINES else None
        axes.plot(
            [token for token, _ in points],
            [value for _, value in points],
            color=colours[row.strategy],
            linestyle=_DASHES[order % len(_DASHES)],
            linewidth=2,
            marker="o" if len(points) <= 64 else "",
            markersize=4,
            label=label,
        )
        values += [min(value for _, value in points), max(value for _, value in points)]
    if not values:
        write_instead(axes, "no token was timed")
    elif max(values) / min(values) > LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        # As in the report: few enough marks to be read.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, max(values) * 1.15)
    draw_legend(figure, columns=4)
    return save_figure(figure, path)


def _largest(rows: Sequence[Row]) -> float:
    return max((row.limit_tok_s or 0.0 for row in rows), default=0.0)


def _plain(text: str) -> str:
    """A name in which no dollar begins a formula."""
    return " ".join(text.replace("$", r"\$").split())
