"""How fast a plan could run at best: the physical limit, from bytes, operations and measured rates.

A pure function of a model's dimensions, a workload, what lies where and what the machine can do per
second. Every resource works in parallel with all others at its full measured rate; so the slowest one
sets the time, and no real run is faster:

    decode step  T >= max( (streamed weights + streamed KV) / up,   new KV / down,
                           operations / compute,   (weights + KV) / device memory,
                           (weights + KV on the host) / host memory,   weights on disk / disk )
                 where the CPU attends: streamed KV is not that in host memory, but it is read there
                 where steps choose their experts: streamed weights are those without a mixture's other experts,
                 by as many as its tokens are sent to where all experts are as likely
    prefill      T >= the same, with the prompt's operations and without reading KV
    limit        = sequences x generated / (sum of prefill + sum of decode steps)

This is the roofline (Williams et al. 2009) per resource, with the transfers of offloaded inference as
resources (as in FlexGen, Sheng et al. 2023, section 4.3).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexllmgen.placement import PlacementPlan
from flexllmgen.splits import micro_batch_sizes
from flexllmgen.workload import Workload
from profiling.layer_times import layer_times_for

if TYPE_CHECKING:
    from flexllmgen.spec import ModelSpec
    from profiling.profile import HardwareProfile, Rates

Times = dict[str, float]
"""Seconds that each resource is busy, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What lies where while a batch of `batch_size` sequences is in flight; bytes by tier: gpu, cpu, disk.

    Without a GPU the compute device is the CPU, and what a plan calls gpu or cpu is the same memory.
    `page_cached` says that files are read through the page cache and fit it, so that after the first pass the
    disk is not read at all. `lookup_bytes` are those of the weights that no pass reads whole: tables of which an
    embedding takes some rows, where the engine does that where they lie. With `host_attention` the CPU attends to the KV
    in host memory, which then does not cross the link.
    `chosen_expert_bytes` are the bytes of experts, of the weights, where a decode step brings in only the chosen ones.
    `kv_bytes_share` is what compressed KV has of the bytes of `dtype_bytes` numbers; it moves, and is read, compressed.
    """

    batch_size: int
    weight_bytes: Mapping[str, int]
    kv_shares: Mapping[str, float]
    dtype_bytes: int
    page_cached: bool = False
    lookup_bytes: Mapping[str, int] = field(default_factory=dict)
    host_attention: bool = False
    kv_bytes_share: float = 1.0
    chosen_expert_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEstimate:
    """Seconds over the whole workload, and which resource sets the pace in each phase.

    `..._busy_s` are the seconds each resource works in a phase, `..._moved_bytes` the bytes over each link (h2d, d2h,
    disk_read, disk_write); `peak_bytes` what each tier holds at most. Those that nothing is known of are empty.
    """

    prefill_s: float
    decode_s: float
    generation_tok_s: float
    prefill_bound: str
    decode_bound: str
    prefill_busy_s: Mapping[str, float] = field(default_factory=dict)
    decode_busy_s: Mapping[str, float] = field(default_factory=dict)
    prefill_moved_bytes: Mapping[str, float] = field(default_factory=dict)
    decode_moved_bytes: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)


def physical_limit(spec: "ModelSpec", workload: Workload, traffic: Traffic, rates: "Rates") -> CostEstimate:
    """The least time that the machine's measured rates allow for this plan."""

    def times(block: int, new_tokens: int, cached: int) -> Times:
        # KV that no step will read need not be stored.
        stored = workload.gen_tokens > 1
        return _phase_times(spec, traffic, rates, block, new_tokens=new_tokens, cached=cached, stored=stored)

    return over_blocks(workload, traffic.batch_size, times, max)


def engine_cost(plan: PlacementPlan, profile: "HardwareProfile") -> CostEstimate | None:
    """What our engine should take for this placement: its schedule, simulated at the machine's typical rates.

    Of a block's decode steps the first, one in the middle and the last are simulated: the first finds loads done
    while the prompt was read, the last starts none, and those between grow as good as linearly with the
    context. None where no layer of any model was timed on the machine.
    """
    from profiling.simulation import simulate_block

    times = layer_times_for(plan.spec, profile.layers)
    if times is None:
        return None
    workload, policy = plan.workload, plan.policy
    steps = workload.gen_tokens - 1
    contexts = _sampled_contexts(workload)
    full, ragged = divmod(workload.num_sequences, policy.block_size)
    prefill_s = decode_s = 0.0
    prefill_busy: Times = {}
    decode_busy: Times = {}
    prefill_moved: dict[str, float] = {}
    decode_moved: dict[str, float] = {}
    for blocks, size in ((full, policy.block_size), (1, ragged)):
        if not blocks or not size:
            continue
        passes = simulate_block(
            plan,
            times,
            profile.typical,
            micro_batches=micro_batch_sizes(size, policy),
            contexts=contexts,
        )
        prefill_s += blocks * passes.seconds[0]
        _add(prefill_busy, passes.busy[0], blocks)
        _add(prefill_moved, passes.moved[0], blocks)
        counts = [1, steps - 2, 1] if steps > 2 else [1] * steps
        for step, count in enumerate(counts, start=1):
            decode_s += blocks * count * passes.seconds[step]
            _add(decode_busy, passes.busy[step], blocks * count)
            _add(decode_moved, passes.moved[step], blocks * count)
    return CostEstimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        generation_tok_s=workload.output_tokens / (prefill_s + decode_s),
        prefill_bound=_binding(prefill_busy),
        decode_bound=_binding(decode_busy),
        prefill_busy_s=prefill_busy,
        decode_busy_s=decode_busy,
        prefill_moved_bytes=prefill_moved,
        decode_moved_bytes=decode_moved,
        peak_bytes={"gpu": plan.gpu_bytes, "cpu": plan.cpu_bytes, "disk": plan.disk_bytes},
    )


