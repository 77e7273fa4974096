"""What a run is told to do: every option once, with its default, and where each value came from.

`EvalConfig` is the one list of common options; the command line, the environment, the config file,
`harness config show` and the recorded params are all made from it. What one strategy alone has is
in that strategy's own model and TOML file (strategies/), reached by `--config` and `--set`.

Precedence: option > environment HARNESS_* > config file > default.
"""

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)

from flexllmgen.errors import UsageError
from strategies.registry import STRATEGIES, find_strategy

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

ENV_PREFIX = "HARNESS_"


def cache_dir() -> Path:
    """The user's cache folder of this tool: HARNESS_CACHE_DIR, else XDG_CACHE_HOME, else ~/.cache."""
    if own := os.environ.get("HARNESS_CACHE_DIR"):
        return Path(own).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "offload-harness"


def parse_size(value: Any) -> int:
    """Bytes of a size such as 16GiB (binary) or 800MB (decimal).

    >>> parse_size("1.5GiB")
    1610612736

    Raises:
        ValueError: not a size, or not more than zero.
    """
    if isinstance(value, bool):
        raise ValueError("not a size; write it like 16GiB or 800MB")
    try:
        size = int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise ValueError("not a size; write it like 16GiB or 800MB") from None
    if size <= 0:
        raise ValueError("a size must be more than zero, like 16GiB or 800MB")
    return size


