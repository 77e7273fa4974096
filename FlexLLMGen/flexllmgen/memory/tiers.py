"""TieredBlocks: blocks of bytes that are split over host and disk and pass through slots on the device.

KV cache and activations are such blocks. A block's host part lies in the arena, its disk part in a scratch
file; a slot is a device buffer with room for both, [host part | disk part]. Knows bytes only: what they mean,
and which sequences they hold, is the caller's business. With `in_place` the compute device reads the arena
itself, so only disk parts go through slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexllmgen.memory.arena import HostArena, Region
from flexllmgen.memory.disk import DirectFile, DiskPool, in_order, scratch_file, wait_all
from flexllmgen.memory.transfer import Event, Lane, Traffic, copy_bytes
from flexllmgen.units import PAGE, round_up


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Bytes of one block on host and disk."""

    cpu: int
    disk: int


@dataclass(slots=True, kw_only=True)
class Lanes:
    """Where copies run: host to device, device to host; and the threads that read and write the disk.

    Several lanes up take turns by slot, so that a copy that waits for its slot holds up no other.
    """

    up: tuple[Lane, ...]
    down: Lane
    disk: DiskPool
    traffic: Traffic

    def up_to(self, slot: int) -> Lane:
        """The lane that loads a slot."""
        return self.up[slot % len(self.up)]


