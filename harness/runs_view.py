"""How the UI's table of runs looks when `harness ui` opens it: which columns, and how wide.

A pure function to the JSON that the UI reads from a tag of the experiment. Knows nothing of MLflow's Python side.
"""

import json

# What tells most comes first. A folded benchmark has no figures of its own but its best cell, in a tag.
_COLUMNS = (
    "metrics.`generation_tok_s`",
    "metrics.`ratio_to_baseline`",
    "metrics.`attainment`",
    "tags.`harness.best`",
    "metrics.`limit_tok_s`",
    "metrics.`predicted_tok_s`",
    "metrics.`parity`",
    "metrics.`perplexity_ratio`",
    "metrics.`token_match_share`",
    "metrics.`ttft_s`",
    "metrics.`tpot_s`",
    "params.`strategy`",
    "params.`model`",
    "params.`batch_size`",
    "params.`input_len`",
    "params.`gen_len`",
    "params.`dtype`",
    "tags.`lossy`",
    "params.`gpu_mem`",
    "params.`cpu_mem`",
    "tags.`harness.kind`",
    "attributes.`Source`",
)
_WIDTHS = {"tags.`harness.best`": 300, "attributes.`Source`": 140}


def table_view() -> str:
    """State of the UI's table of runs that shows what tells runs apart and what came out, as JSON.

    >>> "metrics.`generation_tok_s`" in json.loads(table_view())["selectedColumns"]
    True
    """
    # In the UI's words the fixed columns are: the check boxes, the name, when, how long.
    fixed = {"1": 70, "attributes.`Run Name`": 240, "runDateAndNestInfo": 130, "duration": 80}
    # Wide enough for the names, which the UI would cut at its own default width.
    widths = {name: _WIDTHS.get(name, max(100, 32 + 7 * len(name.split(".", 1)[1]))) for name in _COLUMNS}
    state = {
        "selectedColumns": list(widths),
        "columnOrder": [*fixed, *widths],
        "columnWidths": {**fixed, **widths},
    }
    return json.dumps(state)
