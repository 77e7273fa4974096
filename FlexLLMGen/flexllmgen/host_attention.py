"""HostAttention: decode attention on the CPU for the sequences whose KV lies in host memory, beside the device's work.

The query, key and value of a step come down, the CPU appends and attends where the KV lies, and what it found goes up:
a few rows instead of all cached positions. One thread takes the micro-batches in turn; the kernel has threads of its own.
Knows nothing of weights, slots or schedules.
"""

# B sequences of one micro-batch in host memory  N query heads  K key heads  H head dim  S positions

import contextlib
import os

import torch

from flexllmgen.cpu_attention import available, decode_attention_cpu
from flexllmgen.kv_cache import KVCache
from flexllmgen.memory.arena import HostArena
from flexllmgen.memory.transfer import Event, Lane, Traffic, mark
from flexllmgen.placement import PlacementPlan


def attention_threads() -> int:
    """Threads that attend: all cores but one for the thread that issues the device's work and one for copies."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores - (2 if cores > 4 else 1))


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
        if self._regions:
            available()  # Builds the kernel now, where that was not yet done: no step shall wait for a compiler.
        self._lane = Lane("cpu-attention", None, threaded=True) if self._regions else None
        self._under_way: dict[int, tuple[Event, torch.Tensor]] = {}
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
        q_host, k_host, v_host, out_host = self._exchange(micro_batch, segment.stop - segment.start)
        for target, source in ((q_host, q_BNH[mine]), (k_host, k_BKH[mine]), (v_host, v_BKH[mine])):
            # In two steps: strided rows would not be copied asynchronously.
            target.copy_(source.contiguous(), non_blocking=True)
            self._traffic.add("d2h", target.numel() * target.element_size())
        bias = None if bias_BS is None else bias_BS[mine]
        window = self._plan.spec.sliding_window(layer)
        rows_S2BKH, length = segment.kv_S2BKH, position + 1
        first = max(0, position + 1 - window) if window else 0

        def attend() -> None:
            decode_attention_cpu(
                q_host,
                rows_S2BKH,
                length,
                bias,
                first=first,
                out_BNH=out_host,
                threads=self._threads,
                k_BKH=k_host,
                v_BKH=v_host,
            )

        event = self._lane.submit(attend, [mark(self._device), stored])
        self._under_way[micro_batch] = event, out_host

    def result(self, micro_batch: int) -> torch.Tensor | None:
        """Waits for what was submitted and brings it to the device: [B, N, H]; None if there was nothing."""
        if micro_batch not in self._under_way:
            return None
        event, out_host = self._under_way.pop(micro_batch)
        event.synchronize()
        self._traffic.add("h2d", out_host.numel() * out_host.element_size())
        return out_host.to(self._device, non_blocking=True)

    def drain(self) -> None:
        """Waits for what nobody will collect; whether it failed no longer matters."""
        for event, _ in self._under_way.values():
            with contextlib.suppress(Exception):
                event.synchronize()
        self._under_way.clear()

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()

    def _exchange(self, micro_batch: int, rows: int) -> tuple[torch.Tensor, ...]:
        """Host memory of a micro-batch's queries, keys, values and outputs."""
        spec = self._plan.spec
        sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads, spec.num_heads]
        numbers = self._arena.view(self._regions[micro_batch]).view(self._dtype)
        parts, start = [], 0
        for heads in sizes:
            stop = start + rows * heads * spec.head_dim
            parts.append(numbers[start:stop].view(rows, heads, spec.head_dim))
            start = stop
        return tuple(parts)
