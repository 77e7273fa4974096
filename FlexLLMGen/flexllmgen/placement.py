"""Policy + ModelSpec + Workload -> what lies where, to the byte. Pure: allocates nothing.

Weights are cut by bytes (images.py); KV and activations by sequences, and the remainders are carried over from unit
to unit.
"""

from dataclasses import dataclass

from flexllmgen.errors import PolicyError
from flexllmgen.images import (
    Image,
    Stage,
    TierBytes,
    pack,
    place_images,
    stage_dequantised_bytes,
    streamed_bytes,
)
from flexllmgen.policy import Policy, Tier
from flexllmgen.spec import ModelSpec
from flexllmgen.splits import Split, micro_batch_sizes, split_layers, split_sequences
from flexllmgen.units import PAGE, GiB, round_up
from flexllmgen.workload import Workload
from flexllmgen.workspace import (
    CHUNK_TOKENS,
    RECORDED_BYTES,
    Recording,
    exchange_row,
    kv_scratch,
    recompute_scratch,
    recorded_part,
    row_bytes,
    workspace_bytes,
)

SMALL_UNIT_BYTES = 64 << 20
"""KV of one layer and micro-batch that is small enough for a spare slot."""
_SPARE = 0.003
"""Share of a device's memory that plans leave free: measured peaks were up to so much of it above the planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """Where everything lies. Sizes in bytes; `in_place` means that host memory is the compute device's own.

    Args:
        weight_slot_bytes: one buffer that streamed weights of a stage are copied into.
        dequantised_bytes: the buffer that a stage's compressed weights are turned back into; all stages share it.
        kv_slot_bytes: likewise for the KV of one unit.
        hidden_slot_bytes: likewise for the hidden states of one micro-batch.
        workspace_bytes: peak of everything else on the device: activations inside a stage, logits, masks, `kv_scratch_bytes`.
        kv_scratch_bytes: what compressed KV takes beside its rows: a buffer that it is turned back into, for
            `kv_scratch_sequences` at once, and the centre of each sequence's keys.
        input_bytes: of the KV cache in host memory, the layers' inputs that are kept instead of keys and values.
        recomputed_sequences: of these, how many sequences' keys and values are made anew at once.
        recording: what of a decode step a CUDA device replays from a graph.
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
    dequantised_bytes: int
    kv_slots: int
    kv_slot_bytes: int
    hidden_slots: int
    hidden_slot_bytes: int
    workspace_bytes: int
    recording: Recording
    staging_bytes: int
    chunk_tokens: int
    kv_scratch_sequences: int = 0
    kv_scratch_bytes: int = 0
    input_bytes: int = 0
    recomputed_sequences: int = 0

    @property
    def attends_on_host(self) -> bool:
        """Whether decode steps attend to the KV in host memory on the CPU; without an accelerator all do anyway."""
        return self.policy.cpu_attention and not self.in_place and self.kv_cache.cpu > self.input_bytes

    @property
    def exchange_rows(self) -> tuple[int, ...]:
        """Per micro-batch, the most sequences of a layer that are attended to on the CPU."""
        if not self.attends_on_host:
            return ()
        rows = {id(row): row for row in self.kv_splits}.values()
        return tuple(max(row[index].cpu for row in rows) for index in range(len(self.micro_batches)))

    @property
    def exchange_row_bytes(self) -> int:
        """Host bytes of a sequence that is attended to on the CPU: its query, key and value, and what comes back."""
        return sum(exchange_row(self.spec, self.dtype_bytes, self.policy))

    @property
    def exchange_bytes(self) -> int:
        """Host bytes of all micro-batches' sequences that are attended to on the CPU, in whole pages each."""
        return sum(round_up(rows * self.exchange_row_bytes, PAGE) for rows in self.exchange_rows)

    def streams_kv(self, layer: int) -> bool:
        """Whether any of a layer's KV goes through slots."""
        splits = self.kv_splits[layer]
        return any(split.disk or ((split.cpu or split.inputs) and not self.in_place) for split in splits)

    def loads_kv(self, layer: int) -> bool:
        """Whether decode steps bring any KV of a layer to the device."""
        here = self.in_place or self.attends_on_host
        return any(
            split.disk or (split.cpu and not here) or (split.inputs and not self.in_place)
            for split in self.kv_splits[layer]
        )

    @property
    def max_context(self) -> int:
        """Positions for which KV is held; a multiple of 8, which attention kernels like for their masks."""
        return round_up(self.workload.max_context, 8)

    @property
    def dense_kv_row_bytes(self) -> int:
        """Bytes of one position's keys and values of a sequence in one layer, not compressed."""
        return 2 * self.spec.kv_size * self.dtype_bytes

    @property
    def kv_row_bytes(self) -> int:
        """The same as they are kept."""
        return row_bytes(self.spec, self.policy, 1, self.dtype_bytes, tier="gpu")

    @property
    def kv_bytes_share(self) -> float:
        """Bytes of a position's keys and values as they are kept, of those that they have; 1 if not compressed."""
        return self.kv_row_bytes / self.dense_kv_row_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots: device memory that streamed data, and compressed data turned back, passes through."""
        return (
            self.weight_slots * self.weight_slot_bytes
            + self.dequantised_bytes
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
        placed = self.weights.cpu + self.kv_cache.cpu + self.activations.cpu
        buffers = self.staging_bytes + self.exchange_bytes
        return placed + buffers + (self.slot_bytes if self.in_place else 0)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk."""
        return self.weights.disk + self.kv_cache.disk + self.activations.disk

    @property
    def spare_kv_slots(self) -> int:
        """Slots for KV that is being stored while the next is computed and those after it are loaded."""
        return max(0, self.kv_slots - self.policy.overlap - 1)

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


