"""One measurement of one engine in a process of its own: prints one JSON line.

    python benchmarks/engine_case.py ours --model opt-30b --gpu-gib 16 --batch 24 --batches 3 --kv-gpu 0
    python benchmarks/engine_case.py accelerate --model opt-30b --gpu-gib 16 --weights-gib 6 --batch 8
    python benchmarks/engine_case.py flexgen --model opt-30b --gpu-gib 16 --percent 20 80 0 100 0 100 --batch 48
    python benchmarks/engine_case.py links

Random weights, prompts of random tokens, greedy, no early stop. The first pass is a warm-up. Of long
generations only `--steps` columns are run; the rest is projected from the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "FlexLLMGen"))

from peers import accelerate_hooks, flexgen_original
from peers.case import Case, figures
from processes import end_with_parent

GiB = 1 << 30


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=["ours", "accelerate", "flexgen", "links"])
    parser.add_argument("--model", default="opt-30b")
    parser.add_argument("--gpu-gib", type=float, default=16)
    parser.add_argument("--weights-gib", type=float, default=6, help="accelerate: device map's share")
    parser.add_argument("--percent", type=int, nargs=6, default=[20, 80, 0, 100, 0, 100])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--weights-gpu", default="fit", help="share of weights on the device, or 'fit'")
    parser.add_argument("--weights-disk", type=float, default=0.0)
    parser.add_argument("--kv-gpu", type=float, default=0.0)
    parser.add_argument("--act-gpu", type=float, default=1.0)
    parser.add_argument("--overlap", type=int, default=1)
    parser.add_argument("--sep-layer", action="store_true")
    parser.add_argument("--dir", default="/tmp/offload")
    parser.add_argument("--trace", default="", help="write a chrome trace of two decode steps here")
    parser.add_argument("--drop-cache", action="store_true")
    args = parser.parse_args()
    result = {"ours": ours, "accelerate": accelerate, "flexgen": flexgen, "links": links}[args.engine](args)
    print(
        json.dumps({"engine": args.engine, "model": args.model, "gpu_gib": args.gpu_gib, **result}),
        flush=True,
    )
    os._exit(0)


def case_of(args: argparse.Namespace, *, batch: int, batches: int) -> Case:
    """The options as the peers take them."""
    return Case(
        model=args.model,
        gpu_gib=args.gpu_gib,
        sequences=args.batch * args.batches,
        prompt=args.prompt,
        gen=args.gen,
        steps=args.steps - 1,
        batch=batch,
        batches=batches,
        weights_gib=args.weights_gib,
        percent=tuple(args.percent),
        offload_dir=args.dir,
    )


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from flexllmgen.checkpoint import RandomCheckpoint
    from flexllmgen.engine import FlexEngine
    from flexllmgen.models.published import published_config
    from flexllmgen.placement import plan_placement
    from flexllmgen.policy import Placement, Policy
    from flexllmgen.spec import ModelSpec
    from flexllmgen.workload import Workload

    spec = ModelSpec.from_hf_config(published_config(args.model), name=args.model)
    sequences = args.batch * args.batches
    workload = Workload(num_sequences=sequences, prompt_tokens=args.prompt, gen_tokens=args.gen)
    cap = int(args.gpu_gib * GiB)

    def policy(weights_gpu: float) -> Policy:
        disk = min(args.weights_disk, 1 - weights_gpu)
        return Policy(
            micro_batch_size=args.batch,
            num_micro_batches=args.batches,
            weights=Placement(gpu=weights_gpu, cpu=max(0.0, 1 - weights_gpu - disk), disk=disk),
            kv_cache=Placement(gpu=args.kv_gpu, cpu=1 - args.kv_gpu),
            activations=Placement(gpu=args.act_gpu, cpu=1 - args.act_gpu),
            overlap=args.overlap,
            sep_layer=args.sep_layer,
        )

    if args.weights_gpu == "fit":
        low, high = 0, 200
        while low < high:
            middle = (low + high + 1) // 2
            plan = plan_placement(spec, policy(middle / 200), workload, 2, gpu_cap_bytes=int(cap * 0.985))
            low, high = (middle, high) if plan.gpu_bytes <= cap * 0.985 else (low, middle - 1)
        share = low / 200
    else:
        share = float(args.weights_gpu)
    start = time.perf_counter()
    engine = FlexEngine.load(
        spec,
        RandomCheckpoint(),
        policy(share),
        workload=workload,
        dtype="float16" if spec.family == "opt" else "bfloat16",
        offload_dir=args.dir,
        gpu_bytes=cap,
    )
    load_s = time.perf_counter() - start
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, spec.vocab_size - 100, (sequences, args.prompt), generator=generator)
    # The warm-up finds the kernels for the shapes to come, and records the decode step where it can.
    for _ in engine.generate(ids, max_new_tokens=3):
        pass
    if args.drop_cache:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    before_load = engine.stats()
    start, stamps, moved = time.perf_counter(), [], []
    for _ in engine.generate(ids, max_new_tokens=min(args.steps, args.gen)):
        stamps.append(time.perf_counter())
        moved.append(engine.stats())
    out = figures(case_of(args, batch=args.batch, batches=args.batches), sequences, start, stamps)
    decode_s = stamps[-1] - stamps[0]
    plan, stats = engine.placement, engine.stats()
    placed = plan.weights.cpu + plan.kv_cache.cpu + plan.activations.cpu
    out |= {
        "load_s": round(load_s, 1),
        "weights_gpu": share,
        "policy": plan.describe(),
        "micro_batches": f"{args.batch}x{args.batches}",
        "h2d_decode_gb_s": round((moved[-1].h2d_bytes - moved[0].h2d_bytes) / decode_s / 1e9, 2)
        if decode_s
        else 0,
        "disk_decode_gb_s": round((moved[-1].disk_read_bytes - moved[0].disk_read_bytes) / decode_s / 1e9, 3)
        if decode_s
        else 0,
        "h2d_prefill_gb": round((moved[0].h2d_bytes - before_load.h2d_bytes) / 1e9, 2),
        "planned_gpu_gib": round(plan.gpu_bytes / GiB, 2),
        "arena_gib": round(stats.host_bytes / GiB, 2),
        "host_over_policy": round(stats.host_bytes / placed - 1, 4) if placed else None,
        "pinned_gib": round(stats.pinned_bytes / GiB, 2),
    }
    if args.trace:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in engine.generate(ids[:, :64], max_new_tokens=3):
                pass
        profiler.export_chrome_trace(args.trace)
        rows = profiler.key_averages()
        top = sorted(rows, key=lambda row: -row.self_device_time_total)[:12]
        out["top"] = {row.key[:60]: [row.count, round(row.self_device_time_total / 1e3, 2)] for row in top}
    return out


def accelerate(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' generate; layers beyond `--weights-gib` dispatched by accelerate's hooks."""
    return accelerate_hooks.run(case_of(args, batch=args.batch * args.batches, batches=1))


