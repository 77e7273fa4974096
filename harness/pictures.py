"""The two pictures of a run: token latency over position, memory over time.

PNG files of 1200 x 600 pixels, legible when shrunk to a browser pane. Colours are Okabe and Ito's, told
apart under the common colour blindnesses, and no line is told by its colour alone. Draws from the
records only; knows nothing of MLflow.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.results import RunResult, Timeline
from harness.summary import position_medians

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
GIB = 2.0**30
# Past this many times the highest sample a cap or a level would squash the curves; words then tell it.
IN_VIEW = 2.5
ABOVE = " (off scale)"

_DASHES = ((0, ()), (0, (6, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)))


def draw_token_latency(result: RunResult, path: Path) -> Path:
    """Draw how long each token took: the first one apart, then the gap before every following token.

    Repeats are faint, their median bold. The first token has an axis of its own, since prefill takes
    many times a decode step and would flatten the rest. Without samples the picture says so.
    """
    figure = _figure(f"Token latency: {result.strategy} on {_model(result)}")
    first, rest = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 6)})
    ttft_ms = [repeat.metrics["ttft_s"] * 1e3 for repeat in result.repeats if "ttft_s" in repeat.metrics]
    _draw_first_token(first, ttft_ms)
    _draw_gaps(rest, [[gap * 1e3 for gap in row] for row in result.itl_s if row], result.metrics)
    _draw_legend(figure, columns=4)
    return _save(figure, path)


def draw_memory(timeline: Timeline, result: RunResult, path: Path) -> Path:
    """Draw resident and device memory over the life of the run, its phases shaded, its caps as lines.

    Caps are `gpu_mem` and `cpu_mem` of `result.params`, in bytes.
    """
    figure = _figure(f"Memory over time: {result.strategy} on {_model(result)}")
    axes = figure.subplots()
    lines = {
        "rss_bytes": ("process RSS", BLUE),
        "gpu_0_memory_bytes": ("GPU 0, all processes", PINK),
        "device_reserved_bytes": ("device, reserved", GREEN),
        "device_allocated_bytes": ("device, allocated", ORANGE),
    }
    highest = 0.0
    for number, (name, (label, colour)) in enumerate(lines.items()):
        points = _points(timeline, name)
        # A device series that is nought throughout is a machine without a device.
        if not points or not any(value for _, value in points):
            continue
        times, gib = [time for time, _ in points], [value / GIB for _, value in points]
        highest = max(highest, *gib)
        # The peak is told in the legend: labels on curves that lie close together cover each other.
        label = f"{label}, peak {_gib(max(gib))}"
        axes.plot(times, gib, color=colour, linestyle=_DASHES[number], linewidth=2.4, label=label)
        axes.plot(times[_argmax(gib)], max(gib), "o", color=colour, markersize=7)
    if highest == 0.0:
        _say(axes, "no memory samples")
    _draw_caps(axes, result, highest)
    end = max([*timeline.time_s, *(stop for _, _, stop in timeline.phases), 1e-3])
    _shade_phases(axes, timeline.phases, end)
    axes.set(xlabel="time since the start of the run (s)", ylabel="memory (GiB)", xlim=(0, end))
    axes.set_ylim(0, max(axes.get_ylim()[1], 1e-3))
    _draw_legend(figure, columns=3)
    return _save(figure, path)


def _draw_first_token(axes: Axes, ttft_ms: Sequence[float]) -> None:
    axes.set(title="first token", ylabel="time to first token (ms)", xlim=(-1, 1), xticks=[])
    if not ttft_ms:
        _say(axes, "none")
        return
    axes.bar([0], [median(ttft_ms)], width=0.9, color=BLUE, alpha=0.85)
    spread = [(number + 0.5) / len(ttft_ms) * 0.6 - 0.3 for number in range(len(ttft_ms))]
    axes.plot(spread, ttft_ms, "o", color="white", markeredgecolor="black", markersize=6)
    axes.set_ylim(0, max(ttft_ms) * 1.18 or 1)
    axes.text(0, max(ttft_ms) * 1.04, _ms(median(ttft_ms)), ha="center", fontsize=14, fontweight="bold")


def _draw_gaps(axes: Axes, rows_ms: Sequence[Sequence[float]], metrics: dict[str, float]) -> None:
    axes.set(title="following tokens", xlabel="generated token", ylabel="gap before the token (ms)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not rows_ms:
        _say(axes, "no gaps between tokens were measured")
        return
    # The first token is number 1, so the first gap lies before token 2.
    for number, row in enumerate(rows_ms):
        label = f"each repeat ({len(rows_ms)})" if number == 0 else None
        axes.plot(range(2, len(row) + 2), row, color=BLUE, alpha=0.3, linewidth=1.2, label=label)
    middle = position_medians(rows_ms)
    dots = "o" if len(middle) <= 64 else ""
    label = f"median: {_ms(median(middle))} ms"
    axes.plot(
        range(2, len(middle) + 2), middle, color=BLUE, linewidth=2.6, marker=dots, markersize=4, label=label
    )
    highest_ms = max(map(max, rows_ms))
    top_ms = highest_ms
    for name, words, colour in (("predicted_tpot_s", "predicted", ORANGE), ("limit_tpot_s", "limit", GREEN)):
        if (level_s := metrics.get(name)) is not None:
            level_ms = level_s * 1e3
            label = f"{words}: {_ms(level_ms)} ms"
            if level_ms <= highest_ms * IN_VIEW:
                axes.axhline(level_ms, color=colour, linestyle="--", linewidth=2, label=label)
                top_ms = max(top_ms, level_ms)
            else:
                axes.plot([], [], color=colour, linestyle="--", linewidth=2, label=label + ABOVE)
    axes.set_ylim(0, top_ms * 1.25 or 1)


def _draw_caps(axes: Axes, result: RunResult, highest_gib: float) -> None:
    for name, colour in (("gpu_mem", PINK), ("cpu_mem", BLUE)):
        cap_bytes = result.params.get(name)
        if not isinstance(cap_bytes, int | float) or not cap_bytes:
            continue  # no cap was set
        cap_gib = cap_bytes / GIB
        label = f"--{name.replace('_', '-')} cap, {_gib(cap_gib)}"
        if cap_gib <= highest_gib * IN_VIEW:
            axes.axhline(cap_gib, color=colour, linestyle=":", linewidth=2.2, label=label)
        else:
            axes.plot([], [], color=colour, linestyle=":", label=label + ABOVE)


def _draw_legend(figure: Figure, *, columns: int) -> None:
    if any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        # Below the axes it covers neither a curve nor a phase.
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=13)


def _shade_phases(axes: Axes, phases: Sequence[tuple[str, float, float]], end_s: float) -> None:
    for number, (name, start_s, stop_s) in enumerate(phases):
        shade = "#ececec" if number % 2 == 0 else "#f7f7f7"
        axes.axvspan(start_s, stop_s, color=shade, zorder=0, linewidth=0)
        # About 90 characters fit across; a name that does not fit its span gives way to its number.
        room = int(90 * (stop_s - start_s) / end_s)
        digits = "".join(re.findall(r"\d+$", name))
        text = name if len(name) <= room else digits if len(digits) <= room else ""
        if text:
            middle = (start_s + stop_s) / 2
            axes.text(
                middle, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", color=GREY, fontsize=12
            )


def _points(timeline: Timeline, name: str) -> list[tuple[float, float]]:
    values = timeline.series.get(name, [])
    return [(time, value) for time, value in zip(timeline.time_s, values, strict=False) if value is not None]


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _gib(gib: float) -> str:
    return f"{gib:.3g} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _model(result: RunResult) -> str:
    # A local path would fill the title; its last part is its name.
    name = result.model.rstrip("/")
    return name if name.count("/") <= 1 else name.rsplit("/", 1)[-1]


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=GREY, fontsize=12)


def _figure(title: str) -> Figure:
    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=17, fontweight="bold")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, axis="y", alpha=0.35)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=13)
        axes.xaxis.label.set_fontsize(14)
        axes.yaxis.label.set_fontsize(14)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so a viewer never meets half a picture.
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path
