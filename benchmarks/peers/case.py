"""What one measurement is asked to do, and the figures that come of it; common to our engine and its peers."""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("", "FlexLLMGen")]

from flexllmgen.models.published import published_config
from flexllmgen.units import GiB

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Args:
        model: a published model's name; with `layers`, only so many of its layers.
        dtype: of weights, KV and activations; the published one by default.
        gpu_gib, cpu_gib: caps; 0 is all that is there.
        sequences: of the workload. Peers serve their first `batch` x `batches`; a batch of 0 is as large as fits.
        steps: decode steps that are run; where that is fewer than `gen - 1`, the rest is projected from the median step.
        alias_mib: host memory that layers share in turn; 0 leaves every byte its own.
        bits: of compressed weights (and KV, where a peer can).
        lossy: our search may compress.
        policy: for our engine, JSON of a policy's fields, run instead of the search's.
        weights_gib: accelerate's share of weights on the device.
        percent: FlexGen's six percentages.
    """

    model: str
    layers: int = 0
    dtype: str = ""
    gpu_gib: float = 16.0
    cpu_gib: float = 0.0
    sequences: int = 64
    prompt: int = 512
    gen: int = 32
    steps: int = 3
    batch: int = 0
    batches: int = 1
    alias_mib: int = 0
    bits: int = 0
    lossy: bool = False
    policy: str = ""
    weights_gib: float = 0.0
    percent: tuple[int, ...] = (20, 80, 0, 100, 0, 100)
    offload_dir: str = "/tmp/offload"
    profiles: str = "/tmp/profiles"

    @property
    def config(self) -> dict[str, Any]:
        """The model's published config."""
        config = published_config(self.model)
        return config | ({"num_hidden_layers": self.layers} if self.layers else {})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number type: the published one unless asked otherwise."""
        found = getattr(torch, self.dtype or self.config["torch_dtype"])
        assert isinstance(found, torch.dtype)
        return found

    def prompts(self, count: int) -> torch.Tensor:
        """The first `count` prompts, int64 [count, prompt], the same for whoever asks."""
        return random_prompts(self.config["vocab_size"], count, self.prompt)


def random_prompts(vocab_size: int, sequences: int, prompt_tokens: int) -> torch.Tensor:
    """Everybody's prompts, int64 [sequences, prompt_tokens]: fewer sequences are the first of more.

    >>> bool((random_prompts(96, 4, 8)[:2] == random_prompts(96, 2, 8)).all())
    True
    """
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, vocab_size, (sequences, prompt_tokens), generator=generator)


def cap_device_memory(gpu_gib: float) -> None:
    """Holds torch's allocator to so many GiB; 0 leaves it as it is."""
    if DEVICE == "cuda" and gpu_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_gib * GiB / total))


def figures(case: Case, sequences: int, start: float, stamps: Sequence[float]) -> dict[str, Any]:
    """The common figures from the moment each column of tokens came."""
    prefill = stamps[0] - start
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    step = statistics.median(gaps) if gaps else 0.0
    complete = len(stamps) >= case.gen
    total = stamps[-1] - start if complete else prefill + (case.gen - 1) * step
    cuda = DEVICE == "cuda"
    return {
        "sequences": sequences,
        "prompt": case.prompt,
        "gen": case.gen,
        "columns": len(stamps),
        "prefill_s": round(prefill, 3),
        "decode_step_s": round(step, 4),
        "decode_tok_s": round(sequences / step, 1) if step else None,
        "tok_s": round(sequences * case.gen / total, 2),
        "projected": not complete,
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GiB, 2) if cuda else None,
        "peak_gpu_gib": round(torch.cuda.max_memory_reserved() / GiB, 2) if cuda else None,
        "rss_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 2),
    }
