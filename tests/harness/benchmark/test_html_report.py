"""The report: complete in one file, safe whatever the names, drawn by plotly, and right about half-finished benchmarks."""

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import (
    BENCHMARK_UUID,
    make_benchmark,
    make_benchmark_folder,
    make_cell,
    make_cell_result,
)

from flexllmgen.errors import UsageError
from harness.benchmark.figure_parts import colours_of, label
from harness.benchmark.figures import MAX_POINTS, latency, thinned, throughput
from harness.benchmark.figures_of_plans import policies, shares_of, time_by_resource
from harness.benchmark.figures_over_time import memory_over_time, rates_of, traffic_over_time
from harness.benchmark.html_report import write_report
from harness.benchmark.pictures import draw_benchmark
from harness.benchmark.record import Benchmark, CellStatus, read_cells
from harness.benchmark.report_facts import verdicts
from harness.benchmark.table import Row, fastest, rows_of
from harness.results import RunResult, RunStatus, Timeline, write_text

NASTY = "</script><script>alert(1)</script>&\"'<b>größe</b> 大"
PANELS = ["throughput", "latency", "policies", "time"]


class Page(HTMLParser):
    """Elements, the addresses they would load from, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action"):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self._inside[-1:] != ["style"]:
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def figures(self) -> dict[str, Any]:
        """The figures' descriptions; a constant that JSON does not know is refused."""
        return json.loads(self.scripts[0], parse_constant=pytest.fail)  # type: ignore[no-any-return]


def report_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def drawn(folder: Path) -> tuple[list[Row], dict[str, RunResult]]:
    benchmark = Benchmark.read(folder)
    results = dict(read_cells(folder, benchmark))
    return rows_of(benchmark, results), results


def check_with_plotly(figures: dict[str, Any]) -> None:
    """plotly refuses names and values that it does not know."""
    import plotly.graph_objects as go

    for figure in figures.values():
        text = json.dumps(figure).replace('"$ink"', '"#000"').replace('"$muted"', '"#555"')
        go.Figure(json.loads(text.replace('"$shade"', '"#eee"')))


def test_the_report_is_complete_in_itself(tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path, failed=["flexgen-b8"], lost=["autoflex-b8"])
    page = report_of(folder)
    assert page.loads == []
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    assert page.tags.count("script") == 3
    # A sandboxed frame without an origin throws at the first touch of these.
    own = page.scripts[2]
    assert not re.search(r"localStorage|sessionStorage|document\.cookie|fetch\(|XMLHttpRequest|import\(", own)
    for words in (
        "1x NVIDIA T4 (15 GiB)",
        "4f1c2d900000",
        "digest feedbeeffeed",
        "autoflex-b4 is the fastest at 11.2 tokens/s, 2.40x the baseline accelerate-b4, 62% of the physical limit",
        "6 cells: 4 finished, 2 failed",
        "lower --batch-size; device peak predicted 5.76 GiB, actual 7.90 GiB",
        "2 of 4",
    ):
        assert words in page.text, words
    assert (folder / "report.html").stat().st_size < 6_000_000
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_every_plot_has_its_place_and_is_known_to_plotly(tmp_path: Path) -> None:
    page = report_of(make_benchmark_folder(tmp_path, failed=["flexgen-b8"]))
    figures = page.figures
    assert list(figures)[:4] == PANELS
    # The failed cell has a timeline too: where it ended is worth seeing.
    assert len([key for key in figures if key.startswith(("memory-", "traffic-"))]) == 12
    assert {f"plot-{key}" for key in figures} <= set(page.ids)
    check_with_plotly(figures)


def test_bars_marks_and_whiskers_say_what_the_table_says(tmp_path: Path) -> None:
    rows, _ = drawn(make_benchmark_folder(tmp_path))
    figure = throughput(rows)
    assert figure is not None
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert set(traces) == {"accelerate", "flexgen", "autoflex", "predicted", "physical limit"}
    row = rows[4]
    at = traces[row.strategy]["y"].index(4)
    bar = traces[row.strategy]
    assert bar["x"][at] == row.generation_tok_s
    assert bar["x"][at] + bar["error_x"]["array"][at] == pytest.approx(row.high_tok_s)
    assert bar["x"][at] - bar["error_x"]["arrayminus"][at] == pytest.approx(row.low_tok_s)
    assert traces["physical limit"]["x"][4] == row.limit_tok_s
    assert traces["predicted"]["x"][4] == row.predicted_tok_s


