"""Predicted against measured order of many policies, run for real on this machine: Kendall's tau, and the planner's choice.

    python benchmarks/planner_grid.py --model builtin --caps-gib 0.4 --out grid.json

Each policy is loaded once a round and all policies take turns, so that a drift of the machine hits all alike. Random
weights from the published dimensions; the time of a policy is that of the workload's blocks, prefill and decode.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.devices import resolve_device, resolve_dtype
from flexllmgen.engine import FlexEngine
from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import GiB
from flexllmgen.workload import Workload
from harness.builtin import builtin_path
from profiling.cost_model import engine_cost
from profiling.hardware import read_hardware
from profiling.profiler import take_profile
from strategies.choices import Limits
from strategies.search import find_policy


def policies(sequences: int) -> dict[str, Policy]:
    """Blocks x shares on disk x overlap: what a machine without an accelerator can choose between."""
    blocks = [(size, count) for size in (2, 4, 8, 16) for count in (1, 2, 4) if size * count <= sequences]
    grid = {}
    for (size, count), weights, kv, overlap in itertools.product(
        blocks, (0.0, 0.25, 0.5, 1.0), (0.0, 0.5), (0, 1)
    ):
        if overlap == 0 and (weights == 0.25 or kv):
            continue
        grid[f"{size}x{count} weights {weights:.0%} kv {kv:.0%} on disk, overlap {overlap}"] = Policy(
            micro_batch_size=size,
            num_micro_batches=count,
            weights=Placement(gpu=1 - weights, disk=weights),
            kv_cache=Placement(gpu=1 - kv, disk=kv),
            overlap=overlap,
        )
    return grid


def measure(
    spec: ModelSpec, policy: Policy, workload: Workload, ids: torch.Tensor, args: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of prefill and of decode over all blocks, after a warm-up block."""
    prefill = decode = 0.0
    with FlexEngine.load(
        spec,
        RandomCheckpoint(seed=0),
        policy,
        workload=workload,
        device=args.device,
        dtype=args.dtype,
        offload_dir=args.offload_dir,
    ) as engine:
        for column in engine.generate(ids[: policy.block_size], max_new_tokens=2):
            del column
        for start in range(0, len(ids), policy.block_size):
            times = [time.perf_counter()]
            columns = engine.generate(ids[start : start + policy.block_size])
            times += [time.perf_counter() for _ in columns]
            prefill += times[1] - times[0]
            decode += times[-1] - times[1]
    return prefill, decode


def model_spec(name: str, layers: int) -> ModelSpec:
    """A published model's dimensions, or the built-in one's."""
    own = builtin_path() / "config.json"
    config = json.loads(own.read_text()) if name == "builtin" else published_config(name)
    return ModelSpec.from_hf_config({**config, **({"num_hidden_layers": layers} if layers else {})}, name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--gen", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--offload-dir", default="/tmp/offload")
    parser.add_argument(
        "--caps-gib", type=float, nargs="*", default=[], help="memory that the planner may take"
    )
    parser.add_argument("--every", type=int, default=1, help="take each n-th policy")
    parser.add_argument("--out", default="grid.json")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    spec = model_spec(args.model, args.layers)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    folder = Path(args.offload_dir)
    folder.mkdir(parents=True, exist_ok=True)
    profile, warnings = take_profile(
        read_hardware(folder),
        spec,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        offload_dir=folder,
        cache=folder / "profiles",
        refresh=True,
    )
    print(
        {"warnings": warnings, "noisy": profile.noisy, "layer_spread": profile.layers[0].spread}, flush=True
    )
    workload = Workload(num_sequences=args.sequences, prompt_tokens=args.prompt, gen_tokens=args.gen)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, spec.vocab_size, (args.sequences, args.prompt), generator=generator)
    grid = dict(list(policies(args.sequences).items())[:: args.every])
    free = Limits(gpu_bytes=None, cpu_bytes=1 << 40, disk_bytes=1 << 40, shared=True)
    limits = {"unlimited": free}
    for cap in args.caps_gib:
        limits[f"{cap:g} GiB"] = dataclasses.replace(free, cpu_bytes=int(cap * GiB))
    chosen = {
        f"chosen for {name}": find_policy(
            spec, profile, workload, limit, dtype_bytes=dtype.itemsize, batch_size=args.sequences
        ).best.policy
        for name, limit in limits.items()
    }
    everything = {**grid, **chosen}
    # What is chosen may be one of the grid: then it is that one's measurement, not a second one of the same.
    measured: dict[Policy, list[tuple[float, float]]] = {policy: [] for policy in everything.values()}
    for _ in range(args.rounds):
        for policy, times in measured.items():
            times.append(measure(spec, policy, workload, ids, args))
    rows = {}
    for name, policy in everything.items():
        plan = plan_placement(spec, policy, workload, dtype.itemsize, in_place=device.type == "cpu")
        cost = engine_cost(plan, profile)
        assert cost is not None
        prefill, decode = (statistics.median(column) for column in zip(*measured[policy], strict=True))
        rows[name] = {
            "memory_gib": round((plan.gpu_bytes + plan.cpu_bytes) / GiB, 3),
            "prefill_s": [round(prefill, 4), round(cost.prefill_s, 4)],
            "decode_s": [round(decode, 4), round(cost.decode_s, 4)],
            "measured_tok_s": round(workload.output_tokens / (prefill + decode), 2),
            "predicted_tok_s": round(cost.generation_tok_s, 2),
        }
        print(name, rows[name], flush=True)
    truth, predicted = ([rows[name][f"{kind}_tok_s"] for name in grid] for kind in ("measured", "predicted"))
    errors = [abs(guess / real - 1) for real, guess in zip(truth, predicted, strict=True)]
    result = {
        "model": args.model,
        "workload": [args.sequences, args.prompt, args.gen],
        "rounds": args.rounds,
        "policies": len(grid),
        "kendall_tau": round(float(kendalltau(truth, predicted).statistic), 3),
        "median_error": round(statistics.median(errors), 3),
        "worst_error": round(max(errors), 3),
        # The planner's choice over the best of the grid that fits the same memory.
        "chosen_over_best": {
            name: round(
                rows[f"chosen for {name}"]["measured_tok_s"]
                / max(rows[row]["measured_tok_s"] for row in grid if fits(rows[row], limit)),
                3,
            )
            for name, limit in limits.items()
        },
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(result, indent=1))
    print({key: value for key, value in result.items() if key != "rows"})


def fits(row: dict[str, Any], limit: Limits) -> bool:
    return bool(row["memory_gib"] * GiB <= limit.cpu_bytes)


if __name__ == "__main__":
    main()
