"""Keys and values made anew from the layer's inputs: the same tokens as transformers', half the bytes over the link."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import MIXED, PROMPT, SEQUENCES, TOKENS, check
from tiny_models import TinyModel, make_tiny, prompts

from flexllmgen.engine import EngineStats, FlexEngine
from flexllmgen.errors import PolicyError
from flexllmgen.layer_inputs import InputSegment
from flexllmgen.models.published import published_config
from flexllmgen.placement import PlacementPlan, plan_placement
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.spec import OPT_125M, ModelSpec
from flexllmgen.splits import Split, keep_inputs
from flexllmgen.workload import Workload

HALF = Placement(gpu=0.5, cpu=0.5)
OWN_KEYS = {"num_key_value_heads": 4}
"""Tiny models with keys and values for each head."""


@pytest.fixture(scope="module")
def own_keys(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name.startswith("opt"):
            return tiny(name)
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name), **OWN_KEYS)
        return made[name]

    return get


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in-place"])
@pytest.mark.parametrize("kv_cache", [ON_CPU, HALF, MIXED], ids=["host", "half", "mixed"])
@pytest.mark.parametrize(
    "name", ["opt", "opt-350m", "llama", "llama3", "mistral", "qwen2", "qwen3", "qwen3-moe"]
)
def test_tokens_and_logits_are_those_of_transformers(
    own_keys: Any, tmp_path: Path, name: str, kv_cache: Placement, in_place: bool, padded: bool
) -> None:
    for share, micro_batch, overlap in ((1.0, 6, 1), (0.5, 2, 2)):
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=SEQUENCES // micro_batch,
            overlap=overlap,
            weights=MIXED,
            kv_cache=kv_cache,
            recompute=share,
        )
        check(own_keys(name), policy, tmp_path, padded=padded, in_place=in_place)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kv_cache", [ON_CPU, HALF, MIXED], ids=["host", "half", "mixed"])
@pytest.mark.parametrize("name", ["opt", "opt-350m", "llama3", "mistral", "qwen3-moe"])
def test_beside_attention_where_the_kv_lies(
    own_keys: Any, tmp_path: Path, name: str, kv_cache: Placement, padded: bool
) -> None:
    cuts = ((6, 1, False, 0.5), (2, 0, False, 0.3), (2, 2, True, 0.6), (4, 1, False, 0.5), (3, 1, False, 1.0))
    for micro_batch, overlap, sep_layer, share in cuts:
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=-(-SEQUENCES // micro_batch),
            overlap=overlap,
            sep_layer=sep_layer,
            weights=MIXED,
            kv_cache=kv_cache,
            cpu_attention=True,
            recompute=share,
        )
        check(own_keys(name), policy, tmp_path, padded=padded, in_place=False)


@pytest.mark.parametrize("cpu_attention", [False, True])
def test_a_part_at_a_time_is_the_same(
    own_keys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_attention: bool
) -> None:
    monkeypatch.setattr("flexllmgen.workspace.KV_SCRATCH_BYTES", 5000)
    model = own_keys("llama3")
    policy = Policy(
        micro_batch_size=6, kv_cache=Placement(gpu=0.1, cpu=0.9), cpu_attention=cpu_attention, recompute=0.9
    )
    assert 1 <= place(model.spec, policy).recomputed_sequences < 4
    check(model, policy, tmp_path, padded=True, in_place=False)


def test_compressed_weights_make_the_same_keys_again(own_keys: Any, tmp_path: Path) -> None:
    """Of weights turned back from integers: as the same policy with keys and values that are kept."""
    model = own_keys("opt")
    kept = Policy(micro_batch_size=6, weights=ON_CPU, kv_cache=ON_CPU, weight_bits=8)
    tokens = [
        generated(model, dataclasses.replace(kept, recompute=share), tmp_path)[0] for share in (0.0, 0.7)
    ]
    assert torch.equal(*tokens)


def test_blocks_and_shorter_prompts_follow_each_other(own_keys: Any, tmp_path: Path) -> None:
    """A next block, of fewer sequences and a shorter prompt, finds nothing of the last one's."""
    model, policy = (
        own_keys("qwen3"),
        Policy(micro_batch_size=4, num_micro_batches=2, kv_cache=ON_CPU, recompute=0.5),
    )
    workload = Workload(num_sequences=8, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    with FlexEngine.load(
        model.spec, model.checkpoint, policy, workload=workload, device="cpu", in_place=False
    ) as engine:
        for count, length, padded in ((8, PROMPT, True), (5, 6, False), (3, PROMPT, True)):
            ids, mask = prompts(count, length, padded=padded, seed=count)
            want, _ = model.greedy(ids, mask, TOKENS)
            assert torch.equal(torch.stack(list(engine.generate(ids, mask)), dim=1), want)


def place(spec: ModelSpec, policy: Policy, **more: Any) -> PlacementPlan:
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    return plan_placement(spec, policy, workload, 4, **more)


def generated(model: TinyModel, policy: Policy, tmp_path: Path) -> tuple[torch.Tensor, EngineStats]:
    ids, mask = prompts(SEQUENCES, PROMPT, padded=False)
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device="cpu",
        offload_dir=tmp_path,
        in_place=False,
    ) as engine:
        tokens = torch.stack(list(engine.generate(ids, mask)), dim=1)
        return tokens, engine.stats()