def test_a_limit_out_of_sight_is_told_in_words() -> None:
    rows = [Row(name="a", strategy="flexgen", status="FINISHED", generation_tok_s=2.0, limit_tok_s=5000.0)]
    figure = throughput(rows)
    assert figure is not None
    assert [trace["name"] for trace in figure["data"]] == ["flexgen"]
    assert "limit 5,000 off scale" in figure["layout"]["yaxis"]["ticktext"][0]


def test_a_winner_within_the_spread_is_told_with_it() -> None:
    def row(name: str, low: float, high: float) -> Row:
        middle = (low + high) / 2
        return Row(
            name=name,
            strategy=name,
            status="FINISHED",
            generation_tok_s=middle,
            low_tok_s=low,
            high_tok_s=high,
        )

    close = [row("a", 9.0, 12.0), row("b", 9.5, 10.0), row("c", 1.0, 2.0)]
    assert list(verdicts(close)) == ["a is the fastest at 10.5 tokens/s; its range overlaps that of b."]
    assert list(verdicts([close[0], close[2]])) == ["a is the fastest at 10.5 tokens/s."]
    # One that was cut short may have been fast until then.
    cut_short = replace(row("d", 20.0, 21.0), status="FAILED", reason="OutOfMemory: no more")
    assert list(verdicts([*close, cut_short])) == list(verdicts(close))
    assert fastest([*close, cut_short]) == close[0]
    assert fastest([cut_short]) is None


def test_names_are_text_everywhere(tmp_path: Path) -> None:
    cell = make_cell("flexgen", 4, axes={"strategy": NASTY, "batch_size": 4}, name="a&b <i>")
    result = make_cell_result(make_cell("flexgen", 4)).model_copy(
        update={"strategy": NASTY, "model": NASTY, "warnings": [NASTY]}
    )
    benchmark = make_benchmark(
        name=NASTY, suite=NASTY, cells=[cell], baseline=NASTY, hardware_summary=NASTY, parity={}
    )
    folder = tmp_path / "b"
    benchmark.write(folder)
    result.write(folder / "cells" / cell.name)
    page = report_of(folder)
    assert page.tags.count("script") == 3
    assert not {"b", "i"} & set(page.tags)
    assert page.text.count(" ".join(NASTY.split())) >= 5
    # plotly reads some markup in its texts.
    bar = page.figures["throughput"]["data"][0]
    assert "<b>gr" not in bar["name"]
    assert "&lt;" in bar["name"]
    assert page.figures["throughput"]["layout"]["yaxis"]["ticktext"][0].startswith("a&amp;b &lt;i&gt;<br>")


def test_all_failed_still_makes_a_report(tmp_path: Path) -> None:
    names = [cell.name for cell in make_benchmark().cells]
    page = report_of(make_benchmark_folder(tmp_path, lost=names))
    assert page.figures == {}
    assert "No cell has a measurement: see the failures below." in page.text
    assert page.text.count("OutOfMemory") == 6
    assert not {"throughput", "latency", "policies", "time", "over-time", "plans"} & set(page.ids)


def test_half_a_benchmark_makes_a_report(tmp_path: Path) -> None:
    cells = [make_cell("flexgen", 4), make_cell("autoflex", 4, status=CellStatus.PENDING)]
    folder = make_benchmark_folder(
        tmp_path, make_benchmark(cells=cells, status=RunStatus.RUNNING, ended_at_ms=None, parity={})
    )
    (folder / "cells" / "autoflex-b4" / "result.json").unlink()
    page = report_of(folder)
    assert "running" in page.text
    assert "2 cells: 1 finished, 1 pending" in page.text
    assert list(page.figures)[:4] == PANELS
    assert "pending" in page.figures["throughput"]["layout"]["yaxis"]["ticktext"][1]


def test_nothing_measured_yet(tmp_path: Path) -> None:
    cells = [make_cell("flexgen", 4, status=CellStatus.PENDING, launches=[])]
    make_benchmark(cells=cells, status=RunStatus.RUNNING, parity={}).write(tmp_path)
    assert "No cell has a measurement yet." in report_of(tmp_path).text


def test_one_cell_and_no_timelines(tmp_path: Path) -> None:
    cell = make_cell("autoflex", 4)
    folder = make_benchmark_folder(tmp_path, make_benchmark(cells=[cell]), launch_folders=False)
    (folder / "cells" / cell.name / "timeline.json").unlink()
    page = report_of(folder)
    assert list(page.figures) == PANELS
    assert "over-time" not in page.ids
    assert "autoflex-b4 makes 11.2 tokens/s" in page.text


def test_a_damaged_timeline_is_passed_over(tmp_path: Path) -> None:
    cell = make_cell("autoflex", 4)
    folder = make_benchmark_folder(tmp_path, make_benchmark(cells=[cell]))
    write_text(folder / "cells" / cell.name / "launches" / cell.launches[0] / "timeline.json", "{")
    page = report_of(folder)
    assert "memory-0" in page.figures
    assert "launch 2 of 2" in page.text


