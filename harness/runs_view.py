"""How the UI's table of runs looks when `harness ui` opens it: which columns, and how wide.

A pure function to the JSON that the UI reads from a tag of the experiment. Knows nothing of MLflow's Python side.
"""

import json

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
_VIEW_TAGS = ("harness.best", "harness.kind")


def table_view() -> str:
    """State of the UI's table of runs that shows what tells runs apart and what came out, as JSON.

    >>> "metrics.`generation_tok_s`" in json.loads(table_view())["selectedColumns"]
    True
    """
    metrics = [f"metrics.`{name}`" for name in _VIEW_METRICS]
    params = [f"params.`{name}`" for name in _VIEW_PARAMS]
    tags = [f"tags.`{name}`" for name in _VIEW_TAGS]
    # In the UI's words the fixed columns are: the check boxes, the name, when, how long.
    fixed = {"1": 70, "attributes.`Run Name`": 260, "runDateAndNestInfo": 130, "duration": 80}
    # Wide enough for the names, which the UI would cut at its own default width.
    widths = {
        column: max(100, 32 + 7 * len(column.split(".", 1)[1])) for column in (*metrics, *params, *tags)
    }
    widths["tags.`harness.best`"] = 320  # a sentence
    source = {"attributes.`Source`": 140}
    # Figures first, then what a folded benchmark has instead of them, then what was asked for.
    order = {name: widths[name] for name in (*metrics, *tags, *params)}
    state = {
        "selectedColumns": [*order, *source],
        "columnOrder": [*fixed, *order, *source],
        "columnWidths": {**fixed, **order, **source},
    }
    return json.dumps(state)
