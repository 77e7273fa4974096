"""Steps that bring in only the experts that were chosen: transformers' tokens, and fewer bytes moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import PLACEMENTS, check
from tiny_models import TinyModel, make_tiny, prompts

from flexllmgen import dequantising
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import PolicyError
from flexllmgen.images import expert_bytes, experts_from
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.weights import WeightStore
from flexllmgen.workload import Workload

MODELS = ["mixtral", "qwen3-moe"]
PROMPT, TOKENS = 9, 5


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Sixteen experts, two for a token: a step of one sequence leaves most of them where they are."""
    return make_tiny("qwen3-moe", tmp_path_factory.mktemp("wide"), num_experts=16)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_and_logits_are_those_of_transformers(
    tiny: Any, tmp_path: Path, name: str, placement: str, padded: bool
) -> None:
    for micro_batch in (6, 2):
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=6 // micro_batch,
            chosen_experts=True,
            **PLACEMENTS[placement],
        )
        check(tiny(name), policy, tmp_path, padded=padded, in_place=False)


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("sep_layer", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_depth_halves_and_copies_change_nothing(
    wide: TinyModel, tmp_path: Path, in_place: bool, sep_layer: bool, overlap: int
) -> None:
    for micro_batch in (1, 2):
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=6 // micro_batch,
            overlap=overlap,
            sep_layer=sep_layer,
            chosen_experts=True,
            **PLACEMENTS["mixed-all"],
        )
        check(wide, policy, tmp_path, padded=True, in_place=in_place)


def test_beside_attention_on_the_cpu(wide: TinyModel, tmp_path: Path) -> None:
    for micro_batch, sep_layer in ((6, False), (2, False), (2, True)):
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=6 // micro_batch,
            sep_layer=sep_layer,
            weights=Placement(gpu=0.2, cpu=0.5, disk=0.3),
            kv_cache=Placement(gpu=0.5, cpu=0.5),
            cpu_attention=True,
            chosen_experts=True,
        )
        check(wide, policy, tmp_path, padded=True, in_place=False)


