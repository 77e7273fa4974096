"""A benchmark's report: one HTML file that needs nothing else, neither a network nor a server.

It opens from a disk and inside a sandboxed frame that allows scripts (MLflow's); where scripts are not run, the table and
the drawn pictures still show. Reads benchmark.json and cells/ alone, so it can be written for a benchmark that is half
done or was copied from another machine. What the plots show is figures.py's; the page is page/report.html.jinja.
"""

import base64
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.benchmark import figures, figures_over_time
from harness.benchmark.record import Benchmark, Cell, cell_folder, read_cells
from harness.benchmark.table import Row, finite, rows_of
from harness.benchmark.table_text import columns_of, failures, number, percent, size
from harness.results import RunResult, Timeline, write_text

log = logging.getLogger(__name__)

PICTURES = ("throughput.png", "latency.png")
_PLAN_TITLES = (
    "batch",
    "micro-batches",
    "loads ahead",
    "attention and MLP",
    "host weights",
    "weights",
    "KV cache",
    "expected bound",
    "limit's bound",
    "to device",
    "from device",
    "read from disk",
)
_PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A plot in the page: what it shows in words, and plotly's figure."""

    key: str
    words: str
    figure: figures.Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class CellPanels:
    """A cell's plots over time; `launch` says which of its processes they show."""

    name: str
    colour: str
    launch: str
    panels: Sequence[Panel]


