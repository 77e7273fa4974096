"""How sequences are divided: a block into micro-batches, and the sequences of each over the tiers. Pure."""

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flexllmgen.policy import Placement, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Sequences of one unit on each tier, in this order; `inputs` lie in host memory too, as the layer's inputs."""

    gpu: int
    cpu: int
    inputs: int = 0
    disk: int

    @property
    def count(self) -> int:
        return self.gpu + self.cpu + self.inputs + self.disk

    def first(self, count: int) -> "Split":
        """Where the first `count` of the sequences are: a last block may have fewer than there is room for."""
        gpu = min(self.gpu, count)
        cpu = min(self.cpu, count - gpu)
        inputs = min(self.inputs, count - gpu - cpu)
        return Split(gpu=gpu, cpu=cpu, inputs=inputs, disk=min(self.disk, count - gpu - cpu - inputs))


def split_sequences(counts: list[int], shares: Placement) -> list[Split]:
    """Cuts each unit's sequences over the tiers; what rounding left over is carried to the next unit.

    >>> [split.gpu for split in split_sequences([4, 4, 4, 4], Placement(gpu=0.3, cpu=0.7))]
    [1, 1, 2, 1]
    """
    splits, before, gpu_done, disk_done = [], 0, 0, 0
    known: dict[tuple[int, int, int], Split] = {}
    for count in counts:
        before += count
        gpu = min(max(round(shares.gpu * before) - gpu_done, 0), count)
        disk = min(max(round(shares.disk * before) - disk_done, 0), count - gpu)
        if not shares.cpu:  # Rounding must not put anything on a tier that was given nothing.
            disk = count - gpu if shares.disk else 0
            gpu = count - disk
        gpu_done += gpu
        disk_done += disk
        parts = gpu, count - gpu - disk, disk
        # Most are alike.
        if parts not in known:
            known[parts] = Split(gpu=gpu, cpu=parts[1], disk=disk)
        splits.append(known[parts])
    return splits


def keep_inputs(splits: list[Split], share: float) -> list[Split]:
    """Of the sequences in host memory, keeps a share as the layer's inputs; rounding is carried on likewise.

    >>> [split.inputs for split in keep_inputs([Split(gpu=0, cpu=3, disk=0)] * 2, share=0.5)]
    [2, 1]
    """
    if not share:
        return splits
    parts = split_sequences([split.cpu for split in splits], Placement(gpu=share, cpu=1 - share))
    return [
        Split(gpu=split.gpu, cpu=part.cpu, inputs=part.gpu, disk=split.disk)
        for split, part in zip(splits, parts, strict=True)
    ]


@functools.lru_cache(maxsize=16)
def split_layers(
    sizes: tuple[int, ...], layers: int, shares: Placement, inputs: float
) -> tuple[tuple[tuple[Split, ...], ...], Mapping[Split, int]]:
    """How each layer's sequences are divided, by micro-batch, and how many units are divided alike.

    `inputs` is the share of those in host memory that are kept as the layer's inputs.
    """
    # Kept, since a search moves weights from tier to tier and leaves the sequences where they are.
    flat = keep_inputs(split_sequences(list(sizes) * layers, shares), inputs)
    count = len(sizes)
    known: dict[tuple[Split, ...], tuple[Split, ...]] = {}
    rows = (tuple(flat[layer * count : (layer + 1) * count]) for layer in range(layers))
    # Layers that are divided alike share what they are divided into, so that one look at it is enough.
    return tuple(known.setdefault(row, row) for row in rows), MappingProxyType(Counter(flat))


def micro_batch_sizes(num_sequences: int, policy: Policy) -> tuple[int, ...]:
    """Sizes of the micro-batches that a block of `num_sequences` is cut into; the last may be smaller.

    >>> micro_batch_sizes(7, Policy(micro_batch_size=3, num_micro_batches=4))
    (3, 3, 1)
    """
    size = policy.micro_batch_size
    return tuple(min(size, num_sequences - start) for start in range(0, num_sequences, size))
