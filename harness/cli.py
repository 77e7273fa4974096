"""The command line: verbs, their options, exit codes. Every heavy import waits until a verb needs it.

Exit codes: 0 ok, 1 internal error, 2 usage, 4 measured but not delivered, 5 does not fit, 130 interrupted.
"""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_args, get_origin

import typer

from flexllmgen.errors import OffloadError
from harness import __version__
from harness.config import EvalConfig, resolve

if TYPE_CHECKING:
    from harness.config import Settings
    from harness.report import Report

app = typer.Typer(
    name="harness",
    help="Evaluate LLM inference for models that do not fit the GPU: what was predicted, what was measured, "
    "what the hardware allows.",
    epilog="Start with: harness eval --model builtin -n 8",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
app.add_typer(config_app, name="config")

# What typer shows for a flag otherwise is <bool>, as if it took a value.
_FLAG = " "

_RunOptions = {
    "config": (Optional[Path], typer.Option(None, "--config", metavar="FILE", help="TOML file with options and the strategy's keys.", rich_help_panel="Model and strategy")),  # noqa: UP045, E501
    "assignments": (list[str], typer.Option([], "--set", metavar="KEY=VALUE", help="Change one key of the strategy; may be repeated.", rich_help_panel="Model and strategy")),  # noqa: E501
    "objective": (Optional[str], typer.Option(None, "--objective", metavar="throughput|latency", help="What the policy should be best at; short for --set objective=...", rich_help_panel="Model and strategy")),  # noqa: UP045, E501
    "no_calibrate": (bool, typer.Option(False, "--no-calibrate", metavar=_FLAG, help="Run the policy as searched, without timing a few steps first; short for --set calibrate=false.", rich_help_panel="Model and strategy")),  # noqa: E501
    "verbose": (bool, typer.Option(False, "--verbose", "-v", metavar=_FLAG, help="Show the log and, for errors, the traceback.", rich_help_panel="Output")),  # noqa: E501
    "quiet": (bool, typer.Option(False, "--quiet", "-q", metavar=_FLAG, help="No progress: results, warnings and errors only.", rich_help_panel="Output")),  # noqa: E501
}  # fmt: skip


def takes_run_options(function: Callable[..., None], **defaults: str) -> Callable[..., None]:
    """Give a verb every field of EvalConfig as an option, and --config, --set with its short forms, -v and -q.

    The function is called with `options` (what was given, by field name), `config`, `assignments`, `verbose` and
    `quiet`; parameters of its own stay. This is what keeps options, environment, file and `config show` the same
    list. `defaults` are shown where the verb has others than EvalConfig.
    """
    own = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("options", *_RunOptions)
    ]
    parameters = [_parameter(name, defaults.get(name)) for name in EvalConfig.model_fields]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _RunOptions.items()
    ]
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]

    def verb(**given: Any) -> None:
        options = {name: given.pop(name) for name in EvalConfig.model_fields}
        short = _short_forms(given.pop("objective"), given.pop("no_calibrate"))
        given["assignments"] = [*given["assignments"], *short]
        function(options=options, **given)

    verb.__doc__ = function.__doc__
    verb.__name__ = function.__name__
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return verb


def _short_forms(objective: str | None, no_calibrate: bool) -> Iterator[str]:
    """What options that stand for a key of a strategy mean, as --set has it."""
    if objective is not None:
        yield f"objective={objective}"
    if no_calibrate:
        yield "calibrate=false"


def _parameter(name: str, default: Any = None) -> inspect.Parameter:
    field = EvalConfig.model_fields[name]
    extra: Any = field.json_schema_extra
    flags: Any = extra["flags"] or ("--" + name.replace("_", "-"),)
    default = field.get_default(call_default_factory=True) if default is None else default
    shown = None if isinstance(default, (bool, list)) or default is None else _home(str(default))
    # typer would put its own "[default: (x)]" for a text that is not the option's real default.
    help_text = f"{field.description}" + (f" [dim]\\[default: {shown}][/dim]" if shown else "")
    common: dict[str, Any] = {"help": help_text, "rich_help_panel": extra["panel"], "show_default": False}
    if isinstance(default, bool):
        option = typer.Option(None, flags[0], metavar=_FLAG, **common)
        annotation: Any = Optional[bool]  # noqa: UP045 - typer reads the annotation
    elif isinstance(default, list):
        option = typer.Option([], *flags, metavar=extra["metavar"], **common)
        annotation = list[str]
    else:
        # Every value is taken as text: EvalConfig checks it, wherever it came from.
        option = typer.Option(None, *flags, metavar=extra["metavar"] or _metavar(field.annotation), **common)
        annotation = Optional[str]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _metavar(annotation: Any) -> str:
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices) and get_origin(annotation) is not None:
        return "|".join(choices)
    return "N" if annotation is int else "NAME"


def _home(text: str) -> str:
    home = str(Path.home())
    return "~" + text[len(home) :] if text.startswith(home + os.sep) else text


