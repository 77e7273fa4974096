"""Rows of KV that the CPU attends to lie apart where they would meet in a cache; nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_codes_on_cpu import KV
from test_kv_compression import run
from test_parity import check
from tiny_models import make_tiny

from flexllmgen import workspace
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, Policy
from flexllmgen.spec import OPT_125M
from flexllmgen.units import PAGE
from flexllmgen.workload import Workload
from flexllmgen.workspace import apart

WAYS, SETS, LINE = 16, 2048, 64


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tiny models are as short as none that meet."""
    monkeypatch.setattr(workspace, "_ALIKE", 2)
    monkeypatch.setattr(workspace, "_LEAST_ROW", 0)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", ["opt", "llama3", "mistral"])
@pytest.mark.usefixtures("always")
def test_tokens_are_those_of_transformers(tiny: Any, tmp_path: Path, name: str, kv: str) -> None:
    policy = Policy(micro_batch_size=2, num_micro_batches=3, kv_cache=KV[kv], cpu_attention=True)
    for in_place in (False, True):
        check(tiny(name), policy, tmp_path, padded=True, in_place=in_place)


def test_codes_are_read_as_before(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = make_tiny("llama", tmp_path, head_dim=64)
    policy = Policy(micro_batch_size=3, num_micro_batches=2, kv_bits=8, kv_cache=ON_CPU, cpu_attention=True)
    tokens, logits = run(model, policy, tmp_path, in_place=False)
    request.getfixturevalue("always")
    apart_tokens, apart_logits = run(model, policy, tmp_path, in_place=False)
    assert torch.equal(tokens, apart_tokens)
    torch.testing.assert_close(apart_logits, logits, rtol=0, atol=0)


@pytest.mark.usefixtures("always")
def test_what_lies_between_rows_is_planned_on_the_host_alone() -> None:
    workload = Workload(num_sequences=4, prompt_tokens=20, gen_tokens=4)
    policy = Policy(micro_batch_size=4, kv_cache=ON_CPU, cpu_attention=True)
    on_host, streamed = (
        plan_placement(OPT_125M, each, workload, 2)
        for each in (policy, Policy(micro_batch_size=4, kv_cache=ON_CPU))
    )
    rows = OPT_125M.num_layers * on_host.max_context
    assert on_host.kv_cache.cpu - streamed.kv_cache.cpu == rows * PAGE
    resident, other = (
        plan_placement(OPT_125M, Policy(micro_batch_size=4, cpu_attention=asked), workload, 2)
        for asked in (True, False)
    )
    assert resident.kv_cache == other.kv_cache


@pytest.mark.parametrize("heads", [1, 4, 8, 12, 32, 56, 96])
@pytest.mark.parametrize("sequences", [1, 7, 16, 24, 32, 48, 64, 96, 128, 192])
def test_a_sequence_of_many_positions_fits_a_cache(heads: int, sequences: int) -> None:
    """Keys and values of a block, of up to 8 KB a row, never want more ways of a set than there are."""
    key = heads * 128 * 2
    row = apart(2 * sequences * key)
    if row < 64 << 10:
        return
    run, used = min(key, 8 << 10), [0] * SETS
    for position in range(32 if heads <= 8 else 16):  # A block of the kernel, with many queries a key or few.
        for half in (0, sequences * key):
            start = position * row + half
            for line in range(start // LINE, -(-(start + run) // LINE)):
                used[line % SETS] += 1
    assert max(used) <= WAYS
    assert row <= 2 * sequences * key * 17 / 16
