"""Placements at the corners: all weights on the device, or all KV, or all KV where the CPU attends; and of the rest what fits.

A program takes every resource to work without ever waiting, so that of a cut's shares it may find those as good that wait for
one another more. These wait least: of one thing nothing is streamed. Pure.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from strategies.placement_program import SIZE, A, K, PlacementProgram, Solved, W, X


def corners(program: PlacementProgram, solved: Solved) -> Iterator[Solved]:
    """The solved cut's other placements, with hidden states where they are; none that fits only by the disk."""
    matrix, limits = program.memory_rows(solved.cut)
    # What lies wholly where, and what of else the device is filled with.
    kinds = [(W[0], K), (K[0], W), *([(K[1], W)] if program.variant.cpu_attention else [])]
    for first, second in kinds:
        shares = np.zeros(SIZE)
        shares[list(A)] = [solved.shares[index] for index in A]
        shares[first] = shares[second[1]] = 1.0
        room = limits - matrix @ shares
        if (room < 0).any():
            continue
        # What a tier gains by moving a share of the second thing onto the device.
        taken = matrix[:, second[0]] - matrix[:, second[1]]
        filled = min([1.0, *(room[taken > 0] / taken[taken > 0])])
        shares[second[0]], shares[second[1]] = filled, 1 - filled
        found = tuple(float(share) for share in shares[: X + 1])
        if max(abs(mine - theirs) for mine, theirs in zip(found, solved.shares, strict=True)) > _ALIKE:
            yield replace(solved, shares=found)


_ALIKE = 0.01
"""Shares that differ by less are the same placement."""
