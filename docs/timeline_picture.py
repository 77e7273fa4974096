"""Draws docs/timeline.svg: which resource does what while the engine runs, from its own schedule, simulated.

    python docs/timeline_picture.py [--output FILE]

The machine's rates are those that `harness profile` measured on one NVIDIA H200; what a layer computes is taken from them by
the roofline. The plan is that of OPT-30B in 16 GiB: 15 % of the weights on the GPU, the KV cache in host memory.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexllmgen.models.published import published_config
from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.schedule import Action
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.layer_times import HeadPoint, LayerShape, LayerTimes, Point
from profiling.profile import Rates
from profiling.simulation import COMPUTE, DOWN, UP
from profiling.trace import Span, trace_block

DOCS = Path(__file__).parent
RATES = Rates(
    compute_flops_per_s=702131.62e9,
    host_bytes_per_s=116.89e9,
    host_copy_bytes_per_s=41.72e9,
    cpu_attention_bytes_per_s=61.89e9,
    disk_read_bytes_per_s=1.94e9,
    disk_write_bytes_per_s=2.97e9,
    cached_file_bytes_per_s=5.23e9,
    device_bytes_per_s=4259.85e9,
    device_copy_bytes_per_s=2072.96e9,
    h2d_bytes_per_s=54.24e9,
    d2h_bytes_per_s=54.27e9,
    h2d_pageable_bytes_per_s=8.17e9,
    h2d_both_ways_bytes_per_s=49.5e9,
    d2h_both_ways_bytes_per_s=51.34e9,
    h2d_under_reads_bytes_per_s=49.44e9,
    host_under_copies_bytes_per_s=84.46e9,
    cpu_attention_under_copies_bytes_per_s=50.98e9,
)
MICRO_BATCHES = (24, 24, 24)
LANES = {COMPUTE: "compute", UP: "host to GPU", DOWN: "GPU to host"}
COLOURS = {
    Action.COMPUTE: ("#2f6fb0", "compute"),
    Action.LOAD_WEIGHTS: ("#e08a2e", "weights"),
    Action.LOAD_KV: ("#4f9d69", "KV cache in"),
    Action.STORE_KV: ("#9ccbaa", "KV cache out"),
}


def traced() -> tuple[PlacementPlan, list[Span]]:
    """The plan, and the work of a prompt's pass and three decode steps."""
    spec = ModelSpec.from_hf_config(published_config("facebook/opt-30b"), "facebook/opt-30b")
    policy = Policy(
        micro_batch_size=MICRO_BATCHES[0],
        num_micro_batches=len(MICRO_BATCHES),
        weights=Placement.from_percent(gpu=15, cpu=85),
        kv_cache=ON_CPU,
    )
    plan = plan_placement(spec, policy, Workload(num_sequences=72, prompt_tokens=512, gen_tokens=32), 2)
    spans, _ = trace_block(
        plan, roofline(spec, RATES), RATES, micro_batches=MICRO_BATCHES, contexts=(513, 514, 515)
    )
    return plan, spans


def roofline(spec: ModelSpec, rates: Rates) -> LayerTimes:
    """A layer takes the longer of reading its weights and multiplying by them; attention reads the KV cache."""
    shape = LayerShape.of(spec)
    kv_s = 2 * shape.num_kv_heads * shape.head_dim * 2 / rates.device_bytes_per_s
    score_s = 4 * shape.num_heads * shape.head_dim / rates.compute_flops_per_s

    def product_s(weights: int, rows: int) -> float:
        return max(2 * weights / rates.device_bytes_per_s, 2 * weights * rows / rates.compute_flops_per_s)

    def points(counts: Sequence[int], per_position_s: float) -> tuple[Point, ...]:
        return tuple(
            Point(
                rows=rows,
                attention_s=product_s(shape.attention_weights, rows),
                per_position_s=rows * per_position_s,
                mlp_s=product_s(shape.mlp_weights, rows),
            )
            for rows in counts
        )

    return LayerTimes(
        shape=shape,
        issue_s=5e-5,
        prompt=points((64, 1024, 8192, 65536), score_s),
        step=points((1, 16, 256), kv_s),
        head=tuple(HeadPoint(rows=rows, head_s=product_s(shape.head_weights, rows)) for rows in (1, 256)),
    )


def draw(spans: Sequence[Span], output: Path) -> None:
    """Two windows of three layers each: of the prompt's pass, and of a decode step."""
    import matplotlib

    matplotlib.use("svg")
    # The same picture from the same schedule: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "timeline", "font.size": 9, "svg.fonttype": "none"})
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, panes = pyplot.subplots(2, 1, figsize=(10, 5), layout="constrained")
    for pane, token, title in (
        (
            panes[0],
            0,
            "Prompt: 3 micro-batches of 24 x 512 tokens share each layer's weights; computing sets the pace",
        ),
        (panes[1], 2, "Decode, one token each: the link sets the pace, computing hides behind it"),
    ):
        _pane(pane, spans, token)
        pane.set_title(title, loc="left", fontsize=10)
    panes[1].set_xlabel("ms")
    handles = [Patch(color=colour, label=label) for colour, label in COLOURS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(output, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _pane(pane: Any, spans: Sequence[Span], token: int) -> None:
    layers = range(20, 23)
    shown = [
        span
        for span in spans
        if span.action is Action.COMPUTE and span.token == token and span.stage in layers
    ]
    start_s, end_s = shown[0].start_s, max(span.end_s for span in shown)
    width_s = end_s - start_s
    pane.set_xlim(0, width_s * 1e3)
    pane.set_yticks(range(len(LANES)), LANES.values())
    pane.set_ylim(len(LANES) - 0.5, -0.5)
    pane.spines[["top", "right", "left"]].set_visible(False)
    pane.tick_params(axis="y", length=0)
    for span in spans:
        if span.resource not in LANES or span.end_s <= start_s or span.start_s >= end_s:
            continue
        left = max(span.start_s, start_s)
        right = min(span.end_s, end_s)
        row = list(LANES).index(span.resource)
        pane.barh(
            row,
            (right - left) * 1e3,
            left=(left - start_s) * 1e3,
            height=0.7,
            color=COLOURS[span.action][0],
            edgecolor="white",
            linewidth=0.6,
        )
        if right - left > width_s / 34:
            # A layer's number, and a letter for the micro-batch; weights serve all of them.
            name = f"{span.stage}" + ("" if span.action is Action.LOAD_WEIGHTS else "abc"[span.micro_batch])
            middle = ((left + right) / 2 - start_s) * 1e3
            pane.text(middle, row, name, ha="center", va="center", color="white", fontsize=8)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCS / "timeline.svg")
    draw(traced()[1], parser.parse_args().output)


if __name__ == "__main__":
    main()
