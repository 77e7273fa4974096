"""Strategy autoflex: what it plans is loaded, its tokens are those of flexgen, and it plans again where that pays."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flexllmgen.errors import PlanInfeasible
from flexllmgen.models.published import published_config
from flexllmgen.policy import Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.calibration import Calibration
from strategies.autoflex import AutoflexStrategy, create, policy_of
from strategies.autoflex_config import Config
from strategies.base import Machine, ModelSource, Plan, PlanRequest
from strategies.flexgen_engine import load_policy
from strategies.recalibration import Shown
from strategies.registry import find_strategy
from strategies.search import Found

sys.path.append(str(Path(__file__).parents[1] / "profiling"))
from machines import machine

CONFIG = {**published_config("opt-125m"), "num_hidden_layers": 6}
SPEC = ModelSpec.from_hf_config(CONFIG, "opt, 6 layers")
MiB = 1 << 20


def strategy(**changes: Any) -> AutoflexStrategy:
    _, defaults = find_strategy("autoflex").load_config()
    return create(Config(**{**defaults, **changes}))


def request_for(folder: Path, *, cpu_mib: int = 4096, **rates: float) -> PlanRequest:
    return PlanRequest(
        model=ModelSource(name="opt", path=None, config=CONFIG, weights="random"),
        workload=Workload(num_sequences=6, prompt_tokens=12, gen_tokens=6),
        batch_size=3,
        dtype="float32",
        machine=Machine(
            device="cpu",
            gpu_bytes=None,
            cpu_bytes=cpu_mib * MiB,
            gpu_capped=False,
            cpu_capped=True,
            offload_dir=folder / "offload",
        ),
        seed=0,
        spec=SPEC,
        profile=machine(SPEC, "cpu", **rates),
    )


def tokens_of(strategy: AutoflexStrategy, request: PlanRequest, plan: Any) -> torch.Tensor:
    ids = torch.randint(3, 1000, (6, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    with strategy.build(plan) as engine:
        size = engine.plan.batch_size
        blocks = [
            torch.stack(
                list(engine.generate(ids[start : start + size], mask[start : start + size], 6)), dim=1
            )
            for start in range(0, len(ids), size)
        ]
    return torch.cat(blocks)


def test_the_shipped_defaults_are_the_keys_of_the_model() -> None:
    config_type, defaults = find_strategy("autoflex").load_config()
    assert set(config_type.model_fields) == set(defaults)


def test_the_plan_shows_the_policy_and_how_it_was_found(tmp_path: Path) -> None:
    plan = strategy().plan(request_for(tmp_path))
    assert plan.predicted is not None
    assert plan.limit is not None
    assert plan.batch_size == policy_of(plan).block_size == 6
    search = plan.details["search"]
    assert search["bound_s"] > 0
    assert search["gap"] >= 0
    assert all({"why", "generation_tok_s", "micro_batch_size"} <= set(each) for each in search["runners_up"])


def test_memory_that_is_short_sends_weights_to_disk_and_the_tokens_stay(tmp_path: Path) -> None:
    roomy, short = request_for(tmp_path), request_for(tmp_path, cpu_mib=290)
    mine = strategy(calibrate=False)
    plan = mine.plan(short)
    assert plan.weight_bytes["disk"] > 0
    assert sum(plan.details["planned_peak_bytes"][tier] for tier in ("gpu", "cpu")) <= 290 * MiB
    assert torch.equal(tokens_of(mine, short, plan), tokens_of(mine, roomy, mine.plan(roomy)))


def test_latency_serves_exactly_a_batch(tmp_path: Path) -> None:
    assert strategy(objective="latency").plan(request_for(tmp_path)).batch_size == 3


def test_without_a_profile_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(PlanInfeasible, match="profile"):
        strategy().plan(dataclasses.replace(request_for(tmp_path), profile=None))


def test_a_calibration_corrects_the_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.recalibration.calibrate", lambda *_: Calibration(pace=2.0))
    mine, request = strategy(), request_for(tmp_path)
    plan = mine.plan(request)
    assert plan.predicted is not None
    with mine.build(plan) as engine:
        assert engine.plan.predicted is not None
        assert engine.plan.predicted.decode_s == pytest.approx(2 * plan.predicted.decode_s, rel=0.05)
        noted = engine.plan.details["calibration"]
        assert noted["pace"] == 2.0
        assert noted["replanned"] is False
        assert noted["predicted_before_tok_s"] == plan.predicted.generation_tok_s
        assert policy_of(engine.plan) == policy_of(plan)
        (told,) = set(engine.plan.warnings) - set(plan.warnings)
        assert told.startswith("calibration: pace is 100 % slower than profiled; predicted ")
    monkeypatch.setattr("strategies.recalibration.calibrate", lambda *_: Calibration(pace=1.02))
    with mine.build(plan) as engine:
        assert engine.plan.warnings == plan.warnings, "a small change is not spoken of"


def replanning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[AutoflexStrategy, PlanRequest, Any]:
    """A disk that was profiled as fast as memory, and turns out a thousand times as slow.

    The KV cache, which a fast disk made room for a larger block with, then makes for smaller ones.
    """
    shown = itertools.cycle([Calibration(disk=1000.0), Calibration()])
    monkeypatch.setattr("strategies.recalibration.calibrate", lambda *_: next(shown))
    mine = strategy()
    request = request_for(tmp_path, cpu_mib=290, disk_read_bytes_per_s=1e12, disk_write_bytes_per_s=1e12)
    return mine, request, mine.plan(request)


def test_it_plans_again_where_another_policy_is_better_and_the_tokens_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = request_for(tmp_path)
    want = tokens_of(strategy(calibrate=False), roomy, strategy().plan(roomy))
    mine, request, plan = replanning(tmp_path, monkeypatch)
    with mine.build(plan) as engine:
        changed = engine.plan
    assert changed.details["calibration"]["replanned"] is True
    assert policy_of(changed) != policy_of(plan)
    assert any("planned again" in warning for warning in changed.warnings)
    assert changed.predicted is not None
    assert torch.equal(tokens_of(mine, request, plan), want)


def test_another_policy_is_predicted_by_what_its_own_engine_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _request, plan = replanning(tmp_path, monkeypatch)
    shown = iter([Calibration(disk=1000.0), Calibration(disk=1.2)])
    profiles = []

    def calibrated(placement: Any, profile: Any, probe: Any) -> Calibration:
        profiles.append(profile.typical.disk_read_bytes_per_s)
        return next(shown)

    monkeypatch.setattr("strategies.recalibration.calibrate", calibrated)
    with mine.build(plan) as engine:
        changed = engine.plan
    noted = changed.details["calibration"]
    assert (noted["disk"], noted["first"]["disk"]) == (1.2, 1000.0)
    assert profiles[1] == pytest.approx(profiles[0] / 1000), "the second's comes on top of the first's"
    assert noted["replanned"] is True
    assert changed.predicted is not None
    assert plan.predicted is not None
    assert noted["predicted_before_tok_s"] == plan.predicted.generation_tok_s, "before anything was loaded"
    slowed = changed.predicted.generation_tok_s
    shown = iter([Calibration(disk=1000.0), Calibration()])
    with mine.build(plan) as engine:
        assert engine.plan.predicted is not None
        assert slowed < 0.9 * engine.plan.predicted.generation_tok_s


def test_a_policy_that_proves_slower_than_the_first_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, request, plan = replanning(tmp_path, monkeypatch)
    want = tokens_of(strategy(calibrate=False), request, plan)
    shown = [Calibration(disk=1000.0), Calibration(pace=1e6)]
    monkeypatch.setattr("strategies.recalibration.calibrate", lambda *_: shown.pop(0))
    loaded = []
    real = load_policy

    def load(plan: Any, policy: Policy, folder: Path) -> Any:
        loaded.append(policy)
        return real(plan, policy, folder)

    monkeypatch.setattr("strategies.autoflex.load_policy", load)
    assert torch.equal(tokens_of(mine, request, plan), want)
    assert loaded[0] == loaded[2] == policy_of(plan) != loaded[1]
    assert not shown, "the first is not timed again"
    shown = [Calibration(disk=1000.0), Calibration(pace=1e6)]
    with mine.build(plan) as engine:
        assert policy_of(engine.plan) == policy_of(plan)
        noted = engine.plan.details["calibration"]
        assert (noted["pace"], noted["other"]["pace"]) == (1.0, 1e6)
        assert (noted["replanned"], noted["went_back"]) == (False, True)
        assert any("back to the first" in warning for warning in engine.plan.warnings)
        assert engine.plan.predicted is not None


def with_lossy_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[AutoflexStrategy, Plan, Found]:
    """A lossless plan, and a lossy policy that the search after loading finds whatever it is asked."""
    mine = strategy()
    request = request_for(tmp_path, cpu_mib=290, dequantise_4bit_bytes_per_s=1e12)
    plan, lossy = mine.plan(request), mine._lossy(request)
    assert plan.lossless
    assert lossy is not None
    assert not lossy.best.policy.lossless
    monkeypatch.setattr(AutoflexStrategy, "_search_again", lambda *_: lossy)
    return mine, plan, lossy


@pytest.mark.parametrize(
    ("then", "kept"),
    [(1.0, False), (0.97, False), (0.9, True)],
    ids=["as fast", "hardly faster", "faster"],
)
def test_a_policy_that_gives_up_more_must_prove_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: float, kept: bool
) -> None:
    mine, plan, _ = with_lossy_found_again(tmp_path, monkeypatch)
    factors = iter([1.0, then])

    def shown(plan: Any, _engine: Any, profile: Any) -> Shown:
        cost = dataclasses.replace(plan.predicted, prefill_s=0.0, decode_s=100 * next(factors))
        return Shown(Calibration(), profile, cost, stepped=True)

    monkeypatch.setattr("strategies.autoflex.shown_by", shown)
    with mine.build(plan) as engine:
        assert engine.plan.lossless != kept
        went_back = [each for each in engine.plan.warnings if "back to the first" in each]
    assert bool(went_back) != kept
    if then == 0.97:
        assert "proved 3 % faster, and gives up more: back to the first policy" in went_back[0]


@pytest.mark.parametrize(("gain", "tried"), [(1.04, False), (1.07, False), (1.2, True)])
def test_a_policy_that_gives_up_more_is_tried_for_a_larger_gain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, tried: bool
) -> None:
    mine, plan, lossy = with_lossy_found_again(tmp_path, monkeypatch)
    seconds = iter([gain * lossy.best.seconds, lossy.best.seconds])

    def shown(plan: Any, _engine: Any, profile: Any) -> Shown:
        cost = dataclasses.replace(plan.predicted, prefill_s=0.0, decode_s=next(seconds))
        return Shown(Calibration(), profile, cost, stepped=True)

    monkeypatch.setattr("strategies.autoflex.shown_by", shown)
    with mine.build(plan) as engine:
        assert engine.plan.lossless != tried


def test_it_does_not_go_back_where_steps_of_one_policy_only_were_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _request, plan = replanning(tmp_path, monkeypatch)
    shown = [Calibration(disk=1000.0), Calibration(pace=1e6)]
    monkeypatch.setattr("strategies.recalibration.calibrate", lambda *_: shown.pop(0))
    steps = iter([3.0, 1.0])
    monkeypatch.setattr("strategies.recalibration._step_s", lambda _: next(steps))
    with mine.build(plan) as engine:
        assert policy_of(engine.plan) != policy_of(plan)


def test_what_the_first_engine_holds_on_disk_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, _request, plan = replanning(tmp_path, monkeypatch)
    held = plan.details["planned_peak_bytes"]["disk"]
    # Once it is loaded there is nothing left.
    monkeypatch.setattr("strategies.autoflex.free_disk_bytes", lambda _: 0)
    with mine.build(plan) as engine:
        assert engine.plan.details["planned_peak_bytes"]["disk"] <= 1.2 * held


def test_what_is_packed_already_takes_no_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, request = strategy(calibrate=False), request_for(tmp_path, cpu_mib=290)
    first = mine.plan(request)
    with mine.build(first):
        pass
    # Room for the KV cache and no more: the weights are there already.
    full = 8 * MiB
    for where in ("strategies.autoflex", "strategies.flexgen_engine"):
        monkeypatch.setattr(f"{where}.free_disk_bytes", lambda _: full)
    assert policy_of(mine.plan(request)) == policy_of(first)


def test_bits_that_nothing_may_use_are_told(tmp_path: Path) -> None:
    request = request_for(tmp_path)
    told = strategy(least_bits=8).plan(request).warnings
    assert "least_bits has no effect without --allow-lossy" in told
    assert not any("least_bits" in each for each in strategy().plan(request).warnings)
    allowed = dataclasses.replace(request, allow_lossy=True)
    assert not any("least_bits" in each for each in strategy(least_bits=8).plan(allowed).warnings)


@pytest.mark.parametrize(("turned_back", "told"), [(1e12, True), (1e8, False)])
def test_where_weights_are_read_from_disk_a_faster_lossy_policy_is_told_of(
    tmp_path: Path, turned_back: float, told: bool
) -> None:
    """What it would keep in fewer bits, and its prediction: those of the plan that --allow-lossy makes."""
    rates = {f"dequantise_{bits}bit_bytes_per_s": turned_back for bits in (4, 8)}
    request = request_for(tmp_path, cpu_mib=290, **rates)
    plan = strategy().plan(request)
    assert plan.weight_bytes["disk"]
    hints = [each for each in plan.warnings if "--allow-lossy" in each]
    assert bool(hints) == told
    lossy = strategy().plan(dataclasses.replace(request, allow_lossy=True))
    assert not any("faster with" in each for each in lossy.warnings)
    if told:
        assert lossy.predicted is not None
        bits = lossy.details["policy"]["weight_bits"]
        expected = f"weights in {bits} bits"
        assert expected in hints[0]
        assert f"predicted {lossy.predicted.generation_tok_s:,.3g} tok/s" in hints[0]
    assert not any("--allow-lossy" in each for each in strategy().plan(request_for(tmp_path)).warnings)


def test_what_fits_in_fewer_bits_only_is_told_of(tmp_path: Path) -> None:
    request = request_for(tmp_path, cpu_mib=290)
    request = dataclasses.replace(request, machine=dataclasses.replace(request.machine, disk_bytes=0))
    with pytest.raises(PlanInfeasible, match=r"it fits with --allow-lossy: weights in 4 bits.*, predicted "):
        strategy().plan(request)
    assert not strategy().plan(dataclasses.replace(request, allow_lossy=True)).lossless
    nowhere = dataclasses.replace(request, machine=dataclasses.replace(request.machine, cpu_bytes=50 * MiB))
    with pytest.raises(PlanInfeasible) as refused:
        strategy().plan(nowhere)
    assert "--allow-lossy" not in str(refused.value)
