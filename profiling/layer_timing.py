"""Measures LayerTimes: the engine's own decoder on random weights, at the shapes of a model.

Goes round several layers' weights, together larger than any cache, as a model does. On a GPU a layer is recorded
as a graph, so that what is timed is the device and not the issuing, which is measured apart.
"""

# B sequences  T prompt positions  S cached positions  D model

import contextlib
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.engine import FlexEngine
from flexllmgen.images import ALIGNMENT
from flexllmgen.kv_cache import Segment
from flexllmgen.models.decoder import Decoder, Span
from flexllmgen.models.experts import expert_addresses
from flexllmgen.policy import ON_CPU, ON_GPU, Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import round_up
from flexllmgen.workload import Workload
from profiling.compute import timed_runs
from profiling.layer_times import HeadPoint, LayerShape, LayerTimes, Point
from profiling.memory import CODES_GROUP, HostWork, host_attention

STEP_ROWS = (1, 2, 4, 8, 9, 16, 32, 64, 128, 256)
PROMPT_ROWS = (64, 256, 1024, 4096, 8192)
STEP_CONTEXTS = (64, 512)
PROMPT_LENGTHS = (64, 512)
_ROTATED_BYTES = 128 << 20
_KV_BYTES = 1 << 30
_TRIALS = 4
_ISSUED = 32
_MANY_LAYERS, _FEW_LAYERS, _ISSUE_ROUNDS = 10, 2, 5
_MANY_ROWS, _FIRST_SUSTAINED_S, _SUSTAINED_S = 1024, 1.2, 0.3
"""From so many positions a prompt's products draw all the power a GPU may take: it is then timed as warm as a long prompt
makes it, which takes longer the first time."""
_LONG_S = 0.1
"""A point that takes longer ends its row: what is larger runs at the same rate."""

Tensors = Mapping[str, torch.Tensor]


def measure_layer_times(spec: ModelSpec, *, dtype: str, device: str) -> LayerTimes:
    """Time a layer of this model; takes a few seconds, and memory for some layers."""
    with torch.inference_mode():
        bench = _Bench(spec, torch.device(device), getattr(torch, dtype))
        step, prompt = bench.points(), bench.points(prompt=True)
        recorded = bench.points(recorded=True) if device == "cuda" and not spec.num_experts else ()
        head, spread = bench.head_points(), statistics.median(bench.spreads)
        del bench
    if device == "cuda":
        torch.cuda.empty_cache()
    # Where the CPU computes everything, it does not attend beside anything.
    attention = attended = codes = None
    call_s = 0.0
    if device != "cpu":
        attention = _attention(spec, dtype)
        attended, call_s = attention.measure().median, attention.call_s()
    issue = _Issue.measured(spec, dtype, device, attention)
    if attention is not None and spec.head_dim % CODES_GROUP == 0:
        del attention
        codes = _attention(spec, dtype, codes=True).measure().median
    return LayerTimes(
        shape=LayerShape.of(spec),
        issue_s=issue.step_s,
        chunk_issue_s=issue.chunk_s,
        kv_issue_s=issue.kv_s,
        exchange_s=issue.exchange_s,
        recompute_issue_s=issue.recompute_s,
        beside_attention=issue.beside_attention,
        replay_s=issue.replay_s,
        recorded=recorded,
        cpu_attention_bytes_per_s=attended,
        cpu_attention_codes_bytes_per_s=codes,
        cpu_attention_call_s=call_s,
        prompt=prompt,
        step=step,
        head=head,
        spread=spread,
    )


def _attention(spec: ModelSpec, dtype: str, *, codes: bool = False) -> HostWork:
    """Attention on the CPU with this model's heads; with `codes` of KV in 8 bits."""
    return host_attention(
        getattr(torch, dtype),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        codes=codes,
    )


