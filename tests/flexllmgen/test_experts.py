"""Experts computed together give what they give one after another, wherever their weights lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_tiny, prompts

from flexllmgen.engine import FlexEngine
from flexllmgen.models.experts import grouped_experts, stack_experts
from flexllmgen.policy import ON_CPU, ON_GPU, Placement, Policy
from flexllmgen.workload import Workload

EXPERTS, MODEL, INNER = 24, 16, 8


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
    for row in range(len(x)):
        for share, expert in zip(weights[row], experts[row].tolist(), strict=True):
            inner = gate(w[f"experts.{expert}.gate_up"] @ x[row])
            out[row] += share * (w[f"experts.{expert}.down"] @ inner)
    return out


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_together_is_as_one_by_one(parts: int, rows: int) -> None:
    torch.manual_seed(rows)
    w = weights_in(*(torch.randn(3 * EXPERTS * MODEL * INNER // parts).double() for _ in range(parts)))
    stacks = stack_experts(w, EXPERTS)
    assert sum(name.startswith("experts.down") for name in stacks) == parts
    x = torch.randn(rows, MODEL).double()
    shares, experts = torch.rand(rows, EXPERTS).double().topk(3, dim=-1)
    got = grouped_experts({**w, **stacks}, x, shares, experts, gate, EXPERTS)
    assert got is not None
    torch.testing.assert_close(got, one_by_one(w, x, shares, experts))


def test_rows_that_all_want_one_expert_are_not_padded() -> None:
    w = weights_in(torch.randn(3 * EXPERTS * MODEL * INNER))
    x, experts = torch.randn(400, MODEL), torch.zeros(400, 1, dtype=torch.long)
    assert grouped_experts(w, x, torch.ones(400, 1), experts, gate, EXPERTS) is None


@pytest.mark.parametrize("weights", [ON_GPU, ON_CPU, Placement(gpu=0.4, cpu=0.6)], ids=["gpu", "cpu", "cut"])
def test_a_model_of_many_experts_gives_transformers_tokens(tmp_path: Path, weights: Placement) -> None:
    """On the CPU in an accelerator's stead: some experts resident, others in a slot."""
    sizes: dict[str, Any] = {"num_experts": 24, "num_experts_per_tok": 3}
    model = make_tiny("qwen3-moe", tmp_path / "model", **sizes)
    ids, mask = prompts(6, 9, padded=True)
    want, _ = model.greedy(ids, mask, 6)
    policy = Policy(micro_batch_size=3, num_micro_batches=2, weights=weights)
    workload = Workload(num_sequences=6, prompt_tokens=9, gen_tokens=6)
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device="cpu",
        in_place=False,
        offload_dir=tmp_path,
    ) as engine:
        assert engine.spec.many_experts
        engine._decoder._groups_experts = True
        got = torch.stack(list(engine.generate(ids, mask)), dim=1)
    assert torch.equal(got, want)