@app.command("eval")
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
            "--json", metavar=_FLAG, help="Print one JSON object with the result.", rich_help_panel="Output"
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            metavar=_FLAG,
            help="Plan and print the plan; load nothing.",
            rich_help_panel="Output",
        ),
    ] = False,
) -> None:
    """Run a strategy on real prompts, measure it, record it as an MLflow run."""
    from harness.evaluation import evaluate

    def run(report: "Report") -> int:
        settings = _settings(options, config, assignments, report)
        return evaluate(settings, report, argv=sys.argv, dry_run=dry_run, as_json=as_json)

    _exit(run, verbose=verbose, quiet=quiet)


@app.command("plan")
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
            "--json", metavar=_FLAG, help="Print one JSON object with the plan.", rich_help_panel="Output"
        ),
    ] = False,
) -> None:
    """Show what a run would do and take, loading nothing: what lies where, time by resource, what is left."""

    def run(report: "Report") -> int:
        from harness.planning import show_plan

        settings = _settings(options, config, assignments, report, default_strategy="autoflex")
        return show_plan(settings, report, hardware_file=hardware, as_json=as_json)

    _exit(run, verbose=verbose, quiet=quiet)


@app.command("profile")
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
        bool, typer.Option("--refresh", metavar=_FLAG, help="Measure anew, whatever is kept.")
    ] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", metavar="FILE", help="Write the profile to a file, as JSON."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", metavar=_FLAG, help="Print the profile as JSON.")
    ] = False,
) -> None:
    """Measure what this machine can do, or show what was measured; every prediction rests on it."""

    def run(report: "Report") -> int:
        from harness.machine_profile import show_profile

        options = {"model": model, "device": device, "dtype": dtype, "offload_dir": offload_dir}
        settings = _settings(options, None, [], report)
        return show_profile(
            settings.common,
            report,
            model_named=settings.sources["model"] != "default",
            refresh=refresh,
            output=output,
            as_json=as_json,
        )

    _exit(run)


@app.command("sync")
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

    _exit(lambda report: sync(folder, tracking_uri or os.environ.get("HARNESS_TRACKING_URI"), report))


@app.command("ui")
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

    _exit(run)


@app.command("models")
def models_command() -> None:
    """List what --model can name."""
    from harness.models import list_models

    def run(report: "Report") -> int:
        report.rows(
            "Also any Hugging Face id (owner/name, or owner/name@revision) and any local folder.",
            ("model", "kind", "what it is"),
            [(model.name, model.kind, model.summary) for model in list_models()],
        )
        return 0

    _exit(run)


@app.command("datasets")
def datasets_command() -> None:
    """List what --dataset can name."""
    from harness.prompts import registered_datasets

    def run(report: "Report") -> int:
        report.rows(
            "Also owner/name[:config/split[@revision]] with --prompt-template, and local json, jsonl, csv, parquet.",
            ("dataset", "offline", "licence", "what it is"),
            [
                (alias, "yes" if entry.offline else "", entry.licence, entry.summary)
                for alias, entry in registered_datasets().items()
            ],
        )
        return 0

    _exit(run)


@app.command("strategies")
def strategies_command() -> None:
    """List what --strategy can name."""
    from strategies.registry import STRATEGIES

    def run(report: "Report") -> int:
        report.rows("", ("strategy", "what it does"), [(entry.name, entry.summary) for entry in STRATEGIES])
        return 0

    _exit(run)


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
        bool, typer.Option("--json", metavar=_FLAG, help="Print JSON.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Show every effective value and where it came from."""

    def run(report: "Report") -> int:
        listing = _settings(options, config, assignments, report).listing()
        if as_json:
            report.json({item.key: {"value": item.value, "source": item.source} for item in listing})
        else:
            report.rows(
                "",
                ("key", "value", "from"),
                [(item.key, _config_text(item.value), item.source) for item in listing],
            )
        return 0

    _exit(run, verbose=verbose, quiet=quiet)


def _config_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value is None else str(value)


def _settings(
    options: dict[str, Any],
    config_file: Path | None,
    assignments: list[str],
    report: "Report",
    *,
    default_strategy: str | None = None,
) -> "Settings":
    from harness.config import unknown_variables

    if config_file is None and (named := os.environ.get("HARNESS_CONFIG")):
        config_file = Path(named)
    settings = resolve(
        options,
        config_file=config_file,
        assignments=assignments,
        environ=os.environ,
        default_strategy=default_strategy,
    )
    for name in unknown_variables(os.environ, list(type(settings.strategy).model_fields)):
        report.warn(f"environment variable {name} means nothing here; see `harness config show`")
    return settings


def _exit(run: "Callable[[Report], int]", *, verbose: bool = False, quiet: bool = False) -> None:
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
        code = 4
    except KeyboardInterrupt:
        report.error("interrupted")
        code = 130
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
            "--version", metavar=_FLAG, callback=_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
) -> None:
    """Evaluate LLM inference for models that do not fit the GPU."""


def main() -> None:
    """The console script. A mistake on the command line is one line, like every other mistake."""
    # A closed standard stream (`>&-`) is None to Python; nothing here should have to care.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - open until the end
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
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


if __name__ == "__main__":
    main()
