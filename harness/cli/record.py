"""Verbs about what runs left behind: ui, sync."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from harness.cli.app import RECORD, app, run_verb

if TYPE_CHECKING:
    from harness.report import Report


@app.command("ui", rich_help_panel=RECORD)
def ui_command(
    tracking_uri: Annotated[
        Optional[str], typer.Option("--tracking-uri", metavar="URI", help="MLflow store to show.")  # noqa: UP045
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Port on the loopback address.")
    ] = 5000,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser window.")] = True,
) -> None:
    """Open the MLflow UI on the store that runs are recorded in."""
    from harness.store import resolve_store
    from harness.ui import run_ui

    def run(report: "Report") -> int:
        store = resolve_store(tracking_uri or os.environ.get("HARNESS_TRACKING_URI"), Path.cwd())
        return run_ui(store, port=port, open_browser=open_browser, announce=report.text)

    run_verb(run)


@app.command("sync", rich_help_panel=RECORD)
def sync_command(
    folder: Annotated[
        Path, typer.Argument(help="results/ or one folder in it, also brought from another machine.")
    ],
    tracking_uri: Annotated[
        Optional[str], typer.Option("--tracking-uri", metavar="URI", help="MLflow store to deliver to.")  # noqa: UP045
    ] = None,
) -> None:
    """Deliver result folders to MLflow; what has arrived already is not sent twice."""
    from harness.delivery import sync

    run_verb(lambda report: sync(folder, tracking_uri or os.environ.get("HARNESS_TRACKING_URI"), report))
