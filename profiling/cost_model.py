"""How long a plan takes: the phases of its blocks, and what our engine's schedule comes to on a machine.

The physical limit is limit.py's; both are told as a CostEstimate, so that they stand side by side.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexllmgen.placement import PlacementPlan
from flexllmgen.splits import micro_batch_sizes
from flexllmgen.workload import Workload
from profiling.layer_times import layer_times_for

if TYPE_CHECKING:
    from profiling.profile import HardwareProfile

Times = dict[str, float]
"""Seconds that each resource is busy, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """The prompts or the decode steps of a block: seconds, and by name how long each resource is busy and bytes moved."""

    seconds: float = 0.0
    busy: Mapping[str, float] = field(default_factory=dict)
    moved: Mapping[str, float] = field(default_factory=dict)


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

    @property
    def seconds(self) -> float:
        """Of both phases."""
        return self.prefill_s + self.decode_s


def engine_cost(plan: PlacementPlan, profile: "HardwareProfile") -> CostEstimate | None:
    """What our engine should take for this placement: its schedule, simulated at the machine's typical rates.

    Of a block's decode steps the first, one in the middle and the last are simulated: the first finds loads done
    while the prompt was read, the last starts none, and those between grow as good as linearly with the
    context. Where few layers are brought in many ahead, more steps than one differ at either end. None where no layer of any
    model was timed on the machine.
    """
    from profiling.simulation import simulate_block

    times = layer_times_for(plan.spec, profile.layers)
    if times is None:
        return None
    steps = _sampled_steps(plan)

    def phases(block: int) -> tuple[Phase, Phase]:
        passes = simulate_block(
            plan,
            times,
            profile.typical,
            micro_batches=micro_batch_sizes(block, plan.policy),
            contexts=[plan.workload.prompt_tokens + step for step in steps],
        )
        prompts, *sampled = (
            Phase(seconds=seconds, busy=busy, moved=moved)
            for seconds, busy, moved in zip(passes.seconds, passes.busy, passes.moved, strict=True)
        )
        return prompts, sum_phases(zip(steps.values(), sampled, strict=True))

    return cost_of_blocks(
        plan.workload,
        plan.policy.block_size,
        phases,
        peak_bytes={"gpu": plan.gpu_bytes, "cpu": plan.cpu_bytes, "disk": plan.disk_bytes},
    )


def least_seconds(plan: PlacementPlan, profile: "HardwareProfile") -> float:
    """Seconds that `engine_cost` says at least, for a small part of what that takes; 0 where it knows nothing."""
    from profiling.least_time import least_block

    times = layer_times_for(plan.spec, profile.layers)
    if times is None:
        return 0.0
    steps = _sampled_steps(plan)

    def phases(block: int) -> tuple[Phase, Phase]:
        prompt_s, *steps_s = least_block(
            plan,
            times,
            profile.typical,
            micro_batches=micro_batch_sizes(block, plan.policy),
            contexts=[plan.workload.prompt_tokens + step for step in steps],
        )
        decode_s = sum(count * seconds for count, seconds in zip(steps.values(), steps_s, strict=True))
        return Phase(seconds=prompt_s), Phase(seconds=decode_s)

    return cost_of_blocks(plan.workload, plan.policy.block_size, phases).seconds


def _sampled_steps(plan: PlacementPlan) -> dict[int, int]:
    """The decode steps that are simulated, from 1 on, and how many each stands for."""
    steps, ends = plan.workload.gen_tokens - 1, 1 + 4 * plan.policy.overlap // len(plan.stages)
    if steps <= 2 * ends + 1:
        return dict.fromkeys(range(1, steps + 1), 1)
    first, last = range(1, ends + 1), range(steps - ends + 1, steps + 1)
    return {**dict.fromkeys(first, 1), (1 + steps) // 2: steps - 2 * ends, **dict.fromkeys(last, 1)}


def cost_of_blocks(
    workload: Workload,
    block_size: int,
    phases: Callable[[int], tuple[Phase, Phase]],
    *,
    peak_bytes: Mapping[str, int] | None = None,
) -> CostEstimate:
    """Adds up the blocks of a workload.

    Args:
        phases: prompts and decode steps of a block of so many sequences; asked once for each size that there is.
    """
    full, ragged = divmod(workload.num_sequences, block_size)
    blocks = [(count, *phases(size)) for count, size in ((full, block_size), (1, ragged)) if count and size]
    prefill = sum_phases((count, prompts) for count, prompts, _ in blocks)
    decode = sum_phases((count, steps) for count, _, steps in blocks)
    return CostEstimate(
        prefill_s=prefill.seconds,
        decode_s=decode.seconds,
        generation_tok_s=workload.output_tokens / (prefill.seconds + decode.seconds),
        prefill_bound=_binding(prefill),
        decode_bound=_binding(decode),
        prefill_busy_s=prefill.busy,
        decode_busy_s=decode.busy,
        prefill_moved_bytes=prefill.moved,
        decode_moved_bytes=decode.moved,
        peak_bytes=peak_bytes or {},
    )


def sum_phases(phases: Iterable[tuple[int, Phase]]) -> Phase:
    """So many of each, one after another."""
    seconds, busy, moved = 0.0, dict[str, float](), dict[str, float]()
    for count, phase in phases:
        seconds += count * phase.seconds
        for sums, each in ((busy, phase.busy), (moved, phase.moved)):
            for name, amount in each.items():
                sums[name] = sums.get(name, 0.0) + count * amount
    return Phase(seconds=seconds, busy=busy, moved=moved)


def _binding(phase: Phase) -> str:
    return max(phase.busy, key=lambda name: phase.busy[name]) if phase.busy else "none"
