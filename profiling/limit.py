"""How fast a plan could run at best: the physical limit, from bytes, operations and measured rates.

A pure function of a model's dimensions, a workload, what lies where and what the machine can do per
second. Every resource works in parallel with all others at its full measured rate; so the slowest one
sets the time, and no real run is faster:

    decode       T >= max( (streamed weights + streamed KV) / up,   new KV / down,
                           operations / compute,   (weights + KV) / device memory,
                           (weights + KV on the host) / host memory,   weights on disk / disk )
                 KV is what steps attend to: of a layer with a sliding window no more than that, and of the values no more
                 than the share that a sparse step uses
                 where the CPU attends: streamed KV is not that in host memory, but it is read there
                 where layer inputs are kept instead of KV: these, and the operations that make KV of them
                 where steps choose their experts: streamed weights are those without a mixture's other experts,
                 by as many as its tokens are sent to where all experts are as likely
    prefill      T >= the same, with the prompts' operations and without reading KV
    limit        = sequences x generated / (sum of prefill + sum of decode), over blocks

What the slots hold may be loaded before the steps that it is for, and stored after the prompt that it is of. This is the
roofline (Williams et al. 2009) per resource, with the transfers of offloaded inference as resources (as in FlexGen, Sheng
et al. 2023, section 4.3).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from flexllmgen.images import expert_bytes
from flexllmgen.placement import PlacementPlan
from flexllmgen.policy import values_used
from flexllmgen.splits import micro_batch_sizes
from flexllmgen.workload import Workload
from flexllmgen.workspace import exchange_row
from profiling.cost_model import CostEstimate, Phase, Times, cost_of_blocks

if TYPE_CHECKING:
    from flexllmgen.spec import ModelSpec
    from profiling.profile import Rates

KVRows = Mapping[str, Mapping[int, float]]
"""By tier, and by the layers' sliding window (0: none): sequences whose KV lies there, summed over the layers.

