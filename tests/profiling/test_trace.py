"""The trace of a simulated block is the simulation's own work, piece by piece."""

from collections import Counter
from itertools import pairwise

import pytest
from machines import machine

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.schedule import Action
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.simulation import simulate_block
from profiling.trace import trace_block

SPEC = ModelSpec.from_hf_config({**published_config("opt-1.3b"), "num_hidden_layers": 6}, "opt-1.3b")
HALF = Placement(gpu=0.25, cpu=0.5, disk=0.25)


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_spans_are_the_simulations_work(overlap: int) -> None:
    policy = Policy(
        micro_batch_size=4,
        num_micro_batches=2,
        weights=HALF,
        kv_cache=HALF,
        activations=HALF,
        overlap=overlap,
    )
    plan = plan_placement(SPEC, policy, Workload(num_sequences=8, prompt_tokens=64, gen_tokens=8), 2)
    profile = machine(SPEC)
    block = {"micro_batches": (4, 4), "contexts": (65, 66)}
    spans, passes = trace_block(plan, profile.layers[0], profile.typical, **block)
    assert passes == simulate_block(plan, profile.layers[0], profile.typical, **block)
    assert {span.action for span in spans} == set(Action) - {Action.EMIT, Action.FINISH}
    work = Counter[tuple[int, str]]()
    for span in spans:
        assert 0 <= span.start_s < span.end_s
        work[span.token, span.resource] += span.end_s - span.start_s
    for token, busy in enumerate(passes.busy):
        for resource, seconds in busy.items():
            assert work[token, resource] == pytest.approx(seconds), (token, resource)
    # Each does one thing at a time, and without overlap so do all together.
    for resource in {span.resource for span in spans}:
        own = sorted((span.start_s, span.end_s) for span in spans if span.resource == resource or not overlap)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(own))
