"""One measurement of one engine in a process of its own: prints one JSON line.

    python benchmarks/engine_case.py ours --model opt-30b --gpu-gib 16 --batch 24 --batches 3 --kv-gpu 0
    python benchmarks/engine_case.py accelerate --model opt-30b --gpu-gib 16 --weights-gib 6 --batch 8
    python benchmarks/engine_case.py flexgen --model opt-30b --gpu-gib 16 --percent 20 80 0 100 0 100 --batch 48
    python benchmarks/engine_case.py links

Random weights, prompts of random tokens, greedy, no early stop. The first pass, of the same prompts, is a
generations only `--steps` columns are run; the rest is projected from the median step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "FlexLLMGen"))

GiB = 1 << 30


def main() -> None:
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


def figures(args: argparse.Namespace, sequences: int, start: float, stamps: list[float]) -> dict[str, Any]:
    """The common figures from the time of each column."""
    prefill = stamps[0] - start
    steps = [after - before for before, after in itertools.pairwise(stamps)]
    step = statistics.median(steps) if steps else 0.0
    measured = stamps[-1] - start
    total = measured if len(stamps) >= args.gen else prefill + (args.gen - 1) * step
    return {
        "sequences": sequences,
        "prompt": args.prompt,
        "gen": args.gen,
        "columns": len(stamps),
        "prefill_s": round(prefill, 3),
        "decode_step_s": round(step, 4),
        "decode_tok_s": round(sequences / step, 1) if step else None,
        "tok_s": round(sequences * args.gen / total, 2),
        "projected": len(stamps) < args.gen,
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GiB, 2)
        if torch.cuda.is_available()
        else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GiB, 2)
        if torch.cuda.is_available()
        else None,
        "rss_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20), 2),
    }


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
    out = figures(args, sequences, start, stamps)
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


class Clock:
    """A logits processor that notes when each column's logits are there."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        return scores


def accelerate(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' generate; layers beyond `--weights-gib` dispatched by accelerate's hooks."""
    import accelerate as hf_accelerate
    import transformers
    from accelerate.utils import set_module_tensor_to_device

    from flexllmgen.models.published import published_config

    torch.cuda.set_per_process_memory_fraction(
        args.gpu_gib * GiB / torch.cuda.get_device_properties(0).total_memory
    )
    config_dict = published_config(args.model)
    dtype = torch.float16 if config_dict["model_type"] == "opt" else torch.bfloat16
    config = transformers.AutoConfig.for_model(**config_dict)
    start = time.perf_counter()
    with hf_accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    device_map = hf_accelerate.infer_auto_device_map(
        model,
        max_memory={0: int(args.weights_gib * GiB), "cpu": 110 * GiB},
        no_split_module_classes=model._no_split_modules,
    )

    def place(name: str) -> Any:
        keys = [key for key in device_map if name == key or name.startswith(key + ".") or key == ""]
        return device_map[max(keys, key=len)]

    for name, parameter in list(model.named_parameters()):
        where = "cuda:0" if place(name) == 0 else "cpu"
        value = (torch.randn(parameter.shape, device="cuda", dtype=dtype) * 0.02).to(where)
        if "norm" in name and name.endswith("weight"):
            value += 1
        set_module_tensor_to_device(model, name, where, value=value, dtype=dtype)
    model.tie_weights()
    offloaded = len(set(device_map.values())) > 1
    model = hf_accelerate.dispatch_model(model, device_map=device_map) if offloaded else model.to("cuda")
    load_s = time.perf_counter() - start
    sequences = args.batch * args.batches
    ids = torch.randint(5, config.vocab_size - 100, (sequences, args.prompt), device="cuda")
    clock = Clock()
    common = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **common)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        start = time.perf_counter()
        count = min(args.steps, args.gen)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            logits_processor=transformers.LogitsProcessorList([clock]),
            **common,
        )
    out = figures(args, sequences, start, clock.stamps)
    return out | {"load_s": round(load_s, 1), "weights_gib": args.weights_gib}


def flexgen(args: argparse.Namespace) -> dict[str, Any]:
    """FlexGen 0.1.8 from the package index, its dummy weights."""
    import numpy as np
    from flexgen.flex_opt import CompressionConfig, OptLM, Policy
    from flexgen.opt_config import get_opt_config
    from flexgen.timer import timers
    from flexgen.utils import ExecutionEnv

    torch.cuda.set_per_process_memory_fraction(
        args.gpu_gib * GiB / torch.cuda.get_device_properties(0).total_memory
    )
    Path(args.dir).mkdir(parents=True, exist_ok=True)
    env = ExecutionEnv.create(args.dir)
    plain = {"num_bits": 4, "group_size": 64, "symmetric": False}
    policy = Policy(
        args.batch,
        args.batches,
        *args.percent,
        True,
        True,
        True,
        False,
        1.0,
        False,
        CompressionConfig(group_dim=0, **plain),
        False,
        CompressionConfig(group_dim=2, **plain),
    )
    start = time.perf_counter()
    model = OptLM(get_opt_config(f"facebook/{args.model}"), env, "_DUMMY_", policy)
    load_s = time.perf_counter() - start
    sequences = args.batch * args.batches
    model.generate(np.random.randint(5, 50000, (sequences, args.prompt)), max_new_tokens=1)
    timers("generate").reset()
    cut = args.steps if args.steps < args.gen else None
    model.generate(
        np.random.randint(5, 50000, (sequences, args.prompt)), max_new_tokens=args.gen, cut_gen_len=cut
    )
    stamps, now = [], 0.0
    for cost in timers("generate").costs:
        now += cost
        stamps.append(now)
    return figures(args, sequences, 0.0, stamps) | {"load_s": round(load_s, 1), "percent": args.percent}


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
