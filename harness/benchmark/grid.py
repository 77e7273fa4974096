"""From options and suites to the cells of a benchmark: what each is told, its name, and the mistakes in it.

The grid is a product: of the options that were given several times, and of strategies and policies. Everything a user
can get wrong that can be seen without loading a model is told here, before anything runs. Knows nothing of how a cell
is run.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexllmgen.errors import OffloadError, UsageError
from flexllmgen.policy import Placement
from harness.benchmark.layers import AXES, Block, Layers, keys_of, read_assignment
from harness.benchmark.names import axes_of, unique_names
from harness.benchmark.record import Cell
from harness.benchmark.suite import Suite, read_suite, read_toml
from harness.config import ENV_PREFIX, EvalConfig, Settings, did_you_mean
from strategies.registry import find_strategy, strategy_names

# The seed's three; flexgen's own defaults keep all on the compute device.
DEFAULT_STRATEGIES = ("accelerate", "flexgen", "autoflex")
# Options whose one value is a list; it is no axis.
_LISTS = ("tag",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user asked for; `options` maps names of EvalConfig to texts, those of AXES to lists of them."""

    options: Mapping[str, Any] = field(default_factory=dict)
    config_file: Path | None = None
    assignments: Sequence[str] = ()
    policies: Sequence[Path] = ()
    suite: str | None = None
    baseline: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The cells, in the order they run, and what the suite says of the whole."""

    cells: tuple[Cell, ...]
    common: EvalConfig
    baseline: str
    suite: Suite | None = None


def make_grid(asked: Asked, environ: Mapping[str, str]) -> Grid:
    """The cells that were asked for.

    An option of the command line goes before what a suite or a policy file says of it; that goes before the environment,
    and the environment before `--config`.

    Raises:
        UsageError: an unknown name, key or value; options that do not go together.
    """
    given = {key: value for key, value in asked.options.items() if value is not None and value != []}
    config = read_toml(asked.config_file, "--config") if asked.config_file else {}
    suite = None
    if asked.suite is not None:
        if asked.policies:
            raise UsageError(
                "--policy and --suite: a suite has its policies as [[cells]]; take one of the two"
            )
        suite = read_suite(asked.suite)
        blocks = _suite_blocks(suite, given.pop("strategy", []))
    else:
        blocks = _blocks(given.pop("strategy", []), asked.policies, config, environ)
    strategies = list(dict.fromkeys(name for block in blocks for name in block.values["strategy"]))
    assignments = [read_assignment(text, strategies) for text in asked.assignments]
    layer = Layers(given, config, assignments, environ, asked.config_file)
    settings: list[tuple[Settings, str | None]] = []
    for values, block in _expand(blocks, given, crossed=suite is None):
        resolved = layer.resolve(values, block)
        if not any(_same(resolved, other) for other, _ in settings):
            settings.append((resolved, block.policy))
    axes = axes_of(settings)
    cells = tuple(
        Cell(
            name=name,
            axes=axis,
            common=one.common.model_dump(mode="json"),
            strategy_config=one.strategy.model_dump(mode="json"),
            sources=dict(one.sources),
        )
        for name, axis, (one, _) in zip(unique_names(axes), axes, settings, strict=True)
    )
    for checked, _ in settings:
        _check(checked)
    baseline = asked.baseline or (suite.baseline if suite else None) or cells[0].name
    names = [cell.name for cell in cells]
    if baseline not in (*names, *strategies):
        raise UsageError(f"--baseline {baseline}: no such cell; there are {', '.join(names)}")
    return Grid(cells=cells, common=settings[0][0].common, baseline=baseline, suite=suite)


def _blocks(
    strategies: Sequence[str], policies: Sequence[Path], config: Mapping[str, Any], environ: Mapping[str, str]
) -> list[Block]:
    named = (
        strategies
        or [name for name in (environ.get(ENV_PREFIX + "STRATEGY"), config.get("strategy")) if name][:1]
    )
    if not named and not policies:
        named = DEFAULT_STRATEGIES
    blocks = [Block(values={"strategy": [find_strategy(name).name]}, source="") for name in named]
    for path in policies:
        values = read_toml(path, "--policy")
        if not isinstance(values.get("strategy"), str):
            raise UsageError(
                f'--policy {path}: it does not name its strategy; add a line such as strategy = "flexgen"'
            )
        find_strategy(values["strategy"])
        blocks.append(
            Block(
                values={key: [value] for key, value in values.items()},
                source=f"--policy {path}",
                policy=path.stem,
                named=frozenset(values),
            )
        )
    return blocks


def _suite_blocks(suite: Suite, wanted: Sequence[str]) -> list[Block]:
    """A block for each [[cells]] that has a strategy among `wanted`; all, where none is named."""
    for name in wanted:
        find_strategy(name)
    blocks = []
    for number, raw in enumerate(suite.blocks, start=1):
        source = f"suite {suite.name}, [[cells]] number {number}"
        values = {
            key: value if isinstance(value, list) and key not in _LISTS else [value]
            for key, value in raw.items()
        }
        policy = values.pop("policy", [None])
        if len(policy) != 1 or not isinstance(policy[0], str | None):
            raise UsageError(f"{source}: policy is one name; write a [[cells]] for each")
        values.setdefault("strategy", list(DEFAULT_STRATEGIES))
        for name in values["strategy"]:
            try:
                find_strategy(str(name))
            except UsageError as error:
                raise UsageError(f"{source}: {error}") from None
        if wanted:
            values["strategy"] = [name for name in values["strategy"] if name in wanted]
        if values["strategy"]:
            # A key of [common] may be for the strategies of another [[cells]].
            shared = (
                {key for key in suite.common if raw[key] == suite.common[key]} if not wanted else set(raw)
            )
            blocks.append(
                Block(values=values, source=source, policy=policy[0], named=frozenset(set(values) - shared))
            )
    _check_common(suite)
    if not blocks:
        raise UsageError(
            f"--strategy {', '.join(wanted)}: suite {suite.name} has no cell with it; leave --strategy out"
        )
    return blocks


def _check_common(suite: Suite) -> None:
    known = {key for name in strategy_names() for key in keys_of(name)} | {*EvalConfig.model_fields, "policy"}
    for key in suite.common:
        if key not in known:
            raise UsageError(
                f"suite {suite.name}, [common]: no option and no strategy's key is called {key!r}"
                + did_you_mean(key, sorted(known))
            )


def _expand(
    blocks: Sequence[Block], given: Mapping[str, Any], *, crossed: bool
) -> Iterator[tuple[dict[str, Any], Block]]:
    """Every combination of every block.

    Crossed, the blocks are the innermost axis: the strategies of one workload stand beside each other.
    """
    options = {key: given[key] for key in AXES if key in given}

    def product(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
        order = [key for key in AXES if key in axes] + [key for key in axes if key not in AXES]
        # The strategy varies fastest but for its own keys.
        order.sort(key=lambda key: key == "strategy")
        for values in itertools.product(*(axes[key] for key in order)):
            yield dict(zip(order, values, strict=True))

    if crossed:
        for outer in product(options):
            for block in blocks:
                for inner in product(block.values):
                    yield {**inner, **outer}, block
    else:
        for block in blocks:
            for values in product({**block.values, **options}):
                yield values, block


def _check(settings: Settings) -> None:
    """What can be wrong with a cell and be seen by names and numbers alone.

    Raises:
        UsageError: no such model, rows longer than it can take, shares over 100 %.
    """
    from harness.models import resolve_model
    from harness.prepare import check_context

    config = settings.common
    values = settings.strategy.model_dump()
    for key, value in values.items():
        other = key.replace("_gpu_percent", "_cpu_percent")
        if other != key and other in values:
            Placement.from_percent(value, values[other], f"{key}, {other}")
    try:
        # Only the dimensions: nothing of the weights is fetched before the cell's own process wants them.
        source = resolve_model(config.model, weights="random", trust_remote_code=config.trust_remote_code)
        check_context(config, source)
    except OffloadError as error:
        raise UsageError(str(error)) from error


def _same(one: Settings, other: Settings) -> bool:
    return one.common == other.common and one.strategy == other.strategy
