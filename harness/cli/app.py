"""The command itself: how a verb is run, what its mistakes look like, exit codes.

Exit codes: 0 ok, 1 internal error, 2 usage, 3 a check failed (--fail-on), 4 measured but not delivered, 5 does not
fit, 6 measured in part, 130 interrupted.
"""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexllmgen.errors import OffloadError
from harness import __version__, exit_codes

if TYPE_CHECKING:
    from harness.report import Report

app = typer.Typer(
    name="harness",
    help="Evaluate LLM inference for models that do not fit the GPU: what was predicted, what was measured, "
    "what the hardware allows.",
    epilog="Start with: harness eval --model builtin -n 8",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Where a verb stands in the help.
RUNNING, COMPARING, MACHINE, RECORD, LISTS = (
    "Run and measure",
    "Compare",
    "The machine",
    "The record",
    "What can be named",
)
# What typer shows for a flag otherwise is <bool>, as if it took a value.
FLAG = " "


def run_verb(run: "Callable[[Report], int]", *, verbose: bool = False, quiet: bool = False) -> None:
    """Run a verb; a user's mistake becomes one line and its exit code."""
    from harness.report import Report
    from harness.store import DeliveryError

    report = Report(quiet=quiet, verbose=verbose)
    try:
        code = run(report)
    except OffloadError as error:
        if verbose:
            report.traceback()
        report.error(str(error))
        code = error.exit_code
    except DeliveryError as error:
        report.error(str(error))
        code = exit_codes.NOT_DELIVERED
    except KeyboardInterrupt:
        report.error("interrupted")
        code = exit_codes.INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except Exception as error:  # noqa: BLE001 - the last line of defence
        report.traceback() if verbose else None
        report.error(f"internal error: {type(error).__name__}: {error} (-v shows where)")
        code = 1
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"harness {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar=FLAG, callback=_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
) -> None:
    """Evaluate LLM inference for models that do not fit the GPU."""


def main() -> None:
    """The console script. A mistake on the command line is one line, like every other mistake."""
    # A closed standard stream (`>&-`) is None to Python; nothing here should have to care.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - open until the end
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal has no characters for is shown escaped; it must not end the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # typer's own errors; by name, since newer releases no longer take them from the package click.
        names = {parent.__name__ for parent in type(error).__mro__}
        if "ClickException" not in names:
            raise
        code = 2
        if "NoArgsIsHelpError" in names:
            # The help was printed when this was raised.
            sys.exit(code)
        from harness.report import Report

        Report().error(f"{error.format_message()} (see {_command_path(error)} --help)")  # type: ignore[attr-defined]
    sys.exit(code)


def _command_path(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"harness {context.info_name}" if context is not None and context.parent is not None else "harness"
