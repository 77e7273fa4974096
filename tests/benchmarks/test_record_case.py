"""Our engine's row where it plans again: both policies are told of, and the one that is faster counts."""

from __future__ import annotations

from typing import Any

import policy_run
import pytest
import record_case
from record_case import autoflex, case_of

from flexllmgen.policy import Policy

FIRST, OTHER = Policy(micro_batch_size=2), Policy(micro_batch_size=4)


def result_of(policy: Policy, tok_s: float) -> dict[str, Any]:
    return {
        "cut": f"{policy.micro_batch_size}x1",
        "shares": [],
        "tok_s": tok_s,
        "error": None,
        "prediction_error": 0.1,
        "calibrated_error": 0.0,
        "calibration": {"attention": 1.5},
    }


@pytest.mark.parametrize(("other_tok_s", "kept"), [(120.0, OTHER), (96.0, OTHER), (90.0, FIRST)])
def test_the_faster_by_its_own_calibration_is_the_row(
    monkeypatch: pytest.MonkeyPatch, other_tok_s: float, kept: Policy
) -> None:
    class Run:
        def __init__(self, **_: Any) -> None:
            self.best = self
            self.policy = FIRST

        def search(self, *_: Any, **__: Any) -> Run:
            return self

        def run(self, policy: Policy, *, probed: bool) -> dict[str, Any]:
            assert probed
            return result_of(policy, 100.0 if policy is FIRST else other_tok_s)

        def replanned(self, *_: Any, **__: Any) -> tuple[Run, Policy]:
            return self, OTHER

    monkeypatch.setattr(policy_run, "PolicyRun", Run)
    monkeypatch.setattr(policy_run, "share_layers", lambda _: None)
    noted = {"profile_s": 1.0, "rates_1e9": {}, "warnings": []}
    monkeypatch.setattr(policy_run, "measured_profile", lambda *_, **__: (None, noted))
    told: list[dict[str, Any]] = []
    row = autoflex(case_of("opt-30b", record_case.ENGINE, []), told.append)
    assert told[0]["tok_s"] == 100.0
    assert told[0][record_case.SO_FAR]
    assert row["tok_s"] == (100.0 if kept is FIRST else other_tok_s)
    assert row["policy"]["micro_batch_size"] == kept.micro_batch_size
    given_up = row["planned_again"] if kept is FIRST else row["planned_before"]
    assert given_up["tok_s"] == (other_tok_s if kept is FIRST else 100.0)
    assert "error" not in row
