"""Which strategies there are. A new one is a file, its TOML of defaults, and a line here.

Cheap to import: names and summaries only; a strategy's module is imported when it is chosen.
"""

import difflib
import importlib
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

from pydantic import BaseModel

from flexllmgen.errors import UsageError
from strategies.base import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyEntry:
    """A strategy that can be named: where it is, and one line on what it does."""

    name: str
    module: str
    summary: str

    def load_config(self) -> tuple[type[BaseModel], dict[str, Any]]:
        """The model of the strategy's own keys, and their defaults from the TOML beside it.

        The file also names its strategy, so that a copy of it is a whole config file; that is no key of its own.
        """
        config_type = cast(type[BaseModel], importlib.import_module(self.module + "_config").Config)
        text = resources.files("strategies").joinpath(f"{self.name}.toml").read_text(encoding="utf-8")
        defaults = tomllib.loads(text)
        assert defaults.pop("strategy") == self.name
        return config_type, defaults

    def create(self, config: BaseModel) -> Strategy:
        """The strategy, configured. Imports its module, and with it torch."""
        return cast(Strategy, importlib.import_module(self.module).create(config))


STRATEGIES: tuple[StrategyEntry, ...] = (
    StrategyEntry(
        name="accelerate",
        module="strategies.accelerate",
        summary="Hugging Face accelerate: whole layers on GPU, CPU and disk, KV cache on the GPU or in host memory",
    ),
    StrategyEntry(
        name="flexgen",
        module="strategies.flexgen",
        summary="our own engine: exact shares of weights, KV cache and activations on GPU, CPU and disk, copies overlapped",
    ),
    StrategyEntry(
        name="autoflex",
        module="strategies.autoflex",
        summary="the fastest policy for that engine: profiles the machine, predicts every policy, runs the best",
    ),
)


def strategy_names() -> tuple[str, ...]:
    """The names that --strategy takes."""
    return tuple(entry.name for entry in STRATEGIES)


def find_strategy(name: str) -> StrategyEntry:
    """The strategy of that name.

    Raises:
        UsageError: there is none; names those there are.
    """
    for entry in STRATEGIES:
        if entry.name == name:
            return entry
    near = difflib.get_close_matches(name, strategy_names(), n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise UsageError(f"no strategy {name!r}{hint} There are: {', '.join(strategy_names())}")