def test_half_the_bytes_go_over_the_link(own_keys: Any, tmp_path: Path) -> None:
    model = own_keys("opt")
    policy = Policy(micro_batch_size=3, num_micro_batches=2, kv_cache=ON_CPU)
    (_, kept), (_, anew) = (
        generated(model, dataclasses.replace(policy, recompute=share), tmp_path) for share in (0.0, 1.0)
    )
    # Steps after the first token, the positions each loads, and what each stores; the last one's is not stored.
    loaded = SEQUENCES * sum(PROMPT + step for step in range(TOKENS - 1))
    stored = SEQUENCES * (PROMPT + TOKENS - 2)
    assert kept.h2d_bytes == loaded * model.spec.kv_bytes(1, 4) == 2 * anew.h2d_bytes
    assert kept.d2h_bytes == stored * model.spec.kv_bytes(1, 4) == 2 * anew.d2h_bytes


def test_what_the_cpu_attends_to_is_not_loaded_beside_the_inputs(own_keys: Any, tmp_path: Path) -> None:
    model = own_keys("opt")
    policy = Policy(micro_batch_size=6, kv_cache=ON_CPU, cpu_attention=True, recompute=0.5)
    _, stats = generated(model, policy, tmp_path)
    spec = model.spec
    inputs = 3 * spec.num_layers * sum(PROMPT + step for step in range(TOKENS - 1)) * spec.hidden_bytes(1, 4)
    found = 3 * spec.num_layers * (TOKENS - 1) * spec.query_size * 4
    assert stats.h2d_bytes == inputs + found


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_planned_bytes_are_those_of_the_sequences(share: float) -> None:
    workload = Workload(num_sequences=8, prompt_tokens=500, gen_tokens=30)
    policy = Policy(micro_batch_size=4, num_micro_batches=2, kv_cache=Placement(gpu=0.25, cpu=0.75))
    kept, anew = (
        plan_placement(OPT_125M, dataclasses.replace(policy, recompute=each), workload, 2)
        for each in (0.0, share)
    )
    room = kept.max_context
    inputs = round(6 * OPT_125M.num_layers * share) * OPT_125M.hidden_bytes(room, 2)
    assert anew.input_bytes == inputs
    assert anew.kv_cache.cpu == kept.kv_cache.cpu - inputs
    assert anew.kv_cache.gpu == kept.kv_cache.gpu
    splits = [split for row in anew.kv_splits for split in row]
    assert [split.count for split in splits] == [4] * 24
    numbers = [max(split.cpu for split in splits) * 2 * OPT_125M.kv_size]
    numbers.append(max(split.inputs for split in splits) * OPT_125M.hidden_size)
    assert anew.kv_slot_bytes == sum(numbers) * room * 2
    # What is made anew is on the device, some sequences at a time.
    more = anew.workspace_bytes - kept.workspace_bytes
    assert more >= anew.recomputed_sequences * room * (2 * OPT_125M.kv_size + OPT_125M.hidden_size) * 2


def test_the_engine_takes_the_host_memory_that_was_planned(own_keys: Any, tmp_path: Path) -> None:
    model = own_keys("opt")
    policy = Policy(micro_batch_size=3, num_micro_batches=2, weights=ON_CPU, kv_cache=ON_CPU, recompute=0.5)
    plan = place(model.spec, policy)
    _, stats = generated(model, policy, tmp_path)
    # Regions begin on pages of their own; without an accelerator the slots are there too.
    assert 0 <= stats.host_bytes - plan.cpu_bytes - plan.slot_bytes < 64 * 4096


def test_without_it_a_plan_is_what_it_was() -> None:
    plan = place(OPT_125M, Policy(micro_batch_size=6, kv_cache=HALF))
    assert plan.input_bytes == plan.recomputed_sequences == 0
    assert all(split.inputs == 0 for row in plan.kv_splits for split in row)


def test_layers_and_micro_batches_keep_as_many_inputs() -> None:
    splits = keep_inputs([Split(gpu=1, cpu=5, disk=1)] * 8, 0.3)
    assert {split.inputs for split in splits} == {1, 2}
    assert sum(split.inputs for split in splits) == 12
    assert {split.count for split in splits} == {7}


def test_pieces_are_all_sequences_once() -> None:
    segment = InputSegment(2, 9, torch.arange(7)[None, :, None], at_once=3)
    assert [(piece.start, piece.stop) for piece in segment.pieces()] == [(2, 5), (5, 8), (8, 9)]
    assert torch.equal(torch.cat([piece.x_SBD for piece in segment.pieces()], dim=1), segment.x_SBD)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"recompute": 1.5}, r"between 0 and 1, not 1\.5"),
        ({"recompute": -0.1}, r"between 0 and 1, not -0\.1"),
        ({"recompute": 0.5, "kv_bits": 4}, r"turn off either recompute \(0\) or kv_bits"),
        ({"recompute": 0.5, "attn_sparsity": 0.3}, r"turn off either recompute \(0\) or attn_sparsity \(1\)"),
    ],
)
def test_what_rules_it_out_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(PolicyError, match=text):
        Policy(micro_batch_size=1, **change)


def test_shared_keys_leave_nothing_to_save() -> None:
    spec = ModelSpec.from_hf_config(published_config("Meta-Llama-3-8B"), "llama-3")
    with pytest.raises(PolicyError, match=r"llama-3: .* 4096 numbers .* 2048: .*turn recompute off \(0\)"):
        place(spec, Policy(micro_batch_size=1, kv_cache=ON_CPU, recompute=0.5))
