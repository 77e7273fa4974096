"""What goes wrong: slow copies, failing disks, damaged packs, wrong checkpoints. Never a hang, never a wrong token."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel, prompts

from flexllmgen.checkpoint import SafetensorsCheckpoint
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import CheckpointError, OffloadDirError
from flexllmgen.memory.disk import DirectFile
from flexllmgen.memory.pack import WeightPack
from flexllmgen.memory.transfer import Event, Lane
from flexllmgen.policy import ON_CPU, Placement, Policy
from flexllmgen.workload import Workload

MIXED = Placement(gpu=0.3, cpu=0.3, disk=0.4)
POLICY = Policy(
    micro_batch_size=2, num_micro_batches=3, weights=MIXED, kv_cache=MIXED, activations=MIXED, overlap=2
)
WORK = Workload(num_sequences=6, prompt_tokens=9, gen_tokens=6)


def load(model: TinyModel, folder: Path, **options: Any) -> FlexEngine:
    return FlexEngine.load(
        model.spec, model.checkpoint, POLICY, workload=WORK, device="cpu", offload_dir=folder, **options
    )


def generate(engine: FlexEngine) -> torch.Tensor:
    ids, mask = prompts(6, 9, padded=True)
    return torch.stack(list(engine.generate(ids, mask)), dim=1)


def packed(folder: Path) -> list[Path]:
    return sorted(folder.glob("weights-*/*.bin"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("in_place", [True, False])
def test_tokens_do_not_depend_on_how_long_copies_take(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool, seed: int
) -> None:
    model = tiny("llama")
    ids, mask = prompts(6, 9, padded=True)
    want, _ = model.greedy(ids, mask, 6)
    delays, submit, read = random.Random(seed), Lane.submit, DirectFile.read

    def slow(self: Lane, work: Callable[[], None], after: Iterable[Event | None] = ()) -> Event:
        wait = delays.choice((0, 0, 0.002, 0.006))

        def later() -> None:
            time.sleep(wait)
            work()

        return submit(self, later, after)

    @torch.inference_mode()
    def slow_read(self: DirectFile, target: torch.Tensor, offset: int) -> None:
        time.sleep(random.random() * 0.004)
        target.fill_(255)  # Whoever reads before the disk has answered gets NaN.
        read(self, target, offset)

    monkeypatch.setattr(Lane, "submit", slow)
    monkeypatch.setattr(DirectFile, "read", slow_read)
    with load(model, tmp_path, in_place=in_place) as engine:
        assert torch.equal(generate(engine), want)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("fails_at", [1, 7, 40])
def test_a_failing_reader_ends_the_run_with_its_error(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    with load(tiny("opt"), tmp_path) as engine:
        want = generate(engine)
        left, read = [fails_at], DirectFile.read

        def broken(self: DirectFile, target: torch.Tensor, offset: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OffloadDirError("the disk is gone")
            read(self, target, offset)

        monkeypatch.setattr(DirectFile, "read", broken)
        with pytest.raises(OffloadDirError, match="the disk is gone"):
            generate(engine)
        monkeypatch.setattr(DirectFile, "read", read)
        assert torch.equal(generate(engine), want), "the engine is whole again"


@pytest.mark.timeout(30)
def test_a_failing_writer_ends_the_run_with_its_error(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    with load(tiny("opt"), tmp_path) as engine:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(OffloadDirError, match="no space left"):
            generate(engine)


@pytest.mark.parametrize("kv_cache", [ON_CPU, Placement(gpu=0.5, cpu=0.5)], ids=["host", "half"])
def test_what_fails_on_the_cpu_ends_the_block_and_not_the_engine(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_cache: Placement
) -> None:
    """Each micro-batch's attention fails; the error comes once, and the next block knows nothing of them."""
    model = tiny("llama")
    ids, _ = prompts(4, 9, padded=False)
    policy = Policy(micro_batch_size=1, num_micro_batches=4, kv_cache=kv_cache, cpu_attention=True)
    workload = Workload(num_sequences=4, prompt_tokens=9, gen_tokens=6)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no attention today")

    with FlexEngine.load(
        model.spec, model.checkpoint, policy, workload=workload, device="cpu", in_place=False
    ) as engine:
        want = torch.stack(list(engine.generate(ids)), dim=1)
        with monkeypatch.context() as patched:
            patched.setattr("flexllmgen.host_attention.prepare_attention", lambda *_, **__: broken)
            with pytest.raises(RuntimeError, match="no attention today") as caught:
                list(engine.generate(ids))
        assert caught.value.__context__ is None, "no second error on the way out"
        assert torch.equal(torch.stack(list(engine.generate(ids)), dim=1), want)


