"""On a CUDA device: keys and values made anew from the layer's inputs, through real streams and page-locked memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu import DEVICE, FP32_TOLERANCE, PROMPT, SEQUENCES, generated, logits_of
from test_parity import MIXED
from tiny_models import TinyModel, make_tiny, prompts

from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.engine import FlexEngine
from flexllmgen.models.published import published_config
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 4}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "host": {"weights": ON_CPU, "kv_cache": ON_CPU, "recompute": 1.0},
    "half": {"kv_cache": Placement(gpu=0.3, cpu=0.7), "recompute": 0.5},
    "mixed": {"weights": MIXED, "kv_cache": MIXED, "activations": MIXED, "recompute": 0.6},
    "asking": {"weights": MIXED, "kv_cache": MIXED, "cpu_attention": True, "recompute": 0.6},
}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            # As many key heads as query heads, as wide as the layer's input: K and V are then twice its bytes.
            own = {} if name.startswith("opt") else {"num_key_value_heads": 8, "head_dim": 16}
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name), **SIZES, **own)
        return made[name]

    return get


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", ["opt", "opt-350m", "llama3", "mistral", "qwen3"])
def test_parity(
    larger: Any, tmp_path: Path, name: str, dtype: torch.dtype, placement: str, padded: bool
) -> None:
    model = larger(name)
    model.model.to(DEVICE, torch.float32)
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    policy = Policy(micro_batch_size=4, num_micro_batches=3, overlap=2, **PLACEMENTS[placement])
    got, mine = generated(model, policy, ids, mask, dtype, tmp_path)
    exact = logits_of(model, ids, mask, got)
    error = (mine - exact).abs().max() / exact.abs().max()
    if dtype == torch.float32:
        assert error < FP32_TOLERANCE
        assert torch.equal(got, exact.argmax(-1))
    else:
        assert error < 3e-2


@pytest.mark.parametrize("cpu_attention", [False, True])
@pytest.mark.parametrize("name", ["opt-1.3b", "Llama-2-7b"])
def test_the_device_takes_no_more_than_planned(name: str, cpu_attention: bool) -> None:
    config = dict(published_config("opt-1.3b" if name.startswith("opt") else "Meta-Llama-3-8B"))
    config["num_hidden_layers"] = 4
    if not name.startswith("opt"):
        config["num_key_value_heads"] = config["num_attention_heads"]
    spec = ModelSpec.from_hf_config(config, name)
    policy = Policy(
        micro_batch_size=24,
        num_micro_batches=2,
        weights=ON_CPU,
        kv_cache=ON_CPU,
        cpu_attention=cpu_attention,
        recompute=0.7,
    )
    workload = Workload(num_sequences=48, prompt_tokens=500, gen_tokens=6)
    ids, mask = torch.randint(1000, (48, 500)), torch.ones(48, 500, dtype=torch.long)
    mask[::5, :100] = 0
    with FlexEngine.load(
        spec, RandomCheckpoint(seed=0), policy, workload=workload, device=DEVICE, dtype="float16"
    ) as engine:
        for _ in engine.generate(ids, mask):
            pass
        assert engine.stats().device_allocated_peak_bytes <= engine.placement.gpu_bytes
