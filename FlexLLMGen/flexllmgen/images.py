"""The packed weights of each stage, and which of their bytes lie on which tier. Pure: allocates nothing.

The weights of a stage are packed into one *image*: tensors one after another, each at a multiple of ALIGNMENT. An image
is cut by bytes, not by tensors: its first bytes lie on the device, the next in host memory, the last on disk. So
shares are what was asked for, and every layer streams the same number of bytes.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flexllmgen.compressed_size import compressed_bytes
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import PAGE, round_up

ALIGNMENT = 256
"""Where tensors start in an image, and the grain of every cut: what wide loads and copies like."""
_MATRICES = re.compile(r"(qkv|out|up|gate_up|down)\.weight|experts\.\d+\.(gate_up|down)")
"""A layer's tensors that are compressed. Norms, biases and the router are small, and each of their numbers counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """Where a tensor lies in its image. `lookup` tensors are read by rows, so they may stay on the host.

    Args:
        bits: those of a compressed tensor's codes, in groups of `group_size`; None for one that lies there as it is.
        dense_bytes: what it takes as it is.
        dense_offset: where a compressed tensor is turned back to, in memory that all stages share.
    """

    offset: int
    shape: tuple[int, ...]
    num_bytes: int
    lookup: bool = False
    bits: int | None = None
    group_size: int = 0
    dense_bytes: int = 0
    dense_offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """The packed weights of a stage, and how many of its bytes lie on each tier, in this order.

    Its compressed tensors are turned back into `dequantised_bytes` of memory.
    """

    name: str
    layer: int
    tensors: Mapping[str, PackedTensor]
    num_bytes: int
    dequantised_bytes: int = 0
    gpu_bytes: int = 0
    cpu_bytes: int = 0

    @property
    def disk_bytes(self) -> int:
        return self.num_bytes - self.gpu_bytes - self.cpu_bytes

    @property
    def compressed(self) -> bool:
        """Whether any of its tensors is."""
        return self.dequantised_bytes > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step through the model: embed, a layer or a half of it, or the head."""

    kind: str
    layer: int
    images: tuple[int, ...]

    @property
    def has_kv(self) -> bool:
        return self.kind in ("layer", "attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class TierBytes:
    """Bytes on each tier, and the shares they come to."""

    gpu: int = 0
    cpu: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        return self.gpu + self.cpu + self.disk

    @property
    def by_tier(self) -> dict[str, int]:
        return {"gpu": self.gpu, "cpu": self.cpu, "disk": self.disk}

    @property
    def shares(self) -> Placement:
        total = max(self.total, 1)
        gpu, cpu = self.gpu / total, self.cpu / total
        return Placement(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu)) if self.total else Placement(gpu=1.0)


def _cut(total: int, share: float, grain: int) -> int:
    return min(total, round(total * share / grain) * grain)


def pack(spec: ModelSpec, policy: Policy, dtype_bytes: int) -> tuple[tuple[Image, ...], tuple[Stage, ...]]:
    """Images and stages of a model, nothing placed yet.

    A token table shared by embedding and head lies in the head's image only, and the embedding reads it
    there.
    """
    return _pack(spec, policy.sep_layer, dtype_bytes, policy.weight_bits, policy.weight_group_size)


