"""Compressed KV: how near it is, that no tier or cut changes it, and that it takes what is planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import MIXED, PLACEMENTS, Recorder
from tiny_models import TINY, TinyModel, prompts

from flexllmgen.compression import compressed_bytes
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import PolicyError
from flexllmgen.kv_compression import KVCodec, hadamard
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, ON_GPU, TIERS, Placement, Policy
from flexllmgen.spec import OPT_125M
from flexllmgen.units import PAGE, round_up
from flexllmgen.workload import Workload

SEQUENCES, PROMPT, TOKENS = 6, 40, 8
KV_PLACEMENTS: dict[str, Placement] = {"device": ON_GPU, "host": ON_CPU, "disk": ON_DISK, "mixed": MIXED}
GROUP = 32
"""So that a prompt has a block and something left of it."""
BOUNDS = {8: 0.01, 4: 0.12}
"""Median difference of a logit from the lossless one, in standard deviations of the logits."""


def run(
    model: TinyModel, policy: Policy, folder: Path, *, padded: bool = False, **load: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, T] and logits [B, T, V] of the second block, which finds what the first left."""
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    recorder = Recorder()
    with FlexEngine.load(
        model.spec, model.checkpoint, policy, workload=workload, device="cpu", offload_dir=folder, **load
    ) as engine:
        other, _ = prompts(SEQUENCES, PROMPT - 3, padded=not padded, seed=1)
        list(engine.generate(other))
        tokens = torch.stack(list(engine.generate(ids, mask, sampling=recorder)), dim=1)
    return tokens, recorder.logits()


@pytest.mark.parametrize(("group_size", "padded"), [(32, False), (32, True), (128, False)])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", TINY)
def test_logits_stay_near(
    tiny: Any, tmp_path: Path, name: str, bits: int, group_size: int, padded: bool
) -> None:
    model = tiny(name)
    policy = Policy(micro_batch_size=6, kv_bits=bits, kv_group_size=group_size)
    want_tokens, want = run(model, Policy(micro_batch_size=6), tmp_path, padded=padded)
    got_tokens, got = run(model, policy, tmp_path, padded=padded)
    assert torch.equal(got[:, 0], want[:, 0]), "a prompt attends to its own exact keys and values"
    # Steps compare as long as they were given the same tokens.
    same = (want_tokens == got_tokens).cumprod(dim=1).bool()[:, :-1]
    assert same[:, 0].all()
    error = (got - want)[:, 1:][same].abs().median() / want.std()
    assert 0 < error < BOUNDS[bits]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("name", "bits"), [("opt", 8), ("llama3", 4), ("mistral", 4)])
def test_neither_tier_nor_cut_matters(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bits: int, padded: bool
) -> None:
    """Mistral's window is 6 positions. Everything here and there, in turn and ahead, copied and in place."""
    model = tiny(name)
    made: dict[str, Any] = {"kv_bits": bits, "kv_group_size": GROUP}
    want, want_logits = run(model, Policy(micro_batch_size=6, **made), tmp_path, padded=padded)
    cuts = ((1, 2, False), (3, 1, False), (2, 0, False), (3, 2, True))
    for (tier, shares), (micro_batches, overlap, in_place) in zip(KV_PLACEMENTS.items(), cuts, strict=True):
        policy = Policy(
            micro_batch_size=6 // micro_batches,
            num_micro_batches=micro_batches,
            overlap=overlap,
            kv_cache=shares,
            **made,
        )
        got, logits = run(model, policy, tmp_path, padded=padded, in_place=in_place)
        assert torch.equal(got, want), tier
        # A number between two codes may fall to either, where a product is rounded differently for fewer rows.
        torch.testing.assert_close(logits, want_logits, atol=5e-3, rtol=0)
    everywhere = Policy(
        micro_batch_size=3, num_micro_batches=2, sep_layer=True, **made, **PLACEMENTS["mixed-all"]
    )
    assert torch.equal(run(model, everywhere, tmp_path, padded=padded, in_place=False)[0], want)
    # A scratch that holds one sequence at a time.
    monkeypatch.setattr("flexllmgen.workspace.KV_SCRATCH_BYTES", 1)
    alone = Policy(micro_batch_size=6, kv_cache=MIXED, **made)
    assert torch.equal(run(model, alone, tmp_path, padded=padded)[0], want)


