"""Policy + ModelSpec + Workload -> what lies where, to the byte. Pure: allocates nothing.

The weights of a stage are packed into one *image*: tensors one after another, each at a multiple of
ALIGNMENT. An image is cut by bytes, not by tensors: its first bytes lie on the device, the next in host
memory, the last on disk. So shares are what was asked for, and every layer streams the same number of bytes.
KV and activations are cut by sequences, and the remainders are carried over from unit to unit.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flexllmgen.errors import PlanInfeasible, PolicyError
from flexllmgen.policy import Placement, Policy, Tier
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload

ALIGNMENT = 256
"""Where tensors start in an image, and the grain of every cut: what wide loads and copies like."""
PAGE = 4096
"""What direct disk I/O must be aligned to, in memory and in the file."""
CHUNK_TOKENS = (8192, 4096, 2048, 1024, 1)
"""Positions that prefill may compute at once: the first that fits is taken, whole sequences at the least."""
SMALL_UNIT_BYTES = 64 << 20
GiB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """Where a tensor lies in its image. `lookup` tensors are read by rows, so they may stay on the host."""

    offset: int
    shape: tuple[int, ...]
    num_bytes: int
    lookup: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """The packed weights of a stage, and how many of its bytes lie on each tier, in this order."""

    name: str
    layer: int
    tensors: Mapping[str, PackedTensor]
    num_bytes: int
    gpu_bytes: int = 0
    cpu_bytes: int = 0

    @property
    def disk_bytes(self) -> int:
        return self.num_bytes - self.gpu_bytes - self.cpu_bytes


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
class Split:
    """Sequences of one unit on each tier, in this order."""

    gpu: int
    cpu: int
    disk: int

    @property
    def count(self) -> int:
        return self.gpu + self.cpu + self.disk


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
    def shares(self) -> Placement:
        total = max(self.total, 1)
        gpu, cpu = self.gpu / total, self.cpu / total
        return Placement(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu)) if self.total else Placement(gpu=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """Where everything lies. Sizes in bytes; `in_place` means that host memory is the compute device's own.

    Args:
        weight_slot_bytes: one buffer that streamed weights of a stage are copied into.
        kv_slot_bytes: likewise for the KV of one unit.
        hidden_slot_bytes: likewise for the hidden states of one micro-batch.
        workspace_bytes: peak of everything else on the device: activations inside a stage, logits, masks.
        staging_bytes: host memory that disk data passes through on its way to the device.
        chunk_tokens: positions that prefill computes at once within a micro-batch.
    """

    spec: ModelSpec
    policy: Policy
    workload: Workload
    dtype_bytes: int
    in_place: bool
    images: tuple[Image, ...]
    stages: tuple[Stage, ...]
    kv_splits: tuple[tuple[Split, ...], ...]
    hidden_splits: tuple[Split, ...]
    micro_batches: tuple[int, ...]
    weights: TierBytes
    kv_cache: TierBytes
    activations: TierBytes
    weight_slots: int
    weight_slot_bytes: int
    kv_slots: int
    kv_slot_bytes: int
    hidden_slots: int
    hidden_slot_bytes: int
    workspace_bytes: int
    staging_bytes: int
    chunk_tokens: int

    @property
    def max_context(self) -> int:
        """Positions for which KV is held; a multiple of 8, which attention kernels like for their masks."""
        return round_up(self.workload.max_context, 8)

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots: device memory that streamed data passes through."""
        return (
            self.weight_slots * self.weight_slot_bytes
            + self.kv_slots * self.kv_slot_bytes
            # Hidden states are put together from their parts: the parts' slots, and the whole.
            + 2 * self.hidden_slots * self.hidden_slot_bytes
        )

    @property
    def gpu_bytes(self) -> int:
        """Peak bytes on the compute device."""
        resident = self.weights.gpu + self.kv_cache.gpu + self.activations.gpu
        if self.in_place:
            return resident + self.workspace_bytes
        return resident + self.slot_bytes + self.workspace_bytes

    @property
    def cpu_bytes(self) -> int:
        """Bytes in host memory; without an accelerator the slots are there too."""
        placed = self.weights.cpu + self.kv_cache.cpu + self.activations.cpu + self.staging_bytes
        return placed + (self.slot_bytes if self.in_place else 0)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk."""
        return self.weights.disk + self.kv_cache.disk + self.activations.disk

    @property
    def spare_kv_slots(self) -> int:
        """Slots for KV that is being stored while the next is computed and those after it are loaded."""
        return max(0, self.kv_slots - self.policy.overlap - 1)

    @property
    def recording(self) -> Literal["none", "layers", "step"]:
        """What of a decode step a CUDA device replays from a graph: all of it, or each layer's work for a micro-batch.

        Only work that attends to KV on the device. A graph cannot wait within itself, as a mixture of experts does,
        nor attend to a window that moves.
        """
        spec = self.spec
        windowed = any(0 < window < self.max_context for window in spec.sliding_windows)
        if windowed or spec.num_experts or self.in_place:
            return "none"
        if self.kv_slots or self.hidden_slots:
            return "none"  # The link sets the pace, and each graph starts and ends later than its kernels alone would.
        return "layers" if self.weights.cpu + self.weights.disk else "step"

    def describe(self) -> str:
        """Achieved shares and bytes on one line, for the log."""

        def one(name: str, tiers: TierBytes) -> str:
            if not tiers.total:
                return f"{name} 0 B"
            parts = (f"{100 * part / tiers.total:.1f} %" for part in (tiers.gpu, tiers.cpu, tiers.disk))
            return f"{name} {tiers.total / GiB:.2f} GiB as {' / '.join(parts)}"

        rows = (("weights", self.weights), ("kv", self.kv_cache), ("activations", self.activations))
        return (
            "; ".join(one(*row) for row in rows)
            + f" (gpu / cpu / disk); slots {self.slot_bytes / GiB:.2f} GiB,"
            + f" workspace {self.workspace_bytes / GiB:.2f} GiB"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A tier that is too small for a plan. Bytes; `parts` say what the need is made of and sum to it."""

    tier: Tier
    need_bytes: int
    limit_bytes: int
    parts: Mapping[str, int]


