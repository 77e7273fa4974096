"""Experts by choice on a CUDA device: exactly what whole layers give, through real streams, and fewer bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_parity import MIXED
from tiny_models import TinyModel, make_tiny, prompts

from flexllmgen.engine import FlexEngine
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEQUENCES, PROMPT, TOKENS = 4, 33, 12
WEIGHTS = {"device": Placement(gpu=1.0), "host": ON_CPU, "disk": ON_DISK, "mixed": MIXED}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 4, "num_experts": 32}
    return make_tiny("qwen3-moe", tmp_path_factory.mktemp("wide"), **sizes, moe_intermediate_size=256)


def _run(model: TinyModel, policy: Policy, folder: Path, dtype: str) -> tuple[torch.Tensor, int]:
    """Tokens, and the bytes that the decode steps moved up."""
    ids, mask = prompts(SEQUENCES, PROMPT, padded=True)
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device="cuda",
        dtype=dtype,
        offload_dir=folder,
    ) as engine:
        columns, moved = [], []
        for column in engine.generate(ids, mask):
            columns.append(column)
            moved.append(engine.stats().h2d_bytes)
    return torch.stack(columns, dim=1), moved[-1] - moved[0]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("micro_batch", [4, 1])
@pytest.mark.parametrize("placement", WEIGHTS)
def test_the_same_tokens_as_whole_layers(
    wide: TinyModel, tmp_path: Path, placement: str, micro_batch: int, overlap: int, bits: int | None
) -> None:
    tokens, moved = [], []
    for chosen in (False, True):
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=SEQUENCES // micro_batch,
            weights=WEIGHTS[placement],
            overlap=overlap,
            weight_bits=bits,
            chosen_experts=chosen,
        )
        columns, bytes_up = _run(wide, policy, tmp_path, "float32")
        tokens.append(columns)
        moved.append(bytes_up)
    assert torch.equal(*tokens)
    if placement != "device":
        assert moved[1] < moved[0]


def test_beside_attention_on_the_cpu(wide: TinyModel, tmp_path: Path) -> None:
    tokens = []
    for chosen in (False, True):
        policy = Policy(
            micro_batch_size=2,
            num_micro_batches=2,
            weights=MIXED,
            kv_cache=Placement(gpu=0.3, cpu=0.7),
            cpu_attention=True,
            chosen_experts=chosen,
        )
        tokens.append(_run(wide, policy, tmp_path, "float32")[0])
    assert torch.equal(*tokens)
