"""Predicted against measured order of many policies, run for real on this machine: Kendall's tau, and the planner's choice.

    python benchmarks/planner_grid.py --model SmolLM2-135M --out grid.json

Each policy is loaded once a round and all policies take turns, so that a drift of the machine hits all alike. Random
weights from the published dimensions; the time of a policy is that of the workload's blocks, prefill and decode.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.engine import FlexEngine, resolve_device, resolve_dtype
from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.cost_model import engine_cost
from profiling.hardware import read_hardware
from profiling.profiler import take_profile


def policies(sequences: int) -> list[Policy]:
    """Blocks x shares on disk x overlap: what a machine without an accelerator can choose between."""
    blocks = [(size, count) for size in (2, 4, 8, 16) for count in (1, 2, 4) if size * count <= sequences]
    grid = []
    for (size, count), weights, kv, overlap in itertools.product(blocks, (0.0, 0.4, 1.0), (0.0, 0.5), (0, 1)):
        if overlap == 0 and (weights == 0.4 or kv):
            continue
        grid.append(
            Policy(
                micro_batch_size=size,
                num_micro_batches=count,
                weights=Placement(gpu=1 - weights, disk=weights),
                kv_cache=Placement(gpu=1 - kv, disk=kv),
                overlap=overlap,
            )
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="SmolLM2-135M")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--gen", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--offload-dir", default="offload")
    parser.add_argument("--every", type=int, default=1, help="take each n-th policy")
    parser.add_argument("--out", default="grid.json")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    config = published_config(args.model)
    if args.layers:
        config["num_hidden_layers"] = args.layers
    spec = ModelSpec.from_hf_config(config, args.model)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    folder = Path(args.offload_dir)
    profile, _ = take_profile(
        read_hardware(folder),
        spec,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        offload_dir=folder,
        cache=folder / "profiles",
        refresh=False,
        on_progress=lambda *_: None,
    )
    workload = Workload(num_sequences=args.sequences, prompt_tokens=args.prompt, gen_tokens=args.gen)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, spec.vocab_size, (args.sequences, args.prompt), generator=generator)
    grid = policies(args.sequences)[:: args.every]
    measured: list[list[tuple[float, float]]] = [[] for _ in grid]
    rows = []
    for _ in range(args.rounds):
        for index, policy in enumerate(grid):
            measured[index].append(measure(spec, policy, workload, ids, args))
    for policy, times in zip(grid, measured, strict=True):
        plan = plan_placement(spec, policy, workload, dtype.itemsize, in_place=device.type == "cpu")
        cost = engine_cost(plan, profile)
        assert cost is not None
        prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {
                "micro_batch_size": policy.micro_batch_size,
                "num_micro_batches": policy.num_micro_batches,
                "weights_disk": policy.weights.disk,
                "kv_disk": policy.kv_cache.disk,
                "overlap": policy.overlap,
                "prefill_s": [round(prefill, 4), round(cost.prefill_s, 4)],
                "decode_s": [round(decode, 4), round(cost.decode_s, 4)],
                "measured_tok_s": round(workload.output_tokens / (prefill + decode), 2),
                "predicted_tok_s": round(cost.generation_tok_s, 2),
            }
        )
        print(rows[-1], flush=True)
    from scipy.stats import kendalltau

    truth, predicted = ([row[f"{kind}_tok_s"] for row in rows] for kind in ("measured", "predicted"))
    errors = [abs(guess / real - 1) for real, guess in zip(truth, predicted, strict=True)]
    result = {
        "model": args.model,
        "workload": [args.sequences, args.prompt, args.gen],
        "policies": len(rows),
        "kendall_tau": round(float(kendalltau(truth, predicted).statistic), 3),
        "median_error": round(statistics.median(errors), 3),
        "worst_error": round(max(errors), 3),
        "best_measured_tok_s": max(truth),
        "predicted_best_measured_tok_s": truth[predicted.index(max(predicted))],
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(result, indent=1))
    print({key: value for key, value in result.items() if key != "rows"})


if __name__ == "__main__":
    main()