def _whole_number(value: Any) -> Any:
    """Refuse what pydantic would take for 0 and 1."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("there is no such home folder") from None


Size = Annotated[int, BeforeValidator(parse_size)]
Count = Annotated[int, BeforeValidator(_whole_number)]
PathText = Annotated[Path, AfterValidator(_expand_home), PlainSerializer(str)]
Model = TypeVar("Model", bound=BaseModel)


def _option(default: Any, help_text: str, *flags: str, panel: str, metavar: str = "", **checks: Any) -> Any:
    extra: Any = {"flags": flags, "panel": panel, "metavar": metavar}
    if callable(default):
        return Field(default_factory=default, description=help_text, json_schema_extra=extra, **checks)
    return Field(default, description=help_text, json_schema_extra=extra, **checks)


_RUN, _PROMPTS, _MODEL, _MACHINE = "Run", "Prompts", "Model and strategy", "Machine"
_MEASURE, _RECORD, _OUTPUT = "Measuring", "Record", "Output"


class EvalConfig(BaseModel):
    """The options that every strategy has. Sizes are bytes; lengths are tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    strategy: str = _option(
        "accelerate",
        "How the model is run; see `harness strategies`.",
        "--strategy",
        "-s",
        "--mode",
        panel=_MODEL,
    )
    model: str = _option(
        "facebook/opt-1.3b",
        "A Hugging Face id, a local folder, or `builtin`; see `harness models`.",
        "--model",
        "-m",
        panel=_MODEL,
    )
    weights: Literal["pretrained", "random"] = _option(
        "pretrained",
        "The checkpoint's weights, or random ones of the same shapes (speed runs, no download).",
        panel=_MODEL,
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _option(
        "auto",
        "Number format of weights and KV cache; auto: the checkpoint's on CUDA, float32 on CPU.",
        panel=_MODEL,
    )
    allow_lossy: bool = _option(
        False,
        "Let autoflex choose policies that change what is generated (compressed weights or KV cache). What flexgen's own "
        "keys ask for needs no leave.",
        panel=_MODEL,
    )
    trust_remote_code: bool = _option(
        False, "Let the model's repository run its own Python code.", panel=_MODEL
    )
    allow_pickle: bool = _option(False, "Load pickle (.bin) checkpoints, which can run code.", panel=_MODEL)

    dataset: str = _option(
        "humaneval",
        "An alias (see `harness datasets`), owner/name\\[:config\\[/split]]\\[@revision], or a json, jsonl, csv or parquet file.",
        "--dataset",
        "-d",
        panel=_PROMPTS,
    )
    num_prompts: Count = _option(
        8,
        "Prompts to run: drawn by seed, repeated with a warning where there are fewer.",
        "--num-prompts",
        "-n",
        panel=_PROMPTS,
        ge=1,
    )
    prompt_mode: Literal["pad", "fill"] = _option(
        "pad",
        "pad: a prompt a row, cut and left-padded to --input-len; fill: prompts joined until the row is full.",
        panel=_PROMPTS,
    )
    prompt_template: str | None = _option(
        None,
        "How a row becomes a prompt, with its columns: '{question}', '{turns\\[0]}'.",
        panel=_PROMPTS,
        metavar="TEXT",
    )
    chat_template: Literal["auto", "on", "off"] = _option(
        "auto",
        "Wrap prompts in the model's chat template; auto: for chat and instruction data when the model has one.",
        panel=_PROMPTS,
    )
    input_len: Count = _option(128, "Tokens of each prompt row.", panel=_PROMPTS, ge=1)
    gen_len: Count = _option(32, "Tokens to generate for each prompt, exactly.", panel=_PROMPTS, ge=1)
    batch_size: Count = _option(1, "Prompts run together.", "--batch-size", "-b", panel=_PROMPTS, ge=1)

    device: Literal["auto", "cuda", "cpu"] = _option("auto", "Where to compute.", panel=_MACHINE)
    gpu_mem: Size | None = _option(
        None,
        "Use no more GPU memory than this (16GiB, 800MB): emulates a smaller GPU. Without a GPU: what stands in for its "
        "memory; accelerate then has this and --cpu-mem as one. Not given: what is free.",
        panel=_MACHINE,
        metavar="SIZE",
    )
    cpu_mem: Size | None = _option(
        None,
        "Keep no more of the model in host memory than this: emulates a smaller machine. Not given: 90 % of what is free.",
        panel=_MACHINE,
        metavar="SIZE",
    )
    offload_dir: PathText = _option(
        lambda: cache_dir() / "offload", "Folder for what goes to disk.", panel=_MACHINE, metavar="DIR"
    )

    warmup: Count = _option(
        1, "Untimed passes over the first batch; the first is logged as the cold run.", panel=_MEASURE, ge=0
    )
    repeats: Count = _option(
        3, "Timed passes over all prompts; the median is reported.", panel=_MEASURE, ge=1
    )
    seed: Count = _option(
        0, "Chooses the prompts and draws random weights.", panel=_MEASURE, ge=0, le=2**32 - 1
    )

    experiment: str = _option("offload-eval", "MLflow experiment.", panel=_RECORD, min_length=1)
    run_name: str | None = _option(
        None, "MLflow run name; made from strategy and model if not given.", panel=_RECORD, metavar="TEXT"
    )
    tag: list[str] = _option(list, "Tag the run; may be repeated.", panel=_RECORD, metavar="KEY=VALUE")
    tracking_uri: str | None = _option(
        None,
        "MLflow store; default: MLFLOW_TRACKING_URI, else mlruns/mlflow.db here.",
        panel=_RECORD,
        metavar="URI",
    )
    no_mlflow: bool = _option(
        False, "Only write the result folder; deliver it later with `harness sync`.", panel=_RECORD
    )
    results_dir: PathText = _option(
        lambda: Path("results"), "Folder for result folders.", panel=_RECORD, metavar="DIR"
    )
    log_file: PathText = _option(
        lambda: Path("log.log"), "Log file, appended to.", panel=_RECORD, metavar="FILE"
    )

    @property
    def context(self) -> int:
        """Positions one row needs: prompt and generated tokens."""
        return self.input_len + self.gen_len

    def tags(self) -> dict[str, str]:
        """The tags given as KEY=VALUE, and `emulated` under a cap: such figures are of no real machine.

        Raises:
            UsageError: a tag has no `=`.
        """
        pairs = {} if self.gpu_mem is None and self.cpu_mem is None else {"emulated": "true"}
        for text in self.tag:
            key, equals, value = text.partition("=")
            if not equals or not key.strip():
                raise UsageError(f"--tag {text!r}: write it as KEY=VALUE")
            pairs[key.strip()] = value.strip()
        return pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One effective value and where it came from, for `harness config show`."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole configuration of a run: common options, the strategy's own keys, and all sources."""

    common: EvalConfig
    strategy: BaseModel
    sources: Mapping[str, str]

    def listing(self) -> list[Setting]:
        """Every effective value, common options first, in the order of their definition."""
        values = self.common.model_dump(mode="json")
        values["tracking_uri"] = values["tracking_uri"] or f"sqlite:///{Path('mlruns/mlflow.db').absolute()}"
        pairs = [*values.items(), *self.strategy.model_dump(mode="json").items()]
        return [Setting(key=key, value=value, source=self.sources[key]) for key, value in pairs]


def flag_of(name: str) -> str:
    """The long option of a field, as the user types it."""
    flags = _extra(name)["flags"]
    return flags[0] if flags else "--" + name.replace("_", "-")


def _extra(name: str) -> dict[str, Any]:
    extra = EvalConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra


def resolve(
    options: Mapping[str, Any],
    *,
    config_file: Path | None,
    assignments: list[str],
    environ: Mapping[str, str],
    default_strategy: str | None = None,
) -> Settings:
    """Put together the effective configuration.

    Args:
        options: what was given on the command line, by field name; None means not given.
        config_file: TOML with common options and the chosen strategy's keys, flat.
        assignments: `--set key=value` texts for the strategy's keys.
        environ: the environment; HARNESS_<FIELD> is read.
        default_strategy: the one that is taken where none is named, if not the usual one.

    Raises:
        UsageError: an unknown key (the nearest is named), a value that does not fit.
    """
    given = {key: value for key, value in options.items() if value is not None and value != []}
    from_file = _read_config_file(config_file) if config_file else {}
    common_names = list(EvalConfig.model_fields)
    raw: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def layer(key: str, value: Any, source: str) -> None:
        raw[key] = value
        sources[key] = source

    for key in common_names:
        variable = ENV_PREFIX + key.upper()
        if key in from_file:
            layer(key, from_file.pop(key), f"file {config_file}")
        if variable in environ:
            value: Any = environ[variable]
            layer(key, value.split(",") if key == "tag" else value, f"environment {variable}")
        if key in given:
            layer(key, given[key], f"option {flag_of(key)}")
        if key == "tracking_uri" and key not in raw and (uri := environ.get("MLFLOW_TRACKING_URI")):
            layer(key, uri, "environment MLFLOW_TRACKING_URI")
        sources.setdefault(key, "default")
    if default_strategy is not None:
        raw.setdefault("strategy", default_strategy)
    common = _validate(EvalConfig, raw, sources)
    common.tags()

    entry = find_strategy(common.strategy)
    config_type, defaults = entry.load_config()
    values = dict(defaults)
    own_names = list(config_type.model_fields)
    own_sources = dict.fromkeys(own_names, f"default ({entry.name}.toml)")
    for key, value in from_file.items():
        if isinstance(value, dict):
            raise UsageError(f"{config_file}: [{key}]: keys are flat, without sections; take the heading out")
        if key not in own_names:
            hint = _other_strategy(key, entry.name) or _nearest(key, [*common_names, *own_names])
            raise UsageError(f"{config_file}: unknown key {key!r}{hint}")
        values[key], own_sources[key] = value, f"file {config_file}"
    for key in own_names:
        variable = ENV_PREFIX + key.upper()
        if variable in environ:
            values[key], own_sources[key] = _toml_value(environ[variable]), f"environment {variable}"
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise UsageError(f"--set {text!r}: write it as KEY=VALUE")
        if key in common_names:
            raise UsageError(f"--set {key}: this is an option of every strategy; give it as {flag_of(key)}")
        if key not in own_names:
            hint = _other_strategy(key, entry.name) or _nearest(key, own_names, common_names)
            raise UsageError(f"--set: strategy {entry.name} has no key {key!r}{hint}")
        values[key], own_sources[key] = _toml_value(value.strip()), f"option --set {key}"
    strategy = _validate(config_type, values, own_sources)
    return Settings(common=common, strategy=strategy, sources={**sources, **own_sources})


def unknown_variables(environ: Mapping[str, str], strategy_keys: list[str]) -> list[str]:
    """HARNESS_* variables that mean nothing here, for a warning."""
    known = {
        ENV_PREFIX + key.upper() for key in [*EvalConfig.model_fields, *strategy_keys, "cache_dir", "config"]
    }
    return sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}") from None


