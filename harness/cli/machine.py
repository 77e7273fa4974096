"""Verbs about the machine: profile, doctor."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from harness.cli.app import FLAG, MACHINE, app, run_verb
from harness.cli.options import settings_of

if TYPE_CHECKING:
    from harness.report import Report


@app.command("profile", rich_help_panel=MACHINE)
def profile_command(
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Time the layers of this model. [dim]\\[default: a small one][/dim]",
        ),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--device", metavar="auto|cuda|cpu", help="The device that computes."),
    ] = None,
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--dtype", metavar="auto|float32|float16|bfloat16", help="Number format, as of `eval`."),
    ] = None,
    offload_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--offload-dir", metavar="DIR", help="Folder whose disk is measured."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", metavar=FLAG, help="Measure anew, whatever is kept.")
    ] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", metavar="FILE", help="Write the profile to a file, as JSON."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print the profile as JSON.")] = False,
) -> None:
    """Measure what this machine can do, or show what was measured; every prediction rests on it."""

    def run(report: "Report") -> int:
        from harness.machine_profile import show_profile

        options = {"model": model, "device": device, "dtype": dtype, "offload_dir": offload_dir}
        settings = settings_of(options, None, [], report)
        return show_profile(
            settings.common,
            report,
            model_named=settings.sources["model"] != "default",
            refresh=refresh,
            output=output,
            as_json=as_json,
        )

    run_verb(run)


@app.command("doctor", rich_help_panel=MACHINE)
def doctor_command(
    offload_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--offload-dir", metavar="DIR", help="Folder for what goes to disk, as of `eval`."),
    ] = None,
    results_dir: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--results-dir", metavar="DIR", help="Folder for result folders, as of `eval`."),
    ] = None,
    tracking_uri: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--tracking-uri", metavar="URI", help="MLflow store, as of `eval`."),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            metavar=FLAG,
            help="Mend the store: places of artifacts in a folder that was moved, runs that a dead process left.",
        ),
    ] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            metavar=FLAG,
            help="Remove packed weights and profiles not used for --older-than days, and what dead processes left.",
        ),
    ] = False,
    older_than: Annotated[
        float,
        typer.Option("--older-than", metavar="DAYS", min=0, help="What --prune takes for old."),
    ] = 7,
    as_json: Annotated[bool, typer.Option("--json", metavar=FLAG, help="Print one JSON object.")] = False,
) -> None:
    """Check this machine, the installation and the record, and say the way out of what is wrong.

    Exit code 0 when all is well or there are only notes, 3 when there is a problem.
    """

    def run(report: "Report") -> int:
        from harness.doctor.run import doctor

        options = {"offload_dir": offload_dir, "results_dir": results_dir, "tracking_uri": tracking_uri}
        settings = settings_of(options, None, [], report)
        return doctor(settings.common, report, fix=fix, prune_old=prune, days=older_than, as_json=as_json)

    run_verb(run)
