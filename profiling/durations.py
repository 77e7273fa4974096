"""How long each step of a schedule takes by itself, and how many bytes it moves.

From a placement, the layer times of a profile and its rates, for the micro-batches and cached positions of one block. Knows
nothing of the order of steps or of what waits for what: that is simulation.py. Pure.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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
from flexllmgen.schedule import Action, Step
from flexllmgen.splits import Split
from flexllmgen.units import DISK_THREADS
from flexllmgen.workspace import exchange_row, row_bytes
from profiling.layer_times import LayerTimes
from profiling.profile import Rates

_FINISH = Action.FINISH
"""Looked up once: an enum's members are slow to look up."""


class _Units(NamedTuple):
    """Of a layer, by micro-batch: `rows`, `stored_row` and `loaded_row`; and sequences whose keys a step makes of inputs."""

    rows: list[int]
    stored: list[tuple[int, int]]
    loaded: list[tuple[int, int]]
    made: list[int]


class Durations:
    """Seconds and bytes of the steps of one block.

    Args:
        batches: sequences of each micro-batch.
        contexts: cached positions of each decode step, its own included.

    Attributes:
        weight_bytes: by stage, what is streamed from the device, host memory and disk; `expert_bytes` of these, the experts'
            where a step brings them in by choice (`chosen`).
        rows: by layer and micro-batch, the sequences that the CPU attends to; of a ragged one fewer than lie there.
        stored_row, loaded_row: by layer and micro-batch, bytes of one position in host memory and on disk: of all, and
            of what steps load.
        alike: by stage and micro-batch, a number that those share whose work takes equally long.
        on_host: by stage, whether the CPU attends to what lies in host memory.
        query_bytes, outcome_bytes: of a sequence that the CPU attends to, down and up.
        copy_rate: bytes a second that are copied within the compute device's memory.
        up_rates: bytes a second up, of a prompt and of a step.
        down_rate: bytes a second down.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        times: LayerTimes,
        rates: Rates,
        batches: Sequence[int],
        contexts: Sequence[int],
    ) -> None:
        self.plan, self.times, self.rates = plan, times, rates
        self.batches, self.contexts = batches, contexts
        self.prompt = plan.workload.prompt_tokens
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

        self._windows = [
            plan.spec.sliding_window(stage.layer) if stage.layer >= 0 else 0 for stage in plan.stages
        ]
        # Layers whose sequences are divided alike share what is worked out for one.
        divisions = {id(splits): splits for splits in plan.kv_splits}
        units = {key: self._units(splits) for key, splits in divisions.items()}
        layers = [units[id(splits)] for splits in plan.kv_splits]
        self.rows = [each.rows for each in layers]
        self.stored_row, self.loaded_row = [each.stored for each in layers], [each.loaded for each in layers]
        self._made = [each.made for each in layers]
        self.copy_rate = rates.device_copy_bytes_per_s or rates.device_bytes_per_s / 2
        self.down_rate = rates.d2h_bytes_per_s or self.copy_rate
        self.on_host = [stage.has_kv and plan.attends_on_host for stage in plan.stages]
        exchange = exchange_row(plan.spec, plan.dtype_bytes, plan.policy)
        self.query_bytes, self.outcome_bytes = exchange.down, exchange.outcome
        self._row_bytes, self._layers = plan.kv_row_bytes, [stage.layer for stage in plan.stages]
        self.alike = self._units_alike()
        self._work_cache: dict[tuple[object, ...], tuple[float, float]] = {}
        self._compute_cache: dict[tuple[object, ...], float] = {}
        self._recompute_cache: dict[tuple[int, int], float] = {}
        self._issue_cache: dict[tuple[object, ...], float] = {}
        step_up_rate, self._attention_rate = self._beside_each_other()
        self.up_rates = rates.h2d_bytes_per_s or self.copy_rate, step_up_rate

    def work(self, step: Step) -> tuple[float, float]:
        """Seconds of the device, and of the host to issue them."""
        action, token, stage, micro_batch, _, kv_slot, _, _ = step
        key = token, self.alike[stage][micro_batch], action is _FINISH, kv_slot >= 0
        known = self._work_cache.get(key)
        if known is None:
            known = self._work_cache[key] = self.compute_s(step), self.issue_s(step)
        return known

    def compute_s(self, step: Step) -> float:
        """Seconds of the device, with what it makes of compressed or recomputed numbers."""
        seconds = self._compute_seconds(step)
        if step.action is Action.FINISH:
            return seconds
        return seconds + self._dequantise_seconds(step) + self._recompute_seconds(step)

    def attention_s(self, step: Step) -> float:
        """Seconds in which the CPU attends."""
        rows = self.rows[self._layers[step.stage]][step.micro_batch]
        cached = rows * self._row_bytes * self._attended_positions(step)
        return cached / self._attention_rate + self.times.cpu_attention_call_s

    def chosen_experts_s(self, step: Step, share: float) -> float:
        """Seconds to turn back the experts that a step brought in."""
        bits = self.plan.policy.weight_bits
        if bits is None:
            return 0.0
        return self.expert_dense_bytes[step.stage] * share / self.rates.dequantise_bytes_per_s(bits)

    def read_rate(self, num_bytes: float) -> float:
        """The disk's full rate needs as many pieces under way as there are threads."""
        full = self.rates.disk_read_bytes_per_s
        alone = min(full, self.rates.disk_read_alone_bytes_per_s or full)
        threads = min(DISK_THREADS, self.plan.policy.copy_threads)
        pieces = min(threads, max(1.0, num_bytes / READ_BYTES))
        return alone + (full - alone) * (pieces - 1) / (DISK_THREADS - 1)

    def streamed(self, stage: int, *, decodes: bool) -> tuple[float, ...]:
        """Bytes that a pass brings in ahead, from the device, host memory and disk: in a step no experts by choice."""
        loaded = self.weight_bytes[stage]
        if not (decodes and self.chosen[stage]):
            return loaded
        return tuple(all_ - theirs for all_, theirs in zip(loaded, self.expert_bytes[stage], strict=True))

    def chooses(self, step: Step) -> bool:
        return step.token > 0 and self.chosen[step.stage]

    def chosen_share(self, step: Step) -> float:
        """Of a layer's experts, those that a micro-batch is sent to and no earlier one was."""
        spec = self.plan.spec
        before = sum(self.batches[: step.micro_batch])
        more = spec.expected_experts(before + self.batches[step.micro_batch]) - spec.expected_experts(before)
        return more / spec.num_experts

    def attends_on_host(self, step: Step) -> bool:
        return step.token > 0 and self.on_host[step.stage]

    def _units(self, splits: Sequence[Split]) -> _Units:
        firsts = [split.first(count) for split, count in zip(splits, self.batches, strict=False)]
        stored, loaded = ([self._kv_row(split, loaded=loads) for split in splits] for loads in (False, True))
        return _Units(
            rows=[first.cpu for first in firsts],
            stored=stored,
            loaded=loaded,
            made=[first.inputs for first in firsts],
        )

    def _units_alike(self) -> list[tuple[int, ...]]:
        """Most layers differ only in what is loaded, and most micro-batches not at all."""
        numbers: dict[tuple[object, ...], int] = {}
        known: dict[tuple[object, ...], tuple[int, ...]] = {}
        nothing, alike = [0] * len(self.batches), []
        for index, stage in enumerate(self.plan.stages):
            common = (
                stage.kind,
                self._windows[index],
                self.chosen[index],
                self.expert_dense_bytes[index],
                stage_dequantised_bytes(self.plan.images, stage),
            )
            rows, made, loaded = nothing, nothing, nothing
            if stage.has_kv:
                rows, made = self.rows[stage.layer], self._made[stage.layer]
                loaded = [sum(each) for each in self.loaded_row[stage.layer][: len(self.batches)]]
            key = (*common, id(rows))
            if key not in known:
                units = enumerate(zip(self.batches, rows, made, map(bool, loaded), strict=True))
                known[key] = tuple(
                    numbers.setdefault((*common, index == 0, *unit), len(numbers)) for index, unit in units
                )
            alike.append(known[key])
        return alike

    def _attended_positions(self, step: Step) -> int:
        context, window = self.contexts[step.token - 1], self._windows[step.stage]
        return min(context, window) if window else context

    def _beside_each_other(self) -> tuple[float, float]:
        """Bytes a second up in a step, and of KV that the CPU attends to: both read host memory, and each is slower meanwhile.

        That is as long as the shorter of them lasts, in the middle of the steps; loads run ahead, so that it does not matter
        which stage they are for. Without overlap nothing runs beside anything.
        """
        alone = self.rates.h2d_bytes_per_s or self.copy_rate
        under = self.rates.h2d_beside_attention_bytes_per_s or alone
        attends, slower = self.rates.attention_bytes_per_s(self.times, self.plan.policy.kv_bits)
        copied = cached = 0.0
        if self.contexts and any(self.on_host) and self.plan.policy.overlap:
            positions = self.contexts[len(self.contexts) // 2]
            for stage, window in zip(self.plan.stages, self._windows, strict=True):
                if stage.has_kv:
                    seen = min(positions, window or positions)
                    cached += seen * sum(self.rows[stage.layer]) * self.plan.kv_row_bytes
                    copied += positions * sum(map(sum, self.loaded_row[stage.layer][: len(self.batches)]))
            copied += sum(map(self._copied_weights, range(len(self.plan.stages))))
        if not copied or not cached:
            return alone, attends
        both_s = min(copied / under, cached / slower)
        return (
            copied / (both_s + (copied - both_s * under) / alone),
            cached / (both_s + (cached - both_s * slower) / attends),
        )

    def _copied_weights(self, stage: int) -> float:
        """Bytes that a step copies up of a stage's weights, at the rate of page-locked memory."""
        _, host, disk = self.streamed(stage, decodes=True)
        if self.chosen[stage]:
            share = self.plan.spec.expected_experts(sum(self.batches)) / self.plan.spec.num_experts
            host += share * self.expert_bytes[stage][1]
            disk += share * self.expert_bytes[stage][2]
        return disk + (host if self.plan.policy.pin_weight else 0.0)

    def issue_s(self, step: Step) -> float:
        """Host seconds to issue a compute step; a prompt's are issued for each of its chunks."""
        stage, attends = self.plan.stages[step.stage], self.attends_on_host(step)
        asks = attends and self.rows[stage.layer][step.micro_batch] > 0
        finishes, moves, makes = step.action is Action.FINISH, step.kv_slot >= 0, False
        if stage.has_kv:
            rows = self.loaded_row if step.token else self.stored_row
            moves = moves and any(rows[stage.layer][step.micro_batch])
            makes = step.token > 0 and self._made[stage.layer][step.micro_batch] > 0
        key = (
            stage.kind,
            step.token > 0,
            self.batches[step.micro_batch],
            moves,
            makes,
            attends,
            asks,
            finishes,
        )
        if key not in self._issue_cache:
            self._issue_cache[key] = self._issue_of(*key)
        return self._issue_cache[key]

    def _issue_of(
        self,
        kind: str,
        decodes: bool,
        sequences: int,
        moves: bool,
        makes: bool,
        attends: bool,
        asks: bool,
        finishes: bool,
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
        kv_s = (times.kv_issue_s if moves else 0.0) + (times.making_issue_s if makes else 0.0)
        if attends:
            # A layer's operations are issued in two halves, with the query and with its answer; the loop's own cost is that
            # of one step. Meanwhile the CPU attends for others.
            half_s = (times.chunk_issue_s + (times.exchange_s if asks else 0.0)) / 2
            return (half_s if finishes else half_s + times.issue_s + kv_s) * times.beside_attention
        return times.issue_s + chunks * times.chunk_issue_s + kv_s

    def _dequantise_seconds(self, step: Step) -> float:
        """A stage's compressed weights are turned back once, by its first micro-batch; compressed KV by each."""
        stage, policy, seconds = self.plan.stages[step.stage], self.plan.policy, 0.0
        if policy.weight_bits is None and policy.kv_bits is None:
            return 0.0
        if policy.weight_bits is not None and not step.micro_batch:
            dense = stage_dequantised_bytes(self.plan.images, stage)
            if self.chooses(step):
                dense -= self.expert_dense_bytes[step.stage]
            seconds += dense / self.rates.dequantise_bytes_per_s(policy.weight_bits)
        if policy.kv_bits is not None and stage.has_kv:
            window = self._windows[step.stage]
            # A prompt's rows are written in about the time that they could be read in.
            rows = self.contexts[step.token - 1] if step.token else self.prompt
            rows = min(rows, window) if window and step.token else rows
            here = self.batches[step.micro_batch]
            if self.attends_on_host(step):
                here -= self.rows[stage.layer][step.micro_batch]
            dense = rows * here * self.plan.dense_kv_row_bytes
            seconds += dense / self.rates.kv_bytes_per_s(policy.kv_bits)
            if step.token and self.rates.kv_rows_per_s:
                seconds += 1 / self.rates.kv_rows_per_s
        return seconds

    def _recompute_seconds(self, step: Step) -> float:
        """A step makes keys and values of a unit's inputs, of some sequences at a time."""
        stage = self.plan.stages[step.stage]
        if not self.plan.input_bytes or not step.token or not stage.has_kv:
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
        attends = self.attends_on_host(step)
        # Layers and micro-batches differ in how many sequences rounding left on the device.
        rows = self.rows[stage.layer][step.micro_batch] if attends else 0
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
            return rows * self.plan.spec.hidden_bytes(1, self.plan.dtype_bytes) / self.copy_rate
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
        here = sequences - self.rows[layer][step.micro_batch]
        if here:
            positions = self._attended_positions(step)
            before_s += self.times.step_s("attention", here, positions) - self.times.step_s(
                "attention", here, 0
            )
        return before_s

    def _kv_row(self, split: Split, *, loaded: bool) -> tuple[int, int]:
        """Bytes of one position of a unit's sequences in host memory and on disk: of all, or of what steps load."""
        plan = self.plan
        spec, policy = plan.spec, plan.policy
        cpu = split.inputs * spec.hidden_bytes(1, plan.dtype_bytes)
        if split.cpu and not (loaded and plan.attends_on_host):
            cpu += row_bytes(spec, policy, split.cpu, plan.dtype_bytes, tier="cpu")
        disk = row_bytes(spec, policy, split.disk, plan.dtype_bytes, tier="disk") if split.disk else 0
        return cpu, disk

    def hidden_bytes(self, micro_batch: int, token: int) -> tuple[int, int, int]:
        columns = self.prompt if token == 0 else 1
        row = self.plan.spec.hidden_bytes(columns, self.plan.dtype_bytes)
        split = self.plan.hidden_splits[micro_batch]
        return split.gpu * row, split.cpu * row, split.disk * row


def _sum(parts: Iterable[TierBytes]) -> tuple[float, ...]:
    """Bytes on the device, in host memory and on disk."""
    listed = list(parts)
    return tuple(sum(getattr(part, tier) for part in listed) for tier in ("gpu", "cpu", "disk"))
