"""WeightStore: holds the packed weights on their tiers and brings a stage's streamed part into a slot.

A stage's tensors are views: of the resident bytes where a tensor lies wholly there, of a slot otherwise. What
is streamed of an image is one run of bytes up to its end, so a load is a few long copies. On the CPU, host
memory is the compute device's own, and only disk parts are streamed. Compressed tensors lie and move as they are, and
are turned back once for each pass of a stage. A stage may also be loaded but for a mixture's experts; those that are chosen
are then brought to their usual places in the slot, and the places of the others hold whatever was there.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import torch

from flexllmgen.checkpoint import Checkpoint
from flexllmgen.dequantising import Dequantiser
from flexllmgen.images import resident_bytes
from flexllmgen.loading import load_images
from flexllmgen.memory.arena import HostArena, Region
from flexllmgen.memory.disk import DirectFile, in_order
from flexllmgen.memory.pack import Part
from flexllmgen.memory.tiers import Lanes
from flexllmgen.memory.transfer import Event, Lane, copy_whole, current_stream
from flexllmgen.models.experts import expert_addresses
from flexllmgen.placement import PlacementPlan
from flexllmgen.units import PAGE, round_up
from flexllmgen.weight_pieces import Piece, expert_pieces, stage_pieces, streamed_runs


class WeightStore:
    """Weights of a model on their tiers.

    Args:
        device: where the tensors of a stage are needed.
        lanes: up the link; if there is a second, it copies within the device.
        disk_lane: starts disk reads as soon as their memory is free, ahead of the copies that follow them.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        arena: HostArena,
        lanes: Lanes,
        disk_lane: Lane,
        directory: Path | None,
    ) -> None:
        self._plan, self._device, self._dtype = plan, device, dtype
        self._arena, self._lanes, self._disk_lane, self._directory = arena, lanes, disk_lane, directory
        pinned = plan.policy.pin_weight
        self._homes: list[Region] = []
        for image in plan.images:
            size = image.cpu_bytes + (image.gpu_bytes if plan.in_place else 0)
            self._homes.append(arena.reserve(size, pinned=pinned))
        on_host = device.type == "cpu"
        slots, slot_bytes = plan.weight_slots, plan.weight_slot_bytes
        self._slot_regions = [arena.reserve(slot_bytes) for _ in range(slots if on_host else 0)]
        dense_bytes = plan.dequantised_bytes
        self._dense_region = arena.reserve(dense_bytes) if on_host and dense_bytes else None
        self._dense = torch.empty(0, dtype=torch.uint8, device=device)
        self._dequantisers: dict[tuple[int, int], Dequantiser] = {}
        # Without `in_place` a CPU stands in for an accelerator: then it has resident memory of its own too.
        staged = max(
            sum(round_up(plan.images[index].disk_bytes, PAGE) for index in stage.images)
            for stage in plan.stages
        )
        self._staging = [arena.reserve(staged) for _ in range(0 if on_host else slots)] if staged else []
        self._slots: list[torch.Tensor] = []
        self._resident: list[torch.Tensor] = []
        self._files: dict[int, DirectFile] = {}
        stages = range(len(plan.stages))
        self._pieces = [stage_pieces(plan, stage) for stage in stages]
        self._expert_pieces = [expert_pieces(plan, stage) for stage in stages]
        self._but_experts = [
            stage_pieces(plan, stage, experts=False) if self._expert_pieces[stage] else self._pieces[stage]
            for stage in stages
        ]
        # Of the stage that is computed.
        self._brought: set[int] = set()
        self._views: dict[tuple[int, int], Mapping[str, torch.Tensor]] = {}
        # Of the last few loads: older ones have been waited for by who needed them.
        self._started: deque[Event] = deque(maxlen=1024)
        self._reads: deque[Future[None]] = deque(maxlen=4096)
        self._busy: list[list[Event]] = [[] for _ in range(slots)]
        self._loads: list[list[Event]] = [[] for _ in range(slots)]
        self._earlier: list[list[Event]] = [[] for _ in range(slots)]
        self._needs: list[list[Event]] = [[] for _ in range(slots)]
        self._ordered: list[set[Lane]] = [set() for _ in range(slots)]

    @property
    def disk_bytes(self) -> int:
        """Bytes of the packed files, whole pages and checksums included."""
        return sum(file.path.stat().st_size for file in self._files.values())

    def streams(self, stage: int) -> bool:
        """Whether a stage has anything to load."""
        return bool(self._pieces[stage])

    def fill(self, checkpoint: Checkpoint) -> None:
        """Takes memory and loads all weights onto their tiers (loading.py).

        Raises:
            CheckpointError: if it does not fit the model; OffloadDirError: if the disk is full.
        """
        plan = self._plan
        checkpoint.validate(plan.spec)
        self._take_resident_memory()
        self._files = load_images(plan, checkpoint, self._parts, self._directory, self._device, self._dtype)
        on_host = bool(self._slot_regions)
        self._slots = (
            [self._arena.view(region) for region in self._slot_regions]
            if on_host
            else [
                torch.empty(plan.weight_slot_bytes, dtype=torch.uint8, device=self._device)
                for _ in range(plan.weight_slots)
            ]
        )
        if self._dense_region is not None:
            self._dense = self._arena.view(self._dense_region)
        elif plan.dequantised_bytes:
            self._dense = torch.empty(plan.dequantised_bytes, dtype=torch.uint8, device=self._device)

    def chooses(self, stage: int) -> bool:
        """Whether a stage has experts of which a pass may bring in some."""
        return bool(self._expert_pieces[stage])

    def load(
        self,
        stage: int,
        slot: int,
        part: int,
        parts: int,
        *,
        experts: bool = True,
        after: Iterable[Event] = (),
    ) -> Event:
        """Starts loading the `part`-th of `parts` parts of a stage's streamed bytes into a slot.

        Without `experts` all but those of a mixture's experts: `bring` follows with some of them. What comes over the link
        does so `after` the events.
        """
        pieces = self._pieces[stage] if experts else self._but_experts[stage]
        mine = pieces[len(pieces) * part // parts : len(pieces) * (part + 1) // parts]
        if part == 0:
            self._earlier[slot], self._loads[slot] = self._loads[slot], []
            self._needs[slot], self._busy[slot] = self._busy[slot], []
            self._ordered[slot] = set()
        events = self._start(mine, slot, after)
        if not events:  # Fewer pieces than parts.
            events.append(Event())
        return events[-1]

    def _start(self, mine: Sequence[Piece], slot: int, after: Iterable[Event] = ()) -> list[Event]:
        """Starts loading pieces into a slot."""
        link, inside = self._lanes.up[0], self._lanes.up[-1]
        within = [piece for piece in mine if piece.source == "resident" and inside is not link]
        others = [piece for piece in mine if piece.source != "resident" or inside is link]
        events = []
        if within:
            events.append(
                inside.submit(lambda: self._copy_all(within, slot), self._first_needs(slot, inside))
            )
        if others:
            events.append(self._load_over(link, others, slot, after))
        self._loads[slot] += events
        return events

    def _load_over(self, link: Lane, mine: Sequence[Piece], slot: int, after: Iterable[Event]) -> Event:
        reads: list[tuple[Piece, Future[None]]] = []
        from_disk = [piece for piece in mine if piece.source == "disk"]
        started: Event | None = None
        if from_disk:
            # Direct from disk into the slot: it must be free. Through staging: only staging must be, which is
            # so once the slot's last load has been copied on.
            needs = self._earlier[slot] if self._staging else self._needs[slot]

            def start_reads() -> None:
                for need in needs:
                    need.synchronize()
                for piece in from_disk:
                    reads.extend(self._start_read(piece, slot))
                self._reads.extend(future for _, future in reads)

            started = self._disk_lane.submit(start_reads)
            self._started.append(started)

        def copy() -> None:
            self._copy_all([piece for piece in mine if piece.source != "disk"], slot)
            for piece, _ in in_order(reads):
                if self._staging:
                    self._copy_staged(piece, slot)

        return link.submit(copy, [started, *self._first_needs(slot, link), *after])

    def _first_needs(self, slot: int, lane: Lane) -> list[Event]:
        """What must end before a lane first writes to the slot; its later work is in order after that."""
        if lane in self._ordered[slot]:
            return []
        self._ordered[slot].add(lane)
        return self._needs[slot]

    def ready(self, slot: int) -> list[Event]:
        """The loads that must have ended before a slot's tensors are used."""
        return self._loads[slot] if slot >= 0 else []

    def release(self, slot: int, event: Event) -> None:
        """The slot's tensors are in use until `event`."""
        if slot >= 0:
            self._busy[slot].append(event)

    def tensors(self, stage: int, slot: int) -> Mapping[str, torch.Tensor]:
        """The stage's tensors by our names; the slot must have been loaded with this stage."""
        key = (stage, slot)
        if key not in self._views:
            self._views[key] = self._make_views(stage, slot)
        return self._views[key]

    def begin(self, stage: int, slot: int, *, experts: bool = True) -> None:
        """Turns a stage's compressed tensors back, on the device's current stream, over those of the stage before.

        Needed once before the stage's tensors are used, after the load of its slot has ended. Without `experts` all but
        those of experts, none of which counts as brought in.
        """
        self._brought.clear()
        if self._plan.dequantised_bytes:
            self.tensors(stage, slot)
            dequantiser = self._dequantisers[stage, slot]
            if experts:
                dequantiser.run()
            else:
                dequantiser.run_but_experts()

    def bring(self, stage: int, slot: int, experts: Iterable[int]) -> None:
        """Brings experts in that were not since `begin`; the device's current stream goes on when they are there."""
        missing = sorted(set(experts) - self._brought)
        self._brought.update(missing)
        chosen = self._expert_pieces[stage]
        pieces = [piece for expert in missing for piece in chosen[expert]]
        if pieces:
            stream = current_stream(self._device)
            for event in self._start(pieces, slot):
                event.order(stream)
        if self._plan.dequantised_bytes:
            self._dequantisers[stage, slot].run_experts(missing)

    def drain(self) -> None:
        """Waits for loads still under way; whether they failed no longer matters."""
        for event in [*self._started, *(event for events in self._loads for event in events)]:
            with contextlib.suppress(Exception):
                event.synchronize()
        # A load that fails for another reason leaves its reads to themselves, and they write to its slot.
        wait(self._reads)
        self._started.clear()
        self._reads.clear()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._views.clear()
        self._dequantisers.clear()
        self._dense = torch.empty(0, dtype=torch.uint8)
        self._slots.clear()
        self._resident.clear()

    # Copies

    def _make_views(self, stage: int, slot: int) -> Mapping[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = {}
        dequantiser = Dequantiser(self._dense, self._dtype)
        streamed = {run.image: run for run in streamed_runs(self._plan, stage)}
        embedding = self._plan.stages[stage].kind == "embed"
        for index in self._plan.stages[stage].images:
            image = self._plan.images[index]
            for name, tensor in image.tensors.items():
                if tensor.end <= resident_bytes(image, in_place=self._plan.in_place):
                    memory, offset = self._resident[index], tensor.offset
                elif index in streamed and tensor.offset >= streamed[index].start:
                    run = streamed[index]
                    memory, offset = self._slots[slot], run.slot_offset + tensor.offset - run.start
                else:
                    assert embedding, "only tables read by rows stay on the host"
                    memory, offset = self._arena.view(self._homes[index]), tensor.offset
                raw = memory[offset : offset + tensor.num_bytes]
                if tensor.bits:
                    views[name] = dequantiser.add(name, tensor, raw)
                else:
                    views[name] = raw.view(self._dtype).view(tensor.shape)
        if "router.weight" in views and self._device.type == "cuda":
            views |= expert_addresses(views, self._plan.spec.num_experts, self._device)
        self._dequantisers[stage, slot] = dequantiser
        return views

    def _start_read(self, piece: Piece, slot: int) -> list[tuple[Piece, Future[None]]]:
        image, size = self._plan.images[piece.image], round_up(piece.num_bytes, PAGE)
        if self._staging:
            start = piece.staging_offset
            memory = self._arena.view(self._staging[slot], start, start + size)
        else:
            memory = self._slots[slot][piece.slot_offset : piece.slot_offset + size]
        in_file = piece.start - image.gpu_bytes - image.cpu_bytes
        reads = self._lanes.disk.read(self._files[piece.image], memory, in_file)
        assert len(reads) == 1, "a piece is one read"
        return [(piece, future) for _, _, future in reads]

    def _copy_staged(self, piece: Piece, slot: int) -> None:
        offset = piece.staging_offset
        staging = self._arena.view(self._staging[slot], offset, offset + piece.num_bytes)
        target = self._slots[slot][piece.slot_offset : piece.slot_offset + piece.num_bytes]
        copy_whole(target, staging)
        self._lanes.traffic.add("h2d", piece.num_bytes)

    def _copy_all(self, pieces: Sequence[Piece], slot: int) -> None:
        for piece in pieces:
            self._copy(piece, slot)

    def _copy(self, piece: Piece, slot: int) -> None:
        target = self._slots[slot][piece.slot_offset : piece.slot_offset + piece.num_bytes]
        if piece.source == "resident":
            memory, offset = self._resident[piece.image], piece.start
        else:
            memory = self._arena.view(self._homes[piece.image])
            offset = piece.start - self._plan.images[piece.image].gpu_bytes
            self._lanes.traffic.add("h2d", piece.num_bytes)
        copy_whole(target, memory[offset : offset + piece.num_bytes])

    def _take_resident_memory(self) -> None:
        plan = self._plan
        if plan.in_place:
            self._resident = [self._arena.view(home) for home in self._homes]
            return
        total = sum(image.gpu_bytes for image in plan.images)
        memory, offset = torch.empty(total, dtype=torch.uint8, device=self._device), 0
        for image in plan.images:
            self._resident.append(memory[offset : offset + image.gpu_bytes])
            offset += image.gpu_bytes

    def _parts(self, index: int) -> list[Part]:
        """Where an image's bytes in memory go: (start, stop, memory) of each part that there is."""
        image = self._plan.images[index]
        host_from = 0 if self._plan.in_place else image.gpu_bytes
        parts = [(host_from, image.gpu_bytes + image.cpu_bytes, self._arena.view(self._homes[index]))]
        if not self._plan.in_place:
            parts.append((0, image.gpu_bytes, self._resident[index].zero_()))
        return [part for part in parts if part[0] < part[1]]
