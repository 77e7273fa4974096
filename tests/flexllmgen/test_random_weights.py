"""Random weights are the same numbers however they are made and wherever they go."""

from __future__ import annotations

import itertools

import pytest
import torch

from flexllmgen import checkpoint as checkpoints
from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.filling import fill_by_windows
from flexllmgen.images import pack
from flexllmgen.models.published import published_config
from flexllmgen.policy import Policy
from flexllmgen.spec import ModelSpec

SPEC = ModelSpec.from_hf_config(
    {**published_config("opt-125m"), "num_hidden_layers": 1, "vocab_size": 700}, "opt"
)


@pytest.mark.parametrize("window_bytes", [0, 100_000, 1 << 30])
@pytest.mark.parametrize("cuts", [(0.0, 1.0), (0.3, 0.7), (0.11, 0.5)])
def test_windows_give_the_numbers_of_whole_tensors(
    monkeypatch: pytest.MonkeyPatch, window_bytes: int, cuts: tuple[float, float]
) -> None:
    monkeypatch.setattr(checkpoints, "PIECE_NUMBERS", 10_000)
    monkeypatch.setattr("flexllmgen.filling.PIECE_NUMBERS", 10_000)
    random, dtype = RandomCheckpoint(seed=3), torch.float32
    images, _ = pack(SPEC, Policy(micro_batch_size=1), dtype.itemsize)
    for image in images:
        whole = torch.zeros(image.num_bytes, dtype=torch.uint8)
        for name, tensor in image.tensors.items():
            raw = whole[tensor.offset : tensor.end].view(dtype).view(tensor.shape)
            random.fill(SPEC, image.layer, name, raw)
        edges = [0, *(int(image.num_bytes * cut) // 256 * 256 for cut in cuts), image.num_bytes]
        parts = [
            (start, stop, torch.zeros(stop - start, dtype=torch.uint8))
            for start, stop in itertools.pairwise(edges)
        ]
        fill_by_windows(
            random, image, parts, device=torch.device("cpu"), dtype=dtype, window_bytes=window_bytes
        )
        assert torch.equal(torch.cat([part for _, _, part in parts]), whole)
