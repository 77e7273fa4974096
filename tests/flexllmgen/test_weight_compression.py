"""Compressed weights: exactly what the model computes whose weights were quantised and turned back, wherever they lie."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import MIXED, PLACEMENTS, PROMPT, SEQUENCES, TOKENS, Recorder
from tiny_models import TINY, TinyModel, make_tiny, prompts

from flexllmgen import checkpoint as checkpoints
from flexllmgen import dequantising, filling
from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.compression import compressed_bytes, dequantise, quantise
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import CheckpointError, PolicyError
from flexllmgen.filling import fill_by_windows, fill_on_host
from flexllmgen.images import Image, pack, streamed_parts
from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload

WORKLOAD = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
MATRICES = ("qkv.weight", "out.weight", "up.weight", "gate_up.weight", "down.weight")


class _TurnedBack:
    """A checkpoint whose layers' matrices were quantised and turned back."""

    def __init__(self, inner: Any, bits: int, group_size: int) -> None:
        self.inner, self.bits, self.group_size = inner, bits, group_size
        self.fingerprint = f"{inner.fingerprint} turned back"

    def validate(self, spec: ModelSpec) -> None:
        self.inner.validate(spec)

    def fill(self, spec: ModelSpec, layer: int, name: str, target: torch.Tensor) -> None:
        self.inner.fill(spec, layer, name, target)
        if layer >= 0 and (name in MATRICES or name.startswith("experts.")):
            dequantise(*quantise(target, self.bits, self.group_size), self.bits, self.group_size, target)


