"""One policy is loaded, run and set beside its prediction and its limit."""

from __future__ import annotations

from pathlib import Path

import policy_run
import pytest
import replanning
import torch
from machines import machine
from tiny_models import TINY

from flexllmgen.memory.arena import HostArena
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from strategies.autoflex import REPLAN_GAIN


def a_run(tmp_path: Path, *, gpu_gib: float = 1.0, layers: int = 2) -> policy_run.PolicyRun:
    kind, sizes = TINY["llama"]
    spec = ModelSpec.from_hf_config({"model_type": kind, **sizes, "num_hidden_layers": layers}, "tiny")
    return policy_run.PolicyRun(
        spec=spec,
        profile=machine(spec, "cpu"),
        workload=Workload(num_sequences=4, prompt_tokens=6, gen_tokens=9),
        limits=policy_run.machine_limits(gpu_gib, 1.0, tmp_path),
        dtype=torch.float32,
        steps=3,
        offload_dir=tmp_path,
    )


POLICY = Policy(micro_batch_size=2, num_micro_batches=2, weights=Placement(gpu=0.5, cpu=0.5))


def test_a_policy_is_measured_beside_its_prediction_and_its_limit(tmp_path: Path) -> None:
    result = a_run(tmp_path).run(POLICY, probed=True)
    assert result["error"] is None
    assert (result["cut"], result["sequences"], result["steps"]) == ("2x2", 4, 3)
    assert result["projected"]
    # What is told of a tiny model's seconds is rounded.
    prefill_s, step_s = result["prefill_s"][0], result["step_s"][0]
    slowest, fastest = (4 * 9 / (prefill_s + off * 5e-4 + 8 * (step_s + off * 5e-5)) for off in (1, -1))
    assert slowest * 0.999 <= result["tok_s"] <= fastest * 1.001
    assert result["prediction_error"] == pytest.approx(
        result["predicted_tok_s"] / result["tok_s"] - 1, abs=2e-3, rel=1e-3
    )
    assert result["limit_tok_s"] > 0
    assert result["limit_bound"] in ("compute", "host memory", "device memory")


def test_what_does_not_fit_or_is_refused_is_told(tmp_path: Path) -> None:
    result = a_run(tmp_path, gpu_gib=1e-5).run(POLICY, probed=False)
    assert "tok_s" not in result
    assert "GiB" in result["error"]


def test_layers_that_share_memory_ask_for_what_they_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_run.AliasedArena, "alias_bytes", 2 << 20)
    arena = policy_run.AliasedArena(register=False)
    regions = [arena.reserve(900_000) for _ in range(6)]
    arena.commit()
    assert arena.asked_bytes >= 6 * 900_000
    assert arena.num_bytes < 4 * 900_000
    assert regions[0] == regions[2] != regions[1]
    assert issubclass(policy_run.AliasedArena, HostArena)


def test_the_tables_margin_is_the_strategys() -> None:
    assert replanning.GAIN == REPLAN_GAIN
