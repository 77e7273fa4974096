"""Tiny random models of every family, as transformers saves them: the oracle for parity tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from flexllmgen.checkpoint import SafetensorsCheckpoint
from flexllmgen.spec import ModelSpec

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GATED: dict[str, Any] = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
_OPT: dict[str, Any] = {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", _OPT),
    "opt-350m": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", {**_GATED, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {**_GATED, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GATED, "sliding_window": 6}),
    "qwen2": ("qwen2", _GATED),
    "qwen3": ("qwen3", {**_GATED, "head_dim": 16}),
    "mixtral": ("mixtral", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            **_GATED,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A model of transformers, and the folder it was saved to."""

    model: Any
    folder: Path
    spec: ModelSpec

    @property
    def checkpoint(self) -> SafetensorsCheckpoint:
        return SafetensorsCheckpoint(self.folder)

    def greedy(
        self, ids: torch.Tensor, mask: torch.Tensor | None, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens [B, tokens] and their logits [B, tokens, V] from transformers' generate."""
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids) if mask is None else mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def make_tiny(name: str, folder: Path, **changes: Any) -> TinyModel:
    """Makes and saves a tiny model; biases and norms are random too, so that none can be forgotten."""
    kind, sizes = TINY[name]
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **changes})
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in key:
                parameter.normal_(1, 0.1)
            else:
                parameter.normal_(0, 0.15)
    model.tie_weights()
    model.save_pretrained(folder)
    return TinyModel(model, folder, ModelSpec.from_hf_config(config.to_dict(), name=name))


def prompts(
    count: int, length: int, *, padded: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Random prompts; padded ones have lengths from 3 up, on the right of their rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (count, length), generator=generator)
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    for row in range(count):
        pad = (row * 3) % (length - 2)
        mask[row, :pad] = 0
        ids[row, :pad] = 1
    return ids, mask
