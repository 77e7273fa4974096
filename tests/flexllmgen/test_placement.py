"""Shares are true to the byte, layers are even, and what does not fit is refused with its numbers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexllmgen.errors import PlanInfeasible, PolicyError, UnsupportedModelError
from flexllmgen.fits import check_fits, find_shortages
from flexllmgen.images import ALIGNMENT
from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.spec import OPT_125M, ModelSpec
from flexllmgen.splits import split_sequences
from flexllmgen.weight_pieces import streamed_runs
from flexllmgen.workload import Workload
from flexllmgen.workspace import workspace_bytes

WORK = Workload(num_sequences=48, prompt_tokens=512, gen_tokens=32)
PERCENT = st.integers(0, 100).flatmap(lambda gpu: st.tuples(st.just(gpu), st.integers(0, 100 - gpu)))
MODELS = ("opt-125m", "opt-350m", "opt-30b", "Meta-Llama-3-8B", "Mixtral-8x7B-v0.1")


def spec_of(name: str) -> ModelSpec:
    return ModelSpec.from_hf_config(published_config(name), name=name)


@settings(max_examples=60, deadline=None)
@given(percent=PERCENT, name=st.sampled_from(MODELS), sep_layer=st.booleans())
def test_weights_have_the_shares_asked_for(percent: tuple[int, int], name: str, sep_layer: bool) -> None:
    spec, shares = spec_of(name), Placement.from_percent(*percent)
    policy = Policy(micro_batch_size=8, weights=shares, sep_layer=sep_layer)
    plan = plan_placement(spec, policy, WORK, 2)
    got = plan.weights.shares
    for tier in ("gpu", "cpu", "disk"):
        assert abs(getattr(got, tier) - getattr(shares, tier)) < 0.0001, tier
        if not getattr(shares, tier):
            assert not getattr(plan.weights, tier), "rounding puts nothing on a tier that was given nothing"
    # Packing adds next to nothing to the model itself.
    assert plan.weights.total == pytest.approx(spec.weight_bytes(2), rel=0.001)


@settings(max_examples=60, deadline=None)
@given(percent=PERCENT, name=st.sampled_from(MODELS))
def test_every_layer_streams_the_same(percent: tuple[int, int], name: str) -> None:
    spec = spec_of(name)
    policy = Policy(micro_batch_size=8, weights=Placement.from_percent(*percent))
    plan = plan_placement(spec, policy, WORK, 2)
    layers = [image for image in plan.images if image.layer >= 0]
    for field in ("gpu_bytes", "cpu_bytes", "disk_bytes"):
        sizes = [getattr(image, field) for image in layers]
        assert max(sizes) - min(sizes) <= 2 * ALIGNMENT
        assert min(sizes) >= 0


@settings(max_examples=60, deadline=None)
@given(
    percent=PERCENT,
    name=st.sampled_from(MODELS),
    bits=st.sampled_from([None, 4]),
    size=st.sampled_from([2, 4]),
    sep_layer=st.booleans(),
)
def test_every_tensor_begins_where_wide_loads_may(
    percent: tuple[int, int], name: str, bits: int | None, size: int, sep_layer: bool
) -> None:
    shares = Placement.from_percent(*percent)
    policy = Policy(micro_batch_size=8, weights=shares, weight_bits=bits, sep_layer=sep_layer)
    plan = plan_placement(spec_of(name), policy, WORK, size)
    assert all(image.gpu_bytes % ALIGNMENT == 0 for image in plan.images), "resident images lie end to end"
    for stage in range(len(plan.stages)):
        for run in streamed_runs(plan, stage):
            assert (run.slot_offset - run.start) % ALIGNMENT == 0
        for index in plan.stages[stage].images:
            for tensor in plan.images[index].tensors.values():
                assert tensor.offset % ALIGNMENT == tensor.dense_offset % ALIGNMENT == 0


@given(
    counts=st.lists(st.integers(1, 32), min_size=1, max_size=64),
    percent=PERCENT,
)
def test_sequences_are_split_as_asked_to_within_one(counts: list[int], percent: tuple[int, int]) -> None:
    shares = Placement.from_percent(*percent)
    splits = split_sequences(counts, shares)
    total = sum(counts)
    assert [split.count for split in splits] == counts
    for tier in ("gpu", "cpu", "disk"):
        assert abs(sum(getattr(split, tier) for split in splits) - getattr(shares, tier) * total) <= 1.5
        if getattr(shares, tier) == 0:
            assert not sum(getattr(split, tier) for split in splits)


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    spec = spec_of("opt-30b")
    plan = plan_placement(spec, Policy(micro_batch_size=48, kv_cache=ON_CPU), WORK, 2)
    with pytest.raises(
        PlanInfeasible,
        match=r"needs \d+\.\d\d GiB on the GPU \(weights 55\.8.*has 16\.00; lower .*weights\.gpu",
    ):
        check_fits(plan, gpu_bytes=16 << 30)
    with pytest.raises(PlanInfeasible, match=r"GiB of host memory .*has 8\.00; lower .*kv_cache\.cpu"):
        check_fits(plan, cpu_bytes=8 << 30)
    check_fits(plan, gpu_bytes=80 << 30, cpu_bytes=64 << 30)


def test_shortages_say_what_the_need_is_made_of() -> None:
    plan = plan_placement(OPT_125M, Policy(micro_batch_size=4, weights=ON_DISK, kv_cache=ON_CPU), WORK, 2)
    shortages = find_shortages(plan, gpu_bytes=1 << 20, cpu_bytes=2 << 20, disk_free_bytes=3 << 20)
    needs = {"gpu": plan.gpu_bytes, "cpu": plan.cpu_bytes, "disk": plan.disk_bytes}
    assert {each.tier: each.need_bytes for each in shortages} == needs
    assert {each.tier: each.limit_bytes for each in shortages} == {
        "gpu": 1 << 20,
        "cpu": 2 << 20,
        "disk": 3 << 20,
    }
    for each in shortages:
        assert sum(each.parts.values()) == each.need_bytes, "the parts are the whole"


def test_what_goes_to_the_cpu_and_back_is_a_part_of_the_need() -> None:
    plan = plan_placement(OPT_125M, Policy(micro_batch_size=4, kv_cache=ON_CPU, cpu_attention=True), WORK, 2)
    (shortage,) = find_shortages(plan, cpu_bytes=1 << 20)
    assert plan.exchange_bytes > 0
    assert sum(shortage.parts.values()) == shortage.need_bytes


def test_without_a_gpu_none_is_spoken_of_and_buffers_are_counted() -> None:
    plan = plan_placement(OPT_125M, Policy(micro_batch_size=4, weights=ON_DISK), WORK, 2, in_place=True)
    with pytest.raises(PlanInfeasible, match=r"on the compute device \(.*buffers \d") as caught:
        check_fits(plan, gpu_bytes=1 << 20, cpu_bytes=2 << 20)
    assert "GPU" not in str(caught.value)


def test_prefill_is_cut_smaller_to_fit() -> None:
    spec = spec_of("opt-6.7b")
    policy = Policy(micro_batch_size=48, weights=ON_CPU, kv_cache=ON_CPU)
    roomy = plan_placement(spec, policy, WORK, 2)
    tight = plan_placement(spec, policy, WORK, 2, gpu_cap_bytes=roomy.gpu_bytes - 1)
    assert tight.chunk_tokens < roomy.chunk_tokens
    assert tight.gpu_bytes < roomy.gpu_bytes


def test_a_step_of_many_short_prompts_has_room() -> None:
    """Prefill may be cut to a sequence at a time; the steps after it are not."""
    policy, work = Policy(micro_batch_size=256), Workload(num_sequences=256, prompt_tokens=1, gen_tokens=8)
    cut, whole = (
        workspace_bytes(OPT_125M, policy, work, 2, chunk_tokens=chunk, accelerated=True)
        for chunk in (1, 8192)
    )
    assert cut == pytest.approx(whole, rel=1e-3)


def test_too_long_a_context_is_refused() -> None:
    workload = Workload(num_sequences=1, prompt_tokens=2040, gen_tokens=32)
    with pytest.raises(PolicyError, match=r"2072 positions are asked for, the model has 2048"):
        plan_placement(OPT_125M, Policy(micro_batch_size=1), workload, 2)


@pytest.mark.parametrize("shares", [(0.5, 0.6, 0.0), (0.5, 0.4, 0.0), (-0.1, 1.1, 0.0)])
def test_shares_must_sum_to_one(shares: tuple[float, float, float]) -> None:
    with pytest.raises(PolicyError, match="sum"):
        Placement(gpu=shares[0], cpu=shares[1], disk=shares[2])


def test_unsupported_models_are_named_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'gpt2'.*llama, mistral.*-s accelerate"):
        ModelSpec.from_hf_config({"model_type": "gpt2"})
    config = {**published_config("Meta-Llama-3-8B"), "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(UnsupportedModelError, match=r"'yarn'"):
        ModelSpec.from_hf_config(config)


@pytest.mark.parametrize("gpu", [32.4014, 78.3906, 33.3, 0.1])
def test_percentages_that_sum_to_100_but_for_rounding_leave_nothing_to_the_disk(gpu: float) -> None:
    assert Placement.from_percent(gpu, 100 - gpu).disk < 1e-9
    assert Placement.from_percent(gpu, 100 - gpu + 1e-14).disk < 1e-9


MIXTRAL, WINDOWED = spec_of("Mixtral-8x7B-v0.1"), spec_of("Mistral-7B-v0.1")


@pytest.mark.parametrize(
    ("spec", "changes", "recording", "mib"),
    [
        (OPT_125M, {}, "step", 256),
        (OPT_125M, {"weights": ON_CPU}, "layers", 96),
        (OPT_125M, {"weights": ON_CPU, "weight_bits": 4}, "layers", 96),
        (OPT_125M, {"kv_cache": ON_CPU}, "none", 0),
        (OPT_125M, {"kv_cache": ON_CPU, "cpu_attention": True}, "none", 0),
        (OPT_125M, {"activations": ON_CPU}, "none", 0),
        (OPT_125M, {"attn_sparsity": 0.5}, "none", 0),
        (OPT_125M, {"kv_bits": 8}, "none", 0),
        (MIXTRAL, {"weights": ON_CPU}, "none", 0),
        (WINDOWED, {}, "none", 0),
    ],
)
def test_memory_of_recorded_steps_is_planned_where_they_are_recorded(
    spec: ModelSpec, changes: dict[str, Any], recording: str, mib: int
) -> None:
    # Longer than the window.
    workload = Workload(num_sequences=2, prompt_tokens=1900 if spec is OPT_125M else 4090, gen_tokens=8)
    policy = Policy(micro_batch_size=2, **changes)
    plan = plan_placement(spec, policy, workload, 2)
    assert plan.recording == recording
    computing = workspace_bytes(spec, policy, workload, 2, plan.chunk_tokens, accelerated=True)
    assert plan.workspace_bytes - plan.kv_scratch_bytes - computing == mib << 20
    without_device = plan_placement(spec, policy, workload, 2, in_place=True)
    assert without_device.recording == "none"
