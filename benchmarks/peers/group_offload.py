"""diffusers' group offloading, one decoder layer a group, copied in on a stream of its own.

`apply_group_offloading` takes any module. It is given transformers' decoder, whose embeddings and last norm it also moves
in and out in every pass; the head keeps a copy of its own on the device, because groups cannot share a tensor.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from peers.case import DEVICE, Case, cap_device_memory
from peers.random_model import PackedLayers, build, decoder_layers, fill_on_device, set_parameter, timed


def run(case: Case) -> dict[str, Any]:
    """Figures of one generation."""
    from diffusers.hooks import apply_group_offloading

    cap_device_memory(case.gpu_gib)
    start = time.perf_counter()
    model = build(case)
    layers = list(decoder_layers(model))
    fill_on_device(model, but=layers)
    packed = PackedLayers(layers, alias_mib=case.alias_mib, pinned=True)
    packed.give(layers)
    head = model.get_output_embeddings()
    set_parameter(head, "weight", head.weight.detach().clone())
    apply_group_offloading(
        decoder_of(model),
        onload_device=torch.device(DEVICE),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=DEVICE == "cuda",
        record_stream=DEVICE == "cuda",
    )
    load_s = time.perf_counter() - start
    # The order of layers is learnt in the first pass; what a stream still reads is freed late.
    fixed = 3 * packed.num_bytes + 2 * head.weight.nbytes
    return timed(model, case, fixed) | {
        "load_s": round(load_s, 1),
        "policy": "one layer a group, streams, KV on the device",
    }


def decoder_of(model: Any) -> Any:
    """The module whose child is the list of layers."""
    layers = decoder_layers(model)
    return next(each for each in model.modules() if any(child is layers for child in each.children()))
