"""KVCache: keys and values of every layer and micro-batch, split by sequence over the tiers.

Rows are positions, so what a step reads is one run of bytes and what it appends is another. Where the CPU attends,
host memory holds one sequence after another instead, each position after position: a thread reads one sequence at a
time, in the order in which it lies. A unit is one layer of one micro-batch; its sequences lie on the device first,
then on the host, then on disk. Nothing is ever moved to make room: all memory is taken once. Where the policy says
so, rows are compressed (kv_compression.py): on the device, before they are stored, so that every tier holds and every
link carries compressed bytes. Of a share of the sequences in host memory the layer's inputs are kept there instead
(layer_inputs.py), in blocks and slots of their own.
"""

# B sequences  S cached positions  K key heads  H head dim  D model

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexllmgen.compression import split_compressed
from flexllmgen.kv_compression import CompressedSegment, KVCodec
from flexllmgen.layer_inputs import InputSegment
from flexllmgen.memory.arena import HostArena
from flexllmgen.memory.tiers import BlockSize, Lanes, TieredBlocks
from flexllmgen.memory.transfer import Event
from flexllmgen.placement import PlacementPlan
from flexllmgen.policy import Tier
from flexllmgen.splits import Split
from flexllmgen.workspace import row_bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring sequences [start, stop) of a micro-batch whose KV lies together.

    `kv_S2BKH` holds keys at [:, 0] and values at [:, 1] for all positions there is room for.
    """

    start: int
    stop: int
    kv_S2BKH: torch.Tensor

    def part(self, start: int, stop: int) -> "Segment":
        """Sequences [start, stop) of the micro-batch."""
        return Segment(start, stop, self.kv_S2BKH[:, :, start - self.start : stop - self.start])


def by_sequence(
    rows_BSC: torch.Tensor,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype | None = None,
    group_size: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Rows of one position and sequence each, as bytes, as what attention on the CPU takes: views.

    Returns:
        Keys and values [S, 2, B, K, H] of `dtype`; without one they are codes of 8 bits in groups of `group_size` along a
        head, and their scales and zeros follow, [S, 2, B, K, groups of a head].
    """
    if dtype is not None:
        parts: Sequence[torch.Tensor] = [rows_BSC.view(dtype).unflatten(-1, (2, -1))]
    else:
        parts = split_compressed(rows_BSC, (2, num_kv_heads * head_dim), 8, group_size)
    return tuple(part.unflatten(-1, (num_kv_heads, -1)).permute(1, 2, 0, 3, 4) for part in parts)


StoredSegment = Segment | CompressedSegment
AnySegment = StoredSegment | InputSegment