class _Bench:
    """Weights of a few layers, and timed passes over them."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        self.spreads: list[float] = []
        self.warm = False
        self.decoder = Decoder(spec, device=device, dtype=dtype)
        # One for all: each stream would get a workspace of its own for its matrix products.
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        layer_bytes = spec.layer_weight_bytes(dtype.itemsize)
        count = max(1, min(spec.num_layers, math.ceil(_ROTATED_BYTES / layer_bytes)))
        self.layers = [
            self._weights({**spec.attention_tensors(), **spec.mlp_tensors()}) for _ in range(count)
        ]

    def points(self, *, prompt: bool = False, recorded: bool = False) -> tuple[Point, ...]:
        points: list[Point] = []
        for rows in PROMPT_ROWS if prompt else STEP_ROWS:
            # With many rows arithmetic and not memory sets the pace: one layer is then enough.
            layers = self.layers[: 1 if prompt and rows > 256 else len(self.layers)]
            short, long = self._lengths(rows, prompt=prompt)
            first, second = (
                self.attention_s(layers, rows, length, prompt=prompt, recorded=recorded)
                for length in (short, long)
            )
            slope = max(0.0, (second - first) / (long - short)) if long > short else 0.0
            mlp_s = self.mlp_s(layers, rows)
            points.append(
                Point(
                    rows=rows,
                    attention_s=max(0.0, first - slope * short),
                    per_position_s=slope,
                    mlp_s=mlp_s,
                )
            )
            if (first + second + mlp_s) * len(layers) > _LONG_S:
                break
        return tuple(points)

    def head_points(self) -> tuple[HeadPoint, ...]:
        weights, points = self._weights(self.spec.head_tensors()), []
        for rows in STEP_ROWS:
            seconds = self._head_s(weights, rows)
            points.append(HeadPoint(rows=rows, head_s=seconds))
            if seconds > _LONG_S / 4:
                break
        return tuple(points)

    def _lengths(self, rows: int, *, prompt: bool) -> tuple[int, int]:
        """Two contexts to measure attention at, within what memory and the model hold."""
        short, long = PROMPT_LENGTHS if prompt else STEP_CONTEXTS
        if prompt:
            return min(short, rows), min(long, rows)
        room = _KV_BYTES // (2 * self.spec.kv_size * self.dtype.itemsize * rows * len(self.layers))
        return short, max(short, min(long, room))

    def attention_s(
        self,
        layers: list[Tensors],
        rows: int,
        length: int,
        *,
        prompt: bool = False,
        recorded: bool = False,
    ) -> float:
        spec = self.spec
        batch, tokens = (rows // length, length) if prompt else (rows, 1)
        x_BTD = torch.randn(batch, tokens, spec.hidden_size, device=self.device).to(self.dtype)
        first = 0 if prompt else length - 1
        positions = torch.arange(first, first + tokens, device=self.device).expand(batch, tokens)
        cos, sin = self.decoder.rotations(positions)
        span = Span(first=first, prompt=prompt, positions_BT=positions, cos=cos, sin=sin)
        if recorded:
            row = torch.full((1,), first, device=self.device)
            bias = torch.zeros(batch, 1, 1, length, dtype=self.dtype, device=self.device)
            span = replace(span, row=row, bias_B11S=bias)
        caches = [
            torch.randn(length, 2, batch, spec.num_kv_heads, spec.head_dim, device=self.device).to(self.dtype)
            for _ in layers
        ]
        segments = [(Segment(0, batch, cache),) for cache in caches]

        def work() -> None:
            for weights, segment in zip(layers, segments, strict=True):
                self.decoder.attention(weights, x_BTD, 0, span, segment)

        return self._seconds(work, sustained=prompt and rows >= _MANY_ROWS) / len(layers)

    def mlp_s(self, layers: list[Tensors], rows: int) -> float:
        x_BTD = torch.randn(rows, 1, self.spec.hidden_size, device=self.device).to(self.dtype)

        def work() -> None:
            for weights in layers:
                self.decoder.mlp(weights, x_BTD)

        return self._seconds(work, sustained=rows >= _MANY_ROWS) / len(layers)

    def operations_s(self) -> float:
        """Host seconds to issue a layer's operations for one sequence; with those the device hardly takes time.

        The median: a host's pace changes by half from one moment to the next, and a block of requests sees all of it. On a
        CPU the quickest, as what they are taken off is.
        """
        seconds = timed_runs(self._layers_of_one(), self.device.type, 2 * _TRIALS)
        return (min(seconds) if self.stream is None else statistics.median(seconds)) / _ISSUED

    def _layers_of_one(self) -> Callable[[], None]:
        x_BTD = torch.randn(1, 1, self.spec.hidden_size, device=self.device).to(self.dtype)
        positions = torch.full((1, 1), 7, device=self.device)
        cos, sin = self.decoder.rotations(positions)
        span = Span(first=7, prompt=False, positions_BT=positions, cos=cos, sin=sin)
        cache = torch.zeros(8, 2, 1, self.spec.num_kv_heads, self.spec.head_dim, device=self.device)
        segments, weights = (Segment(0, 1, cache.to(self.dtype)),), self.layers[0]

        def work() -> None:
            for _ in range(_ISSUED):
                self.decoder.attention(weights, x_BTD, 0, span, segments)
                self.decoder.mlp(weights, x_BTD)

        return work

    def replayed_s(self) -> float:
        """Seconds of a layer's kernels for one sequence, as a graph runs them."""
        assert self.stream is not None
        return self._seconds(self._layers_of_one()) / _ISSUED

    def _head_s(self, weights: Tensors, rows: int) -> float:
        x_RD = torch.randn(rows, self.spec.hidden_size, device=self.device).to(self.dtype)
        return self._seconds(lambda: self.decoder.logits(weights, x_RD).argmax(dim=-1))

    def _seconds(self, work: Callable[[], object], *, sustained: bool = False) -> float:
        run = work
        if self.stream is not None:
            run = _recorded(work, self.stream)
        if sustained and self.stream is not None:
            self._warm(run)
        seconds = timed_runs(run, self.device.type, _TRIALS)
        self.spreads.append((max(seconds) - min(seconds)) / statistics.median(seconds))
        # The quickest, because on a shared machine the others say how busy it was just then; but what is to be timed warm
        # is quickest where it has cooled down.
        return statistics.median(seconds) if sustained and self.stream is not None else min(seconds)

    def _warm(self, run: Callable[[], object]) -> None:
        """Until the GPU's clocks are those of long work: of matrix products they drop by a tenth and more."""
        started = time.perf_counter()
        while time.perf_counter() - started < (_SUSTAINED_S if self.warm else _FIRST_SUSTAINED_S):
            for _ in range(8):
                run()
            torch.cuda.synchronize()
        self.warm = True

    def _weights(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
        """Random weights, one after another in memory as the engine has them."""
        sizes = {name: round_up(math.prod(shape), ALIGNMENT) for name, shape in shapes.items()}
        memory = torch.randn(sum(sizes.values()), device=self.device, dtype=self.dtype).mul_(0.02)
        parts = zip(shapes.items(), memory.split(list(sizes.values())), strict=True)
        weights = {name: part[: math.prod(shape)].view(shape) for (name, shape), part in parts}
        if "router.weight" in weights and self.device.type == "cuda":
            weights |= expert_addresses(weights, self.spec.num_experts, self.device)
        return weights


def _recorded(work: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], object]:
    """The work as a CUDA graph: replaying it takes the device's time alone."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


@dataclass(frozen=True, slots=True)
class _Issue:
    """Host seconds of a compute step: the engine's loop with its load of weights, its operations, its KV's moves.

    `replay_s` is what a layer replayed from a graph takes beyond its kernels, `exchange_s` from a query to what the CPU
    found, `recompute_s` what making keys and values anew takes beyond loading them, and `beside_attention` how many times
    as long all of it takes while the CPU attends.
    """

    step_s: float
    chunk_s: float = 0.0
    kv_s: float = 0.0
    replay_s: float = 0.0
    exchange_s: float = 0.0
    recompute_s: float | None = None
    beside_attention: float = 1.0

    @staticmethod
    def measured(spec: ModelSpec, dtype: str, device: str, attention: HostWork | None) -> "_Issue":
        """The difference between models of ten and two layers that are too small to compute anything.

        On the CPU the operations themselves are timed as the layer's already, so that they are taken off. What is
        subtracted is timed in turns, and each result is the median of its rounds: a host changes its pace between one
        second and the next.

        Args:
            attention: what the CPU does beside a compute device; None where it is that device.
        """
        alone = attention is None
        # A mixture of experts is not recorded, so that its operations are in every step.
        eager = spec.num_experts > 0
        with contextlib.ExitStack() as stack:

            def tiny(kv_cache: Placement, **more: Any) -> tuple[FlexEngine, FlexEngine]:
                many, few = (
                    stack.enter_context(_tiny_engine(spec, layers, dtype, device, kv_cache, **more))
                    for layers in (_MANY_LAYERS, _FEW_LAYERS)
                )
                return many, few

            plain = tiny(ON_GPU)
            moving = None if alone else tiny(ON_CPU)
            asking = None if alone else tiny(ON_CPU, cpu_attention=True)
            # Never done where keys and values, shared by heads, are no larger than what they are made of.
            anew = None if alone or 2 * spec.kv_size <= spec.hidden_size else tiny(ON_CPU, recompute=1.0)
            bench = _Bench(_tiny(spec, 2), torch.device(device), getattr(torch, dtype))
            plain_s, kv_s, operations_s, replay_s, exchange_s, recompute_s = [], [], [], [], [], []
            for _ in range(_ISSUE_ROUNDS):
                plain_s.append(_per_layer_s(*plain))
                with torch.inference_mode():
                    operations_s.append(bench.operations_s())
                    if moving is not None and not eager:
                        replay_s.append(plain_s[-1] - bench.replayed_s())
                if moving is not None:
                    # With its KV on the device a tiny model's layers are replayed from graphs: no operations are in
                    # `plain_s`.
                    eager_s = plain_s[-1] + (0 if eager else operations_s[-1])
                    kv_s.append(_per_layer_s(*moving) - eager_s)
                if anew is not None:
                    recompute_s.append(_per_layer_s(*anew) - eager_s - kv_s[-1])
                if asking is not None:
                    exchange_s.append(_per_layer_s(*asking) - eager_s)
            beside = 1.0 if attention is None else _beside_attention(bench, attention)
        plain_median_s, operations_median_s = statistics.median(plain_s), statistics.median(operations_s)
        own_s = max(0.0, plain_median_s - operations_median_s if alone or eager else plain_median_s)
        if alone:
            return _Issue(own_s)
        kv_median_s, replay_median_s = statistics.median(kv_s), statistics.median(replay_s or [0.0])
        return _Issue(
            own_s,
            operations_median_s,
            max(0.0, kv_median_s),
            max(0.0, replay_median_s),
            max(0.0, statistics.median(exchange_s)),
            max(0.0, statistics.median(recompute_s)) if recompute_s else None,
            beside,
        )


def _beside_attention(bench: _Bench, attention: HostWork) -> float:
    """How many times as long the host takes to issue a layer's operations while its other cores attend."""
    ended = threading.Event()

    def attend() -> None:
        while not ended.is_set():
            attention.run()

    alone_s, beside_s = [], []
    with torch.inference_mode():
        for _ in range(_ISSUE_ROUNDS):
            alone_s.append(bench.operations_s())
            ended.clear()
            thread = threading.Thread(target=attend)
            thread.start()
            try:
                beside_s.append(bench.operations_s())
            finally:
                ended.set()
                thread.join()
    return max(1.0, statistics.median(beside_s) / statistics.median(alone_s))


