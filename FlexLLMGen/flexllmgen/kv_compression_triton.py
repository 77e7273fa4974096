"""The kernels of KVCodec on CUDA: rows written and turned back in one pass each. Imported where a CUDA tensor is met.

They give what kv_compression.py and compression.py do in torch, but that a scale may be rounded to the next number.
A row's parts are addressed by their strides, so that any sequences of any tier's rows are read and written in place.
"""

# mypy: ignore-errors
# B sequences  S positions  T new positions  E channels  C bytes of E codes  L groups of E channels

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from flexllmgen.kv_compression import CompressedSegment

_FP16_MAX = tl.constexpr(65504.0)
_ROUNDER = tl.constexpr(12582912.0)
"""1.5 x 2^23: added and taken off again, it leaves a small fp32 number rounded to an integer, half to even."""
_CHANNELS = 256
_POSITIONS = 16


@triton.jit
def _half_up(x):
    """fp32 to the least fp16 that is not below it."""
    half = tl.minimum(tl.maximum(x, -_FP16_MAX), _FP16_MAX).to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    step = tl.where(bits >= 0, 1, -1).to(tl.int16)
    up = tl.where(half.to(tl.float32) < x, bits + step, bits).to(tl.int16)
    return tl.minimum(up.to(tl.float16, bitcast=True).to(tl.float32), _FP16_MAX)


@triton.jit
def _scale_and_zero(low, high, LEVELS: tl.constexpr):
    """Scale, zero, what to multiply by, and the greatest code that does not turn back to more than fp16 holds."""
    zero = -_half_up(-low)
    # Rounded as torch rounds: a plain division is off by a bit or two, and a scale then one number up.
    scale = _half_up(tl.div_rn(high - zero, tl.full(high.shape, LEVELS, tl.float32)))
    safe = tl.where(scale > 0, scale, 1.0)
    inverse = tl.where(scale > 0, tl.div_rn(tl.full(safe.shape, 1.0, tl.float32), safe), 0.0)
    top = tl.where(scale > 0, tl.floor(tl.div_rn(_FP16_MAX - zero, safe)), 0.0)
    return scale, zero, inverse, tl.minimum(top, LEVELS)


@triton.jit
def _code(x, zero, inverse, top):
    code = ((x - zero) * inverse + _ROUNDER) - _ROUNDER
    return tl.maximum(tl.minimum(code, top), 0.0).to(tl.uint8)


@triton.jit
def _number(x, at, here):
    x = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(x, -_FP16_MAX), _FP16_MAX)


