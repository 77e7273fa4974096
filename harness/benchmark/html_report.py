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

from harness.benchmark import figure_parts, figures, figures_of_plans, figures_over_time, report_facts
from harness.benchmark.record import Benchmark, Cell, cell_folder, read_cells
from harness.benchmark.table import Row, finite, rows_of
from harness.benchmark.table_text import columns_of, failures
from harness.results import RunResult, Timeline, write_text

log = logging.getLogger(__name__)

PICTURES = ("throughput.png", "latency.png")
_PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A plot in the page: what it shows in words, and plotly's figure."""

    key: str
    words: str
    figure: figure_parts.Figure


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
    colours = figure_parts.colours_of(row.strategy for row in rows)
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
        verdicts=list(report_facts.verdicts(rows)),
        counts=report_facts.counts(benchmark),
        facts=list(report_facts.facts(benchmark, results)),
        columns=columns_of(rows),
        rows=rows,
        colours=colours,
        failures=list(failures(rows)),
        warnings=list(report_facts.warnings(results)),
        plans=report_facts.plan_table(rows, results),
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
            "Shares of the bytes that lie in device memory, in host memory and on disk. Without a GPU the device is the CPU, "
            "and both memories are the machine's.",
            figures_of_plans.policies(rows, results),
        ),
        (
            "time",
            "Bars are measured. Small marks are the seconds that each resource was expected to be at work; they overlap, so "
            "they do not add up. The one nearest to the bar's end sets the pace.",
            figures_of_plans.time_by_resource(rows, results),
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
    memory = figures_over_time.highest_memory([timeline for timeline, _ in found.values()])
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
                figures_over_time.traffic_over_time(timeline),
            ),
        )
        panels = [
            Panel(key=f"{key}-{index}", words=words, figure=figure) for key, words, figure in drawn if figure
        ]
        if panels:
            colour = colours.get(row.strategy, figure_parts.OTHER_COLOURS[-1])
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


def _pictures(folder: Path) -> Iterator[str]:
    """Drawn pictures as data addresses, for where no script may run."""
    for name in PICTURES:
        if (path := folder / name).is_file():
            yield "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


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
