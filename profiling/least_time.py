"""The least that simulating a placement can say, for a small part of what simulating takes.

In each pass the compute device works through its stages in turn, and where the CPU attends both wait for one another in each
layer; what is loaded comes over one link and from one disk. A pass is no shorter than the longest of these. Pure.
"""

from collections.abc import Sequence

from flexllmgen.placement import PlacementPlan
from flexllmgen.schedule import Action, Step
from profiling.durations import Durations
from profiling.layer_times import LayerTimes
from profiling.profile import Rates

_SAFE = 1 - 1e-9
"""Sums are rounded in another order."""


def least_block(
    plan: PlacementPlan,
    times: LayerTimes,
    rates: Rates,
    *,
    micro_batches: Sequence[int],
    contexts: Sequence[int],
) -> tuple[float, ...]:
    """Seconds that each pass of `simulate_block` takes at least, for the same arguments."""
    least = _Least(plan, times, rates, micro_batches, contexts)
    return tuple(_SAFE * least.pass_s(token) for token in range(1 + len(contexts)))


class _Least:
    def __init__(
        self,
        plan: PlacementPlan,
        times: LayerTimes,
        rates: Rates,
        micro_batches: Sequence[int],
        contexts: Sequence[int],
    ) -> None:
        self.plan, self.times, self.rates = plan, times, rates
        self.batches, self.contexts = range(len(micro_batches)), contexts
        self.durations = Durations(plan, times, rates, micro_batches, contexts)
        with_kv = [(stage.layer, stage.has_kv) for stage in plan.stages]
        self.streams = [has_kv and plan.streams_kv(layer) for layer, has_kv in with_kv]
        self.loads = [has_kv and plan.loads_kv(layer) for layer, has_kv in with_kv]
        self._loaded: dict[bool, tuple[float, float, float, float]] = {}
        self._parts: dict[tuple[int, int, tuple[int, ...]], tuple[float, float, float]] = {}

    def pass_s(self, token: int) -> float:
        """Seconds of one pass, of the prompt's if `token` is 0."""
        computed = self._computed_s(token)
        loaded = self._loaded_s(token)
        # Without overlap nothing begins before everything else has ended.
        return max(computed, *loaded) if self.plan.policy.overlap else computed + sum(loaded)

    def _computed_s(self, token: int) -> float:
        """What the compute device takes, with the CPU where that attends."""
        durations, together, seconds = self.durations, self.plan.policy.overlap == 0, 0.0
        for stage, layer in enumerate(self.plan.stages):
            device_s, before_s, after_s = self._device_s(token, stage)
            rows = durations.rows[layer.layer] if token and durations.on_host[stage] else []
            if not any(rows):
                seconds += device_s
                continue
            asked = next(index for index in self.batches if rows[index])
            attention_s = self._attention_s(token, stage, rows)
            if together:
                seconds += device_s + attention_s
                continue
            # The first query goes down, the CPU attends to all, the last answer goes up.
            way_s = rows[asked] * durations.query_bytes / durations.down_rate
            seconds += max(device_s, before_s + way_s + self.times.exchange_s + attention_s + after_s)
        return seconds

    def _attention_s(self, token: int, stage: int, rows: Sequence[int]) -> float:
        asked = next(index for index in self.batches if rows[index])
        call_s, calls = self.times.cpu_attention_call_s, sum(1 for index in self.batches if rows[index])
        one = self.durations.attention_s(Step(Action.COMPUTE, token, stage, asked)) - call_s
        return one / rows[asked] * sum(rows) + call_s * calls

    def _device_s(self, token: int, stage: int) -> tuple[float, float, float]:
        """Seconds of a stage on the compute device: all, up to the first query, and from the last answer on."""
        durations = self.durations
        layer = self.plan.stages[stage]
        slot = 0 if (self.loads if token else self.streams)[stage] else -1
        key = token, slot, durations.alike[stage]
        if key in self._parts:
            return self._parts[key]
        computes = [
            self._work_s(Step(Action.COMPUTE, token, stage, index, 0, slot)) for index in self.batches
        ]
        if not (token and durations.on_host[stage]):
            parts = sum(computes), 0.0, 0.0
        else:
            rows = durations.rows[layer.layer]
            asked = [index for index in self.batches if rows[index]] or [0]
            finishes = [self._work_s(Step(Action.FINISH, token, stage, index, 0)) for index in self.batches]
            before, after = computes[: asked[0] + 1], finishes[asked[-1] :]
            parts = sum(computes) + sum(finishes), sum(before), sum(after)
        self._parts[key] = parts
        return parts

    def _work_s(self, step: Step) -> float:
        seconds, issue = self.durations.work(step)
        return seconds + issue if self.plan.in_place else seconds

    def _loaded_s(self, token: int) -> tuple[float, float]:
        """What comes up over the link and from the disk; not what may be loaded before the pass begins."""
        decodes = token > 0
        if decodes not in self._loaded:
            self._loaded[decodes] = self._loaded_bytes(decodes)
        host, disk, kv_host, kv_disk = self._loaded[decodes]
        positions = self.contexts[token - 1] - 1 if decodes else 0
        paged = 0.0 if self.plan.policy.pin_weight else self.rates.h2d_pageable_bytes_per_s
        up_rate = self.durations.up_rates[decodes]
        up_s = host / (paged or up_rate) + (disk + (kv_host + kv_disk) * positions) / up_rate
        disk_s = (disk + kv_disk * positions) / self.rates.disk_read_bytes_per_s
        return (0.0 if self.plan.in_place else up_s), disk_s

    def _loaded_bytes(self, decodes: bool) -> tuple[float, float, float, float]:
        """Weights in host memory and on disk, and KV of one position there."""
        durations, ahead = self.durations, self.plan.policy.overlap if decodes else 0
        host = disk = kv_host = kv_disk = 0.0
        weights_before = kv_before = 0
        for stage, layer in enumerate(self.plan.stages):
            if any(durations.weight_bytes[stage]):
                weights_before += 1
                if weights_before > ahead:
                    _, mine, mine_on_disk = durations.streamed(stage, decodes=decodes)
                    host, disk = host + mine, disk + mine_on_disk
            if decodes and self.loads[stage]:
                rows = durations.loaded_row[layer.layer][max(0, ahead - kv_before) : len(self.batches)]
                kv_host += sum(mine for mine, _ in rows)
                kv_disk += sum(mine for _, mine in rows)
                kv_before += len(self.batches)
        return host, disk, kv_host, kv_disk
