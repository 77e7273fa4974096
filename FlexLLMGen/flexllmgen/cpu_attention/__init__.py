"""Attention of a decode step on the CPU, reading keys and values where they lie in host memory.

A kernel of our own, built at first use (build.py) for the best instructions that the processor has and that divide a
head; torch's attention where that is not possible (fallback.py).
Takes keys and values by their strides, and knows nothing of devices, streams or schedules. The call holds no lock of
Python's while it computes, so that the thread that issues work to an accelerator goes on meanwhile.
"""

# B sequences  S positions  N query heads  K key heads  G groups of a row  H head dim

import functools
import logging
import os
from collections.abc import Callable

import torch

from flexllmgen.cpu_attention.build import PROCESSOR, BuildFailedError, is_built, library_path
from flexllmgen.cpu_attention.fallback import attend_with_torch
from flexllmgen.cpu_attention.library import LEVELS, Kernel, Prepared, Row, best_level, compiled, level_for
from flexllmgen.errors import UsageError

log = logging.getLogger(__name__)

VARIABLE = "FLEXLLMGEN_CPU_ATTENTION"
"""Of the environment: the best instructions (`which`) that the kernel may use; without it all that there are."""


def prepare_attention(
    q_BNH: torch.Tensor,
    kv_S2BKH: torch.Tensor,
    length: int,
    bias_BS: torch.Tensor | None = None,
    *,
    first: int = 0,
    out_BNH: torch.Tensor,
    threads: int,
    scale_S2BKG: torch.Tensor | None = None,
    zero_S2BKG: torch.Tensor | None = None,
    group_size: int = 64,
    k_BKH: torch.Tensor | None = None,
    v_BKH: torch.Tensor | None = None,
    row: Row | None = None,
) -> Prepared | Callable[[], None]:
    """A call that attends for one new token per sequence to the cached positions [first, length), its own included.

    Args:
        q_BNH: contiguous, of the KV's type or fp32; query head n reads key head n // (N / K). Read, as all tensors
            are, when the call is made.
        kv_S2BKH: keys at [:, 0], values at [:, 1], in any order but that a position's heads are one run; read fastest where
            a sequence's positions follow one another. fp32, bf16 or fp16; or uint8, codes of 8 bits.
        bias_BS: added to the scores, minus infinity on padding; column s is position s. A sequence needs one
            position that is not hidden.
        out_BNH: contiguous; written; of q's type.
        threads: how many compute, this one included.
        scale_S2BKG: fp16, of uint8 codes: groups along the last dimension, value = code * scale + zero.
        zero_S2BKG: the same shape.
        group_size: numbers of a group, a multiple of 64; the last group of a head may be shorter (compression.py).
        k_BKH: contiguous, of the KV's type, which is no codes: the token's keys, written at position length - 1 first.
        v_BKH: its values.
        row: of codes, the token's keys and values: codes, scales and zeros, contiguous, [B, 2, ...] each.
    """
    assert 0 <= first < length <= kv_S2BKH.shape[0], f"positions [{first}, {length}) of {kv_S2BKH.shape[0]}"
    assert q_BNH.is_contiguous()
    assert out_BNH.is_contiguous()
    assert out_BNH.shape == q_BNH.shape
    assert out_BNH.dtype == q_BNH.dtype
    assert kv_S2BKH.shape[2] == q_BNH.shape[0]
    assert q_BNH.shape[1] % kv_S2BKH.shape[3] == 0
    assert (kv_S2BKH.dtype == torch.uint8) == (scale_S2BKG is not None) == (zero_S2BKG is not None)
    if scale_S2BKG is not None and zero_S2BKG is not None:
        assert group_size % 64 == 0
        assert scale_S2BKG.dtype == zero_S2BKG.dtype == torch.float16
        groups = -(-q_BNH.shape[2] // group_size)
        assert scale_S2BKG.shape == zero_S2BKG.shape == (*kv_S2BKH.shape[:-1], groups)
        assert scale_S2BKG[0, 0, 0].is_contiguous()
        assert zero_S2BKG[0, 0, 0].is_contiguous()
    assert kv_S2BKH[0, 0, 0].is_contiguous(), "a position's heads of a sequence are one run"
    assert (k_BKH is None) == (v_BKH is None)
    if k_BKH is not None and v_BKH is not None:
        assert k_BKH.shape == v_BKH.shape == kv_S2BKH.shape[2:]
        assert k_BKH.dtype == v_BKH.dtype == kv_S2BKH.dtype != torch.uint8
        assert k_BKH.is_contiguous()
        assert v_BKH.is_contiguous()
    if row is not None:
        assert kv_S2BKH.dtype == torch.uint8
        for part, target in zip(row, (kv_S2BKH, scale_S2BKG, zero_S2BKG), strict=True):
            assert target is not None
            assert part.is_contiguous()
            assert part.dtype == target.dtype
            assert part.numel() == target[0].numel()
    kernel = _kernel(q_BNH.shape[2])
    prepare = functools.partial(functools.partial, attend_with_torch) if kernel is None else kernel.prepare
    return prepare(
        q_BNH,
        kv_S2BKH,
        length,
        bias_BS,
        first=first,
        out_BNH=out_BNH,
        threads=threads,
        scale_S2BKG=scale_S2BKG,
        zero_S2BKG=zero_S2BKG,
        group_size=group_size,
        k_BKH=k_BKH,
        v_BKH=v_BKH,
        row=row,
    )


def available(head_dim: int) -> bool:
    """Whether the kernel serves heads of this size, and not torch. Builds it the first time: some seconds."""
    return _kernel(head_dim) is not None


def which(head_dim: int = 128) -> str:
    """What serves heads of this size: one of LEVELS (the kernel's instructions) or "torch". Builds it the first time."""
    level = _level(head_dim)
    return "torch" if level is None or _built(level) is None else level


def is_ready(head_dim: int = 128) -> bool:
    """Whether heads of this size can be served at once: nothing is left to build, or nothing can be."""
    level = _level(head_dim)
    return level is None or is_built(*compiled(level))


def _kernel(head_dim: int) -> Kernel | None:
    """The kernel for heads of this size, or none where torch serves them."""
    level = _level(head_dim)
    return None if level is None else _built(level)


def _level(head_dim: int) -> str | None:
    best = _best()
    return None if best is None else level_for(head_dim, best)


@functools.cache
def _built(level: str) -> Kernel | None:
    """The kernel of one of LEVELS, or none where it cannot be built or loaded, which is logged once."""
    try:
        return Kernel(library_path(*compiled(level)))
    except (BuildFailedError, OSError) as error:
        # A compiler may be older than the processor.
        less = [f"{VARIABLE}={each} does with less" for each in LEVELS[: LEVELS.index(level)][-1:]]
        _tell_of_torch("; ".join([str(error), *less]))
        return None


@functools.cache
def _best() -> str | None:
    """The best of LEVELS that the processor has and that may be used; none without a compiler, which is logged once.

    Raises:
        UsageError: the variable names no instructions.
    """
    most = _most()
    try:
        return min(best_level(library_path(source=PROCESSOR)), most, key=LEVELS.index)
    except (BuildFailedError, OSError) as error:
        _tell_of_torch(str(error))
        return None


def _tell_of_torch(reason: str) -> None:
    log.warning("attention on the CPU goes through torch, which is slower: %s", reason)


def _most() -> str:
    """The best instructions that may be used; the variable is for finding out whether one of them gives trouble."""
    most = os.environ.get(VARIABLE) or LEVELS[-1]
    if most not in LEVELS:
        raise UsageError(f"{VARIABLE}={most}: there is {', '.join(LEVELS)}")
    return most
