"""Verbs about what runs left behind: ui, sync, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from harness.cli.app import RECORD, app, run_verb
from harness.cli.options import tracking_uri_of

if TYPE_CHECKING:
    from harness.report import Report


@app.command("ui", rich_help_panel=RECORD)
def ui_command(
    tracking_uri: Annotated[
        Optional[str], typer.Option("--tracking-uri", metavar="URI", help="MLflow store to show.")  # noqa: UP045
    ] = None,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=1, max=65535, help="Port on the loopback address.")
    ] = 5000,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open a browser window.")] = True,
) -> None:
    """Open the MLflow UI on the store that runs are recorded in."""
    from harness.store import resolve_store
    from harness.ui import run_ui

    def run(report: "Report") -> int:
        store = resolve_store(tracking_uri_of(tracking_uri), Path.cwd())
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

    run_verb(lambda report: sync(folder, tracking_uri_of(tracking_uri), report))


@app.command("export", rich_help_panel=RECORD)
def export_command(
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A .csv, .parquet or .json file; - for CSV on standard output.",
        ),
    ] = "-",
    experiment: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--experiment", metavar="NAME", help="Only runs of this experiment; may be repeated."),
    ] = None,
    strategy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--strategy", "-s", metavar="NAME", help="Only runs of this strategy; may be repeated."),
    ] = None,
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--model", "-m", metavar="NAME", help="Only runs of this model; may be repeated."),
    ] = None,
    results_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--results-dir", metavar="DIR", help="Read this folder of result folders, not the store."
        ),
    ] = None,
    tracking_uri: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--tracking-uri", metavar="URI", help="MLflow store to read."),
    ] = None,
) -> None:
    """Write runs as one flat table: params, metrics, tags and where they come from, a row per run."""

    def run(report: "Report") -> int:
        from flexllmgen.errors import UsageError
        from harness.export import check_format, export, folder_rows, select
        from harness.store import resolve_store
        from harness.store_runs import store_rows

        file = None if output == "-" else Path(output)
        if file is not None:
            check_format(file)
        if results_dir is not None and tracking_uri is not None:
            raise UsageError("--results-dir and --tracking-uri: runs are read from one of them, not both")
        if results_dir is not None:
            rows = folder_rows(results_dir.expanduser(), report)
        else:
            store = resolve_store(tracking_uri_of(tracking_uri), Path.cwd(), create=False)
            rows = store_rows(store, experiment or ())
        return export(
            select(rows, experiments=experiment or (), strategies=strategy or (), models=model or ()),
            file,
            report,
        )

    run_verb(run)
