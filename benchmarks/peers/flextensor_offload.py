"""FlexTensor: decoder layers offloaded by its own plan, made from a few profiled passes.

Its transfer blocks admit no memory that layers share, so every byte is loaded: take a model that fits the host twice.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from flexllmgen.units import GiB
from peers.case import DEVICE, Case, cap_device_memory
from peers.random_model import PackedLayers, build, decoder_layers, fill_on_device, timed

_WEIGHTS_SHARE = 0.4
"""Of the cap: what its plan may take for weights; the rest is for KV and activations."""


def run(case: Case) -> dict[str, Any]:
    """Figures of one generation."""
    import flextensor

    cap_device_memory(case.gpu_gib)
    start = time.perf_counter()
    model = build(case)
    layers = list(decoder_layers(model))
    fill_on_device(model, but=layers)
    packed = PackedLayers(layers, alias_mib=0, pinned=False)
    packed.give(layers)
    on_device = sum(each.nbytes for each in model.parameters() if each.device.type == DEVICE)
    weights = _WEIGHTS_SHARE * case.gpu_gib * GiB + on_device
    total = torch.cuda.get_device_properties(0).total_memory
    offloaded = flextensor.offload(
        model,
        config=flextensor.OffloadConfig(
            include_patterns=[f"class:{type(layers[0]).__name__}"],
            max_gpu_mem_fraction=weights / total,
            discovery_iters=1,
            profiling_iters=2,
        ),
    )
    ids = case.prompts(case.batch or 8)[:, :1].to(DEVICE)
    with torch.inference_mode():
        for _ in range(flextensor.get_offload_manager().iters_before_inference + 1):
            offloaded(ids)
    load_s = time.perf_counter() - start
    return timed(offloaded, case, int(weights)) | {
        "load_s": round(load_s, 1),
        "policy": f"weights within {weights / GiB:.1f} GiB of the device, KV on it",
    }
