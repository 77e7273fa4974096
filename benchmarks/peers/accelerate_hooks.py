"""transformers' generate with accelerate's dispatch: layers beyond a share of the device are copied in when they run.

The device keeps embeddings, head, `weights_gib` of layers, and the KV cache. Without a share for layers the batch can be
larger, which is what throughput wants; that is the default.
"""

from __future__ import annotations

import time
from typing import Any

from flexllmgen.units import GiB
from peers.case import DEVICE, Case, cap_device_memory
from peers.random_model import PackedLayers, build, decoder_layers, fill_on_device, timed


def run(case: Case) -> dict[str, Any]:
    """Figures of one generation."""
    import accelerate

    cap_device_memory(case.gpu_gib)
    start = time.perf_counter()
    model = build(case)
    layers = decoder_layers(model)
    layer_bytes = sum(each.numel() * each.element_size() for each in layers[0].parameters())
    resident = min(len(layers), int(case.weights_gib * GiB / layer_bytes))
    offloaded = list(layers)[resident:]
    fill_on_device(model, but=offloaded)
    if offloaded:
        # Kept for as long as the model: the parameters are views of it.
        packed = PackedLayers(offloaded, alias_mib=case.alias_mib, pinned=False)
        packed.give(offloaded)
        place = {name: "cpu" if module in offloaded else 0 for name, module in parts(model)}
        if DEVICE == "cuda":
            model = accelerate.dispatch_model(model, device_map=place, main_device=0)
    load_s = time.perf_counter() - start
    fixed = (resident + 2) * layer_bytes + 2 * model.get_input_embeddings().weight.nbytes

    def warm() -> None:
        """A pass takes seconds and the first one no longer than others: none is run before."""

    result = timed(model, case, fixed, warm=warm if offloaded else None)
    return result | {
        "load_s": round(load_s, 1),
        "policy": f"{resident} of {len(layers)} layers on the device",
    }


def parts(model: Any) -> list[tuple[str, Any]]:
    """The decoder's layers, and every other module that holds parameters or buffers, by name."""
    layers = list(decoder_layers(model))
    inside = {id(module) for layer in layers for module in layer.modules()}
    parts = []
    for name, module in model.named_modules():
        is_layer = any(module is layer for layer in layers)
        own = any(True for _ in module.parameters(recurse=False)) or any(
            True for _ in module.buffers(recurse=False)
        )
        if is_layer or (own and id(module) not in inside):
            parts.append((name, module))
    return parts
