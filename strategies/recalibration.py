"""What a loaded engine shows of its plan, and which of two policies is kept: autoflex's calibration."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from profiling.calibration import Calibration, calibrate, corrected
from profiling.cost_model import CostEstimate, engine_cost
from profiling.profile import HardwareProfile
from strategies.base import Plan
from strategies.flexgen_engine import FlexgenEngine

log = logging.getLogger(__name__)

_WORTH_TELLING = 0.1
"""A prediction that changed by less is not spoken of."""
_LONG_STEP_S = 2.0
"""Steps that take longer are not tried out for a calibration."""
_FEWEST_TRIALS, _MOST_TRIALS, _TRIED_S = 3, 11, 0.4


@dataclass(frozen=True, slots=True)
class Shown:
    """What a loaded engine shows: how it differs from a profile, the profile it shows, and its own plan's cost by that.

    Args:
        stepped: whether decode steps were timed, and not only a load.
    """

    calibration: Calibration
    profile: HardwareProfile
    cost: CostEstimate
    stepped: bool


def shown_by(plan: Plan, engine: FlexgenEngine, profile: HardwareProfile | None) -> Shown:
    """Calibrates against a profile: the machine's, or the one that led to this plan, so that corrections add up."""
    placement = engine.engine.placement
    assert profile is not None
    step_s = _step_s(plan)
    stepped = 0 < step_s < _LONG_STEP_S
    probe = engine.engine.probe(steps=stepped, trials=_trials(step_s, placement.max_context))
    calibration = calibrate(placement, profile, probe)
    profile = corrected(profile, calibration, placement)
    cost = engine_cost(placement, profile)
    assert cost is not None
    return Shown(calibration, profile, cost, stepped)


def changed(calibration: Calibration, before: CostEstimate | None, after: CostEstimate) -> Iterator[str]:
    """A line for the user where the prediction that was shown before loading no longer holds."""
    if before is None:
        return
    was, now = before.generation_tok_s, after.generation_tok_s
    if abs(now / was - 1) > _WORTH_TELLING:
        yield f"calibration: {slowest(calibration)} than profiled; predicted {now:.3g} tok/s now ({was:.3g} before loading)"


def tried_after(first: Plan, other: Plan, shown: Shown) -> Plan:
    """The plan that a calibration led to, as predicted by its own, which comes on top of the first's."""
    led = first.details["calibration"]
    log.info("calibration of the other policy, on top: %s", shown.calibration)
    found_out = {
        **asdict(shown.calibration),
        "predicted_before_tok_s": led["predicted_before_tok_s"],
        "gain_of_best": led["gain_of_best"],
        "replanned": True,
        "first": led,
    }
    return noted(replace(other, predicted=shown.cost), found_out)


def back_to(first: Plan, tried: Plan, loss: float) -> Plan:
    """The first plan, with what was learnt of the other."""
    proved = f"{100 * abs(loss - 1):.0f} % {'slower' if loss >= 1 else 'faster, and gives up more'}"
    warning = f"planned again, but what that found proved {proved}: back to the first policy"
    found_out = first.details["calibration"] | {"other": tried.details["calibration"], "went_back": True}
    return noted(replace(first, warnings=(*first.warnings, warning)), found_out)


def noted(plan: Plan, calibration: dict[str, Any]) -> Plan:
    """The plan, with what a calibration found out among its details."""
    return replace(plan, details={**plan.details, "calibration": calibration})


def _trials(step_s: float, max_context: int) -> int:
    """How many steps are tried: of short ones more, since what else the machine does troubles them more."""
    in_time = int(_TRIED_S / step_s) if step_s else 0
    # Their tokens, one of a prompt and two besides must fit.
    return max(_FEWEST_TRIALS, min(_MOST_TRIALS, in_time, max_context - 3))


def _step_s(plan: Plan) -> float:
    """Predicted seconds of a decode step of a block; 0 if there is none."""
    workload, predicted = plan.request.workload, plan.predicted
    steps = -(-workload.num_sequences // plan.batch_size) * (workload.gen_tokens - 1)
    return predicted.decode_s / steps if predicted is not None and steps else 0.0


def slowest(calibration: Calibration) -> str:
    """What differs most from its profile, in words."""
    name, factor = max(asdict(calibration).items(), key=lambda item: abs(item[1] - 1))
    return f"{name} is {abs(factor - 1) * 100:.0f} % {'slower' if factor > 1 else 'faster'}"
