"""How long a loaded engine is tried before its plan is predicted anew."""

import pytest

from strategies.recalibration import _trials


@pytest.mark.parametrize(
    ("step_s", "max_context", "trials"),
    [(0.0, 160, 3), (1.5, 160, 3), (0.1, 160, 4), (0.004, 160, 11), (0.004, 9, 6), (0.004, 4, 3)],
)
def test_short_steps_are_tried_more_often(step_s: float, max_context: int, trials: int) -> None:
    assert _trials(step_s, max_context) == trials
