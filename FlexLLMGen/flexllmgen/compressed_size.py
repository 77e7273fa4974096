"""What group-wise integers take: bits, groups and bytes. Needs no torch, since plans are made without it.

The numbers themselves are compression.py's.
"""

import math
from typing import Literal

from flexllmgen.errors import PolicyError

BITS = (8, 4)
GROUP_SIZES = {"weight": (64, 128), "kv": (32, 64, 128)}


def check_bits(bits: int | None, group_size: int, kind: Literal["weight", "kv"]) -> None:
    """Refuses bits and groups that there are no codes for.

    Raises:
        PolicyError: naming the values that there are.
    """
    if bits is not None and bits not in BITS:
        raise PolicyError(f"{kind}_bits must be {_one_of(BITS)}, not {bits}")
    if group_size not in GROUP_SIZES[kind]:
        raise PolicyError(f"{kind}_group_size must be {_one_of(GROUP_SIZES[kind])}, not {group_size}")


def _one_of(values: tuple[int, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}"


def num_groups(size: int, group_size: int) -> int:
    """Groups of a row of `size` numbers; the last may be shorter."""
    return -(-size // group_size)


def code_bytes(size: int, bits: int) -> int:
    """Bytes of the codes of a row of `size` numbers: whole bytes, so two codes each in 4 bits."""
    return -(-size * bits // 8)


def compressed_bytes(shape: tuple[int, ...], bits: int, group_size: int) -> int:
    """Bytes of a tensor's scales, zeros and codes.

    >>> compressed_bytes((2, 128), bits=4, group_size=64)
    144
    """
    rows, size = math.prod(shape[:-1]), shape[-1]
    return rows * (4 * num_groups(size, group_size) + code_bytes(size, bits))
