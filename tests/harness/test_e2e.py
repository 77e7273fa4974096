"""The record clicked through in a real browser, on the server that `harness ui` starts.

Needs a Chromium of the system (Debian's package is `chromium`); nothing is downloaded. HARNESS_SCREENSHOTS names a folder that
keeps a picture of each page.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_records import make_benchmark, make_benchmark_folder
from records import make_folder, make_result
from servers import free_port, start_ui

from harness.benchmark.html_report import write_report
from harness.benchmark.record import cell_folder
from harness.benchmark.table import write_tables
from harness.pictures import draw_memory, draw_token_latency
from harness.results import RunResult, Timeline
from harness.store import resolve_store
from harness.tracking import Tracker

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Read before the tests' own folders hide the harness's variables.
SCREENSHOTS = os.environ.get("HARNESS_SCREENSHOTS")
LOAD_MS = 30_000

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """The address that `harness ui` announces, of a store with a plain run and a benchmark, two cells of which failed."""
    base = tmp_path_factory.mktemp("e2e")
    store = resolve_store(None, base)
    assert store.sqlite_path is not None
    shutil.copy(empty_database, store.sqlite_path)
    tracker = Tracker(store)
    metrics = {"generation_tok_s": 41.9, "predicted_tok_s": 50.0, "limit_tok_s": 80.0, "attainment": 0.52}
    run = make_result(
        metrics=metrics, params={"strategy": "accelerate", "batch_size": 4, "model": "owner/tiny"}
    )
    tracker.deliver(make_folder(base / "results", run))
    named = make_benchmark(name="seed opt-6.7b")
    folder = make_benchmark_folder(base / "results", named, failed=["flexgen-b8"], lost=["autoflex-b8"])
    inside = cell_folder(folder, "autoflex-b4")
    result = RunResult.read(inside)
    draw_token_latency(result, inside / "token_latency.png")
    draw_memory(
        Timeline.model_validate_json((inside / "timeline.json").read_bytes()), result, inside / "memory.png"
    )
    write_tables(folder)
    write_report(folder)
    tracker.deliver_benchmark(folder)
    with start_ui(base, free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        # Chromium's own sandbox does not start for root, as which CI runs.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of a browser that has been here before: MLflow opens a chat window on the very first visit."""
    context = browser.new_context(viewport={"width": 1700, "height": 950})
    # Not within the frames: a sandboxed one has no storage.
    visited = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
    context.add_init_script(f"if (window === window.top) {visited}")
    opened = context.new_page()
    opened.set_default_timeout(LOAD_MS)
    broken: list[str] = []
    opened.on("pageerror", lambda error: broken.append(str(error)))
    yield opened
    context.close()
    assert broken == []


