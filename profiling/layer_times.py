"""LayerTimes: how long one decoder layer and the head take on the compute device, by rows and by context.

A table per shape of model, not one number: a matrix product of 2 rows and one of 2000 run at rates far apart. Half
a layer's time is linear in the context at a fixed number of sequences, so that each point holds an intercept and a
slope; between points it is interpolated. Measured in layer_timing.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from flexllmgen.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What of a model the times depend on."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    embed_size: int

    @staticmethod
    def of(spec: ModelSpec) -> "LayerShape":
        return LayerShape(**{name: getattr(spec, name) for name in LayerShape.__dataclass_fields__})

    @property
    def attention_weights(self) -> int:
        return self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Of what one token uses, gate included where the family has one."""
        matrices = 2 if self.family == "opt" else 3
        return matrices * self.hidden_size * self.intermediate_size * max(1, self.experts_per_token)

    @property
    def head_weights(self) -> int:
        return self.vocab_size * self.embed_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Seconds of a layer at a number of `rows` (positions of a prompt, or sequences of a decode step).

    The attention half takes `attention_s + per_position_s * positions`, where the positions are the prompt's or the
    cached ones.
    """

    rows: int
    attention_s: float
    per_position_s: float
    mlp_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPoint:
    """Seconds of final norm, logits and the choice of a token for `rows` sequences."""

    rows: int
    head_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """The times of one shape.

    Args:
        issue_s: host seconds of the engine's loop for one compute step with its load of weights; on an accelerator
            they run beside the device's, on the CPU they come on top.
        chunk_issue_s: host seconds to issue the operations of a chunk of a prompt, or of a step; 0 on the CPU, where it is the
            layer's own time.
        kv_issue_s: what a step takes more to issue where its KV is loaded and stored.
        recompute_issue_s: what a step takes more to issue where keys and values are made anew of what is loaded; None where
            that was not measured, and then half a layer's operations are counted.
        beside_attention: how many times as long the host takes to issue anything while the CPU attends.
        exchange_s: from a step's query to what the CPU has attended to, however little that is: half before the CPU
            attends and half after. The host issues it in about that time too, half with the query and half with the answer.
        replay_s: what a layer replayed from a graph takes beyond its kernels, waiting for its weights.
        recorded: points of a decode step that is replayed from a graph: it attends to all positions there is room
            for, under a mask. Empty on the CPU.
        prompt: points over positions of a chunk of a prompt.
        step: points over sequences of a decode step.
        cpu_attention_bytes_per_s: bytes of KV of this model's heads that the CPU attends to where nothing else runs; None
            where that was not measured.
        cpu_attention_codes_bytes_per_s: the same of KV that is kept in 8 bits, scales and zeros included; None where its groups
            do not divide a head.
        cpu_attention_call_s: what each call of the CPU, one for a layer of a micro-batch, takes beyond its share of a long one.
        spread: (largest - smallest) / median of a figure's trials, in the median over all figures.
    """

    shape: LayerShape
    issue_s: float
    prompt: tuple[Point, ...]
    step: tuple[Point, ...]
    head: tuple[HeadPoint, ...]
    chunk_issue_s: float = 0.0
    kv_issue_s: float = 0.0
    exchange_s: float = 0.0
    recompute_issue_s: float | None = None
    beside_attention: float = 1.0
    replay_s: float = 0.0
    recorded: tuple[Point, ...] = ()
    cpu_attention_bytes_per_s: float | None = None
    cpu_attention_codes_bytes_per_s: float | None = None
    cpu_attention_call_s: float = 0.0
    spread: float = 0.0

    @property
    def making_issue_s(self) -> float:
        """What a step takes more to issue where keys and values are made anew."""
        measured = self.recompute_issue_s
        return self.chunk_issue_s / 2 if measured is None else measured

    def prompt_s(self, kind: str, rows: int, positions: int) -> float:
        """Seconds of a chunk of `rows` positions in prompts of `positions`; `kind` is layer, attention or mlp."""
        return _half(kind, self.prompt, rows, positions)

    def chunked_prompt_s(self, kind: str, sequences: int, positions: int, chunk_tokens: int) -> float:
        """Seconds of the prompts of `sequences`, computed in chunks of whole sequences as the engine does."""
        at_once = max(1, chunk_tokens // positions)
        return sum(
            self.prompt_s(kind, min(at_once, sequences - start) * positions, positions)
            for start in range(0, sequences, at_once)
        )

    def step_s(self, kind: str, sequences: int, context: int) -> float:
        """Seconds of one decode step of `sequences` that attend to `context` positions each."""
        return _half(kind, self.step, sequences, context)

    def recompute_s(self, rows: int) -> float:
        """Seconds to make keys and values of `rows` positions of the layer's inputs: their part of the products of a prompt."""
        shape = self.shape
        part = shape.num_kv_heads / (shape.num_heads + shape.num_kv_heads)
        return part * self.prompt_s("attention", rows, 0) if rows else 0.0

    def recorded_s(self, kind: str, sequences: int, room: int) -> float:
        """Seconds of a recorded decode step of `sequences` that have `room` for so many positions each."""
        return _half(kind, self.recorded or self.step, sequences, room)

    def head_s(self, rows: int) -> float:
        """Seconds of the head for `rows` sequences."""
        return _between(self.head, rows, lambda point: point.head_s)

    def scaled_to(self, shape: LayerShape) -> "LayerTimes":
        """These times for another shape: products by their weights, attention by its heads.

        An estimate, for a model that was not measured on that machine. The CPU's rate of attention is another's.
        """
        mine = self.shape
        attention = shape.attention_weights / mine.attention_weights
        mlp = shape.mlp_weights / mine.mlp_weights
        heads = shape.num_heads * shape.head_dim / (mine.num_heads * mine.head_dim)
        cached = shape.num_kv_heads * shape.head_dim / (mine.num_kv_heads * mine.head_dim)

        def scale(point: Point, positions: float) -> Point:
            return replace(
                point,
                attention_s=point.attention_s * attention,
                per_position_s=point.per_position_s * positions,
                mlp_s=point.mlp_s * mlp,
            )

        head = shape.head_weights / mine.head_weights
        return LayerTimes(
            shape=shape,
            issue_s=self.issue_s,
            chunk_issue_s=self.chunk_issue_s,
            kv_issue_s=self.kv_issue_s,
            exchange_s=self.exchange_s,
            recompute_issue_s=self.recompute_issue_s,
            beside_attention=self.beside_attention,
            replay_s=self.replay_s,
            recorded=tuple(scale(point, cached) for point in self.recorded),
            prompt=tuple(scale(point, heads) for point in self.prompt),
            step=tuple(scale(point, cached) for point in self.step),
            head=tuple(replace(point, head_s=point.head_s * head) for point in self.head),
            spread=self.spread,
        )

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "LayerTimes":
        """The table that `dataclasses.asdict` described."""
        fields = dict(data)
        fields["shape"] = LayerShape(**fields["shape"])
        for name in ("prompt", "step", "recorded"):
            fields[name] = tuple(Point(**point) for point in fields[name])
        fields["head"] = tuple(HeadPoint(**point) for point in fields["head"])
        return LayerTimes(**fields)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready view."""
        return asdict(self)


def layer_times_for(spec: ModelSpec, tables: Sequence[LayerTimes]) -> LayerTimes | None:
    """The table of this model's shape, else the nearest one scaled to it; None if there is none at all."""
    table, shape = nearest_table(spec, tables), LayerShape.of(spec)
    return table if table is None or table.shape == shape else table.scaled_to(shape)