def _sampled_contexts(workload: Workload) -> tuple[int, ...]:
    """Positions that the simulated decode steps attend to, their own included."""
    steps = workload.gen_tokens - 1
    return tuple(
        workload.prompt_tokens + step
        for step in ((1, (1 + steps) // 2, steps) if steps > 2 else range(1, steps + 1))
    )


def over_blocks(
    workload: Workload,
    block_size: int,
    times: Callable[[int, int, int], Times],
    together: Callable[[Iterable[float]], float],
) -> CostEstimate:
    """Add up prefill and decode steps of all blocks.

    Args:
        times: seconds each resource is busy, for (sequences, new tokens, cached positions).
        together: how these make up the time of a step: the largest if all work at once, the sum if in turn.
    """
    prefill_s = decode_s = 0.0
    prefill_busy: Times = {}
    decode_busy: Times = {}
    steps = workload.gen_tokens - 1
    remaining = workload.num_sequences
    while remaining > 0:
        block = min(block_size, remaining)
        remaining -= block
        busy = times(block, workload.prompt_tokens, 0)
        prefill_s += together(busy.values())
        _add(prefill_busy, busy)
        if steps:
            # Each step reads the KV of all positions before it; times grow linearly, so the middle step is the mean.
            busy = times(block, 1, workload.prompt_tokens + steps // 2)
            decode_s += steps * together(busy.values())
            _add(decode_busy, busy, steps)
    return CostEstimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        generation_tok_s=workload.output_tokens / (prefill_s + decode_s),
        prefill_bound=_binding(prefill_busy),
        decode_bound=_binding(decode_busy),
        prefill_busy_s=prefill_busy,
        decode_busy_s=decode_busy,
    )


def _phase_times(
    spec: "ModelSpec",
    traffic: Traffic,
    rates: "Rates",
    batch: int,
    *,
    new_tokens: int,
    cached: int,
    stored: bool,
) -> Times:
    """Seconds that each resource is busy for one forward pass of a batch, by the resource's name."""
    whole: dict[str, float]
    whole = {tier: size - traffic.lookup_bytes.get(tier, 0) for tier, size in traffic.weight_bytes.items()}
    weights = sum(whole.values())
    # Of a mixture of experts a pass may read no more than the experts of one token.
    read_weights = weights * spec.active_parameters / spec.num_parameters
    if cached and traffic.chosen_expert_bytes:
        idle = 1 - spec.expected_experts(batch) / spec.num_experts
        whole = {tier: size - idle * traffic.chosen_expert_bytes.get(tier, 0) for tier, size in whole.items()}
    kept = batch * traffic.kv_bytes_share
    read_kv = kept * spec.kv_bytes(cached, traffic.dtype_bytes)
    new_kv = kept * spec.kv_bytes(new_tokens, traffic.dtype_bytes) if stored else 0
    attended_kv = read_kv * spec.attended_share(cached)
    disk_weights = whole.get("disk", 0)
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
        times["host memory"] = (read_weights + attended_kv + new_kv) / rates.host_bytes_per_s
        return times
    host_kv_share = traffic.kv_shares.get("cpu", 0.0) + disk_kv_share
    host_weights = whole.get("cpu", 0) + disk_weights
    lifted_share = disk_kv_share if traffic.host_attention else host_kv_share
    up = host_weights + read_kv * lifted_share
    down = new_kv * host_kv_share
    on_host = attended_kv * (host_kv_share - lifted_share)
    if on_host and cached:
        # Queries go down and outputs come up, of every layer.
        exchanged = batch * spec.num_layers * spec.query_size * traffic.dtype_bytes * traffic.kv_shares["cpu"]
        up, down = up + exchanged, down + exchanged
    times["host to device link"] = up / rates.h2d_bytes_per_s
    times["device to host link"] = down / rates.d2h_bytes_per_s
    times["device memory"] = (read_weights + attended_kv - on_host + new_kv) / rates.device_bytes_per_s
    times["host memory"] = (up + down + on_host) / rates.host_in_all_bytes_per_s
    return times


def _add(sums: Times, times: Mapping[str, float], count: float = 1.0) -> None:
    for name, seconds in times.items():
        sums[name] = sums.get(name, 0.0) + count * seconds


def _binding(busy: Times) -> str:
    return max(busy, key=lambda name: busy[name]) if busy else "none"
