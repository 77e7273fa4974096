"""Experts computed together give what they give one after another, wherever their weights lie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flexllmgen.models.experts import cut_tiles, expert_addresses, grouped_experts, tile_rows_for

EXPERTS, MODEL, INNER = 24, 80, 48


def weights_in(*memories: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of EXPERTS experts, divided evenly over the memories in order."""
    weights, share = {}, EXPERTS // len(memories)
    for index, memory in enumerate(memories):
        offset = 0
        for expert in range(index * share, (index + 1) * share):
            for kind, shape in (("gate_up", (2 * INNER, MODEL)), ("down", (MODEL, INNER))):
                size = shape[0] * shape[1]
                weights[f"experts.{expert}.{kind}"] = memory[offset : offset + size].view(shape)
                offset += size
    return weights


def gate(inner: torch.Tensor) -> torch.Tensor:
    left, right = inner.chunk(2, dim=-1)
    return F.silu(left) * right


def one_by_one(
    w: dict[str, torch.Tensor], x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        rows, choices = (experts == expert).nonzero(as_tuple=True)
        inner = gate(x[rows] @ w[f"experts.{expert}.gate_up"].T)
        out.index_add_(0, rows, weights[rows, choices, None] * (inner @ w[f"experts.{expert}.down"].T))
    return out


@pytest.mark.parametrize("tile_rows", [1, 16, 64])
@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("same", [False, True], ids=["spread", "all the same"])
def test_tiles_hold_every_assignment_once(rows: int, tile_rows: int, same: bool) -> None:
    torch.manual_seed(rows)
    experts = torch.rand(rows, EXPERTS).topk(3, dim=-1).indices
    if same:
        experts = experts[:1].expand(rows, -1)
    tiles = cut_tiles(experts, EXPERTS, tile_rows)
    seen = torch.full((3 * rows,), -1)
    for expert, first, stop in zip(
        tiles.expert_T.tolist(), tiles.first_T.tolist(), tiles.stop_T.tolist(), strict=True
    ):
        if expert < EXPERTS:
            stop = min(stop, first + tile_rows)
            assert first < stop
            assert (seen[first:stop] == -1).all()
            seen[first:stop] = expert
    # In the order of rows and their choices, each is with the expert that was chosen, and is of its row.
    assert torch.equal(seen[tiles.places_A].view(rows, 3), experts)
    assert torch.equal(tiles.rows_A[tiles.places_A].view(rows, 3), torch.arange(rows)[:, None].expand(-1, 3))


def test_tiles_suit_the_rows_of_an_expert() -> None:
    assert [tile_rows_for(count * 128, 128) for count in (1, 16, 17, 60, 512)] == [16, 16, 32, 64, 128]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 200, 5000, 20000])
def test_together_is_as_one_by_one(parts: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    memories = (torch.randn(3 * EXPERTS * MODEL * INNER // parts).cuda().to(dtype) for _ in range(parts))
    w = weights_in(*memories)
    w |= expert_addresses(w, EXPERTS, torch.device("cuda"))
    x = torch.randn(rows, MODEL).cuda().to(dtype)
    shares, experts = torch.rand(rows, EXPERTS).cuda().topk(3, dim=-1)
    got = grouped_experts(w, x, shares.to(dtype), experts, gate, EXPERTS)
    exact = one_by_one({name: each.double() for name, each in w.items()}, x.double(), shares, experts)
    bound = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert (got - exact).abs().max() < bound * exact.abs().max()
