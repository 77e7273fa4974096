"""Perplexity and equal greedy tokens of the built-in model under each lossy setting, beside FlexGen's rule at the same bits.

    python benchmarks/quality.py --out benchmarks/cpu/quality-2026-11-23.json

Runs on any machine; `--device cuda --dtype float16` for a GPU. The text is `harness.quality.sample`'s. Where a setting touches
the KV cache, the scored end of each window is predicted by decode steps from the cache as it is kept.

FlexGen's rule (Sheng et al. 2023, section 5): groups of 64 neighbours, scaled between their least and greatest. Weights
in groups along the outputs of a matrix; keys and values along the hidden dimension of one token, the newest of them as it is.
Applied here to the same matrices as ours, and to every token that the cache holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "FlexLLMGen")]

from flexllmgen.checkpoint import Checkpoint, SafetensorsCheckpoint
from flexllmgen.compression import dequantise, quantise
from flexllmgen.engine import FlexEngine
from flexllmgen.models import decoder
from flexllmgen.policy import ON_CPU, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from harness.quality.figures import match_tokens, perplexity

GROUP = 64


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: a policy's fields, or the bits that FlexGen's rule is applied with."""

    name: str
    policy: dict[str, Any]
    rule_weight_bits: int | None = None
    rule_kv_bits: int | None = None

    @property
    def changes_kv(self) -> bool:
        """Whether the scores must come from steps, or from the rule's attention."""
        return "kv_bits" in self.policy


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is scored, [B, T] of which the last `scored` count, and the prompts [B, P] that tokens are generated from."""

    windows: torch.Tensor
    prompts: torch.Tensor
    scored: int
    gen_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """What steps come after: they predict the scored tokens, the prompt the one between."""
        return self.windows.shape[1] - self.scored - 1


def rounded(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """`x` after FlexGen's rule: asymmetric between least and greatest of each group along `dim`, both kept in fp16."""
    moved = x.movedim(dim, -1).float()
    rest = moved.shape[-1] % GROUP
    whole = moved if not rest else torch.nn.functional.pad(moved, (0, GROUP - rest), mode="replicate")
    grouped = whole.unflatten(-1, (-1, GROUP))
    low = grouped.amin(-1, keepdim=True).half().float()
    step = ((grouped.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    codes = ((grouped - low) / step.clamp(min=1e-7)).round().clamp(0, 2**bits - 1)
    back = (codes * step + low).flatten(-2)[..., : moved.shape[-1]]
    return back.movedim(-1, dim).to(x.dtype)


def kept(x: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """`x` after our own quantiser."""
    return dequantise(*quantise(x, bits, group_size), bits, group_size, torch.empty_like(x))


class RoundedCheckpoint:
    """A checkpoint whose layers' matrices were rounded once, by FlexGen's rule or ours."""

    def __init__(self, inner: Checkpoint, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.inner, self.how = inner, how

    @property
    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint}-{id(self)}"

    def validate(self, spec: ModelSpec) -> None:
        self.inner.validate(spec)

    def fill(self, spec: ModelSpec, layer: int, name: str, target: torch.Tensor) -> None:
        self.inner.fill(spec, layer, name, target)
        if layer >= 0 and target.dim() == 2:  # Of a dense model, what ours compresses too.
            target.copy_(self.how(target))


@contextmanager
def rule_attention(bits: int, prompt_tokens: int) -> Iterator[None]:
    """While in here, a text that is read at once attends as it would step by step over a cache under FlexGen's rule.

    Positions of the prompt see each other as they are; a later one sees itself as it is and all before it rounded.
    """

    def attend(
        q_BTNH: torch.Tensor, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, _keep: object, _window: object
    ) -> torch.Tensor:
        tokens, groups = q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2]

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).repeat_interleave(groups, dim=1).float()

        def cached(x_BTKH: torch.Tensor) -> torch.Tensor:
            return rounded(x_BTKH.flatten(2), bits, 2).view_as(x_BTKH)

        q, k, v = q_BTNH.transpose(1, 2).float(), heads(k_BTKH), heads(v_BTKH)
        k_kept, v_kept = heads(cached(k_BTKH)), heads(cached(v_BTKH))
        at = torch.arange(tokens, device=q.device)
        plain = (at[:, None] < prompt_tokens) | (at[:, None] == at)
        scale = q.shape[-1] ** -0.5
        scores = torch.where(plain, q @ k.mT, q @ k_kept.mT) * scale
        likely = scores.masked_fill(at[:, None] < at, float("-inf")).softmax(-1)
        out = (likely * plain) @ v + (likely * ~plain) @ v_kept
        return out.transpose(1, 2).to(q_BTNH.dtype)

    with mock.patch.object(decoder, "prompt_attention", attend):
        yield


def measure(
    setting: Setting,
    spec: ModelSpec,
    folder: Path,
    text: Text,
    *,
    device: str,
    dtype: str,
    rounded_once: bool = True,
) -> tuple[float, list[list[int]] | None]:
    """Mean negative log-likelihood of the scored tokens, and greedy tokens but for the rule's KV, which no cache keeps.

    Args:
        rounded_once: weights go through our quantiser when they are loaded, in place of at each pass, which gives the same
            numbers in less time.
    """
    checkpoint: Checkpoint = SafetensorsCheckpoint(folder)
    choices = dict(setting.policy)
    if (bits := setting.rule_weight_bits) is not None:
        checkpoint = RoundedCheckpoint(checkpoint, lambda x: rounded(x, bits, 0))
    if rounded_once and "weight_bits" in choices:
        own, group_size = choices.pop("weight_bits"), choices.pop("weight_group_size", GROUP)
        checkpoint = RoundedCheckpoint(checkpoint, lambda x: kept(x, own, group_size))
    length = text.windows.shape[1]
    workload = Workload(
        num_sequences=len(text.windows),
        prompt_tokens=length,
        gen_tokens=max(text.gen_tokens, 1),
    )
    policy = Policy(micro_batch_size=len(text.windows), **choices)
    with (
        tempfile.TemporaryDirectory() as scratch,
        FlexEngine.load(
            spec,
            checkpoint,
            policy,
            workload=workload,
            device=device,
            dtype=dtype,
            offload_dir=scratch,
            # Without a GPU the CPU attends anyway, unless told that it is not the device.
            in_place=False if policy.cpu_attention else None,
        ) as engine,
    ):
        if setting.rule_kv_bits is not None:
            with rule_attention(setting.rule_kv_bits, text.prompt_tokens):
                scores = engine.score(text.windows)
            return _loss(scores, text), None
        scores = engine.score(
            text.windows, prompt_tokens=text.prompt_tokens if setting.changes_kv else length
        )
        columns = list(engine.generate(text.prompts, max_new_tokens=text.gen_tokens))
        return _loss(scores, text), torch.stack(columns, dim=1).tolist()


def _loss(scores_BT: torch.Tensor, text: Text) -> float:
    return -scores_BT[:, text.prompt_tokens :].double().mean().item()


def settings() -> list[Setting]:
    """The lossless model first, then ours and the rule at each number of bits."""

    def ours(name: str, **policy: Any) -> Setting:
        return Setting(name=name, policy=policy)

    def rule(name: str, weights: int | None = None, kv: int | None = None) -> Setting:
        return Setting(name=f"FlexGen's rule, {name}", policy={}, rule_weight_bits=weights, rule_kv_bits=kv)

    return [
        ours("lossless"),
        ours("weights 8 bit", weight_bits=8),
        rule("weights 8 bit", weights=8),
        ours("weights 4 bit", weight_bits=4),
        rule("weights 4 bit", weights=4),
        ours("KV 8 bit", kv_bits=8),
        rule("KV 8 bit", kv=8),
        ours("KV 8 bit, attended to on the CPU", kv_bits=8, cpu_attention=True, kv_cache=ON_CPU),
        ours("KV 4 bit", kv_bits=4),
        rule("KV 4 bit", kv=4),
        ours("weights and KV 8 bit", weight_bits=8, kv_bits=8),
        rule("weights and KV 8 bit", weights=8, kv=8),
        ours("weights and KV 4 bit", weight_bits=4, kv_bits=4),
        rule("weights and KV 4 bit", weights=4, kv=4),
        ours("weights 8 bit, groups of 128", weight_bits=8, weight_group_size=128),
        ours("weights 4 bit, groups of 128", weight_bits=4, weight_group_size=128),
        ours("KV 4 bit, groups of 128", kv_bits=4, kv_group_size=128),
    ]


def draw_text(
    folder: Path, windows: int, length: int, scored: int, prompts: int, gen_tokens: int
) -> tuple[Text, dict[str, Any]]:
    """Windows and prompts from the sample's text, and what it is."""
    from transformers import AutoTokenizer

    from harness.quality.sample import cut_windows, digest_of, read_text

    rows, text = read_text()
    cut = cut_windows(AutoTokenizer.from_pretrained(folder), text, windows, length)
    ids = torch.tensor(cut)
    told = {
        "text": rows.name,
        "split": rows.split,
        "digest": digest_of(cut, length - scored - 1),
        "windows": len(cut),
        "window_tokens": length,
        "scored_tokens": len(cut) * scored,
    }
    return Text(
        windows=ids, prompts=ids[:prompts, : length - scored], scored=scored, gen_tokens=gen_tokens
    ), told


def run(
    rows: Sequence[Setting], spec: ModelSpec, folder: Path, text: Text, *, device: str, dtype: str,
    rounded_once: bool = True,
    tell: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row of figures for each setting, the first of which the others are held against."""
    found: list[dict[str, Any]] = []
    lossless: tuple[float, list[list[int]] | None] | None = None
    for setting in rows:
        started = time.perf_counter()
        loss, tokens = measure(
            setting, spec, folder, text, device=device, dtype=dtype, rounded_once=rounded_once
        )
        lossless = lossless or (loss, tokens)
        row: dict[str, Any] = {
            "setting": setting.name,
            "perplexity": perplexity(loss),
            "over_lossless": perplexity(loss - lossless[0]) - 1,
        }
        if tokens is not None and lossless[1] is not None:
            matched = match_tokens(tokens, lossless[1])
            row |= {"token_match_share": matched.share, "equal_prefix_tokens": matched.prefix_tokens}
        found.append({**row, "seconds": time.perf_counter() - started})
        tell(found[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=112)
    parser.add_argument("--scored", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--gen", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="", help="settings whose name holds this, after the lossless one")
    parser.add_argument(
        "--each-pass", action="store_true", help="turn weights back at each pass, as the engine does"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    from harness.builtin import prepare_builtin

    folder = prepare_builtin()
    spec = ModelSpec.from_hf_config(json.loads((folder / "config.json").read_text()), "builtin")
    text, told = draw_text(folder, args.windows, args.length, args.scored, args.prompts, args.gen)
    first, *rest = settings()
    chosen = [first, *(row for row in rest if args.only in row.name)]
    facts = {
        "model": "SmolLM2-135M-Instruct (built in)",
        "device": args.device,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "machine": platform.machine(),
        **told,
        "generated": {"prompts": args.prompts, "tokens_each": args.gen},
    }
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    run(
        chosen, spec, folder, text, device=args.device, dtype=args.dtype,
        rounded_once=not args.each_pass,
        tell=tell,
    )  # fmt: skip
    print(json.dumps({**facts, "rows": rows}))


if __name__ == "__main__":
    main()
