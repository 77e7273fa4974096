"""Peers that are our own code or run on a CPU say what plain transformers says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import prefetch_hooks
from peers.accelerate_hooks import parts
from peers.case import Case, figures
from peers.random_model import PackedLayers, build, decoder_layers, fill_on_device, generate, largest_batch
from record_case import case_of
from tiny_models import TINY


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Case]:
    """Cases of models that are published nowhere."""

    def config(name: str) -> dict[str, Any]:
        kind, sizes = TINY[name]
        return {"model_type": kind, "torch_dtype": "float32", "tie_word_embeddings": kind == "opt", **sizes}

    monkeypatch.setattr("peers.case.published_config", config)

    def case(model: str, layers: int, alias_mib: int = 0) -> Case:
        fixed: dict[str, Any] = {"dtype": "float32", "gpu_gib": 0, "prompt": 5, "gen": 4, "batch": 2}
        return Case(model=model, layers=layers, alias_mib=alias_mib, **fixed)

    return case


def without_hooks(case: Case, packed: PackedLayers, model: Any) -> Any:
    """transformers' own model of the same weights."""
    other = build(case)
    layers = list(decoder_layers(other))
    packed.give(layers)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and ".layers." not in name:
            owner, _, last = name.rpartition(".")
            other.get_submodule(owner)._parameters[last] = parameter
    fill_on_device(other, but=layers)
    return other


@pytest.mark.parametrize("model", ["opt", "llama", "qwen3-moe", "mixtral"])
@pytest.mark.parametrize(("layers", "alias_mib"), [(2, 0), (3, 0), (30, 1)])
def test_prefetched_layers_give_the_tokens_of_plain_transformers(
    tiny: Callable[..., Case], model: str, layers: int, alias_mib: int
) -> None:
    case = tiny(model, layers, alias_mib)
    torch.manual_seed(0)
    hooked, packed = prefetch_hooks.prepared(case)
    for piece in {piece.data_ptr(): piece for piece in packed.pieces}.values():
        for view in packed.views(piece).values():
            view.mul_(4 if view.dim() > 1 else 1)  # So that tokens differ.
    tokens, start, stamps = generate(hooked, case.prompts(2), case.gen)
    plain = without_hooks(case, packed, hooked)
    assert torch.equal(tokens, generate(plain, case.prompts(2), case.gen)[0])
    # Tokens of tiny models repeat; logits tell more, and the next pass finds the first layer fetched already.
    for _ in range(2):
        torch.testing.assert_close(hooked(case.prompts(2)).logits, plain(case.prompts(2)).logits)
    assert len(stamps) == case.gen
    assert start < stamps[0]


def test_shared_layers_take_less_memory_and_own_ones_all_of_it(tiny: Callable[..., Case]) -> None:
    case = tiny("opt", 40)
    layers = list(decoder_layers(build(case)))
    shared = PackedLayers(layers, alias_mib=1, pinned=False)
    pieces = {piece.data_ptr() for piece in shared.pieces}
    assert (1 << 20) <= len(pieces) * shared.num_bytes < (1 << 20) + shared.num_bytes
    own = PackedLayers(layers, alias_mib=0, pinned=False)
    assert len({piece.data_ptr() for piece in own.pieces}) == 40
    # Rows of different layers differ, and what was packed is what the layers hold.
    own.give(layers)
    first, second = (dict(layer.named_parameters())["fc1.weight"] for layer in layers[:2])
    assert not torch.equal(first, second)
    assert torch.equal(first, own.views(own.pieces[0])["fc1.weight"])


def test_layers_and_the_rest_are_told_apart(tiny: Callable[..., Case]) -> None:
    model = build(tiny("opt", 2))
    names = [name for name, _ in parts(model)]
    assert [name for name in names if ".layers." in name] == [
        "model.decoder.layers.0",
        "model.decoder.layers.1",
    ]
    assert "model.decoder.embed_tokens" in names
    assert "lm_head" in names


def test_fewer_prompts_are_the_first_of_more() -> None:
    case = Case(model="opt-125m", prompt=6)
    assert torch.equal(case.prompts(8)[:3], case.prompts(3))
    assert int(case.prompts(8).min()) >= 5


def test_long_generations_are_projected_from_the_median_step() -> None:
    case = Case(model="opt-125m", prompt=6, gen=11)
    cut = figures(case, 4, 10.0, [12.0, 13.0, 14.0, 20.0])
    assert cut["projected"]
    assert cut["prefill_s"] == 2.0
    assert cut["tok_s"] == round(4 * 11 / (2.0 + 10 * 1.0), 2)
    complete = figures(Case(model="opt-125m", gen=3), 4, 10.0, [12.0, 13.0, 19.0])
    assert not complete["projected"]
    assert complete["tok_s"] == round(4 * 3 / 9.0, 2)


def test_a_larger_cap_takes_more_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.random_model.DEVICE", "cuda")
    small = largest_batch(Case(model="opt-6.7b", gpu_gib=8, sequences=192), 1 << 30)
    large = largest_batch(Case(model="opt-6.7b", gpu_gib=16, sequences=192), 1 << 30)
    # 0.27 GiB of KV a sequence.
    assert 12 <= small < large <= 55
    assert largest_batch(Case(model="opt-6.7b", gpu_gib=16, sequences=4), 1 << 30) == 4


def test_what_is_set_wins_over_the_row() -> None:
    case = case_of("opt-30b-4bit", "flexgen", ["batch=8", "percent=10 90 0 100 100 0", "gpu_gib=12"])
    assert (case.batch, case.batches, case.bits, case.gpu_gib) == (8, 4, 4, 12.0)
    assert case.percent == (10, 90, 0, 100, 100, 0)
    assert case_of("opt-175b-4bit", "autoflex", []).lossy
    with pytest.raises(SystemExit, match="no field bach"):
        case_of("opt-30b", "prefetch", ["bach=8"])