def _toml_value(text: str) -> Any:
    """A value as TOML would read it; what is no TOML literal is taken as the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _other_strategy(key: str, chosen: str) -> str:
    """A hint where the key is one of another strategy's."""
    for entry in STRATEGIES:
        if entry.name != chosen and key in entry.load_config()[0].model_fields:
            return f"; it is a key of {entry.name}: add -s {entry.name}"
    return ""


def did_you_mean(key: str, names: Sequence[str]) -> str:
    """A hint at the one that was meant, for the end of a message; empty where none is like it."""
    match = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _nearest(key: str, names: Sequence[str], options: Sequence[str] = ()) -> str:
    """A hint at what was meant, of the keys that there are or of the options; else all keys."""
    return did_you_mean(key, [*names, *options]) or f"; known keys: {', '.join(names)}"


def _validate(model: type[Model], raw: Mapping[str, Any], sources: Mapping[str, str]) -> Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        name = flag_of(key) if key in EvalConfig.model_fields else key
        source = sources.get(key, "default")
        told = "" if source == f"option {name}" else f" (from {source})"
        raise UsageError(f"{name} {first.get('input')!r}: {_in_plain_words(first)}{told}") from None


def _in_plain_words(error: "ErrorDetails") -> str:
    """Why a value does not fit, for people who have never heard of pydantic."""
    kind, bounds = error["type"], error.get("ctx", {})
    if kind == "greater_than_equal":
        return f"must be {_bound(bounds['ge'])} or more"
    if kind == "less_than_equal":
        return f"must be {_bound(bounds['le'])} or less"
    if kind == "greater_than":
        return f"must be more than {_bound(bounds['gt'])}"
    if kind == "less_than":
        return f"must be less than {_bound(bounds['lt'])}"
    if kind in ("int_parsing", "int_from_float", "int_type"):
        return "must be a whole number"
    if kind in ("float_parsing", "float_type"):
        return "must be a number"
    if kind in ("bool_parsing", "bool_type"):
        return "must be true or false"
    if kind == "literal_error":
        return f"must be {bounds['expected']}"
    if kind == "string_type":
        return "must be a text, in quotes"
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)


def _bound(number: float) -> str:
    return f"{number:g}" if abs(number) < 1e6 else str(number)
