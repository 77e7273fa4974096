"""How long a pass takes as transformers runs it on this machine: a model of the same shapes with a few layers, timed.

What a layer does beside its products (attention, norms, a cache that grows by concatenation, Python) differs too much
between architectures and devices to be added up; so it is run. Weights are random.
"""

import copy
import inspect
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from flexllmgen.spec import ModelSpec
from flexllmgen.units import round_up
from profiling.compute import timed_runs
from strategies.accelerate_load import empty_model, no_split_classes

_ROTATED_BYTES = 256 << 20
"""What the layers hold together: more than caches, as a model's layers do."""
_TRIALS = 6
_ALIGNMENT = 64
_FEW_TOKENS = 128
_LONG_S = 1.0
"""Prompts that would take longer are timed in part, and the rest is taken in proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Seconds of one layer in a pass, and of all that a pass does beside its layers."""

    layer_s: float
    rest_s: float


class FewLayers:
    """Some decoder layers of a model, with weights of their own; a context manager, since they hold the device's memory.

    Args:
        config: of the model, whose dimensions are `spec`.
    """

    def __init__(self, config: Any, spec: ModelSpec, dtype: str, device: str) -> None:
        self._spec, self._device = spec, device
        self._model = _small_model(config, spec.num_layers, dtype, device)
        self._options = inspect.signature(self._model.forward).parameters
        names = no_split_classes(self._model)
        self._layers = [each for each in self._model.modules() if type(each).__name__ in names]
        self._spans: dict[torch.nn.Module, list[float]] = {}
        for module in (self._model, *self._layers):
            spans = self._spans.setdefault(module, [])
            module.register_forward_pre_hook(lambda *_, spans=spans: spans.append(-self._now()))
            module.register_forward_hook(lambda *_, spans=spans: spans.append(spans.pop() + self._now()))

    def __enter__(self) -> "FewLayers":
        return self

    def __exit__(self, *_: object) -> None:
        del self._model, self._layers, self._spans
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def prompt(self, batch: int, tokens: int) -> PassTimes:
        """A pass over `batch` prompts of so many tokens."""
        columns = min(tokens, _FEW_TOKENS)
        part, share = self._timed(1, columns, 0), batch * tokens / columns
        if part.layer_s * len(self._layers) * share > _LONG_S:
            return PassTimes(layer_s=part.layer_s * share, rest_s=part.rest_s)
        return self._timed(batch, tokens, 0)

    def step(self, batch: int, cached: int) -> PassTimes:
        """A decode step of `batch` sequences with so many cached positions each."""
        return self._timed(batch, 1, cached)

    @torch.inference_mode()
    def _timed(self, batch: int, tokens: int, cached: int) -> PassTimes:
        spec = self._spec
        # Of a mixture's experts different tokens choose different ones.
        ids = torch.randint(spec.vocab_size, (batch, tokens), device=self._device)
        mask = torch.ones(batch, cached + tokens, dtype=torch.long, device=self._device)
        kept = torch.randn(batch, spec.num_kv_heads, cached, spec.head_dim, device=self._device)
        kept = kept.to(self._model.dtype)

        # As generate does, where a model can: of a prompt only the last position is multiplied with the vocabulary.
        last = {"logits_to_keep": 1} if "logits_to_keep" in self._options else {}

        def run() -> None:
            # The same length each time: kernels are chosen for a length, and a run's warm-up has met all of its own.
            cache = DynamicCache(config=self._model.config)
            for layer in range(len(self._layers) if cached else 0):
                cache.update(kept, kept, layer)
            self._model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **last)

        for spans in self._spans.values():
            spans.clear()
        timed_runs(run, self._device, _TRIALS)
        # The first run does not count. Of the others what a quarter of all layers did not exceed: on a busy machine no run is
        # quick from end to end.
        whole_s, *each_s = (self._spans[module][1:] for module in (self._model, *self._layers))
        beside_s = [
            whole - sum(layers) for whole, layers in zip(whole_s, zip(*each_s, strict=True), strict=True)
        ]
        layer_s = [seconds for spans in each_s for seconds in spans]
        return PassTimes(layer_s=_quarter(layer_s), rest_s=max(0.0, _quarter(beside_s)))

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _quarter(seconds: list[float]) -> float:
    """The least that a quarter of them do not exceed."""
    return sorted(seconds)[len(seconds) // 4]


def _small_model(config: Any, num_layers: int, dtype: str, device: str) -> PreTrainedModel:
    """As many layers as fill the rotated bytes, with random weights."""
    one = _without_weights(config, 1, dtype)
    names = no_split_classes(one)
    layer = next(each for each in one.modules() if type(each).__name__ in names)
    layer_bytes = sum(weight.nbytes for weight in layer.parameters())
    model = _without_weights(config, max(1, min(num_layers, -(-_ROTATED_BYTES // layer_bytes))), dtype)
    # In one piece of memory, which goes back to the system as one.
    places, end = dict[torch.nn.Parameter, int](), 0
    for weight in model.parameters():  # Tied weights are one.
        places[weight], end = end, round_up(end + weight.numel(), _ALIGNMENT)
    memory = _random(end, model.dtype, device)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            numbers = memory[places[weight] :][: weight.numel()].view(weight.shape)
            setattr(module, name, torch.nn.Parameter(numbers, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=False)
    return model


def _random(count: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """So many numbers. Copies of one piece: drawing billions takes far longer than what is timed."""
    memory = torch.empty(count, dtype=dtype, device=device)
    some = (0.02 * torch.randn(1 << 20)).to(device, dtype)
    for start in range(0, count, len(some)):
        part = memory[start : start + len(some)]
        part.copy_(some[: len(part)])
    return memory


def _without_weights(config: Any, num_layers: int, dtype: str) -> PreTrainedModel:
    small = copy.deepcopy(config)
    small.num_hidden_layers = num_layers
    if kinds := getattr(small, "layer_types", None):
        small.layer_types = list(kinds)[:num_layers]
    return empty_model(small, dtype)