def write_report(folder: Path) -> Path:
    """Write `folder/report.html`, some 5 MB, nearly all of it plotly's code, and return its path.

    Where plotly is not installed the report has the tables and the drawn pictures, and says so.

    Raises:
        UsageError: benchmark.json or a cell's result cannot be read.
    """
    import jinja2
    from markupsafe import Markup

    benchmark = Benchmark.read(folder)
    results = read_cells(folder, benchmark)
    rows = rows_of(benchmark, results)
    colours = figures.colours_of(row.strategy for row in rows)
    library = _plotly()
    panels = _panels(rows, results)
    over_time = _over_time(folder, benchmark, rows, colours)
    drawn = [*panels, *(panel for cell in over_time for panel in cell.panels)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.jinja").render(
        benchmark=benchmark,
        verdicts=list(_verdicts(rows)),
        counts=_counts(benchmark),
        facts=list(_facts(benchmark, results)),
        columns=columns_of(rows),
        rows=rows,
        colours=colours,
        failures=list(failures(rows)),
        warnings=list(_warnings(results)),
        plans=_plan_table(rows, results),
        panels={panel.key: panel for panel in panels},
        over_time=over_time,
        pictures=list(_pictures(folder)),
        figures=Markup(_script_json({panel.key: panel.figure for panel in drawn} if library else {})),
        library=Markup(library),
        has_library=bool(library),
        style=Markup((_PAGE / "report.css").read_text(encoding="utf-8")),
        script=Markup((_PAGE / "report.js").read_text(encoding="utf-8")),
        written_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    return write_text(folder / "report.html", html)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        log.warning("plotly is not installed here: the report has no plots")
        return ""
    return str(get_plotlyjs())


def _panels(rows: Sequence[Row], results: Mapping[str, RunResult]) -> list[Panel]:
    drawn = (
        (
            "throughput",
            "A bar is the median, its whisker the range over the launches (over the repeats where there was one launch). "
            "The diamond is what the strategy expected, the line the most that the machine's measured rates allow.",
            figures.throughput(rows),
        ),
        (
            "latency",
            "Token 1 is the time to first token; every other point is the gap before that token, median over all repeats.",
            figures.latency(rows, results),
        ),
        (
            "policies",
            "Shares of the bytes that lie in device memory, in host memory and on disk.",
            figures.policies(rows, results),
        ),
        (
            "time",
            "Bars are measured. Small marks are the seconds that each resource was expected to be at work; they overlap, so "
            "they do not add up. The one nearest to the bar's end sets the pace.",
            figures.time_by_resource(rows, results),
        ),
    )
    return [Panel(key=key, words=words, figure=figure) for key, words, figure in drawn if figure]


def _over_time(
    folder: Path, benchmark: Benchmark, rows: Sequence[Row], colours: Mapping[str, str]
) -> list[CellPanels]:
    found = {
        cell.name: shown
        for cell in benchmark.cells
        if (shown := _timeline(cell_folder(folder, cell.name), cell))
    }
    memory, rate = figures_over_time.top_of([timeline for timeline, _ in found.values()])
    cells = []
    for index, row in enumerate(rows):
        if row.name not in found:
            continue
        timeline, launch = found[row.name]
        drawn = (
            ("memory", "Memory", figures_over_time.memory_over_time(timeline, top_bytes=memory)),
            (
                "traffic",
                "Links and disk",
                figures_over_time.traffic_over_time(timeline, top_bytes_per_s=rate),
            ),
        )
        panels = [
            Panel(key=f"{key}-{index}", words=words, figure=figure) for key, words, figure in drawn if figure
        ]
        if panels:
            colour = colours.get(row.strategy, figures.OTHER_COLOURS[-1])
            cells.append(CellPanels(name=row.name, colour=colour, launch=launch, panels=panels))
    return cells


def _timeline(folder: Path, cell: Cell) -> tuple[Timeline, str] | None:
    """The first launch's samples that can be read, and which launch that is; else those of the cell itself."""
    known = [folder / "launches" / uuid for uuid in cell.launches]
    # A launch that was cut short is in no list yet, but its folder may hold samples.
    others = sorted(set((folder / "launches").glob("*")) - set(known))
    for number_, place in enumerate([*known, *others], start=1):
        if timeline := _read_timeline(place / "timeline.json"):
            return timeline, f"launch {number_} of {len(known)}" if len(known) > 1 and number_ <= len(
                known
            ) else ""
    timeline = _read_timeline(folder / "timeline.json")
    return (timeline, "") if timeline else None


def _read_timeline(path: Path) -> Timeline | None:
    try:
        timeline = Timeline.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("%s cannot be read: %s", path, str(error).splitlines()[0])
        return None
    return timeline if timeline.time_s else None


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """One sentence for each workload: which cell was fastest, by how much, and how near to the limit."""
    measured = [row for row in rows if row.generation_tok_s]
    for workload in dict.fromkeys(row.workload_key for row in measured):
        group = [row for row in measured if row.workload_key == workload]
        best = max(group, key=lambda row: row.generation_tok_s or 0.0)
        words = [f"{best.name} is the fastest" if len(group) > 1 else f"{best.name} makes"]
        words.append(f"{'at ' if len(group) > 1 else ''}{number(best.generation_tok_s or 0)} tokens/s")
        text = " ".join(words)
        if best.ratio_to_baseline and best.baseline != best.name:
            text += f", {number(best.ratio_to_baseline)}x the baseline {best.baseline}"
        if best.attainment:
            text += f", {percent(best.attainment)} of the physical limit"
        several = len({row.workload_key for row in measured}) > 1
        yield f"{workload}: {text}." if several and workload else f"{text}."
    if not measured:
        done = any(row.status == "FAILED" for row in rows)
        yield "No cell has a measurement" + (": see the failures below." if done else " yet.")
    differing = [row.name for row in rows if row.parity is not None and row.parity < 1]
    if differing:
        where = ", ".join(differing) if len(differing) <= 4 else f"{len(differing)} of {len(rows)} cells"
        yield f"Not all tokens equal those of the baseline in {where}."


def _counts(benchmark: Benchmark) -> str:
    states = [cell.status.value.lower() for cell in benchmark.cells]
    parts = [
        f"{states.count(state)} {state}" for state in ("finished", "failed", "pending") if state in states
    ]
    return (
        f"{len(states)} cell{'' if len(states) == 1 else 's'}: {', '.join(parts)}" if states else "no cells"
    )


def _facts(benchmark: Benchmark, results: Mapping[str, RunResult]) -> Iterator[tuple[str, str]]:
    origin = benchmark.provenance
    models = dict.fromkeys(result.model for result in results.values())
    if models:
        yield "model", ", ".join(models)
    yield "compared", _compared(benchmark)
    machine = ", ".join(
        text
        for text in (benchmark.hardware_summary, origin.host, f"fingerprint {benchmark.hardware_fingerprint}")
        if text and not text.endswith(" ")
    )
    yield "machine", machine or "unknown"
    if origin.git_commit:
        dirty = ", with uncommitted changes" if origin.git_dirty else ""
        yield (
            "commit",
            f"{origin.git_commit[:12]}{f' ({origin.git_branch})' if origin.git_branch else ''}{dirty}",
        )
    else:
        yield "commit", "unknown"
    for text in dict.fromkeys(_prompts(result) for result in results.values() if result.dataset):
        yield "prompts", text
    yield "baseline", benchmark.baseline
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(benchmark.started_at_ms / 1000))
    took = ""
    if benchmark.ended_at_ms:
        took = f", took {_duration((benchmark.ended_at_ms - benchmark.started_at_ms) / 1000)}"
    yield "started", started + took
    yield "launches", f"{benchmark.launches} for each cell, every one a process of its own"
    versions = origin.versions
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if origin.command:
        yield "command", origin.command


