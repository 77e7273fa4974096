"""KVCodec: keys and values of the cache as group-wise integers; how they are written, and turned back for a step.

A row is a position, as in a dense cache, so that everything that moves rows is the same. It holds scales, zeros and
codes [sequence, key or value, channel], or those of one sequence where its positions lie together. Values, and keys
of generated tokens, have a scale and a zero for each `group_size` channels of a position. Keys of a prompt have them
for each channel over `group_size` positions, as KIVI (Liu et al. 2024, arXiv 2402.02750) found to be better: a
channel keeps its magnitude over positions, while neighbouring channels differ. A prompt is known at once, so its
blocks are; what is left of it beyond whole blocks is written as generated tokens are. Where the CPU attends all keys
are, since its kernel takes one scale for a group of a row. As many scales are needed either way, so that those of a
block's channels lie where those of its rows would.

Two steps make generated keys' groups alike. Each head is turned by a Hadamard matrix, queries too, which leaves scores as
they are and spreads what few channels hold over all (as QuaRot does, Ashkboos et al. 2024, arXiv 2404.00456). And the
prompt's mean key is taken off every key of a sequence: that adds the same to all scores of a query, which softmax does not
see. So nothing is added back.

Measured on SmolLM2-135M (perplexity of generated positions over the lossless one; benchmarks/kv_quality.py): with 4 bits in
groups of 64, keys by token as FlexGen has them (Sheng et al. 2023) cost 11.7 %, turned 5.0 %, centred 6.5 %, both 3.3 %, and
by channel 1.3 %, at the same bytes; values by token alone cost 0.6 %. This codec costs 2.2 %, and 0.03 % with 8 bits. KIVI
keeps the newest positions of each sequence dense until their block is full; here they are integers at once, so that a row
is written once and all rows are of one size, which costs a part of that gain for text much longer than its prompt.

A step quantises its own key and value first and attends to them as every later step will. Knows nothing of tiers, slots
or models.
"""

# B sequences  S positions  T new positions  K key heads  H head dim  E = K * H channels  C bytes of E codes
# L groups of E channels  G positions of a block

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flexllmgen.compressed_size import compressed_bytes
from flexllmgen.compression import quantise, split_compressed, turn_back, turn_rows_back, unpacked

_NUMBERS_AT_ONCE = 1 << 22
"""Numbers that are turned back at once without a kernel: bounds what that takes."""


def hadamard(size: int) -> torch.Tensor:
    """An orthogonal matrix [size, size] that spreads each channel over the power of two channels around it.

    >>> (hadamard(2) * 2**0.5).round().tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    block = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    blocks: torch.Tensor = torch.block_diag(*[matrix / math.sqrt(block)] * (size // block))
    return blocks


@dataclass(frozen=True, slots=True)
class CompressedSegment:
    """Neighbouring sequences [start, stop) of a micro-batch whose compressed KV lies together.

    `centre_BKH` is what was taken off each turned key; it stays on the compute device.
    """

    start: int
    stop: int
    codes_SB2C: torch.Tensor
    scale_SB2L: torch.Tensor
    zero_SB2L: torch.Tensor
    centre_BKH: torch.Tensor
    codec: "KVCodec"

    def part(self, start: int, stop: int) -> "CompressedSegment":
        """Sequences [start, stop) of the micro-batch."""
        mine = slice(start - self.start, stop - self.start)
        return CompressedSegment(
            start,
            stop,
            self.codes_SB2C[:, mine],
            self.scale_SB2L[:, mine],
            self.zero_SB2L[:, mine],
            self.centre_BKH[mine],
            self.codec,
        )

    def by_heads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of 8 bits [S, 2, B, K, H], their scales and their zeros [S, 2, B, K, groups of a head]: views."""
        heads = len(self.centre_BKH[0])
        codes, scale, zero = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in (self.codes_SB2C, self.scale_SB2L, self.zero_SB2L)
        )
        return codes, scale, zero


