"""bitsandbytes' 4-bit linear layers (NF4, blocks of 64) on transformers, larger than the device.

`run` lets accelerate dispatch them from host memory. `run_prefetched` streams the packed weights and their scales with the
hooks of prefetch_hooks.py. Experts that transformers keeps in one fused tensor are not linear layers and stay as they are.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peers.accelerate_hooks import parts
from peers.case import DEVICE, Case, cap_device_memory
from peers.prefetch_hooks import Prefetch, run_prepared
from peers.random_model import (
    PackedLayers,
    build,
    decoder_layers,
    fill_on_device,
    random_weight,
    set_parameter,
    timed,
)

_SCALES = ".absmax"


def run(case: Case) -> dict[str, Any]:
    """Figures of one generation with accelerate's hooks."""
    import accelerate

    cap_device_memory(case.gpu_gib)
    if case.layers != 1:
        # Whether the two work together at all shows on one layer, before all are loaded.
        run(replace(case, layers=1, batch=1, prompt=8, gen=2, steps=1))
    start = time.perf_counter()
    model = build(case)
    layers = list(decoder_layers(model))
    fill_on_device(model, but=layers)
    for layer in layers:
        with_4_bits(layer, case.torch_dtype)
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            module.weight = quantised(module, random_weight(name, _shape(module), case.torch_dtype)).to("cpu")
    place = {name: "cpu" if module in layers else 0 for name, module in parts(model)}
    if DEVICE == "cuda":
        model = accelerate.dispatch_model(model, device_map=place, main_device=0)
    else:
        accelerate.cpu_offload(model, execution_device=torch.device(DEVICE))
    load_s = time.perf_counter() - start
    layer_bytes = sum(each.nbytes for each in layers[0].parameters())
    fixed = 2 * layer_bytes + 2 * model.get_input_embeddings().weight.nbytes
    return timed(model, case, fixed) | {
        "load_s": round(load_s, 1),
        "policy": "NF4 weights on the host, KV on the device",
    }


def run_prefetched(case: Case) -> dict[str, Any]:
    """Figures of one generation with prefetching hooks."""
    return run_prepared(case, prepared, "NF4 weights in pinned host memory, KV on the device")


def prepared(case: Case) -> tuple[Any, PackedLayers]:
    """The model ready to run from streamed 4-bit weights, and where they lie."""
    model = build(case)
    layers = list(decoder_layers(model))
    fill_on_device(model, but=layers)
    for layer in layers:
        with_4_bits(layer, case.torch_dtype)
    states = {
        name: quantised(module, random_weight(name, _shape(module), case.torch_dtype))
        for name, module in layers[0].named_modules()
        if type(module).__name__ == "Linear4bit"
    }
    packed = PackedLayers(
        layers,
        alias_mib=case.alias_mib,
        pinned=True,
        tensors=lambda: random_layer(layers[0], case.torch_dtype),
    )
    model.prefetch = Prefetch(layers, packed, _parameters_of(states))
    return model, packed


def _parameters_of(
    states: dict[str, Any],
) -> Callable[[dict[str, torch.Tensor]], dict[str, nn.Parameter]]:
    def parameters(views: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
        found = {}
        for name, view in views.items():
            module = name.removesuffix(".weight")
            if name.endswith(_SCALES):
                continue
            if module in states:
                parameter = copy.copy(states[module])
                parameter.data = view
                parameter.quant_state = copy.copy(states[module].quant_state)
                parameter.quant_state.absmax = views[name + _SCALES]
                found[name] = parameter
            else:
                found[name] = nn.Parameter(view, requires_grad=False)
        return found

    return parameters


def with_4_bits(layer: nn.Module, dtype: torch.dtype) -> None:
    """Replaces a layer's linear modules by 4-bit ones, still without weights."""
    import bitsandbytes

    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            linear = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
                device="meta",
            )
            linear.requires_grad_(False)
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, linear)
    for name, parameter in list(layer.named_parameters()):
        if parameter.is_meta and not _is_packed(layer, name):
            set_parameter(layer, name, random_weight(name, parameter.shape, dtype))


def random_layer(layer: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights of a layer as they are kept: packed codes and scales of linear modules, the rest as it is."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in layer.named_parameters():
        if _is_packed(layer, name):
            module = layer.get_submodule(name.rpartition(".")[0])
            weight = quantised(module, random_weight(name, _shape(module), dtype))
            found[name], found[name + _SCALES] = weight.data, weight.quant_state.absmax
        else:
            found[name] = random_weight(name, parameter.shape, dtype)
    return found


def quantised(module: nn.Module, weight: torch.Tensor) -> Any:
    """A weight as bitsandbytes packs it, on the device."""
    import bitsandbytes

    return bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type="nf4",
        blocksize=64,
        compress_statistics=False,  # One scale a block, so that codes and scales are all there is to move.
        module=module,
    ).to(DEVICE)


def _is_packed(layer: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last == "weight" and type(layer.get_submodule(owner)).__name__ == "Linear4bit"


def _shape(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features