def _run(
    model: TinyModel,
    checkpoint: Any,
    policy: Policy,
    folder: Path | None,
    *,
    padded: bool = True,
    **load: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, their logits, and the prompts' scores."""
    ids, mask = prompts(SEQUENCES, PROMPT, padded=padded)
    recorder = Recorder()
    with FlexEngine.load(
        model.spec, checkpoint, policy, workload=WORKLOAD, device="cpu", offload_dir=folder, **load
    ) as engine:
        tokens = torch.stack(list(engine.generate(ids, mask, sampling=recorder)), dim=1)
        return tokens, recorder.logits(), engine.score(ids, mask)


def _check(model: TinyModel, policy: Policy, tmp_path: Path, **load: Any) -> None:
    assert policy.weight_bits is not None
    turned_back = _TurnedBack(model.checkpoint, policy.weight_bits, policy.weight_group_size)
    got = _run(model, model.checkpoint, policy, tmp_path, **load)
    want = _run(model, turned_back, replace(policy, weight_bits=None), tmp_path, **load)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("placement", ["device", "host", "disk", "mixed-all"])
@pytest.mark.parametrize("name", TINY)
def test_the_same_as_weights_that_were_turned_back(
    tiny: Any, tmp_path: Path, name: str, placement: str, bits: int
) -> None:
    policy = Policy(micro_batch_size=3, num_micro_batches=2, weight_bits=bits, **PLACEMENTS[placement])
    _check(tiny(name), policy, tmp_path)


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("sep_layer", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["opt-350m", "mixtral"])
def test_depth_halves_and_copies_change_nothing(
    tiny: Any, tmp_path: Path, name: str, in_place: bool, sep_layer: bool, overlap: int
) -> None:
    policy = Policy(
        micro_batch_size=2,
        num_micro_batches=3,
        overlap=overlap,
        sep_layer=sep_layer,
        weight_bits=4,
        weight_group_size=128,
        **PLACEMENTS["mixed-all"],
    )
    _check(tiny(name), policy, tmp_path, in_place=in_place)


@pytest.mark.parametrize("sep_layer", [False, True])
@pytest.mark.parametrize("name", ["opt", "qwen3-moe"])
def test_while_the_cpu_attends(tiny: Any, tmp_path: Path, name: str, sep_layer: bool) -> None:
    policy = Policy(
        micro_batch_size=2,
        num_micro_batches=3,
        weights=Placement(gpu=0.4, cpu=0.6),
        kv_cache=Placement(gpu=0.5, cpu=0.5),
        cpu_attention=True,
        sep_layer=sep_layer,
        weight_bits=4,
    )
    _check(tiny(name), policy, tmp_path, in_place=False)


@pytest.mark.parametrize("in_place", [False, True])
def test_beside_a_compressed_cache(tiny: Any, tmp_path: Path, in_place: bool) -> None:
    policy = Policy(
        micro_batch_size=3, num_micro_batches=2, weight_bits=4, kv_bits=4, **PLACEMENTS["mixed-all"]
    )
    _check(tiny("llama3"), policy, tmp_path, in_place=in_place)


@pytest.mark.parametrize("placement", [ON_CPU, MIXED], ids=["host", "mixed"])
def test_other_number_types(tiny: Any, tmp_path: Path, placement: Placement) -> None:
    policy = Policy(micro_batch_size=6, weights=placement, weight_bits=8)
    _check(tiny("llama"), policy, tmp_path, dtype="bfloat16", in_place=False)


@pytest.mark.parametrize("bits", [8, 4])
def test_near_the_model_itself(tiny: Any, bits: int) -> None:
    """The logits move, and not far: what parity with turned-back weights alone would not show."""
    model = tiny("qwen3")
    plain = _run(model, model.checkpoint, Policy(micro_batch_size=6), None)[2]
    lossy = _run(model, model.checkpoint, Policy(micro_batch_size=6, weight_bits=bits), None)[2]
    off = (plain - lossy).abs().mean()
    assert 0 < off < (0.02 if bits == 8 else 0.5)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_once_for_each_stage_and_step(tiny: Any, monkeypatch: pytest.MonkeyPatch, micro_batches: int) -> None:
    model, calls = tiny("opt"), []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args[-1].shape)
        return dequantise(*args)

    monkeypatch.setattr(dequantising, "dequantise", counted)
    policy = Policy(micro_batch_size=6 // micro_batches, num_micro_batches=micro_batches, weight_bits=4)
    ids, _ = prompts(SEQUENCES, PROMPT, padded=False)
    with FlexEngine.load(model.spec, model.checkpoint, policy, workload=WORKLOAD, device="cpu") as engine:
        list(engine.generate(ids, max_new_tokens=3))
    assert len(calls) == 3 * model.spec.num_layers * 4


def test_neighbouring_experts_are_turned_back_together(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny("mixtral"), []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args[-1].shape)
        return dequantise(*args)

    monkeypatch.setattr(dequantising, "dequantise", counted)
    policy = Policy(micro_batch_size=6, weight_bits=4)
    ids, _ = prompts(SEQUENCES, PROMPT, padded=False)
    with FlexEngine.load(model.spec, model.checkpoint, policy, workload=WORKLOAD, device="cpu") as engine:
        list(engine.generate(ids, max_new_tokens=1))
    assert len(calls) == model.spec.num_layers * 4
    assert sum(len(shape) == 3 and shape[0] == 4 for shape in calls) == model.spec.num_layers * 2


# Bytes


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 128)])
@pytest.mark.parametrize("name", ["opt-125m", "Mixtral-8x7B-v0.1"])
def test_only_the_layers_matrices_are_compressed(name: str, bits: int, group_size: int) -> None:
    spec = ModelSpec.from_hf_config(published_config(name), name)
    policy = Policy(micro_batch_size=1, weight_bits=bits, weight_group_size=group_size)
    plain, _ = pack(spec, replace(policy, weight_bits=None), 2)
    images, _ = pack(spec, policy, 2)
    for image, before in zip(images, plain, strict=True):
        assert image.compressed == (image.layer >= 0)
        assert not before.compressed
        for key, tensor in image.tensors.items():
            matrix = image.layer >= 0 and len(tensor.shape) == 2 and key != "router.weight"
            assert tensor.bits == (bits if matrix else None), key
            want = (
                compressed_bytes(tensor.shape, bits, group_size) if matrix else before.tensors[key].num_bytes
            )
            assert tensor.num_bytes == want
    small = images[2].num_bytes / plain[2].num_bytes
    # 4 bytes for each group, beside the codes.
    assert small == pytest.approx((bits + 32 / group_size) / 16, rel=0.01)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("weights", [ON_CPU, MIXED], ids=["host", "mixed"])
def test_an_engine_takes_the_bytes_planned(tmp_path: Path, weights: Placement, in_place: bool) -> None:
    # Large enough for pages not to matter.
    model = make_tiny("llama", tmp_path / "model", hidden_size=128, intermediate_size=256, head_dim=32)
    lossy = Policy(micro_batch_size=6, weight_bits=4, weights=weights)
    held, planned = [], []
    for policy in (lossy, replace(lossy, weight_bits=None)):
        plan = plan_placement(model.spec, policy, WORKLOAD, 4, in_place=in_place)
        # Without an accelerator the slots lie in host memory, and disk parts are read straight into them.
        planned.append((plan.weights.gpu if in_place else 0) + plan.weights.cpu + plan.slot_bytes)
        with FlexEngine.load(
            model.spec,
            model.checkpoint,
            policy,
            workload=WORKLOAD,
            device="cpu",
            offload_dir=tmp_path / "offload",
            in_place=in_place,
        ) as engine:
            held.append(engine.stats().host_bytes)
        layer = model.spec.layer_weight_bytes(4) if policy.weight_bits else 0
        assert 0.9 * layer <= plan.dequantised_bytes <= layer
        # It counts where the slots do.
        others = plan.weights.cpu + plan.staging_bytes + plan.kv_cache.cpu + plan.activations.cpu
        on_device = plan.weights.gpu + plan.kv_cache.gpu + plan.activations.gpu + plan.workspace_bytes
        assert plan.cpu_bytes - others == (plan.slot_bytes if in_place else 0)
        assert plan.gpu_bytes - on_device == (0 if in_place else plan.slot_bytes)
        assert plan.slot_bytes >= plan.dequantised_bytes + plan.weight_slots * plan.weight_slot_bytes
    # What both have cancels; each region is rounded to whole pages.
    off = (held[0] - held[1]) - (planned[0] - planned[1])
    assert abs(off) <= 4096 * 10
    assert abs(planned[0] - planned[1]) > 4096 * 10