def test_without_predictions_and_plans(tmp_path: Path) -> None:
    cell = make_cell("autoflex", 4)
    folder = make_benchmark_folder(tmp_path, make_benchmark(cells=[cell]))
    result = make_cell_result(cell)
    kept = {
        name: value for name, value in result.metrics.items() if not name.startswith(("predicted", "limit"))
    }
    kept.pop("attainment")
    result.model_copy(update={"metrics": kept, "plan": {}}).write(folder / "cells" / cell.name)
    page = report_of(folder)
    assert [trace["name"] for trace in page.figures["throughput"]["data"]] == ["autoflex"]
    assert [trace["name"] for trace in page.figures["time"]["data"]] == ["autoflex, measured"] * 2
    assert "policies" not in page.figures
    assert "of the physical limit." not in page.text
    check_with_plotly(page.figures)


def test_thirty_cells_stay_apart(tmp_path: Path) -> None:
    strategies = ("accelerate", "flexgen", "autoflex")
    cells = [make_cell(strategy, 4, name=f"{strategy}-{n}") for n in range(10) for strategy in strategies]
    rows, results = drawn(make_benchmark_folder(tmp_path, make_benchmark(cells=cells), launch_folders=False))
    figure = throughput(rows)
    assert figure is not None
    assert figure["layout"]["height"] >= 30 * 40
    lines = latency(rows, results)
    assert lines is not None
    assert len({(t["line"]["color"], t["line"]["dash"]) for t in lines["data"]}) == 15
    assert len({t["line"]["color"] for t in lines["data"] if t["name"].startswith("flexgen")}) == 1


def test_latency_takes_repeats_of_different_lengths() -> None:
    cell = make_cell("flexgen", 4)
    result = make_cell_result(cell, itl_s=[[0.1, 0.2, 0.3], [0.3], []])
    rows = rows_of(make_benchmark(cells=[cell]), {cell.name: result})
    figure = latency(rows, {cell.name: result})
    assert figure is not None
    (line,) = figure["data"]
    assert line["x"] == [1, 2, 3, 4]
    assert line["y"][1:] == [200.0, 200.0, 300.0]
    assert figure["layout"]["yaxis"]["type"] == "log"


def test_latency_is_linear_where_all_is_near() -> None:
    cell = make_cell("flexgen", 4)
    result = make_cell_result(cell, itl_s=[[0.9, 0.8]])
    rows = rows_of(make_benchmark(cells=[cell]), {cell.name: result})
    figure = latency(rows, {cell.name: result})
    assert figure is not None
    assert "type" not in figure["layout"]["yaxis"]
    assert figure["layout"]["yaxis"]["rangemode"] == "tozero"