class TieredBlocks:
    """Blocks over host and disk, and the slots they pass through."""

    def __init__(
        self,
        name: str,
        sizes: Sequence[BlockSize],
        *,
        slots: int,
        device: torch.device,
        arena: HostArena,
        lanes: Lanes,
        in_place: bool,
        directory: Path | None,
    ) -> None:
        self._name, self._sizes, self._device = name, sizes, device
        self._arena, self._lanes, self._in_place, self._directory = arena, lanes, in_place, directory
        self._homes: list[Region] = [arena.reserve(size.cpu) for size in sizes]
        self._slot_cpu = 0 if in_place else max((size.cpu for size in sizes), default=0)
        self._slot_cpu = round_up(self._slot_cpu, PAGE)
        self._slot_disk = round_up(max((size.disk for size in sizes), default=0), PAGE)
        self._slots = slots if self._slot_cpu + self._slot_disk else 0
        on_host = device.type == "cpu"
        slot_size = self._slot_cpu + self._slot_disk
        self._slot_regions = [arena.reserve(slot_size) for _ in range(self._slots)] if on_host else []
        self._staging = [arena.reserve(self._slot_disk) for _ in range(0 if on_host else self._slots)]
        self._slot_memory: list[torch.Tensor] = []
        self._file: DirectFile | None = None
        self._file_offsets: list[int] = []
        # Who used a slot last, by kind: a later use of one kind comes after its earlier ones.
        self._busy: list[dict[str, Event]] = [{} for _ in range(self._slots)]
        self._stored: list[Event | None] = [None] * len(sizes)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the scratch file."""
        return sum(round_up(size.disk, PAGE) for size in self._sizes)

    def allocate(self) -> None:
        """Takes the slots' memory and the scratch file; the arena must be committed."""
        slot_size = self._slot_cpu + self._slot_disk
        if self._slot_regions:
            self._slot_memory = [self._arena.view(region) for region in self._slot_regions]
        else:
            self._slot_memory = [
                torch.empty(slot_size, dtype=torch.uint8, device=self._device) for _ in range(self._slots)
            ]
        if self.disk_bytes:
            assert self._directory is not None
            self._file = scratch_file(self._directory, self._name, self.disk_bytes)
            offset = 0
            for size in self._sizes:
                self._file_offsets.append(offset)
                offset += round_up(size.disk, PAGE)

    def cpu_part(self, block: int, slot: int) -> torch.Tensor:
        """The block's host part as the compute device sees it."""
        if self._in_place:
            return self._arena.view(self._homes[block])
        return self._slot_memory[slot][: self._sizes[block].cpu]

    def disk_part(self, block: int, slot: int) -> torch.Tensor:
        """The block's disk part as the compute device sees it."""
        return self._slot_memory[slot][self._slot_cpu : self._slot_cpu + self._sizes[block].disk]

    def home(self, block: int) -> torch.Tensor:
        """The block's host part where it lives."""
        return self._arena.view(self._homes[block])

    def stored(self, block: int) -> Event | None:
        """The end of the block's last store; None if there was none."""
        return self._stored[block]

    def load(self, block: int, slot: int, cpu_bytes: int, disk_bytes: int) -> Event:
        """Brings the first bytes of a block's parts into a slot, once it is free and they are stored."""
        busy, stored = tuple(self._busy[slot].values()) if self._slots else (), self._stored[block]

        def work() -> None:
            if disk_bytes:
                self._load_disk(block, slot, round_up(disk_bytes, PAGE), [*busy, stored])
            if cpu_bytes and not self._in_place:
                home = self._arena.view(self._homes[block], 0, cpu_bytes)
                self._lanes.traffic.add("h2d", copy_bytes(self._slot_memory[slot], home))

        event = self._lanes.up_to(slot).submit(work, [*busy, stored])
        if self._slots:
            self._busy[slot] = {"load": event}
        return event

    def release(self, slot: int, event: Event) -> None:
        """The slot's content is in use until `event`."""
        if self._slots:
            self._busy[slot]["use"] = event

    def acquire(self, slot: int) -> list[Event]:
        """Takes a slot to write it on the compute device; returns what must end before."""
        if not self._slots:
            return []
        busy, self._busy[slot] = self._busy[slot], {}
        return list(busy.values())

    def store(
        self,
        block: int,
        slot: int,
        cpu_ranges: Sequence[tuple[int, int]],
        disk_range: tuple[int, int],
        after: Event,
    ) -> Event:
        """Writes byte ranges of a slot's parts back to where the block lives; the slot is busy until then.

        The disk range is widened to whole pages: the caller's rows are whole pages, or it stores all.
        """
        earlier = self._stored[block]

        def work() -> None:
            for start, stop in cpu_ranges:
                if stop > start and not self._in_place:
                    home = self._arena.view(self._homes[block], start, stop)
                    self._lanes.traffic.add("d2h", copy_bytes(home, self._slot_memory[slot][start:stop]))
            start, stop = disk_range[0], round_up(disk_range[1], PAGE)
            if stop > start:
                self._store_disk(block, slot, start, stop, after)

        event = self._lanes.down.submit(work, [after, earlier])
        self._stored[block] = event
        if self._slots:
            self._busy[slot]["store"] = event
        return event

    def forget(self) -> None:
        """Starts a new block of requests: whatever was stored is void.

        Waits for stores still under way, and raises the first error among them when all have ended.
        """
        events = [event for event in self._stored if event is not None]
        events += [event for busy in self._busy for event in busy.values()]
        self._stored = [None] * len(self._sizes)
        self._busy = [{} for _ in range(self._slots)]
        errors = []
        for event in events:
            try:
                event.synchronize()
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._slot_memory.clear()

    def _load_disk(self, block: int, slot: int, num_bytes: int, after: Sequence[Event | None]) -> None:
        assert self._file is not None
        offset, device_part = self._file_offsets[block], self._slot_memory[slot][self._slot_cpu :]
        if not self._staging:
            wait_all(self._lanes.disk.read(self._file, device_part[:num_bytes], offset))
            return
        for event in after:  # The disk writes staging from the host: streams alone do not order that.
            if event is not None:
                event.synchronize()
        staging = self._arena.view(self._staging[slot], 0, num_bytes)
        for start, stop, _ in in_order(self._lanes.disk.read(self._file, staging, offset)):
            self._lanes.traffic.add("h2d", copy_bytes(device_part[start:stop], staging[start:stop]))

    def _store_disk(self, block: int, slot: int, start: int, stop: int, after: Event) -> None:
        assert self._file is not None
        offset, device_part = self._file_offsets[block], self._slot_memory[slot][self._slot_cpu :]
        source = device_part[start:stop]
        if self._staging:
            staging = self._arena.view(self._staging[slot], start, stop)
            self._lanes.traffic.add("d2h", copy_bytes(staging, source))
            torch.cuda.current_stream(self._device).synchronize()
            source = staging
        else:
            after.synchronize()
        wait_all(self._lanes.disk.write(self._file, source, offset + start))
