"""HostAttention: decode attention on the CPU for the sequences whose KV lies in host memory, beside the device's work.

The query, key and value of a step come down, the CPU appends and attends where the KV lies, and what it found goes up:
a few rows instead of all cached positions, written and read by the device's kernels over the link, since a copy engine
would queue them behind the weights under way. On CUDA calls are queued on a stream of their own, what comes back on
another, and the host goes on;
elsewhere one thread takes the micro-batches in turn. The kernel has threads of its own. Knows nothing of weights, slots
or schedules.
"""

# B sequences of one micro-batch in host memory  N query heads  K key heads  H head dim  S positions

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from flexllmgen.cpu_attention import available, prepare_attention
from flexllmgen.cpu_attention.library import Prepared
from flexllmgen.kv_cache import KVCache, Segment
from flexllmgen.kv_compression import CompressedSegment
from flexllmgen.memory.arena import HostArena
from flexllmgen.memory.host_calls import call_in_order, mapped
from flexllmgen.memory.transfer import Event, Lane, Traffic, current_stream, mark
from flexllmgen.placement import PlacementPlan


def attention_threads() -> int:
    """Threads that attend: all cores but one for the thread that issues the device's work and one for copies."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores - (2 if cores > 4 else 1))


class _Exchange(NamedTuple):
    """What goes down and up for some sequences; `rest` is their new keys and values, as bytes."""

    q_BNH: torch.Tensor
    out_BNH: torch.Tensor
    rest: torch.Tensor


class HostAttention:
    """Attention on the CPU, begun by `submit` and collected by `result`, one of each per micro-batch and layer.

    Args:
        dtype: of keys, values and queries.
        traffic: told what goes over the link.
    """

    def __init__(
        self,
        plan: PlacementPlan,
        *,
        device: torch.device,
        dtype: torch.dtype,
        arena: HostArena,
        kv: KVCache,
        traffic: Traffic,
    ) -> None:
        self._plan, self._device, self._dtype, self._arena = plan, device, dtype, arena
        self._kv, self._traffic = kv, traffic
        self._regions = [arena.reserve(rows * plan.exchange_row_bytes) for rows in plan.exchange_rows]
        self._lane: Lane | None = None
        # Answers go up beside the calls: the CPU begins the next one as soon as it has ended one.
        self._up: Lane | None = None
        if self._regions:
            # Builds the kernel now, where that was not yet done: no step shall wait for a compiler.
            queued = available(plan.spec.head_dim) and device.type == "cuda"
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            self._lane = Lane("cpu-attention", stream, threaded=not queued)
            if queued:
                urgent = torch.cuda.Stream(device, priority=-1)
                self._up = Lane("cpu-attention-up", urgent, threaded=False)
        self._under_way: dict[int, tuple[Event, torch.Tensor]] = {}
        self._calls: dict[tuple[int, int], Callable[[], None]] = {}
        self._exchanges: dict[tuple[int, int], tuple[_Exchange, _Exchange]] = {}
        self._threads = attention_threads()

    def submit(
        self,
        layer: int,
        micro_batch: int,
        count: int,
        q_BNH: torch.Tensor,
        k_BKH: torch.Tensor,
        v_BKH: torch.Tensor,
        position: int,
        bias_BS: torch.Tensor | None,
    ) -> None:
        """Starts appending and attending for the sequences of a micro-batch of `count` that lie in host memory.

        Args:
            q_BNH: queries of all its sequences, on the device; likewise keys and values, to be written at `position`.
            bias_BS: in host memory, for all its sequences; minus infinity on padding.
        """
        segment, stored = self._kv.host_segment(layer, micro_batch, count)
        if segment is None:
            return
        assert self._lane is not None
        mine = slice(segment.start, segment.stop)
        host, seen = self._exchange(micro_batch, segment.stop - segment.start)
        new = q_BNH[mine], k_BKH[mine], v_BKH[mine]
        kv_S2BKH, more = (
            self._give_codes(segment, host, seen, *new)
            if isinstance(segment, CompressedSegment)
            else self._give_numbers(segment, host, seen, *new)
        )
        self._traffic.add("d2h", host.q_BNH.nbytes + host.rest.nbytes)
        window, length = self._plan.spec.sliding_window(layer), position + 1
        attend = prepare_attention(
            host.q_BNH,
            kv_S2BKH,
            length,
            None if bias_BS is None else bias_BS[mine],
            first=max(0, length - window) if window else 0,
            out_BNH=host.out_BNH,
            threads=self._threads,
            **more,
        )
        # Kept until the next step's takes its place: all of a step has run before another begins.
        self._calls[layer, micro_batch] = attend
        # Made now: the next use of its memory is issued after what this thread issues with it.
        out_BNH = torch.empty_like(seen.out_BNH) if self._device.type == "cuda" else host.out_BNH
        asked = mark(self._device)
        needs = asked, stored
        lane, stream = self._lane, self._lane.stream

        def up() -> None:
            if out_BNH is not host.out_BNH:
                _by_kernel(out_BNH, seen.out_BNH)

        def queue() -> None:
            assert isinstance(attend, Prepared)
            assert stream is not None
            call_in_order(stream, *attend.in_c)

        def wait() -> None:
            if stream is not None:
                stream.synchronize()
            attend()
            up()

        # An answer's way up waits for the query first, though the call comes after it: a stream that waits for a call asks host
        # memory for it all the time, over the link, and is told to long before the query is there.
        ended = (
            lane.submit(wait, needs)
            if self._up is None
            else self._up.submit(up, [asked, lane.submit(queue, needs)])
        )
        self._under_way[micro_batch] = ended, out_BNH

    def result(self, micro_batch: int) -> torch.Tensor | None:
        """What was submitted comes to, for later work of the current stream: [B, N, H]; None if there was nothing."""
        if micro_batch not in self._under_way:
            return None
        event, out_BNH = self._under_way.pop(micro_batch)
        event.order(current_stream(self._device))
        self._traffic.add("h2d", out_BNH.nbytes)
        return out_BNH

    def drain(self) -> None:
        """Waits for all that was submitted; whether what nobody will collect has failed no longer matters."""
        for event, _ in self._under_way.values():
            with contextlib.suppress(Exception):
                event.synchronize()
        self._under_way.clear()
        for lane in (self._lane, self._up):
            if lane is not None and lane.stream is not None:
                lane.stream.synchronize()
        self._calls.clear()

    def close(self) -> None:
        self._exchanges.clear()
        for lane in (self._lane, self._up):
            if lane is not None:
                lane.close()

    def _give_numbers(
        self, segment: Segment, host: _Exchange, seen: _Exchange, q_BNH: torch.Tensor, *new: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Sends queries and new keys and values; the cache, and what else the call takes."""
        shape = (2, *new[0].shape)
        _by_kernel(seen.q_BNH, q_BNH)
        for target, source in zip(seen.rest.view(self._dtype).view(shape), new, strict=True):
            _by_kernel(target, source)
        k_BKH, v_BKH = host.rest.view(self._dtype).view(shape)
        return segment.kv_S2BKH, {"k_BKH": k_BKH, "v_BKH": v_BKH}

    def _give_codes(
        self,
        segment: CompressedSegment,
        host: _Exchange,
        seen: _Exchange,
        q_BNH: torch.Tensor,
        *new: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The same of compressed KV: queries in the directions of the keys, and a row's scales, zeros and codes."""
        codec, sequences = segment.codec, segment.stop - segment.start
        _by_kernel(seen.q_BNH, codec.turned(q_BNH))
        _by_kernel(seen.rest, codec.step_row(segment, *new))
        codes_S2BKH, scale, zero = segment.by_heads()
        row = codec.row_parts(host.rest, sequences)
        more = {"scale_S2BKG": scale, "zero_S2BKG": zero, "group_size": codec.group_size, "row": row}
        return codes_S2BKH, more

    def _exchange(self, micro_batch: int, rows: int) -> tuple[_Exchange, _Exchange]:
        """Host memory of a micro-batch's queries, keys, values and outputs; and the same as the device sees it."""
        if (micro_batch, rows) not in self._exchanges:
            region = self._arena.view(self._regions[micro_batch])
            both = self._parts_of(region, rows), self._parts_of(mapped(region, self._device), rows)
            self._exchanges[micro_batch, rows] = both
        return self._exchanges[micro_batch, rows]

    def _parts_of(self, region: torch.Tensor, rows: int) -> _Exchange:
        spec = self._plan.spec
        each = rows * spec.query_size * self._dtype.itemsize
        q_BNH, out_BNH = (
            region[start : start + each].view(self._dtype).view(rows, spec.num_heads, spec.head_dim)
            for start in (0, each)
        )
        return _Exchange(q_BNH, out_BNH, region[2 * each : rows * self._plan.exchange_row_bytes])


def _by_kernel(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies numbers as arithmetic, which no copy engine can take on itself."""
    torch.mul(source, 1, out=target)
