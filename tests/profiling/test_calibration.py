"""A probe of one layer corrects the resource that it saw, and no other."""

from __future__ import annotations

import pytest
from machines import machine

from flexllmgen.executor import LayerProbe
from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import ON_CPU, ON_DISK, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.calibration import Calibration, calibrate, corrected
from profiling.layer_times import layer_times_for

SPEC = ModelSpec.from_hf_config(published_config("opt-6.7b"), "opt-6.7b")
WORKLOAD = Workload(num_sequences=8, prompt_tokens=128, gen_tokens=16)


def probe(load_s: float | None, compute_s: float | None) -> LayerProbe:
    return LayerProbe(kind="layer", stage=5, sequences=8, context=136, load_s=load_s, compute_s=compute_s)


@pytest.mark.parametrize(("weights", "seen", "rate"), [(ON_CPU, "link", 5.5e10), (ON_DISK, "disk", 1.75e9)])
def test_a_slow_load_slows_what_it_came_over(weights: Placement, seen: str, rate: float) -> None:
    plan = plan_placement(SPEC, Policy(micro_batch_size=8, weights=weights), WORKLOAD, 2)
    load_s = SPEC.layer_weight_bytes(2) / rate
    found = calibrate(plan, machine(SPEC), probe(1.25 * load_s, None))
    assert getattr(found, seen) == pytest.approx(1.25, rel=0.01)
    assert {found.compute, found.link, found.disk} == {1.0, getattr(found, seen)}


def test_slow_steps_slow_the_layers_and_a_disturbance_is_held_back() -> None:
    profile = machine(SPEC, "cpu")
    plan = plan_placement(SPEC, Policy(micro_batch_size=8), WORKLOAD, 2, in_place=True)
    times = layer_times_for(SPEC, profile.layers)
    assert times is not None
    expected = times.step_s("layer", 8, 136) + times.issue_s
    assert calibrate(plan, profile, probe(None, 1.1 * expected)).compute == pytest.approx(1.1)
    assert calibrate(plan, profile, probe(None, 100 * expected)).compute == 3.0


def test_correcting_changes_the_rates_and_nothing_else() -> None:
    profile = machine(SPEC)
    slower = corrected(profile, Calibration(compute=2.0, link=1.25, disk=0.5))
    assert slower.typical.h2d_bytes_per_s == pytest.approx(5.5e10 / 1.25)
    assert slower.typical.disk_read_bytes_per_s == pytest.approx(2 * 1.75e9)
    assert slower.typical.d2h_bytes_per_s == 5.5e10
    assert slower.layers[0].step_s("layer", 8, 100) == pytest.approx(
        2 * profile.layers[0].step_s("layer", 8, 100)
    )
    assert slower.best == profile.best
