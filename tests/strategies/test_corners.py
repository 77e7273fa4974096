"""Placements that fill the device with one thing first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexllmgen.models.published import published_config
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB
from flexllmgen.workload import Workload
from profiling.layer_times import layer_times_for
from strategies.choices import KINDS, Cut, Limits, Variant
from strategies.corners import corners
from strategies.fitting import fittings
from strategies.placement_program import SIZE, A, K, PlacementProgram, Solved, W, X

sys.path.append(str(Path(__file__).parents[1] / "profiling"))
from machines import machine

OPT = ModelSpec.from_hf_config(published_config("opt-6.7b"), "opt-6.7b")
WORKLOAD = Workload(num_sequences=96, prompt_tokens=512, gen_tokens=16)


def solved_with(
    gpu_gib: float, cut: Cut, *, variant: Variant | None = None
) -> tuple[PlacementProgram, Solved]:
    profile = machine(OPT, cpu_attention_bytes_per_s=9e10, cpu_attention_under_copies_bytes_per_s=5e10)
    times = layer_times_for(OPT, profile.layers)
    assert times is not None
    limits = Limits(gpu_bytes=int(gpu_gib * GiB), cpu_bytes=70 * GiB, disk_bytes=0)
    program = PlacementProgram(OPT, profile, times, WORKLOAD, limits, 2, variant=variant)
    solved = program.solve(cut, KINDS[0])
    assert solved is not None
    return program, solved


def test_one_thing_is_on_the_device_and_of_the_other_what_fits() -> None:
    program, solved = solved_with(24, Cut(size=24, count=2, chunk=8192), variant=Variant(cpu_attention=True))
    matrix, limits = program.memory_rows(solved.cut)
    found = list(corners(program, solved))
    assert all(1 in (each.shares[W[0]], each.shares[K[0]], each.shares[K[1]]) for each in found)
    assert found
    for each in found:
        for kind in (W, (*K, X), A):
            assert sum(each.shares[index] for index in kind) == pytest.approx(1)
        used = matrix @ [*each.shares, *[0.0] * (SIZE - X - 1)]
        assert (used <= limits * (1 + 1e-9)).all()
        # Full to the byte, or all that is to be there.
        all_there = each.shares[W[0]] == 1 in (each.shares[K[0]], each.shares[K[1]])
        assert used[0] == pytest.approx(limits[0]) or all_there
        fitting = next(fittings(program, each), None)
        assert fitting is not None
        assert fitting[1].gpu_bytes > 0.97 * limits[0] or all_there


def test_what_does_not_fit_or_was_found_already_is_no_corner() -> None:
    program, solved = solved_with(8, Cut(size=24, count=2, chunk=8192))
    assert list(corners(program, solved)) == []
    program, solved = solved_with(64, Cut(size=24, count=1, chunk=8192))
    assert solved.shares[W[0]] == solved.shares[K[0]] == pytest.approx(1)
    assert list(corners(program, solved)) == []