def test_long_series_are_thinned_by_medians() -> None:
    points = thinned([(float(n), 7.0 if n % 2 else 9.0) for n in range(5000)])
    assert len(points) <= MAX_POINTS
    assert {value for _, value in points} <= {7.0, 8.0, 9.0}
    assert thinned([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_shares_are_those_of_bytes_placed_before_planned_before_asked() -> None:
    def result(**plan: Any) -> RunResult:
        return make_cell_result(make_cell("flexgen", 4)).model_copy(update={"plan": plan})

    placed, planned = {"gpu": 1, "cpu": 3, "disk": 0}, {"gpu": 1, "cpu": 1, "disk": 0}
    asked = {"weights": {"gpu": 20.0, "cpu": 0.0, "disk": 80.0}}
    both = result(placed_weight_bytes=placed, weight_bytes=planned, shares=asked)
    assert shares_of(both, "weights") == {"gpu": 0.25, "cpu": 0.75, "disk": 0.0}
    assert shares_of(result(weight_bytes=planned), "weights") == {"gpu": 0.5, "cpu": 0.5, "disk": 0.0}
    assert shares_of(result(shares=asked), "weights") == {"gpu": 0.2, "cpu": 0.0, "disk": 0.8}
    assert shares_of(result(shares=asked), "activations") is None
    assert shares_of(None, "weights") is None


def test_stacks_fill_the_bar_and_the_unknown_is_said(tmp_path: Path) -> None:
    rows, results = drawn(make_benchmark_folder(tmp_path, lost=["flexgen-b4"]))
    figure = policies(rows, results)
    assert figure is not None
    weights = [trace for trace in figure["data"] if trace["xaxis"] == "x"]
    for at in (0, 2, 3, 4, 5):
        assert sum(trace["x"][at] for trace in weights) == pytest.approx(1)
    unknown = [note for note in figure["layout"]["annotations"] if note["text"] == "unknown"]
    assert ("x", 1) in {(note["xref"], note["y"]) for note in unknown}


def test_busy_seconds_stand_beside_the_measured_phase(tmp_path: Path) -> None:
    rows, results = drawn(make_benchmark_folder(tmp_path))
    figure = time_by_resource(rows, results)
    assert figure is not None
    decode = {trace["legendgroup"]: trace for trace in figure["data"] if trace["xaxis"] == "x2"}
    plan = results["accelerate-b4"].plan["predicted"]
    assert decode["busy compute"]["x"][0] == plan["decode_busy_s"]["compute"]
    assert decode["predicted"]["x"][0] == plan["decode_s"]
    assert decode["accelerate"]["x"][0] == results["accelerate-b4"].metrics["decode_s"]
    # Whiskers lie within the axes.
    ends = [
        x + more
        for t in decode.values()
        if "error_x" in t
        for x, more in zip(t["x"], t["error_x"]["array"], strict=True)
    ]
    assert figure["layout"]["xaxis2"]["range"][1] > max(ends)
    styles = {(trace["marker"]["symbol"]) for name, trace in decode.items() if name.startswith("busy")}
    assert len(styles) == 3


def timeline(**series: list[float | None]) -> Timeline:
    times = [0.5 * step for step in range(len(next(iter(series.values()))))]
    return Timeline(started_at_ms=0, time_s=times, series=series, phases=[("load", 0.0, 1.0)])


def test_counters_become_rates() -> None:
    one = timeline(moved_h2d_bytes=[None, 0.0, 100.0, 300.0, 0.0, 50.0])
    # The counter that falls began anew; nothing can be said of that stretch.
    assert rates_of(one, "moved_h2d_bytes") == [(0.75, 200.0), (1.25, 400.0), (2.25, 100.0)]
    assert rates_of(one, "disk_read_bytes") == []
    figure = traffic_over_time(timeline(moved_h2d_bytes=[0.0, 2.0**30], disk_read_bytes=[0.0, 0.0]))
    assert figure is not None
    assert [trace["name"] for trace in figure["data"]] == ["host to device"]
    assert figure["data"][0]["y"] == [2.0]
    check_with_plotly({"traffic": figure})


def test_memory_leaves_out_a_device_that_is_not_there() -> None:
    figure = memory_over_time(
        timeline(rss_bytes=[2.0**30, math.nan, 2.0**31], device_allocated_bytes=[0.0, 0.0, 0.0])
    )
    assert figure is not None
    (line,) = figure["data"]
    assert (line["name"], line["y"]) == ("process RSS", [1.0, 2.0])
    assert memory_over_time(timeline(cpu_percent=[1.0, 2.0])) is None
    assert traffic_over_time(timeline(rss_bytes=[1.0, 2.0])) is None


def test_colours_are_the_same_in_every_benchmark() -> None:
    one, other = colours_of(["autoflex", "mine"]), colours_of(["yours", "autoflex"])
    assert one["autoflex"] == other["autoflex"]
    assert one["mine"] not in {one["autoflex"], one["flexgen"], one["accelerate"]}
    assert len(set(colours_of(["a", "b", "c"]).values())) == 6


def test_labels_are_short_and_unlike() -> None:
    assert label("a\n b") == "a b"
    assert len(label("flexgen-" + "x" * 60 + "-b4")) <= 36
    assert label("flexgen-" + "x" * 60 + "-b4") != label("flexgen-" + "x" * 60 + "-b8")


def test_without_plotly_the_table_and_pictures_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    folder = make_benchmark_folder(tmp_path)
    page = report_of(folder)
    assert "plotly was not installed" in page.text
    assert "script" not in page.tags
    assert "autoflex-b4" in page.text


def test_drawn_pictures_are_for_where_no_script_runs(tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path, failed=["flexgen-b8"])
    assert [path.name for path in draw_benchmark(folder)] == ["throughput.png", "latency.png"]
    page = report_of(folder)
    assert [address[:22] for address in page.loads] == ["data:image/png;base64,"] * 2
    assert "noscript" in page.tags


@pytest.mark.parametrize("lost", [[], [cell.name for cell in make_benchmark().cells]])
def test_pictures_are_drawn_whatever_was_measured(tmp_path: Path, lost: list[str]) -> None:
    folder = make_benchmark_folder(tmp_path, make_benchmark(name="costs $5 and $6 大"), lost=lost)
    for path in draw_benchmark(folder):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_benchmark_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no benchmark\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_alone_is_enough(tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert write_report(moved) == moved / "report.html"
    assert BENCHMARK_UUID in (moved / "report.html").read_text(encoding="utf-8")
