"""The least that a placement takes: never above what the simulation says, and mostly near it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import machine

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, ON_GPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.cost_model import engine_cost, least_seconds

OPT = ModelSpec.from_hf_config({**published_config("opt-1.3b"), "num_hidden_layers": 6}, "opt-1.3b")
EXPERTS = ModelSpec.from_hf_config(
    {**published_config("Mixtral-8x7B-v0.1"), "num_hidden_layers": 4}, "mixtral"
)
WINDOWS = dataclasses.replace(OPT, sliding_windows=(64, 0) * 3)
ATTENDS = {"cpu_attention_bytes_per_s": 9e10, "cpu_attention_under_copies_bytes_per_s": 5e10}

shares = st.one_of(
    st.sampled_from([ON_GPU, ON_CPU, ON_DISK]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
        lambda pair: Placement.from_percent(100 * pair[0], 100 * pair[1] * (1 - pair[0]))
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from([OPT, EXPERTS, WINDOWS]),
    weights=shares,
    kv=shares,
    hidden=st.sampled_from([ON_GPU, ON_CPU]),
    size=st.integers(1, 8),
    count=st.integers(1, 4),
    overlap=st.integers(0, 3),
    sep_layer=st.booleans(),
    attends=st.booleans(),
    chooses=st.booleans(),
    recompute=st.sampled_from([0.0, 0.4, 1.0]),
    bits=st.sampled_from([None, 4]),
    gen=st.sampled_from([1, 2, 12]),
    sequences=st.integers(1, 24),
    device=st.sampled_from(["cuda", "cpu"]),
    issue_s=st.sampled_from([0.0, 1e-2]),
)
def test_it_is_never_above_the_simulation(
    spec: ModelSpec,
    weights: Placement,
    kv: Placement,
    hidden: Placement,
    size: int,
    count: int,
    overlap: int,
    sep_layer: bool,
    attends: bool,
    chooses: bool,
    recompute: float,
    bits: int | None,
    gen: int,
    sequences: int,
    device: str,
    issue_s: float,
) -> None:
    """Whatever it takes to issue a load and to ask the CPU."""
    policy = Policy(
        micro_batch_size=size,
        num_micro_batches=count,
        weights=weights,
        kv_cache=kv,
        activations=ON_GPU if attends else hidden,
        overlap=overlap,
        sep_layer=sep_layer,
        weight_bits=bits,
        cpu_attention=attends,
        chosen_experts=chooses and spec.num_experts > 0,
        recompute=0.0 if spec.num_experts else recompute,
    )
    workload = Workload(num_sequences=sequences, prompt_tokens=96, gen_tokens=gen)
    plan = plan_placement(spec, policy, workload, 2, in_place=device == "cpu")
    profile = machine(spec, device, **(ATTENDS if device == "cuda" else {}))
    layers = tuple(
        dataclasses.replace(
            each, kv_issue_s=issue_s, exchange_s=issue_s / 10, cpu_attention_call_s=issue_s / 20
        )
        for each in profile.layers
    )
    profile = dataclasses.replace(profile, layers=layers)
    estimate = engine_cost(plan, profile)
    assert estimate is not None
    assert 0 < least_seconds(plan, profile) <= estimate.seconds


@pytest.mark.parametrize("attends", [False, True])
def test_it_is_near_where_something_binds(attends: bool) -> None:
    policy = Policy(
        micro_batch_size=24, num_micro_batches=4, weights=ON_CPU, kv_cache=ON_CPU, cpu_attention=attends
    )
    workload = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=16)
    plan, profile = plan_placement(OPT, policy, workload, 2), machine(OPT, **ATTENDS)
    estimate = engine_cost(plan, profile)
    assert estimate is not None
    assert least_seconds(plan, profile) > 0.85 * estimate.seconds