def _run(
    model: TinyModel, policy: Policy, folder: Path, sequences: int, *, in_place: bool = False
) -> tuple[torch.Tensor, list[dict[str, int]]]:
    """Tokens, and what was moved up and read by the end of each pass."""
    ids, _ = prompts(sequences, PROMPT, padded=False)
    workload = Workload(num_sequences=sequences, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    columns, moved = [], []
    with FlexEngine.load(
        model.spec,
        model.checkpoint,
        policy,
        workload=workload,
        device="cpu",
        offload_dir=folder,
        in_place=in_place,
    ) as engine:
        for column in engine.generate(ids):
            columns.append(column)
            stats = engine.stats()
            moved.append({"h2d": stats.h2d_bytes, "disk_read": stats.disk_read_bytes})
    return torch.stack(columns, dim=1), moved


@pytest.mark.parametrize("weights", [ON_CPU, Placement(gpu=0.6, cpu=0.4)], ids=["host", "some"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_a_step_moves_the_experts_chosen_and_what_comes_before_them(
    wide: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Placement, sequences: int
) -> None:
    chosen: list[list[int]] = []
    bring = WeightStore.bring

    def noted(self: WeightStore, stage: int, slot: int, experts: Any) -> None:
        chosen.append([stage, *sorted(set(experts))])
        bring(self, stage, slot, experts)

    monkeypatch.setattr(WeightStore, "bring", noted)
    policy = Policy(micro_batch_size=sequences, weights=weights, overlap=0)
    workload = Workload(num_sequences=sequences, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    plan = plan_placement(wide.spec, policy, workload, 4)
    whole, all_moved = _run(wide, policy, tmp_path, sequences)
    assert not chosen
    few, moved = _run(
        wide,
        Policy(micro_batch_size=sequences, weights=weights, overlap=0, chosen_experts=True),
        tmp_path,
        sequences,
    )
    assert torch.equal(whole, few)
    steps = TOKENS - 1
    assert len(chosen) == steps * wide.spec.num_layers
    layers = wide.spec.num_layers
    for step in range(1, TOKENS):
        want = all_moved[step]["h2d"] - all_moved[step - 1]["h2d"]
        for stage, *experts in chosen[(step - 1) * layers : step * layers]:
            (index,) = plan.stages[stage].images
            image = plan.images[index]
            start = max(image.gpu_bytes, experts_from(image))
            want -= image.num_bytes - start
            for expert in experts:
                spans = [
                    (each.offset, each.end)
                    for name, each in image.tensors.items()
                    if name.startswith(f"experts.{expert}.")
                ]
                want += max(0, max(end for _, end in spans) - max(start, min(first for first, _ in spans)))
        assert moved[step]["h2d"] - moved[step - 1]["h2d"] == want
    assert moved[0] == all_moved[0]
    assert moved[-1]["h2d"] - moved[0]["h2d"] < 0.6 * (all_moved[-1]["h2d"] - all_moved[0]["h2d"])


@pytest.mark.parametrize("in_place", [False, True])
def test_from_disk_too_only_those_are_read(tmp_path: Path, in_place: bool) -> None:
    model = make_tiny("qwen3-moe", tmp_path / "model", num_experts=16, moe_intermediate_size=256)
    read = []
    tokens = []
    for chosen in (False, True):
        policy = Policy(micro_batch_size=1, weights=ON_DISK, overlap=0, chosen_experts=chosen)
        columns, moved = _run(model, policy, tmp_path, 1, in_place=in_place)
        tokens.append(columns)
        read.append(moved[-1]["disk_read"] - moved[0]["disk_read"])
    assert torch.equal(*tokens)
    assert read[1] < 0.4 * read[0]


def test_what_one_micro_batch_brought_in_serves_the_next(wide: TinyModel, tmp_path: Path) -> None:
    ups = []
    for micro_batch in (4, 1):
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=4 // micro_batch,
            weights=ON_CPU,
            overlap=0,
            chosen_experts=True,
        )
        _, moved = _run(wide, policy, tmp_path, 4)
        ups.append([each["h2d"] for each in moved])
    assert ups[0] == ups[1]


@pytest.mark.parametrize(
    "weights", [ON_CPU, ON_DISK, Placement(gpu=0.5, cpu=0.3, disk=0.2), Placement(gpu=1.0)]
)
def test_compressed_experts_are_turned_back_when_they_have_come(
    wide: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Placement
) -> None:
    dense = []
    dequantise = dequantising.dequantise

    def noted(*arguments: Any) -> None:
        dense.append(arguments[-1].numel())
        dequantise(*arguments)

    monkeypatch.setattr(dequantising, "dequantise", noted)
    tokens, numbers = [], []
    for micro_batch, chosen in ((3, False), (3, True), (1, True)):
        policy = Policy(
            micro_batch_size=micro_batch,
            num_micro_batches=3 // micro_batch,
            weights=weights,
            weight_bits=4,
            chosen_experts=chosen,
        )
        dense.clear()
        tokens.append(_run(wide, policy, tmp_path, 3)[0])
        numbers.append(sum(dense))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert numbers[1] == numbers[2] < 0.9 * numbers[0]


def test_sizes_are_those_of_whole_layers(wide: TinyModel) -> None:
    workload = Workload(num_sequences=2, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    shares = Placement(gpu=0.3, cpu=0.4, disk=0.3)
    plans = [
        plan_placement(
            wide.spec, Policy(micro_batch_size=2, weights=shares, chosen_experts=chosen), workload, 4
        )
        for chosen in (False, True)
    ]
    assert plans[0].gpu_bytes == plans[1].gpu_bytes
    assert plans[0].cpu_bytes == plans[1].cpu_bytes
    experts = expert_bytes(plans[1].images)
    counted = sum(
        each.num_bytes
        for image in plans[1].images
        for name, each in image.tensors.items()
        if name.startswith("experts.")
    )
    assert counted <= experts.total < 1.05 * counted


def test_a_dense_model_has_none_to_choose(tiny: Any) -> None:
    spec: ModelSpec = tiny("qwen3").spec
    workload = Workload(num_sequences=2, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    with pytest.raises(PolicyError, match="turn chosen_experts off"):
        plan_placement(spec, Policy(micro_batch_size=2, chosen_experts=True), workload, 4)


def test_distinct_experts_by_rows(wide: TinyModel) -> None:
    spec = wide.spec
    assert spec.expected_experts(1) == pytest.approx(2)
    generator = torch.Generator().manual_seed(0)
    for rows in (2, 8, 40):
        counts = [len(torch.rand(rows, 16, generator=generator).topk(2).indices.unique()) for _ in range(400)]
        assert spec.expected_experts(rows) == pytest.approx(sum(counts) / len(counts), rel=0.03)
