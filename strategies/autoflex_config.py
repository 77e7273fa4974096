"""The keys of strategy `autoflex`; autoflex.toml beside this holds their defaults and explains them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """What only `autoflex` has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Literal["throughput", "latency"]
    calibrate: bool
    path: str
    pin_weight: bool
    least_bits: Literal[8, 4]