class KVCodec:
    """Writes and reads compressed rows.

    Args:
        bits: of a code, 8 or 4.
        group_size: channels, or positions of a prompt, that share a scale and a zero.
        scratch: flat memory of the compute device in the model's dtype, for what is turned back.
        sequences: how many the scratch holds all positions of.
        by_channel: a prompt's keys have groups along the positions of a block.
    """

    def __init__(
        self,
        *,
        bits: int,
        group_size: int,
        kv_heads: int,
        head_dim: int,
        scratch: torch.Tensor,
        sequences: int,
        by_channel: bool = True,
    ) -> None:
        self._by_channel = by_channel
        self.bits, self.group_size, self.sequences = bits, group_size, sequences
        self._shape, self._scratch = (kv_heads, head_dim), scratch
        self._channels = kv_heads * head_dim
        self._turn_HH = hadamard(head_dim).to(scratch.device, scratch.dtype)
        self._blocks_stop = 0

    def begin(self, first: int, stop: int) -> None:
        """A new block of requests, whose prompts take positions [first, stop)."""
        # A prompt that begins later was not computed before: what lies there counts as its blocks.
        blocks = (first or stop) // self.group_size if self._by_channel else 0
        self._blocks_stop = blocks * self.group_size

    def segment(self, rows: torch.Tensor, start: int, centre_BKH: torch.Tensor) -> CompressedSegment:
        """The segment of the sequences from `start` that have a centre.

        Args:
            rows: uint8 [S, bytes of all sequences], or [B, S, bytes of one].
        """
        count = len(centre_BKH)
        if rows.dim() == 2:
            codes, scale, zero = split_compressed(
                rows, (count, 2, self._channels), self.bits, self.group_size
            )
        else:
            parts_BS = split_compressed(rows, (2, self._channels), self.bits, self.group_size)
            codes, scale, zero = (part.transpose(0, 1) for part in parts_BS)
        return CompressedSegment(start, start + count, codes, scale, zero, centre_BKH, self)

    def write_prompt(
        self,
        segment: CompressedSegment,
        k_BTKH: torch.Tensor,
        v_BTKH: torch.Tensor,
        first: int,
        keep_BT: torch.Tensor | None,
    ) -> None:
        """Writes positions from `first` on and learns the sequences' centres; `keep_BT` is false on padding."""
        keys, kept = k_BTKH @ self._turn_HH, None
        if keep_BT is None:
            segment.centre_BKH.copy_(keys.mean(dim=1))
        else:
            kept = keep_BT.to(keys.dtype)
            share_B1T = (kept / kept.sum(dim=1, keepdim=True))[:, None]
            segment.centre_BKH.copy_((share_B1T @ keys.flatten(2)).view_as(segment.centre_BKH))
        keys -= segment.centre_BKH[:, None]
        if kept is not None:
            # Padding is never read, and must not widen what its block spans.
            keys *= kept[:, :, None, None]
        blocks = max(0, min(self._blocks_stop - first, keys.shape[1]))
        keys_BTE = keys.flatten(2)
        if blocks:
            self._write_blocks(segment, keys_BTE[:, :blocks], first)
        if blocks < keys.shape[1]:
            self._write(segment, 0, keys_BTE[:, blocks:], first + blocks)
        self._write(segment, 1, v_BTKH.flatten(2), first)

    def write_step(
        self, segment: CompressedSegment, k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, position: int
    ) -> None:
        """Writes the one position of a step."""
        keys = self.turned(k_BTKH) - segment.centre_BKH[:, None]
        if keys.is_cuda:
            self._write(segment, 0, keys.flatten(2), position)
            self._write(segment, 1, v_BTKH.flatten(2), position)
            return
        # Both at once: of so few numbers it is the operations that take the time.
        both_B2E = torch.cat((keys.flatten(2), v_BTKH.flatten(2)), dim=1)
        for target, part in zip(_parts(segment), quantise(both_B2E, self.bits, self.group_size), strict=True):
            target[position].copy_(part)

    def step_row(self, segment: CompressedSegment, k_BKH: torch.Tensor, v_BKH: torch.Tensor) -> torch.Tensor:
        """One position of the segment's sequences as it would be written, uint8 [bytes], on the compute device."""
        shape = (segment.stop - segment.start, 2, self._channels)
        num_bytes = compressed_bytes(shape, self.bits, self.group_size)
        row = torch.empty(num_bytes, dtype=torch.uint8, device=k_BKH.device)
        self.write_step(
            self.segment(row[None], segment.start, segment.centre_BKH), k_BKH[:, None], v_BKH[:, None], 0
        )
        return row

    def row_parts(self, row: torch.Tensor, sequences: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and zeros of a row of so many sequences."""
        return split_compressed(row, (sequences, 2, self._channels), self.bits, self.group_size)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Heads [..., H] in the directions that keys are kept in: queries must be too."""
        return x @ self._turn_HH

    def read(self, segment: CompressedSegment, first: int, stop: int) -> torch.Tensor:
        """Keys and values of positions [first, stop), [S, 2, B, K, H] in scratch memory: good until the next call."""
        count = segment.stop - segment.start
        size = (stop - first) * count * 2 * self._channels
        out_SB2E = self._scratch[:size].view(stop - first, count, 2, self._channels)
        if out_SB2E.is_cuda:
            from flexllmgen.kv_compression_triton import read_rows

            read_rows(segment, out_SB2E, first, self._blocks_stop, self.bits, self.group_size)
        else:
            at_once = max(1, _NUMBERS_AT_ONCE // (count * self._channels))
            for which, blocks_stop in ((0, self._blocks_stop), (1, 0)):
                for start, end in self._pieces(first, stop, at_once, blocks_stop):
                    part_SBE = out_SB2E[start - first : end - first, :, which]
                    self._read(segment, which, part_SBE, start, by_channel=start < blocks_stop)
        kv_SB2KH: torch.Tensor = out_SB2E.unflatten(-1, self._shape)
        return kv_SB2KH.transpose(1, 2)

    def _write(self, segment: CompressedSegment, which: int, x_BTE: torch.Tensor, first: int) -> None:
        """Keys (0) or values (1) with groups along the channels of a position."""
        if x_BTE.is_cuda:
            from flexllmgen.kv_compression_triton import write_rows

            write_rows(segment, which, x_BTE, first, self.bits, self.group_size)
            return
        rows = slice(first, first + x_BTE.shape[1])
        parts = quantise(x_BTE, self.bits, self.group_size)
        for target, part in zip(_parts(segment), parts, strict=True):
            target[rows, :, which].copy_(part.transpose(0, 1))

    def _write_blocks(self, segment: CompressedSegment, x_BTE: torch.Tensor, first: int) -> None:
        """Keys with groups along the positions of a block."""
        if x_BTE.is_cuda:
            from flexllmgen.kv_compression_triton import write_blocks

            write_blocks(segment, x_BTE, first, self.bits, self.group_size)
            return
        group, rows = self.group_size, slice(first, first + x_BTE.shape[1])
        blocks_BNEG = x_BTE.unflatten(1, (-1, group)).transpose(2, 3)
        codes, scale, zero = quantise(blocks_BNEG, self.bits, group)
        codes = codes if self.bits == 8 else unpacked(codes, group)
        codes_BTE = codes.transpose(2, 3).flatten(1, 2)
        segment.codes_SB2C[rows, :, 0] = _packed(codes_BTE, self.bits).transpose(0, 1)
        for target, part in ((segment.scale_SB2L, scale), (segment.zero_SB2L, zero)):
            room_BNE = part.new_zeros(*part.shape[:2], group * target.shape[-1])
            room_BNE[..., : self._channels] = part[..., 0]
            target[rows, :, 0] = room_BNE.unflatten(-1, (group, -1)).flatten(1, 2).transpose(0, 1)

    def _pieces(self, first: int, stop: int, at_once: int, blocks_stop: int) -> Iterator[tuple[int, int]]:
        """Cuts positions into runs of up to `at_once`; none has parts of two of the blocks that end at `blocks_stop`."""
        while first < stop:
            end = min(stop, first + at_once)
            if first < blocks_stop:
                end = min(end, first // self.group_size * self.group_size + self.group_size)
            yield first, end
            first = end

    def _read(
        self, segment: CompressedSegment, which: int, out_SBE: torch.Tensor, first: int, *, by_channel: bool
    ) -> None:
        """Keys (0) or values (1) of one of `_pieces`."""
        stop = first + len(out_SBE)
        codes_SBE = segment.codes_SB2C[first:stop, :, which]
        if self.bits == 4:
            codes_SBE = unpacked(codes_SBE, self._channels)
        numbers_SBE = out_SBE if out_SBE.dtype == torch.float32 else torch.empty(out_SBE.shape)
        scales = segment.scale_SB2L, segment.zero_SB2L
        if by_channel:
            scale_BE, zero_BE = (self._of_block(part, first) for part in scales)
            turn_back(codes_SBE, scale_BE, zero_BE, numbers_SBE)
        else:
            scale_SBL, zero_SBL = (part[first:stop, :, which] for part in scales)
            turn_rows_back(codes_SBE, scale_SBL, zero_SBL, self.group_size, numbers_SBE)
        if numbers_SBE is not out_SBE:
            out_SBE.copy_(numbers_SBE)

    def _of_block(self, part_SB2L: torch.Tensor, position: int) -> torch.Tensor:
        """Scales or zeros of the channels of a prompt's block, [B, E]: they lie where those of its rows would."""
        begin = position // self.group_size * self.group_size
        block_GBL = part_SB2L[begin : begin + self.group_size, :, 0]
        channels_BE: torch.Tensor = block_GBL.transpose(0, 1).flatten(1)[:, : self._channels]
        return channels_BE


def _parts(segment: CompressedSegment) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return segment.codes_SB2C, segment.scale_SB2L, segment.zero_SB2L


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The reverse of `unpacked`, of 4 bits."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | codes[..., 1::2] << 4
