"""The schedule: every load before its use, every slot free before its reuse, whatever the shape."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from flexllmgen.schedule import Action, Shape, Step, zigzag

SHAPES = st.integers(1, 6).flatmap(
    lambda stages: st.builds(
        Shape,
        num_tokens=st.integers(1, 4),
        num_micro_batches=st.integers(1, 4),
        streamed_weights=st.lists(st.booleans(), min_size=stages, max_size=stages),
        streamed_kv=st.lists(st.booleans(), min_size=stages, max_size=stages),
        streamed_hidden=st.booleans(),
        depth=st.integers(0, 4),
    )
)


def computes(shape: Shape) -> list[Step]:
    return [step for step in zigzag(shape) if step.action is Action.COMPUTE]


@settings(max_examples=300, deadline=None)
@given(SHAPES)
def test_computes_are_the_zigzag(shape: Shape) -> None:
    order = [(step.token, step.stage, step.micro_batch) for step in computes(shape)]
    stages = range(len(shape.streamed_weights))
    batches = range(shape.num_micro_batches)
    assert order == [(t, s, b) for t in range(shape.num_tokens) for s in stages for b in batches]


@settings(max_examples=300, deadline=None)
@given(SHAPES)
def test_weights_are_whole_when_used_and_slots_free_when_loaded(shape: Shape) -> None:
    holds: dict[int, tuple[int, int]] = {}
    parts: dict[int, list[int]] = {}
    uses: dict[tuple[int, int], int] = defaultdict(int)
    for step in zigzag(shape):
        key = (step.token, step.stage)
        if step.action is Action.LOAD_WEIGHTS:
            assert 0 <= step.slot < shape.weight_slots
            if step.part == 0:
                if step.slot in holds:
                    assert uses[holds[step.slot]] == shape.num_micro_batches, "the slot's stage is not done"
                holds[step.slot], parts[step.slot] = key, []
            assert holds[step.slot] == key
            parts[step.slot].append(step.part)
        elif step.action is Action.COMPUTE:
            assert (step.slot >= 0) == shape.streamed_weights[step.stage]
            if step.slot >= 0:
                assert holds[step.slot] == key
                assert parts[step.slot] == list(range(shape.num_micro_batches))
            uses[key] += 1


@settings(max_examples=300, deadline=None)
@given(SHAPES)
def test_kv_is_stored_before_it_is_loaded_and_loaded_before_it_is_used(shape: Shape) -> None:
    stored: set[tuple[int, int, int]] = set()
    holds: dict[int, tuple[int, int, int]] = {}
    in_use: set[int] = set()
    for step in zigzag(shape):
        key = (step.token, step.stage, step.micro_batch)
        if step.action is Action.LOAD_KV:
            assert (step.token - 1, step.stage, step.micro_batch) in stored
            assert 0 <= step.slot < shape.kv_slots
            assert step.slot not in in_use
            holds[step.slot] = key
            in_use.add(step.slot)
        elif step.action is Action.COMPUTE and shape.streamed_kv[step.stage]:
            if step.token:
                assert holds[step.kv_slot] == key
            else:
                assert step.kv_slot not in in_use
            in_use.discard(step.kv_slot)
        elif step.action is Action.STORE_KV:
            assert step.token < shape.num_tokens - 1
            stored.add(key)
    assert not in_use


@settings(max_examples=300, deadline=None)
@given(SHAPES)
def test_hidden_states_are_stored_before_they_are_loaded(shape: Shape) -> None:
    stages = len(shape.streamed_weights)
    stored: set[tuple[int, int, int]] = set()
    holds: dict[int, tuple[int, int, int]] = {}
    for step in zigzag(shape):
        key = (step.token, step.stage, step.micro_batch)
        if step.action is Action.LOAD_HIDDEN:
            assert step.stage > 0
            assert (step.token, step.stage - 1, step.micro_batch) in stored
            assert step.slot not in holds
            holds[step.slot] = key
        elif step.action is Action.COMPUTE and shape.streamed_hidden:
            if step.stage:
                assert holds.pop(step.hidden_slot) == key
            else:
                assert step.hidden_slot not in holds
        elif step.action is Action.STORE_HIDDEN:
            assert step.stage < stages - 1
            stored.add(key)
    assert not holds


@settings(max_examples=100, deadline=None)
@given(SHAPES)
def test_a_token_is_emitted_after_all_its_computes(shape: Shape) -> None:
    seen = -1
    for step in zigzag(shape):
        if step.action is Action.EMIT:
            assert step.token == seen
        elif step.action is Action.COMPUTE:
            seen = step.token


def test_loads_run_ahead_by_the_depth() -> None:
    shape = Shape(
        num_tokens=2,
        num_micro_batches=2,
        streamed_weights=[True] * 3,
        streamed_kv=[False] * 3,
        streamed_hidden=False,
        depth=2,
    )
    steps = list(zigzag(shape))
    # The next token's first stages are on their way before this token is waited for.
    emit = next(place for place, step in enumerate(steps) if step.action is Action.EMIT)
    ahead = {step.stage for step in steps[:emit] if step.action is Action.LOAD_WEIGHTS and step.token == 1}
    assert ahead == {0, 1}
