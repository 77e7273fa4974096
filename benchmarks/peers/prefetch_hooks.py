"""A plain prefetch on transformers: hooks that bring in the next layer's weights while this one computes.

What a skilful user writes in a day: every decoder layer's weights in one page-locked piece, two slots on the device, one
side stream. Embeddings, norms, head and the KV cache stay on the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from peers.case import DEVICE, Case, cap_device_memory
from peers.random_model import PackedLayers, build, decoder_layers, fill_on_device, timed


class Prefetch:
    """Runs layers out of two slots on the device, each filled while the other is computed with.

    Args:
        parameters_of: a layer's parameters by name, made of the views of a slot; plainly the views by default.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        packed: PackedLayers,
        parameters_of: Callable[[dict[str, torch.Tensor]], dict[str, nn.Parameter]] | None = None,
    ) -> None:
        self.packed, self.count = packed, len(layers)
        self.slots = [torch.empty(packed.num_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
        cuda = DEVICE == "cuda"
        self.side = torch.cuda.Stream() if cuda else None
        self.arrived = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self.computed = [torch.cuda.Event() for _ in range(2)] if cuda else []
        self.turn, self.coming = 0, -1
        parameters = [(parameters_of or _plainly)(packed.views(slot)) for slot in self.slots]
        for index, layer in enumerate(layers):
            owners = {name: layer.get_submodule(name.rpartition(".")[0]) for name in parameters[0]}
            layer.register_forward_pre_hook(self._before(index, owners, parameters), with_kwargs=True)
            layer.register_forward_hook(self._after)

    def _before(
        self, index: int, owners: dict[str, nn.Module], parameters: list[dict[str, nn.Parameter]]
    ) -> Any:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
            if self.coming != index:  # The very first layer, or a pass that was broken off.
                self._fetch(index, self.turn)
            if self.side is not None:
                torch.cuda.current_stream().wait_event(self.arrived[self.turn])
            for name, parameter in parameters[self.turn].items():
                owners[name]._parameters[name.rpartition(".")[2]] = parameter
            self._fetch((index + 1) % self.count, 1 - self.turn)

        return hook

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        if self.side is not None:
            self.computed[self.turn].record()
        self.turn = 1 - self.turn

    def _fetch(self, index: int, slot: int) -> None:
        with torch.cuda.stream(self.side) if self.side is not None else contextlib.nullcontext():
            if self.side is not None:
                self.side.wait_event(self.computed[slot])
            self.slots[slot].copy_(self.packed.pieces[index], non_blocking=True)
            if self.side is not None:
                self.arrived[slot].record(self.side)
        self.coming = index


def _plainly(views: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(view, requires_grad=False) for name, view in views.items()}


def prepared(case: Case) -> tuple[Any, PackedLayers]:
    """The model ready to run, and where its layers' weights lie."""
    model = build(case)
    layers = list(decoder_layers(model))
    fill_on_device(model, but=layers)
    packed = PackedLayers(layers, alias_mib=case.alias_mib, pinned=True)
    model.prefetch = Prefetch(layers, packed)
    return model, packed


def device_bytes(model: nn.Module, packed: PackedLayers) -> int:
    """What lies on the device at all times: two layers, and all that is no layer's."""
    return 2 * packed.num_bytes + sum(each.nbytes for each in model.parameters() if not each.is_meta)


def run(case: Case) -> dict[str, Any]:
    """Figures of one generation."""
    return run_prepared(case, prepared, "weights in pinned host memory, KV on the device")


def run_prepared(
    case: Case, prepare: Callable[[Case], tuple[Any, PackedLayers]], policy: str
) -> dict[str, Any]:
    """Figures of one generation of the model that `prepare` makes ready; `policy` says what lies where."""
    cap_device_memory(case.gpu_gib)
    start = time.perf_counter()
    model, packed = prepare(case)
    load_s = time.perf_counter() - start
    return timed(model, case, device_bytes(model, packed)) | {"load_s": round(load_s, 1), "policy": policy}
