"""Compressed weights on a CUDA device: as on the CPU exactly what turned-back weights give, recorded or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import MIXED, Recorder
from tiny_models import TINY, make_tiny, prompts

from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.compression import dequantise, quantise, split_compressed
from flexllmgen.engine import FlexEngine
from flexllmgen.filling import fill_by_windows
from flexllmgen.images import pack
from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WORKLOAD = Workload(num_sequences=12, prompt_tokens=33, gen_tokens=8)
PLACEMENTS: dict[str, dict[str, Placement]] = {
    # The whole step is recorded; each layer is; nothing is.
    "device": {},
    "host": {"weights": ON_CPU},
    "disk": {"weights": ON_DISK},
    "mixed": {"weights": MIXED, "kv_cache": MIXED, "activations": MIXED},
}


class _TurnedBack:
    def __init__(self, inner: Any, bits: int) -> None:
        self.inner, self.bits, self.fingerprint = inner, bits, f"{inner.fingerprint} turned back"

    def validate(self, spec: ModelSpec) -> None:
        self.inner.validate(spec)

    def fill(self, spec: ModelSpec, layer: int, name: str, target: torch.Tensor) -> None:
        self.inner.fill(spec, layer, name, target)
        if layer >= 0 and target.dim() == 2 and name != "router.weight":
            there = target.cuda()
            dequantise(*quantise(there, self.bits, 64), self.bits, 64, there)
            target.copy_(there)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", TINY)
def test_the_same_as_weights_that_were_turned_back(
    tmp_path: Path, name: str, placement: str, bits: int, dtype: str
) -> None:
    model = make_tiny(name, tmp_path / "model", hidden_size=128, num_attention_heads=8, num_hidden_layers=4)
    ids, mask = prompts(12, 33, padded=True)
    policy = Policy(micro_batch_size=4, num_micro_batches=3, weight_bits=bits, **PLACEMENTS[placement])
    seen = []
    for checkpoint, mine in (
        (model.checkpoint, policy),
        (_TurnedBack(model.checkpoint, bits), replace(policy, weight_bits=None)),
    ):
        recorder = Recorder()
        with FlexEngine.load(
            model.spec,
            checkpoint,
            mine,
            workload=WORKLOAD,
            device="cuda",
            dtype=dtype,
            offload_dir=tmp_path / "offload",
        ) as engine:
            for _ in range(2):  # The second time what was recorded is replayed from the start.
                recorder.seen.clear()
                tokens = torch.stack(list(engine.generate(ids, mask, sampling=recorder)), dim=1)
        seen.append((tokens, recorder.logits().cpu()))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("bits", [8, 4])
def test_random_weights_are_those_of_a_lossless_engine_quantised(bits: int) -> None:
    config = {**published_config("opt-125m"), "num_hidden_layers": 1, "vocab_size": 700, "ffn_dim": 30_000}
    spec, random = ModelSpec.from_hf_config(config, "opt"), RandomCheckpoint(seed=3)
    device, dtype = torch.device("cuda"), torch.float16
    image = pack(spec, Policy(micro_batch_size=1, weight_bits=bits), dtype.itemsize)[0][2]
    whole = torch.zeros(image.num_bytes, dtype=torch.uint8)
    fill_by_windows(random, image, [(0, image.num_bytes, whole)], device=device, dtype=dtype)
    for name, tensor in image.tensors.items():
        dense = torch.empty(tensor.shape, dtype=dtype, device=device)
        random.fill(spec, 0, name, dense)
        raw = whole[tensor.offset : tensor.end]
        if not tensor.bits:
            assert torch.equal(raw.view(dtype).view(tensor.shape), dense.cpu())
            continue
        for mine, want in zip(
            split_compressed(raw, tensor.shape, bits, 64), quantise(dense, bits, 64), strict=True
        ):
            assert torch.equal(mine, want.cpu())


@pytest.mark.parametrize("weights", [ON_CPU, Placement(gpu=0.4, cpu=0.6)], ids=["host", "mixed"])
def test_device_memory_is_as_planned(weights: Placement) -> None:
    config = {**published_config("opt-1.3b"), "num_hidden_layers": 8}
    spec = ModelSpec.from_hf_config(config, "opt")
    policy = Policy(micro_batch_size=4, num_micro_batches=2, weights=weights, weight_bits=4)
    workload = Workload(num_sequences=8, prompt_tokens=64, gen_tokens=4)
    plan = plan_placement(spec, policy, workload, 2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with FlexEngine.load(
        spec, RandomCheckpoint(), policy, workload=workload, device="cuda", dtype="float16"
    ) as engine:
        held = torch.cuda.memory_allocated() - before
        list(engine.generate(torch.ones(8, 64, dtype=torch.long)))
        peak = engine.stats().device_allocated_peak_bytes - before
    assert plan.dequantised_bytes > 0
    kept = plan.gpu_bytes - plan.workspace_bytes
    assert abs(held - kept) < 4 << 20
    assert peak <= plan.gpu_bytes
