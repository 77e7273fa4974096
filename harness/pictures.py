"""The pictures of a run: token latency over position, memory over time, the plan beside what was measured.

PNG files of 1200 x 600 pixels, legible when shrunk to a browser pane. Colours are Okabe and Ito's, told
apart under the common colour blindnesses, and no line is told by its colour alone. Draws from the
records only; knows nothing of MLflow.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal

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
    figure = new_figure(f"Token latency: {result.strategy} on {_model(result)}")
    first, rest = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 6)})
    ttft_ms = [repeat.metrics["ttft_s"] * 1e3 for repeat in result.repeats if "ttft_s" in repeat.metrics]
    _draw_first_token(first, ttft_ms)
    _draw_gaps(rest, [[gap * 1e3 for gap in row] for row in result.itl_s if row], result.metrics)
    draw_legend(figure, columns=4)
    return save_figure(figure, path)


def draw_memory(timeline: Timeline, result: RunResult, path: Path) -> Path:
    """Draw resident and device memory over the life of the run, its phases shaded, its caps as lines.

    Caps are `gpu_mem` and `cpu_mem` of `result.params`, in bytes.
    """
    figure = new_figure(f"Memory over time: {result.strategy} on {_model(result)}")
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
        # The run's own may have come between two samples.
        recorded = result.metrics.get("peak_rss_bytes", 0.0) / GIB if name == "rss_bytes" else 0.0
        label = f"{label}, peak {_gib(max(*gib, recorded))}"
        axes.plot(times, gib, color=colour, linestyle=_DASHES[number], linewidth=2.4, label=label)
        axes.plot(times[_argmax(gib)], max(gib), "o", color=colour, markersize=7)
    if highest == 0.0:
        write_instead(axes, "no memory samples")
    _draw_caps(axes, result, highest)
    end = max([*timeline.time_s, *(stop for _, _, stop in timeline.phases), 1e-3])
    _shade_phases(axes, timeline.phases, end)
    axes.set(xlabel="time since the start of the run (s)", ylabel="memory (GiB)", xlim=(0, end))
    axes.set_ylim(0, max(axes.get_ylim()[1], 1e-3))
    draw_legend(figure, columns=3)
    return save_figure(figure, path)


def draw_plan(result: RunResult, path: Path) -> Path:
    """Draw what the plan said of each phase, beside what was measured and the limit: seconds of all prompts.

    Thin bars are the seconds that each resource was to be at work, thick ones the phase as a whole. Measured are
    medians over the repeats, which whiskers span.
    """
    figure = new_figure(f"Plan and measurement: {result.strategy} on {_model(result)}")
    axes = figure.subplots(1, 2)
    for phase, one in zip(("prefill", "decode"), axes, strict=True):
        _draw_phase(one, phase, result)
    draw_legend(figure, columns=4)
    return save_figure(figure, path, grid="x")


def _draw_phase(axes: Axes, phase: str, result: RunResult) -> None:
    axes.set(title=phase, xlabel="seconds, all prompts")
    predicted, limit = result.plan.get("predicted") or {}, result.plan.get("limit") or {}
    busy_s = sorted(predicted.get(f"{phase}_busy_s", {}).items(), key=lambda item: -item[1])
    measured_s = [value for one in result.repeats if (value := one.metrics.get(f"{phase}_s")) is not None]
    bound = predicted.get(f"{phase}_bound")
    # From the top: what was measured, what it is to be held against, what the prediction is made of.
    bars: list[tuple[str, float, str, float]] = []
    if measured_s:
        bars.append(("measured", median(measured_s), BLUE, 0.8))
    bars += [
        (name, estimate[f"{phase}_s"], colour, 0.8)
        for name, estimate, colour in (("predicted", predicted, ORANGE), ("limit", limit, GREEN))
        if estimate
    ]
    bars += [
        (f"{name}, binds" if name == bound else name, seconds, GREY, 0.45)
        for name, seconds in busy_s
        if seconds
    ]
    longest = max([*(seconds for _, seconds, _, _ in bars), *measured_s], default=0.0)
    if longest == 0.0:
        write_instead(axes, "no time was planned or measured")
        axes.set(xticks=[], yticks=[])
        return
    for row, (name, seconds, colour, height) in enumerate(bars):
        label = "a resource at work, predicted" if colour == GREY and bars[row - 1][2] != GREY else None
        axes.barh(
            row, seconds, height=height, color=colour, alpha=0.85, label=label if phase == "decode" else None
        )
        end = max([seconds, *measured_s]) if name == "measured" else seconds
        axes.text(end + longest * 0.03, row, _s(seconds), va="center", fontsize=13)
    if len(measured_s) > 1:
        axes.plot([min(measured_s), max(measured_s)], [0, 0], color="black", linewidth=2, marker="|")
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.22)


def _draw_first_token(axes: Axes, ttft_ms: Sequence[float]) -> None:
    axes.set(title="first token", ylabel="time to first token (ms)", xlim=(-1, 1), xticks=[])
    if not ttft_ms:
        write_instead(axes, "none")
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
        write_instead(axes, "no gaps between tokens were measured")
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
        # Beside what a cap counts, host memory holds the process itself.
        what = "cap" if name == "gpu_mem" and result.plan.get("device") == "cuda" else "of model"
        label = f"--{name.replace('_', '-')} {what}, {_gib(cap_gib)}"
        if cap_gib <= highest_gib * IN_VIEW:
            axes.axhline(cap_gib, color=colour, linestyle=":", linewidth=2.2, label=label)
        else:
            axes.plot([], [], color=colour, linestyle=":", label=label + ABOVE)


def draw_legend(figure: Figure, *, columns: int) -> None:
    """A legend below all axes, where there is anything to tell."""
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


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{_ms(seconds * 1e3)} ms"


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


def write_instead(axes: Axes, words: str) -> None:
    """Words in the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=GREY, fontsize=12)


def new_figure(title: str) -> Figure:
    """A figure of 1200 x 600 pixels."""
    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=17, fontweight="bold")
    return figure


def save_figure(figure: Figure, path: Path, *, grid: Literal["x", "y"] = "y") -> Path:
    """Write the figure as PNG, atomically, in the style that all pictures share."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, axis=grid, alpha=0.35)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=13)
        axes.xaxis.label.set_fontsize(14)
        axes.yaxis.label.set_fontsize(14)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so a viewer never meets half a picture.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with warnings.catch_warnings():
            # Names in a script that the font lacks show as boxes.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
