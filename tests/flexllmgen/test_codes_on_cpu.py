"""KV in 8 bits that the CPU attends to where it lies: the same as on the device, as near to lossless, and as planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kv_compression import run
from test_parity import MIXED
from tiny_models import TinyModel, make_tiny, prompts

from flexllmgen import host_attention
from flexllmgen.cpu_attention import prepare_attention
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import PolicyError
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_GPU, Placement, Policy
from flexllmgen.spec import OPT_125M
from flexllmgen.workload import Workload
from flexllmgen.workspace import row_bytes

SIZES: dict[str, dict[str, Any]] = {
    "opt": {"hidden_size": 128, "num_attention_heads": 2, "word_embed_proj_dim": 128},
    "llama": {"head_dim": 64},
    "mistral": {"head_dim": 128},
}
KV = {
    "host": ON_CPU,
    "some": Placement(gpu=0.4, cpu=0.6),
    "mixed": MIXED,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    """Heads that whole groups divide."""
    return {name: make_tiny(name, tmp_path_factory.mktemp(name), **sizes) for name, sizes in SIZES.items()}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", SIZES)
def test_the_cpu_reads_what_the_device_would(
    wide: dict[str, TinyModel], tmp_path: Path, name: str, kv: str, padded: bool
) -> None:
    model, group = wide[name], SIZES[name].get("head_dim", 64)
    made: dict[str, Any] = {
        "micro_batch_size": 3,
        "num_micro_batches": 2,
        "kv_bits": 8,
        "kv_group_size": group,
    }
    exact_tokens, exact = run(model, Policy(micro_batch_size=6), tmp_path, padded=padded)
    tokens, logits = run(
        model, Policy(**made, kv_cache=KV[kv], cpu_attention=True), tmp_path, padded=padded, in_place=False
    )
    same = (exact_tokens == tokens).cumprod(dim=1).bool()[:, :-1]
    assert same[:, 0].all()
    error = (logits - exact)[:, 1:][same].abs().median() / exact.std()
    assert 0 < error < 0.01


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_sequence_lies_together(
    wide: dict[str, TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_bits: int | None
) -> None:
    """A thread reads one sequence at a time: its positions follow one another, and sequences come after."""
    seen: list[torch.Tensor] = []

    def preparing(q_BNH: torch.Tensor, kv_S2BKH: torch.Tensor, *args: Any, **more: Any) -> Any:
        seen.append(kv_S2BKH)
        return prepare_attention(q_BNH, kv_S2BKH, *args, **more)

    monkeypatch.setattr(host_attention, "prepare_attention", preparing)
    policy = Policy(micro_batch_size=6, kv_cache=ON_CPU, kv_bits=kv_bits, cpu_attention=True)
    run(wide["llama"], policy, tmp_path, in_place=False)
    assert seen
    position = row_bytes(wide["llama"].spec, policy, 1, 4, tier="cpu")
    for kv_S2BKH in seen:
        assert kv_S2BKH.stride(0) * kv_S2BKH.itemsize == position
        assert kv_S2BKH.stride(2) == kv_S2BKH.shape[0] * kv_S2BKH.stride(0)


def test_a_row_is_written_as_the_device_writes_it(wide: dict[str, TinyModel], tmp_path: Path) -> None:
    """Where all keys are by token on both sides, only the order of sums differs."""
    model = wide["llama"]
    made: dict[str, Any] = {"micro_batch_size": 6, "kv_bits": 8, "kv_cache": Placement(gpu=0.5, cpu=0.5)}
    workload = Workload(num_sequences=6, prompt_tokens=30, gen_tokens=8)
    ids, _ = prompts(6, 30, padded=False)
    # A prompt shorter than a group has no blocks.
    scores = []
    for on_host in (False, True):
        with FlexEngine.load(
            model.spec,
            model.checkpoint,
            Policy(**made, cpu_attention=on_host),
            workload=workload,
            device="cpu",
            in_place=False,
            offload_dir=tmp_path,
        ) as engine:
            scores.append(engine.score(ids, prompt_tokens=12))
    torch.testing.assert_close(*scores, atol=5e-3, rtol=0)
    assert not torch.equal(*scores)


def test_what_goes_down_and_up_is_counted_and_planned(wide: dict[str, TinyModel], tmp_path: Path) -> None:
    model = wide["llama"]
    workload = Workload(num_sequences=4, prompt_tokens=20, gen_tokens=5)
    policy = Policy(micro_batch_size=4, kv_cache=ON_CPU, kv_bits=8, cpu_attention=True)
    ids, _ = prompts(4, 20, padded=False)
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device="cpu",
        in_place=False,
        offload_dir=tmp_path,
    ) as engine:
        list(engine.generate(ids))
        stats = engine.stats()
    plan = plan_placement(model.spec, policy, workload, 4, in_place=False)
    spec = model.spec
    codes = 2 * (spec.kv_size + 4 * spec.kv_size // 64)
    assert plan.exchange_row_bytes == 2 * spec.query_size * 4 + codes
    down = 4 * 4 * spec.num_layers * (spec.query_size * 4 + codes) + 20 * 4 * spec.num_layers * codes
    assert stats.d2h_bytes == down
    assert stats.h2d_bytes == 4 * 4 * spec.num_layers * spec.query_size * 4


def test_what_it_cannot_read_is_refused() -> None:
    with pytest.raises(PolicyError, match="in 8 bits and groups of 64 or 128"):
        Policy(micro_batch_size=1, kv_cache=ON_CPU, cpu_attention=True, kv_bits=4)
    with pytest.raises(PolicyError, match="in 8 bits and groups of 64 or 128"):
        Policy(micro_batch_size=1, kv_cache=ON_CPU, cpu_attention=True, kv_bits=8, kv_group_size=32)
    policy = Policy(micro_batch_size=1, kv_cache=ON_CPU, cpu_attention=True, kv_bits=8, kv_group_size=128)
    workload = Workload(num_sequences=1, prompt_tokens=8, gen_tokens=2)
    with pytest.raises(
        PolicyError, match="groups of 128 divide a head, of 64 numbers; take kv_group_size 64"
    ):
        plan_placement(OPT_125M, policy, workload, 2, in_place=False)
    odd = replace(OPT_125M, head_dim=80)
    with pytest.raises(PolicyError, match="of 80 numbers; so turn cpu_attention or kv_bits off"):
        plan_placement(odd, replace(policy, kv_group_size=64), workload, 2, in_place=False)
    # Where nothing is attended to on the CPU, nothing is refused.
    plan_placement(OPT_125M, replace(policy, kv_cache=ON_GPU), workload, 2, in_place=False)
    plan_placement(OPT_125M, policy, workload, 2, in_place=True)
