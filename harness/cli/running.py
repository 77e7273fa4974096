"""Verbs about one run: eval, plan, config show."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from harness.cli.app import FLAG, LISTS, RUNNING, app, run_verb
from harness.cli.options import settings_of, takes_run_options

if TYPE_CHECKING:
    from harness.report import Report

config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
app.add_typer(config_app, name="config", rich_help_panel=LISTS)


@app.command("eval", rich_help_panel=RUNNING)
@takes_run_options
def eval_command(
    *,
    options: dict[str, Any],
    config: Path | None,
    assignments: list[str],
    verbose: bool,
    quiet: bool,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", metavar=FLAG, help="Print one JSON object with the result.", rich_help_panel="Output"
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar=FLAG,
            help="Plan and print the plan; load nothing.",
            rich_help_panel="Output",
        ),
    ] = False,
) -> None:
    """Run a strategy on real prompts, measure it, record it as an MLflow run."""
    from harness.evaluation import evaluate

    def run(report: "Report") -> int:
        settings = settings_of(options, config, assignments, report)
        return evaluate(settings, report, argv=sys.argv, dry_run=dry_run, as_json=as_json)

    run_verb(run, verbose=verbose, quiet=quiet)


@app.command("plan", rich_help_panel=RUNNING)
@partial(takes_run_options, strategy="autoflex")
def plan_command(
    *,
    options: dict[str, Any],
    config: Path | None,
    assignments: list[str],
    verbose: bool,
    quiet: bool,
    hardware: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--hardware",
            metavar="FILE",
            help="Plan for the machine of this profile, as `harness profile --output FILE` wrote it there.",
            rich_help_panel="Machine",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", metavar=FLAG, help="Print one JSON object with the plan.", rich_help_panel="Output"
        ),
    ] = False,
) -> None:
    """Show what a run would do and take, loading nothing: what lies where, time by resource, what is left."""

    def run(report: "Report") -> int:
        from harness.planning import show_plan

        settings = settings_of(options, config, assignments, report, default_strategy="autoflex")
        return show_plan(settings, report, hardware_file=hardware, as_json=as_json)

    run_verb(run, verbose=verbose, quiet=quiet)


@config_app.command("show")
@takes_run_options
def config_show_command(
    *,
    options: dict[str, Any],
    config: Path | None,
    assignments: list[str],
    verbose: bool,
    quiet: bool,
    as_json: Annotated[
        bool, typer.Option("--json", metavar=FLAG, help="Print JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Show every effective value and where it came from."""

    def run(report: "Report") -> int:
        listing = settings_of(options, config, assignments, report).listing()
        if as_json:
            report.json({item.key: {"value": item.value, "source": item.source} for item in listing})
        else:
            report.rows(
                "",
                ("key", "value", "from"),
                [(item.key, _config_text(item.value), item.source) for item in listing],
            )
        return 0

    run_verb(run, verbose=verbose, quiet=quiet)


def _config_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value is None else str(value)