Those that are kept as the layer's inputs, in host memory, are told apart as `inputs`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What lies where while a batch of `batch_size` sequences is in flight; bytes by tier: gpu, cpu, disk.

    Without a GPU the compute device is the CPU, and what a plan calls gpu or cpu is the same memory.

    Args:
        kv_shares: of the KV of each layer and batch; `kv_rows` says instead what a block of so many sequences has.
        page_cached: files are read through the page cache and fit it, so that after the first pass the disk is not read at
            all.
        lookup_bytes: of the weights, those that no pass reads whole: tables of which an embedding takes some rows, where
            the engine does that where they lie.
        host_attention: the CPU attends to the KV in host memory, which then does not cross the link.
        kv_bytes_share: what compressed KV has of the bytes of `dtype_bytes` numbers; it moves, and is read, compressed.
        chosen_expert_bytes: bytes of experts, of the weights, where a decode step brings in only the chosen ones.
        attn_sparsity: share of the values that a decode step uses.
        slot_bytes: buffers that data passes through on its way: what they hold may have been loaded before the phase that
            needs it, or is stored after it.
    """

    batch_size: int
    weight_bytes: Mapping[str, int]
    kv_shares: Mapping[str, float] = field(default_factory=dict)
    kv_rows: Callable[[int], KVRows] | None = None
    dtype_bytes: int
    page_cached: bool = False
    lookup_bytes: Mapping[str, int] = field(default_factory=dict)
    host_attention: bool = False
    kv_bytes_share: float = 1.0
    chosen_expert_bytes: Mapping[str, int] = field(default_factory=dict)
    attn_sparsity: float = 1.0
    slot_bytes: int = 0

    def rows(self, spec: "ModelSpec", block: int) -> KVRows:
        """The KV of a block of so many sequences."""
        if self.kv_rows is not None:
            return self.kv_rows(block)
        layers = Counter(spec.sliding_window(layer) for layer in range(spec.num_layers))
        return {
            tier: {window: count * share * block for window, count in layers.items()}
            for tier, share in self.kv_shares.items()
        }


def traffic_of(plan: PlacementPlan) -> Traffic:
    """What lies where in a placement of our engine."""
    policy = plan.policy
    return Traffic(
        batch_size=min(policy.block_size, plan.workload.num_sequences),
        weight_bytes=plan.weights.by_tier,
        kv_rows=partial(_placed_rows, plan),
        dtype_bytes=plan.dtype_bytes,
        lookup_bytes=_looked_up(plan),
        host_attention=plan.attends_on_host,
        kv_bytes_share=plan.kv_bytes_share,
        chosen_expert_bytes=expert_bytes(plan.images).by_tier if policy.chosen_experts else {},
        attn_sparsity=policy.attn_sparsity,
        slot_bytes=plan.slot_bytes + plan.staging_bytes,
    )


def physical_limit(spec: "ModelSpec", workload: Workload, traffic: Traffic, rates: "Rates") -> CostEstimate:
    """The least time that the machine's measured rates allow for this plan."""

    def phases(block: int) -> tuple[Phase, Phase]:
        rows = traffic.rows(spec, block)
        prompts = _prompts(spec, workload, traffic, rows, block)
        if workload.gen_tokens == 1:
            return _at_best(prompts, traffic, rates), Phase()
        steps = _steps(spec, workload, traffic, rows, block)
        return _at_best(prompts, traffic, rates), _at_best(steps, traffic, rates)

    return cost_of_blocks(workload, traffic.batch_size, phases)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What the passes of a phase of a block must do at least. All but the first is of one pass, in the mean; by tier in bytes.

    Args:
        streamed: weights where they lie, `read` those that a pass computes with.
        exchanged: bytes of queries that go down to be attended to on the CPU; as many come up.
        early: of all passes together, what may be loaded before the phase; `late` what may be stored after it.
    """

    passes: int
    flops: float
    streamed: Mapping[str, float]
    read: float
    read_kv: Mapping[str, float] = field(default_factory=dict)
    new_kv: Mapping[str, float] = field(default_factory=dict)
    exchanged: float = 0.0
    early: float = 0.0
    late: float = 0.0


def _prompts(spec: "ModelSpec", workload: Workload, traffic: Traffic, rows: KVRows, block: int) -> _Work:
    prompt = workload.prompt_tokens
    stored: dict[str, float] = {}
    # KV that no step will read need not be stored, nor that before a window.
    if workload.gen_tokens > 1:
        stored = _kv_bytes(spec, traffic, rows, lambda window: min(prompt, window - 1) if window else prompt)
    return _Work(
        passes=1,
        flops=block * spec.prefill_flops(prompt),
        streamed=_whole(traffic),
        read=_read(spec, traffic),
        new_kv=stored,
        late=traffic.slot_bytes,
    )


def _steps(spec: "ModelSpec", workload: Workload, traffic: Traffic, rows: KVRows, block: int) -> _Work:
    """All of a step grows with the positions that it attends to, so that their mean gives the mean step."""
    steps = workload.gen_tokens - 1
    layers = Counter(spec.sliding_window(layer) for layer in range(spec.num_layers))
    scored, mixed = {}, {}
    for window in layers:
        counts = [
            min(window or context, context)
            for context in range(workload.prompt_tokens + 1, workload.prompt_tokens + steps + 1)
        ]
        scored[window] = sum(counts) / steps
        mixed[window] = sum(values_used(count, traffic.attn_sparsity) for count in counts) / steps
    streamed = _whole(traffic)
    if traffic.chosen_expert_bytes:
        idle = 1 - spec.expected_experts(block) / spec.num_experts
        streamed = {
            tier: size - idle * traffic.chosen_expert_bytes.get(tier, 0) for tier, size in streamed.items()
        }
    on_host = sum(rows.get("cpu", {}).values()) if traffic.host_attention else 0.0
    # The last position's key and value are made with its query.
    made = sum(count * (scored[window] - 1) for window, count in rows.get("inputs", {}).items())
    return _Work(
        passes=steps,
        flops=block
        * spec.step_flops(
            scored=sum(count * scored[window] for window, count in layers.items()),
            mixed=sum(count * mixed[window] for window, count in layers.items()),
        )
        + spec.key_value_flops(made),
        streamed=streamed,
        read=_read(spec, traffic),
        # A step's own key and value are at hand.
        read_kv=_kv_bytes(spec, traffic, rows, lambda window: (scored[window] + mixed[window]) / 2 - 1),
        # Those of the last step are read by none.
        new_kv=_kv_bytes(spec, traffic, rows, lambda _: (steps - 1) / steps),
        exchanged=on_host * exchange_row(spec, traffic.dtype_bytes).query,
        early=traffic.slot_bytes,
    )


def _whole(traffic: Traffic) -> dict[str, float]:
    """Bytes of the weights that a pass needs, where they lie."""
    return {tier: size - traffic.lookup_bytes.get(tier, 0) for tier, size in traffic.weight_bytes.items()}


def _read(spec: "ModelSpec", traffic: Traffic) -> float:
    """Bytes of weights that a pass reads: of a mixture of experts it may be no more than the experts of one token."""
    active = sum(traffic.weight_bytes.values()) * spec.active_parameters / spec.num_parameters
    return max(0.0, active - sum(traffic.lookup_bytes.values()))


def _kv_bytes(
    spec: "ModelSpec", traffic: Traffic, rows: KVRows, positions: Callable[[int], float]
) -> dict[str, float]:
    """Bytes by tier of so many positions' keys and values for each window."""
    row = 2 * spec.kv_size * traffic.dtype_bytes * traffic.kv_bytes_share
    input_row = spec.hidden_bytes(1, traffic.dtype_bytes)
    return {
        tier: (input_row if tier == "inputs" else row)
        * sum(count * positions(window) for window, count in windows.items())
        for tier, windows in rows.items()
    }