class KVCache:
    """Keys and values over the tiers.

    Args:
        dtype: of keys and values.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        arena: HostArena,
        lanes: Lanes,
        directory: Path | None,
    ) -> None:
        self._plan, self._device, self._dtype, self._arena = plan, device, dtype, arena
        self._splits: list[Split] = [split for row in plan.kv_splits for split in row]
        context = plan.max_context
        self._blocks = TieredBlocks(
            "kv",
            [
                BlockSize(
                    cpu=self._row(split.cpu, "cpu") * context, disk=self._row(split.disk, "disk") * context
                )
                for split in self._splits
            ],
            slots=plan.kv_slots,
            device=device,
            arena=arena,
            lanes=lanes,
            in_place=plan.in_place,
            directory=directory,
        )
        self._inputs: TieredBlocks | None = None
        if plan.input_bytes:
            self._inputs = TieredBlocks(
                "inputs",
                [BlockSize(cpu=self._input_row(split) * context, disk=0) for split in self._splits],
                slots=plan.kv_slots,
                device=device,
                arena=arena,
                lanes=lanes,
                in_place=plan.in_place,
                directory=directory,
            )
        on_host = device.type == "cpu"
        self._resident_region = arena.reserve(plan.kv_cache.gpu) if on_host else None
        self._scratch_region = arena.reserve(plan.kv_scratch_bytes) if on_host else None
        self._resident: list[torch.Tensor] = []
        self._codec: KVCodec | None = None
        self._centres: list[torch.Tensor] = []
        self._views: dict[tuple[int, int, bool], list[AnySegment]] = {}
        self._host_views: dict[int, StoredSegment] = {}
        self._loads: dict[int, list[Event]] = {}

    @property
    def disk_bytes(self) -> int:
        return self._blocks.disk_bytes

    def allocate(self) -> None:
        """Takes device memory and the scratch file; the arena must be committed."""
        if self._resident_region is not None:
            memory = self._arena.view(self._resident_region)
        else:
            # Zeros: a recorded step reads rows that nothing has been written to, and a mask does not hide NaN.
            memory = torch.zeros(self._plan.kv_cache.gpu, dtype=torch.uint8, device=self._device)
        offset = 0
        for split in self._splits:
            size = self._row(split.gpu, "gpu") * self._plan.max_context
            self._resident.append(memory[offset : offset + size])
            offset += size
        if self._plan.policy.kv_bits is not None:
            self._make_codec(self._plan.policy.kv_bits)
        self._blocks.allocate()
        if self._inputs is not None:
            self._inputs.allocate()

    def begin(self, first: int, stop: int) -> None:
        """A new block of requests, whose prompts take positions [first, stop)."""
        if self._codec is not None:
            self._codec.begin(first, stop)

    def load(self, layer: int, micro_batch: int, slot: int, positions: int) -> None:
        """Starts bringing the first `positions` rows of a unit's streamed sequences into a slot."""
        unit = self._unit(layer, micro_batch)
        split = self._splits[unit]
        cpu = 0 if self._plan.attends_on_host else self._row(split.cpu, "cpu")
        disk = self._row(split.disk, "disk")
        loads: list[Event] = []
        if cpu or disk:
            loads.append(self._blocks.load(unit, slot, cpu * positions, disk * positions))
        if self._inputs is not None and (row := self._input_row(split)):
            loads.append(self._inputs.load(unit, slot, row * positions, 0))
        self._loads[slot] = loads

    def ready(self, slot: int, *, prompt: bool) -> list[Event]:
        """What must have ended before the slot is read, or for a prompt before it is written."""
        if slot < 0:
            return []
        if prompt:
            busy = self._blocks.acquire(slot)
            return busy if self._inputs is None else busy + self._inputs.acquire(slot)
        return self._loads[slot]

    def segments(
        self, layer: int, micro_batch: int, slot: int, count: int, *, host: bool = True
    ) -> Sequence[AnySegment]:
        """Where the KV of a unit's first `count` sequences is, as the compute device sees it.

        Without `host` those in host memory are left out: they are attended to there.
        """
        unit = self._unit(layer, micro_batch)
        if (unit, slot, host) not in self._views:
            self._views[unit, slot, host] = self._make_segments(unit, slot, host=host)
        return self._first_of(self._views[unit, slot, host], unit, count)

    def host_segment(
        self, layer: int, micro_batch: int, count: int
    ) -> tuple[StoredSegment | None, Event | None]:
        """What of a unit's first `count` sequences lies in host memory, there; and what must have been stored before."""
        unit = self._unit(layer, micro_batch)
        split = self._splits[unit]
        if not split.cpu or count <= split.gpu:
            return None, None
        if unit not in self._host_views:
            home = self._blocks.home(unit)
            self._host_views[unit] = self._stored(unit, home, split.gpu, split.cpu, together=True)
        mine = self._host_views[unit]
        return mine.part(mine.start, min(mine.stop, count)), self._blocks.stored(unit)

    def begins_on_device(self, layer: int, micro_batch: int) -> bool:
        """Whether a unit's first sequences lie on the compute device."""
        return self._splits[self._unit(layer, micro_batch)].gpu > 0

    def _first_of(self, full: list[AnySegment], unit: int, count: int) -> list[AnySegment]:
        if count == self._splits[unit].count:
            return full
        return [each.part(each.start, min(each.stop, count)) for each in full if each.start < count]

    def store(
        self, layer: int, micro_batch: int, slot: int, first: int, stop: int, after: Event, *, prompt: bool
    ) -> None:
        """Writes rows [first, stop) of a unit's streamed sequences back to where they live."""
        unit = self._unit(layer, micro_batch)
        cpu = self._row(self._splits[unit].cpu, "cpu")
        disk = self._row(self._splits[unit].disk, "disk")
        if self._plan.attends_on_host and not prompt:
            cpu = 0  # Whoever attends there has written it.
        # Each takes the host a while, and is left out where there is nothing to move.
        if cpu or disk:
            on_host = self._runs(cpu, self._splits[unit].cpu, first, stop)
            self._blocks.store(unit, slot, on_host, (first * disk, stop * disk), after)
        if self._inputs is not None and (row := self._input_row(self._splits[unit])):
            self._inputs.store(unit, slot, [(first * row, stop * row)], (0, 0), after)

    def release(self, slot: int, event: Event) -> None:
        """The slot is in use until `event`."""
        if slot >= 0:
            self._blocks.release(slot, event)
            if self._inputs is not None:
                self._inputs.release(slot, event)

    def reset(self) -> None:
        """Forgets a block of requests, before the next."""
        self._loads.clear()
        try:
            self._blocks.forget()
        finally:
            if self._inputs is not None:
                self._inputs.forget()

    def close(self) -> None:
        self._views.clear()
        self._host_views.clear()
        self._resident.clear()
        self._codec = None
        self._centres.clear()
        self._blocks.close()
        if self._inputs is not None:
            self._inputs.close()

    def _unit(self, layer: int, micro_batch: int) -> int:
        return layer * len(self._plan.micro_batches) + micro_batch

    def _row(self, sequences: int, tier: Tier) -> int:
        if not sequences:
            return 0
        return row_bytes(self._plan.spec, self._plan.policy, sequences, self._plan.dtype_bytes, tier=tier)

    def _input_row(self, split: Split) -> int:
        return split.inputs * self._plan.spec.hidden_bytes(1, self._plan.dtype_bytes)

    def _make_codec(self, bits: int) -> None:
        plan, spec = self._plan, self._plan.spec
        if self._scratch_region is not None:
            memory = self._arena.view(self._scratch_region)
        else:
            memory = torch.empty(plan.kv_scratch_bytes, dtype=torch.uint8, device=self._device)
        numbers = memory.view(self._dtype)
        sizes = [split.count * spec.kv_size for split in self._splits]
        scratch, *centres = numbers.split([len(numbers) - sum(sizes), *sizes])
        self._centres = [each.view(-1, spec.num_kv_heads, spec.head_dim) for each in centres]
        self._codec = KVCodec(
            bits=bits,
            group_size=plan.policy.kv_group_size,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scratch=scratch,
            sequences=plan.kv_scratch_sequences,
            by_channel=not plan.attends_on_host,
        )

    def _make_segments(self, unit: int, slot: int, *, host: bool) -> list[AnySegment]:
        split, start = self._splits[unit], 0
        segments: list[AnySegment] = []
        tiers = (("gpu", split.gpu), ("cpu", split.cpu), ("inputs", split.inputs), ("disk", split.disk))
        for tier, count in tiers:
            if not count:
                continue
            if tier == "inputs":
                segments.append(self._make_input_segment(unit, slot, start))
                start += count
                continue
            memory: torch.Tensor | None
            if tier == "gpu":
                memory = self._resident[unit]
            elif tier == "disk":
                memory = self._blocks.disk_part(unit, slot)
            elif host:
                memory = self._blocks.cpu_part(unit, slot)
            else:
                memory = None
            if memory is not None:
                together = tier == "cpu" and self._plan.attends_on_host
                segments.append(self._stored(unit, memory, start, count, together=together))
            start += count
        return segments

    def _runs(self, row: int, sequences: int, first: int, stop: int) -> list[tuple[int, int]]:
        """Where positions [first, stop) of a unit's sequences lie in its part in host memory; `row` bytes a position."""
        if not row or not self._plan.attends_on_host:
            return [(first * row, stop * row)]
        each = row // sequences
        starts = range(0, row * self._plan.max_context, each * self._plan.max_context)
        return [(start + first * each, start + stop * each) for start in starts]

    def _stored(
        self, unit: int, memory: torch.Tensor, start: int, count: int, *, together: bool
    ) -> StoredSegment:
        """Sequences of a unit in a part of it; `together`, each one's positions follow one another, else rows do."""
        context = self._plan.max_context
        rows = memory.view(count, context, -1) if together else memory.view(context, -1)
        if self._codec is not None:
            return self._codec.segment(rows, start, self._centres[unit][start : start + count])
        if not together:
            return Segment(start, start + count, self._as_rows(memory, count))
        spec = self._plan.spec
        (kv_S2BKH,) = by_sequence(rows, spec.num_kv_heads, spec.head_dim, dtype=self._dtype)
        return Segment(start, start + count, kv_S2BKH)

    def _make_input_segment(self, unit: int, slot: int, start: int) -> InputSegment:
        assert self._inputs is not None
        count, plan = self._splits[unit].inputs, self._plan
        numbers = self._inputs.cpu_part(unit, slot).view(self._dtype)
        x_SBD = numbers.view(plan.max_context, count, plan.spec.hidden_size)
        return InputSegment(start, start + count, x_SBD, plan.recomputed_sequences)

    def _as_rows(self, memory: torch.Tensor, sequences: int) -> torch.Tensor:
        """Rows may be longer than their content, where disk wants whole pages."""
        spec, context = self._plan.spec, self._plan.max_context
        rows = memory.view(self._dtype).view(context, -1)
        content = 2 * sequences * spec.kv_size
        return rows[:, :content].view(context, 2, sequences, spec.num_kv_heads, spec.head_dim)
