"""On a CUDA device: the same tokens as transformers', through real streams and page-locked memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import MIXED, Recorder
from tiny_models import TINY, TinyModel, make_tiny, prompts

from flexllmgen.engine import FlexEngine
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SEQUENCES, PROMPT, TOKENS = 12, 33, 8
PLACEMENTS: dict[str, dict[str, Placement]] = {
    "device": {},
    "host": {"weights": ON_CPU, "kv_cache": ON_CPU, "activations": ON_CPU},
    "disk": {"weights": ON_DISK, "kv_cache": ON_DISK, "activations": ON_DISK},
    "mixed": {"weights": MIXED, "kv_cache": MIXED, "activations": MIXED},
}
# Half precision: rounding of a product of 128 terms, relative to the largest logit.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 4}
            model = make_tiny(name, tmp_path_factory.mktemp(name), **sizes)
            made[name] = model
        return made[name]

    return get


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("name", TINY)
def test_parity(
    larger: Any, tmp_path: Path, name: str, dtype: torch.dtype, placement: str, padded: bool
) -> None:
    model = larger(name)
    model.model.to("cuda", dtype)
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    want, want_logits = model.greedy(ids.cuda(), None if mask is None else mask.cuda(), TOKENS)
    want, want_logits = want.cpu(), want_logits.float().cpu()
    policy = Policy(micro_batch_size=4, num_micro_batches=3, overlap=2, **PLACEMENTS[placement])
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    recorder = Recorder()
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device="cuda",
        dtype=dtype,
        offload_dir=tmp_path,
    ) as engine:
        got = torch.stack(list(engine.generate(ids, mask, sampling=recorder)), dim=1)
    logits = recorder.logits().float().cpu()
    scale = want_logits.abs().max()
    for row in range(SEQUENCES):
        for token in range(TOKENS):
            error = (logits[row, token] - want_logits[row, token]).abs().max() / scale
            assert error < TOLERANCE[dtype], (row, token, float(error))
            if got[row, token] != want[row, token]:
                # After a tie within the tolerance the two texts go their own ways.
                top = want_logits[row, token].topk(2).values
                assert dtype != torch.float32, (row, token)
                assert (top[0] - top[1]) / scale < TOLERANCE[dtype], (row, token)
                break
