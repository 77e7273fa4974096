"""The grouped product of a mixture's experts as one kernel. Imported on CUDA, and nowhere else."""

# mypy: ignore-errors
# A assignments  T tiles  I, O sizes of what goes in and comes out

import functools

import torch
import triton
import triton.language as tl

from flexllmgen.models.experts import Tiles

_WIDE_SHARED_BYTES = 160 << 10
"""Shared memory of a block on a device whose tiles may be wide: three stages of 128 x 64 and 64 x 256 numbers are 144 KiB."""


@triton.jit
def _product_kernel(
    x,
    rows,
    addresses,
    out,
    expert_of,
    first_of,
    stop_of,
    experts,
    tiles,
    in_size,
    out_size,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    TILES_BESIDE: tl.constexpr,
):
    # Some tiles go through the columns together: those at work at the same time share rows and weights in the cache.
    together = TILES_BESIDE * tl.cdiv(out_size, OUT_BLOCK)
    first_tile = tl.program_id(0) // together * TILES_BESIDE
    beside = tl.minimum(tiles - first_tile, TILES_BESIDE)
    tile = first_tile + tl.program_id(0) % together % beside
    expert = tl.load(expert_of + tile)
    if expert >= experts:
        return
    assignment = tl.load(first_of + tile) + tl.arange(0, ROWS)
    mine = assignment < tl.load(stop_of + tile)
    row = tl.load(rows + assignment, mask=mine, other=0) if GATHER else assignment
    column = tl.program_id(0) % together // beside * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    # Packed tensors begin at multiples of this. Said of the pointer, it makes loads 16 bytes wide; said of the number, 2.
    weight = tl.load(addresses + expert).to(tl.pointer_type(out.dtype.element_ty))
    weight = tl.multiple_of(weight, 128)
    total = tl.zeros((ROWS, OUT_BLOCK), dtype=tl.float32)
    for start in range(0, in_size, IN_BLOCK):
        place = start + tl.arange(0, IN_BLOCK)
        left = tl.load(
            x + row[:, None] * in_size + place[None, :],
            mask=mine[:, None] & (place < in_size)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + column[None, :].to(tl.int64) * in_size + place[:, None],
            mask=(column < out_size)[None, :] & (place < in_size)[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    at = out + assignment[:, None] * out_size + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=mine[:, None] & (column < out_size)[None, :])


def grouped_product(
    x: torch.Tensor, tiles: Tiles, addresses_E: torch.Tensor, out_size: int, tile_rows: int, *, gather: bool
) -> torch.Tensor:
    """Each assignment's row times its expert's weights [O, I], transposed: [A, O].

    Args:
        x: contiguous [R, I] with `gather`, where assignments take their rows from it; else [A, I], sorted already.
        addresses_E: where each expert's weights begin; of the type of `x`.
    """
    x, in_size = x.contiguous(), x.shape[1]
    out = torch.empty(len(tiles.rows_A), out_size, dtype=x.dtype, device=x.device)
    full, large = x.dtype == torch.float32, tile_rows > 64
    out_block = 256 if large and not full and _has_wide_tiles(x.device) else 128
    num_tiles = len(tiles.expert_T)
    _product_kernel[(triton.cdiv(out_size, out_block) * num_tiles,)](
        x,
        tiles.rows_A,
        addresses_E,
        out,
        tiles.expert_T,
        tiles.first_T,
        tiles.stop_T,
        len(addresses_E),
        num_tiles,
        in_size,
        out_size,
        GATHER=gather,
        PRECISION="ieee" if full else "tf32",
        ROWS=tile_rows,
        OUT_BLOCK=out_block,
        IN_BLOCK=32 if full else 64,
        # An expert of few rows has one tile, which reads its weights once in any order.
        TILES_BESIDE=16 if large else 1,
        num_warps=8 if large else 4,
        num_stages=3,
    )
    return out


@functools.cache
def _has_wide_tiles(device: torch.device) -> bool:
    # torch does not know this of every device.
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= _WIDE_SHARED_BYTES
