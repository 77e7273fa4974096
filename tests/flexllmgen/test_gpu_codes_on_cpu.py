"""On a CUDA device: models of 16 bits whose KV in 8 bits the CPU attends to are as near as compressing it allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_codes_on_cpu import KV, SIZES
from test_gpu import DEVICE, PROMPT, SEQUENCES, generated, logits_of
from test_kv_compression import BOUNDS
from tiny_models import TinyModel, make_tiny, prompts

from flexllmgen.policy import Policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    """Heads that whole groups divide."""
    return {name: make_tiny(name, tmp_path_factory.mktemp(name), **sizes) for name, sizes in SIZES.items()}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", SIZES)
def test_the_cpu_attends_to_codes_of_a_model_in_16_bits(
    wide: dict[str, TinyModel], tmp_path: Path, name: str, dtype: torch.dtype, kv: str, padded: bool
) -> None:
    """Against the model in fp32, which reads the engine's own tokens: what is lost beyond the type's own rounding."""
    model = wide[name]
    model.model.to(DEVICE)
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    lossless = Policy(micro_batch_size=4, num_micro_batches=3, overlap=2)
    codes = Policy(
        micro_batch_size=4,
        num_micro_batches=3,
        overlap=2,
        kv_cache=KV[kv],
        kv_bits=8,
        kv_group_size=SIZES[name].get("head_dim", 64),
        cpu_attention=True,
    )
    tokens, errors = [], []
    for policy in (lossless, codes):
        got, logits = generated(model, policy, ids, mask, dtype, tmp_path)
        exact = logits_of(model, ids, mask, got)
        tokens.append(got)
        errors.append(((logits - exact)[:, 1:].abs().median() / exact.std()).item())
    assert errors[1] < errors[0] + BOUNDS[8]
    same = (tokens[0] == tokens[1]).cumprod(dim=1).float()
    # A prompt attends to its own exact keys and values; later tokens may tie.
    assert same[:, 0].mean() > 0.9
    assert same.mean() > 0.6
    # Codes it was, and not numbers as they are.
    assert errors[1] != errors[0]
