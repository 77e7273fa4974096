"""Two samples held side by side: known values, and what must hold for all."""

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.compare.statistics import can_tell, compare, least_launches

SAMPLES = st.lists(st.floats(min_value=0.01, max_value=1000), min_size=1, max_size=7)


def test_the_least_number_of_launches_is_the_least_that_can_be_significant() -> None:
    assert least_launches() == 4
    assert not can_tell(3, 3)
    assert can_tell(3, 5)
    assert not can_tell(0, 9)


def test_three_launches_give_a_change_and_no_verdict() -> None:
    change = compare([10.0, 10.0, 10.0], [20.0, 20.0, 20.0])
    assert change.change == pytest.approx(1.0)
    assert (change.p, change.low, change.high) == (None, None, None)
    assert not change.can_tell
    assert not change.significant


def test_four_against_four_that_do_not_overlap() -> None:
    """By hand: 2 of the C(8, 4) = 70 arrangements are as extreme, and the interval is that of all ratios."""
    change = compare([10.0, 11.0, 12.0, 13.0], [20.0, 22.0, 24.0, 26.0])
    assert change.p == pytest.approx(2 / 70)
    assert change.significant
    assert change.low == pytest.approx(20 / 13 - 1)
    assert change.high == pytest.approx(26 / 10 - 1)
    assert change.low is not None
    assert change.change is not None
    assert change.high is not None
    assert change.low < change.change < change.high


def test_a_published_interval() -> None:
    """Hollander, Wolfe and Chicken, example 4.1: permeability of membranes, m = 10, n = 5; p = 0.2544, the interval of the
    shift is (-0.76, 0.15). On logarithms a shift is a ratio, so that the data go in as powers."""
    term = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46]
    gestation = [1.15, 0.88, 0.90, 0.74, 1.21]
    change = compare([math.exp(x) for x in term], [math.exp(y) for y in gestation])
    assert change.p == pytest.approx(0.2544, abs=1e-4)
    assert change.change == pytest.approx(math.expm1(-0.305), abs=1e-9)
    assert change.low == pytest.approx(math.expm1(-0.76), abs=1e-9)
    assert change.high == pytest.approx(math.expm1(0.15), abs=1e-9)


def test_ties_are_counted_exactly() -> None:
    """Against all arrangements by hand, as midranks."""
    base, new = [1.0, 1.0, 2.0, 2.0], [2.0, 3.0, 3.0, 3.0]

    def u(first: list[float], second: list[float]) -> float:
        return sum((a > b) + 0.5 * (a == b) for a in first for b in second)

    values, seen = [*base, *new], u(base, new)
    arrangements = [
        u([values[i] for i in chosen], [values[i] for i in range(8) if i not in chosen])
        for chosen in combinations(range(8), 4)
    ]
    low = sum(one <= seen + 1e-9 for one in arrangements) / len(arrangements)
    assert compare(base, new).p == pytest.approx(2 * low)


def test_zero_has_no_ratio() -> None:
    assert compare([0.0] * 4, [0.0] * 4).change == 0.0
    assert compare([0.0] * 4, [0.0] * 4).p == 1.0
    changed = compare([0.0] * 4, [5.0, 6.0, 7.0, 8.0])
    assert changed.change is None
    assert changed.low is None
    assert changed.significant


@given(SAMPLES, SAMPLES)
@settings(max_examples=60, deadline=None)
def test_swapping_the_two_mirrors_the_change(base: list[float], new: list[float]) -> None:
    there, back = compare(base, new), compare(new, base)
    assert there.change is not None
    assert back.change is not None
    assert (1 + there.change) * (1 + back.change) == pytest.approx(1)
    assert there.significant == back.significant
    if there.low is not None and there.high is not None:
        assert back.low is not None
        assert back.high is not None
        assert (1 + there.low) * (1 + back.high) == pytest.approx(1)
        assert (1 + there.high) * (1 + back.low) == pytest.approx(1)
        assert there.p == pytest.approx(back.p)
        assert there.low <= there.change <= there.high


@given(SAMPLES)
@settings(max_examples=60, deadline=None)
def test_equal_samples_never_differ(values: list[float]) -> None:
    change = compare(values, list(values))
    assert change.change == pytest.approx(0)
    assert not change.significant
    assert change.low is None or change.low <= 0 <= (change.high or 0)


@given(SAMPLES, SAMPLES)
@settings(max_examples=60, deadline=None)
def test_an_interval_without_zero_is_a_significant_change(base: list[float], new: list[float]) -> None:
    change = compare(base, new)
    if change.low is None or change.high is None or len({*base, *new}) < len(base) + len(new):
        return
    assert change.significant == (change.low > 0 or change.high < 0)
