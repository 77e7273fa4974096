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
FP32_TOLERANCE = 2e-4


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
    model.model.to("cuda", torch.float32)
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
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
    mine = recorder.logits().float().cpu()
    exact = logits_of(model, ids, mask, got)
    scale = exact.abs().max()
    error = (mine - exact).abs().max() / scale
    if dtype == torch.float32:
        assert error < FP32_TOLERANCE
        assert torch.equal(got, exact.argmax(-1))
        return
    # Half precision: no further from the fp32 model than transformers is at the same precision, within noise.
    model.model.to(dtype)
    theirs = logits_of(model, ids, mask, got)
    assert error < 3 * (theirs - exact).abs().max() / scale + 1e-3
    # Where the choice differs from the exact one, the two were as close as that error.
    chosen = exact.gather(-1, got[..., None])[..., 0]
    assert ((exact.max(-1).values - chosen) / scale < 2 * error).all()


def logits_of(
    model: TinyModel, ids: torch.Tensor, mask: torch.Tensor | None, new: torch.Tensor
) -> torch.Tensor:
    """transformers' logits [B, new tokens, V] for the texts that the engine wrote."""
    whole = torch.cat((ids, new[:, :-1]), dim=1).cuda()
    seen = torch.ones_like(whole)
    if mask is not None:
        seen[:, : mask.shape[1]] = mask.cuda()
    places = (seen.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = model.model(whole, attention_mask=seen, position_ids=places).logits
    return logits[:, ids.shape[1] - 1 :].float().cpu()


@pytest.mark.parametrize("name", ["opt-350m", "llama3"])
def test_a_recorded_step_serves_the_next_blocks_too(larger: Any, name: str) -> None:
    model = larger(name)
    model.model.to("cuda", torch.float32)
    workload = Workload(num_sequences=4, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        Policy(micro_batch_size=4),
        workload=workload,
        device="cuda",
        dtype="float32",
    ) as engine:
        for seed, length, padded in ((0, PROMPT, False), (1, 20, True), (2, PROMPT, True)):
            ids, mask = prompts(4, length, padded=padded, seed=seed)
            want, _ = model.greedy(ids.cuda(), None if mask is None else mask.cuda(), TOKENS)
            got = torch.stack(list(engine.generate(ids, mask)), dim=1)
            assert torch.equal(got, want.cpu())
