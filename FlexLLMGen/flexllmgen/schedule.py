"""The order of loads, computes and stores: a pure iterator, zig-zag through the block.

For each token, for each stage, for each micro-batch: a stage's weights are loaded once and serve all micro-
batches (FlexGen, Sheng et al. 2023, section 4.1). Loads run ahead of the compute they are for. Weights come
in as many parts as there are micro-batches, one between each two loads of KV and of hidden states, so that neither
queues behind the whole of the other. Knows nothing of bytes, devices or tensors; `executor.py` runs it.
"""

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Action(enum.Enum):
    """What a step does."""

    LOAD_WEIGHTS = "load weights"
    LOAD_KV = "load kv"
    LOAD_HIDDEN = "load hidden"
    COMPUTE = "compute"
    FINISH = "finish"
    STORE_KV = "store kv"
    STORE_HIDDEN = "store hidden"
    EMIT = "emit"


class Step(NamedTuple):
    """One step. `slot` is the buffer a load fills; a compute names its three slots (-1: nothing streamed)."""

    action: Action
    token: int
    stage: int
    micro_batch: int = 0
    slot: int = -1
    kv_slot: int = -1
    hidden_slot: int = -1
    part: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a schedule depends on.

    Args:
        streamed_weights: per stage, whether its weights are loaded through slots.
        streamed_kv: per stage, whether it has KV that goes through slots.
        loaded_kv: per stage, whether decode steps load KV, and do not only store a prompt's; by default where it is
            streamed.
        host_attention: per stage, whether a decode step's compute only begins it, and FINISH ends it with what the CPU
            has attended to meanwhile; by default nowhere.
        streamed_hidden: whether hidden states leave the device between stages.
        depth: how many loads run ahead.
        spare_kv_slots: beyond those of the loads ahead and of the compute, for what is being stored.
    """

    num_tokens: int
    num_micro_batches: int
    streamed_weights: Sequence[bool]
    streamed_kv: Sequence[bool]
    streamed_hidden: bool
    depth: int
    spare_kv_slots: int = 0
    loaded_kv: Sequence[bool] | None = None
    host_attention: Sequence[bool] | None = None

    @property
    def weight_slots(self) -> int:
        return self.depth + 1

    @property
    def kv_slots(self) -> int:
        return self.depth + 1 + self.spare_kv_slots

    @property
    def hidden_depth(self) -> int:
        """A micro-batch's hidden states cannot be loaded before the last stage has stored them."""
        return min(self.depth, self.num_micro_batches - 1)


def zigzag(shape: Shape) -> Iterator[Step]:
    """Yields the steps of a block, in an order in which they may be issued.

    >>> shape = Shape(num_tokens=1, num_micro_batches=1, streamed_weights=[False, True, True],
    ...               streamed_kv=[False, False, False], streamed_hidden=False, depth=1)
    >>> [(step.action.value, step.stage) for step in zigzag(shape)]
    [('load weights', 1), ('compute', 0), ('load weights', 2), ('compute', 1), ('compute', 2), ('emit', 2)]
    """
    stages, batches = len(shape.streamed_weights), shape.num_micro_batches
    depth, hidden_depth = shape.depth, shape.hidden_depth
    weight_slots, kv_slots, hidden_slots = shape.weight_slots, shape.kv_slots, hidden_depth + 1
    weighted = [stage for stage in range(stages) if shape.streamed_weights[stage]]
    cached = [stage for stage in range(stages) if shape.streamed_kv[stage]]
    loaded = shape.streamed_kv if shape.loaded_kv is None else shape.loaded_kv
    on_host = shape.host_attention or [False] * stages
    num_weight_loads, num_kv_loads = (
        len(weighted) * shape.num_tokens,
        len(cached) * batches * shape.num_tokens,
    )
    # A search walks hundreds of schedules, and members of an enum are slow to look up.
    weights_action, kv_action, hidden_action = Action.LOAD_WEIGHTS, Action.LOAD_KV, Action.LOAD_HIDDEN
    compute_action, store_action = Action.COMPUTE, Action.STORE_KV

    def load_weights(index: int, part: int) -> Step | None:
        if index >= num_weight_loads:
            return None
        token, position = divmod(index, len(weighted))
        return Step(weights_action, token, weighted[position], 0, index % weight_slots, -1, -1, part)

    def load_kv(index: int) -> Step | None:
        if index >= num_kv_loads:
            return None
        unit, micro_batch = divmod(index, batches)
        token, position = divmod(unit, len(cached))
        # The prompt's KV does not exist before it is computed: token 0 only stores.
        if not token or not loaded[cached[position]]:
            return None
        return Step(kv_action, token, cached[position], micro_batch, index % kv_slots)

    def load_hidden(unit: int) -> Step | None:
        visit, micro_batch = divmod(unit, batches)
        token, stage = divmod(visit, stages)
        # The first stage makes hidden states from tokens, so it loads none.
        if token >= shape.num_tokens or not stage:
            return None
        return Step(hidden_action, token, stage, micro_batch, unit % hidden_slots)

    everything = range(batches)
    for ahead in range(depth):
        for part in everything:
            if step := load_weights(ahead, part):
                yield step
    # How far KV may be loaded ahead: what it loads must have been stored, one token before.
    kv_depth = min(depth, len(cached) * batches - 1) if cached else 0
    # KV of the first unit after the prompt is loaded by the loop below, since the prompt loads none.
    weights_used = kv_used = unit = 0
    for token in range(shape.num_tokens):
        for stage in range(stages):
            streams, caches = shape.streamed_weights[stage], shape.streamed_kv[stage]
            moves = caches and (token == 0 or loaded[stage])
            weight_slot = weights_used % weight_slots if streams else -1
            kv_slot = hidden_slot = -1
            if depth == 0 and streams:
                for part in everything:
                    if step := load_weights(weights_used, part):
                        yield step
            for micro_batch in everything:
                if caches and (step := load_kv(kv_used + kv_depth)):
                    yield step
                if shape.streamed_hidden:
                    first = 0 if hidden_depth == 0 or unit == 0 else hidden_depth
                    for ahead in range(first, hidden_slots):
                        if step := load_hidden(unit + ahead):
                            yield step
                    hidden_slot = unit % hidden_slots
                if depth and streams and (step := load_weights(weights_used + depth, micro_batch)):
                    yield step
                if moves:
                    kv_slot = kv_used % kv_slots
                yield Step(compute_action, token, stage, micro_batch, weight_slot, kv_slot, hidden_slot)
                # Last token: nothing will read its KV, so it is not stored.
                if moves and token < shape.num_tokens - 1:
                    yield Step(store_action, token, stage, micro_batch, kv_slot)
                if shape.streamed_hidden and stage < stages - 1:
                    yield Step(Action.STORE_HIDDEN, token, stage, micro_batch, slot=hidden_slot)
                kv_used += caches
                unit += 1
            if token and on_host[stage]:
                # The CPU attends for one micro-batch while the device begins the next.
                for micro_batch in everything:
                    yield Step(Action.FINISH, token, stage, micro_batch, slot=weight_slot)
            weights_used += streams
        yield Step(Action.EMIT, token, stages - 1)
