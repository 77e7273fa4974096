"""The verb that runs many: benchmark."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from harness.benchmark.layers import AXES
from harness.cli.app import FLAG, RUNNING, app, run_verb
from harness.cli.options import config_named_by, takes_run_options

if TYPE_CHECKING:
    from harness.benchmark.command import Wanted
    from harness.report import Report

_GRID = "Grid"
# What says where results go, not what is measured; a benchmark that is resumed may be told anew.
_NOT_OF_THE_GRID = ("results_dir", "tracking_uri", "no_mlflow", "log_file")


def suites_beginning(incomplete: str) -> list[str]:
    """What a shell may offer for --suite."""
    from harness.benchmark.suite import shipped_suites

    return [name for name in shipped_suites() if name.startswith(incomplete)]


@app.command("benchmark", rich_help_panel=RUNNING)
@partial(
    takes_run_options,
    several=AXES,
    first=("suite", "policy", "baseline"),
    set_help="STRATEGY.KEY=VALUE changes it for that strategy alone, KEY=VALUE for every one that has it.",
    strategy="accelerate, flexgen, autoflex",
)
def benchmark_command(
    *,
    options: dict[str, Any],
    config: Path | None,
    assignments: list[str],
    verbose: bool,
    quiet: bool,
    suite: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--suite",
            metavar="NAME|FILE",
            help="A grid written down: smoke, seed, flexgen-paper, or a TOML file.",
            autocompletion=suites_beginning,
            rich_help_panel=_GRID,
        ),
    ] = None,
    policy: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            "--policy",
            metavar="FILE",
            help="A strategy's TOML file as a cell of its own, beside --strategy. May be repeated.",
            rich_help_panel=_GRID,
        ),
    ] = None,
    baseline: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--baseline",
            metavar="CELL|STRATEGY",
            help="What the others are held against. [dim]\\[default: the first cell][/dim]",
            rich_help_panel=_GRID,
        ),
    ] = None,
    launches: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--launches",
            metavar="K",
            min=1,
            help="Fresh processes per cell, interleaved: the first of every cell, then the second. "
            "[dim]\\[default: 1][/dim]",
            rich_help_panel="Measuring",
        ),
    ] = None,
    cell_timeout: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--cell-timeout",
            metavar="SECONDS|10m",
            help="End a cell's process that takes longer; what it measured until then is kept.",
            rich_help_panel="Measuring",
        ),
    ] = None,
    resume: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--resume",
            metavar="UUID|FOLDER|@latest",
            help="Run what is missing of a benchmark that was interrupted or died.",
            rich_help_panel="Record",
        ),
    ] = None,
    fail_on: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--fail-on",
            metavar="parity",
            help="Exit with 3 where a lossless cell's tokens are not all the baseline's.",
            rich_help_panel="Output",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar=FLAG,
            help="List the cells with what is predicted; load nothing.",
            rich_help_panel="Output",
        ),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", metavar=FLAG, help="Print one JSON object with the table.", rich_help_panel="Output"
        ),
    ] = False,
) -> None:
    """Run strategies and policies over a grid of options on the same prompts, and hold them side by side."""

    def run(report: "Report") -> int:
        from harness.benchmark import command
        from harness.benchmark.grid import Asked

        wanted = _wanted(launches, cell_timeout, fail_on, as_json)
        asked = Asked(
            options=options,
            config_file=config or config_named_by(os.environ),
            assignments=assignments,
            policies=policy or (),
            suite=suite,
            baseline=baseline,
        )
        if resume is None:
            starts = command.show_cells if dry_run else command.start
            return starts(asked, wanted, report, argv=sys.argv)
        own = {
            "--suite": suite,
            "--policy": policy,
            "--baseline": baseline,
            "--config": config,
            "--set": assignments,
            "--dry-run": dry_run,
        }
        return command.resume(
            resume,
            {name: options[name] for name in _NOT_OF_THE_GRID},
            wanted,
            report,
            argv=sys.argv,
            given=[name for name, value in own.items() if value] + _flags_of(options),
        )

    run_verb(run, verbose=verbose, quiet=quiet)


def _wanted(launches: int | None, cell_timeout: str | None, fail_on: str | None, as_json: bool) -> "Wanted":
    from flexllmgen.errors import UsageError
    from harness.benchmark.command import Wanted
    from harness.benchmark.suite import parse_duration

    if fail_on not in (None, "parity"):
        raise UsageError(f"--fail-on {fail_on}: a benchmark can fail on parity; `harness compare` on metrics")
    return Wanted(
        launches=launches,
        cell_timeout_s=None if cell_timeout is None else parse_duration(cell_timeout, "--cell-timeout"),
        fail_on=fail_on,
        as_json=as_json,
    )


def _flags_of(options: dict[str, Any]) -> list[str]:
    """The options given that the grid has already."""
    from harness.config import flag_of

    return [
        flag_of(name)
        for name, value in options.items()
        if value is not None and value != [] and name not in _NOT_OF_THE_GRID
    ]
