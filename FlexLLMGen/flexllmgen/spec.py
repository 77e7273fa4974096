"""ModelSpec: the dimensions of a decoder, and every size and operation count that follows from them.

Read from a Hugging Face config (a plain mapping); knows nothing of tensors, devices or checkpoints' files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexllmgen.errors import UnsupportedModelError
from flexllmgen.models.families import FAMILIES, Family

ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: base frequency and how it is stretched to longer contexts."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer's dimensions.

    Args:
        family: the Hugging Face `model_type`, a key of FAMILIES.
        embed_size: width of the token table; unlike `hidden_size` where projections join them (OPT-350m).
        num_experts: experts of each layer's MLP; 0 for a dense model.
        intermediate_size: inner width of the MLP, of one expert where there are experts.
        position_offset: rows of the learned position table before position 0.
        sliding_windows: per layer, the number of latest positions a token attends to; 0 means all.
        final_norm: whether a norm follows the last layer (not so for OPT-350m).
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    embed_size: int
    activation: str
    norm_eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    pre_norm: bool = True
    final_norm: bool = True
    position_offset: int = 0
    rope: RopeSpec | None = None
    sliding_windows: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    normalise_experts: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly"
            )

    @staticmethod
    def from_hf_config(config: Mapping[str, Any], name: str = "") -> "ModelSpec":
        """Reads a Hugging Face config, as `config.json` holds it or `config.to_dict()` gives it.

        Raises:
            UnsupportedModelError: for an architecture or an option that this engine cannot run.

        >>> ModelSpec.from_hf_config({"model_type": "gpt2"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        flexllmgen.errors.UnsupportedModelError: model type 'gpt2' is not supported (supported: llama, ...
        """
        kind = str(config.get("model_type", ""))
        if kind not in FAMILIES:
            raise UnsupportedModelError(
                f"model type {kind!r} is not supported (supported: {', '.join(sorted(FAMILIES))}); "
                "use -s accelerate for other models"
            )
        if config.get("quantization_config"):
            raise UnsupportedModelError(
                f"{name or kind} is a quantised checkpoint, which this engine cannot read; use -s accelerate"
            )
        try:
            return (
                _from_opt(config, name) if kind == "opt" else _from_llama_like(config, name, FAMILIES[kind])
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            fault = f"lacks {error}" if isinstance(error, KeyError) else f"is not a model's ({error})"
            raise UnsupportedModelError(
                f"the config of {name or kind} {fault}; download or copy config.json again"
            ) from error

    @property
    def traits(self) -> Family:
        """What the whole family has in common."""
        return FAMILIES[self.family]

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    def sliding_window(self, layer: int) -> int:
        """Latest positions a token of `layer` attends to, itself included; 0 means all."""
        return self.sliding_windows[layer] if self.sliding_windows else 0

    # The tensors, by our names. Everything counted below is counted from these tables.

    def embed_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes read when tokens are embedded, but for a token table shared with the head."""
        shapes: dict[str, tuple[int, ...]] = {}
        if not self.tied:
            shapes["tokens"] = (self.vocab_size, self.embed_size)
        if self.traits.positions == "learned":
            shapes["positions"] = (self.max_positions + self.position_offset, self.hidden_size)
        if self.embed_size != self.hidden_size:
            shapes["project_in.weight"] = (self.hidden_size, self.embed_size)
        return shapes

    def head_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes read when logits are computed; the token table where it is shared."""
        shapes = self._norm_tensors("final_norm") if self.final_norm else {}
        if self.embed_size != self.hidden_size:
            shapes["project_out.weight"] = (self.embed_size, self.hidden_size)
        shapes["tokens" if self.tied else "lm_head.weight"] = (self.vocab_size, self.embed_size)
        return shapes

    def attention_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's attention half; queries, keys and values are one matrix."""
        shapes = self._norm_tensors("attention_norm")
        shapes["qkv.weight"] = (self.query_size + 2 * self.kv_size, self.hidden_size)
        if self.qkv_bias:
            shapes["qkv.bias"] = (self.query_size + 2 * self.kv_size,)
        if self.traits.qk_norm:
            shapes["q_norm.weight"] = shapes["k_norm.weight"] = (self.head_dim,)
        shapes["out.weight"] = (self.hidden_size, self.query_size)
        if self.out_bias:
            shapes["out.bias"] = (self.hidden_size,)
        return shapes

    def mlp_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's MLP half; gate and up projections are one matrix, each expert its own."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = self._norm_tensors("mlp_norm")
        if self.num_experts:
            shapes["router.weight"] = (self.num_experts, hidden)
            for expert in range(self.num_experts):
                shapes[f"experts.{expert}.gate_up"] = (2 * inner, hidden)
                shapes[f"experts.{expert}.down"] = (hidden, inner)
            return shapes
        up, rows = ("gate_up", 2 * inner) if self.traits.gated else ("up", inner)
        shapes[f"{up}.weight"] = (rows, hidden)
        if self.mlp_bias:
            shapes[f"{up}.bias"] = (rows,)
        shapes["down.weight"] = (hidden, inner)
        if self.mlp_bias:
            shapes["down.bias"] = (hidden,)
        return shapes

    def _norm_tensors(self, name: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.hidden_size,)}
        if self.traits.norm == "layer":
            shapes[f"{name}.bias"] = (self.hidden_size,)
        return shapes

    # Sizes

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, all experts included."""
        return _count(self.attention_tensors()) + _count(self.mlp_tensors())

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; a shared token table counts once.

        >>> OPT_125M.num_parameters
        125239296
        """
        ends = _count(self.embed_tensors()) + _count(self.head_tensors())
        return ends + self.num_layers * self.layer_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that work on one token: of the experts only those it is routed to."""
        if not self.num_experts:
            return self.num_parameters
        expert = 3 * self.hidden_size * self.intermediate_size
        idle = (self.num_experts - self.experts_per_token) * expert
        return self.num_parameters - self.num_layers * idle

    def expected_experts(self, rows: int) -> float:
        """Distinct experts of a layer that `rows` tokens are sent to, on average, if all experts are as likely.

        The classical occupancy problem: each of a layer's E experts is missed by a token with probability 1 - k/E. A router
        that prefers some experts finds fewer distinct ones, never more (the sum is concave in the probabilities).

        >>> OPT_125M.expected_experts(rows=8)
        0.0
        """
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1.0 - (1.0 - self.experts_per_token / self.num_experts) ** rows)

    def layer_weight_bytes(self, dtype_bytes: int) -> int:
        """Bytes of one decoder layer's weights.

        >>> OPT_125M.layer_weight_bytes(dtype_bytes=2)
        14175744
        """
        return self.layer_parameters * dtype_bytes

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Bytes of all weights, embeddings and head included.

        >>> OPT_125M.weight_bytes(dtype_bytes=2)
        250478592
        """
        return self.num_parameters * dtype_bytes

    def kv_bytes(self, tokens: int, dtype_bytes: int = 2) -> int:
        """Bytes of KV held for `tokens` positions of one sequence, over all layers.

        >>> OPT_125M.kv_bytes(tokens=512)
        18874368
        """
        return self.num_layers * 2 * self.kv_size * tokens * dtype_bytes

    def attended_positions(self, context: int) -> int:
        """Positions that a step attends to, its own included, summed over the layers: a window where a layer has one."""
        if not self.sliding_windows:
            return self.num_layers * context
        return sum(min(self.sliding_window(layer) or context, context) for layer in range(self.num_layers))

    def attended_share(self, context: int) -> float:
        """Share of the KV of `context` positions that a step attends to: less than 1 where layers have a window."""
        return self.attended_positions(context) / (context * self.num_layers) if context else 1.0

    def hidden_bytes(self, tokens: int, dtype_bytes: int = 2) -> int:
        """Bytes of the hidden states of `tokens` positions.

        >>> OPT_125M.hidden_bytes(tokens=4)
        6144
        """
        return self.hidden_size * tokens * dtype_bytes

    # Operations. Two for each multiply-add of a matrix product (Kaplan et al. 2020, section 2.1); attention
    # adds two products of query size for each pair of positions. Embedding look-ups are free.

    def _matrix_flops(self) -> int:
        """Operations of the layers' matrix products for one token."""
        attention = _count(self.attention_tensors())
        if self.num_experts:
            mlp = self.num_experts * self.hidden_size
            mlp += self.experts_per_token * 3 * self.hidden_size * self.intermediate_size
        else:
            mlp = _count(self.mlp_tensors())
        return 2 * self.num_layers * (attention + mlp)

    def _head_flops(self) -> int:
        return 2 * _count(self.head_tensors())

    def prefill_flops(self, tokens: int) -> int:
        """Operations to read a prompt of `tokens` positions of one sequence; logits of the last one only.

        Each position attends to itself and those before it, a window of them where the model has one.

        >>> round(OPT_125M.prefill_flops(tokens=512) / 1e9, 1)
        92.0
        """
        pairs = 0
        for layer in range(self.num_layers):
            window = min(self.sliding_window(layer) or tokens, tokens)
            pairs += window * (window + 1) // 2 + (tokens - window) * window
        return tokens * self._matrix_flops() + 4 * self.query_size * pairs + self._head_flops()

    def decode_flops(self, context: int) -> int:
        """Operations for one more token of one sequence that then attends to `context` positions.

        >>> round(OPT_125M.decode_flops(context=512) / 1e6, 1)
        266.2
        """
        attended = self.attended_positions(context)
        return int(self.step_flops(scored=attended, mixed=attended))

    def step_flops(self, *, scored: float, mixed: float) -> float:
        """Operations for one more token of one sequence: `scored` keys and `mixed` values, summed over the layers."""
        return self._matrix_flops() + 2 * self.query_size * (scored + mixed) + self._head_flops()

    def key_value_flops(self, positions: float) -> float:
        """Operations to make keys and values of the layer's input at `positions`, summed over the layers.

        >>> OPT_125M.key_value_flops(positions=1)
        2359296
        """
        return 4 * self.hidden_size * self.kv_size * positions


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _activation(config: Mapping[str, Any], key: str) -> str:
    activation = str(config.get(key, ""))
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {activation!r} is not supported (supported: {', '.join(ACTIVATIONS)}); "
            "use -s accelerate"
        )
    return activation


def _from_opt(config: Mapping[str, Any], name: str) -> ModelSpec:
    if not config.get("enable_bias", True) or not config.get("layer_norm_elementwise_affine", True):
        raise UnsupportedModelError(
            "OPT without biases or with plain layer norms is not supported; use -s accelerate"
        )
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    pre_norm = bool(config.get("do_layer_norm_before", True))
    return ModelSpec(
        name=name or str(config.get("_name_or_path", "")),
        family="opt",
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=int(config["ffn_dim"]),
        vocab_size=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        embed_size=int(config.get("word_embed_proj_dim") or hidden),
        activation=_activation({"activation_function": "relu", **config}, "activation_function"),
        norm_eps=1e-5,
        tied=bool(config.get("tie_word_embeddings", True)),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        pre_norm=pre_norm,
        final_norm=pre_norm and not config.get("_remove_final_layer_norm", False),
        position_offset=2,
    )


def _from_llama_like(config: Mapping[str, Any], name: str, family: Family) -> ModelSpec:
    kind = str(config["model_type"])
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    layers = int(config["num_hidden_layers"])
    experts = 0
    if family.moe:
        experts = int(config.get("num_local_experts") or config.get("num_experts") or 0)
        if int(config.get("decoder_sparse_step") or 1) != 1 or config.get("mlp_only_layers"):
            raise UnsupportedModelError(
                "layers without experts between those with are not supported; use -s accelerate"
            )
    inner = config.get("moe_intermediate_size") if family.moe else None
    bias = bool(config.get("attention_bias", False))
    qkv_bias, out_bias = family.attention_bias if family.attention_bias is not None else (bias, bias)
    return ModelSpec(
        name=name or str(config.get("_name_or_path", "")),
        family=kind,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate_size=int(inner or config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        embed_size=hidden,
        activation=_activation({"hidden_act": "silu", **config}, "hidden_act"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
        rope=_rope(config),
        sliding_windows=_windows(config, kind, layers),
        num_experts=experts,
        experts_per_token=int(config["num_experts_per_tok"]) if experts else 0,
        # Mixtral always scales the chosen experts' weights to sum to one; Qwen3-MoE's config decides.
        normalise_experts=bool(config.get("norm_topk_prob", kind == "mixtral")),
    )


def _rope(config: Mapping[str, Any]) -> RopeSpec:
    """Both spellings: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before it."""
    given: dict[str, Any] = dict(config.get("rope_scaling") or {})
    given.update(config.get("rope_parameters") or {})
    kind = str(given.get("rope_type") or given.get("type") or "default")
    if kind not in ROPE_TYPES or float(given.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError(
            f"rotary embedding {kind!r} is not supported (supported: {', '.join(ROPE_TYPES)}); "
            "use -s accelerate"
        )
    theta = given.get("rope_theta") or config.get("rope_theta") or 10000.0
    original = given.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return RopeSpec(
        theta=float(theta),
        kind=kind,
        factor=float(given.get("factor") or 1.0),
        low_freq_factor=float(given.get("low_freq_factor") or 1.0),
        high_freq_factor=float(given.get("high_freq_factor") or 4.0),
        original_max_positions=int(original),
    )


def _windows(config: Mapping[str, Any], kind: str, layers: int) -> tuple[int, ...]:
    window = int(config.get("sliding_window") or 0)
    if not window or (kind.startswith("qwen") and not config.get("use_sliding_window", False)):
        return ()
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if each == "sliding_attention" else 0 for each in kinds)
    first = int(config.get("max_window_layers") or 0) if kind in ("qwen2", "qwen3") else 0
    return tuple(window if layer >= first else 0 for layer in range(layers))


OPT_125M = ModelSpec.from_hf_config(
    {
        "model_type": "opt",
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 768,
    },
    name="facebook/opt-125m",
)
"""The smallest OPT, for examples."""