def _at_best(work: _Work, traffic: Traffic, rates: "Rates") -> Phase:
    """The slowest resource's seconds; and each one's, by its name."""
    passes, kv, new = work.passes, work.read_kv, work.new_kv
    cpu_kv, disk_kv = kv.get("cpu", 0.0) + kv.get("inputs", 0.0), kv.get("disk", 0.0)
    disk_weights = work.streamed.get("disk", 0.0)
    from_disk = max(0.0, passes * (disk_weights + disk_kv) - work.early)
    busy: Times = {"compute": passes * work.flops / rates.compute_flops_per_s}
    if traffic.page_cached:
        busy["page cache"] = from_disk / rates.cached_file_bytes_per_s
    else:
        to_disk = max(0.0, passes * new.get("disk", 0.0) - work.late)
        busy["disk"] = from_disk / rates.disk_read_bytes_per_s + to_disk / rates.disk_write_bytes_per_s
    touched = passes * (work.read + sum(kv.values()) + sum(new.values()))
    if rates.h2d_bytes_per_s is None or rates.d2h_bytes_per_s is None:
        busy["host memory"] = touched / rates.host_bytes_per_s
    else:
        on_host = kv.get("cpu", 0.0) if traffic.host_attention else 0.0
        lifted = work.streamed.get("cpu", 0.0) + disk_weights + cpu_kv - on_host + disk_kv
        stored = sum(new.values()) - new.get("gpu", 0.0)
        up = max(0.0, passes * lifted - work.early) + passes * work.exchanged
        down = max(0.0, passes * stored - work.late) + passes * work.exchanged
        busy["host to device link"] = up / rates.h2d_bytes_per_s
        busy["device to host link"] = down / rates.d2h_bytes_per_s
        busy["device memory"] = (touched - passes * on_host) / rates.device_bytes_per_s
        busy["host memory"] = (up + down + passes * on_host) / rates.host_in_all_bytes_per_s
    return Phase(seconds=max(busy.values()), busy=busy)


def _placed_rows(plan: PlacementPlan, block: int) -> KVRows:
    """Where the KV of a placement's block of so many sequences lies."""
    rows: dict[str, dict[int, float]] = {"gpu": {}, "cpu": {}, "inputs": {}, "disk": {}}
    sizes = micro_batch_sizes(block, plan.policy)
    for layer, splits in enumerate(plan.kv_splits):
        window = plan.spec.sliding_window(layer)
        # A smaller last block has fewer micro-batches.
        for split, size in zip(splits, sizes, strict=False):
            here = split.first(size)
            for tier, of_window in rows.items():
                of_window[window] = of_window.get(window, 0.0) + getattr(here, tier)
    return rows


def _looked_up(plan: PlacementPlan) -> dict[str, int]:
    """Bytes by tier of the embedding's tables, of which a pass reads some rows."""
    embed = plan.images[0]
    if not all(tensor.lookup for tensor in embed.tensors.values()):
        return {}
    return {"gpu": embed.gpu_bytes, "cpu": embed.cpu_bytes, "disk": embed.disk_bytes}
