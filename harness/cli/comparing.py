"""Verbs that hold runs side by side: compare, history."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from harness.cli.app import COMPARING, FLAG, app, run_verb
from harness.cli.options import tracking_uri_of

if TYPE_CHECKING:
    from harness.compare.select import Records
    from harness.report import Report
    from harness.store_reader import StoreReader

ResultsDir = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation
    typer.Option(
        "--results-dir",
        metavar="DIR",
        help="Folder of result folders, looked through first. [dim]\\[default: results][/dim]",
        show_default=False,
    ),
]
TrackingUri = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--tracking-uri", metavar="URI", help="MLflow store, asked for what the folder does not hold."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print one JSON object.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", metavar=FLAG, help="For errors, show the traceback.")
]


@app.command("compare", rich_help_panel=COMPARING)
def compare_command(
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="A B",
            help="Base and new: commits, branches, tags, run ids, @latest, @latest~1, @latest:STRATEGY, result files or "
            "folders; COMMIT+dirty for a tree with changes.",
            show_default=False,
        ),
    ] = None,
    strategies: Annotated[
        bool,
        typer.Option(
            "--strategies",
            metavar=FLAG,
            help="Compare the strategies of one benchmark, the latest or the one named, with its baseline.",
        ),
    ] = False,
    metric: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Metric to compare; may be repeated. [dim]\\[default: generation_tok_s, ttft_s, tpot_s and the peaks]"
            "[/dim]",
            show_default=False,
        ),
    ] = None,
    fail_on: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--fail-on",
            metavar="METRIC:PERCENT%",
            help="Exit 3 where the metric is worse by more than that, as generation_tok_s:5%; may be repeated.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", metavar=FLAG, help="Compare although the machines, or two single setups, differ."
        ),
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", metavar=FLAG, help="Print markdown.")] = False,
    as_json: AsJson = False,
    results_dir: ResultsDir = None,
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Compare the runs of two commits, or any two results: change with its interval, and whether it means anything."""

    def run(report: "Report") -> int:
        from flexllmgen.errors import UsageError
        from harness.compare.comparison import compare_names, show

        if as_json and markdown:
            raise UsageError("--json and --markdown: choose one")
        comparison, failed = compare_names(
            _records(results_dir, tracking_uri, report),
            names or (),
            strategies=strategies,
            metrics=metric or (),
            fail_on=fail_on or (),
            force=force,
        )
        return show(comparison, failed, report, as_json=as_json, markdown=markdown)

    run_verb(run, verbose=verbose)


def _records(results_dir: Path | None, tracking_uri: str | None, report: "Report") -> "Records":
    """Where results are looked for: the folder, then the store, which is opened only where it is needed."""
    from flexllmgen.errors import UsageError
    from harness.compare.select import Records

    if results_dir is not None and not results_dir.expanduser().is_dir():
        raise UsageError(
            f"--results-dir {results_dir}: there is no such folder; leave it out to ask the store alone"
        )
    folder = results_dir or Path(os.environ.get("HARNESS_RESULTS_DIR") or "results")
    uri = tracking_uri_of(tracking_uri)
    return Records(folder.expanduser(), store=_store(uri, report), cwd=Path.cwd(), warn=report.warn)


def _store(uri: str | None, report: "Report") -> "Callable[[], StoreReader] | None":
    """How the store is opened; None where nobody named one and there is none here."""
    from harness.store import resolve_store

    named = bool(uri or os.environ.get("MLFLOW_TRACKING_URI"))
    store = resolve_store(uri, Path.cwd(), create=False)
    path = store.sqlite_path
    if path is not None and not path.exists():
        if named:
            report.warn(f"there is no store at {path}")
        return None

    def open_store() -> "StoreReader":
        from harness.store_reader import StoreReader

        return StoreReader(store, report.warn)

    return open_store


@app.command("history", rich_help_panel=COMPARING)
def history_command(
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME", help="Metric to follow.")
    ] = "generation_tok_s",
    workload: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--workload",
            metavar="TEXT",
            help="Only workloads whose key has this in it, as gen32 or humaneval.",
        ),
    ] = None,
    strategy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--strategy", "-s", metavar="NAME", help="Only runs of this strategy."),
    ] = None,
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--html", metavar="FILE", help="Write the plot as one HTML file that opens offline."),
    ] = None,
    as_json: AsJson = False,
    results_dir: ResultsDir = None,
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Follow a metric over many commits: medians, spread, steps beyond the noise."""

    def run(report: "Report") -> int:
        from harness.compare.history import history
        from harness.compare.history_view import as_text, write_html

        measured = _records(results_dir, tracking_uri, report).everything()
        series = history(measured, metric, cwd=Path.cwd(), workload=workload, strategy=strategy)
        if as_json:
            report.json({"metric": metric, "series": [one.as_dict() for one in series]})
        else:
            report.text(as_text(series, report.width))
        if html is not None:
            write_html(series, html)
            report.say(f"plot: {html}")
        return 0

    run_verb(run, verbose=verbose)
