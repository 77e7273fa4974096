"""Whether two small samples differ, and by how much: the arithmetic of a comparison.

A sample is one value per launch (a process of its own): repeats within a process share its memory layout and
caches, so they are no independent samples. The test is Mann-Whitney's, two-sided; the change is the Hodges-Lehmann
estimate on logarithms, the median of all ratios new / base; its interval is the exact inversion of that test, so that
without ties the two never contradict one another. Nothing is assumed of the distribution; with many metrics one in
twenty marks is chance.

Sources: Mann and Whitney, Annals of Mathematical Statistics 18 (1947); Hodges and Lehmann, ibid. 34 (1963); the interval:
Hollander, Wolfe and Chicken, Nonparametric Statistical Methods (2014), section 4.3.

Pure; knows nothing of runs and files. scipy is imported when first needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

ALPHA = 0.05
# Beyond so many values the normal approximation is good; with ties the exact distribution is enumerated.
_EXACT_SIZE, _EXACT_SIZE_TIES = 60, 16
# Values closer than this share of each other are the same: medians of floats need not be equal to the last bit.
_SAME = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How a sample differs from another.

    Args:
        change: new / base - 1; None where a value is zero or negative and the two are not equal.
        low, high: the ends of the change's 95 % interval; None where there are too few launches for one.
        p: of the two-sided Mann-Whitney test; None where no outcome could be significant.
    """

    change: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def can_tell(self) -> bool:
        """Whether there are launches enough for a verdict."""
        return self.p is not None

    @property
    def significant(self) -> bool:
        """Whether the two differ at the level of 5 %."""
        return self.p is not None and self.p <= ALPHA


def can_tell(num_base: int, num_new: int) -> bool:
    """Whether samples of these sizes can reach p < 0.05: the smallest p is 2 / C(base + new, base).

    >>> can_tell(3, 3), can_tell(4, 4), can_tell(3, 5)
    (False, True, True)
    """
    return min(num_base, num_new) > 0 and 2 / math.comb(num_base + num_new, num_base) < ALPHA


def least_launches() -> int:
    """The least number of launches on each side that can tell.

    >>> least_launches()
    4
    """
    number = 1
    while not can_tell(number, number):
        number += 1
    return number


def compare(base: Sequence[float], new: Sequence[float]) -> Change:
    """Hold two samples side by side.

    >>> compare([10.0, 10.1, 10.2, 10.3], [20.0, 20.2, 20.4, 20.6]).p
    0.02857142857142857
    """
    assert base, "a sample needs a value"
    assert new, "a sample needs a value"
    ratios = _log_ratios(base, new)
    tells = can_tell(len(base), len(new))
    p = _p_value(base, new) if tells else None
    if ratios is None:
        return Change(change=0.0 if set(base) == set(new) and len(set(base)) == 1 else None, p=p)
    change = math.expm1(median(ratios))
    if not tells:
        return Change(change=change)
    cut = _critical_rank(len(base), len(new))
    low, high = ratios[cut - 1], ratios[-cut]
    return Change(change=change, low=math.expm1(low), high=math.expm1(high), p=p)


def _log_ratios(base: Sequence[float], new: Sequence[float]) -> list[float] | None:
    """Logarithms of all ratios, ascending; None where there are none."""
    if min(*base, *new) <= 0:
        return None
    return sorted(
        math.log(b / a) if not math.isclose(a, b, rel_tol=_SAME) else 0.0 for a in base for b in new
    )


def _critical_rank(num_base: int, num_new: int) -> int:
    """Which ratio from either end bounds the interval: the largest k with 2 P(U <= k - 1) <= 5 %."""
    arrangements = math.comb(num_base + num_new, num_base)
    cumulative, rank = 0, 0
    for count in _u_counts(num_base, num_new):
        cumulative += count
        if 2 * cumulative / arrangements > ALPHA:
            break
        rank += 1
    return rank


def _u_counts(num_base: int, num_new: int) -> list[int]:
    """How many arrangements of the two samples have U = 0, 1, ...: coefficients of the Gaussian binomial."""
    counts = [1] + [0] * (num_base * num_new)
    for i in range(1, num_base + 1):
        # Times (1 - q^(num_new + i)), then divided by (1 - q^i); both in place.
        for u in range(len(counts) - 1, num_new + i - 1, -1):
            counts[u] -= counts[u - num_new - i]
        for u in range(i, len(counts)):
            counts[u] += counts[u - i]
    return counts


def _p_value(base: Sequence[float], new: Sequence[float]) -> float:
    from scipy.stats import PermutationMethod, mannwhitneyu

    values = [*base, *new]
    if len(set(values)) == 1:
        return 1.0
    ties = len(set(values)) < len(values)
    method: object = "exact" if not ties and len(values) <= _EXACT_SIZE else "asymptotic"
    if ties and len(values) <= _EXACT_SIZE_TIES:
        # All arrangements, so nothing is drawn.
        method = PermutationMethod(n_resamples=math.comb(len(values), len(base)) + 1)
    return float(mannwhitneyu(base, new, alternative="two-sided", method=method).pvalue)
