"""Group-wise integers: tensors stored in 8 or 4 bits, with a scale and a zero for each group of neighbouring numbers.

Groups lie along the last dimension; the last group of a row may be shorter (nothing is padded but the last half byte of
an odd row in 4 bits). Knows nothing of weights, KV or tiers.

    number = code x scale + zero,    0 <= code < 2^bits,    scale and zero in fp16
"""

# R rows  N numbers of a row  G groups of a row  C bytes of a row's codes

import functools
import logging
import math
import subprocess
from collections.abc import Callable

import torch

from flexllmgen.compressed_size import BITS, check_bits, code_bytes, compressed_bytes, num_groups

__all__ = [
    "BITS",
    "RULE",
    "check_bits",
    "code_bytes",
    "compressed_bytes",
    "dequantise",
    "num_groups",
    "quantise",
    "split_compressed",
]

log = logging.getLogger(__name__)

RULE = 1
"""Counts the ways in which numbers were ever rounded: what is kept on disk is found by it."""
_FP16_MAX = 65504.0
_BLOCK_NUMBERS = 1 << 20
"""Numbers that the CPU turns back at once: its temporaries stay in the cache, and small."""
_CUDA_BLOCK_NUMBERS = 1 << 22


def split_compressed(
    memory: torch.Tensor, shape: tuple[int, ...], bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views (codes, scale, zero) of the bytes of compressed tensors: scales first, then zeros, then codes.

    Args:
        memory: uint8 [..., compressed_bytes(shape, ...)], at even addresses.
    """
    *rows, size = shape
    groups, row = num_groups(size, group_size), code_bytes(size, bits)
    scales = 2 * groups * math.prod(rows)
    scale = memory[..., :scales].view(torch.float16).unflatten(-1, (*rows, groups))
    zero = memory[..., scales : 2 * scales].view(torch.float16).unflatten(-1, (*rows, groups))
    codes = memory[..., 2 * scales : 2 * scales + math.prod(rows) * row].unflatten(-1, (*rows, row))
    return codes, scale, zero


def quantise(x: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., C], scale fp16 [..., G] and zero fp16 [..., G] of `x` [..., N] (fp32, fp16 or bf16).

    Each number is off by at most half its group's scale. So that this holds after rounding to fp16, zeros are rounded
    down and scales up: a group's least and greatest numbers are always within reach. A constant group costs nothing in
    precision. Two groups have no such bound: numbers beyond fp16's range are cut to it, and near its end they may be off
    by a whole scale, so that nothing turns back to infinity.

    In 4 bits the first of two neighbours lies in the low half of their byte.
    """
    *rows, size = x.shape
    levels = 2**bits - 1
    groups = num_groups(size, group_size)
    numbers = x.float()
    if size % group_size:
        # The last number again and again: it changes neither the least nor the greatest of its group.
        missing = groups * group_size - size
        numbers = torch.cat([numbers, numbers[..., -1:].expand(*rows, missing)], dim=-1)
    grouped = numbers.reshape(*rows, groups, group_size)
    low, high = (edge.clamp(-_FP16_MAX, _FP16_MAX) for edge in grouped.aminmax(dim=-1))
    zero = -_half_up(-low)
    zero32 = zero.float()
    scale = _half_up((high - zero32) / levels)
    scale32 = scale.float()
    inverse = torch.where(scale32 > 0, 1 / scale32, 0.0)
    # The greatest code that does not turn back to more than fp16 holds.
    top = torch.where(scale32 > 0, ((_FP16_MAX - zero32) / scale32).floor(), 0.0).clamp(max=levels)
    scaled = (grouped - zero32[..., None]).mul_(inverse[..., None]).round_()
    torch.minimum(scaled, top[..., None], out=scaled)
    codes = scaled.clamp_(min=0).to(torch.uint8).reshape(*rows, groups * group_size)[..., :size]
    if bits == 4:
        if size % 2:
            codes = torch.cat([codes, codes.new_zeros(*rows, 1)], dim=-1)
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes.contiguous(), scale, zero


def dequantise(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes code x scale + zero to `out` [..., N] (fp32, fp16 or bf16), and gives it back.

    Computed in fp32 and rounded once to `out`'s type: the product is exact there, so that every device gives the same
    numbers. On CUDA, on the current stream and without a wait; `out` and the parts must then be contiguous but for
    their first dimension, whose step is free where there are more than two.
    """
    *rows, size = out.shape
    groups, row = num_groups(size, group_size), code_bytes(size, bits)
    assert codes.shape == (*rows, row), (codes.shape, out.shape)
    assert scale.shape == zero.shape == (*rows, groups), (scale.shape, out.shape)
    kernel = _kernel() if out.is_cuda else None
    if kernel is not None:
        kernel(codes, scale, zero, bits, group_size, out)
        return out
    if out.dim() > 2:
        for index in range(out.shape[0]):
            dequantise(codes[index], scale[index], zero[index], bits, group_size, out[index])
        return out
    if out.dim() == 1:
        codes, scale, zero, target = codes[None], scale[None], zero[None], out[None]
    else:
        target = out
    at_once = max(1, (_CUDA_BLOCK_NUMBERS if out.is_cuda else _BLOCK_NUMBERS) // max(1, size))
    for first in range(0, len(target), at_once):
        here = slice(first, first + at_once)
        _dequantise_rows(codes[here], scale[here], zero[here], bits, group_size, target[here])
    return out


@functools.cache
def _kernel() -> Callable[..., None] | None:
    """The kernel for CUDA; None where it cannot be built, and torch does its work at a fraction of the rate."""
    try:
        from flexllmgen.compression_triton import dequantise_cuda

        parts = quantise(torch.zeros(1, 64, device="cuda"), 4, 64)
        dequantise_cuda(*parts, 4, 64, torch.empty(1, 64, device="cuda"))
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning(
            "no kernel for compressed numbers can be built (%s); torch turns them back instead", error
        )
        return None
    return dequantise_cuda


def _dequantise_rows(
    codes_RC: torch.Tensor,
    scale_RG: torch.Tensor,
    zero_RG: torch.Tensor,
    bits: int,
    group_size: int,
    out_RN: torch.Tensor,
) -> None:
    codes_RN = codes_RC if bits == 8 else unpacked(codes_RC, out_RN.shape[1])
    if out_RN.dtype == torch.float32:
        turn_rows_back(codes_RN, scale_RG, zero_RG, group_size, out_RN)
    else:
        numbers_RN = out_RN.new_empty(out_RN.shape, dtype=torch.float32)
        turn_rows_back(codes_RN, scale_RG, zero_RG, group_size, numbers_RN)
        out_RN.copy_(numbers_RN)


def unpacked(codes: torch.Tensor, size: int) -> torch.Tensor:
    """Codes of 4 bits one a byte, `size` along the last dimension."""
    # Two codes of a byte to two bytes: the low half stays, the high half moves up.
    pairs = codes.to(torch.int16)
    return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)[..., :size]


def turn_rows_back(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int, out: torch.Tensor
) -> None:
    """`turn_back` of codes [..., N], one a byte, with scales and zeros [..., G] of groups along the last dimension."""
    whole = codes.shape[-1] // group_size
    first = whole * group_size
    if whole:
        shape = (whole, group_size)
        turn_back(
            codes[..., :first].unflatten(-1, shape),
            scale[..., :whole, None],
            zero[..., :whole, None],
            out[..., :first].unflatten(-1, shape),
        )
    if first < codes.shape[-1]:
        turn_back(codes[..., first:], scale[..., whole:], zero[..., whole:], out[..., first:])


def turn_back(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor) -> None:
    """Writes code x scale + zero to `out`, in fp32, with scales and zeros that are broadcast to the codes.

    Multiplied and added in place: two to three times as fast on a CPU as one operation on codes made fp32 before.
    """
    torch.mul(codes, scale.float(), out=out)
    out += zero.float()


def _half_up(x: torch.Tensor) -> torch.Tensor:
    """fp32 to the least fp16 that is not below it; what is beyond fp16 to its greatest."""
    half = x.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16)
    bits = half.view(torch.int16)
    # As integers, fp16 numbers of a sign are in order; the sign bit makes negative ones fall.
    step = torch.where(bits >= 0, 1, -1).to(torch.int16)
    return torch.where(half.float() < x, bits + step, bits).view(torch.float16).clamp(max=_FP16_MAX)
