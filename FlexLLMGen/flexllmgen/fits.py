"""Whether a plan fits the machine, and in whose words it does not. Pure: looks at no machine."""

from collections.abc import Mapping
from dataclasses import dataclass

from flexllmgen.errors import PlanInfeasible
from flexllmgen.placement import PlacementPlan
from flexllmgen.policy import Tier
from flexllmgen.units import GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """A tier that is too small for a plan. Bytes; `parts` say what the need is made of and sum to it."""

    tier: Tier
    need_bytes: int
    limit_bytes: int
    parts: Mapping[str, int]


def check_fits(
    plan: PlacementPlan,
    *,
    gpu_bytes: int | None = None,
    cpu_bytes: int | None = None,
    disk_free_bytes: int | None = None,
) -> None:
    """Refuses a plan that needs more than there is, before anything is loaded.

    Raises:
        PlanInfeasible: naming every tier that is short, its need and its limit.
    """
    shortages = find_shortages(
        plan, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes, disk_free_bytes=disk_free_bytes
    )
    if shortages:
        raise PlanInfeasible("; also ".join(_explain(plan, each) for each in shortages))


def find_shortages(
    plan: PlacementPlan,
    *,
    gpu_bytes: int | None = None,
    cpu_bytes: int | None = None,
    disk_free_bytes: int | None = None,
) -> tuple[Shortage, ...]:
    """The tiers that are too small for a plan, with what their need is made of; None sets no limit."""

    def parts(tier: Tier, **others: int) -> dict[str, int]:
        placed = {
            name: int(getattr(sizes, tier))
            for name, sizes in (
                ("weights", plan.weights),
                ("kv_cache", plan.kv_cache),
                ("activations", plan.activations),
            )
        }
        return {**placed, **others}

    slots = plan.slot_bytes
    tiers: tuple[tuple[Tier, int, int | None, dict[str, int]], ...] = (
        (
            "gpu",
            plan.gpu_bytes,
            gpu_bytes,
            parts("gpu", buffers=0 if plan.in_place else slots, workspace=plan.workspace_bytes),
        ),
        (
            "cpu",
            plan.cpu_bytes,
            cpu_bytes,
            parts("cpu", buffers=plan.staging_bytes + plan.exchange_bytes + (slots if plan.in_place else 0)),
        ),
        ("disk", plan.disk_bytes, disk_free_bytes, parts("disk")),
    )
    return tuple(
        Shortage(tier=tier, need_bytes=need, limit_bytes=limit, parts=made_of)
        for tier, need, limit, made_of in tiers
        if limit is not None and need > limit
    )


def _explain(plan: PlacementPlan, shortage: Shortage) -> str:
    """A shortage in the words of the policy's fields."""
    need, limit = shortage.need_bytes / GiB, shortage.limit_bytes / GiB
    made_of = ", ".join(f"{name} {size / GiB:.2f}" for name, size in shortage.parts.items() if size)
    if shortage.tier == "disk":
        return (
            f"needs {need:.2f} GiB in the offload directory ({made_of}), has {limit:.2f}; "
            "free some or choose another directory"
        )
    where = "of host memory"
    if shortage.tier == "gpu":
        where = "on the compute device" if plan.in_place else "on the GPU"
    fields = [
        f"{name}.{shortage.tier}" for name in ("weights", "kv_cache", "activations") if shortage.parts[name]
    ]
    return (
        f"needs {need:.2f} GiB {where} ({made_of}), has {limit:.2f}; "
        f"lower {', '.join([*fields, 'micro_batch_size or overlap'])}"
    )