def round_up(value: int, grain: int) -> int:
    """The least multiple of `grain` that is at least `value`."""
    return -(-value // grain) * grain


def spare_kv_slots(unit_bytes: int, depth: int, *, in_place: bool) -> int:
    """Slots from which KV is stored while no load waits for them; small ones cost less than the waiting.

    `unit_bytes` is the KV of one layer and micro-batch, wherever it lies.
    """
    return 1 if unit_bytes <= SMALL_UNIT_BYTES and depth > 0 and not in_place else 0


def _cut(total: int, share: float, grain: int) -> int:
    return min(total, round(total * share / grain) * grain)


def pack(spec: ModelSpec, policy: Policy, dtype_bytes: int) -> tuple[tuple[Image, ...], tuple[Stage, ...]]:
    """Images and stages of a model, nothing placed yet.

    A token table shared by embedding and head lies in the head's image only, and the embedding reads it
    there.
    """
    return _pack(spec, policy.sep_layer, dtype_bytes)


@functools.lru_cache(maxsize=8)
def _pack(spec: ModelSpec, sep_layer: bool, dtype_bytes: int) -> tuple[tuple[Image, ...], tuple[Stage, ...]]:
    # Kept, since a search packs the same model hundreds of times.
    images: list[Image] = []
    stages: list[Stage] = []

    def add(name: str, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> int:
        tensors: dict[str, PackedTensor] = {}
        offset = 0
        for key, shape in shapes.items():
            num_bytes = math.prod(shape) * dtype_bytes
            lookup = name == "embed" and key in ("tokens", "positions")
            tensors[key] = PackedTensor(offset=offset, shape=shape, num_bytes=num_bytes, lookup=lookup)
            offset = round_up(offset + num_bytes, ALIGNMENT)
        images.append(Image(name=name, layer=layer, tensors=tensors, num_bytes=offset))
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
    return Image(
        name=image.name,
        layer=image.layer,
        tensors=image.tensors,
        num_bytes=image.num_bytes,
        gpu_bytes=gpu,
        cpu_bytes=cpu,
    )


def split_sequences(counts: list[int], shares: Placement) -> list[Split]:
    """Cuts each unit's sequences over the tiers; what rounding left over is carried to the next unit.

    >>> [split.gpu for split in split_sequences([4, 4, 4, 4], Placement(gpu=0.3, cpu=0.7))]
    [1, 1, 2, 1]
    """
    splits, before, gpu_done, disk_done = [], 0, 0, 0
    for count in counts:
        before += count
        gpu = min(max(round(shares.gpu * before) - gpu_done, 0), count)
        disk = min(max(round(shares.disk * before) - disk_done, 0), count - gpu)
        if not shares.cpu:  # Rounding must not put anything on a tier that was given nothing.
            disk = count - gpu if shares.disk else 0
            gpu = count - disk
        gpu_done += gpu
        disk_done += disk
        splits.append(Split(gpu=gpu, cpu=count - gpu - disk, disk=disk))
    return splits


def micro_batch_sizes(num_sequences: int, policy: Policy) -> tuple[int, ...]:
    """Sizes of the micro-batches that a block of `num_sequences` is cut into; the last may be smaller.

    >>> micro_batch_sizes(7, Policy(micro_batch_size=3, num_micro_batches=4))
    (3, 3, 1)
    """
    size = policy.micro_batch_size
    return tuple(min(size, num_sequences - start) for start in range(0, num_sequences, size))


def streamed_from(image: Image, resident_bytes: int) -> int:
    """Offset from which an image goes through a slot: the start of its first tensor not wholly resident."""
    if resident_bytes >= image.num_bytes:
        return image.num_bytes
    return min(tensor.offset for tensor in image.tensors.values() if tensor.end > resident_bytes)


def streamed_bytes(image: Image, *, in_place: bool, embedding: bool) -> int:
    """Bytes of a slot that an image needs, alignment of its disk part included."""
    resident = image.gpu_bytes + (image.cpu_bytes if in_place else 0)
    if resident >= image.num_bytes or (embedding and looked_up_on_host(image)):
        return 0
    return round_up(image.num_bytes - streamed_from(image, resident), PAGE) + 2 * PAGE


def streamed_parts(image: Image, *, in_place: bool, embedding: bool) -> TierBytes:
    """Bytes that a pass copies into a slot from each tier: `gpu` is the resident part of a tensor that is cut."""
    resident = image.gpu_bytes + (image.cpu_bytes if in_place else 0)
    if resident >= image.num_bytes or (embedding and looked_up_on_host(image)):
        return TierBytes()
    start, disk_from = streamed_from(image, resident), image.gpu_bytes + image.cpu_bytes
    return TierBytes(
        gpu=max(0, resident - start),
        cpu=max(0, disk_from - max(resident, start)),
        disk=image.num_bytes - max(disk_from, start),
    )


def looked_up_on_host(image: Image) -> bool:
    """Whether an image is only tables read by rows, all in host memory: then nothing is streamed."""
    return image.cpu_bytes == image.num_bytes and all(tensor.lookup for tensor in image.tensors.values())


def row_bytes(spec: ModelSpec, sequences: int, dtype_bytes: int, *, disk: bool) -> int:
    """Bytes of one position's keys and values of `sequences` sequences in one layer; whole pages on disk."""
    num_bytes = 2 * spec.kv_size * sequences * dtype_bytes
    return round_up(num_bytes, PAGE) if disk else num_bytes


def workspace_bytes(
    spec: ModelSpec,
    policy: Policy,
    workload: Workload,
    dtype_bytes: int,
    chunk_tokens: int,
    accelerated: bool,
) -> int:
    """Bytes that computing takes at its peak: counted from the decoder's temporaries."""
    batch, prompt = min(policy.micro_batch_size, workload.num_sequences), workload.prompt_tokens
    rows = min(max(chunk_tokens, prompt), batch * prompt)
    sequences = max(1, rows // prompt)
    inner = spec.intermediate_size * (3 if spec.traits.gated else 2)
    # Attention: the norm, q/k/v as one, rotated copies of q and k (expanded to all heads where a mask is),
    # output.
    attention = 2 * spec.hidden_size + 5 * spec.query_size + 6 * spec.kv_size
    mlp = 2 * spec.hidden_size + inner
    if spec.num_experts:
        # A row for each of a token's experts: taken together and put back, or padded to twice as many and computed.
        chosen = 4 * spec.hidden_size
        if spec.many_experts:
            chosen = max(chosen, 2 * (spec.hidden_size + 3 * spec.intermediate_size))
        mlp += chosen * spec.experts_per_token + 4 * spec.num_experts
    context = round_up(workload.max_context, 8)
    mask = sequences * prompt * prompt * 2 + batch * context * 2
    fp32 = 2 if dtype_bytes == 2 else 1
    logits = batch * spec.vocab_size * (1 + 2 * fp32)
    rope = 2 * min(policy.block_size, workload.num_sequences) * prompt * spec.head_dim
    elements = rows * max(attention, mlp) + mask + logits + rope + 2 * batch * spec.hidden_size
    # What the caching allocator loses to rounding and to blocks of other sizes; matrix libraries' workspace.
    return int(elements * dtype_bytes * 1.25) + ((160 << 20) if accelerated else 0)


def plan_placement(
    spec: ModelSpec,
    policy: Policy,
    workload: Workload,
    dtype_bytes: int = 2,
    *,
    in_place: bool = False,
    gpu_cap_bytes: int | None = None,
) -> PlacementPlan:
    """Decides where every byte lies.

    Args:
        dtype_bytes: bytes of one number of weights, KV and activations.
        in_place: the compute device is the CPU: what lies in host memory is used where it lies.
        gpu_cap_bytes: if given, prefill's chunk is made smaller until the peak fits, if it can.
    """
    images, stages = pack(spec, policy, dtype_bytes)
    images = place_images(images, policy.weights)
    block = min(policy.block_size, workload.num_sequences)
    sizes = micro_batch_sizes(block, policy)
    if workload.max_context > spec.max_positions and spec.traits.positions == "learned":
        raise PolicyError(
            f"{workload.max_context} positions are asked for, the model has {spec.max_positions}; "
            "lower --input-len or --gen-len"
        )
    context = round_up(workload.max_context, 8)
    flat = split_sequences(list(sizes) * spec.num_layers, policy.kv_cache)
    kv_splits = tuple(
        tuple(flat[layer * len(sizes) : (layer + 1) * len(sizes)]) for layer in range(spec.num_layers)
    )
    hidden_splits = tuple(split_sequences(list(sizes), policy.activations))
    hidden_row = spec.hidden_bytes(workload.prompt_tokens, dtype_bytes)

    def kv_tier(sequences: int, *, disk: bool = False) -> int:
        return row_bytes(spec, sequences, dtype_bytes, disk=disk) * context if sequences else 0

    kv = TierBytes(
        gpu=sum(kv_tier(each.gpu) for row in kv_splits for each in row),
        cpu=sum(kv_tier(each.cpu) for row in kv_splits for each in row),
        disk=sum(kv_tier(each.disk, disk=True) for row in kv_splits for each in row),
    )
    hidden = TierBytes(
        gpu=sum(each.gpu for each in hidden_splits) * hidden_row,
        cpu=sum(each.cpu for each in hidden_splits) * hidden_row,
        disk=sum(each.disk for each in hidden_splits) * hidden_row,
    )
    slot_hidden = max((each.count * hidden_row for each in hidden_splits if each.gpu < each.count), default=0)
    slot_kv_cpu = 0 if in_place else max(kv_tier(each.cpu) for row in kv_splits for each in row)
    slot_kv_disk = max(kv_tier(each.disk, disk=True) for row in kv_splits for each in row)
    slot_weights = max(
        sum(
            streamed_bytes(images[index], in_place=in_place, embedding=stage.kind == "embed")
            for index in stage.images
        )
        for stage in stages
    )
    weights = TierBytes(
        gpu=sum(image.gpu_bytes for image in images),
        cpu=sum(image.cpu_bytes for image in images),
        disk=sum(image.disk_bytes for image in images),
    )
    depth = policy.overlap
    weight_slots = depth + 1 if slot_weights else 0
    kv_slots = depth + 1 if slot_kv_cpu + slot_kv_disk else 0
    if kv_slots:
        kv_slots += spare_kv_slots(kv_tier(max(sizes)), depth, in_place=in_place)
    hidden_slots = min(depth, len(sizes) - 1) + 1 if slot_hidden else 0
    staging = 0
    if not in_place:
        staged = max(
            sum(round_up(images[index].disk_bytes, PAGE) for index in stage.images) for stage in stages
        )
        staging += weight_slots * staged
    staging += kv_slots * slot_kv_disk * (not in_place)
    staged_hidden = max((round_up(each.disk * hidden_row, PAGE) for each in hidden_splits), default=0)
    staging += hidden_slots * staged_hidden
    # What is recorded has memory of its own; a layer's work takes less than a step of all layers.
    recorded = 0 if kv_slots + hidden_slots else (96 << 20 if weight_slots else 256 << 20)
    plan = None
    for chunk_tokens in CHUNK_TOKENS:
        plan = PlacementPlan(
            spec=spec,
            policy=policy,
            workload=workload,
            dtype_bytes=dtype_bytes,
            in_place=in_place,
            images=images,
            stages=stages,
            kv_splits=kv_splits,
            hidden_splits=hidden_splits,
            micro_batches=sizes,
            weights=weights,
            kv_cache=kv,
            activations=hidden,
            weight_slots=weight_slots,
            weight_slot_bytes=slot_weights,
            kv_slots=kv_slots,
            kv_slot_bytes=slot_kv_cpu + slot_kv_disk,
            hidden_slots=hidden_slots,
            hidden_slot_bytes=slot_hidden,
            workspace_bytes=workspace_bytes(spec, policy, workload, dtype_bytes, chunk_tokens, not in_place)
            + (recorded if not in_place else 0),
            staging_bytes=staging,
            chunk_tokens=chunk_tokens,
        )
        if gpu_cap_bytes is None or plan.gpu_bytes <= gpu_cap_bytes:
            break
    assert plan is not None
    return plan


def check_fits(
    plan: PlacementPlan,
    *,
    gpu_bytes: int | None = None,
    cpu_bytes: int | None = None,
    disk_free_bytes: int | None = None,
) -> None:
    """Refuses a plan that needs more than there is, before anything is loaded.

    Raises:
        PlanInfeasible: naming every tier that is short, its need and its limit.
    """
    shortages = find_shortages(
        plan, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes, disk_free_bytes=disk_free_bytes
    )
    if shortages:
        raise PlanInfeasible("; also ".join(_explain(plan, each) for each in shortages))


def find_shortages(
    plan: PlacementPlan,
    *,
    gpu_bytes: int | None = None,
    cpu_bytes: int | None = None,
    disk_free_bytes: int | None = None,
) -> tuple[Shortage, ...]:
    """The tiers that are too small for a plan, with what their need is made of; None sets no limit."""

    def parts(tier: Tier, **others: int) -> dict[str, int]:
        placed = {
            name: int(getattr(sizes, tier))
            for name, sizes in (
                ("weights", plan.weights),
                ("kv_cache", plan.kv_cache),
                ("activations", plan.activations),
            )
        }
        return {**placed, **others}

    slots = plan.slot_bytes
    tiers: tuple[tuple[Tier, int, int | None, dict[str, int]], ...] = (
        (
            "gpu",
            plan.gpu_bytes,
            gpu_bytes,
            parts("gpu", buffers=0 if plan.in_place else slots, workspace=plan.workspace_bytes),
        ),
        (
            "cpu",
            plan.cpu_bytes,
            cpu_bytes,
            parts("cpu", buffers=plan.staging_bytes + (slots if plan.in_place else 0)),
        ),
        ("disk", plan.disk_bytes, disk_free_bytes, parts("disk")),
    )
    return tuple(
        Shortage(tier=tier, need_bytes=need, limit_bytes=limit, parts=made_of)
        for tier, need, limit, made_of in tiers
        if limit is not None and need > limit
    )


def _explain(plan: PlacementPlan, shortage: Shortage) -> str:
    """A shortage in the words of the policy's fields."""
    need, limit = shortage.need_bytes / GiB, shortage.limit_bytes / GiB
    made_of = ", ".join(f"{name} {size / GiB:.2f}" for name, size in shortage.parts.items() if size)
    if shortage.tier == "disk":
        return (
            f"needs {need:.2f} GiB in the offload directory ({made_of}), has {limit:.2f}; "
            "free some or choose another directory"
        )
    where = "of host memory"
    if shortage.tier == "gpu":
        where = "on the compute device" if plan.in_place else "on the GPU"
    fields = [
        f"{name}.{shortage.tier}" for name in ("weights", "kv_cache", "activations") if shortage.parts[name]
    ]
    return (
        f"needs {need:.2f} GiB {where} ({made_of}), has {limit:.2f}; "
        f"lower {', '.join([*fields, 'micro_batch_size or overlap'])}"
    )
