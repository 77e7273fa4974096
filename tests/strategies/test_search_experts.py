"""The search finds where it pays to bring in only the experts that were chosen."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB
from flexllmgen.workload import Workload
from profiling.cost_model import engine_cost
from strategies.choices import Limits
from strategies.search import Found, Objective, find_policy

sys.path.append(str(Path(__file__).parents[1] / "profiling"))
from machines import machine

SPEC = ModelSpec.from_hf_config({**published_config("qwen3-30b-a3b"), "num_hidden_layers": 8}, "qwen3-moe")
MACHINE = machine(SPEC)


def search(
    sequences: int, *, gpu: float = 4.0, objective: Objective = "throughput", lossy: bool = False
) -> Found:
    return find_policy(
        SPEC,
        MACHINE,
        Workload(num_sequences=sequences, prompt_tokens=64, gen_tokens=16),
        Limits(gpu_bytes=int(gpu * GiB), cpu_bytes=64 * GiB, disk_bytes=0),
        dtype_bytes=2,
        batch_size=min(sequences, 4),
        objective=objective,
        allow_lossy=lossy,
    )


@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("lossy", [False, True])
def test_few_sequences_choose_their_experts(sequences: int, lossy: bool) -> None:
    found = search(sequences, lossy=lossy, gpu=2.5 if lossy else 4.0)
    assert found.best.policy.chosen_experts
    assert found.gap >= 0
    whole = dataclasses.replace(found.best.policy, chosen_experts=False)
    cost = engine_cost(plan_placement(SPEC, whole, found.best.placement.workload, 2), MACHINE)
    assert cost is not None
    assert found.best.cost.generation_tok_s > cost.generation_tok_s


def test_many_sequences_stream_whole_layers() -> None:
    found = search(128)
    assert not found.best.policy.chosen_experts
    assert found.best.policy.block_size >= 64


def test_small_batches_of_many_sequences_choose_theirs() -> None:
    found = search(64, objective="latency")
    assert found.best.policy.block_size == 4
    assert found.best.policy.chosen_experts


def test_no_placement_beats_the_bound() -> None:
    for sequences in (1, 6, 20):
        found = search(sequences)
        assert found.bound_s <= min(each.seconds for each in (found.best, *found.runners_up))


def test_what_fits_the_device_is_not_waited_for() -> None:
    assert not search(2, gpu=40.0).best.policy.chosen_experts
