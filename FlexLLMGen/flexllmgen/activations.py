"""ActivationStore: hidden states of each micro-batch between two stages, split by sequence over the tiers.

With everything on the device, each micro-batch has a buffer that stages work in. Otherwise hidden states are
put together in a slot before a stage and taken apart after it.
"""

# B sequences  T positions  D model

from pathlib import Path

import torch

from flexllmgen.memory.arena import HostArena
from flexllmgen.memory.tiers import BlockSize, Lanes, TieredBlocks
from flexllmgen.memory.transfer import Event, copy_whole
from flexllmgen.placement import PlacementPlan
from flexllmgen.units import PAGE, round_up


class ActivationStore:
    """Hidden states over the tiers."""

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
        self._plan, self._device, self._dtype = plan, device, dtype
        self._row = plan.spec.hidden_bytes(plan.workload.prompt_tokens, plan.dtype_bytes)
        self.streams = plan.hidden_slots > 0
        self._lanes = lanes
        self._homes = TieredBlocks(
            "activations",
            [
                BlockSize(cpu=split.cpu * self._row, disk=round_up(split.disk * self._row, PAGE))
                for split in plan.hidden_splits
            ],
            slots=plan.hidden_slots,
            device=device,
            arena=arena,
            lanes=lanes,
            in_place=False,
            directory=directory,
        )
        self._resident: list[torch.Tensor] = []
        self._whole: list[torch.Tensor] = []
        self._loads: dict[int, Event] = {}
        self._columns = plan.workload.prompt_tokens

    @property
    def disk_bytes(self) -> int:
        return self._homes.disk_bytes

    def allocate(self) -> None:
        """Takes device memory and the scratch file; the arena must be committed."""
        plan = self._plan
        self._resident = [
            torch.empty(split.gpu * self._row, dtype=torch.uint8, device=self._device)
            for split in plan.hidden_splits
        ]
        self._whole = [
            torch.empty(plan.hidden_slot_bytes, dtype=torch.uint8, device=self._device)
            for _ in range(plan.hidden_slots)
        ]
        self._homes.allocate()

    def begin(self, columns: int) -> None:
        """A new pass: hidden states have `columns` positions from now on."""
        self._columns = columns

    def hidden(self, micro_batch: int, slot: int, count: int) -> torch.Tensor:
        """The buffer [count, columns, hidden] that a stage reads and writes."""
        spec = self._plan.spec
        memory = self._whole[slot] if self.streams else self._resident[micro_batch]
        size = count * self._columns * spec.hidden_size
        return memory.view(self._dtype)[:size].view(count, self._columns, spec.hidden_size)

    def load(self, micro_batch: int, slot: int) -> None:
        """Starts putting a micro-batch's hidden states together in a slot."""
        gpu, cpu, disk = self._parts(micro_batch)
        fetched = self._homes.load(micro_batch, slot, cpu, disk)
        whole, resident = self._whole[slot], self._resident[micro_batch]

        def join() -> None:
            copy_whole(whole[:gpu], resident[:gpu])
            copy_whole(whole[gpu : gpu + cpu], self._homes.cpu_part(micro_batch, slot)[:cpu])
            copy_whole(whole[gpu + cpu : gpu + cpu + disk], self._homes.disk_part(micro_batch, slot)[:disk])

        self._loads[slot] = self._lanes.up_to(slot).submit(join, [fetched])
        self._homes.release(slot, self._loads[slot])

    def ready(self, slot: int, *, first_stage: bool) -> list[Event]:
        """What must have ended before a stage uses the slot; the first stage only writes it."""
        if not self.streams:
            return []
        return self._homes.acquire(slot) if first_stage else [self._loads[slot]]

    def store(self, micro_batch: int, slot: int, after: Event) -> None:
        """Starts taking a slot apart to where the hidden states live."""
        gpu, cpu, disk = self._parts(micro_batch)
        whole, resident = self._whole[slot], self._resident[micro_batch]

        def part() -> None:
            copy_whole(resident[:gpu], whole[:gpu])
            copy_whole(self._homes.cpu_part(micro_batch, slot)[:cpu], whole[gpu : gpu + cpu])
            copy_whole(self._homes.disk_part(micro_batch, slot)[:disk], whole[gpu + cpu : gpu + cpu + disk])

        apart = self._lanes.down.submit(part, [after])
        self._homes.store(micro_batch, slot, [(0, cpu)], (0, disk), apart)

    def release(self, slot: int, event: Event) -> None:
        """The slot is in use until `event`."""
        if self.streams:
            self._homes.release(slot, event)

    def reset(self) -> None:
        """Forgets a block of requests, before the next."""
        self._homes.forget()
        self._loads.clear()

    def close(self) -> None:
        self._resident.clear()
        self._whole.clear()
        self._homes.close()

    def _parts(self, micro_batch: int) -> tuple[int, int, int]:
        """Bytes on device, host and disk at the present number of positions."""
        split = self._plan.hidden_splits[micro_batch]
        row = self._plan.spec.hidden_bytes(self._columns, self._plan.dtype_bytes)
        return split.gpu * row, split.cpu * row, split.disk * row
