"""Layer times: at points, between them, beyond them, and for a shape that was not measured."""

import dataclasses

import pytest

from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec
from profiling import layer_timing, memory
from profiling.layer_times import HeadPoint, LayerShape, LayerTimes, Point, layer_times_for

SPEC = ModelSpec.from_hf_config(published_config("opt-1.3b"))
TABLE = LayerTimes(
    shape=LayerShape.of(SPEC),
    issue_s=1e-5,
    prompt=(
        Point(rows=64, attention_s=1.0, per_position_s=0.0, mlp_s=2.0),
        Point(rows=128, attention_s=2.0, per_position_s=0.0, mlp_s=4.0),
    ),
    step=(
        Point(rows=1, attention_s=1.0, per_position_s=0.1, mlp_s=2.0),
        Point(rows=3, attention_s=2.0, per_position_s=0.3, mlp_s=2.0),
    ),
    head=(HeadPoint(rows=1, head_s=1.0), HeadPoint(rows=2, head_s=3.0)),
)


def test_the_halves_add_up_and_attention_grows_with_the_context() -> None:
    assert TABLE.step_s("attention", 1, 10) == pytest.approx(2.0)
    assert TABLE.step_s("mlp", 1, 10) == pytest.approx(2.0)
    assert TABLE.step_s("layer", 1, 10) == pytest.approx(4.0)


def test_between_points_it_is_linear_and_beyond_in_proportion() -> None:
    assert TABLE.step_s("attention", 2, 10) == pytest.approx((2.0 + 5.0) / 2)
    assert TABLE.prompt_s("layer", 32, 32) == pytest.approx(3.0)
    assert TABLE.prompt_s("layer", 256, 32) == pytest.approx(12.0)
    assert TABLE.head_s(4) == pytest.approx(6.0)


def test_a_shape_that_was_measured_is_taken_as_it_is() -> None:
    assert layer_times_for(SPEC, [TABLE]) is TABLE
    deeper = dataclasses.replace(SPEC, num_layers=96)
    assert layer_times_for(deeper, [TABLE]) is TABLE
    assert layer_times_for(SPEC, []) is None


def test_another_shape_scales_the_nearest() -> None:
    wider = dataclasses.replace(SPEC, intermediate_size=2 * SPEC.intermediate_size)
    far = dataclasses.replace(
        TABLE, shape=dataclasses.replace(TABLE.shape, intermediate_size=1 << 20), issue_s=9.0
    )
    times = layer_times_for(wider, [far, TABLE])
    assert times is not None
    assert times.shape == LayerShape.of(wider)
    assert times.issue_s == TABLE.issue_s
    assert times.step_s("mlp", 1, 10) == pytest.approx(4.0)
    assert times.step_s("attention", 1, 10) == pytest.approx(2.0)


def test_the_rate_of_attention_is_of_one_shape_alone() -> None:
    measured = dataclasses.replace(TABLE, cpu_attention_bytes_per_s=7e10)
    wider = dataclasses.replace(SPEC, intermediate_size=2 * SPEC.intermediate_size)
    same, other = layer_times_for(SPEC, [measured]), layer_times_for(wider, [measured])
    assert same is not None
    assert other is not None
    assert same.cpu_attention_bytes_per_s == 7e10
    assert other.cpu_attention_bytes_per_s is None


def test_json_there_and_back() -> None:
    assert LayerTimes.from_dict(TABLE.as_dict()) == TABLE


def test_what_a_step_takes_to_issue_is_measured_beside_attention_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mixture, whose operations are never recorded, the whole runs on any machine."""
    monkeypatch.setattr(memory, "_KV_BYTES", 8 << 20)
    monkeypatch.setattr(layer_timing, "_ISSUE_ROUNDS", 1)
    config = {**published_config("Mixtral-8x7B-v0.1"), "num_hidden_layers": 2, "hidden_size": 128}
    config |= {"intermediate_size": 64, "num_attention_heads": 2, "num_local_experts": 2, "vocab_size": 100}
    for kv_heads in (2, 1):
        spec = ModelSpec.from_hf_config({**config, "num_key_value_heads": kv_heads}, "mixture")
        attention = layer_timing._attention(spec, "float32")
        issue = layer_timing._Issue.measured(spec, "float32", "cpu", attention)
        assert 1e-5 < issue.chunk_s < 1
        assert issue.beside_attention >= 1
        # Where heads share keys nothing is made anew.
        assert (issue.recompute_s is None) == (kv_heads == 1)
    assert layer_timing._Issue.measured(spec, "float32", "cpu", None).beside_attention == 1


def test_what_the_host_takes_is_the_same_for_a_model_of_another_shape() -> None:
    """All of it: a figure that is left out would be free."""
    figures = {
        "issue_s": 1.0,
        "chunk_issue_s": 2.0,
        "kv_issue_s": 3.0,
        "exchange_s": 4.0,
        "recompute_issue_s": 5.0,
        "beside_attention": 6.0,
        "replay_s": 7.0,
    }
    shape = LayerShape.of(ModelSpec.from_hf_config(published_config("opt-30b"), "opt-30b"))
    small = dataclasses.replace(shape, hidden_size=1024, num_heads=8, num_kv_heads=8)
    nothing = LayerTimes(shape=small, issue_s=0.0, prompt=(), step=(), head=())
    scaled = dataclasses.replace(nothing, **figures).scaled_to(shape)
    assert {name: getattr(scaled, name) for name in figures} == figures
    assert set(figures) == {
        name for name in LayerTimes.__dataclass_fields__ if name in figures or "issue" in name
    }
