"""Is it worth keeping a layer's input instead of its keys and values, and computing those anew at each step?

    python benchmarks/recompute.py

By the formulas of profiling/limit.py, every resource at its full rate: the most tokens a second of a model whose weights are
partly streamed, when each sequence's cache is streamed as keys and values, or as the layer's input X (half the bytes of
keys and values where heads have keys of their own; K and V are then two products over all positions), or attended to on the
CPU where it lies; and of mixtures of these. The numbers of sequences are those that host memory holds. Nothing is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB

STEP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates per second, measured on one H200 machine of 16 cores; bytes."""

    link: float = 55e9
    compute: float = 7e14
    host: float = 94e9
    attention_under_copies: float = 53e9
    host_bytes: float = 112 * GiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Sequences by how their cache is used."""

    streamed: int = 0
    recomputed: int = 0
    attended: int = 0

    @property
    def count(self) -> int:
        return self.streamed + self.recomputed + self.attended


def tok_s(
    spec: ModelSpec, machine: Machine, mix: Mix, *, gpu_weight_bytes: float, prompt: int, gen: int
) -> float:
    """Tokens a second of one block; 0 where host memory does not hold it."""
    weights = max(0.0, spec.weight_bytes(2) - gpu_weight_bytes)
    context, room = prompt + gen // 2, prompt + gen
    kv, hidden = spec.kv_bytes(1, 2), spec.num_layers * spec.hidden_bytes(1, 2)
    held = weights + room * (kv * (mix.streamed + mix.attended) + hidden * mix.recomputed)
    if not mix.count or held > machine.host_bytes:
        return 0.0
    lifted = context * (kv * mix.streamed + hidden * mix.recomputed)
    products = 2 * 2 * spec.hidden_size * spec.kv_size * spec.num_layers * context
    link_s = (weights + lifted) / machine.link
    compute_s = (mix.count * spec.decode_flops(context) + mix.recomputed * products) / machine.compute
    attended = context * kv * mix.attended
    # Beside the copies of weights the CPU reads more slowly than alone.
    alone_s = max(0.0, attended - machine.attention_under_copies * link_s) / machine.host
    attention_s = min(link_s, attended / machine.attention_under_copies) + alone_s
    prompt_s = max(mix.count * spec.prefill_flops(prompt) / machine.compute, weights / machine.link)
    return mix.count * gen / (prompt_s + (gen - 1) * max(link_s, compute_s, attention_s))


def mixtures(ways: tuple[str, ...], most: int) -> Iterator[Mix]:
    """Every mixture of these ways in steps of sequences."""
    for counts in itertools.product(range(0, most + 1, STEP), repeat=len(ways)):
        yield Mix(**dict(zip(ways, counts, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=32)
    args = parser.parse_args()
    kinds = (("streamed",), ("recomputed",), ("attended",), ("recomputed", "attended"))
    print("| model | " + " | ".join(" + ".join(kind) for kind in kinds) + " |")
    print("|---" * (len(kinds) + 1) + "|")
    for model, gpu_gib, most in (
        ("opt-30b", 12, 240),
        ("opt-6.7b", 5, 640),
        ("Meta-Llama-3-8B", 5, 800),
    ):
        spec = ModelSpec.from_hf_config(published_config(model), model)
        cells = []
        for kind in kinds:
            best = max(
                (
                    (
                        tok_s(
                            spec,
                            Machine(),
                            mix,
                            gpu_weight_bytes=gpu_gib * GiB,
                            prompt=args.prompt,
                            gen=args.gen,
                        ),
                        mix,
                    )
                    for mix in mixtures(kind, most)
                ),
                key=lambda pair: pair[0],
            )
            cells.append(f"{best[0]:.0f} ({' + '.join(str(getattr(best[1], way)) for way in kind)})")
        print(f"| {model}, {gpu_gib} GiB of weights on the GPU | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
