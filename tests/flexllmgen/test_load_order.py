"""What loads wait for, and that nothing is started that moves nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from test_parity import PROMPT, SEQUENCES, TOKENS
from tiny_models import TinyModel, prompts

from flexllmgen.activations import ActivationStore
from flexllmgen.engine import FlexEngine
from flexllmgen.kv_cache import KVCache
from flexllmgen.memory.tiers import TieredBlocks
from flexllmgen.memory.transfer import Event
from flexllmgen.policy import ON_CPU, ON_GPU, Placement, Policy
from flexllmgen.weights import WeightStore
from flexllmgen.workload import Workload


def generate(model: TinyModel, policy: Policy) -> None:
    ids, mask = prompts(SEQUENCES, PROMPT, padded=False)
    workload = Workload(num_sequences=SEQUENCES, prompt_tokens=PROMPT, gen_tokens=TOKENS)
    want, _ = model.greedy(ids, mask, TOKENS)
    with FlexEngine.load(
        model.spec, model.checkpoint, policy, workload=workload, device="cpu", in_place=False
    ) as engine:
        assert torch.equal(torch.stack(list(engine.generate(ids, mask)), dim=1), want)


@pytest.mark.parametrize(("kv_cache", "activations"), [(ON_CPU, ON_GPU), (ON_GPU, ON_CPU), (ON_CPU, ON_CPU)])
def test_weights_come_after_what_was_asked_for_just_before_them(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, kv_cache: Placement, activations: Placement
) -> None:
    """A copy engine takes one stream's queue to its end: KV behind the whole of a layer would come too late."""
    asked: list[Event] = []
    waited_for: list[int] = []
    load_kv, load_hidden, load_weights = KVCache.load, ActivationStore.load, WeightStore.load

    def kv(self: KVCache, layer: int, micro_batch: int, slot: int, positions: int) -> None:
        load_kv(self, layer, micro_batch, slot, positions)
        asked.extend(self.ready(slot, prompt=False))

    def hidden(self: ActivationStore, micro_batch: int, slot: int) -> None:
        load_hidden(self, micro_batch, slot)
        asked.extend(self.ready(slot, first_stage=False))

    def weights(self: WeightStore, *args: Any, after: Iterable[Event] = (), **more: Any) -> Event:
        assert list(after) == asked
        waited_for.append(len(asked))
        asked.clear()
        return load_weights(self, *args, after=after, **more)

    monkeypatch.setattr(KVCache, "load", kv)
    monkeypatch.setattr(ActivationStore, "load", hidden)
    monkeypatch.setattr(WeightStore, "load", weights)
    model = tiny("opt")
    policy = Policy(
        micro_batch_size=2, num_micro_batches=3, weights=ON_CPU, kv_cache=kv_cache, activations=activations
    )
    generate(model, policy)
    # A prompt's KV is not loaded, nor has the head any.
    assert sum(count > 0 for count in waited_for) > len(waited_for) / 3


def test_no_load_or_store_moves_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the host a while. Of what the CPU attends to steps move nothing, of the others only inputs."""
    moved: list[int] = []
    load, store = TieredBlocks.load, TieredBlocks.store

    def loading(self: TieredBlocks, block: int, slot: int, cpu_bytes: int, disk_bytes: int) -> Event:
        moved.append(cpu_bytes + disk_bytes)
        return load(self, block, slot, cpu_bytes, disk_bytes)

    def storing(
        self: TieredBlocks,
        block: int,
        slot: int,
        cpu: list[tuple[int, int]],
        disk: tuple[int, int],
        after: Event,
    ) -> Event:
        moved.append(sum(stop - start for start, stop in (*cpu, disk)))
        return store(self, block, slot, cpu, disk, after)

    monkeypatch.setattr(TieredBlocks, "load", loading)
    monkeypatch.setattr(TieredBlocks, "store", storing)
    # One sequence of each two has its inputs kept, and of three none but the first.
    for share, size in ((0.5, 2), (0.2, 3)):
        policy = Policy(
            micro_batch_size=size,
            num_micro_batches=SEQUENCES // size,
            kv_cache=ON_CPU,
            cpu_attention=True,
            recompute=share,
        )
        generate(tiny("opt"), policy)
    assert moved
    assert min(moved) > 0
