"""How the UI's table of runs looks when `harness ui` opens it: which columns, how wide, which runs unfolded.

A pure function to the JSON that the UI reads from a tag of the experiment. Knows nothing of MLflow's Python side.
"""

import json
from collections.abc import Iterable

_VIEW_PARAMS = ("strategy", "model", "batch_size", "input_len", "gen_len", "dtype", "gpu_mem", "cpu_mem")
_VIEW_METRICS = (
    "generation_tok_s",
    "ratio_to_baseline",
    "predicted_tok_s",
    "limit_tok_s",
    "attainment",
    "ttft_s",
    "tpot_s",
    "parity",
)
_VIEW_TAGS = ("harness.kind",)


def table_view(expanded: Iterable[str] = ()) -> str:
    """State of the UI's table of runs that shows what tells runs apart and what came out, as JSON.

    `expanded` are ids of the runs whose children are shown.

    >>> "metrics.`generation_tok_s`" in json.loads(table_view())["selectedColumns"]
    True
    """
    metrics = [f"metrics.`{name}`" for name in _VIEW_METRICS]
    params = [f"params.`{name}`" for name in _VIEW_PARAMS]
    tags = [f"tags.`{name}`" for name in _VIEW_TAGS]
    # In the UI's words the fixed columns are: the check boxes, the name, when, how long.
    fixed = {"1": 70, "attributes.`Run Name`": 280, "runDateAndNestInfo": 140, "duration": 80}
    # Wide enough for the names, which the UI would cut at its own default width.
    widths = {
        column: max(120, 40 + 7 * len(column.split(".", 1)[1])) for column in (*metrics, *params, *tags)
    }
    state = {
        "selectedColumns": [*metrics, *params, *tags, "attributes.`Source`"],
        "columnOrder": [*fixed, *widths, "attributes.`Source`"],
        "columnWidths": {**fixed, **widths, "attributes.`Source`": 140},
        "runsExpanded": dict.fromkeys(expanded, True),
    }
    return json.dumps(state)


def expanded_runs(view: str) -> list[str]:
    """The ids of the runs that a view, as `table_view` wrote it, unfolds; none where it is damaged."""
    try:
        return list(json.loads(view)["runsExpanded"])
    except (ValueError, KeyError, TypeError):
        return []
