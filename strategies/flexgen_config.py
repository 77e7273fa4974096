"""The keys of strategy `flexgen`; flexgen.toml beside this holds their defaults and explains them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Percent = Annotated[float, Field(ge=0, le=100)]

SHORT = {"weights": "w", "kv_cache": "cache", "activations": "act"}
"""What a policy has shares of, and what the keys call it."""


KEY_OF = {
    "cpu_attention": "cpu_cache_compute",
    "copy_threads": "num_copy_threads",
    "kv_bits": "cache_bits",
    "kv_group_size": "cache_group_size",
}
"""Fields of the engine's policy that the keys call otherwise."""


def share_key(kind: str, tier: str) -> str:
    """The key of a share, in percent.

    >>> share_key("kv_cache", "gpu")
    'cache_gpu_percent'
    """
    return f"{SHORT[kind]}_{tier}_percent"


class Config(BaseModel):
    """What only `flexgen` has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    pin_weight: bool
    w_gpu_percent: Percent
    w_cpu_percent: Percent
    cache_gpu_percent: Percent
    cache_cpu_percent: Percent
    act_gpu_percent: Percent
    act_cpu_percent: Percent
    micro_batch_size: Annotated[int, Field(ge=0)]
    num_micro_batches: Annotated[int, Field(ge=1)]
    overlap: Annotated[int, Field(ge=0, le=8)]
    sep_layer: bool
    chosen_experts: bool
    compress_weight: bool
    weight_bits: Literal[8, 4]
    weight_group_size: Literal[64, 128]
    cpu_cache_compute: bool
    num_copy_threads: Annotated[int, Field(ge=1, le=64)]
    compress_cache: bool
    cache_bits: Literal[8, 4]
    cache_group_size: Literal[32, 64, 128]
    recompute: Annotated[float, Field(ge=0, le=1)]
    attn_sparsity: Annotated[float, Field(gt=0, le=1)]