@pytest.mark.parametrize("bits", [8, 4])
def test_scores_read_what_the_cache_keeps(tiny: Any, tmp_path: Path, bits: int) -> None:
    """Read at once, a text's scores are exact; step by step they are those of the compressed cache on every tier."""
    model = tiny("qwen3")
    ids, _ = prompts(4, PROMPT + TOKENS, padded=False)
    workload = Workload(num_sequences=4, prompt_tokens=PROMPT + TOKENS, gen_tokens=1)

    def scores(prompt: int | None, **policy: Any) -> torch.Tensor:
        with FlexEngine.load(
            model.spec,
            model.checkpoint,
            Policy(micro_batch_size=2, num_micro_batches=2, **policy),
            workload=workload,
            device="cpu",
            offload_dir=tmp_path,
        ) as engine:
            return engine.score(ids, prompt_tokens=prompt)

    exact = scores(None)
    made: dict[str, Any] = {"kv_bits": bits, "kv_group_size": GROUP}
    assert torch.equal(scores(None, **made), exact)
    stepped = scores(PROMPT, **made)
    torch.testing.assert_close(stepped[:, : PROMPT - 1], exact[:, : PROMPT - 1], atol=1e-4, rtol=0)
    error = (stepped - exact)[:, PROMPT:].abs().median()
    assert 1e-5 < error < 3 * BOUNDS[bits]
    for shares in KV_PLACEMENTS.values():
        torch.testing.assert_close(scores(PROMPT, kv_cache=shares, **made), stepped, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_planned_is_what_is_taken(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool, bits: int
) -> None:
    model, ids = tiny("llama"), prompts(SEQUENCES, PROMPT, padded=False)[0]
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    policy = Policy(
        micro_batch_size=3, num_micro_batches=2, kv_cache=MIXED, kv_bits=bits, kv_group_size=GROUP
    )
    dense = plan_placement(model.spec, replace(policy, kv_bits=None), workload, 4, in_place=in_place)
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device="cpu",
        offload_dir=tmp_path,
        in_place=in_place,
    ) as engine:
        plan, cache = engine.placement, engine._parts.kv
        sequences = {
            tier: sum(getattr(each, tier) for row in plan.kv_splits for each in row) for tier in TIERS
        }
        assert all(sequences.values())
        row = compressed_bytes((2, model.spec.kv_size), bits, GROUP)
        assert plan.kv_cache.gpu == sum(each.numel() for each in cache._resident)
        assert plan.kv_cache.gpu == sequences["gpu"] * row * plan.max_context
        assert plan.kv_cache.cpu == sequences["cpu"] * row * plan.max_context
        assert plan.kv_cache.disk == cache.disk_bytes
        codec = cache._codec
        assert codec is not None
        centres = sum(each.numel() for each in cache._centres)
        assert plan.kv_scratch_bytes == 4 * (codec._scratch.numel() + centres)
        assert plan.kv_cache.gpu + plan.kv_cache.cpu < (0.6 if bits == 8 else 0.4) * (
            dense.kv_cache.gpu + dense.kv_cache.cpu
        )
        before = engine.moved_bytes()
        list(engine.generate(ids))
        moved = {link: count - before[link] for link, count in engine.moved_bytes().items()}
    if not in_place:
        # Every step but the last stores its row, and reads all rows before it.
        host, rows = sequences["cpu"] * row, sum(range(PROMPT, PROMPT + TOKENS - 1))
        disk = sum(round_up(each.disk * row, PAGE) for units in plan.kv_splits for each in units if each.disk)
        assert moved["d2h"] == host * (PROMPT + TOKENS - 2)
        assert moved["h2d"] == host * rows
        assert moved["disk_write"] == disk * (PROMPT + TOKENS - 2)
        assert moved["disk_read"] == disk * rows