def nearest_table(spec: ModelSpec, tables: Sequence[LayerTimes]) -> LayerTimes | None:
    """The table of this model's shape, else the one whose layers are most like it; None if there is none at all."""
    shape = LayerShape.of(spec)
    for table in tables:
        if table.shape == shape:
            return table

    def distance(table: LayerTimes) -> float:
        size = abs(math.log(_layer_weights(shape) / _layer_weights(table.shape)))
        return size + 2 * ((table.shape.num_experts > 0) != (shape.num_experts > 0))

    return min(tables, key=distance, default=None)


def _layer_weights(shape: LayerShape) -> int:
    return shape.mlp_weights + shape.attention_weights


def _half(kind: str, points: Sequence[Point], rows: int, positions: int) -> float:
    seconds = 0.0
    if kind in ("layer", "attention"):
        seconds += _between(points, rows, lambda point: point.attention_s + point.per_position_s * positions)
    if kind in ("layer", "mlp"):
        seconds += _between(points, rows, lambda point: point.mlp_s)
    return seconds


def _between(points: Sequence[Any], rows: int, value: Callable[[Any], float]) -> float:
    """Linear between points; below the first as the first, beyond the last in proportion to its rows."""
    first, last = points[0], points[-1]
    if rows <= first.rows:
        return value(first)
    if rows >= last.rows:
        in_proportion: float = rows / last.rows
        return value(last) * in_proportion
    upper = next(index for index, point in enumerate(points) if point.rows >= rows)
    low, high = points[upper - 1], points[upper]
    share: float = (rows - low.rows) / (high.rows - low.rows)
    return value(low) + share * (value(high) - value(low))
