"""What one cell is told: its own values over what holds for all cells, resolved and checked as a run's options are.

Knows nothing of the grid around the cell.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError
from harness.config import ENV_PREFIX, EvalConfig, Settings, flag_of, resolve
from strategies.registry import find_strategy, strategy_names

# Options that may be given several times, in the order of the cells: the first varies slowest.
AXES = (
    "model",
    "dtype",
    "num_prompts",
    "input_len",
    "gen_len",
    "gpu_mem",
    "cpu_mem",
    "batch_size",
    "strategy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of the grid: the product of `values`. `named` keys must mean something to one of its strategies."""

    values: Mapping[str, Sequence[Any]]
    source: str
    policy: str | None = None
    named: frozenset[str] = frozenset()


class Layers:
    """Resolves a cell: what it says itself, over what holds for all of them."""

    def __init__(
        self,
        given: Mapping[str, Any],
        config: Mapping[str, Any],
        assignments: Sequence[tuple[str | None, str, str]],
        environ: Mapping[str, str],
        config_file: Path | None,
    ) -> None:
        self.given, self.config, self.assignments = given, dict(config), assignments
        self.environ = environ
        self.config_file = config_file
        self.config.pop("strategy", None)

    def resolve(self, values: Mapping[str, Any], block: Block) -> Settings:
        """The cell of `block` that has these values, one per option or key, with where each came from.

        Raises:
            UsageError: an unknown name or key, or a value that cannot be; the message says where it stands.
        """
        strategy = find_strategy(str(values["strategy"])).name
        own = keys_of(strategy)
        options: dict[str, Any] = {}
        sets: dict[str, str] = {}
        sources: dict[str, str] = {}

        def layer(pairs: Mapping[str, Any], source: str, named: frozenset[str]) -> None:
            for key, value in pairs.items():
                if key in EvalConfig.model_fields:
                    options[key] = value
                elif key in own:
                    sets[key] = _as_toml(value)
                elif key in named:
                    # resolve knows the nearest name.
                    sets[key] = _as_toml(value)
                else:
                    continue
                sources[key] = source

        fallback = {
            key: value for key, value in self.config.items() if ENV_PREFIX + key.upper() not in self.environ
        }
        unknown = [key for key in self.config if key not in EvalConfig.model_fields and not _known(key)]
        layer(fallback, f"file {self.config_file}", frozenset(unknown))
        # A key that is named may be another strategy's of the same [[cells]].
        strategies = [str(name) for name in block.values["strategy"]]
        others = {key for name in strategies if name != strategy for key in keys_of(name)}
        layer(values, block.source, block.named - others)
        for key in self.given:
            # What of an axis is this cell's own is in `values` already.
            if key not in AXES:
                options[key] = self.given[key]
            sources[key] = f"option {flag_of(key)}"
        for of, key, value in self.assignments:
            if of in (None, strategy) and key in own:
                sets[key] = value
                sources[key] = f"option --set {key}"
        try:
            settings = resolve(
                options,
                config_file=None,
                assignments=[f"{key}={value}" for key, value in sets.items()],
                environ=self.environ,
            )
        except UsageError as error:
            if not block.source:
                raise
            raise UsageError(f"{block.source}: {str(error).removeprefix('--set: ')}") from None
        return Settings(
            common=settings.common,
            strategy=settings.strategy,
            sources={**settings.sources, **{key: text for key, text in sources.items() if text}},
        )


def read_assignment(text: str, strategies: Sequence[str]) -> tuple[str | None, str, str]:
    """`key=value` for the strategies that have the key, or `strategy.key=value` for one: (strategy, key, value).

    Raises:
        UsageError: it is neither, or none of the strategies has the key.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text!r}: write it as KEY=VALUE or STRATEGY.KEY=VALUE")
    of, dot, key = name.strip().rpartition(".")
    if key in EvalConfig.model_fields:
        raise UsageError(f"--set {key}: this is an option of every strategy; give it as {flag_of(key)}")
    if dot and of not in strategies:
        raise UsageError(f"--set {text}: no cell runs {of!r}; the strategies are {', '.join(strategies)}")
    if not any(key in keys_of(strategy) for strategy in ([of] if dot else strategies)):
        asked = [of] if dot else list(strategies)
        known = sorted({name for strategy in asked for name in keys_of(strategy)})
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        has = f"{asked[0]} has no" if len(asked) == 1 else f"none of {', '.join(asked)} has a"
        raise UsageError(f"--set {text}: {has} key {key!r}; {hint}")
    return of or None, key, value.strip()


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else _quoted(str(value))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def keys_of(strategy: str) -> list[str]:
    """The keys that a strategy alone has."""
    return list(find_strategy(strategy).load_config()[0].model_fields)


def _known(key: str) -> bool:
    return any(key in keys_of(name) for name in strategy_names())