def flexgen(args: argparse.Namespace) -> dict[str, Any]:
    """FlexGen 0.1.8 from the package index, its dummy weights."""
    return flexgen_original.run(case_of(args, batch=args.batch, batches=args.batches))


def links(args: argparse.Namespace) -> dict[str, Any]:
    """Rates that the rows are held against: copies up and both ways, direct reads from disk."""
    pinned = [torch.empty(GiB, dtype=torch.uint8, pin_memory=True).fill_(7) for _ in range(2)]
    there = [torch.empty(GiB, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def rate(both: bool) -> float:
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.cuda.stream(streams[0]):
                there[0].copy_(pinned[0], non_blocking=True)
            if both:
                with torch.cuda.stream(streams[1]):
                    pinned[1].copy_(there[1], non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return round(GiB / statistics.median(times) / 1e9, 2)

    return {"h2d_gb_s": rate(False), "each_way_gb_s": rate(True), "disk_read_gb_s": disk_rate(Path(args.dir))}


def disk_rate(folder: Path) -> float:
    """Direct reads of a file of random bytes by four threads, the median of three passes."""
    from flexllmgen.memory.disk import DirectFile, DiskPool, wait_all
    from flexllmgen.memory.pack import aligned_empty
    from flexllmgen.memory.transfer import Traffic

    folder.mkdir(parents=True, exist_ok=True)
    size, path = 2 * GiB, folder / "rate.bin"
    memory = aligned_empty(size)
    memory.copy_(torch.randint(0, 256, (64 << 20,), dtype=torch.uint8).repeat(size // (64 << 20)))
    file = DirectFile(path, writable=True, size=size)
    file.write(memory, 0)
    file.sync()
    pool, times = DiskPool(Traffic()), []
    for _ in range(3):
        start = time.perf_counter()
        wait_all(pool.read(file, memory, 0))
        times.append(time.perf_counter() - start)
    path.unlink()
    return round(size / statistics.median(times) / 1e9, 3)


if __name__ == "__main__":
    main()
