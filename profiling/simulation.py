"""What a schedule takes: the engine's own steps, each with a duration, run against the clock of each resource.

The engine runs `zigzag(shape)`; this walks the same iterator. Each resource (compute device, link up, link down,
disk, the host that issues) does one thing at a time, in order; a step begins when its resource is free and what it
needs has ended, exactly as the executor's events order it. So fill and drain of the pipeline, slots, micro-batches
and overlap need no formula of their own. Pure: measures nothing, allocates nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flexllmgen.images import (
    TierBytes,
    expert_dense_bytes,
    experts_from,
    stage_dequantised_bytes,
    streamed_parts,
)
from flexllmgen.layer_inputs import made_positions
from flexllmgen.memory.disk import READ_BYTES
from flexllmgen.placement import PlacementPlan
from flexllmgen.schedule import Action, Shape, Step, zigzag
from flexllmgen.splits import Split
from flexllmgen.units import DISK_THREADS
from flexllmgen.workspace import exchange_row, row_bytes
from profiling.layer_times import LayerTimes
from profiling.profile import Rates

COMPUTE, UP, DOWN, DISK, COPY = (
    "compute",
    "host to device link",
    "device to host link",
    "disk",
    "device memory copies",
)
CPU = "attention on the CPU"
H2D, D2H, DISK_READ, DISK_WRITE = LINKS = ("h2d", "d2h", "disk_read", "disk_write")
"""Ways that bytes move on between tiers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Seconds of each pass of a block: the prompt's, then the decode steps that were simulated.

    `busy` holds per pass the seconds that each resource worked, `moved` the bytes over each of LINKS.
    """

    seconds: tuple[float, ...]
    busy: tuple[Mapping[str, float], ...]
    moved: tuple[Mapping[str, float], ...]


@dataclass(slots=True)
class _Clocks:
    """When each resource is next free, and the work it did in each of a number of passes."""

    together: bool
    passes: int
    free: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy: list[dict[str, float]] = field(init=False)
    moved: list[dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.busy = [{} for _ in range(self.passes)]
        self.moved = [dict.fromkeys(LINKS, 0.0) for _ in range(self.passes)]

    def run(self, resource: str, lane: str, ready: float, seconds: float, token: int) -> float:
        """Occupies a resource from when it and its lane are free; returns the end."""
        free, busy = self.free, self.busy[token]
        start = max(ready, free[resource], free[lane])
        if self.together:  # Without overlap nothing begins before everything else has ended.
            start = max([start, *free.values()])
        end = start + seconds
        free[resource] = free[lane] = end
        busy[resource] = busy.get(resource, 0.0) + seconds
        return end


def simulate_block(
    plan: PlacementPlan,
    times: LayerTimes,
    rates: Rates,
    *,
    micro_batches: Sequence[int],
    contexts: Sequence[int],
) -> Passes:
    """Seconds of the prompt's pass and of decode steps at each of `contexts` (cached positions).

    Args:
        micro_batches: sequences of each micro-batch of the block; may be fewer than the plan has room for.
        contexts: cached positions of each decode step to simulate, its own included.
    """
    return _Simulation(plan, times, rates, micro_batches, contexts).run()


class _Simulation:
    def __init__(
        self,
        plan: PlacementPlan,
        times: LayerTimes,
        rates: Rates,
        micro_batches: Sequence[int],
        contexts: Sequence[int],
    ) -> None:
        self.plan, self.times, self.rates = plan, times, rates
        self.batches, self.contexts = micro_batches, contexts
        self.prompt = plan.workload.prompt_tokens
        self.on_cpu = plan.in_place
        self.weight_bytes = [
            _sum(
                streamed_parts(plan.images[index], in_place=plan.in_place, embedding=stage.kind == "embed")
                for index in stage.images
            )
            for stage in plan.stages
        ]
        # Of these, the experts', which a decode step may bring in by choice.
        choosing, images = plan.policy.chosen_experts, plan.images
        self.chosen = [
            choosing and any(experts_from(images[index]) < images[index].num_bytes for index in stage.images)
            for stage in plan.stages
        ]
        self.expert_bytes = [
            _sum(
                streamed_parts(
                    images[index], in_place=plan.in_place, embedding=False, first=experts_from(images[index])
                )
                for index in (stage.images if chosen else ())
            )
            for stage, chosen in zip(plan.stages, self.chosen, strict=True)
        ]
        self.expert_dense_bytes = [
            sum(expert_dense_bytes(images[index]) for index in (stage.images if chosen else ()))
            for stage, chosen in zip(plan.stages, self.chosen, strict=True)
        ]
        self._tables()
        self.shape = Shape(
            num_tokens=1 + len(contexts),
            num_micro_batches=len(micro_batches),
            streamed_weights=[any(each) for each in self.weight_bytes],
            streamed_kv=[stage.has_kv and plan.streams_kv(stage.layer) for stage in plan.stages],
            streamed_hidden=plan.hidden_slots > 0,
            depth=plan.policy.overlap,
            spare_kv_slots=plan.spare_kv_slots,
            loaded_kv=[stage.has_kv and plan.loads_kv(stage.layer) for stage in plan.stages],
            host_attention=self._on_host,
        )
        self.clocks = _Clocks(together=plan.policy.overlap == 0, passes=1 + len(contexts))
        self.step = Step(Action.EMIT, 0, 0)
        self.issued = 0.0
        self.weight_ready: dict[int, float] = {}
        self.weight_busy: dict[int, float] = {}
        self.kv_ready: dict[int, float] = {}
        self.kv_busy: dict[int, float] = {}
        self.hidden_ready: dict[int, float] = {}
        self.hidden_busy: dict[int, float] = {}
        self.stored: dict[tuple[int, int], float] = {}
        self.hidden_stored: dict[int, float] = {}
        self.attended: dict[int, float] = {}
        self.computed = 0.0
        self._compute_cache: dict[tuple[object, ...], float] = {}
        self._recompute_cache: dict[tuple[int, int], float] = {}
        self._issue_cache: dict[tuple[object, ...], float] = {}
        self._attention_rates: dict[int, float] = {}

    def _tables(self) -> None:
        """What the loop asks at every step, by stage, or by layer and micro-batch."""
        plan, rates = self.plan, self.rates
        self._windows = [
            plan.spec.sliding_window(stage.layer) if stage.layer >= 0 else 0 for stage in plan.stages
        ]
        # By layer and micro-batch: what the loop asks at every step.
        self._rows = [
            [split.first(count).cpu for split, count in zip(splits, self.batches, strict=False)]
            for splits in plan.kv_splits
        ]
        self._kv_rows = {
            loaded: [[self._kv_row(split, loaded=loaded) for split in splits] for splits in plan.kv_splits]
            for loaded in (False, True)
        }
        # Sequences whose keys and values a step makes of inputs; none where no inputs are kept.
        self._made = [
            [split.first(count).inputs for split, count in zip(splits, self.batches, strict=False)]
            for splits in (plan.kv_splits if plan.input_bytes else ())
        ]
        # Bytes a second that are copied within the compute device's memory.
        self._copy_rate = rates.device_copy_bytes_per_s or rates.device_bytes_per_s / 2
        alone = rates.h2d_bytes_per_s or self._copy_rate
        beside = min(alone, rates.h2d_under_reads_bytes_per_s or alone) if plan.attends_on_host else alone
        self._up_rates = alone, beside
        self._on_host = [stage.has_kv and plan.attends_on_host for stage in plan.stages]
        exchange = exchange_row(plan.spec, plan.dtype_bytes, plan.policy)
        self._query_bytes, self._outcome_bytes = exchange.down, exchange.outcome

    def run(self) -> Passes:
        emitted: list[float] = []
        for step in zigzag(self.shape):
            self.step = step
            match step.action:
                case Action.LOAD_WEIGHTS:
                    self._load_weights(step)
                case Action.LOAD_KV:
                    self._load_kv(step)
                case Action.LOAD_HIDDEN:
                    self._load_hidden(step)
                case Action.COMPUTE:
                    self._compute(step)
                    if self._attends_on_host(step):
                        self._attend_on_host(step)
                case Action.FINISH:
                    self._finish(step)
                case Action.STORE_KV:
                    self._store_kv(step)
                case Action.STORE_HIDDEN:
                    self._store_hidden(step)
                case Action.EMIT:
                    self.issued = max(self.issued, self.computed)
                    emitted.append(self.computed)
        starts = [0.0, *emitted[:-1]]
        return Passes(
            seconds=tuple(end - start for start, end in zip(starts, emitted, strict=True)),
            busy=tuple(self.clocks.busy),
            moved=tuple(self.clocks.moved),
        )

    # Loads and stores. Each lane is a queue of its own; the disk and the links are shared by all lanes.

    def _load_weights(self, step: Step) -> None:
        loaded = self.weight_bytes[step.stage]
        if self._chooses(step):
            experts = self.expert_bytes[step.stage]
            loaded = tuple(all_ - theirs for all_, theirs in zip(loaded, experts, strict=True))
        free = self.weight_busy.get(step.slot, 0.0) if step.part == 0 else 0.0
        # Reads are started for all parts of a stage, and with overlap for the next stage too.
        under_way = loaded[2] * (2 if self.plan.policy.overlap else 1)
        end = self._bring(step, max(free, self.issued), loaded, 1 / len(self.batches), under_way)
        self.weight_ready[step.slot] = max(end, self.weight_ready.get(step.slot, 0.0) if step.part else 0.0)

    def _bring(
        self, step: Step, ready: float, streamed: tuple[float, ...], share: float, under_way: float
    ) -> float:
        """Copies a share of streamed weights into a slot; returns the end. `under_way` bytes are read at about the same time."""
        resident, host, disk = (num_bytes * share for num_bytes in streamed)
        end = ready
        if disk:
            end = self._disk("weights disk", ready, disk, step.token, under_way=under_way)
        if not self.on_cpu and (host or disk):
            copied = ready
            if host:
                paged = 0.0 if self.plan.policy.pin_weight else self.rates.h2d_pageable_bytes_per_s
                copied = self._up("weights up", ready, host, step.token, rate=paged or None)
            if disk:
                copied = self._up("weights up", copied, disk, step.token)
                # Copies follow their reads, and the lane waits for the last one.
                copied = max(copied, end + min(disk, READ_BYTES) / self._up_rate)
                self.clocks.free["weights up"] = copied
            end = copied
        if resident:
            end = max(end, ready + resident / self._copy_rate)
        return end

    def _load_kv(self, step: Step) -> None:
        layer = self.plan.stages[step.stage].layer
        cpu, disk = self._kv_rows[True][layer][step.micro_batch]
        positions = self.contexts[step.token - 1] - 1
        ready = max(
            self.kv_busy.get(step.slot, 0.0), self.stored.get((layer, step.micro_batch), 0.0), self.issued
        )
        end = ready
        if disk:
            end = self._disk(f"kv up {step.slot}", ready, disk * positions, step.token)
        if not self.on_cpu and cpu + disk:
            end = self._up(f"kv up {step.slot}", end, (cpu + disk) * positions, step.token)
        self.kv_ready[step.slot] = end

    def _store_kv(self, step: Step) -> None:
        layer = self.plan.stages[step.stage].layer
        cpu, disk = self._kv_rows[step.token > 0][layer][step.micro_batch]
        positions = self.prompt if step.token == 0 else 1
        if step.slot < 0:
            return
        end = self.computed
        if not self.on_cpu and cpu + disk:
            end = self._down("kv down", end, (cpu + disk) * positions, step.token)
        if disk:
            end = self._disk("kv down", end, disk * positions, step.token, write=True)
        self.stored[layer, step.micro_batch] = end
        self.kv_busy[step.slot] = max(end, self.kv_busy.get(step.slot, 0.0))

    def _load_hidden(self, step: Step) -> None:
        gpu, cpu, disk = self._hidden_bytes(step.micro_batch, step.token)
        ready = max(
            self.hidden_busy.get(step.slot, 0.0), self.hidden_stored.get(step.micro_batch, 0.0), self.issued
        )
        if disk:
            ready = self._disk("hidden up", ready, disk, step.token)
        if not self.on_cpu and cpu + disk:
            ready = self._up("hidden up", ready, cpu + disk, step.token)
        self.hidden_ready[step.slot] = self.clocks.run(
            COPY, "hidden up", ready, (gpu + cpu + disk) / self._copy_rate, step.token
        )

    def _store_hidden(self, step: Step) -> None:
        gpu, cpu, disk = self._hidden_bytes(step.micro_batch, step.token)
        end = self.clocks.run(
            COPY, "hidden down", self.computed, (gpu + cpu + disk) / self._copy_rate, step.token
        )
        if not self.on_cpu and cpu + disk:
            end = self._down("hidden down", end, cpu + disk, step.token)
        if disk:
            end = self._disk("hidden down", end, disk, step.token, write=True)
        self.hidden_stored[step.micro_batch] = end
        self.hidden_busy[step.slot] = end

    def _up(
        self, lane: str, ready: float, num_bytes: float, token: int, *, rate: float | None = None
    ) -> float:
        self.clocks.moved[token][H2D] += num_bytes
        return self.clocks.run(UP, lane, ready, num_bytes / (rate or self._up_rate), token)

    def _down(self, lane: str, ready: float, num_bytes: float, token: int) -> float:
        self.clocks.moved[token][D2H] += num_bytes
        return self.clocks.run(DOWN, lane, ready, num_bytes / self._down_rate, token)

    def _disk(
        self,
        lane: str,
        ready: float,
        num_bytes: float,
        token: int,
        *,
        write: bool = False,
        under_way: float | None = None,
    ) -> float:
        """Reads or writes; `under_way` bytes are asked for at about the same time, else only these."""
        self.clocks.moved[token][DISK_WRITE if write else DISK_READ] += num_bytes
        rates = self.rates
        if write:
            rate, per_s = rates.disk_write_bytes_per_s, rates.disk_writes_per_s
        else:
            rate, per_s = self._read_rate(under_way or num_bytes), rates.disk_reads_per_s
        return self.clocks.run(DISK, lane, ready, num_bytes / rate + (1 / per_s if per_s else 0.0), token)

    def _read_rate(self, num_bytes: float) -> float:
        """The disk's full rate needs as many pieces under way as there are threads."""
        full = self.rates.disk_read_bytes_per_s
        alone = min(full, self.rates.disk_read_alone_bytes_per_s or full)
        threads = min(DISK_THREADS, self.plan.policy.copy_threads)
        pieces = min(threads, max(1.0, num_bytes / READ_BYTES))
        return alone + (full - alone) * (pieces - 1) / (DISK_THREADS - 1)

    # Compute

    def _compute(self, step: Step) -> None:
        ready = max(
            self.weight_ready.get(step.slot, 0.0) if step.slot >= 0 else 0.0,
            self._kv_wait(step),
            self.hidden_ready.get(step.hidden_slot, 0.0) if step.hidden_slot >= 0 else 0.0,
        )
        seconds = self._compute_seconds(step) + self._dequantise_seconds(step) + self._recompute_seconds(step)
        issue = self._issue_seconds(step)
        if self.on_cpu:
            seconds, issue = seconds + issue, 0.0
        if self._chooses(step) and not self._attends_on_host(step):
            end = self._compute_and_choose(step, ready, seconds, issue)
        else:
            self.issued += issue
            end = self.clocks.run(COMPUTE, "main", max(ready, self.issued), seconds, step.token)
        self.computed = end
        if self.on_cpu:
            self.issued = max(self.issued, end)
        for slot, busy in (
            (step.slot, self.weight_busy),
            (step.kv_slot, self.kv_busy),
            (step.hidden_slot, self.hidden_busy),
        ):
            if slot >= 0:
                busy[slot] = end

    # Experts by choice

    def _chooses(self, step: Step) -> bool:
        return step.token > 0 and self.chosen[step.stage]

    def _compute_and_choose(self, step: Step, ready: float, seconds: float, issue: float) -> float:
        """The device computes up to the router, its choice is brought in, and then it computes the experts."""
        experts_s = min(seconds, self.times.step_s("mlp", self.batches[step.micro_batch], 0))
        self.issued += issue / 2
        routed = self.clocks.run(COMPUTE, "main", max(ready, self.issued), seconds - experts_s, step.token)
        # The choice comes down as a query for the CPU does, and the host waits for it.
        self.issued = max(self.issued, routed) + self.times.exchange_s / 2
        share = self._chosen_share(step)
        streamed = self.expert_bytes[step.stage]
        came = self._bring(step, self.issued, streamed, share, streamed[2] * share)
        self.issued += issue / 2
        if self.plan.policy.weight_bits is not None:
            rate = self.rates.dequantise_bytes_per_s(self.plan.policy.weight_bits)
            experts_s += self.expert_dense_bytes[step.stage] * share / rate
        return self.clocks.run(COMPUTE, "main", max(came, self.issued), experts_s, step.token)

    def _chosen_share(self, step: Step) -> float:
        """Of a layer's experts, those that a micro-batch is sent to and no earlier one was."""
        spec = self.plan.spec
        before = sum(self.batches[: step.micro_batch])
        more = spec.expected_experts(before + self.batches[step.micro_batch]) - spec.expected_experts(before)
        return more / spec.num_experts

    # Attention on the CPU

    def _attends_on_host(self, step: Step) -> bool:
        return step.token > 0 and self._on_host[step.stage]

    def _attend_on_host(self, step: Step) -> None:
        """The query, key and value go down, and the CPU attends, a micro-batch after the other."""
        layer = self.plan.stages[step.stage].layer
        rows = self._rows[layer][step.micro_batch]
        if not rows:
            return
        ready = max(
            self._down("exchange down", self.computed, rows * self._query_bytes, step.token),
            self.stored.get((layer, step.micro_batch), 0.0),
        )
        cached = rows * self.plan.kv_row_bytes * self._attended_positions(step)
        self.attended[step.micro_batch] = self.clocks.run(
            CPU,
            "attention",
            ready,
            cached / self._attention_rate(step.stage) + self.times.exchange_s,
            step.token,
        )

    def _finish(self, step: Step) -> None:
        """What the CPU found goes up, and the device computes the rest of the layer."""
        rows = self._rows[self.plan.stages[step.stage].layer][step.micro_batch]
        ready = self.attended.pop(step.micro_batch, 0.0)
        # The host has issued it long before: the device waits.
        issue = self._issue_seconds(step)
        if not self._chooses(step):
            self.issued += issue
        if rows:
            up = rows * self._outcome_bytes
            ready += up / self._up_rate
            self.clocks.moved[step.token][H2D] += up
        seconds = self._compute_seconds(step)
        if self._chooses(step):
            self.computed = self._compute_and_choose(step, ready, seconds, issue)
        else:
            self.computed = self.clocks.run(COMPUTE, "main", max(ready, self.issued), seconds, step.token)
        if step.slot >= 0:
            self.weight_busy[step.slot] = self.computed

    def _attended_positions(self, step: Step) -> int:
        context, window = self.contexts[step.token - 1], self._windows[step.stage]
        return min(context, window) if window else context

    def _attention_rate(self, stage: int) -> float:
        """Bytes of KV a second that the CPU attends to in a layer, part of the time beside copies up."""
        if stage not in self._attention_rates:
            alone, beside = self.rates.attention_bytes_per_s(self.times, self.plan.policy.kv_bits)
            layer = self.plan.stages[stage].layer
            positions, window = self.contexts[len(self.contexts) // 2], self._windows[stage]
            batches = range(len(self.batches))
            cached = min(positions, window or positions) * sum(self._rows[layer]) * self.plan.kv_row_bytes
            loaded = positions * sum(sum(self._kv_rows[True][layer][index]) for index in batches)
            copying_s = (sum(self.weight_bytes[stage][1:]) + loaded) / self._up_rate
            beside_s = min(copying_s, cached / beside)
            self._attention_rates[stage] = cached / (beside_s + (cached - beside_s * beside) / alone)
        return self._attention_rates[stage]

    def _issue_seconds(self, step: Step) -> float:
        """Host seconds to issue a compute step; a prompt's are issued for each of its chunks."""
        stage, attends = self.plan.stages[step.stage], self._attends_on_host(step)
        asks = attends and self._rows[stage.layer][step.micro_batch] > 0
        finishes, loads = step.action is Action.FINISH, step.kv_slot >= 0
        key = stage.kind, step.token > 0, self.batches[step.micro_batch], loads, attends, asks, finishes
        if key not in self._issue_cache:
            self._issue_cache[key] = self._issue_of(*key)
        return self._issue_cache[key]

    def _issue_of(
        self, kind: str, decodes: bool, sequences: int, loads: bool, attends: bool, asks: bool, finishes: bool
    ) -> float:
        times, chunks = self.times, 1
        if decodes:
            recording = self.plan.recording
            if recording == "step" and kind != "head":
                return 0.0
            if recording == "layers" and kind not in ("embed", "head"):
                chunks = 0  # Its operations are replayed; starting that is a part of `issue_s`.
        elif kind != "head":
            chunks = -(-sequences // max(1, self.plan.chunk_tokens // self.prompt))
        kv_s = times.kv_issue_s if loads else 0.0
        if attends:
            # A layer's operations are issued in two halves, with the query and with its answer; the loop's own cost is that
            # of one step.
            half_s = (times.chunk_issue_s + (times.exchange_s if asks else 0.0)) / 2
            return half_s if finishes else half_s + times.issue_s + kv_s
        return times.issue_s + chunks * times.chunk_issue_s + kv_s

    def _kv_wait(self, step: Step) -> float:
        if step.kv_slot < 0:
            return 0.0
        # A prompt writes the slot, so that its last user must have ended; a step reads what was loaded.
        held = self.kv_busy if step.token == 0 else self.kv_ready
        return held.get(step.kv_slot, 0.0)

    def _dequantise_seconds(self, step: Step) -> float:
        """A stage's compressed weights are turned back once, by its first micro-batch; compressed KV by each."""
        stage, policy, seconds = self.plan.stages[step.stage], self.plan.policy, 0.0
        if policy.weight_bits is None and policy.kv_bits is None:
            return 0.0
        if policy.weight_bits is not None and not step.micro_batch:
            dense = stage_dequantised_bytes(self.plan.images, stage)
            if self._chooses(step):
                dense -= self.expert_dense_bytes[step.stage]
            seconds += dense / self.rates.dequantise_bytes_per_s(policy.weight_bits)
        if policy.kv_bits is not None and stage.has_kv:
            window = self._windows[step.stage]
            # A prompt's rows are written in about the time that they could be read in.
            rows = self.contexts[step.token - 1] if step.token else self.prompt
            rows = min(rows, window) if window and step.token else rows
            here = self.batches[step.micro_batch]
            if self._attends_on_host(step):
                here -= self._rows[stage.layer][step.micro_batch]
            dense = rows * here * self.plan.dense_kv_row_bytes
            seconds += dense / self.rates.dequantise_bytes_per_s(policy.kv_bits)
        return seconds

    def _recompute_seconds(self, step: Step) -> float:
        """A step makes keys and values of a unit's inputs, of some sequences at a time."""
        stage = self.plan.stages[step.stage]
        if not self._made or not step.token or not stage.has_kv:
            return 0.0
        at_once = self.plan.recomputed_sequences
        positions = made_positions(self._attended_positions(step), self.plan.max_context)
        key = self._made[stage.layer][step.micro_batch], positions
        if key not in self._recompute_cache:
            whole, rest = divmod(key[0], at_once)
            whole_s, rest_s = (self.times.recompute_s(count * positions) for count in (at_once, rest))
            self._recompute_cache[key] = whole * whole_s + rest_s
        return self._recompute_cache[key]

    def _compute_seconds(self, step: Step) -> float:
        stage, sequences = self.plan.stages[step.stage], self.batches[step.micro_batch]
        attends = self._attends_on_host(step)
        # Layers and micro-batches differ in how many sequences rounding left on the device.
        rows = self._rows[stage.layer][step.micro_batch] if attends else 0
        finishes = step.action is Action.FINISH
        key = step.token, stage.kind, self._windows[step.stage], sequences, attends, rows, finishes
        if key not in self._compute_cache:
            self._compute_cache[key] = (
                self._part_seconds(step, stage.kind, sequences)
                if attends
                else self._stage_seconds(stage.kind, step.stage, sequences, step.token)
            )
        return self._compute_cache[key]

    def _stage_seconds(self, kind: str, stage: int, sequences: int, token: int) -> float:
        if kind == "head":
            return self.times.head_s(sequences)
        if kind == "embed":
            rows = sequences * (self.prompt if token == 0 else 1)
            return rows * self.plan.spec.hidden_bytes(1, self.plan.dtype_bytes) / self._copy_rate
        window = self._windows[stage]
        if token > 0 and self.plan.recording != "none":
            starts_s = self.times.replay_s if self.plan.recording == "layers" else 0.0
            return starts_s + self.times.recorded_s(kind, sequences, self.plan.max_context)
        if token > 0:
            context = self.contexts[token - 1]
            return self.times.step_s(kind, sequences, min(context, window) if window else context)
        return self.times.chunked_prompt_s(kind, sequences, self.prompt, self.plan.chunk_tokens)

    def _part_seconds(self, step: Step, kind: str, sequences: int) -> float:
        """Of a layer whose KV lies partly in host memory: before the CPU attends, with the device's own part; or after."""
        layer = self.plan.stages[step.stage].layer
        products_s = self.times.step_s("attention", sequences, 0)
        before = self.plan.spec.query_size + 2 * self.plan.spec.kv_size
        before_s = products_s * before / (before + self.plan.spec.query_size)
        if step.action is Action.FINISH:
            return (
                products_s - before_s + (self.times.step_s("mlp", sequences, 0) if kind == "layer" else 0.0)
            )
        here = sequences - self._rows[layer][step.micro_batch]
        if here:
            positions = self._attended_positions(step)
            before_s += self.times.step_s("attention", here, positions) - self.times.step_s(
                "attention", here, 0
            )
        return before_s

    # Sizes and rates

    def _kv_row(self, split: Split, *, loaded: bool) -> tuple[int, int]:
        """Bytes of one position of a unit's sequences in host memory and on disk: of all, or of what steps load."""
        plan = self.plan
        spec, policy = plan.spec, plan.policy
        cpu = split.inputs * spec.hidden_bytes(1, plan.dtype_bytes)
        if split.cpu and not (loaded and plan.attends_on_host):
            cpu += row_bytes(spec, policy, split.cpu, plan.dtype_bytes, disk=False)
        disk = row_bytes(spec, policy, split.disk, plan.dtype_bytes, disk=True) if split.disk else 0
        return cpu, disk

    def _hidden_bytes(self, micro_batch: int, token: int) -> tuple[int, int, int]:
        columns = self.prompt if token == 0 else 1
        row = self.plan.spec.hidden_bytes(columns, self.plan.dtype_bytes)
        split = self.plan.hidden_splits[micro_batch]
        return split.gpu * row, split.cpu * row, split.disk * row

    @property
    def _up_rate(self) -> float:
        return self._up_rates[self.step.token > 0]

    @property
    def _down_rate(self) -> float:
        return self.rates.d2h_bytes_per_s or self._copy_rate


def _sum(parts: Iterable[TierBytes]) -> tuple[float, ...]:
    """Bytes on the device, in host memory and on disk."""
    listed = list(parts)
    return tuple(sum(getattr(part, tier) for part in listed) for tier in ("gpu", "cpu", "disk"))
