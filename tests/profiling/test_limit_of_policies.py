"""No policy of our engine is predicted to be faster than its own limit."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from machines import machine

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_GPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.cost_model import engine_cost
from profiling.limit import physical_limit, traffic_of


def spec_of(name: str, layers: int, **changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config({**published_config(name), "num_hidden_layers": layers, **changes}, name)


MIXED = ["sliding_attention", "full_attention"]
SPECS = (
    spec_of("opt-1.3b", 4),
    spec_of("Llama-3.1-8B", 3),
    spec_of("Mixtral-8x7B-v0.1", 2),
    spec_of("Llama-3.1-8B", 4, model_type="mistral", sliding_window=64),
    spec_of("Llama-3.1-8B", 4, model_type="mistral", sliding_window=32, layer_types=MIXED * 2),
)
shares = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
    lambda pair: Placement.from_percent(100 * pair[0], 100 * pair[1] * (1 - pair[0]))
)
shares |= st.sampled_from([Placement(gpu=1.0), Placement(cpu=1.0), Placement(disk=1.0)])
bits = st.sampled_from([None, None, 8, 4])


@st.composite
def policies(draw: st.DrawFn, spec: ModelSpec) -> Policy:
    """Any that this model and its other choices do not rule out."""
    on_host, sparsity = draw(st.booleans()), 1.0
    kv_bits = draw(st.sampled_from([None, 8]) if on_host else bits)
    if not on_host:
        sparsity = draw(st.sampled_from([1.0, 0.5, 0.1]))
    recompute = 0.0
    if spec.num_heads == spec.num_kv_heads and kv_bits is None and sparsity == 1:
        recompute = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return Policy(
        micro_batch_size=draw(st.integers(1, 8)),
        num_micro_batches=draw(st.integers(1, 4)),
        weights=draw(shares),
        kv_cache=draw(shares),
        activations=ON_GPU if on_host else draw(shares),
        pin_weight=draw(st.booleans()),
        overlap=draw(st.integers(0, 3)),
        sep_layer=draw(st.booleans()),
        weight_bits=draw(bits),
        cpu_attention=on_host,
        kv_bits=kv_bits,
        attn_sparsity=sparsity,
        chosen_experts=spec.num_experts > 0 and draw(st.booleans()),
        recompute=recompute,
    )


@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from(SPECS).flatmap(lambda spec: st.tuples(st.just(spec), policies(spec))),
    workload=st.builds(
        Workload,
        num_sequences=st.integers(1, 20),
        prompt_tokens=st.sampled_from([1, 20, 100, 300]),
        gen_tokens=st.sampled_from([1, 2, 3, 5, 24]),
    ),
    device=st.sampled_from(["cuda", "cuda", "cpu"]),
    # What binds differs with each.
    rates=st.sampled_from(
        [
            {},
            {"compute_flops_per_s": 1e12},
            {"disk_read_bytes_per_s": 1e11, "disk_write_bytes_per_s": 1e11},
            {"h2d_bytes_per_s": 1e12, "d2h_bytes_per_s": 1e9, "disk_write_bytes_per_s": 1e12},
        ]
    ),
)
@example(  # The weights of the only step come in while the prompts are computed.
    case=(SPECS[1], Policy(micro_batch_size=4, weights=Placement(gpu=0.2, cpu=0.8), overlap=3)),
    workload=Workload(num_sequences=4, prompt_tokens=20, gen_tokens=2),
    device="cuda",
    rates={"compute_flops_per_s": 1e12},
)
@example(  # Each step attends to a window, and uses a tenth of its values.
    case=(SPECS[3], Policy(micro_batch_size=8, kv_cache=Placement(cpu=1.0), attn_sparsity=0.1)),
    workload=Workload(num_sequences=8, prompt_tokens=300, gen_tokens=24),
    device="cuda",
    rates={},
)
def test_no_policy_is_predicted_faster_than_its_limit(
    case: tuple[ModelSpec, Policy], workload: Workload, device: str, rates: dict[str, float]
) -> None:
    spec, policy = case
    if device == "cpu":
        rates = {name: rate for name, rate in rates.items() if "2" not in name}
    plan = plan_placement(spec, policy, workload, 2, in_place=device == "cpu")
    profile = machine(spec, device, **rates)
    limit = physical_limit(spec, workload, traffic_of(plan), profile.best)
    predicted = engine_cost(plan, profile)
    assert predicted is not None
    assert predicted.generation_tok_s <= 1.01 * limit.generation_tok_s, dataclasses.asdict(policy)
