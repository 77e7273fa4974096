"""A decode step that uses a share of the values: the largest weights', on every tier alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_kv_compression import KV_PLACEMENTS, run

from flexllmgen.attention import decode_attention
from flexllmgen.errors import PolicyError
from flexllmgen.kv_cache import Segment
from flexllmgen.policy import ON_CPU, Policy


@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_only_the_largest_weights_values_count(window: int, padded: bool) -> None:
    sequences, heads, kv_heads, size, length, share = 3, 4, 2, 8, 20, 0.25
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(24, 2, sequences, kv_heads, size, generator=generator)
    q = torch.randn(sequences, heads, size, generator=generator)
    bias = None
    if padded:
        bias = torch.zeros(sequences, 1, 1, 24)
        bias[1, ..., :14] = float("-inf")
    got = decode_attention(q, Segment(0, sequences, kv), length, bias, window, share)
    first = max(0, length - window) if window else 0
    for row in range(sequences):
        for kv_head in range(kv_heads):
            group = range(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
            scores = (
                torch.stack([kv[first:length, 0, row, kv_head] @ q[row, head] for head in group]) / size**0.5
            )
            if bias is not None:
                scores = scores + bias[row, 0, :, first:length]
            weights = scores.softmax(-1)
            top = weights.sum(0).argsort(descending=True)[: round(share * (length - first))]
            want = weights[:, top] @ kv[first:length, 1, row, kv_head][top]
            torch.testing.assert_close(got[row, list(group)], want)
    dense = decode_attention(q, Segment(0, sequences, kv), length, bias, window)
    nearly_all = decode_attention(q, Segment(0, sequences, kv), length, bias, window, 0.999)
    torch.testing.assert_close(nearly_all, dense)
    assert not torch.allclose(got, dense, atol=1e-2)


@pytest.mark.parametrize("bits", [None, 8])
def test_no_tier_matters(tiny: Any, tmp_path: Path, bits: int | None) -> None:
    model = tiny("llama3")
    _, logits = run(model, Policy(micro_batch_size=6), tmp_path, padded=True)
    made: dict[str, Any] = {"attn_sparsity": 0.3, "kv_bits": bits, "kv_group_size": 32}
    sparse, sparse_logits = run(model, Policy(micro_batch_size=6, **made), tmp_path, padded=True)
    assert torch.equal(sparse_logits[:, 0], logits[:, 0]), "a prompt attends to everything"
    assert (sparse_logits[:, 1] - logits[:, 1]).abs().max() > 1e-3
    for shares in KV_PLACEMENTS.values():
        policy = Policy(micro_batch_size=3, num_micro_batches=2, kv_cache=shares, **made)
        assert torch.equal(run(model, policy, tmp_path, padded=True, in_place=False)[0], sparse)


def test_what_makes_no_sense_is_refused() -> None:
    assert not Policy(micro_batch_size=1, attn_sparsity=0.5).lossless
    for share in (0.0, 1.5):
        with pytest.raises(PolicyError, match="attn_sparsity must be above 0"):
            Policy(micro_batch_size=1, attn_sparsity=share)
    with pytest.raises(PolicyError, match="reads all values"):
        Policy(micro_batch_size=1, attn_sparsity=0.5, cpu_attention=True, kv_cache=ON_CPU)