def _compared(benchmark: Benchmark) -> str:
    values: dict[str, dict[str, None]] = {}
    for cell in benchmark.cells:
        for name, value in cell.axes.items():
            values.setdefault(name, {})[str(value)] = None
    return "; ".join(f"{name} {', '.join(known)}" for name, known in values.items()) or "one cell"


def _prompts(result: RunResult) -> str:
    data = result.dataset
    assert data is not None
    return f"{data.num_prompts} of {data.name}, digest {data.digest[:12]}"


def _warnings(results: Mapping[str, RunResult]) -> Iterator[tuple[str, str]]:
    """Each warning once, with the cells that gave it."""
    cells: dict[str, list[str]] = {}
    for name, result in results.items():
        for warning in result.warnings:
            cells.setdefault(warning, []).append(name)
    for warning, names in cells.items():
        yield ("all cells" if len(names) == len(results) > 1 else ", ".join(names)), warning


def _plan_table(rows: Sequence[Row], results: Mapping[str, RunResult]) -> dict[str, list[str]]:
    """Title to a text per row: what tells the plans apart; titles that no plan knows are left out."""
    table: dict[str, list[str]] = {title: [] for title in _PLAN_TITLES}
    for index, row in enumerate(rows):
        for title, text in _plan_facts(results.get(row.name)):
            table[title] = table[title] or ["-"] * len(rows)
            table[title][index] = text
    return {title: texts for title, texts in table.items() if texts}


def _plan_facts(result: RunResult | None) -> Iterator[tuple[str, str]]:
    if result is None or not (plan := result.plan):
        return
    policy = plan.get("policy") or {}
    if plan.get("batch_size"):
        yield "batch", str(plan["batch_size"])
    if policy.get("num_micro_batches"):
        yield "micro-batches", f"{policy['num_micro_batches']} of {policy.get('micro_batch_size', '?')}"
    if "overlap" in policy:
        yield "loads ahead", str(policy["overlap"])
    if "sep_layer" in policy:
        yield "attention and MLP", "apart" if policy["sep_layer"] else "together"
    if "pin_weight" in policy:
        yield "host weights", "page-locked" if policy["pin_weight"] else "pageable"
    for name, title in (("weight_bytes", "weights"), ("kv_bytes", "KV cache")):
        sizes = [value for one in (plan.get(name) or {}).values() if (value := finite(one))]
        if sizes:
            yield title, size(sum(sizes))
    for estimate, how in (("predicted", "expected bound"), ("limit", "limit's bound")):
        one = plan.get(estimate) or {}
        bounds = {
            phase: one[f"{phase}_bound"] for phase in ("prefill", "decode") if one.get(f"{phase}_bound")
        }
        if len(set(bounds.values())) == 1:
            yield how, str(next(iter(bounds.values())))
        elif bounds:
            yield how, ", ".join(f"{name} in {phase}" for phase, name in bounds.items())
    moved = (plan.get("predicted") or {}).get("decode_moved_bytes") or {}
    for link, title in (("h2d", "to device"), ("d2h", "from device"), ("disk_read", "read from disk")):
        if value := finite(moved.get(link)):
            yield title, size(value)


def _pictures(folder: Path) -> Iterator[str]:
    """Drawn pictures as data addresses, for where no script may run."""
    for name in PICTURES:
        if (path := folder / name).is_file():
            yield "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _duration(length_s: float) -> str:
    minutes, rest = divmod(round(length_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _script_json(value: Mapping[str, Any]) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin another."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """Figures of six digits are finer than a screen; what is not finite is unknown."""
    if isinstance(value, float):
        known = finite(value)
        return None if known is None else float(f"{known:.6g}")
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
