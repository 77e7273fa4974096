"""A few layers stand for a model: as many as there are, of its shapes, timed at the rows and positions asked for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

import strategies.accelerate_layers as module
from flexllmgen.spec import ModelSpec
from strategies.accelerate_layers import FewLayers, PassTimes

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GATED = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "opt": {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 32},
    "qwen2": GATED,
    "qwen3": {**GATED, "head_dim": 32},
    "mixtral": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def config(name: str, **changes: Any) -> Any:
    return AutoConfig.for_model(name, **CONFIGS[name], **changes)


def few_layers(of: Any, dtype: str = "float32") -> FewLayers:
    return FewLayers(of, ModelSpec.from_hf_config(of.to_dict()), dtype, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_family_is_timed(name: str, dtype: str) -> None:
    of = config(name)
    with few_layers(of, dtype) as layers:
        assert len(layers._layers) == 3, "as many as the model has, since they are small"
        prompt, step = layers.prompt(2, 64), layers.step(2, 70)
    assert step.layer_s > 0
    assert prompt.layer_s > 0
    assert step.rest_s > 0
    assert of.num_hidden_layers == 3, "the model's own configuration is left alone"


def test_more_rows_take_longer() -> None:
    of = config("llama", tie_word_embeddings=True)
    of.hidden_size, of.intermediate_size, of.vocab_size = 256, 1024, 5000
    with few_layers(of) as layers:
        assert layers.prompt(16, 128).layer_s > 4 * layers.step(1, 8).layer_s
        model = layers._model
        table, head = (each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings()))
        assert table.data_ptr() == head.data_ptr(), "tied weights are one, also in the caches"
        assert all(weight.device.type == "cpu" for weight in model.parameters())


def test_layers_fill_what_is_rotated_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    of = config("llama")
    monkeypatch.setattr(module, "_ROTATED_BYTES", 200_000)
    with few_layers(of) as layers:
        held = sum(weight.nbytes for weight in layers._layers[0].parameters())
        assert len(layers._layers) == -(-200_000 // held) < 3


@pytest.mark.parametrize(("each_s", "calls"), [(0.001, [(1, 128), (8, 512)]), (0.1, [(1, 128)])])
def test_long_prompts_are_timed_in_part(
    each_s: float, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def timed(_self: FewLayers, batch: int, tokens: int, _cached: int) -> PassTimes:
        seen.append((batch, tokens))
        return PassTimes(layer_s=each_s * batch * tokens / 128, rest_s=0.5)

    monkeypatch.setattr(FewLayers, "_timed", timed)
    with few_layers(config("llama")) as layers:
        times = layers.prompt(8, 512)
    assert seen == calls
    assert times.layer_s == pytest.approx(each_s * 8 * 512 / 128)
    assert times.rest_s == 0.5