@triton.jit
def _write_rows_kernel(
    x,
    codes,
    scale,
    zero,
    tokens,
    channels,
    groups,
    x_step_b,
    x_step_t,
    codes_step_s,
    codes_step_b,
    scale_step_s,
    scale_step_b,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = group < groups
    x += batch * x_step_b + token * x_step_t
    codes += token * codes_step_s + batch * codes_step_b
    side = token * scale_step_s + batch * scale_step_b
    # In 4 bits: the pairs of a byte.
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = group[:, None] * (GROUP // PER_BYTE) + tl.arange(0, GROUP // PER_BYTE)[None, :]
    first = byte * PER_BYTE
    here = known[:, None] & (first < channels)
    low_x = _number(x, first, here)
    low, high = tl.min(tl.where(here, low_x, 1e38), 1), tl.max(tl.where(here, low_x, -1e38), 1)
    if BITS == 4:
        there = known[:, None] & (first + 1 < channels)
        high_x = _number(x, first + 1, there)
        low = tl.minimum(low, tl.min(tl.where(there, high_x, 1e38), 1))
        high = tl.maximum(high, tl.max(tl.where(there, high_x, -1e38), 1))
    low, high = tl.where(known, low, 0.0), tl.where(known, high, 0.0)
    scales, zeros, inverse, top = _scale_and_zero(low, high, 2**BITS - 1)
    tl.store(scale + side + group, scales.to(tl.float16), mask=known)
    tl.store(zero + side + group, zeros.to(tl.float16), mask=known)
    code = _code(low_x, zeros[:, None], inverse[:, None], top[:, None])
    if BITS == 4:
        second = _code(high_x, zeros[:, None], inverse[:, None], top[:, None])
        code |= tl.where(there, second, 0).to(tl.uint8) << 4
    tl.store(codes + byte, code, mask=here)


@triton.jit
def _block_channels(x, at, here, GROUP_AXIS: tl.constexpr, LEVELS: tl.constexpr):
    """Numbers [positions, channels] of a block and what each channel is written with."""
    numbers = _number(x, at, here)
    low, high = tl.min(numbers, GROUP_AXIS), tl.max(numbers, GROUP_AXIS)
    scales, zeros, inverse, top = _scale_and_zero(low, high, LEVELS)
    return _code(numbers, zeros[None, :], inverse[None, :], top[None, :]), scales, zeros


@triton.jit
def _store_sides(side, group_of, scale, zero, scales, zeros, channel, channels, groups, scale_step_s):
    """A block's channel c is described where group c % L of its row c // L would be."""
    at = group_of + (channel // groups).to(tl.int64) * scale_step_s + channel % groups
    tl.store(scale + side + at, scales.to(tl.float16), mask=channel < channels)
    tl.store(zero + side + at, zeros.to(tl.float16), mask=channel < channels)


@triton.jit
def _write_blocks_kernel(
    x,
    codes,
    scale,
    zero,
    blocks,
    channels,
    groups,
    x_step_b,
    x_step_t,
    codes_step_s,
    codes_step_b,
    scale_step_s,
    scale_step_b,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    batch, block = unit // blocks, unit % blocks
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = byte * PER_BYTE
    position = block * GROUP + tl.arange(0, GROUP).to(tl.int64)
    x_at = batch * x_step_b + position[:, None] * x_step_t
    side, begin = batch * scale_step_b, block * GROUP * scale_step_s
    here = (first < channels)[None, :] & (position >= 0)[:, None]
    code, scales, zeros = _block_channels(x, x_at + first[None, :], here, 0, 2**BITS - 1)
    _store_sides(side, begin, scale, zero, scales, zeros, first, channels, groups, scale_step_s)
    if BITS == 4:
        second = first + 1
        there = (second < channels)[None, :] & (position >= 0)[:, None]
        high, scales, zeros = _block_channels(x, x_at + second[None, :], there, 0, 2**BITS - 1)
        _store_sides(side, begin, scale, zero, scales, zeros, second, channels, groups, scale_step_s)
        code |= high << 4
    codes_at = position[:, None] * codes_step_s + batch * codes_step_b + byte[None, :]
    tl.store(codes + codes_at, code, mask=here)


# Positions change from step to step: none of their values shall have a kernel of its own.
@triton.jit(do_not_specialize=["first", "stop", "blocks_stop"])
def _read_kernel(
    codes,
    scale,
    zero,
    out,
    first,
    stop,
    blocks_stop,
    count,
    channels,
    groups,
    codes_step_s,
    codes_step_b,
    codes_step_2,
    scale_step_s,
    scale_step_b,
    scale_step_2,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    side = tl.program_id(1).to(tl.int64)
    batch, which = side // 2, side % 2
    position = first + tl.program_id(0).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    channel = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    here = (position < stop)[:, None] & (channel < channels)[None, :]
    codes += batch * codes_step_b + which * codes_step_2
    PER_BYTE: tl.constexpr = 8 // BITS
    at = position[:, None] * codes_step_s + (channel // PER_BYTE)[None, :]
    code = tl.load(codes + at, mask=here, other=0)
    if BITS == 4:
        code = (code >> ((channel % 2) * 4).to(tl.uint8)[None, :]) & 15
    # Where the scale of a number lies: with its position's groups, or with those of a row of its block.
    blocked = (which == 0) & (position < blocks_stop)
    by_row = position[:, None] * scale_step_s + (channel // GROUP)[None, :]
    block_row = (position // GROUP * GROUP)[:, None] + (channel // groups)[None, :]
    by_block = block_row * scale_step_s + (channel % groups)[None, :]
    side_at = batch * scale_step_b + which * scale_step_2 + tl.where(blocked[:, None], by_block, by_row)
    scales = tl.load(scale + side_at, mask=here, other=0.0).to(tl.float32)
    zeros = tl.load(zero + side_at, mask=here, other=0.0).to(tl.float32)
    value = code.to(tl.float32) * scales + zeros
    out_at = ((position - first)[:, None] * count + batch) * 2 + which
    out_at = out_at * channels + channel[None, :]
    tl.store(out + out_at, value.to(out.dtype.element_ty), mask=here)


def write_rows(
    segment: "CompressedSegment", which: int, x_BTE: torch.Tensor, first: int, bits: int, group_size: int
) -> None:
    """Keys (0) or values (1) of positions from `first` on, with groups along a position's channels."""
    groups = segment.scale_SB2L.shape[-1]
    block = min(triton.next_power_of_2(groups), max(1, 2048 // group_size))
    rows = x_BTE.shape[1]
    _write(_write_rows_kernel, segment, which, x_BTE, first, rows, (groups, block), bits, group_size)


def write_blocks(
    segment: "CompressedSegment", x_BTE: torch.Tensor, first: int, bits: int, group_size: int
) -> None:
    """Keys of whole blocks from `first` on, with groups along a block's positions."""
    row_bytes = segment.codes_SB2C.shape[-1]
    block = min(triton.next_power_of_2(row_bytes), 32)
    blocks = x_BTE.shape[1] // group_size
    _write(_write_blocks_kernel, segment, 0, x_BTE, first, blocks, (row_bytes, block), bits, group_size)


def _write(
    kernel: triton.JITFunction,
    segment: "CompressedSegment",
    which: int,
    x_BTE: torch.Tensor,
    first: int,
    units: int,
    cut: tuple[int, int],
    bits: int,
    group_size: int,
) -> None:
    """Runs a kernel for each of the sequences' `units`, and for `cut[1]` at a time of the `cut[0]` parts of one."""
    parts = (segment.codes_SB2C, segment.scale_SB2L, segment.zero_SB2L)
    assert parts[1].stride() == parts[2].stride()
    codes, scale, zero = (part[first:, :, which] for part in parts)
    batch, _, channels = x_BTE.shape
    num_parts, block = cut
    kernel[(batch * units, triton.cdiv(num_parts, block))](
        x_BTE,
        codes,
        scale,
        zero,
        units,
        channels,
        scale.shape[-1],
        *_steps(x_BTE),
        *_steps(codes),
        *_steps(scale),
        BITS=bits,
        GROUP=group_size,
        BLOCK=block,
    )


def read_rows(
    segment: "CompressedSegment",
    out_SB2E: torch.Tensor,
    first: int,
    blocks_stop: int,
    bits: int,
    group_size: int,
) -> None:
    """Turns back positions from `first` on into `out`, which is contiguous."""
    codes, scale, zero = segment.codes_SB2C, segment.scale_SB2L, segment.zero_SB2L
    assert out_SB2E.is_contiguous()
    assert scale.stride() == zero.stride()
    positions, count, _, channels = out_SB2E.shape
    block_channels = min(triton.next_power_of_2(channels), _CHANNELS)
    grid = (triton.cdiv(positions, _POSITIONS), 2 * count, triton.cdiv(channels, block_channels))
    _read_kernel[grid](
        codes,
        scale,
        zero,
        out_SB2E,
        first,
        first + positions,
        blocks_stop,
        count,
        channels,
        scale.shape[-1],
        codes.stride(0),
        codes.stride(1),
        codes.stride(2),
        scale.stride(0),
        scale.stride(1),
        scale.stride(2),
        BITS=bits,
        GROUP=group_size,
        BLOCK_POSITIONS=_POSITIONS,
        BLOCK_CHANNELS=block_channels,
    )


def _steps(tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of the first two dimensions; the last is contiguous."""
    assert tensor.stride(-1) == 1
    return tensor.stride(0), tensor.stride(1)
