"""Bounds of a placement's program without solving it, from what the solution of one for another cut has shown.

A solution has a price for each row: seconds that one more byte of a tier, or one second less of a resource, would save. With
any prices that are not negative, the program's rows taken into its objective give a bound (Lagrangian relaxation; Geoffrion
1974), and what is left of it falls apart into the least of a few numbers. Prices of another cut are good ones. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SAFE = 1 - 1e-6
"""A solver's own optimum may be that much below the true one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The inequalities of a cut's program, `matrix @ x <= limit`, and its objective.

    Args:
        memory: how many rows, the first ones, are of memory.
        passes: rows of each pass after those, the variable of its seconds, and whether it is a prompt's.
    """

    matrix: np.ndarray
    limit: np.ndarray
    objective: np.ndarray
    memory: int
    passes: Sequence[tuple[slice, int, bool]]

    def least(self, prices: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
        """The least of objective and priced rows where the shares of each group add up to 1. Seconds cost what they save."""
        costs = self.objective + prices @ self.matrix
        least = sum(min(costs[index] for index in group) for group in groups)
        return float(least - prices @ self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Multipliers:
    """The prices of a solution: of memory, and of a second of a prompt's pass and of a step's divided over their rows."""

    memory: np.ndarray
    prompt: np.ndarray
    step: np.ndarray

    @staticmethod
    def of(rows: Rows, prices: np.ndarray) -> "Multipliers":
        """What `prices` of the rows come to; of the first, full, block."""
        parts = {}
        for where, _, prompt in reversed(rows.passes):
            mine = prices[where]
            parts[prompt] = mine / max(mine.sum(), 1e-300)
        return Multipliers(memory=prices[: rows.memory], prompt=parts[True], step=parts[False])

    def bound_s(self, rows: Rows, groups: Sequence[Sequence[int]]) -> float:
        """Seconds that no solution of these rows is below; 0 where they are not alike."""
        prices = np.zeros(len(rows.limit))
        if len(self.memory) != rows.memory:
            return 0.0
        prices[: rows.memory] = self.memory
        for where, variable, prompt in rows.passes:
            mine = self.prompt if prompt else self.step
            if len(mine) != where.stop - where.start:
                return 0.0
            # No more than a second costs: then the best length of a pass is none.
            prices[where] = mine * (rows.objective[variable] * _SAFE)
        return rows.least(prices, groups) * _SAFE


def too_large(rows: Rows, groups: Sequence[Sequence[int]]) -> bool:
    """Whether what must lie on a tier is more than it holds, or on several tiers together more than they do."""
    tiers = rows.memory
    # Each alone, all together, and all but the disk, which may be all there is room on.
    prices = np.vstack([np.eye(tiers), np.tri(2, tiers, tiers - 2)])
    needs = prices @ rows.matrix[:tiers]
    least = sum(needs[:, list(group)].min(axis=1) for group in groups)
    held = prices @ rows.limit[:tiers]
    # A solver takes what is over by rounding.
    return bool((least - held > (1 - _SAFE) * np.abs(held)).any())
