"""The kernel that turns group-wise integers back on CUDA. Imported where a CUDA tensor is met, and nowhere else.

One program takes some neighbouring groups: their scales and zeros are read once, codes and numbers in long runs.
"""

# mypy: ignore-errors

import torch
import triton
import triton.language as tl

_NUMBERS = 4096
"""Numbers of one program."""


@triton.jit
def _dequantise_kernel(
    codes,
    scale,
    zero,
    out,
    size,
    groups,
    row_bytes,
    codes_step,
    scale_step,
    out_step,
    row_blocks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    program = tl.program_id(0)
    # In 64 bits: large tensors have more numbers than 32 count. Within a program 32 are enough.
    batch = tl.program_id(1).to(tl.int64)
    row = (program // row_blocks).to(tl.int64)
    first = (program % row_blocks).to(tl.int64) * BLOCK_GROUPS
    group = tl.arange(0, BLOCK_GROUPS)
    scale_at = batch * scale_step + row * groups + first
    here = group < groups - first
    scales = tl.load(scale + scale_at + group, mask=here, other=0.0).to(tl.float32)
    zeros = tl.load(zero + scale_at + group, mask=here, other=0.0).to(tl.float32)
    number = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = number < size - first * GROUP
    codes_at = codes + batch * codes_step + row * row_bytes + first * (GROUP * BITS // 8)
    if BITS == 8:
        code = tl.load(codes_at + number, mask=inside, other=0)
    else:
        byte = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        pair = tl.load(codes_at + byte, mask=byte < row_bytes - first * (GROUP // 2), other=0)
        code = tl.interleave(pair & 15, pair >> 4)
    value = code.to(tl.float32) * scales[:, None] + zeros[:, None]
    out_at = out + batch * out_step + row * size + first * GROUP
    tl.store(out_at + number, value.to(out.dtype.element_ty), mask=inside)


def dequantise_cuda(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    group_size: int,
    out: torch.Tensor,
) -> None:
    """As `compression.dequantise`, on the current stream of the tensors' device."""
    batched = out.dim() > 2
    batch = out.shape[0] if batched else 1
    each = (codes[0], scale[0], zero[0], out[0]) if batched else (codes, scale, zero, out)
    assert all(tensor.is_contiguous() for tensor in each), (
        "only the first dimension may have a step of its own"
    )
    size = out.shape[-1]
    rows = each[3].numel() // size
    if size % group_size == 0:
        # Rows of whole groups are one long row.
        size, rows = size * rows, 1
    groups, row_bytes = -(-size // group_size), -(-size * bits // 8)
    block_groups = min(_NUMBERS // group_size, triton.next_power_of_2(groups))
    row_blocks = triton.cdiv(groups, block_groups)
    steps = [tensor.stride(0) if batched else 0 for tensor in (codes, scale, out)]
    assert not batched or zero.stride(0) == scale.stride(0)
    _dequantise_kernel[(rows * row_blocks, batch)](
        codes,
        scale,
        zero,
        out,
        size,
        groups,
        row_bytes,
        *steps,
        row_blocks,
        BITS=bits,
        GROUP=group_size,
        BLOCK_GROUPS=block_groups,
        num_warps=4,
    )
