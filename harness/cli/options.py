"""Options of the verbs that take a run's: one for each field of EvalConfig, and the strategy's keys.

Nothing heavy is imported here: help must be cheap.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, get_args, get_origin

import typer

from harness.cli.app import FLAG
from harness.config import EvalConfig, resolve

if TYPE_CHECKING:
    from harness.config import Settings
    from harness.report import Report

_RunOptions = {
    "config": (Optional[Path], typer.Option(None, "--config", metavar="FILE", help="TOML file with options and the strategy's keys.", rich_help_panel="Model and strategy")),  # noqa: UP045, E501
    "assignments": (list[str], typer.Option([], "--set", metavar="KEY=VALUE", help="Change one key of the strategy; may be repeated.", rich_help_panel="Model and strategy")),  # noqa: E501
    "objective": (Optional[str], typer.Option(None, "--objective", metavar="throughput|latency", help="What the policy should be best at; short for --set objective=...", rich_help_panel="Model and strategy")),  # noqa: UP045, E501
    "no_calibrate": (bool, typer.Option(False, "--no-calibrate", metavar=FLAG, help="Run the policy as searched, without timing a few steps first; short for --set calibrate=false.", rich_help_panel="Model and strategy")),  # noqa: E501
    "verbose": (bool, typer.Option(False, "--verbose", "-v", metavar=FLAG, help="Show the log and, for errors, the traceback.", rich_help_panel="Output")),  # noqa: E501
    "quiet": (bool, typer.Option(False, "--quiet", "-q", metavar=FLAG, help="No progress: results, warnings and errors only.", rich_help_panel="Output")),  # noqa: E501
}  # fmt: skip


def takes_run_options(
    function: Callable[..., None],
    *,
    several: Sequence[str] = (),
    first: Sequence[str] = (),
    set_help: str = "",
    **defaults: str,
) -> Callable[..., None]:
    """Give a verb every field of EvalConfig as an option, and --config, --set with its short forms, -v and -q.

    The function is called with `options` (what was given, by field name), `config`, `assignments`, `verbose` and
    `quiet`; parameters of its own stay. This is what keeps options, environment, file and `config show` the same
    list. `defaults` are shown where the verb has others than EvalConfig; options named in `several` may be given
    several times, and come as lists. Parameters of its own named in `first` come first in the help; `set_help` is what it
    says of --set beside the rest.
    """
    own = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("options", *_RunOptions)
    ]
    parameters = [
        _parameter(name, defaults.get(name), several=name in several) for name in EvalConfig.model_fields
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in {**_RunOptions, **_set_option(set_help)}.items()
    ]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    leading = [parameter for parameter in own if parameter.name in first]
    parameters = [*leading, *parameters, *(parameter for parameter in own if parameter.name not in first)]

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


def _set_option(more: str) -> dict[str, Any]:
    annotation, default = _RunOptions["assignments"]
    if more:
        default = copy(default)
        default.help = f"{default.help} {more}"
    return {"assignments": (annotation, default)}


def _short_forms(objective: str | None, no_calibrate: bool) -> Iterator[str]:
    """What options that stand for a key of a strategy mean, as --set has it."""
    if objective is not None:
        yield f"objective={objective}"
    if no_calibrate:
        yield "calibrate=false"


def _parameter(name: str, default: Any = None, *, several: bool = False) -> inspect.Parameter:
    field = EvalConfig.model_fields[name]
    extra: Any = field.json_schema_extra
    flags: Any = extra["flags"] or ("--" + name.replace("_", "-"),)
    default = field.get_default(call_default_factory=True) if default is None else default
    shown = None if isinstance(default, (bool, list)) or default is None else _home(str(default))
    more = " May be repeated." if several else ""
    # typer would put its own "[default: (x)]" for a text that is not the option's real default.
    help_text = f"{field.description}{more}" + (f" [dim]\\[default: {shown}][/dim]" if shown else "")
    common: dict[str, Any] = {"help": help_text, "rich_help_panel": extra["panel"], "show_default": False}
    if isinstance(default, bool):
        option = typer.Option(None, flags[0], metavar=FLAG, **common)
        annotation: Any = Optional[bool]  # noqa: UP045 - typer reads the annotation
    elif isinstance(default, list):
        option = typer.Option([], *flags, metavar=extra["metavar"], **common)
        annotation = list[str]
    else:
        # Every value is taken as text: EvalConfig checks it, wherever it came from.
        metavar = extra["metavar"] or _metavar(field.annotation)
        option = typer.Option(
            [] if several else None, *flags, metavar=metavar, autocompletion=_completion(name), **common
        )
        annotation = list[str] if several else Optional[str]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _completion(name: str) -> Callable[[str], list[str]] | None:
    """What a shell may offer for the value of an option; None: files, which the shell offers itself."""

    def matching(incomplete: str) -> list[str]:
        return [value for value in values() if value.startswith(incomplete)]

    def values() -> list[str]:
        if name == "strategy":
            from strategies.registry import strategy_names

            return list(strategy_names())
        if name == "model":
            from harness.models import list_models

            return [model.name for model in list_models()]
        if name == "dataset":
            from harness.prompts import registered_datasets

            return list(registered_datasets())
        return choices

    choices = [
        str(choice)
        for choice in get_args(EvalConfig.model_fields[name].annotation)
        if isinstance(choice, str)
    ]
    return matching if choices or name in ("strategy", "model", "dataset") else None


def _metavar(annotation: Any) -> str:
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices) and get_origin(annotation) is not None:
        return "|".join(choices)
    return "N" if annotation is int else "NAME"


def _home(text: str) -> str:
    home = str(Path.home())
    return "~" + text[len(home) :] if text.startswith(home + os.sep) else text


def settings_of(
    options: dict[str, Any],
    config_file: Path | None,
    assignments: list[str],
    report: "Report",
    *,
    default_strategy: str | None = None,
) -> "Settings":
    """The effective settings of a run: options over --set, --config, environment and defaults; what is odd is warned of.

    Raises:
        UsageError: an unknown name or key, or a value that cannot be.
    """
    from harness.config import unknown_variables

    settings = resolve(
        options,
        config_file=config_file or config_named_by(os.environ),
        assignments=assignments,
        environ=os.environ,
        default_strategy=default_strategy,
    )
    for name in unknown_variables(os.environ, list(type(settings.strategy).model_fields)):
        report.warn(f"environment variable {name} means nothing here; see `harness config show`")
    return settings


def config_named_by(environ: Mapping[str, str]) -> Path | None:
    """The config file that the environment names."""
    named = environ.get("HARNESS_CONFIG")
    return Path(named) if named else None


def tracking_uri_of(option: str | None) -> str | None:
    """The MLflow store that the option names, or the environment."""
    return option or os.environ.get("HARNESS_TRACKING_URI")