@functools.lru_cache(maxsize=8)
def _pack(
    spec: ModelSpec, sep_layer: bool, dtype_bytes: int, bits: int | None, group_size: int
) -> tuple[tuple[Image, ...], tuple[Stage, ...]]:
    # Kept, since a search packs the same model hundreds of times.
    images: list[Image] = []
    stages: list[Stage] = []

    def add(name: str, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
        tensors: dict[str, PackedTensor] = {}
        offset = dense_offset = 0
        for key, shape in _in_order(shapes).items() if layer >= 0 else shapes.items():
            dense_bytes = num_bytes = math.prod(shape) * dtype_bytes
            lookup = name == "embed" and key in ("tokens", "positions")
            compressed = bits is not None and layer >= 0 and _MATRICES.fullmatch(key) is not None
            if bits is not None and compressed:
                num_bytes = compressed_bytes(shape, bits, group_size)
            tensors[key] = PackedTensor(
                offset=offset,
                shape=shape,
                num_bytes=num_bytes,
                lookup=lookup,
                bits=bits if compressed else None,
                group_size=group_size if compressed else 0,
                dense_bytes=dense_bytes,
                dense_offset=dense_offset if compressed else 0,
            )
            offset = round_up(offset + num_bytes, ALIGNMENT)
            dense_offset += round_up(dense_bytes, ALIGNMENT) if compressed else 0
        images.append(
            Image(name=name, layer=layer, tensors=tensors, num_bytes=offset, dequantised_bytes=dense_offset)
        )
        return len(images) - 1

    embed = add("embed", -1, spec.embed_tensors())
    head = add("head", -1, spec.head_tensors())
    stages.append(Stage(kind="embed", layer=-1, images=(embed, head) if spec.tied else (embed,)))
    for layer in range(spec.num_layers):
        if sep_layer:
            for kind, shapes in (("attention", spec.attention_tensors()), ("mlp", spec.mlp_tensors())):
                image = add(f"{kind}-{layer}", layer, shapes)
                stages.append(Stage(kind=kind, layer=layer, images=(image,)))
        else:
            image = add(f"layer-{layer}", layer, {**spec.attention_tensors(), **spec.mlp_tensors()})
            stages.append(Stage(kind="layer", layer=layer, images=(image,)))
    stages.append(Stage(kind="head", layer=-1, images=(head,)))
    return tuple(images), tuple(stages)


def _in_order(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A layer's tensors as its image has them: vectors, then matrices, the largest first, then experts as they come.

    The last are the first to be streamed, and of a tensor that is cut a pass copies the resident part beside the rest: where
    little is streamed it should be of a small one.

    >>> list(_in_order({"norm": (8,), "out": (8, 8), "up": (32, 8), "up.bias": (32,)}))
    ['norm', 'up.bias', 'up', 'out']
    """

    def place(name: str) -> tuple[bool, bool, int]:
        expert = expert_of(name) is not None
        matrix = len(shapes[name]) > 1 and not expert
        return expert, matrix, -math.prod(shapes[name]) if matrix else 0

    return {name: shapes[name] for name in sorted(shapes, key=place)}


def place_images(images: tuple[Image, ...], shares: Placement) -> tuple[Image, ...]:
    """Cuts images so that all together have the shares asked for, layers evenly.

    The head is read whole every step, so it takes device memory first; the embedding is read by rows, which
    the host can do, so it takes host memory first. Layers divide the rest, remainders carried from one to the
    next.
    """
    total = sum(image.num_bytes for image in images)
    left = {"gpu": _cut(total, shares.gpu, ALIGNMENT)}
    left["disk"] = min(total - left["gpu"], _cut(total, shares.disk, ALIGNMENT))
    if not shares.cpu:  # Rounding must not put anything on a tier that was given nothing.
        left["disk"] = total - left["gpu"]
    left["cpu"] = total - left["gpu"] - left["disk"]
    placed = list(images)

    def take(index: int, order: tuple[str, ...]) -> None:
        image, taken = images[index], dict.fromkeys(left, 0)
        need = image.num_bytes
        for tier in order:
            taken[tier] = min(left[tier], need - sum(taken.values()))
            left[tier] -= taken[tier]
        placed[index] = _with_bytes(image, taken["gpu"], taken["cpu"])

    take(1, ("gpu", "cpu", "disk"))
    # An embedding that fits no tier whole would be streamed; where one has room for all of it, that one is
    # first.
    whole = [tier for tier in ("cpu", "gpu", "disk") if left[tier] >= images[0].num_bytes]
    rest = [tier for tier in ("cpu", "disk", "gpu") if tier not in whole[:1]]
    take(0, (*whole[:1], *rest))
    layers = range(2, len(images))
    room = sum(images[index].num_bytes for index in layers)
    gpu, disk, before = left["gpu"], left["disk"], 0
    done = {"gpu": 0, "disk": 0}
    for index in layers:
        before += images[index].num_bytes
        upto_gpu = gpu * before // room // ALIGNMENT * ALIGNMENT if before < room else gpu
        upto_disk = disk * before // room // ALIGNMENT * ALIGNMENT if before < room else disk
        mine_gpu = min(upto_gpu - done["gpu"], images[index].num_bytes)
        mine_disk = min(upto_disk - done["disk"], images[index].num_bytes - mine_gpu)
        if not shares.cpu:
            mine_disk = images[index].num_bytes - mine_gpu
        done["gpu"] += mine_gpu
        done["disk"] += mine_disk
        placed[index] = _with_bytes(images[index], mine_gpu, images[index].num_bytes - mine_gpu - mine_disk)
    return tuple(placed)


def _with_bytes(image: Image, gpu: int, cpu: int) -> Image:
    return replace(image, gpu_bytes=gpu, cpu_bytes=cpu)


def resident_bytes(image: Image, *, in_place: bool) -> int:
    """Bytes of an image, its first ones, that the compute device reads where they lie."""
    return image.gpu_bytes + (image.cpu_bytes if in_place else 0)


def streamed_from(image: Image, resident: int) -> int:
    """Offset from which an image goes through a slot: the start of its first tensor not wholly resident."""
    if resident >= image.num_bytes:
        return image.num_bytes
    # They lie one after another.
    return next(tensor.offset for tensor in image.tensors.values() if tensor.end > resident)


def streamed_bytes(image: Image, *, in_place: bool, embedding: bool) -> int:
    """Bytes of a slot that an image needs, alignment of its disk part included."""
    resident = resident_bytes(image, in_place=in_place)
    if resident >= image.num_bytes or (embedding and looked_up_on_host(image)):
        return 0
    return round_up(image.num_bytes - streamed_from(image, resident), PAGE) + 2 * PAGE


def streamed_parts(image: Image, *, in_place: bool, embedding: bool, first: int = 0) -> TierBytes:
    """Bytes that a pass copies into a slot from each tier: `gpu` is the resident part of a tensor that is cut.

    Only those from offset `first` of the image on.
    """
    resident = resident_bytes(image, in_place=in_place)
    if resident >= image.num_bytes or (embedding and looked_up_on_host(image)):
        return TierBytes()
    start, disk_from = max(first, streamed_from(image, resident)), image.gpu_bytes + image.cpu_bytes
    return TierBytes(
        gpu=max(0, resident - start),
        cpu=max(0, disk_from - max(resident, start)),
        disk=image.num_bytes - max(disk_from, start),
    )


def expert_of(name: str) -> int | None:
    """The expert whose tensor this is; None if it is no expert's.

    >>> expert_of("experts.12.down"), expert_of("router.weight")
    (12, None)
    """
    return int(name.split(".")[1]) if name.startswith("experts.") else None


def experts_from(image: Image) -> int:
    """Offset of an image's first expert; they come last. The image's end if it has none."""
    offsets = (each.offset for name, each in image.tensors.items() if expert_of(name) is not None)
    return next(offsets, image.num_bytes)


def expert_bytes(images: Iterable[Image]) -> TierBytes:
    """Bytes of experts on each tier."""
    gpu = cpu = disk = 0
    for image in images:
        start, disk_from = experts_from(image), image.gpu_bytes + image.cpu_bytes
        gpu += max(0, image.gpu_bytes - start)
        cpu += max(0, disk_from - max(start, image.gpu_bytes))
        disk += image.num_bytes - max(start, disk_from)
    return TierBytes(gpu=gpu, cpu=cpu, disk=disk)


def expert_dense_bytes(image: Image) -> int:
    """Bytes that an image's compressed experts are turned back into."""
    return sum(
        each.dense_bytes for name, each in image.tensors.items() if each.bits and expert_of(name) is not None
    )


def stage_dequantised_bytes(images: Sequence[Image], stage: Stage) -> int:
    """Bytes of memory that a stage's compressed tensors are turned back into."""
    return sum(images[index].dequantised_bytes for index in stage.images)


def looked_up_on_host(image: Image) -> bool:
    """Whether an image is only tables read by rows, all in host memory: then nothing is streamed."""
    return image.cpu_bytes == image.num_bytes and all(tensor.lookup for tensor in image.tensors.values())
