"""The keys of strategy `accelerate`; accelerate.toml beside this holds their defaults and explains them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """What only `accelerate` has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enable_offload: bool
    enable_kv_offload: bool
    quantize: Literal["none", "int8", "int4"]
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"]
