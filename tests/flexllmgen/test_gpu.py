"""On a CUDA device: the same tokens as transformers', through real streams and page-locked memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import MIXED, Recorder
from tiny_models import TINY, TinyModel, make_tiny, prompts

from flexllmgen.engine import FlexEngine
from flexllmgen.models.decoder import Decoder
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.workload import Workload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
SEQUENCES, PROMPT, TOKENS = 12, 33, 8
PLACEMENTS: dict[str, dict[str, Any]] = {
    "device": {},
    "host": {"weights": ON_CPU, "kv_cache": ON_CPU, "activations": ON_CPU},
    "disk": {"weights": ON_DISK, "kv_cache": ON_DISK, "activations": ON_DISK},
    "mixed": {"weights": MIXED, "kv_cache": MIXED, "activations": MIXED},
    "asking": {"weights": MIXED, "kv_cache": Placement(gpu=0.3, cpu=0.7), "cpu_attention": True},
}
FP32_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 4}
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name), **sizes)
        # A copy: a test may round its numbers, those of rotations too, which are in no state dict.
        return replace(made[name], model=copy.deepcopy(made[name].model))

    return get


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("name", TINY)
def test_parity(
    larger: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: torch.dtype,
    placement: str,
    padded: bool,
) -> None:
    model = larger(name)
    model.model.to(DEVICE, torch.float32)
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    policy = Policy(micro_batch_size=4, num_micro_batches=3, overlap=2, **PLACEMENTS[placement])
    routes = Routes(model, SEQUENCES, PROMPT, monkeypatch)
    got, mine = generated(model, policy, ids, mask, dtype, tmp_path)
    if dtype == torch.float32:
        exact = logits_of(model, ids, mask, got)
        assert (mine - exact).abs().max() / exact.abs().max() < FP32_TOLERANCE
        assert torch.equal(got, exact.argmax(-1))
        return
    # A token whose best experts tie within the rounding may go to another one, and is then another text altogether.
    # So the comparison follows the engine's routes, and a route must be as good as the best within the rounding.
    with routes.followed():
        exact = logits_of(model, ids, mask, got)
        exact_scores = routes.scores(mask)
        model.model.to(dtype)
        theirs = logits_of(model, ids, mask, got)
        their_scores = routes.scores(mask)
    # Half precision: no further from the fp32 model than transformers is at the same precision, within noise.
    scale = exact.abs().max()
    error = (mine - exact).abs().max() / scale
    assert error < 3 * (theirs - exact).abs().max() / scale + 1e-3
    # Where the choice differs from the exact one, the two were as close as that error.
    chosen = exact.gather(-1, got[..., None])[..., 0]
    assert ((exact.max(-1).values - chosen) / scale < 2 * error).all()
    for layer, scores in enumerate(exact_scores):
        rounding = (their_scores[layer] - scores).abs().max()
        assert routes.shortfall(layer, scores, mask) <= 2 * (3 * rounding + 1e-3 * scores.abs().max())


class Routes:
    """The experts that the engine chose, per layer; and transformers made to choose the same.

    Args:
        monkeypatch: undoes the listening in the engine's decoder.
    """

    def __init__(
        self, model: TinyModel, sequences: int, prompt: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._model, self._sequences, self._prompt = model, sequences, prompt
        self._layers = model.spec.num_layers if model.spec.num_experts else 0
        self._calls: list[torch.Tensor] = []
        self._scores: dict[int, torch.Tensor] = {}
        route = Decoder._route

        def heard(decoder: Decoder, w: Any, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            weights, experts = route(decoder, w, x_RD)
            self._calls.append(experts.cpu())
            return weights, experts

        monkeypatch.setattr(Decoder, "_route", heard)

    def chosen(self, layer: int) -> torch.Tensor:
        """Experts [B, T, k]: the prompt's positions, then one after another."""
        rows = torch.cat(self._calls)
        passes, start, columns = [], 0, self._prompt
        while start < len(rows):
            size = self._sequences * columns
            mine = rows[start + layer * size : start + (layer + 1) * size]
            passes.append(mine.view(self._sequences, columns, -1))
            start, columns = start + self._layers * size, 1
        return torch.cat(passes, dim=1)

    @contextmanager
    def followed(self) -> Iterator[None]:
        routers = [part for part in self._model.model.modules() if type(part).__name__.endswith("TopKRouter")]
        assert len(routers) == self._layers
        hooks = [
            router.register_forward_hook(self._follow(layer, self.chosen(layer).flatten(0, 1)))
            for layer, router in enumerate(routers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _follow(self, layer: int, experts: torch.Tensor) -> Any:
        def hook(_module: Any, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits, weights, best = outputs
            assert best.shape == experts.shape
            self._scores[layer] = logits.float().cpu()
            mine = experts.to(logits.device)
            counted = logits.float().softmax(dim=-1).gather(1, mine)
            if self._model.spec.normalise_experts:
                counted = counted / counted.sum(dim=-1, keepdim=True)
            return logits, counted.to(weights.dtype), mine

        return hook

    def scores(self, mask: torch.Tensor | None) -> list[torch.Tensor]:
        """transformers' router scores [rows, experts] of the last pass, without the padding."""
        return [self._scores[layer][self._real(layer, mask)] for layer in range(self._layers)]

    def shortfall(self, layer: int, scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """By how much the best expert left out was better than the worst one taken; below zero: never."""
        experts = self.chosen(layer).flatten(0, 1)[self._real(layer, mask)]
        taken = scores.gather(1, experts).min(dim=1).values
        left = scores.scatter(1, experts, float("-inf")).max(dim=1).values
        return (left - taken).max()

    def _real(self, layer: int, mask: torch.Tensor | None) -> torch.Tensor:
        real = torch.ones(self.chosen(layer).shape[:2], dtype=torch.bool)
        if mask is not None:
            real[:, : mask.shape[1]] = mask.bool()
        return real.flatten()


def generated(
    model: TinyModel,
    policy: Policy,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
    folder: Path,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's tokens, and their logits in float32 on the host."""
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    recorder = Recorder()
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device=DEVICE,
        dtype=dtype,
        offload_dir=folder,
    ) as engine:
        tokens = torch.stack(list(engine.generate(ids, mask, sampling=recorder)), dim=1)
    return tokens, recorder.logits().float().cpu()


def logits_of(
    model: TinyModel, ids: torch.Tensor, mask: torch.Tensor | None, new: torch.Tensor
) -> torch.Tensor:
    """transformers' logits [B, new tokens, V] for the texts that the engine wrote."""
    whole = torch.cat((ids, new[:, :-1]), dim=1).to(DEVICE)
    seen = torch.ones_like(whole)
    if mask is not None:
        seen[:, : mask.shape[1]] = mask.to(DEVICE)
    places = (seen.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = model.model(whole, attention_mask=seen, position_ids=places).logits
    return logits[:, ids.shape[1] - 1 :].float().cpu()


@pytest.mark.parametrize("name", ["opt-350m", "llama3"])
def test_a_recorded_step_serves_the_next_blocks_too(larger: Any, name: str) -> None:
    model = larger(name)
    model.model.to(DEVICE, torch.float32)
    workload = Workload(num_sequences=4, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        Policy(micro_batch_size=4),
        workload=workload,
        device=DEVICE,
        dtype="float32",
    ) as engine:
        for seed, length, padded in ((0, PROMPT, False), (1, 20, True), (2, PROMPT, True)):
            ids, mask = prompts(4, length, padded=padded, seed=seed)
            want, _ = model.greedy(ids.to(DEVICE), None if mask is None else mask.to(DEVICE), TOKENS)
            got = torch.stack(list(engine.generate(ids, mask)), dim=1)
            assert torch.equal(got, want.cpu())
