"""Which strategies there are. A new one is a file, its TOML of defaults, and a line here.

Another package adds one without a line here, through the entry point group GROUP: its name, and a module with `Config`
and `create` (docs/write-a-strategy.md). Cheap to import: names and summaries only; a strategy's module is imported when
it is chosen.
"""

import difflib
import functools
import importlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any, cast

from pydantic import BaseModel

from flexllmgen.errors import UsageError
from strategies.base import Strategy

GROUP = "offload_harness.strategies"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageEntry(StrategyEntry):
    """A strategy of another package: one module has its `Config`, with defaults, and `create`."""

    package: str

    def load_config(self) -> tuple[type[BaseModel], dict[str, Any]]:
        """The model of the strategy's own keys, and the defaults that it gives them itself.

        Raises:
            UsageError: the module cannot be imported or is no strategy.
        """
        config_type = self._member("Config")
        try:
            return cast(type[BaseModel], config_type), config_type().model_dump()
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"strategy {self.name!r} of package {self.package}: {self.module}.Config must be a pydantic model with "
                f"a default for every key: {str(error).splitlines()[0]}"
            ) from error

    def create(self, config: BaseModel) -> Strategy:
        """The strategy, configured."""
        return cast(Strategy, self._member("create")(config))

    def _member(self, name: str) -> Any:
        try:
            return getattr(importlib.import_module(self.module), name)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"strategy {self.name!r} of package {self.package}: {error}; mend or uninstall the package"
            ) from error


@functools.cache
def all_strategies() -> tuple[StrategyEntry, ...]:
    """Ours and those of installed packages; a package cannot replace one of ours."""
    taken = {entry.name for entry in STRATEGIES}
    added: dict[str, StrategyEntry] = {}
    for entry in _packages():
        if entry.name not in taken:
            added.setdefault(entry.name, entry)
    return (*STRATEGIES, *added.values())


def _packages() -> Iterator[PackageEntry]:
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name):
        package = point.dist.metadata["Name"] if point.dist else "unknown"
        summary = (point.dist.metadata["Summary"] if point.dist else None) or f"of package {package}"
        yield PackageEntry(name=point.name, module=point.module, summary=summary, package=package)


def strategy_names() -> tuple[str, ...]:
    """The names that --strategy takes."""
    return tuple(entry.name for entry in all_strategies())


def find_strategy(name: str) -> StrategyEntry:
    """The strategy of that name.

    Raises:
        UsageError: there is none; names those there are.
    """
    for entry in all_strategies():
        if entry.name == name:
            return entry
    near = difflib.get_close_matches(name, strategy_names(), n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise UsageError(f"no strategy {name!r}{hint} There are: {', '.join(strategy_names())}")