def test_opt_is_planned_to_the_formula() -> None:
    workload = Workload(num_sequences=48, prompt_tokens=512, gen_tokens=32)
    policy = Policy(micro_batch_size=24, num_micro_batches=2, kv_cache=ON_CPU, kv_bits=4)
    plan = plan_placement(OPT_125M, policy, workload, 2)
    # 4 bits and a scale and a zero of 16 for each 64 numbers.
    assert plan.kv_cache.cpu == OPT_125M.kv_bytes(544, 2) * 48 * 4.5 / 16
    assert plan.recording == "none"


@pytest.mark.parametrize("field", [{"kv_bits": 3}, {"kv_bits": 4, "kv_group_size": 48}])
def test_what_there_is_no_code_for_is_refused(field: dict[str, int]) -> None:
    with pytest.raises(PolicyError, match="must be"):
        Policy(micro_batch_size=1, **field)


def test_turning_leaves_scores_as_they_are() -> None:
    for size in (8, 64, 80):
        turn = hadamard(size)
        torch.testing.assert_close(turn @ turn.T, torch.eye(size), atol=1e-6, rtol=0)


def flexgen_rule(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Sheng et al. 2023, section 5: groups along the hidden dimension of a token, from their least to their greatest."""
    parts = x.unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low).clamp(min=1e-8) / (2**bits - 1)
    return (((parts - low) / step).round() * step + low).flatten(-2)


def channelled(batch: int, tokens: int, heads: int, size: int) -> torch.Tensor:
    """Keys as models have them: some channels far from zero in every token."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(batch, tokens, heads, size, generator=generator)
    return keys + 8 * torch.randn(heads, size, generator=generator) * (torch.arange(size) % 8 == 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_is_nearer_than_by_flexgens_rule(bits: int) -> None:
    """Weights of attention over a prompt with generated tokens, at the same bits and group size."""
    batch, prompt, steps, heads, size, group = 2, 96, 32, 3, 64, 64
    keys, values = (
        channelled(batch, prompt + steps, heads, size),
        channelled(batch, prompt + steps, heads, size),
    )
    codec = KVCodec(
        bits=bits,
        group_size=group,
        kv_heads=heads,
        head_dim=size,
        scratch=torch.empty(keys.numel() * 2),
        sequences=batch,
    )
    row = compressed_bytes((batch, 2, heads * size), bits, group)
    rows = torch.zeros(prompt + steps, row, dtype=torch.uint8)
    segment = codec.segment(rows, 0, torch.zeros(batch, heads, size))
    codec.begin(0, prompt)
    codec.write_prompt(segment, keys[:, :prompt], values[:, :prompt], 0, None)
    for at in range(prompt, prompt + steps):
        codec.write_step(segment, keys[:, at : at + 1], values[:, at : at + 1], at)
    kept = codec.read(segment, 0, prompt + steps)
    query = torch.randn(batch, heads, size, generator=torch.Generator().manual_seed(1))

    def weights(q_BKH: torch.Tensor, k_BTKH: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bkh,btkh->bkt", q_BKH, k_BTKH).div(size**0.5).softmax(-1)

    exact = weights(query, keys)
    mine = weights(codec.turned(query), kept[:, 0].transpose(0, 1))
    theirs = weights(query, flexgen_rule(keys.flatten(2), bits, group).view_as(keys))
    assert 0 < (mine - exact).abs().sum() < 0.6 * (theirs - exact).abs().sum()
    # Values are kept by that very rule.
    by_rule = flexgen_rule(values.flatten(2), bits, group).view_as(values)
    error, their_error = ((each - values).abs().mean() for each in (kept[:, 1].transpose(0, 1), by_rule))
    assert error < 1.01 * their_error
    # Any part of it reads the same.
    some = codec.read(segment.part(1, 2), 40, 100).clone()
    assert torch.equal(some, codec.read(segment, 0, prompt + steps)[40:100, :, 1:])