def _tiny(spec: ModelSpec, layers: int) -> ModelSpec:
    return replace(
        spec,
        num_layers=layers,
        hidden_size=32,
        embed_size=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=32,
        vocab_size=64,
        max_positions=64,
        num_experts=min(spec.num_experts, 4),
        experts_per_token=min(spec.experts_per_token, 2),
        sliding_windows=(),
    )


def _tiny_engine(
    spec: ModelSpec, layers: int, dtype: str, device: str, kv_cache: Placement, **more: Any
) -> FlexEngine:
    """A tiny model whose weights are streamed."""
    return FlexEngine.load(
        _tiny(spec, layers),
        RandomCheckpoint(seed=0),
        Policy(micro_batch_size=1, weights=ON_CPU, kv_cache=kv_cache, **more),
        workload=Workload(num_sequences=1, prompt_tokens=4, gen_tokens=20),
        device=device,
        dtype=dtype,
    )


def _per_layer_s(many: FlexEngine, few: FlexEngine) -> float:
    """Seconds that each further layer adds to a decode step."""
    return (_step_s(many) - _step_s(few)) / (many.spec.num_layers - few.spec.num_layers)


def _step_s(engine: FlexEngine) -> float:
    """Median seconds of a decode step."""
    moments = []
    for _ in engine.generate(torch.ones(1, 4, dtype=torch.long)):
        moments.append(time.perf_counter())  # noqa: PERF401 - the moment it comes, not after
    return statistics.median(after - before for before, after in itertools.pairwise(moments))
