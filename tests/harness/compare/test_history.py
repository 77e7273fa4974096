"""A metric over the commits of a real repository: order, steps beyond the noise, text, JSON, page."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compare_records import WORKLOAD, Tree, commit, git, leave, leave_many

from flexllmgen.errors import UsageError
from harness.compare.history import Series, history
from harness.compare.history_view import as_text, sparkline, write_html


def one_series(tree: Tree, metric: str = "generation_tok_s", **options: Any) -> Series:
    (series,) = history(tree.records().everything(), metric, cwd=tree.folder, **options)
    return series


def test_commits_come_in_their_own_order_whenever_they_ran(tree: Tree) -> None:
    for place in (3, 0, 4, 2):
        leave(tree.results, tree.commits[place], 10.0 + place)
    dirty = {"git_dirty": True, "patch_digest": "1111aaaa"}
    leave(tree.results, tree.commits[0], 20.0, origin=dirty)
    series = one_series(tree)
    assert [point.revision.commit for point in series.points] == [tree.commits[n] for n in (0, 0, 2, 3, 4)]
    assert [point.subject for point in series.points] == ["First", "First", "Third", "Fourth", "Fifth"]
    assert str(series.points[1].revision) == f"{tree.commits[0][:8]}+dirty.1111aaaa"
    assert [point.median for point in series.points] == [10, 20, 12, 13, 14]


def test_a_branch_comes_after_what_it_grew_from(tree: Tree) -> None:
    git(tree.folder, "checkout", "-q", "feature")
    side = commit(tree.folder, "Side")
    git(tree.folder, "checkout", "-q", "trunk")
    for sha in (side, tree.commits[3], tree.commits[4]):
        leave(tree.results, sha, 10.0)
    order = [point.revision.commit for point in one_series(tree).points]
    assert order[0] == tree.commits[3]
    assert set(order[1:]) == {side, tree.commits[4]}


def test_commits_that_git_does_not_know_stand_where_their_time_puts_them(tree: Tree) -> None:
    # The runs' own times lie in 2026, before or after the commits of this test as its clock says.
    leave(tree.results, tree.commits[0], 10.0)
    leave(tree.results, "feedbeef" * 5, 11.0, started_at_ms=1000)
    leave(tree.results, "deadbeef" * 5, 12.0, started_at_ms=10**14)
    assert [point.median for point in one_series(tree).points] == [11, 10, 12]


def test_steps_beyond_the_noise_are_marked(tree: Tree) -> None:
    steady = [10.0, 10.1, 10.2, 10.3]
    for place, rates in enumerate((steady, steady, [8.0, 8.1, 8.2, 8.3], [8.0], [9.0])):
        leave_many(tree.results, tree.commits[place], rates)
    points = one_series(tree).points
    # The fifth is one launch against one: larger than the spreads of both, but not tested.
    assert [point.mark for point in points] == ["", "", "worse", "", "(better)"]
    assert points[2].step is not None
    assert points[2].step.change.p == pytest.approx(2 / 70)
    assert one_series(tree, "ttft_s").points[2].mark == "worse"


def test_setups_and_machines_are_series_of_their_own(tree: Tree) -> None:
    leave(tree.results, tree.commits[0], 10)
    leave(tree.results, tree.commits[1], 11)
    leave(tree.results, tree.commits[1], 12, fingerprint="beef")
    leave(tree.results, tree.commits[1], 13, strategy="accelerate")
    leave(tree.results, tree.commits[1], 14, workload_key="tiny/other")
    measured = tree.records().everything()
    found = history(measured, "generation_tok_s", cwd=tree.folder)
    assert [len(series.points) for series in found] == [2, 1, 1, 1]
    assert one_series(tree, strategy="accelerate").points[0].median == 13
    assert one_series(tree, workload="other").points[0].median == 14
    with pytest.raises(
        UsageError, match=r"no finished run for --strategy autoflex; there are strategies accelerate, flexgen"
    ):
        one_series(tree, strategy="autoflex")
    with pytest.raises(UsageError, match="no metric 'ttft'; there are ttft_s"):
        one_series(tree, "ttft")


def test_without_runs_it_says_what_to_do(tree: Tree) -> None:
    with pytest.raises(UsageError, match="run `harness eval`"):
        one_series(tree)


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_fits_and_has_a_line_of_bars(tree: Tree, width: int) -> None:
    for place, rate in enumerate((10.0, 12.0, 11.0, 14.0, 7.0)):
        leave(tree.results, tree.commits[place], rate)
    leave(tree.results, tree.commits[4], 7.0, origin={"git_dirty": True, "patch_digest": "1" * 16})
    text = as_text([one_series(tree)], width)
    assert max(map(len, text.splitlines())) <= width
    assert "▄▆▅█▁▁" in text
    fourth = next(line for line in text.splitlines() if line.startswith(tree.commits[3][:8]))
    assert fourth.split()[2:7] == ["1", "14.00", "0.5%", "+27.3%", "(better)"]
    assert ("Fourth" in fourth) == (width == 120)
    assert "too few launches to test" in text
    # The last two differ by nothing.
    assert text.count("(~)") == 1


def test_bars() -> None:
    assert sparkline([1, 8]) == "▁█"
    assert sparkline([3, 3, 3]) == "▄▄▄"


def test_the_page_is_complete_in_itself_and_nothing_in_it_is_markup(tree: Tree) -> None:
    sha = commit(tree.folder, "A <script>alert(1)</script> & more")
    leave(tree.results, tree.commits[0], 10)
    leave(tree.results, sha, 11)
    page = write_html([one_series(tree)], tree.folder / "plots" / "history.html").read_text()
    assert "<script>alert" not in page
    assert "src=" not in page.replace('src="data:', "").split("plotly.js v")[0]
    assert "Plotly.newPlot" in page
    assert sha[:8] in page
    assert "generation_tok_s by commit</title>" in page
    assert "prefers-color-scheme: dark" in page
    assert "{plot_id}" not in page


@pytest.mark.parametrize(
    ("metric", "title", "value"),
    [
        ("generation_tok_s", "generation_tok_s (tokens per second)", 10.0),
        ("ttft_s", "ttft_s (seconds)", None),
        ("peak_rss_bytes", "peak_rss (GiB)", 1.5),
    ],
)
def test_the_axis_of_the_page_has_a_unit(tree: Tree, metric: str, title: str, value: float | None) -> None:
    leave(tree.results, tree.commits[0], 10, peak_bytes=1.5 * 2**30)
    page = write_html([one_series(tree, metric)], tree.folder / "history.html").read_text()
    assert f'"text":"{title}"' in page
    assert value is None or f'"y":[{value}]' in page
    assert ", 1 launch" in page
    assert "1 launches" not in page


def test_more_series_than_colours_are_told_apart(tree: Tree) -> None:
    for batch_size in range(1, 10):
        params = leave(tree.results, tree.commits[0], 10).params
        leave(tree.results, tree.commits[0], 10, params={**params, "batch_size": batch_size})
    all_series = history(tree.records().everything(), "generation_tok_s", cwd=tree.folder)
    assert len(all_series) >= 9
    page = write_html(all_series, tree.folder / "history.html").read_text()
    lines = re.findall(r'"line":(\{"color":"[^"]*","dash":"[^"]*"\})', page)
    assert len(set(lines)) == len(all_series)


def test_a_page_that_cannot_be_written_is_a_mistake(tree: Tree) -> None:
    leave(tree.results, tree.commits[0], 10)
    (tree.folder / "file").touch()
    with pytest.raises(UsageError, match="--html"):
        write_html([one_series(tree)], tree.folder / "file" / "history.html")


def test_the_command(tree: Tree, harness: Callable[..., Any], tmp_path: Path) -> None:
    leave(tree.results, tree.commits[0], 10)
    leave_many(tree.results, tree.commits[2], [12, 13])
    done = harness("history", "--json", "--html", tmp_path / "h.html", cwd=tree.folder)
    assert done.code == 0
    (series,) = json.loads(done.stdout)["series"]
    assert series["setup"] == f"flexgen {WORKLOAD} batch_size=4"
    assert [point["values"] for point in series["points"]] == [[10], [12, 13]]
    assert (tmp_path / "h.html").stat().st_size > 1_000_000
    wrong = harness("history", "--metric", "nope", cwd=tree.folder)
    assert (wrong.code, len(wrong.errors)) == (2, 1)
