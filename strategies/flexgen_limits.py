"""Whether a placement fits the machine; if not, which of the user's keys and options would help.

The engine tells what is short, in bytes; what lowers it is known here by the names of the command line.
"""

from pathlib import Path

from flexllmgen.errors import PlanInfeasible
from flexllmgen.fits import Shortage, find_shortages
from flexllmgen.placement import PlacementPlan
from flexllmgen.units import gib
from strategies.base import Machine
from strategies.flexgen_config import SHORT, Config, share_key

_NOTABLE = 0.05
"""Share of the need up to which a part is not worth naming: lowering it is no way out."""


def check_limits(
    placement: PlacementPlan, machine: Machine, config: Config, folder: Path, free_bytes: int
) -> None:
    """Refuses what does not fit, before anything is loaded.

    Args:
        folder: where disk parts go.
        free_bytes: what they may take there.

    Raises:
        PlanInfeasible: naming what is short, its need and limit, and the keys and options that help.
    """
    shared = machine.shares_memory
    shortages = find_shortages(
        placement,
        gpu_bytes=machine.gpu_bytes,
        cpu_bytes=None if shared else machine.cpu_bytes,
        disk_free_bytes=free_bytes if placement.disk_bytes else None,
    )
    if shared and placement.gpu_bytes + placement.cpu_bytes > machine.cpu_bytes:
        shortages = (_shared_shortage(placement, machine.cpu_bytes), *shortages)
    if shortages:
        texts = (
            _disk_text(each, config, folder)
            if each.tier == "disk"
            else _memory_text(each, placement, machine, config)
            for each in shortages
        )
        raise PlanInfeasible("; also ".join(texts))


def _shared_shortage(placement: PlacementPlan, limit_bytes: int) -> Shortage:
    # Below nothing, so that both are short and told in full.
    gpu, cpu = find_shortages(placement, gpu_bytes=-1, cpu_bytes=-1)
    return Shortage(
        tier="cpu",
        need_bytes=gpu.need_bytes + cpu.need_bytes,
        limit_bytes=limit_bytes,
        parts={name: size + cpu.parts.get(name, 0) for name, size in gpu.parts.items()},
    )


def _disk_text(shortage: Shortage, config: Config, folder: Path) -> str:
    option = "--set path" if config.path else "--offload-dir"
    return (
        f"needs {gib(shortage.need_bytes)} in {folder} ({_made_of(shortage)}), "
        f"has {gib(shortage.limit_bytes)} free; free some, name another folder ({option}), "
        "or raise a share in memory (--set w_cpu_percent=...)"
    )


def _memory_text(shortage: Shortage, placement: PlacementPlan, machine: Machine, config: Config) -> str:
    if shortage.tier == "gpu":
        where = "on the compute device" if machine.device == "cpu" else "on the GPU"
        cap = "--gpu-mem" if machine.gpu_capped else ""
    else:
        where = "of memory" if machine.shares_memory else "of host memory"
        cap = "--cpu-mem" if machine.cpu_capped else ""
    ways = []
    if lower := _to_lower(shortage, machine, config):
        ways.append("lower " + ", ".join(lower))
    _, head, *layers = placement.images
    by_layers = layers[0].num_bytes > head.num_bytes or placement.dequantised_bytes > 0
    if "buffers" in _notable(shortage) and not config.sep_layer and by_layers:
        ways.append("--set sep_layer=true")
    if cap:
        ways.append(f"raise {cap}")
    return (
        f"needs {gib(shortage.need_bytes)} {where} ({_made_of(shortage)}), has {gib(shortage.limit_bytes)}; "
        + ", or ".join(ways or ["use a smaller model or a shorter --dtype"])
    )


def _to_lower(shortage: Shortage, machine: Machine, config: Config) -> list[str]:
    """What lowers the need, the largest part's first."""
    tiers = ("gpu", "cpu") if machine.shares_memory else (shortage.tier,)
    batch = "--set micro_batch_size" if config.micro_batch_size else "--batch-size"
    names: list[str] = []
    for part in _notable(shortage):
        if part in SHORT:
            keys = (share_key(part, tier) for tier in tiers)
            names += [f"--set {key}" for key in keys if getattr(config, key)]
        many = "--set num_micro_batches"
        if part in ("kv_cache", "activations") and config.num_micro_batches > 1 and many not in names:
            names.append(many)
        if part == "buffers" and config.overlap:
            names.append("--set overlap")
        if part not in ("weights", "buffers") and batch not in names:
            names.append(batch)
    return names


def _notable(shortage: Shortage) -> list[str]:
    """Names of the parts that matter, the largest first."""
    parts = sorted(shortage.parts.items(), key=lambda part: -part[1])
    return [name for name, size in parts if size > _NOTABLE * shortage.need_bytes]


def _made_of(shortage: Shortage) -> str:
    words = {"kv_cache": "KV cache"}
    return ", ".join(f"{words.get(name, name)} {gib(shortage.parts[name])}" for name in _notable(shortage))
