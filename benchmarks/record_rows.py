"""The rows of the record: models, caps, workloads, what is asked of each, and which peers stand beside our engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ENGINE = "autoflex"
TITLES = {
    ENGINE: "autoflex",
    "accelerate": "accelerate",
    "prefetch": "prefetch hook on transformers",
    "diffusers": "diffusers' group offloading",
    "deepspeed": "DeepSpeed ZeRO-Inference",
    "flextensor": "FlexTensor 0.5",
    "flexgen": "FlexGen 0.1.8",
    "bitsandbytes": "accelerate + bitsandbytes NF4",
    "bitsandbytes-prefetch": "prefetch hook + bitsandbytes NF4",
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One engine's part of a row: fields of its Case, and the seconds it may take in all (about what it needs, twice)."""

    seconds: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        lossy: the search may compress weights and KV.
        asked_tok_s, asked_attainment: what is asked of our engine, tokens a second or a share of the limit.
        known: peers' figures that are not measured here.
    """

    title: str
    model: str
    gpu_gib: float
    sequences: int
    prompt: int = 512
    gen: int = 32
    lossy: bool = False
    asked_tok_s: float | None = None
    asked_attainment: float | None = None
    known: str = ""
    measures: Mapping[str, Measure] = field(default_factory=dict)

    def options(self, engine: str) -> dict[str, Any]:
        """Fields of the Case of one engine."""
        common = {
            "model": self.model,
            "gpu_gib": self.gpu_gib,
            "sequences": self.sequences,
            "prompt": self.prompt,
            "gen": self.gen,
            "lossy": self.lossy,
            "alias_mib": ALIAS_MIB,
        }
        return common | dict(self.measures[engine].options)


ALIAS_MIB = 4096
"""Host memory that layers share: many times any cache, so that what is moved and read is what it would be."""

ROWS = {
    "opt-30b": Row(
        title="OPT-30B, 16 GiB, lossless",
        model="opt-30b",
        gpu_gib=16,
        sequences=192,
        asked_tok_s=65,
        measures={
            ENGINE: Measure(seconds=150, options={"steps": 5}),
            "flexgen": Measure(seconds=90, options={"batch": 48, "steps": 3}),
            "prefetch": Measure(seconds=60, options={"steps": 4}),
            "diffusers": Measure(seconds=70, options={"steps": 3}),
            "deepspeed": Measure(seconds=100, options={"steps": 3}),
            "accelerate": Measure(seconds=100, options={"steps": 2}),
        },
    ),
    "opt-30b-4bit": Row(
        title="OPT-30B, 16 GiB, 4-bit weights and KV",
        model="opt-30b",
        gpu_gib=16,
        sequences=192,
        lossy=True,
        asked_tok_s=140,
        measures={
            ENGINE: Measure(seconds=120, options={"steps": 4}),
            "flexgen": Measure(
                seconds=130,
                options={
                    "batch": 48,
                    "batches": 4,
                    "percent": (0, 100, 0, 100, 0, 100),
                    "bits": 4,
                    "steps": 2,
                },
            ),
            "bitsandbytes-prefetch": Measure(seconds=60, options={"steps": 4}),
        },
    ),
    "opt-6.7b": Row(
        title="OPT-6.7B, 8 GiB, lossless",
        model="opt-6.7b",
        gpu_gib=8,
        sequences=192,
        asked_tok_s=250,
        measures={
            ENGINE: Measure(seconds=80, options={"steps": 8}),
            "flexgen": Measure(seconds=90, options={"batch": 32, "batches": 4, "steps": 4}),
            "prefetch": Measure(seconds=50, options={"steps": 6}),
            "diffusers": Measure(seconds=50, options={"steps": 4}),
            "deepspeed": Measure(seconds=60, options={"steps": 4}),
            "flextensor": Measure(seconds=100, options={"steps": 4, "alias_mib": 0}),
            "accelerate": Measure(seconds=60, options={"steps": 3}),
        },
    ),
    "llama-3-70b-4bit": Row(
        title="Llama-3-70B, 16 GiB, 4-bit weights",
        model="Meta-Llama-3-70B",
        gpu_gib=16,
        sequences=192,
        lossy=True,
        asked_attainment=0.75,
        measures={
            ENGINE: Measure(seconds=150, options={"steps": 4}),
            "bitsandbytes": Measure(seconds=100, options={"steps": 2, "alias_mib": 0}),
            "bitsandbytes-prefetch": Measure(seconds=80, options={"steps": 4}),
        },
    ),
    "qwen3-30b-a3b": Row(
        title="Qwen3-30B-A3B, 16 GiB, lossless, 512/128",
        model="Qwen3-30B-A3B",
        gpu_gib=16,
        sequences=768,
        gen=128,
        asked_attainment=0.6,
        measures={
            ENGINE: Measure(seconds=150, options={"steps": 5}),
            "prefetch": Measure(seconds=70, options={"steps": 4}),
            "accelerate": Measure(seconds=100, options={"steps": 2}),
        },
    ),
    "mixtral-8x7b-4bit": Row(
        title="Mixtral-8x7B, 16 GiB, 4-bit, 418/128",
        model="Mixtral-8x7B-v0.1",
        gpu_gib=16,
        sequences=512,
        prompt=418,
        gen=128,
        lossy=True,
        asked_attainment=0.6,
        measures={
            ENGINE: Measure(seconds=150, options={"steps": 5}),
            "prefetch": Measure(seconds=80, options={"steps": 3}),
            "accelerate": Measure(seconds=110, options={"steps": 2}),
        },
    ),
    "opt-175b-4bit": Row(
        title="OPT-175B, 16 GiB, 4-bit",
        model="opt-175b",
        gpu_gib=16,
        sequences=48,
        lossy=True,
        asked_tok_s=10,
        known="FlexGen's paper 1.12 on a T4",
        measures={
            ENGINE: Measure(seconds=180, options={"steps": 3}),
            "flexgen": Measure(
                seconds=130,
                options={
                    "batch": 8,
                    "batches": 2,
                    "percent": (0, 100, 0, 100, 0, 100),
                    "bits": 4,
                    "steps": 2,
                },
            ),
        },
    ),
}
