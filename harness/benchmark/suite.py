"""A benchmark's grid written down: TOML files that `harness benchmark --suite` takes, and what is in one.

    summary = "one line for people"          # all keys above the first heading may be left out
    baseline = "accelerate"
    launches = 2
    cell_timeout = "30m"

    [common]                                 # options (with underscores) and strategy keys that all cells share
    model = "builtin"
    batch_size = [1, 4]                      # a list is an axis: each of its values makes cells of its own

    [[cells]]                                # as many of these as one likes
    strategy = ["accelerate", "flexgen"]

    [[cells]]
    strategy = "flexgen"
    policy = "half"                          # a name for the keys below, part of the cell's name
    w_gpu_percent = 50
    w_cpu_percent = 50

What a cell says goes before what [common] says. A strategy's key holds for those strategies of the cell that have it.
Knows nothing of how options are checked: grid.py does that.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError

_TOP = ("summary", "baseline", "launches", "cell_timeout", "common", "cells")
_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite as read: `blocks` has a mapping for each [[cells]], [common] merged in."""

    name: str
    common: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[Mapping[str, Any], ...] = ()
    baseline: str | None = None
    launches: int | None = None
    cell_timeout_s: float | None = None


def shipped_suites() -> dict[str, str]:
    """The suites that come with the harness: name to what each is."""
    return {
        name: str(tomllib.loads(text).get("summary", "")) for name, text in sorted(_shipped_texts().items())
    }


def read_suite(named: str) -> Suite:
    """A shipped suite by its name, or one of the user's by its file.

    Raises:
        UsageError: there is none, it is no TOML, or has keys that a suite does not have.
    """
    path = Path(named).expanduser()
    if text := _shipped_texts().get(named):
        name, raw = named, tomllib.loads(text)
    elif path.is_file() or path.suffix == ".toml":
        name, raw = path.stem, read_toml(path, "--suite")
    else:
        names = list(shipped_suites())
        near = difflib.get_close_matches(named, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"--suite {named}: no such suite; {hint}there are {', '.join(names)}, and any TOML file"
        )
    if unknown := [key for key in raw if key not in _TOP]:
        raise UsageError(
            f"suite {name}: unknown key {unknown[0]!r} at the top; options and strategy keys go under [common] or "
            f"[[cells]], the top has {', '.join(_TOP)}"
        )
    common, blocks = raw.get("common", {}), raw.get("cells", [])
    if not isinstance(common, dict):
        raise UsageError(f"suite {name}: write [common] as one section")
    if not (isinstance(blocks, list) and blocks and all(isinstance(block, dict) for block in blocks)):
        raise UsageError(f"suite {name}: it has no [[cells]]; write at least one, with double brackets")
    for index, block in enumerate([common, *blocks]):
        if bad := [key for key, value in block.items() if isinstance(value, dict) or value == []]:
            where = f"[[cells]] number {index}" if index else "[common]"
            raise UsageError(
                f"suite {name}, {where}: {bad[0]} is a section or an empty list; write a value or a list of values"
            )
    launches, timeout = raw.get("launches"), raw.get("cell_timeout")
    if launches is not None and (not isinstance(launches, int) or isinstance(launches, bool) or launches < 1):
        raise UsageError(f"suite {name}: launches = {launches!r}: write a whole number from 1 up")
    return Suite(
        name=name,
        common=common,
        blocks=tuple({**common, **block} for block in blocks),
        baseline=raw.get("baseline"),
        launches=launches,
        cell_timeout_s=None
        if timeout is None
        else parse_duration(str(timeout), f"suite {name}: cell_timeout"),
    )


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """A TOML file that the option `flag` named.

    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{flag} {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{flag} {path}: not valid TOML: {error}") from None


def parse_duration(text: str, name: str) -> float:
    """Seconds of a text such as 90, 90s, 10m or 1h30m; `name` leads an error's text.

    >>> parse_duration("1h30m", "--cell-timeout")
    5400.0

    Raises:
        UsageError: not a duration, or not more than zero.
    """
    match = _DURATION.fullmatch(text.strip())
    parts = match.groups() if match else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False) if part)
    if seconds <= 0:
        raise UsageError(f"{name} {text}: write seconds, or a time like 90s, 10m, 1h30m")
    return float(seconds)


def _shipped_texts() -> dict[str, str]:
    folder = resources.files("harness.benchmark").joinpath("suites")
    return {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".toml")
    }