def test_the_kernel_is_built_before_the_first_step(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("flexllmgen.host_attention.available", lambda _: asked.append("kernel"))
    model = tiny("llama")
    for cpu_attention, want in ((False, []), (True, ["kernel"])):
        policy = Policy(micro_batch_size=6, kv_cache=ON_CPU, cpu_attention=cpu_attention)
        FlexEngine.load(
            model.spec, model.checkpoint, policy, workload=WORK, device="cpu", in_place=False
        ).close()
        assert asked == want


def test_packed_layers_are_used_again(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny("opt"), tmp_path) as engine:
        want = generate(engine)
    before = {path: path.stat().st_mtime_ns for path in packed(tmp_path)}
    assert before
    monkeypatch.setattr(WeightPack, "write", lambda *_: pytest.fail("packed twice"))
    with load(tiny("opt"), tmp_path) as engine:
        assert torch.equal(generate(engine), want)
    assert before == {path: path.stat().st_mtime_ns for path in packed(tmp_path)}


def test_another_model_or_cut_is_another_pack(tiny: Any, tmp_path: Path) -> None:
    for name in ("opt", "opt-350m"):
        load(tiny(name), tmp_path).close()
    model, policy = tiny("opt"), Policy(micro_batch_size=6, weights=Placement(cpu=0.5, disk=0.5))
    FlexEngine.load(
        model.spec, model.checkpoint, policy, workload=WORK, device="cpu", offload_dir=tmp_path
    ).close()
    assert len(list(tmp_path.glob("weights-*"))) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "trailer"])
def test_a_damaged_pack_is_found_and_made_again(tiny: Any, tmp_path: Path, damage: str) -> None:
    with load(tiny("qwen3"), tmp_path) as engine:
        want = generate(engine)
    path = packed(tmp_path)[1]
    whole = path.read_bytes()
    broken = {
        "flip": whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
        "cut": whole[: len(whole) - 4096],
        "empty": b"",
        "trailer": whole[:-4096] + b"\0" * 4096,
    }
    path.write_bytes(broken[damage])
    with load(tiny("qwen3"), tmp_path) as engine:
        assert torch.equal(generate(engine), want)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_leaves_nothing_behind(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls, write = [0], os.pwritev

    def full(*args: Any) -> int:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, "no space")
        return write(*args)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OffloadDirError, match=r"no space left.*free some or choose another"):
        load(tiny("opt"), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_packing_at_once_share_one_pack(tiny: Any, tmp_path: Path) -> None:
    def one(_: int) -> torch.Tensor:
        with load(tiny("qwen2"), tmp_path) as engine:
            return generate(engine)

    tiny("qwen2")
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(one, range(3))
    assert all(torch.equal(first, other) for other in others)
    assert len(list(tmp_path.glob("weights-*"))) == 1
    assert not list(tmp_path.glob("weights-*/.*.tmp"))


def test_half_written_files_of_a_killed_process_are_swept(tiny: Any, tmp_path: Path) -> None:
    load(tiny("opt"), tmp_path).close()
    orphan = packed(tmp_path)[0].parent / ".layer-0-12345.tmp"
    orphan.write_bytes(b"half")
    load(tiny("opt"), tmp_path).close()
    assert not orphan.exists()


def test_an_offload_directory_that_cannot_be_written_is_named(tiny: Any, tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    with pytest.raises(OffloadDirError, match="file"):
        load(tiny("opt"), occupied)


def changed(model: TinyModel, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(model.folder / "model.safetensors")
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def try_loading(model: TinyModel, folder: Path) -> None:
    FlexEngine.load(
        model.spec, SafetensorsCheckpoint(folder), Policy(micro_batch_size=6), workload=WORK, device="cpu"
    ).close()


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def test_missing_tensors_are_named(tiny: Any, tmp_path: Path) -> None:
    folder = changed(tiny("llama"), tmp_path / "a", lambda tensors: tensors.pop(K_PROJ))
    with pytest.raises(CheckpointError, match=f"missing {K_PROJ}"):
        try_loading(tiny("llama"), folder)


def test_unexpected_tensors_are_named(tiny: Any, tmp_path: Path) -> None:
    folder = changed(
        tiny("llama"), tmp_path / "a", lambda tensors: tensors.update({"model.more": torch.ones(2)})
    )
    with pytest.raises(CheckpointError, match=r"unexpected model\.more"):
        try_loading(tiny("llama"), folder)


@pytest.mark.parametrize("shape", [(16, 33), (17, 32), (16,)])
def test_wrongly_shaped_tensors_are_named(tiny: Any, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = changed(
        tiny("llama"), tmp_path / "a", lambda tensors: tensors.update({K_PROJ: torch.ones(shape)})
    )
    with pytest.raises(CheckpointError, match=r"wrongly shaped .*layers\.1\.self_attn\.k_proj"):
        try_loading(tiny("llama"), folder)


def test_a_damaged_file_and_an_absent_shard_are_named(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_shards_are_read_through_their_index(tiny: Any, tmp_path: Path) -> None:
    model = tiny("qwen3-moe")
    model.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ids, _ = prompts(6, 9, padded=False)
    want, _ = model.greedy(ids, None, 6)
    with FlexEngine.load(
        model.spec,
        SafetensorsCheckpoint(tmp_path / "shards"),
        Policy(micro_batch_size=6),
        workload=WORK,
        device="cpu",
    ) as engine:
        assert torch.equal(torch.stack(list(engine.generate(ids)), dim=1), want)
