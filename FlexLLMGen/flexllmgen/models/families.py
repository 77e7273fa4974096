"""Model families as data: a row of traits and a map from our tensor names to a checkpoint's.

A dense family costs one row here. Qwen3, the last added, is Llama's map with two more names (the norms of
the query and key heads) and `qk_norm=True`; no code knows its name.

A value of a map lists the checkpoint's tensors that are stacked by rows into one of ours, so that a layer's
three projections are one matrix product. `{layer}` and `{expert}` are filled in by the reader.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

NameMap = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What all models of one `model_type` have in common; the sizes are in ModelSpec.

    Args:
        names: our tensor name -> names in a Hugging Face checkpoint, stacked by rows.
        norm: layer norm (with bias) or root-mean-square norm.
        positions: learned table added to the embeddings, or rotary embedding of queries and keys.
        gated: the MLP multiplies an activated gate with a second projection.
        attention_bias: (qkv, out) biases, or None where the config's `attention_bias` says.
        qk_norm: queries and keys are normalised per head before the rotary embedding.
        optional: checkpoint names that may be there and are not read (patterns for `fnmatch`).
    """

    names: NameMap
    norm: Literal["layer", "rms"] = "rms"
    positions: Literal["learned", "rotary"] = "rotary"
    gated: bool = True
    attention_bias: tuple[bool, bool] | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    moe: bool = False
    optional: tuple[str, ...] = ("*.rotary_emb.inv_freq", "*.masked_bias", "*.attn.bias")


def _freeze(names: dict[str, tuple[str, ...]]) -> NameMap:
    return MappingProxyType(names)


_LAYER = "model.layers.{layer}."
_OPT_LAYER = "model.decoder.layers.{layer}."


def _qkv(prefix: str, suffix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}self_attn.{which}_proj.{suffix}" for which in "qkv")


_OPT = {
    "tokens": ("model.decoder.embed_tokens.weight",),
    "positions": ("model.decoder.embed_positions.weight",),
    "project_in.weight": ("model.decoder.project_in.weight",),
    "project_out.weight": ("model.decoder.project_out.weight",),
    "final_norm.weight": ("model.decoder.final_layer_norm.weight",),
    "final_norm.bias": ("model.decoder.final_layer_norm.bias",),
    "lm_head.weight": ("lm_head.weight",),
    "attention_norm.weight": (f"{_OPT_LAYER}self_attn_layer_norm.weight",),
    "attention_norm.bias": (f"{_OPT_LAYER}self_attn_layer_norm.bias",),
    "qkv.weight": _qkv(_OPT_LAYER, "weight"),
    "qkv.bias": _qkv(_OPT_LAYER, "bias"),
    "out.weight": (f"{_OPT_LAYER}self_attn.out_proj.weight",),
    "out.bias": (f"{_OPT_LAYER}self_attn.out_proj.bias",),
    "mlp_norm.weight": (f"{_OPT_LAYER}final_layer_norm.weight",),
    "mlp_norm.bias": (f"{_OPT_LAYER}final_layer_norm.bias",),
    "up.weight": (f"{_OPT_LAYER}fc1.weight",),
    "up.bias": (f"{_OPT_LAYER}fc1.bias",),
    "down.weight": (f"{_OPT_LAYER}fc2.weight",),
    "down.bias": (f"{_OPT_LAYER}fc2.bias",),
}

_LLAMA = {
    "tokens": ("model.embed_tokens.weight",),
    "final_norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
    "attention_norm.weight": (f"{_LAYER}input_layernorm.weight",),
    "qkv.weight": _qkv(_LAYER, "weight"),
    "qkv.bias": _qkv(_LAYER, "bias"),
    "out.weight": (f"{_LAYER}self_attn.o_proj.weight",),
    "out.bias": (f"{_LAYER}self_attn.o_proj.bias",),
    "mlp_norm.weight": (f"{_LAYER}post_attention_layernorm.weight",),
    "gate_up.weight": (f"{_LAYER}mlp.gate_proj.weight", f"{_LAYER}mlp.up_proj.weight"),
    "gate_up.bias": (f"{_LAYER}mlp.gate_proj.bias", f"{_LAYER}mlp.up_proj.bias"),
    "down.weight": (f"{_LAYER}mlp.down_proj.weight",),
    "down.bias": (f"{_LAYER}mlp.down_proj.bias",),
}

_QWEN3 = {
    **_LLAMA,
    "q_norm.weight": (f"{_LAYER}self_attn.q_norm.weight",),
    "k_norm.weight": (f"{_LAYER}self_attn.k_norm.weight",),
}

_MIXTRAL = {
    **_LLAMA,
    "router.weight": (f"{_LAYER}block_sparse_moe.gate.weight",),
    "experts.{expert}.gate_up": (
        f"{_LAYER}block_sparse_moe.experts.{{expert}}.w1.weight",
        f"{_LAYER}block_sparse_moe.experts.{{expert}}.w3.weight",
    ),
    "experts.{expert}.down": (f"{_LAYER}block_sparse_moe.experts.{{expert}}.w2.weight",),
}

_QWEN3_MOE = {
    **_QWEN3,
    "router.weight": (f"{_LAYER}mlp.gate.weight",),
    "experts.{expert}.gate_up": (
        f"{_LAYER}mlp.experts.{{expert}}.gate_proj.weight",
        f"{_LAYER}mlp.experts.{{expert}}.up_proj.weight",
    ),
    "experts.{expert}.down": (f"{_LAYER}mlp.experts.{{expert}}.down_proj.weight",),
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "opt": Family(
            names=_freeze(_OPT),
            norm="layer",
            positions="learned",
            gated=False,
            attention_bias=(True, True),
            mlp_bias=True,
        ),
        "llama": Family(names=_freeze(_LLAMA), mlp_bias=None),
        "mistral": Family(names=_freeze(_LLAMA), attention_bias=(False, False)),
        "qwen2": Family(names=_freeze(_LLAMA), attention_bias=(True, False)),
        "qwen3": Family(names=_freeze(_QWEN3), qk_norm=True),
        "mixtral": Family(names=_freeze(_MIXTRAL), attention_bias=(False, False), moe=True),
        "qwen3_moe": Family(names=_freeze(_QWEN3_MOE), qk_norm=True, moe=True),
    }
)
