"""Attention over a prompt and over the cache, on the device that holds the KV.

Both go through torch's scaled dot product attention; what is decided here is which of its kernels can serve.
A mask rules out the flash kernel, so none is made for batches without padding. Grouped queries of a decode
step are passed as rows of one head: every kernel takes that, with or without a mask, and reads each key once.
"""

# B sequences  T new tokens  S cached positions  N query heads  K key heads  G = N / K  H head dim

import torch
import torch.nn.functional as F

from flexllmgen.kv_cache import Segment, StoredSegment
from flexllmgen.kv_compression import CompressedSegment
from flexllmgen.policy import values_used


def prompt_mask(keep_BT: torch.Tensor | None, tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """Which positions attend to which: [B or 1, 1, T, T], true where they do.

    A position always attends to itself, so that padding rows, which nobody reads, do not become NaN.
    """
    index = torch.arange(tokens, device=device)
    allowed = index[:, None] >= index[None, :]
    if window:
        allowed &= index[:, None] - index[None, :] < window
    if keep_BT is None:
        return allowed[None, None]
    itself = torch.eye(tokens, dtype=torch.bool, device=device)
    return ((allowed & keep_BT[:, None, :]) | itself)[:, None]


def prompt_attention(
    q_BTNH: torch.Tensor,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    keep_BT: torch.Tensor | None,
    window: int,
) -> torch.Tensor:
    """Causal attention of a prompt to itself; returns [B, T, N, H]. `keep_BT` is false on padding."""
    tokens, groups = q_BTNH.shape[1], q_BTNH.shape[2] // k_BTKH.shape[2]
    q, k, v = (each.transpose(1, 2) for each in (q_BTNH, k_BTKH, v_BTKH))
    if keep_BT is None and (not window or window >= tokens):
        out = _attend(q, k, v, causal=True, gqa=groups > 1)
    else:
        mask = prompt_mask(keep_BT, tokens, window, q.device)
        if groups > 1:
            # The kernels that take a mask do not share keys between heads; a chunk's copies are small.
            k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
        out = _attend(q, k, v, mask)
    return out.transpose(1, 2)


def decode_attention(
    q_BNH: torch.Tensor,
    segment: StoredSegment,
    length: int,
    bias_B11S: torch.Tensor | None,
    window: int,
    sparsity: float = 1.0,
) -> torch.Tensor:
    """One new token per sequence against `length` cached positions, its own included; returns [B, N, H].

    `bias_B11S` is added to the scores (minus infinity on padding). Compressed KV is turned back first, for some sequences
    after others. With a `sparsity` below 1 only so large a share of the values is used.
    """
    if isinstance(segment, CompressedSegment):
        return _compressed_attention(q_BNH, segment, length, bias_B11S, window, sparsity)
    sequences, heads, size = q_BNH.shape
    num_kv_heads = segment.kv_S2BKH.shape[3]
    first = max(0, length - window) if window else 0
    kv_SBKH = segment.kv_S2BKH[first:length]
    k, v = (kv_SBKH[:, which].permute(1, 2, 0, 3) for which in (0, 1))
    q = q_BNH.reshape(sequences, num_kv_heads, heads // num_kv_heads, size)
    bias = None if bias_B11S is None else bias_between(bias_B11S, first, length)
    if sparsity < 1:
        return _sparse_attention(q, k, v, bias, sparsity).reshape(sequences, heads, size)
    return _attend(q, k, v, bias).reshape(sequences, heads, size)


def bias_between(bias_B11S: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """The bias of positions [first, stop), where the kernels can read it.

    The masked ones load it in vectors and do not check where it starts. A copy starts right; contiguous() is none where
    there is one sequence, since such a part already counts as contiguous.
    """
    bias = bias_B11S[..., first:stop]
    return bias.clone() if first else bias


def append(
    segment: StoredSegment,
    k_BTKH: torch.Tensor,
    v_BTKH: torch.Tensor,
    first: int,
    row: torch.Tensor | None = None,
    *,
    prompt: bool = False,
    keep_BT: torch.Tensor | None = None,
) -> None:
    """Writes keys and values of all the segment's sequences at positions from `first` on.

    With `row`, at that one position, which the device knows and the host need not. `prompt` and `keep_BT`, which is false
    on padding, count where KV is compressed.
    """
    if isinstance(segment, CompressedSegment):
        assert row is None, "a step with compressed KV is not recorded"
        if prompt:
            segment.codec.write_prompt(segment, k_BTKH, v_BTKH, first, keep_BT)
        else:
            segment.codec.write_step(segment, k_BTKH, v_BTKH, first)
        return
    if row is not None:
        segment.kv_S2BKH.index_copy_(0, row, torch.stack((k_BTKH[:, 0], v_BTKH[:, 0]))[None])
        return
    rows = segment.kv_S2BKH[first : first + k_BTKH.shape[1]]
    rows[:, 0].copy_(k_BTKH.transpose(0, 1))
    rows[:, 1].copy_(v_BTKH.transpose(0, 1))


def _compressed_attention(
    q_BNH: torch.Tensor,
    segment: CompressedSegment,
    length: int,
    bias_B11S: torch.Tensor | None,
    window: int,
    sparsity: float,
) -> torch.Tensor:
    first = max(0, length - window) if window else 0
    turned, codec = segment.codec.turned(q_BNH), segment.codec
    bias = None if bias_B11S is None else bias_between(bias_B11S, first, length)
    mixed = []
    for start in range(0, len(q_BNH), codec.sequences):
        stop = min(start + codec.sequences, len(q_BNH))
        mine = segment.part(segment.start + start, segment.start + stop)
        dense = Segment(mine.start, mine.stop, codec.read(mine, first, length))
        here = None if bias is None else bias[start:stop]
        mixed.append(decode_attention(turned[start:stop], dense, length - first, here, 0, sparsity))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _sparse_attention(
    q_BKGH: torch.Tensor,
    k_BKSH: torch.Tensor,
    v_BKSH: torch.Tensor,
    bias_B11S: torch.Tensor | None,
    share: float,
) -> torch.Tensor:
    """Attention with the values of a share of the positions only (FlexGen, Sheng et al. 2023, section 5): [B, K, G, H].

    All weights are computed, and the largest used as they are: they no longer sum to one. The query heads that share a key
    head share its positions, chosen by the sum of their weights, so that a value is read once for all of them.
    """
    scores = (q_BKGH @ k_BKSH.transpose(2, 3)).float() * q_BKGH.shape[-1] ** -0.5
    if bias_B11S is not None:
        scores += bias_B11S
    weights_BKGS = scores.softmax(dim=-1)
    count = values_used(weights_BKGS.shape[-1], share)
    top_BKC = weights_BKGS.sum(dim=2).topk(count, dim=-1).indices
    kept = weights_BKGS.gather(3, top_BKC[:, :, None].expand(-1, -1, q_BKGH.shape[2], -1))
    values = v_BKSH.gather(2, top_BKC[..., None].expand(-1, -1, -1, v_BKSH.shape[-1]))
    out_BKGH: torch.Tensor = kept.to(values.dtype) @ values
    return out_BKGH


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    causal: bool = False,
    gqa: bool = False,
) -> torch.Tensor:
    """torch's attention without cuDNN's kernel, which is planned anew for every length: 1.8 ms a call.

    Decoding meets a new length at every step, so that planning took more time than all the work it was for.
    """
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
