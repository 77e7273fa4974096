"""The report in a real browser: from the disk, and inside frames as sandboxed as MLflow's."""

import html
import json
import shutil
from pathlib import Path

import pytest
from benchmark_records import make_benchmark_folder

from harness.benchmark.html_report import write_report
from harness.benchmark.pictures import draw_benchmark

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOAD_MS = 30_000

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


def page_around(report: str, how: str) -> str:
    if how == "blob":
        # What MLflow does with an HTML artifact.
        text = json.dumps(report).replace("<", "\\u003c")
        return (
            '<iframe id="frame" sandbox="allow-scripts" width="1200" height="900"></iframe>'
            f'<script>frame.src = URL.createObjectURL(new Blob([{text}], {{type: "text/html"}}))</script>'
        )
    rights = "allow-scripts" if how == "srcdoc" else ""
    return f'<iframe sandbox="{rights}" width="1200" height="900" srcdoc="{html.escape(report)}"></iframe>'


@pytest.mark.parametrize("how", ["disk", "srcdoc", "blob", "no scripts"])
def test_the_report_opens_without_a_network(how: str, tmp_path: Path) -> None:
    folder = make_benchmark_folder(tmp_path, failed=["flexgen-b8"])
    draw_benchmark(folder)
    path = write_report(folder)
    if how != "disk":
        around = page_around(path.read_text(encoding="utf-8"), how)
        path = tmp_path / "around.html"
        path.write_text(around, encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri(), timeout=LOAD_MS)
        report = page if how == "disk" else page.frame_locator("iframe")
        if how == "no scripts":
            assert report.locator("noscript img").count() == 2
            assert report.locator("#table tbody tr").count() == 6
        else:
            report.locator("html[data-drawn='16']").wait_for(state="attached", timeout=LOAD_MS)
            assert report.locator("[data-figure]").count() == 16
            assert report.locator("#plot-throughput .bars path").count() >= 5
            names = report.locator("#plot-throughput .ytick text").all_text_contents()
            assert names[0].startswith("accelerate-b4")
            assert report.locator("#plot-memory-0 .scatterlayer .trace").count() == 2
        browser.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