def test_streamed_bytes_are_the_compressed_ones(tiny: Any) -> None:
    model = tiny("opt")
    moved = {}
    for bits in (None, 8, 4):
        policy = Policy(micro_batch_size=6, weights=ON_CPU, weight_bits=bits)
        ids, _ = prompts(SEQUENCES, PROMPT, padded=False)
        with FlexEngine.load(
            model.spec, model.checkpoint, policy, workload=WORKLOAD, device="cpu", in_place=False
        ) as engine:
            list(engine.generate(ids, max_new_tokens=1))
            moved[bits] = engine.stats().h2d_bytes
            plan = engine.placement
            # A table shared by embedding and head is streamed for both.
            planned = sum(
                streamed_parts(plan.images[index], in_place=False, embedding=stage.kind == "embed").cpu
                for stage in plan.stages
                for index in stage.images
            )
            assert moved[bits] == planned
    assert moved[None] > moved[8] > moved[4]


# Filling


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("cuts", [(0.0, 1.0), (0.3, 0.7)])
def test_random_weights_are_the_same_made_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch, cuts: tuple[float, float], bits: int, group_size: int
) -> None:
    monkeypatch.setattr(checkpoints, "PIECE_NUMBERS", 10_000)
    monkeypatch.setattr(filling, "PIECE_NUMBERS", 10_000)
    monkeypatch.setattr(filling, "_CPU_QUANTISED_NUMBERS", 3_000)
    # Rows that are no multiple of a group, and pieces that end within a row.
    config = {**published_config("opt-125m"), "num_hidden_layers": 1, "vocab_size": 700, "ffn_dim": 1100}
    spec = ModelSpec.from_hf_config(config, "opt")
    random, device, dtype = RandomCheckpoint(seed=3), torch.device("cpu"), torch.float32
    policy = Policy(micro_batch_size=1, weight_bits=bits, weight_group_size=group_size)
    for image in pack(spec, policy, dtype.itemsize)[0]:
        whole = torch.zeros(image.num_bytes, dtype=torch.uint8)
        fill_on_host(random, spec, image, whole, device=device, dtype=dtype)
        edges = [0, *(int(image.num_bytes * cut) // 256 * 256 for cut in cuts), image.num_bytes]
        parts = [
            (start, stop, torch.zeros(stop - start, dtype=torch.uint8))
            for start, stop in itertools.pairwise(edges)
        ]
        fill_by_windows(random, image, parts, device=device, dtype=dtype)
        assert torch.equal(torch.cat([part for _, _, part in parts]), whole)


# The cache


def _quantised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that are made from the checkpoint from now on."""
    made: list[str] = []
    inner = fill_on_host

    def counted(checkpoint: Any, spec: ModelSpec, image: Image, *args: Any, **named: Any) -> None:
        made.append(image.name)
        inner(checkpoint, spec, image, *args, **named)

    monkeypatch.setattr("flexllmgen.loading.fill_on_host", counted)
    return made


def test_what_was_quantised_is_found_again(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = tiny("qwen2"), _quantised(monkeypatch)
    policy = Policy(micro_batch_size=6, weight_bits=4, weights=ON_CPU)
    first = _run(model, model.checkpoint, policy, tmp_path)
    layers = {name for name in made if name.startswith("layer")}
    assert len(layers) == model.spec.num_layers
    made.clear()
    again = _run(model, model.checkpoint, policy, tmp_path)
    assert not layers & set(made)
    assert torch.equal(first[1], again[1])
    # Other shares find it too: it holds whole layers.
    elsewhere = _run(model, model.checkpoint, replace(policy, weights=MIXED), tmp_path)
    assert not layers & set(made)
    assert torch.equal(first[1], elsewhere[1])
    # Other bits do not.
    _run(model, model.checkpoint, replace(policy, weight_bits=8), tmp_path)
    assert layers <= set(made)
    assert len(list(tmp_path.glob("quantised-*"))) == 2


def test_damaged_files_are_made_again(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, made = tiny("qwen2"), _quantised(monkeypatch)
    policy = Policy(micro_batch_size=6, weight_bits=4)
    first = _run(model, model.checkpoint, policy, tmp_path)
    path = next(tmp_path.glob("quantised-*/layer-1.bin"))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    made.clear()
    again = _run(model, model.checkpoint, policy, tmp_path)
    assert [name for name in made if name.startswith("layer")] == ["layer-1"]
    assert "is damaged" in caplog.text
    assert torch.equal(first[1], again[1])
    assert path.read_bytes() != bytes(data)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, CheckpointError])
def test_an_interrupted_start_keeps_the_layers_that_are_whole(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: type[BaseException]
) -> None:
    model, policy = tiny("qwen2"), Policy(micro_batch_size=6, weight_bits=4, weights=ON_CPU)
    want = _run(model, model.checkpoint, policy, None)
    last = f"layer-{model.spec.num_layers - 1}"
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)

    def stops(checkpoint: Any, spec: ModelSpec, image: Image, *args: Any, **named: Any) -> None:
        if image.name == last:
            raise problem
        fill_on_host(checkpoint, spec, image, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr("flexllmgen.loading.fill_on_host", stops)
        with pytest.raises(problem):
            _run(model, model.checkpoint, policy, tmp_path)
    kept = {path.stem for path in tmp_path.glob("quantised-*/*.bin")}
    assert kept == {f"layer-{index}" for index in range(model.spec.num_layers - 1)}
    made = _quantised(monkeypatch)
    got = _run(model, model.checkpoint, policy, tmp_path)
    assert {name for name in made if name.startswith("layer")} == {last}
    assert torch.equal(got[1], want[1])


def test_a_half_written_layer_is_not_trusted(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that is killed while it writes a file leaves it under another name; the next one makes that layer anew."""
    model, policy = tiny("qwen2"), Policy(micro_batch_size=6, weight_bits=4, weights=ON_CPU)
    want = _run(model, model.checkpoint, policy, tmp_path)
    (path,) = tmp_path.glob("quantised-*/layer-1.bin")
    half = path.with_name(".layer-1-12345.tmp")
    half.write_bytes(path.read_bytes()[:5000])
    path.unlink()
    made = _quantised(monkeypatch)
    got = _run(model, model.checkpoint, policy, tmp_path)
    assert {name for name in made if name.startswith("layer")} == {"layer-1"}
    assert torch.equal(got[1], want[1])
    assert path.exists()
    assert not half.exists()


def test_whole_layers_on_disk_are_kept_once(tiny: Any, tmp_path: Path) -> None:
    model = tiny("qwen2")
    _run(model, model.checkpoint, Policy(micro_batch_size=6, weight_bits=4, weights=ON_DISK), tmp_path)
    assert not list(tmp_path.glob("quantised-*"))
    assert list(tmp_path.glob("weights-*/layer-0.bin"))


def test_no_room_is_no_failure(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("qwen2")
    monkeypatch.setattr(
        "flexllmgen.quantised_cache.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    with caplog.at_level(logging.WARNING):
        _run(model, model.checkpoint, Policy(micro_batch_size=6, weight_bits=4), tmp_path)
    assert "not kept" in caplog.text
    assert not list(tmp_path.glob("quantised-*/*.bin"))


def test_a_folder_that_cannot_be_written_is_no_failure(
    tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = tiny("qwen2"), tmp_path / "file"
    file.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        _run(model, model.checkpoint, Policy(micro_batch_size=6, weight_bits=4), file)
    assert "not kept" in caplog.text


def test_random_weights_are_not_kept(tiny: Any, tmp_path: Path) -> None:
    model = tiny("qwen2")
    _run(model, RandomCheckpoint(), Policy(micro_batch_size=6, weight_bits=4), tmp_path)
    assert not list(tmp_path.iterdir())


def test_policies_name_the_way_out() -> None:
    with pytest.raises(PolicyError, match="weight_bits must be 8 or 4, not 5"):
        Policy(micro_batch_size=1, weight_bits=5)
    with pytest.raises(PolicyError, match="weight_group_size must be 64 or 128, not 32"):
        Policy(micro_batch_size=1, weight_bits=4, weight_group_size=32)
    assert Policy(micro_batch_size=1).lossless
    assert not Policy(micro_batch_size=1, weight_bits=8).lossless
