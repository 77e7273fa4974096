"""What a schedule takes: the engine's own steps, each with a duration, run against the clock of each resource.

The engine runs `zigzag(shape)`; this walks the same iterator. Each resource (compute device, link up, link down,
disk, the host that issues) does one thing at a time, in order; a step begins when its resource is free and what it
needs has ended, exactly as the executor's events order it. So fill and drain of the pipeline, slots, micro-batches
and overlap need no formula of their own. Pure: measures nothing, allocates nothing.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
        self.times, self.rates = times, rates
        self.plan, self.durations = plan, Durations(plan, times, rates, micro_batches, contexts)
        self.batches, self.contexts = micro_batches, contexts
        self.prompt, self.on_cpu = plan.workload.prompt_tokens, plan.in_place
        self.shape = Shape(
            num_tokens=1 + len(contexts),
            num_micro_batches=len(micro_batches),
            streamed_weights=[any(each) for each in self.durations.weight_bytes],
            streamed_kv=[stage.has_kv and plan.streams_kv(stage.layer) for stage in plan.stages],
            streamed_hidden=plan.hidden_slots > 0,
            depth=plan.policy.overlap,
            spare_kv_slots=plan.spare_kv_slots,
            loaded_kv=[stage.has_kv and plan.loads_kv(stage.layer) for stage in plan.stages],
            host_attention=self.durations.on_host,
        )
        # Parts of a load follow one another at once where nothing else wants the disk or the way up.
        loaded = self.shape.loaded_kv or ()
        self.in_one = not (any(loaded) or self.shape.streamed_hidden or any(self.durations.chosen))
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
                    if self.durations.attends_on_host(step):
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
        loaded = self.durations.weight_bytes[step.stage]
        if self.durations.chooses(step):
            experts = self.durations.expert_bytes[step.stage]
            loaded = tuple(all_ - theirs for all_, theirs in zip(loaded, experts, strict=True))
        if self.in_one and step.part:
            return
        free = self.weight_busy.get(step.slot, 0.0) if step.part == 0 else 0.0
        # Reads are started for all parts of a stage, and with overlap for the next stage too.
        under_way = loaded[2] * (2 if self.plan.policy.overlap else 1)
        parts = len(self.batches)
        share, reads = (1.0, parts) if self.in_one else (1 / parts, 1)
        end = self._bring(step, max(free, self.issued), loaded, share, under_way, reads=reads)
        self.weight_ready[step.slot] = max(end, self.weight_ready.get(step.slot, 0.0) if step.part else 0.0)

    def _bring(
        self,
        step: Step,
        ready: float,
        streamed: tuple[float, ...],
        share: float,
        under_way: float,
        *,
        reads: int = 1,
    ) -> float:
        """Copies a share of streamed weights into a slot; returns the end.

        `under_way` bytes are read at about the same time, in so many `reads` one after another.
        """
        resident, host, disk = (num_bytes * share for num_bytes in streamed)
        end = ready
        if disk:
            end = self._disk("weights disk", ready, disk, step.token, under_way=under_way, reads=reads)
        if not self.on_cpu and (host or disk):
            copied = ready
            if host:
                paged = 0.0 if self.plan.policy.pin_weight else self.rates.h2d_pageable_bytes_per_s
                copied = self._up("weights up", ready, host, step.token, rate=paged or None)
            if disk:
                copied = self._up("weights up", copied, disk, step.token)
                # Copies follow their reads, and the lane waits for the last one.
                copied = max(copied, end + min(disk / reads, READ_BYTES) / self._up_rate)
                self.clocks.free["weights up"] = copied
            end = copied
        if resident:
            end = max(end, ready + resident / self.durations.copy_rate)
        return end

    def _load_kv(self, step: Step) -> None:
        layer = self.plan.stages[step.stage].layer
        cpu, disk = self.durations.loaded_row[layer][step.micro_batch]
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
        rows = self.durations.loaded_row if step.token else self.durations.stored_row
        cpu, disk = rows[layer][step.micro_batch]
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
        gpu, cpu, disk = self.durations.hidden_bytes(step.micro_batch, step.token)
        ready = max(
            self.hidden_busy.get(step.slot, 0.0), self.hidden_stored.get(step.micro_batch, 0.0), self.issued
        )
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

    def _up(
        self, lane: str, ready: float, num_bytes: float, token: int, *, rate: float | None = None
    ) -> float:
        self.clocks.moved[token][H2D] += num_bytes
        return self.clocks.run(UP, lane, ready, num_bytes / (rate or self._up_rate), token)

    def _down(self, lane: str, ready: float, num_bytes: float, token: int) -> float:
        self.clocks.moved[token][D2H] += num_bytes
        return self.clocks.run(DOWN, lane, ready, num_bytes / self.durations.down_rate, token)

    def _disk(
        self,
        lane: str,
        ready: float,
        num_bytes: float,
        token: int,
        *,
        write: bool = False,
        under_way: float | None = None,
        reads: int = 1,
    ) -> float:
        """Reads or writes, so many times; `under_way` bytes are asked for at about the same time, else only these."""
        self.clocks.moved[token][DISK_WRITE if write else DISK_READ] += num_bytes
        rates = self.rates
        if write:
            rate, per_s = rates.disk_write_bytes_per_s, rates.disk_writes_per_s
        else:
            rate, per_s = self.durations.read_rate(under_way or num_bytes), rates.disk_reads_per_s
        return self.clocks.run(DISK, lane, ready, num_bytes / rate + (reads / per_s if per_s else 0.0), token)

    # Compute

    def _compute(self, step: Step) -> None:
        ready = max(
            self.weight_ready.get(step.slot, 0.0) if step.slot >= 0 else 0.0,
            self._kv_wait(step),
            self.hidden_ready.get(step.hidden_slot, 0.0) if step.hidden_slot >= 0 else 0.0,
        )
        seconds = self.durations.compute_s(step)
        issue = self.durations.issue_s(step)
        if self.on_cpu:
            seconds, issue = seconds + issue, 0.0
        if self.durations.chooses(step) and not self.durations.attends_on_host(step):
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

    def _compute_and_choose(self, step: Step, ready: float, seconds: float, issue: float) -> float:
        """The device computes up to the router, its choice is brought in, and then it computes the experts."""
        experts_s = min(seconds, self.times.step_s("mlp", self.batches[step.micro_batch], 0))
        self.issued += issue / 2
        routed = self.clocks.run(COMPUTE, "main", max(ready, self.issued), seconds - experts_s, step.token)
        # The choice comes down as a query for the CPU does, and the host waits for it.
        self.issued = max(self.issued, routed) + self.times.exchange_s / 2
        share = self.durations.chosen_share(step)
        streamed = self.durations.expert_bytes[step.stage]
        came = self._bring(step, self.issued, streamed, share, streamed[2] * share)
        self.issued += issue / 2
        experts_s += self.durations.chosen_experts_s(step, share)
        return self.clocks.run(COMPUTE, "main", max(came, self.issued), experts_s, step.token)

    # Attention on the CPU

    def _attend_on_host(self, step: Step) -> None:
        """The query, key and value go down, and the CPU attends, a micro-batch after the other."""
        layer = self.plan.stages[step.stage].layer
        rows = self.durations.rows[layer][step.micro_batch]
        if not rows:
            return
        down = self._down("exchange down", self.computed, rows * self.durations.query_bytes, step.token)
        # A micro-batch's query comes and its answer goes while the CPU attends for another.
        half_s = self.times.exchange_s / 2
        ready = max(down + half_s, self.stored.get((layer, step.micro_batch), 0.0))
        end = self.clocks.run(CPU, "attention", ready, self.durations.attention_s(step), step.token)
        self.attended[step.micro_batch] = end + half_s

    def _finish(self, step: Step) -> None:
        """What the CPU found goes up, and the device computes the rest of the layer."""
        rows = self.durations.rows[self.plan.stages[step.stage].layer][step.micro_batch]
        ready = self.attended.pop(step.micro_batch, 0.0)
        # The host has issued it long before: the device waits.
        issue = self.durations.issue_s(step)
        if not self.durations.chooses(step):
            self.issued += issue
        if rows:
            up = rows * self.durations.outcome_bytes
            ready += up / self._up_rate
            self.clocks.moved[step.token][H2D] += up
        seconds = self.durations.compute_s(step)
        if self.durations.chooses(step):
            self.computed = self._compute_and_choose(step, ready, seconds, issue)
        else:
            self.computed = self.clocks.run(COMPUTE, "main", max(ready, self.issued), seconds, step.token)
        if step.slot >= 0:
            self.weight_busy[step.slot] = self.computed

    def _kv_wait(self, step: Step) -> float:
        if step.kv_slot < 0:
            return 0.0
        # A prompt writes the slot, so that its last user must have ended; a step reads what was loaded.
        held = self.kv_busy if step.token == 0 else self.kv_ready
        return held.get(step.kv_slot, 0.0)

    @property
    def _up_rate(self) -> float:
        return self.durations.up_rates[self.step.token > 0]
