"""When autoflex, having planned again, loads its first policy after all: what its strategy does, for results of policy_run.py."""

from collections.abc import Mapping
from typing import Any

GAIN = 1.05
"""As the strategy's REPLAN_GAIN, which a table without torch cannot import."""


def goes_back(first: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
    """Whether the calibration of each says that the first is faster by more than the margin.

    >>> goes_back({"tok_s": 80, "calibrated_error": 0.05}, {"tok_s": 78, "calibrated_error": 0.0})
    True
    """
    rates = [result["tok_s"] * (1 + result["calibrated_error"]) for result in (first, again)]
    return bool(rates[0] > GAIN * rates[1])
