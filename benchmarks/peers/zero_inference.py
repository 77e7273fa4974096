"""DeepSpeed ZeRO-Inference: stage 3 with parameters in page-locked host memory, gathered layer by layer.

KV stays on the device, as transformers has it. No compiled operator of DeepSpeed is needed.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flexllmgen.memory.arena import HostArena
from flexllmgen.units import round_up
from peers.case import DEVICE, Case, cap_device_memory
from peers.random_model import PackedLayers, build, decoder_layers, fill_on_device, timed

_ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29517",
}


def settings(case: Case, layer_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration: two layers may live on the device, one is fetched ahead."""
    number = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(case.torch_dtype)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1 << 30,
        **({number: {"enabled": True}} if number else {}),
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": DEVICE == "cuda"},
            "stage3_prefetch_bucket_size": layer_parameters,
            "stage3_max_live_parameters": 2 * layer_parameters,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": case.config["hidden_size"],
        },
    }


def ring_of_pinned(alias_mib: int) -> Callable[..., torch.Tensor]:
    """Page-locked memory of which parameters of one size take turns in a few pieces."""
    rings: dict[int, list[torch.Tensor]] = {}
    turns: dict[int, Iterator[int]] = {}
    arenas = []

    def pinned(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        if size not in rings:
            count = max(2, (alias_mib << 20) // (4 * size)) if size >= 1 << 20 else 0
            arena = HostArena(register=True)
            regions = [arena.reserve(round_up(size, 1 << 12)) for _ in range(count)]
            arena.commit()
            arenas.append(arena)
            rings[size] = [arena.view(region)[:size] for region in regions]
            turns[size] = itertools.count()
        if not rings[size]:
            return tensor.pin_memory()
        return rings[size][next(turns[size]) % len(rings[size])].view(tensor.dtype).view(tensor.shape)

    return pinned


def run(case: Case) -> dict[str, Any]:
    """Figures of one generation."""
    os.environ |= {**_ALONE, "DS_ACCELERATOR": DEVICE, "DS_BUILD_OPS": "0"}
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    cap_device_memory(case.gpu_gib)
    start = time.perf_counter()
    model = build(case)
    layers = list(decoder_layers(model))
    fill_on_device(model, but=layers)
    # Only read while DeepSpeed takes its own copies, so that one layer's worth is enough.
    packed = PackedLayers(layers, alias_mib=1, pinned=False)
    packed.give(layers)
    parameters = sum(each.numel() for each in layers[0].parameters())
    config = settings(case, parameters)
    deepspeed.init_distributed("nccl" if DEVICE == "cuda" else "gloo")
    if case.alias_mib and DEVICE == "cuda":
        get_accelerator().pin_memory = ring_of_pinned(case.alias_mib)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.module.eval()
    load_s = time.perf_counter() - start
    # Embedding and head are gathered whole, like a layer.
    fixed = 3 * packed.num_bytes + 2 * case.config["vocab_size"] * case.config["hidden_size"] * 2
    return timed(engine.module, case, fixed) | {
        "load_s": round(load_s, 1),
        "policy": "ZeRO stage 3, parameters pinned on the CPU, KV on the device",
    }
