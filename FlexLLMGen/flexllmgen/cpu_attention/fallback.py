"""Decode attention on the CPU through torch, where the kernel cannot be built.

Knows the same layouts as the kernel; reads 16-bit and integer KV more slowly than memory could give it.
"""

# B sequences  S positions  N query heads  K key heads  G groups of a row  H head dim

import torch
import torch.nn.functional as F

from flexllmgen.compression import dequantise
from flexllmgen.cpu_attention.library import Row


def attend_with_torch(
    q_BNH: torch.Tensor,
    kv_S2BKH: torch.Tensor,
    length: int,
    bias_BS: torch.Tensor | None,
    *,
    first: int,
    out_BNH: torch.Tensor,
    threads: int,
    scale_S2BKG: torch.Tensor | None,
    zero_S2BKG: torch.Tensor | None,
    group_size: int,
    k_BKH: torch.Tensor | None = None,
    v_BKH: torch.Tensor | None = None,
    row: Row | None = None,
) -> None:
    """The arguments of `prepare_attention`, already checked."""
    sequences, heads, size = q_BNH.shape
    if k_BKH is not None and v_BKH is not None:
        kv_S2BKH[length - 1, 0], kv_S2BKH[length - 1, 1] = k_BKH, v_BKH
    for part, target in zip(row or (), (kv_S2BKH, scale_S2BKG, zero_S2BKG), strict=False):
        assert target is not None
        at = target[length - 1].transpose(0, 1)
        at.copy_(part.view(at.shape))
    kv = kv_S2BKH[first:length]
    if scale_S2BKG is not None and zero_S2BKG is not None:
        numbers = torch.empty(kv.shape, dtype=q_BNH.dtype)
        dequantise(kv, scale_S2BKG[first:length], zero_S2BKG[first:length], 8, group_size, numbers)
        kv = numbers
    num_kv_heads = kv.shape[3]
    k, v = (kv[:, which].permute(1, 2, 0, 3) for which in (0, 1))
    q = q_BNH.reshape(sequences, num_kv_heads, heads // num_kv_heads, size).to(kv.dtype)
    # A copy: the masked kernel loads it in vectors, and does not check where it starts.
    bias = None if bias_BS is None else bias_BS[:, None, None, first:length].to(kv.dtype, copy=True)
    before = torch.get_num_threads()
    try:
        if threads != before:
            torch.set_num_threads(threads)
        out = F.scaled_dot_product_attention(q, k, v, bias)
    finally:
        if threads != before:
            torch.set_num_threads(before)
    out_BNH.copy_(out.reshape(sequences, heads, size))
