"""The linear program of a placement: for a fixed cut into micro-batches, the shares that take the least time.

Every resource's seconds and every tier's bytes are linear in the shares of weights, KV cache and activations on each
tier (FlexGen, Sheng et al. 2023, section 4.3); HiGHS solves it. It takes every resource to work without ever waiting
and every tier to be filled to the byte, so that its optimum bounds what any placement of that cut can take. Pure.
"""

# W bytes of weights  K bytes of KV of a block  A bytes of hidden states of a block

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from flexllmgen.images import expert_bytes, expert_dense_bytes, pack, stage_dequantised_bytes
from flexllmgen.placement import spare_kv_slots
from flexllmgen.policy import Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import round_up
from flexllmgen.workload import Workload
from flexllmgen.workspace import kv_scratch, recompute_scratch, row_bytes, workspace_bytes
from profiling.layer_times import LayerTimes
from profiling.profile import HardwareProfile
from strategies.choices import Cut, Kind, Limits, Variant
from strategies.multipliers import Multipliers, Rows, too_large

# Where each share stands among the program's variables; X is that of the KV that is kept as layer inputs. Last come the seconds
# of a prompt's pass and of a step, of a full block and of the ragged one at the end.
W, K, A, X = (0, 1, 2), (3, 4, 5), (6, 7, 8), 9
_FULL, _RAGGED, SIZE = (10, 11), (12, 13), 14
_CRUMB = 1e-4
"""Relative price of a share off the device, so that of equal solutions the nearest to it is taken."""
_KEPT = 3
"""Solutions whose prices bound what others can come to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    cut: Cut
    bound_s: float
    shares: tuple[float, ...]


class PlacementProgram:
    """Everything about a search but the cut.

    Args:
        times: how long the model's layers take on the machine.
        depth: loads that run ahead.
        sep_layer: attention and MLP are loaded as two steps.
    """

    def __init__(
        self,
        spec: ModelSpec,
        profile: HardwareProfile,
        times: LayerTimes,
        workload: Workload,
        limits: Limits,
        dtype_bytes: int,
        *,
        pin_weight: bool = True,
        depth: int = 1,
        sep_layer: bool = False,
        variant: Variant | None = None,
    ) -> None:
        self.variant = variant or Variant()
        self.spec, self.profile, self.times = spec, profile, times
        self.workload, self.limits, self.size = workload, limits, dtype_bytes
        self.pin_weight, self.depth, self.sep_layer = pin_weight, depth, sep_layer
        self.rates = profile.typical
        self.on_cpu = profile.device == "cpu"
        policy = self.policy(1, 1)
        images, stages = pack(spec, policy, dtype_bytes)
        self.weights = sum(image.num_bytes for image in images)
        # The head is streamed like a layer; an embedding of its own is read by rows where it lies.
        self.rest = images[0].num_bytes
        self.kv_position = spec.num_layers * row_bytes(spec, policy, 1, dtype_bytes, tier="gpu")
        dense = [stage_dequantised_bytes(images, stage) for stage in stages]
        self.dequantised = max(dense)
        self.experts = expert_bytes(images).total
        self.dequantise_s = self.dequantise_experts_s = 0.0
        if self.variant.weight_bits is not None:
            rate = self.rates.dequantise_bytes_per_s(self.variant.weight_bits)
            self.dequantise_s = sum(dense) / rate
            self.dequantise_experts_s = sum(map(expert_dense_bytes, images)) / rate
        # Slots hold the largest stage that is streamed; a head that is may be kept on the device instead.
        self.slot = max(
            images[index].num_bytes for stage in stages if stage.layer >= 0 for index in stage.images
        )
        # What of a position's keys and values the layer's input has: less only where heads have keys of their own.
        input_share = spec.num_layers * spec.hidden_bytes(1, dtype_bytes) / self.kv_position
        self.recompute = not self.on_cpu and self.variant.kv_bits is None and input_share < 1
        self.input_share = input_share if self.recompute else 1.0
        self._windows = Counter(spec.sliding_window(layer) for layer in range(spec.num_layers))
        self._cheap: dict[Cut, float] = {}
        self._known_rows: dict[Cut, Rows] = {}
        self._solved: dict[tuple[Cut, Kind], Solved | None] = {}
        self._multipliers: list[Multipliers] = []

    def replaced(
        self, *, limits: Limits | None = None, depth: int | None = None, sep_layer: bool | None = None
    ) -> "PlacementProgram":
        """This program with something else in it."""
        return PlacementProgram(
            self.spec,
            self.profile,
            self.times,
            self.workload,
            self.limits if limits is None else limits,
            self.size,
            pin_weight=self.pin_weight,
            depth=self.depth if depth is None else depth,
            sep_layer=self.sep_layer if sep_layer is None else sep_layer,
            variant=self.variant,
        )

    def policy(self, size: int, count: int) -> Policy:
        """A policy of this program with everything on the device."""
        return Policy(
            micro_batch_size=size,
            num_micro_batches=count,
            overlap=self.depth,
            sep_layer=self.sep_layer,
            pin_weight=self.pin_weight,
            cpu_attention=self.variant.cpu_attention,
            weight_bits=self.variant.weight_bits,
            kv_bits=self.variant.kv_bits,
            chosen_experts=self.variant.chosen_experts,
        )

    def expert_share(self, block: int) -> float:
        """Of the experts, the share that a step of a block brings in where they are streamed."""
        if not self.variant.chosen_experts:
            return 1.0
        return self.spec.expected_experts(block) / self.spec.num_experts

    def cheap_bound(self, cut: Cut) -> float:
        """Seconds that this cut takes at least, without solving anything: compute, and what no memory can hold."""
        if cut not in self._cheap:
            steps = self.workload.gen_tokens - 1
            self._cheap[cut] = 0.0
            for count, block, _ in self._blocks(cut):
                compute, fetched = self._compute(cut, block), self._fetched(block)
                prompt_s = max(compute[0], fetched[0])
                step_s = max(compute[1] + self._awaited(block), fetched[1])
                self._cheap[cut] += count * (prompt_s + steps * step_s)
        return self._cheap[cut]

    def _fetched(self, block: int) -> tuple[float, float]:
        """Seconds to bring in what a memory cannot hold: a pass reads all weights, and a step the KV of its block."""
        workload, limits = self.workload, self.limits
        weights, share = self.weights - self.rest, self.expert_share(block)
        context = workload.prompt_tokens + (workload.gen_tokens - 1) // 2
        kv = block * context * self.kv_position
        least_kv = kv * self.input_share
        held = limits.cpu_bytes + (0 if limits.shared else limits.fillable_gpu_bytes or 0)
        sources = [(self.rates.disk_read_bytes_per_s, held, least_kv)]
        up, gpu_bytes = self.rates.h2d_bytes_per_s, limits.fillable_gpu_bytes
        if not self.on_cpu and up and gpu_bytes is not None:
            lifted = 0 if self.variant.cpu_attention else least_kv
            sources.append((up, gpu_bytes, lifted))
        attended_s = 0.0
        if self.variant.cpu_attention and gpu_bytes is not None:
            alone, _ = self.rates.attention_bytes_per_s(self.times, self.variant.kv_bits)
            # Layers with a window attend to less than lies there; what lies on disk is brought in beside that.
            alone /= self.spec.attended_share(context)
            if not self.recompute:
                beside = self.rates.disk_read_bytes_per_s if limits.disk_bytes else 0.0
                attended_s = (kv - gpu_bytes) / (alone + beside)
            elif up:
                # What the CPU does not attend to is lifted beside the weights, as inputs at the least.
                attended_s = (share * (weights - gpu_bytes) + least_kv) / (up + self.input_share * alone)
        return (
            max(0.0, *((weights - memory) / rate for rate, memory, _ in sources)),
            max(
                0.0,
                attended_s,
                *(share * (weights + needed - memory) / rate for rate, memory, needed in sources),
            ),
        )

    def _awaited(self, block: int) -> float:
        """Seconds of a step in which the device waits for chosen experts that its memory cannot hold: nothing hides them."""
        if (held := self.limits.fillable_gpu_bytes) is None:
            return 0.0
        outside = max(0, self.weights - self.rest - held)
        return self._awaited_s(self.expert_share(block)) * outside / self.weights

    def at_least(self, cut: Cut, kind: Kind) -> float:
        """Seconds that `solve` will not be below, by what was solved before; infinite where that shows that nothing fits."""
        rows, groups = self._rows(cut), self._groups(kind)
        if too_large(rows, groups):
            return float("inf")
        crumbs = 6 * _CRUMB * self.cheap_bound(cut)
        bounds = (each.bound_s(rows, groups) - crumbs for each in self._multipliers)
        return max(self.cheap_bound(cut), *bounds, 0.0)

    def solve(self, cut: Cut, kind: Kind) -> Solved | None:
        """The best shares for a cut, as if nothing ever waited; None if it cannot fit."""
        if (cut, kind) not in self._solved:
            self._solved[cut, kind] = self._solve(cut, kind)
        return self._solved[cut, kind]

    def _solve(self, cut: Cut, kind: Kind) -> Solved | None:
        rows = self._rows(cut)
        equal = np.zeros((3, SIZE))
        for index, variables in enumerate((W, K, A)):
            equal[index, list(variables)] = 1.0
        equal[1, X] = 1.0
        # Bytes beside seconds would be badly scaled.
        scale = np.maximum(np.abs(rows.matrix).max(axis=1), 1e-30)
        allowed = {index for group in self._groups(kind) for index in group}
        most = [float(index in allowed) for index in range(X + 1)]
        result = linprog(
            rows.objective,
            A_ub=rows.matrix / scale[:, None],
            b_ub=rows.limit / scale,
            A_eq=equal,
            b_eq=np.ones(3),
            bounds=[(0.0, each) for each in most] + [(0.0, None)] * (SIZE - len(most)),
            method="highs",
        )
        if result.status != 0:
            return None
        prices = np.maximum(0.0, -result.ineqlin.marginals) / scale
        self._multipliers = [Multipliers.of(rows, prices), *self._multipliers[: _KEPT - 1]]
        return Solved(
            cut=cut,
            bound_s=max(float(result.fun) - 6 * _CRUMB * self.cheap_bound(cut), self.cheap_bound(cut)),
            shares=tuple(float(share) for share in result.x[: len(most)]),
        )

    def _groups(self, kind: Kind) -> tuple[tuple[int, ...], ...]:
        """The shares that a kind may use, of weights, KV and hidden states: each adds up to 1."""
        tiers = 3 if kind.disk else 2
        hidden = tiers if kind.hidden_elsewhere else 1
        return W[:tiers], (*K[:tiers], *((X,) if self.recompute else ())), A[:hidden]

    def _rows(self, cut: Cut) -> Rows:
        """What a cut's programs have in common, whatever their kind."""
        if cut in self._known_rows:
            return self._known_rows[cut]
        rows, bounds = self._memory(cut)
        memory, passes = len(rows), []
        objective = np.zeros(SIZE)
        for count, block, variables in self._blocks(cut):
            for row, bound in self._block_time(cut, block, variables):
                rows.append(row)
                bounds.append(bound)
            for variable, times in zip(
                variables, (count, count * (self.workload.gen_tokens - 1)), strict=True
            ):
                objective[variable] = times
                of_pass = [index for index in range(memory, len(rows)) if rows[index][variable]]
                passes.append((slice(of_pass[0], of_pass[-1] + 1), variable, variable == variables[0]))
        crumb = _CRUMB * self.cheap_bound(cut)
        for index in (W[1], K[1], A[1]):
            objective[index] = crumb
        objective[X] = 1.5 * crumb
        for index in (W[2], K[2], A[2]):
            objective[index] = 2 * crumb
        known = self._known_rows[cut] = Rows(
            matrix=np.array(rows), limit=np.array(bounds), objective=objective, memory=memory, passes=passes
        )
        return known

    def memory_rows(self, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
        """What each share takes of each memory, and how much of it there is: matrix [tiers, SIZE], limits [tiers]."""
        rows = self._rows(cut)
        return rows.matrix[: rows.memory], rows.limit[: rows.memory]

    # The program

    def _memory(self, cut: Cut) -> tuple[list[np.ndarray], list[float]]:
        """Bytes of each tier, at most its limit. Less than the engine takes, never more: this bounds."""
        workload = self.workload
        block = min(cut.size * cut.count, workload.num_sequences)
        size = min(cut.size, workload.num_sequences)
        context = round_up(workload.max_context, 8)
        kv = block * context * self.kv_position
        kv_unit = size * context * self.kv_position / self.spec.num_layers
        hidden = block * self.spec.hidden_bytes(workload.prompt_tokens, self.size)
        policy = self.policy(cut.size, cut.count)
        work = workspace_bytes(
            self.spec, policy, workload, self.size, chunk_tokens=cut.chunk, accelerated=not self.on_cpu
        )
        slots = self.depth + 1
        work += self.dequantised + kv_scratch(self.spec, policy, workload, self.size, 1)[1]
        kv_slots = slots + spare_kv_slots(round(kv_unit), self.depth, in_place=self.on_cpu)
        gpu, cpu, disk = (np.zeros(SIZE) for _ in range(3))
        for row, tier in ((gpu, 0), (cpu, 1), (disk, 2)):
            row[W[tier]], row[K[tier]], row[A[tier]] = self.weights, kv, hidden
        rows, bounds = [], []
        if self.on_cpu:
            cpu[W[2]] += slots * self.slot
            cpu[K[2]] += kv_slots * kv_unit
        else:
            for tier in (1, 2):
                gpu[W[tier]] += slots * self.slot
                gpu[K[tier]] += kv_slots * kv_unit
            gpu[X] = kv_slots * kv_unit * self.input_share
            gpu[X] += recompute_scratch(self.spec, policy, workload, self.size, size)[1]
            cpu[X] = kv * self.input_share
            cpu[W[2]] += slots * self.slot
            cpu[K[2]] += kv_slots * kv_unit
        if (fillable := self.limits.fillable_gpu_bytes) is not None:
            # What is never streamed needs no slot.
            unneeded = 0.0 if self.on_cpu else slots * self.slot * self.rest / self.weights
            rows.append(gpu)
            bounds.append(fillable - work + unneeded)
        rows.append(cpu + gpu if self.limits.shared else cpu)
        bounds.append(self.limits.cpu_bytes - (work if self.limits.shared else 0))
        rows.append(disk)
        bounds.append(self.limits.disk_bytes)
        return rows, [float(bound) for bound in bounds]

    def _blocks(self, cut: Cut) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """How many blocks there are, of how many sequences, and the variables of their two passes."""
        full, ragged = divmod(self.workload.num_sequences, cut.size * cut.count)
        if full:
            yield full, cut.size * cut.count, _FULL
        if ragged:
            yield 1, ragged, _RAGGED

    def _block_time(
        self, cut: Cut, block: int, variables: tuple[int, int]
    ) -> Iterator[tuple[np.ndarray, float]]:
        workload, spec, rates = self.workload, self.spec, self.rates
        compute = self._compute(cut, block)
        prompt = workload.prompt_tokens
        context = prompt + workload.gen_tokens / 2
        token_kv = block * self.kv_position
        on_host = self.variant.cpu_attention
        # KV that no step will read is not stored.
        kept = prompt if workload.gen_tokens > 1 else 0
        passes = ((0.0, kept, prompt), (context - 1, 1, 1))
        for variable, busy, (read, written, columns) in zip(variables, compute, passes, strict=True):
            hidden = 2 * (spec.num_layers + 1) * block * spec.hidden_bytes(columns, self.size)
            attended = {}
            if read:
                attention_s = self._attention_s(block) if on_host else 0.0
                attended = dict.fromkeys((K[0], K[2]), attention_s)
                attended[X] = attention_s + self._recompute_s(cut, block)
            # Of streamed experts a step brings in so many; a prompt brings in all.
            share = self.expert_share(block) if read else 1.0
            spared = (1 - share) * self.experts
            awaited = self._awaited_s(share)
            weights_s = dict.fromkeys(W[1:], awaited) if awaited else {}
            rest_s = awaited * self.rest / self.weights
            works = [self._at_most(variable, {**attended, **weights_s}, busy - rest_s)]
            if on_host and read:
                attended_on_host = token_kv * read * spec.attended_share(int(read))
                if self.depth:
                    yield self._attended_on_host(variable, token_kv * read, attended_on_host, share)
                else:
                    # At its full rate: nothing is copied beside it.
                    alone = rates.attention_bytes_per_s(self.times, self.variant.kv_bits)[0]
                    works.append(self._at_most(variable, {K[1]: attended_on_host / alone}, 0.0))
            if not self.on_cpu and rates.h2d_bytes_per_s and rates.d2h_bytes_per_s:
                up = 1 / rates.h2d_bytes_per_s
                paged = not self.pin_weight and rates.h2d_pageable_bytes_per_s
                slowest = 1 / paged if paged else up
                loads = {W[1]: self.weights * slowest, W[2]: self.weights * up}
                for tier in (1, 2):
                    # What the CPU finds comes up between copies: little, and as if it took no time.
                    lifted = 0.0 if on_host and tier == 1 else token_kv * read
                    loads[K[tier]] = lifted * up if read else 0.0
                    loads[A[tier]] = hidden / 2 * up
                loads[X] = self.input_share * token_kv * read * up
                if on_host and read and self.depth and not paged:
                    # Copies are slower while the CPU attends. Where that takes longer than they do, it bounds by itself.
                    loads[K[1]] = self._slowed_up_s(attended_on_host)
                # What of the weights is never streamed takes host memory first.
                works.append(self._at_most(variable, loads, -(self.rest + spared) * slowest))
                if spared:
                    # As if all that is streamed were experts: they are, up to the bytes that there are.
                    fewer = {**loads, **{tier: share * loads[tier] for tier in W[1:]}}
                    yield self._at_most(variable, fewer, -self.rest * slowest * share)
                down = 1 / rates.d2h_bytes_per_s
                stores = {X: self.input_share * token_kv * written * down}
                for tier in (1, 2):
                    stores[K[tier]] = token_kv * written * down
                    stores[A[tier]] = hidden / 2 * down
                works.append(self._at_most(variable, stores, 0.0))
            from_disk, to_disk = 1 / rates.disk_read_bytes_per_s, 1 / rates.disk_write_bytes_per_s
            moved = {
                W[2]: self.weights * from_disk,
                K[2]: token_kv * (read * from_disk + written * to_disk),
                A[2]: hidden / 2 * (from_disk + to_disk),
            }
            works.append(self._at_most(variable, moved, -spared * from_disk))
            if spared:
                yield self._at_most(variable, {**moved, W[2]: share * moved[W[2]]}, 0.0)
            yield from works
            # Without overlap one resource works after the other. The wait for experts is a load already.
            if self.depth == 0 and read and not weights_s:
                yield _in_turn(variable, works)

    def _awaited_s(self, share: float) -> float:
        """Seconds that the device waits for a `share` of all experts; none where they come ahead.

        Experts are the last to become resident: of what is streamed they are at least what they are of all weights.
        """
        if share == 1.0 or self.on_cpu or not self.rates.h2d_bytes_per_s:
            return 0.0
        return share * self.experts / self.rates.h2d_bytes_per_s

    def _attended_on_host(
        self, variable: int, cached: float, attended: float, share: float
    ) -> tuple[np.ndarray, float]:
        """What the CPU attends to, at its full rate but while weights and other KV are copied beside it.

        Of `cached` bytes of KV in all a step attends to `attended`; of streamed experts it brings in `share`.
        """
        rates = self.rates
        alone, beside = rates.attention_bytes_per_s(self.times, self.variant.kv_bits)
        slowed = (1 - beside / alone) / (rates.h2d_bytes_per_s or rates.host_bytes_per_s)
        # Weights that are not page-locked are copied in another way.
        weights_s = self.weights * slowed * share if self.pin_weight else 0.0
        shares = {K[1]: attended / alone, W[1]: weights_s, W[2]: weights_s}
        shares |= {K[2]: cached * slowed, X: self.input_share * cached * slowed}
        return self._at_most(variable, shares, -self.rest / self.weights * weights_s)

    def _slowed_up_s(self, attended: float) -> float:
        """Seconds longer that copies up take because the CPU attends to so many bytes meanwhile."""
        alone, under = self.rates.h2d_bytes_per_s, self.rates.h2d_beside_attention_bytes_per_s
        if not alone or not under:
            return 0.0
        attention_s = attended / self.rates.attention_bytes_per_s(self.times, self.variant.kv_bits)[0]
        return attention_s * (1 - under / alone)

    def _attention_s(self, block: int) -> float:
        """Seconds of a step in the middle in which the device attends to the KV of a whole block."""
        context = self.workload.prompt_tokens + self.workload.gen_tokens // 2
        return self._layers_s(block, context) - self._layers_s(block, 0) + self._turned_back_s(block, context)

    def _turned_back_s(self, block: int, context: int) -> float:
        """Seconds of a step to turn back the compressed KV of a whole block that the device attends to."""
        if self.variant.kv_bits is None:
            return 0.0
        rate = self.rates.kv_bytes_per_s(self.variant.kv_bits)
        return block * self.spec.kv_bytes(context, self.size) / rate

    def _recompute_s(self, cut: Cut, block: int) -> float:
        """Seconds of a step in the middle in which the device makes keys and values of a whole block's inputs."""
        if not self.recompute:
            return 0.0
        workload, spec = self.workload, self.spec
        policy, size = self.policy(cut.size, cut.count), min(cut.size, block)
        at_once, _ = recompute_scratch(spec, policy, workload, self.size, size)
        context = workload.prompt_tokens + workload.gen_tokens // 2
        positions = at_once * context * spec.attended_share(context)
        return spec.num_layers * block / at_once * self.times.recompute_s(round(positions))

    def _compute(self, cut: Cut, block: int) -> tuple[float, float]:
        """Seconds that the compute device needs for a block's prompts, and for a step in the middle.

        Where the CPU attends, without what is attended to.
        """
        workload, layers, times = self.workload, self.spec.num_layers, self.times
        context = workload.prompt_tokens + workload.gen_tokens // 2
        prompt_s = step_s = self.dequantise_s
        step_s -= (1 - self.expert_share(block)) * self.dequantise_experts_s
        if not self.variant.cpu_attention:
            step_s += self._turned_back_s(block, context)
        whole, rest = divmod(block, cut.size)
        for count, size in ((whole, cut.size), (1, rest)):
            if not count or not size:
                continue
            head_s, chunks = times.head_s(size), -(-size // max(1, cut.chunk // workload.prompt_tokens))
            mine, issue_s = self._prompt_s(cut, size), layers * (times.issue_s + chunks * times.chunk_issue_s)
            # On an accelerator issued beside the device's work. A step may be recorded, and then costs nothing.
            mine = mine + issue_s if self.on_cpu else max(mine, issue_s)
            seen = 0 if self.variant.cpu_attention else context
            step = self._layers_s(size, seen) + (layers * times.issue_s if self.on_cpu else 0.0)
            prompt_s, step_s = prompt_s + count * (mine + head_s), step_s + count * (step + head_s)
        return prompt_s, step_s

    def _layers_s(self, size: int, context: int) -> float:
        """Seconds of a step of all layers; one with a window attends to no more than that."""
        return sum(
            count * self.times.step_s("layer", size, min(context, window or context))
            for window, count in self._windows.items()
        )

    def _prompt_s(self, cut: Cut, size: int) -> float:
        prompt = self.workload.prompt_tokens
        return self.spec.num_layers * self.times.chunked_prompt_s("layer", size, prompt, cut.chunk)

    def _at_most(self, variable: int, shares: dict[int, float], constant: float) -> tuple[np.ndarray, float]:
        """constant + sum of shares' seconds <= the pass's seconds, as a row of the program."""
        row = np.zeros(SIZE)
        for index, seconds in shares.items():
            row[index] = seconds
        row[variable] = -1.0
        return row, -constant


def _in_turn(variable: int, works: Sequence[tuple[np.ndarray, float]]) -> tuple[np.ndarray, float]:
    """All resources' seconds one after another, as a row of the program."""
    row = np.sum([row for row, _ in works], axis=0)
    row[variable] = -1.0
    return row, sum(bound for _, bound in works)
