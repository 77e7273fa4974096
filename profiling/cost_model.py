"""How fast a plan could run at best: the physical limit, from bytes, operations and measured rates.

A pure function of a model's dimensions, a workload, what lies where and what the machine can do per
second. Every resource works in parallel with all others at its full measured rate; so the slowest one
sets the time, and no real run is faster:

    decode step  T >= max( (streamed weights + streamed KV) / up,   new KV / down,
                           operations / compute,   (weights + KV) / device memory,
                           (weights + KV on the host) / host memory,   weights on disk / disk )
    prefill      T >= the same, with the prompt's operations and without reading KV
    limit        = sequences x generated / (sum of prefill + sum of decode steps)

This is the roofline (Williams et al. 2009) per resource, with the transfers of offloaded inference as
resources (as in FlexGen, Sheng et al. 2023, section 4.3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexllmgen.workload import Workload

if TYPE_CHECKING:
    from flexllmgen.spec import ModelSpec
    from profiling.rates import Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What lies where while a batch of `batch_size` sequences is in flight; bytes by tier: gpu, cpu, disk.

    Without a GPU the compute device is the CPU, and what a plan calls gpu or cpu is the same memory.
    `page_cached` says that files are read through the page cache and fit it, so that after the first pass the
    disk is not read at all.
    """

    batch_size: int
    weight_bytes: Mapping[str, int]
    kv_shares: Mapping[str, float]
    dtype_bytes: int
    page_cached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEstimate:
    """Seconds over the whole workload, and which resource sets the pace in each phase."""

    prefill_s: float
    decode_s: float
    generation_tok_s: float
    prefill_bound: str
    decode_bound: str


def physical_limit(spec: "ModelSpec", workload: Workload, traffic: Traffic, rates: "Rates") -> CostEstimate:
    """The least time that the machine's measured rates allow for this plan."""
    prefill_s = decode_s = 0.0
    prefill_bounds: dict[str, float] = {}
    decode_bounds: dict[str, float] = {}
    remaining = workload.num_sequences
    while remaining > 0:
        batch = min(traffic.batch_size, remaining)
        remaining -= batch
        times = _phase_times(spec, traffic, rates, batch, new_tokens=workload.prompt_tokens, cached=0)
        prefill_s += max(times.values())
        _add(prefill_bounds, times)
        # Each step reads the KV of all positions before it; times grow linearly, so the middle step is the mean.
        steps = workload.gen_tokens - 1
        if steps:
            middle = workload.prompt_tokens + steps // 2
            times = _phase_times(spec, traffic, rates, batch, new_tokens=1, cached=middle)
            decode_s += steps * max(times.values())
            _add(decode_bounds, times)
    return CostEstimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        generation_tok_s=workload.output_tokens / (prefill_s + decode_s),
        prefill_bound=_binding(prefill_bounds),
        decode_bound=_binding(decode_bounds),
    )


def overlapped_cost(
    spec: "ModelSpec",
    workload: Workload,
    traffic: Traffic,
    rates: "Rates",
    *,
    micro_batch_size: int,
    device: str,
    dtype: str,
    overlap: bool,
) -> CostEstimate:
    """What an engine that copies while it computes should take: the prediction.

    Unlike the limit it computes at the rate measured for linear layers of these shapes and reads the weights
    once for each micro-batch; transfers still hide behind compute, or add to it where `overlap` is off.
    """
    from profiling.compute import linear_bytes_per_s

    prefill_s = decode_s = 0.0
    prefill_bounds: dict[str, float] = {}
    decode_bounds: dict[str, float] = {}
    weights = sum(traffic.weight_bytes.values()) * spec.active_parameters / spec.num_parameters
    together = max if overlap else sum
    prefill_rate = linear_bytes_per_s(spec, dtype, device, rows=micro_batch_size * workload.prompt_tokens)
    decode_rate = linear_bytes_per_s(spec, dtype, device, rows=micro_batch_size)
    remaining = workload.num_sequences
    while remaining > 0:
        block = min(traffic.batch_size, remaining)
        remaining -= block
        micro_batches = block / micro_batch_size
        times = _phase_times(spec, traffic, rates, block, new_tokens=workload.prompt_tokens, cached=0)
        times["compute"] = micro_batches * weights / prefill_rate
        prefill_s += together(times.values())
        _add(prefill_bounds, times)
        steps = workload.gen_tokens - 1
        if steps:
            middle = workload.prompt_tokens + steps // 2
            times = _phase_times(spec, traffic, rates, block, new_tokens=1, cached=middle)
            kv_bytes = block * spec.kv_bytes(middle, traffic.dtype_bytes)
            times["compute"] = micro_batches * weights / decode_rate + kv_bytes / rates.device_bytes_per_s
            decode_s += steps * together(times.values())
            _add(decode_bounds, times)
    return CostEstimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        generation_tok_s=workload.output_tokens / (prefill_s + decode_s),
        prefill_bound=_binding(prefill_bounds),
        decode_bound=_binding(decode_bounds),
    )


def _phase_times(
    spec: "ModelSpec", traffic: Traffic, rates: "Rates", batch: int, *, new_tokens: int, cached: int
) -> dict[str, float]:
    """Seconds that each resource is busy for one forward pass of a batch, by the resource's name."""
    weights = sum(traffic.weight_bytes.values())
    read_kv = batch * spec.kv_bytes(cached, traffic.dtype_bytes)
    new_kv = batch * spec.kv_bytes(new_tokens, traffic.dtype_bytes)
    disk_weights = traffic.weight_bytes.get("disk", 0)
    disk_kv_share = traffic.kv_shares.get("disk", 0.0)
    flops = batch * (spec.decode_flops(cached) if cached else spec.prefill_flops(new_tokens))
    from_disk = disk_weights + read_kv * disk_kv_share
    times = {"compute": flops / rates.compute_flops_per_s}
    if traffic.page_cached:
        times["page cache"] = from_disk / rates.cached_file_bytes_per_s
    else:
        to_disk = new_kv * disk_kv_share
        times["disk"] = from_disk / rates.disk_read_bytes_per_s + to_disk / rates.disk_write_bytes_per_s
    if rates.h2d_bytes_per_s is None or rates.d2h_bytes_per_s is None:
        times["host memory"] = (weights + read_kv + new_kv) / rates.host_bytes_per_s
        return times
    host_kv_share = traffic.kv_shares.get("cpu", 0.0) + disk_kv_share
    host_weights = traffic.weight_bytes.get("cpu", 0) + disk_weights
    up = host_weights + read_kv * host_kv_share
    down = new_kv * host_kv_share
    times["host to device link"] = up / rates.h2d_bytes_per_s
    times["device to host link"] = down / rates.d2h_bytes_per_s
    times["device memory"] = (weights + read_kv + new_kv) / rates.device_bytes_per_s
    times["host memory"] = (up + down) / rates.host_bytes_per_s
    return times


def _add(bounds: dict[str, float], times: Mapping[str, float]) -> None:
    for name, seconds in times.items():
        bounds[name] = bounds.get(name, 0.0) + seconds


def _binding(bounds: Mapping[str, float]) -> str:
    return max(bounds, key=lambda name: bounds[name]) if bounds else "none"