def spare_kv_slots(unit_bytes: int, depth: int, *, in_place: bool) -> int:
    """Slots from which KV is stored while no load waits for them; small ones cost less than the waiting.

    `unit_bytes` is the KV of one layer and micro-batch, wherever it lies.
    """
    return 1 if unit_bytes <= SMALL_UNIT_BYTES and depth > 0 and not in_place else 0


def fillable_bytes(cap_bytes: int) -> int:
    """What a plan that may choose fills of a device's memory at most.

    >>> fillable_bytes(16_000_000_000)
    15952000000
    """
    return cap_bytes - int(_SPARE * cap_bytes)


def _other_groups(spec: ModelSpec, policy: Policy) -> str:
    """The group size that would do, if there is one."""
    return "take kv_group_size 64, or" if policy.kv_group_size != 64 and spec.head_dim % 64 == 0 else "so"


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
        gpu_cap_bytes: if given, prefill's chunk is made smaller until the peak fits with a little to spare, if it can.
    """
    if policy.chosen_experts and not spec.num_experts:
        raise PolicyError(
            f"{spec.name or spec.family} has no experts that a step could choose; turn chosen_experts off"
        )
    if policy.recompute and spec.hidden_size >= 2 * spec.kv_size:
        raise PolicyError(
            f"{spec.name or spec.family}: a layer's input has {spec.hidden_size} numbers a position, keys and values have "
            f"{2 * spec.kv_size}: nothing is saved by keeping it instead; turn recompute off (0)"
        )
    on_host = policy.cpu_attention and policy.kv_cache.cpu > 0 and not in_place
    if on_host and policy.kv_bits is not None and spec.head_dim % policy.kv_group_size:
        raise PolicyError(
            f"{spec.name or spec.family}: the CPU attends to 8-bit keys and values whose groups of {policy.kv_group_size} divide "
            f"a head, of {spec.head_dim} numbers; {_other_groups(spec, policy)} turn cpu_attention or kv_bits off"
        )
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
    kv_splits, units = split_layers(sizes, spec.num_layers, policy.kv_cache, policy.recompute)
    hidden_splits = tuple(split_sequences(list(sizes), policy.activations))
    hidden_row = spec.hidden_bytes(workload.prompt_tokens, dtype_bytes)

    def kv_tier(sequences: int, tier: Tier) -> int:
        return row_bytes(spec, policy, sequences, dtype_bytes, tier=tier) * context if sequences else 0

    input_row = spec.hidden_bytes(context, dtype_bytes)
    most_inputs = max(each.inputs for each in units)
    input_bytes = sum(number * each.inputs for each, number in units.items()) * input_row
    kv = TierBytes(
        gpu=sum(number * kv_tier(each.gpu, "gpu") for each, number in units.items()),
        cpu=sum(number * kv_tier(each.cpu, "cpu") for each, number in units.items()) + input_bytes,
        disk=sum(number * kv_tier(each.disk, "disk") for each, number in units.items()),
    )
    hidden = TierBytes(
        gpu=sum(each.gpu for each in hidden_splits) * hidden_row,
        cpu=sum(each.cpu for each in hidden_splits) * hidden_row,
        disk=sum(each.disk for each in hidden_splits) * hidden_row,
    )
    slot_hidden = max((each.count * hidden_row for each in hidden_splits if each.gpu < each.count), default=0)
    slot_kv_cpu = 0 if in_place else max(kv_tier(each.cpu, "cpu") for each in units)
    slot_inputs = 0 if in_place else most_inputs * input_row
    slot_kv_disk = max(kv_tier(each.disk, "disk") for each in units)
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
    kv_slots = depth + 1 if slot_kv_cpu + slot_inputs + slot_kv_disk else 0
    if kv_slots:
        kv_slots += spare_kv_slots(kv_tier(max(sizes), "gpu"), depth, in_place=in_place)
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
    recording = recorded_part(
        spec,
        policy,
        context,
        accelerated=not in_place,
        streamed_weights=weights.cpu + weights.disk > 0,
        streamed_others=kv_slots + hidden_slots > 0,
    )
    parts = [(each.gpu, each.cpu, each.disk) for each in units]
    scratch_sequences, scratch_bytes = kv_scratch(spec, policy, workload, dtype_bytes, max(map(max, parts)))
    recomputed, recompute_bytes = recompute_scratch(spec, policy, workload, dtype_bytes, most_inputs)
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
            dequantised_bytes=max(stage_dequantised_bytes(images, stage) for stage in stages),
            kv_slots=kv_slots,
            kv_slot_bytes=slot_kv_cpu + slot_inputs + slot_kv_disk,
            hidden_slots=hidden_slots,
            hidden_slot_bytes=slot_hidden,
            workspace_bytes=workspace_bytes(spec, policy, workload, dtype_bytes, chunk_tokens, not in_place)
            + RECORDED_BYTES[recording]
            + scratch_bytes
            + recompute_bytes,
            recording=recording,
            staging_bytes=staging,
            chunk_tokens=chunk_tokens,
            kv_scratch_sequences=scratch_sequences,
            kv_scratch_bytes=scratch_bytes,
            input_bytes=input_bytes,
            recomputed_sequences=recomputed,
        )
        if gpu_cap_bytes is None or plan.gpu_bytes <= fillable_bytes(gpu_cap_bytes):
            break
    assert plan is not None
    return plan
