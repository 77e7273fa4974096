"""A transformers model with random weights, some of its layers packed in host memory, and a timed generation from it.

For peers that run transformers' own modules. Loads nothing: dimensions are the published ones.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flexllmgen.memory.arena import HostArena
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB, round_up
from peers.case import DEVICE, Case, figures

_ALIGNED = 512
_RESERVE_BYTES = 1 << 30
"""Of the device's cap: context-sized workspaces, logits of the prompt's last position, fragments."""
_FILLED = 0.88


def build(case: Case) -> Any:
    """The model without weights: parameters on the meta device, buffers real."""
    import accelerate
    import transformers

    config = transformers.AutoConfig.for_model(**case.config)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=case.torch_dtype)
    model.eval().requires_grad_(False)
    return model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, wherever the family keeps it."""
    count = model.config.num_hidden_layers  # type: ignore[union-attr]
    found = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    return found[0]


def random_weight(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Normal, 0.02, on the device; a norm's weights are about one."""
    value = torch.randn(*shape, device=DEVICE, dtype=dtype).mul_(0.02)
    return value.add_(1) if "norm" in name and name.endswith("weight") else value


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts `value` where the dotted `name` says."""
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._parameters[last] = nn.Parameter(value, requires_grad=False)


def fill_on_device(model: nn.Module, *, but: Iterable[nn.Module] = ()) -> None:
    """Random weights on the device for every parameter that is not in `but`; buffers go there too."""
    elsewhere = {id(parameter) for module in but for parameter in module.parameters()}
    for name, parameter in list(model.named_parameters()):
        if id(parameter) not in elsewhere and parameter.is_meta:
            set_parameter(model, name, random_weight(name, parameter.shape, parameter.dtype))
    model.tie_weights()  # type: ignore[operator]
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(DEVICE)


class PackedLayers:
    """Weights of layers of one shape in host memory, each layer's in one piece.

    Args:
        alias_mib: layers take turns in this much memory; 0 gives each its own.
        pinned: page-locked, where the device is an accelerator.
        tensors: what a piece holds by name, if not the layers' parameters at random.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        alias_mib: int,
        pinned: bool,
        tensors: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        self.layout: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        self.num_bytes = 0
        like = dict(layers[0].named_parameters()) if tensors is None else tensors()
        for name, tensor in like.items():
            self.layout[name] = (self.num_bytes, tensor.shape, tensor.dtype)
            self.num_bytes += round_up(tensor.nbytes, _ALIGNED)
        own = -(-(alias_mib << 20) // self.num_bytes) if alias_mib else len(layers)
        self.arena = HostArena(register=pinned and DEVICE == "cuda")
        regions = [self.arena.reserve(self.num_bytes) for _ in range(min(len(layers), max(2, own)))]
        self.arena.commit()
        pieces = [self.arena.view(region) for region in regions]
        for piece in pieces:
            values = None if tensors is None else tensors()
            for name, view in self.views(piece).items():
                view.copy_(random_weight(name, view.shape, view.dtype) if values is None else values[name])
        self.pieces = [pieces[index % len(pieces)] for index in range(len(layers))]

    def views(self, piece: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that lie in a piece of bytes, by name."""
        return {
            name: piece[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
            for name, (start, shape, dtype) in self.layout.items()
        }

    def give(self, layers: Sequence[nn.Module]) -> None:
        """Makes the layers' parameters views of what is packed."""
        for layer, piece in zip(layers, self.pieces, strict=True):
            for name, view in self.views(piece).items():
                set_parameter(layer, name, view)


def largest_batch(case: Case, fixed_bytes: int) -> int:
    """Sequences whose KV and prompt's activations should fit the device beside `fixed_bytes`; at most the workload's."""
    if DEVICE != "cuda" or not case.gpu_gib:
        return case.sequences
    spec = ModelSpec.from_hf_config(case.config, case.model)
    size = case.torch_dtype.itemsize
    kv_bytes = spec.kv_bytes(case.prompt + case.gen, size)
    width = spec.intermediate_size * max(1, spec.experts_per_token)
    hidden = spec.hidden_size * max(8, 3 * spec.experts_per_token)
    # While a cache grows by concatenation, one layer's old and new tensors are there together.
    each = kv_bytes * (1 + 2 / spec.num_layers) + case.prompt * (3 * width + hidden) * size
    each += 3 * 4 * spec.vocab_size
    room = _FILLED * (case.gpu_gib * GiB - fixed_bytes - _RESERVE_BYTES)
    return max(1, min(case.sequences, int(room / each)))


class Clock:
    """A logits processor that notes when each column's logits are there."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        return scores


def generate(model: Any, prompts: torch.Tensor, columns: int) -> tuple[torch.Tensor, float, list[float]]:
    """Greedily `columns` tokens for each prompt: the tokens, when it began and when each column was there."""
    import transformers

    clock = Clock()
    ids = prompts.to(DEVICE)
    with torch.inference_mode():
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=columns,
            min_new_tokens=columns,
            do_sample=False,
            pad_token_id=1,
            eos_token_id=None,
            logits_processor=transformers.LogitsProcessorList([clock]),
        )
    return out[:, ids.shape[1] :].cpu(), start, clock.stamps


def timed(
    model: Any, case: Case, fixed_bytes: int, *, warm: Callable[[], None] | None = None
) -> dict[str, Any]:
    """The figures of a generation with as many sequences as fit; three quarters of them where memory runs out."""
    batch = case.batch or largest_batch(case, fixed_bytes)
    if warm is None:
        generate(model, case.prompts(1)[:, :16], 2)
    else:
        warm()
    while True:
        try:
            _, start, stamps = generate(model, case.prompts(batch), min(case.gen, 1 + case.steps))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch = max(1, batch * 3 // 4)
            gc.collect()
            torch.cuda.empty_cache()
            continue
        return figures(case, batch, start, stamps) | {"cut": f"{batch}x1"}
