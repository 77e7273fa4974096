"""On a CUDA device: rows that the CPU attends to may lie apart, and prompts are stored there as they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_codes_on_cpu import KV
from test_gpu import DEVICE, FP32_TOLERANCE, PROMPT, SEQUENCES, generated, larger, logits_of
from test_rows_apart import always
from tiny_models import prompts

from flexllmgen.policy import Policy

__all__ = ["always", "larger"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", ["opt", "llama3"])
@pytest.mark.usefixtures("always")
def test_tokens_are_those_of_transformers(larger: Any, tmp_path: Path, name: str, kv: str) -> None:
    model = larger(name)
    model.model.to(DEVICE, torch.float32)
    ids, mask = prompts(SEQUENCES, PROMPT, padded=True)
    policy = Policy(micro_batch_size=4, num_micro_batches=3, overlap=2, kv_cache=KV[kv], cpu_attention=True)
    got, mine = generated(model, policy, ids, mask, torch.float32, tmp_path)
    exact = logits_of(model, ids, mask, got)
    assert (mine - exact).abs().max() / exact.abs().max() < FP32_TOLERANCE
    assert torch.equal(got, exact.argmax(-1))
