"""What of a stage's images is streamed, and the copies that bring it into a slot. Pure: knows offsets, no memory.

What is streamed of an image is one run of bytes up to its end, so a load is a few long copies.
"""

from dataclasses import dataclass
from typing import Literal

from flexllmgen.images import expert_of, experts_from, looked_up_on_host, resident_bytes, streamed_from
from flexllmgen.memory.disk import READ_BYTES
from flexllmgen.memory.transfer import PACKET_BYTES
from flexllmgen.placement import PlacementPlan
from flexllmgen.units import PAGE, round_up


@dataclass(frozen=True, slots=True)
class Piece:
    """One copy of a load: `num_bytes` of an image from offset `start` on, to `slot_offset`."""

    source: Literal["resident", "host", "disk"]
    image: int
    start: int
    slot_offset: int
    num_bytes: int
    staging_offset: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """The streamed bytes of an image: from offset `start` on, at `slot_offset` of the slot."""

    image: int
    start: int
    slot_offset: int
    staging_offset: int


def streamed_runs(plan: PlacementPlan, stage: int) -> list[Run]:
    """The run of each of a stage's images that is streamed."""
    runs, base, staging = [], 0, 0
    embedding = plan.stages[stage].kind == "embed"
    for index in plan.stages[stage].images:
        image = plan.images[index]
        resident = resident_bytes(image, in_place=plan.in_place)
        if resident >= image.num_bytes or (embedding and looked_up_on_host(image)):
            continue
        start = streamed_from(image, resident)
        # The disk part must start at a page of the slot.
        disk_from = image.gpu_bytes + image.cpu_bytes
        at = base + (start - disk_from) % PAGE
        runs.append(Run(index, start, at, staging))
        base = round_up(at + image.num_bytes - start, PAGE)
        staging += round_up(image.disk_bytes, PAGE)
    return runs


def stage_pieces(plan: PlacementPlan, stage: int, *, experts: bool = True) -> list[Piece]:
    """The copies that bring a stage's streamed bytes in; without `experts` all but those of a mixture's experts."""
    pieces: list[Piece] = []
    for run in streamed_runs(plan, stage):
        image = plan.images[run.image]
        pieces += _cut(plan, run, run.start, image.num_bytes if experts else experts_from(image))
    return pieces


def expert_pieces(plan: PlacementPlan, stage: int) -> list[list[Piece]]:
    """The copies of each expert, none where it is resident; an empty list unless steps choose among experts."""
    if not plan.policy.chosen_experts:
        return []
    runs = {run.image: run for run in streamed_runs(plan, stage)}
    spans: dict[int, tuple[int, int, int]] = {}
    for index in plan.stages[stage].images:
        for name, tensor in plan.images[index].tensors.items():
            if (expert := expert_of(name)) is not None:
                _, first, stop = spans.get(expert, (index, tensor.offset, tensor.end))
                spans[expert] = (index, min(first, tensor.offset), max(stop, tensor.end))
    return [
        _cut(plan, runs[index], max(first, runs[index].start), stop) if index in runs else []
        for _, (index, first, stop) in sorted(spans.items())
    ]


def _cut(plan: PlacementPlan, run: Run, first: int, stop: int) -> list[Piece]:
    """The pieces of bytes [first, stop) of a run; on disk from the page on where they begin."""
    image = plan.images[run.image]
    resident = resident_bytes(image, in_place=plan.in_place)
    disk_from, to_slot = image.gpu_bytes + image.cpu_bytes, run.slot_offset - run.start
    pieces: list[Piece] = []
    if first < min(resident, stop):
        pieces.append(Piece("resident", run.image, first, first + to_slot, min(resident, stop) - first))
    end = min(stop, disk_from)
    pieces += [
        Piece("host", run.image, offset, offset + to_slot, min(PACKET_BYTES, end - offset))
        for offset in range(max(resident, first), end, PACKET_BYTES)
    ]
    page = disk_from + max(0, first - disk_from) // PAGE * PAGE
    for offset in range(page, stop, READ_BYTES):
        size, staging = min(READ_BYTES, stop - offset), run.staging_offset + offset - disk_from
        pieces.append(Piece("disk", run.image, offset, offset + to_slot, size, staging))
    return pieces
