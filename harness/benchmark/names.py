"""What tells the cells of a grid apart, and the names made of it: readable, unique, stable, safe as file names."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from harness.config import Settings
from harness.results import Scalar

# In a name, the figure with what it counts.
_SHORT = {
    "batch_size": "b",
    "input_len": "in",
    "gen_len": "gen",
    "num_prompts": "n",
    "gpu_mem": "gpu",
    "cpu_mem": "cpu",
}
# Where results go, not what is measured.
_NO_AXES = ("strategy", "tag", "run_name")
_LONGEST = 80


def axes_of(cells: Sequence[tuple[Settings, str | None]]) -> list[dict[str, Scalar]]:
    """For each cell, given with the name of its policy, what tells it from the others, by option or strategy key.

    Its strategy always; options that not all cells share; its policy; and strategy keys in which cells of the same
    strategy and policy differ.
    """
    common = [settings.common.model_dump(mode="json") for settings, _ in cells]
    keys = [settings.strategy.model_dump(mode="json") for settings, _ in cells]
    strategies = [settings.common.strategy for settings, _ in cells]
    varying = [
        name
        for name in common[0]
        if name not in _NO_AXES and any(one[name] != common[0][name] for one in common)
    ]
    axes = []
    for index, (settings, policy) in enumerate(cells):
        alike = [
            keys[other]
            for other, (_, other_policy) in enumerate(cells)
            if strategies[other] == settings.common.strategy and other_policy == policy
        ]
        own = {name: value for name, value in keys[index].items() if any(one[name] != value for one in alike)}
        axes.append(
            {
                "strategy": settings.common.strategy,
                **({"policy": policy} if policy else {}),
                **{name: common[index][name] for name in varying},
                **own,
            }
        )
    return axes


def unique_names(axes: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """A name for each cell by what tells it apart."""
    models = list(dict.fromkeys(str(one["model"]) for one in axes if "model" in one))
    last = [short_model(model) for model in models]
    names: list[str] = []
    for one in axes:
        parts = []
        for key, value in one.items():
            if key == "model":
                # Two owners may have a model of one name.
                text = short_model(str(value))
                parts.append(str(value) if last.count(text) > 1 else text)
            elif value is not None or key not in _SHORT:
                parts.append(_part(key, value))
        name = slug("-".join(parts))
        number = 2
        unique = name
        # Some file systems do not tell capitals from small letters.
        while unique.lower() in (other.lower() for other in names):
            unique, number = f"{name}-{number}", number + 1
        names.append(unique)
    return names


def slug(text: str) -> str:
    """`text` as a file name: ASCII letters, digits, dots, dashes and underscores, not too long.

    >>> slug("flexgen-a b/ü-b4")
    'flexgen-a-b-u-b4'
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9._]+", "-", plain).strip("-.")
    if not safe or len(safe) > _LONGEST:
        # What is cut off may be all that tells it apart.
        safe = f"{safe[: _LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".strip("-.")
    return safe


def _part(key: str, value: Any) -> str:
    if key in ("strategy", "policy", "dtype"):
        return str(value)
    if key in ("gpu_mem", "cpu_mem"):
        return _SHORT[key] + _size(int(value))
    if key in _SHORT:
        return f"{_SHORT[key]}{value}"
    text = (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return f"{key.removesuffix('_percent')}-{text}"


def _size(num_bytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (10**6, "MB")):
        if num_bytes % unit == 0:
            return f"{num_bytes // unit}{name}"
    return f"{num_bytes}B"


def short_model(model: str) -> str:
    """The last part of a model's name or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1]