@pytest.fixture
def look(page: Any, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keep a picture of the page, where somebody wants to see it."""

    def shoot(name: str) -> None:
        if SCREENSHOTS:
            page.wait_for_timeout(1000)  # charts fade in
            page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")

    return shoot


def open_list(page: Any, record: str) -> None:
    page.goto(record)
    page.get_by_role("link", name="seed opt-6.7b").wait_for()


def unfold(page: Any) -> None:
    page.locator("[role=row]", has_text="seed opt-6.7b").locator("button").last.click()
    page.get_by_role("link", name="accelerate-b4", exact=True).wait_for()


def open_run(page: Any, record: str, name: str) -> None:
    open_list(page, record)
    if name != "seed opt-6.7b":
        unfold(page)
    page.get_by_role("link", name=name, exact=True).click()
    page.get_by_role("heading", name=name).wait_for()


def cell_texts(page: Any, name: str) -> str:
    """All that the row of a run shows, beside what scrolls out of sight."""
    row = page.locator("[role=row]", has=page.get_by_role("link", name=name, exact=True)).first.get_attribute(
        "row-id"
    )
    return " ".join(page.locator(f"[row-id='{row}']").all_inner_texts())


def test_list_has_our_columns_and_benchmarks_unfold(
    page: Any, record: str, look: Callable[[str], None]
) -> None:
    open_list(page, record)
    for column in (
        "generation_tok_s",
        "ratio_to_baseline",
        "predicted_tok_s",
        "limit_tok_s",
        "attainment",
        "ttft_s",
    ):
        page.locator(f"[role=columnheader][col-id*='{column}']").wait_for()
    assert page.get_by_role("link", name="accelerate-tiny").count() == 1
    assert page.get_by_role("link", name="accelerate-b4", exact=True).count() == 0
    look("list")
    unfold(page)
    assert page.get_by_role("link", name=re.compile(r"^(accelerate|flexgen|autoflex)-b[48]$")).count() == 6
    assert "2.399" in cell_texts(page, "autoflex-b4")
    look("list-unfolded")


def test_parent_has_the_table_and_its_children(page: Any, record: str, look: Callable[[str], None]) -> None:
    open_run(page, record, "seed opt-6.7b")
    page.get_by_text("Show more").first.click()
    table = page.get_by_role("table").filter(has_text="vs base")
    assert table.get_by_role("row").count() == 7
    assert "2.40x" in table.get_by_role("row").filter(has_text="autoflex-b4").inner_text()
    assert page.get_by_text("CUDA ran out of memory").first.is_visible()
    assert page.get_by_text("best_tok_s_autoflex").first.is_visible()
    look("parent")
    # The last: those in the description open a tab of their own.
    page.get_by_role("link", name="flexgen-b4", exact=True).last.click()
    page.get_by_role("heading", name="flexgen-b4").wait_for()


def test_child_has_figures_prompts_and_its_parent(
    page: Any, record: str, look: Callable[[str], None]
) -> None:
    open_run(page, record, "autoflex-b4")
    for words in ("11.17 tokens/s", "humaneval", "ratio_to_baseline", "harness.cell"):
        page.get_by_text(words).first.wait_for(state="attached")
    look("child")
    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_text("attainment", exact=True).first.wait_for()
    look("child-metrics")
    page.get_by_role("tab", name="Overview").click()
    page.get_by_role("link", name="seed opt-6.7b").first.click()
    page.get_by_role("heading", name="seed opt-6.7b").wait_for()


def test_failed_child_says_why(page: Any, record: str, look: Callable[[str], None]) -> None:
    open_run(page, record, "flexgen-b8")
    page.get_by_text("CUDA ran out of memory").first.wait_for()
    page.get_by_text("Failed").first.wait_for()
    look("child-failed")


def test_report_runs_in_the_sandboxed_frame(page: Any, record: str, look: Callable[[str], None]) -> None:
    open_run(page, record, "seed opt-6.7b")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("report.html").first.click()
    frame = page.locator("iframe[sandbox]")
    frame.wait_for()
    assert "allow-same-origin" not in (frame.get_attribute("sandbox") or "")
    report = page.frame_locator("iframe[sandbox]")
    report.get_by_role("heading", name="seed opt-6.7b").wait_for()
    # Plots are drawn by the script within the file: neither the network nor the page around it helps.
    report.locator(".js-plotly-plot .main-svg").first.wait_for(state="attached")
    look("report")


def test_picture_of_a_cell_is_shown(page: Any, record: str, look: Callable[[str], None]) -> None:
    open_run(page, record, "autoflex-b4")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("token_latency.png").first.click()
    page.locator("img[src*='token_latency.png'], img[src^='blob:'], .js-plotly-plot").first.wait_for()
    look("picture")


def test_compare_page_has_charts(page: Any, record: str, look: Callable[[str], None]) -> None:
    open_list(page, record)
    unfold(page)
    for name in ("accelerate-b4", "flexgen-b4", "autoflex-b4"):
        row = page.locator("[role=row]", has=page.get_by_role("link", name=name, exact=True)).first
        identity = row.get_attribute("row-id")
        page.locator(f"[row-id='{identity}'] input[aria-label*='row selection']").first.click()
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("heading", name="Comparing 3 Runs").wait_for()
    page.locator(".js-plotly-plot .main-svg").first.wait_for()
    for name in ("accelerate-b4", "flexgen-b4", "autoflex-b4"):
        assert page.get_by_text(name, exact=True).count() >= 1
    look("compare")
