"""The configs of published models, so a model's dimensions are known without a download.

The table is `published.json`: one block per family, its `shared` keys and per model what differs.
A config is what the model's own config.json says; rope parameters keep the published spelling
(`rope_theta`, `rope_scaling`). Knows nothing of weights, and nothing of transformers.
"""

import copy
import difflib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexllmgen.errors import UsageError

TABLE = Path(__file__).with_name("published.json")


def published_names() -> tuple[str, ...]:
    """The hub ids in the table, in its order: families together, small to large.

    >>> published_names()[0]
    'facebook/opt-125m'
    """
    return tuple(_configs())


def published_config(name: str) -> dict[str, Any]:
    """The full config of one model, as a dict of the caller's own.

    `name` is the hub id or only its last part, in any case.

    Raises:
        UsageError: the table has no such model; the message names the nearest three.

    >>> published_config("opt-30b")["num_hidden_layers"]
    48
    """
    configs = _configs()
    by_last_part = {full.rpartition("/")[2].lower(): full for full in configs}
    by_key = by_last_part | {full.lower(): full for full in configs}
    key = name.strip().lower()
    if key not in by_key:
        # Owners mislead the comparison, and so does length: "llama-3-8b" is within "meta-llama-3-8b".
        asked = key.rpartition("/")[2]
        holding = [part for part in by_last_part if asked in part or part in asked]
        near = [*holding, *difflib.get_close_matches(asked, by_last_part, n=3, cutoff=0.0)][:3]
        listed = ", ".join(by_last_part[part] for part in dict.fromkeys(near))
        raise UsageError(f"no published config for {name!r}; the nearest of {len(configs)} are {listed}")
    return copy.deepcopy(configs[by_key[key]])


@functools.cache
def _configs() -> Mapping[str, dict[str, Any]]:
    families = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: {**family["shared"], **own} for family in families for name, own in family["models"].items()
    }
