"""What a schedule takes: the engine's own steps, each with a duration, run against the clock of each resource.

The engine runs `zigzag(shape)`; this walks the same iterator. Each resource (compute device, link up, link down,
disk, the host that issues) does one thing at a time, in order; a step begins when its resource is free and what it
needs has ended, exactly as the executor's events order it. So fill and drain of the pipeline, slots, micro-batches
and overlap need no formula of their own. Pure: measures nothing, allocates nothing.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flexllmgen.memory.disk import READ_BYTES
from flexllmgen.placement import PlacementPlan
from flexllmgen.schedule import Action, Shape, Step, zigzag
from profiling.durations import Durations
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
    """When each resource is next free, and the work it did in each of a number of passes.

    With `together` nothing begins before everything else has ended, of which the last does at `latest`.
    """

    together: bool
    passes: int
    free: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    latest: float = 0.0
    busy: list[dict[str, float]] = field(init=False)
    moved: list[dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.busy = [{} for _ in range(self.passes)]
        self.moved = [dict.fromkeys(LINKS, 0.0) for _ in range(self.passes)]

    def run(self, resource: str, lane: str, ready: float, seconds: float, token: int) -> float:
        """Occupies a resource from when it and its lane are free; returns the end."""
        # Called for every piece of work: comparisons are faster than max().
        free, busy = self.free, self.busy[token]
        start = free[resource]
        if free[lane] > start:
            start = free[lane]
        if ready > start:
            start = ready
        if self.together and self.latest > start:
            start = self.latest
        end = start + seconds
        free[resource] = free[lane] = end
        if end > self.latest:
            self.latest = end
        busy[resource] = busy.get(resource, 0.0) + seconds
        return end

    def hold(self, lane: str, until: float) -> None:
        """Keeps a lane busy, and no resource."""
        self.free[lane] = until
        if until > self.latest:
            self.latest = until


class _Load(NamedTuple):
    """A share of a stage's streamed weights: bytes in host memory and on disk, and the seconds of each part of the way.

    Args:
        last_s: to copy what was read last.
        resident_s: to copy the resident part of a tensor that is cut.
        held_s: for how long of it a step's products wait: an accelerator copies with what it computes with, but for as long
            as a graph takes to start.
    """

    host: float
    disk: float
    read_s: float
    host_s: float
    disk_s: float
    last_s: float
    resident_s: float
    held_s: float


@functools.lru_cache(maxsize=8)
def _schedule(shape: Shape) -> tuple[Step, ...]:
    # Kept, since the policies that a search compares often have the same one.
    return tuple(zigzag(shape))


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
        self.times, self.rates = times, rates
        self.plan, self.durations = plan, Durations(plan, times, rates, micro_batches, contexts)
        self.batches, self.contexts = micro_batches, contexts
        self.prompt, self.on_cpu = plan.workload.prompt_tokens, plan.in_place
        self.shape = Shape(
            num_tokens=1 + len(contexts),
            num_micro_batches=len(micro_batches),
            streamed_weights=tuple(any(each) for each in self.durations.weight_bytes),
            streamed_kv=tuple(stage.has_kv and plan.streams_kv(stage.layer) for stage in plan.stages),
            streamed_hidden=plan.hidden_slots > 0,
            depth=plan.policy.overlap,
            spare_kv_slots=plan.spare_kv_slots,
            loaded_kv=tuple(stage.has_kv and plan.loads_kv(stage.layer) for stage in plan.stages),
            host_attention=tuple(self.durations.on_host),
        )
        # Parts of a load follow one another at once where nothing else wants the disk or the way up.
        loaded = self.shape.loaded_kv or ()
        self.in_one = not (any(loaded) or self.shape.streamed_hidden or any(self.durations.chosen))
        self.clocks = _Clocks(together=plan.policy.overlap == 0, passes=1 + len(contexts))
        self.step = Step(Action.EMIT, 0, 0)
        self.issued = 0.0
        slots, kv_slots, hidden_slots = (
            range(count) for count in (self.shape.weight_slots, self.shape.kv_slots, plan.hidden_slots)
        )
        self.weight_ready, self.weight_busy = [0.0 for _ in slots], [0.0 for _ in slots]
        self.kv_ready, self.kv_busy = [0.0 for _ in kv_slots], [0.0 for _ in kv_slots]
        self.hidden_ready, self.hidden_busy = [0.0 for _ in hidden_slots], [0.0 for _ in hidden_slots]
        self.kv_lanes = [f"kv up {slot}" for slot in kv_slots]
        self.layers = [stage.layer for stage in plan.stages]
        self.stored: dict[tuple[int, int], float] = {}
        self.hidden_stored: dict[int, float] = {}
        self.attended: dict[int, float] = {}
        self.computed = 0.0
        self._loads: dict[tuple[int, bool, bool], _Load] = {}

    def run(self) -> Passes:
        emitted: list[float] = []
        # An enum's members are slow to look up and to hash; the most frequent steps come first.
        compute, load_weights, load_kv = Action.COMPUTE, Action.LOAD_WEIGHTS, Action.LOAD_KV
        store_kv, finish, load_hidden = Action.STORE_KV, Action.FINISH, Action.LOAD_HIDDEN
        emit = Action.EMIT
        for step in _schedule(self.shape):
            self.step = step
            action = step.action
            if action is compute:
                self._compute(step)
            elif action is load_weights:
                self._load_weights(step)
            elif action is load_kv:
                self._load_kv(step)
            elif action is store_kv:
                self._store_kv(step)
            elif action is finish:
                self._finish(step)
            elif action is load_hidden:
                self._load_hidden(step)
            elif action is emit:
                self.issued = max(self.issued, self.computed)
                emitted.append(self.computed)
            else:
                self._store_hidden(step)
        starts = [0.0, *emitted[:-1]]
        return Passes(
            seconds=tuple(end - start for start, end in zip(starts, emitted, strict=True)),
            busy=tuple(self.clocks.busy),
            moved=tuple(self.clocks.moved),
        )

    # Loads and stores. Each lane is a queue of its own; the disk and the links are shared by all lanes.

    def _load_weights(self, step: Step) -> None:
        if self.in_one and step.part:
            return
        slot, ready = step.slot, self.issued
        if step.part == 0 and self.weight_busy[slot] > ready:
            ready = self.weight_busy[slot]
        key = step.stage, step.token > 0, step.part == 0
        load = self._loads.get(key) or self._part_of_load(*key)
        end = self._bring(load, ready, step.token)
        if step.part == 0 or end > self.weight_ready[slot]:
            self.weight_ready[slot] = end

    def _part_of_load(self, stage: int, decodes: bool, first: bool) -> _Load:
        """What a step brings in of a stage's weights; with the first part all that is copied within the device."""
        loaded = self.durations.streamed(stage, decodes=decodes)
        # Reads are started for all parts of a stage, and with overlap for the next stage too.
        under_way = loaded[2] * (2 if self.plan.policy.overlap else 1)
        parts = len(self.batches)
        share, reads = (1.0, parts) if self.in_one else (1 / parts, 1)
        mine = (loaded[0] / share if first else 0.0, *loaded[1:])
        load = self._loads[stage, decodes, first] = self._load(
            mine, share, under_way, self.durations.up_rates[decodes], reads=reads
        )
        return load

    def _load(
        self, streamed: tuple[float, ...], share: float, under_way: float, up_rate: float, *, reads: int = 1
    ) -> _Load:
        """A share of streamed weights; `under_way` bytes are read at about the same time, in so many `reads`."""
        resident, host, disk = (num_bytes * share for num_bytes in streamed)
        paged = 0.0 if self.plan.policy.pin_weight else self.rates.h2d_pageable_bytes_per_s
        resident_s = resident / self.durations.copy_rate
        start_s = self.times.replay_s if self.plan.recording == "layers" else 0.0
        return _Load(
            host=host,
            disk=disk,
            read_s=self._read_s(disk, under_way=under_way, reads=reads) if disk else 0.0,
            host_s=host / (paged or up_rate),
            disk_s=disk / up_rate,
            last_s=min(disk / reads, READ_BYTES) / up_rate,
            resident_s=resident_s,
            held_s=0.0 if self.on_cpu else max(0.0, resident_s - start_s),
        )

    def _bring(self, load: _Load, ready: float, token: int) -> float:
        """Copies weights into a slot; returns the end."""
        host, disk, read_s, host_s, disk_s, last_s, resident_s, held_s = load
        clocks, end = self.clocks, ready
        moved = clocks.moved[token]
        if disk:
            moved[DISK_READ] += disk
            end = clocks.run(DISK, "weights disk", ready, read_s, token)
        if not self.on_cpu and (host or disk):
            copied = ready
            if host:
                moved[H2D] += host
                copied = clocks.run(UP, "weights up", ready, host_s, token)
            if disk:
                moved[H2D] += disk
                copied = clocks.run(UP, "weights up", copied, disk_s, token)
                # Copies follow their reads, and the lane waits for the last one.
                copied = max(copied, end + last_s)
                clocks.hold("weights up", copied)
            end = copied
        if token and held_s:
            end = max(end, clocks.run(COMPUTE, "weights within", ready, held_s, token))
        elif resident_s:
            end = max(end, ready + resident_s)
        return end

    def _load_kv(self, step: Step) -> None:
        layer, slot, token = self.layers[step.stage], step.slot, step.token
        cpu, disk = self.durations.loaded_row[layer][step.micro_batch]
        positions = self.contexts[token - 1] - 1
        end = max(self.kv_busy[slot], self.stored.get((layer, step.micro_batch), 0.0), self.issued)
        lane = self.kv_lanes[slot]
        if disk:
            end = self._disk(lane, end, disk * positions, token)
        if not self.on_cpu and cpu + disk:
            end = self._up(lane, end, (cpu + disk) * positions, token)
        self.kv_ready[slot] = end

    def _store_kv(self, step: Step) -> None:
        slot, token = step.slot, step.token
        if slot < 0:
            return
        layer = self.layers[step.stage]
        rows = self.durations.loaded_row if token else self.durations.stored_row
        cpu, disk = rows[layer][step.micro_batch]
        positions = 1 if token else self.prompt
        end = self.computed
        if not self.on_cpu and cpu + disk:
            end = self._down("kv down", end, (cpu + disk) * positions, token)
        if disk:
            end = self._disk("kv down", end, disk * positions, token, write=True)
        self.stored[layer, step.micro_batch] = end
        if end > self.kv_busy[slot]:
            self.kv_busy[slot] = end

    def _load_hidden(self, step: Step) -> None:
        gpu, cpu, disk = self.durations.hidden_bytes(step.micro_batch, step.token)
        ready = max(self.hidden_busy[step.slot], self.hidden_stored.get(step.micro_batch, 0.0), self.issued)
        if disk:
            ready = self._disk("hidden up", ready, disk, step.token)
        if not self.on_cpu and cpu + disk:
            ready = self._up("hidden up", ready, cpu + disk, step.token)
        self.hidden_ready[step.slot] = self.clocks.run(
            COPY, "hidden up", ready, (gpu + cpu + disk) / self.durations.copy_rate, step.token
        )

    def _store_hidden(self, step: Step) -> None:
        gpu, cpu, disk = self.durations.hidden_bytes(step.micro_batch, step.token)
        end = self.clocks.run(
            COPY, "hidden down", self.computed, (gpu + cpu + disk) / self.durations.copy_rate, step.token
        )
        if not self.on_cpu and cpu + disk:
            end = self._down("hidden down", end, cpu + disk, step.token)
        if disk:
            end = self._disk("hidden down", end, disk, step.token, write=True)
        self.hidden_stored[step.micro_batch] = end
        self.hidden_busy[step.slot] = end

    def _up(self, lane: str, ready: float, num_bytes: float, token: int) -> float:
        self.clocks.moved[token][H2D] += num_bytes
        return self.clocks.run(UP, lane, ready, num_bytes / self.durations.up_rates[token > 0], token)

    def _down(self, lane: str, ready: float, num_bytes: float, token: int) -> float:
        self.clocks.moved[token][D2H] += num_bytes
        return self.clocks.run(DOWN, lane, ready, num_bytes / self.durations.down_rate, token)

    def _disk(self, lane: str, ready: float, num_bytes: float, token: int, *, write: bool = False) -> float:
        self.clocks.moved[token][DISK_WRITE if write else DISK_READ] += num_bytes
        if not write:
            return self.clocks.run(DISK, lane, ready, self._read_s(num_bytes), token)
        rates, per_s = self.rates, self.rates.disk_writes_per_s
        seconds = num_bytes / rates.disk_write_bytes_per_s + (1 / per_s if per_s else 0.0)
        return self.clocks.run(DISK, lane, ready, seconds, token)

    def _read_s(self, num_bytes: float, *, under_way: float | None = None, reads: int = 1) -> float:
        """Seconds of so many reads from disk; `under_way` bytes are asked for at about the same time, else only these."""
        rate, per_s = self.durations.read_rate(under_way or num_bytes), self.rates.disk_reads_per_s
        return num_bytes / rate + (reads / per_s if per_s else 0.0)

    # Compute

    def _compute(self, step: Step) -> None:
        _, token, stage, _, slot, kv_slot, hidden_slot, _ = step
        durations = self.durations
        ready = 0.0
        if slot >= 0:
            ready = self.weight_ready[slot]
        if kv_slot >= 0:
            # A prompt writes the slot, so that its last user must have ended; a step reads what was loaded.
            held = (self.kv_ready if token else self.kv_busy)[kv_slot]
            if held > ready:
                ready = held
        if hidden_slot >= 0 and self.hidden_ready[hidden_slot] > ready:
            ready = self.hidden_ready[hidden_slot]
        seconds, issue = durations.work(step)
        if self.on_cpu:
            seconds, issue = seconds + issue, 0.0
        asks = token > 0 and durations.on_host[stage]
        if token and durations.chosen[stage] and not asks:
            end = self._compute_and_choose(step, ready, seconds, issue)
        else:
            self.issued += issue
            if self.issued > ready:
                ready = self.issued
            end = self.clocks.run(COMPUTE, COMPUTE, ready, seconds, token)
        self.computed = end
        if self.on_cpu:
            self.issued = max(self.issued, end)
        if slot >= 0:
            self.weight_busy[slot] = end
        if kv_slot >= 0:
            self.kv_busy[kv_slot] = end
        if hidden_slot >= 0:
            self.hidden_busy[hidden_slot] = end
        if asks:
            self._attend_on_host(step)

    # Experts by choice

    def _compute_and_choose(self, step: Step, ready: float, seconds: float, issue: float) -> float:
        """The device computes up to the router, its choice is brought in, and then it computes the experts."""
        experts_s = min(seconds, self.times.step_s("mlp", self.batches[step.micro_batch], 0))
        self.issued += issue / 2
        routed = self.clocks.run(COMPUTE, COMPUTE, max(ready, self.issued), seconds - experts_s, step.token)
        # The choice comes down as a query for the CPU does, and the host waits for it.
        self.issued = max(self.issued, routed) + self.times.exchange_s / 2
        share = self.durations.chosen_share(step)
        streamed, up_rate = self.durations.expert_bytes[step.stage], self.durations.up_rates[step.token > 0]
        load = self._load(streamed, share, streamed[2] * share, up_rate)
        came = self._bring(load, self.issued, step.token)
        self.issued += issue / 2
        experts_s += self.durations.chosen_experts_s(step, share)
        return self.clocks.run(COMPUTE, COMPUTE, max(came, self.issued), experts_s, step.token)

    # Attention on the CPU

    def _attend_on_host(self, step: Step) -> None:
        """The query, key and value go down, and the CPU attends, a micro-batch after the other."""
        layer, micro_batch = self.layers[step.stage], step.micro_batch
        rows = self.durations.rows[layer][micro_batch]
        if not rows:
            return
        down = self._down("exchange down", self.computed, rows * self.durations.query_bytes, step.token)
        # A micro-batch's query comes and its answer goes while the CPU attends for another.
        half_s = self.times.exchange_s / 2
        ready = max(down + half_s, self.stored.get((layer, micro_batch), 0.0))
        end = self.clocks.run(CPU, CPU, ready, self.durations.attention_s(step), step.token)
        self.attended[micro_batch] = end + half_s

    def _finish(self, step: Step) -> None:
        """What the CPU found goes up, and the device computes the rest of the layer."""
        durations, token, stage = self.durations, step.token, step.stage
        rows = durations.rows[self.layers[stage]][step.micro_batch]
        ready = self.attended.pop(step.micro_batch, 0.0)
        # The host has issued it long before: the device waits.
        seconds, issue = durations.work(step)
        if rows:
            up = rows * durations.outcome_bytes
            ready += up / durations.up_rates[token > 0]
            self.clocks.moved[token][H2D] += up
        if token and durations.chosen[stage]:
            self.computed = self._compute_and_choose(step, ready, seconds, issue)
        else:
            self.issued += issue
            self.computed = self.clocks.run(COMPUTE, COMPUTE, max(ready, self.issued), seconds, token)
        if step.slot >= 0:
            self.weight_busy[step.slot] = self.computed
