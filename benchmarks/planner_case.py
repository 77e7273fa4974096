"""One model under caps and workloads: what autoflex chooses, and policies written by hand, predicted and measured.

    python benchmarks/planner_case.py --model opt-6.7b --gpu-gib 8 16 --sequences 192 --workloads 512/32 128/128

Random weights and prompts. Of each policy one block is run, after a warm-up of one micro-batch; of long generations only
`--steps` decode steps, the rest projected from their median; predictions are of the very same steps, projected alike.
All blocks of a workload being alike, its throughput is that of the block (a ragged last one counts as predicted). Prints
one JSON line per policy.

With `--alias-mib` host memory of equal size is shared by several layers: a large model loads in seconds and runs as fast as
it would, with tokens that mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

import flexllmgen.engine
from flexllmgen.checkpoint import RandomCheckpoint
from flexllmgen.engine import FlexEngine
from flexllmgen.errors import OffloadError
from flexllmgen.fits import check_fits
from flexllmgen.memory.arena import HostArena, Region
from flexllmgen.models.published import published_config
from flexllmgen.placement import PlacementPlan, micro_batch_sizes, plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.units import PAGE, GiB, round_up
from flexllmgen.workload import Workload
from profiling.calibration import Calibration, calibrate, corrected
from profiling.cost_model import Traffic, engine_cost, physical_limit
from profiling.hardware import available_memory_bytes, free_disk_bytes, read_hardware
from profiling.layer_times import layer_times_for
from profiling.profile import HardwareProfile
from profiling.profiler import take_profile
from profiling.simulation import simulate_block
from strategies.flexgen_engine import lookup_bytes
from strategies.placement_program import Limits
from strategies.search import find_policy

# FlexGen's percentages (weights on GPU, CPU; KV on GPU, CPU), micro-batch, number of micro-batches. The first three are
# from its paper and scripts for these sizes; the others are what one would try by hand.
BY_HAND: dict[str, tuple[int, int, int, int, int, int]] = {
    "flexgen 20 80 0 100 48x3": (20, 80, 0, 100, 48, 3),
    "flexgen 20 80 0 100 32x4": (20, 80, 0, 100, 32, 4),
    "flexgen 0 100 0 100 48x1": (0, 100, 0, 100, 48, 1),
    "hand 0 100 0 100 24x4": (0, 100, 0, 100, 24, 4),
    "hand 10 90 0 100 24x4": (10, 90, 0, 100, 24, 4),
    "hand 50 50 0 100 16x4": (50, 50, 0, 100, 16, 4),
    "hand 20 80 50 50 16x2": (20, 80, 50, 50, 16, 2),
    "hand 0 100 100 0 8x2": (0, 100, 100, 0, 8, 2),
    "hand 40 60 20 80 32x2": (40, 60, 20, 80, 32, 2),
    "hand 10 90 10 90 64x2": (10, 90, 10, 90, 64, 2),
}


class AliasedArena(HostArena):
    """Regions of about the same size take turns in `alias_bytes` of memory: more than any cache holds."""

    alias_bytes = 0

    def __init__(self, *, register: bool) -> None:
        super().__init__(register=register)
        self._rings: dict[int, list[Region]] = {}
        self._asked: dict[int, int] = {}
        self.asked_bytes = 0

    def reserve(self, num_bytes: int, *, pinned: bool = True) -> Region:
        room = round_up(num_bytes, 1 << 20)
        ring = self._rings.setdefault(room, [])
        turn = self._asked[room] = self._asked.get(room, -1) + 1
        self.asked_bytes += round_up(num_bytes, PAGE)
        if not num_bytes or len(ring) * room < self.alias_bytes:
            ring.append(super().reserve(room if num_bytes else 0, pinned=pinned))
        return Region(ring[turn % len(ring)].offset, num_bytes)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="opt-6.7b")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--gpu-gib", type=float, nargs="+", default=[0.0])
    parser.add_argument("--cpu-gib", type=float, default=0)
    parser.add_argument("--sequences", type=int, default=192)
    parser.add_argument("--workloads", nargs="+", default=["512/32"], help="prompt/generated tokens")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--policies", default="all", help="auto, naive and hand, comma-separated, or all")
    parser.add_argument("--seconds", type=float, default=300, help="begin no policy after that")
    parser.add_argument("--offload-dir", default="/tmp/offload")
    parser.add_argument("--profiles", default="/tmp/profiles")
    parser.add_argument("--alias-mib", type=int, default=0, help="see above; 0: every byte is there")
    args = parser.parse_args()
    if args.alias_mib:
        AliasedArena.alias_bytes = args.alias_mib << 20
        flexllmgen.engine.HostArena = AliasedArena  # type: ignore[misc]
    started = time.time()
    config = published_config(args.model)
    if args.layers:
        config["num_hidden_layers"] = args.layers
    spec = ModelSpec.from_hf_config(config, args.model)
    profile = measured_profile(spec, args)
    wanted = ["auto", "naive", "hand"] if args.policies == "all" else args.policies.split(",")
    for workload in args.workloads:
        prompt, generated = (int(part) for part in workload.split("/"))
        for cap in args.gpu_gib:
            case = Case(spec, profile, cap, prompt, generated, args)
            for name, policy in case.policies(wanted):
                outcome = (
                    {"error": "out of time"}
                    if time.time() - started > args.seconds
                    else case.run(policy, probed=name != "naive" and name not in BY_HAND)
                )
                print(json.dumps({**case.name, "policy": name, **outcome}), flush=True)


def measured_profile(spec: ModelSpec, args: argparse.Namespace) -> HardwareProfile:
    folder = Path(args.offload_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device, dtype = DEVICE, str(DTYPE).removeprefix("torch.")
    began = time.time()
    profile, warnings = take_profile(
        read_hardware(folder),
        spec,
        device=device,
        dtype=dtype,
        offload_dir=folder,
        cache=Path(args.profiles),
    )
    rates = {name: round(each.median / 1e9, 2) for name, each in profile.measurements.items()}
    took = round(time.time() - began, 1)
    print(
        json.dumps({"model": args.model, "profile_s": took, "warnings": warnings, "rates_1e9": rates}),
        flush=True,
    )
    return profile


class Case:
    """A model and workload on this machine."""

    def __init__(
        self,
        spec: ModelSpec,
        profile: HardwareProfile,
        gpu_gib: float,
        prompt: int,
        generated: int,
        args: argparse.Namespace,
    ) -> None:
        self.spec, self.profile, self.args = spec, profile, args
        self.device, self.dtype = DEVICE, DTYPE
        self.workload = Workload(num_sequences=args.sequences, prompt_tokens=prompt, gen_tokens=generated)
        self.name: dict[str, Any] = {
            "model": args.model,
            "gpu_gib": gpu_gib,
            "workload": [args.sequences, prompt, generated],
        }
        self.limits = Limits(
            gpu_bytes=int(gpu_gib * GiB) or None,
            cpu_bytes=int(args.cpu_gib * GiB) or available_memory_bytes() * 9 // 10,
            disk_bytes=free_disk_bytes(Path(args.offload_dir)) * 9 // 10,
            shared=self.device == "cpu" and not gpu_gib,
        )

    def policies(self, wanted: list[str]) -> list[tuple[str, Policy]]:
        found = []
        if "auto" in wanted:
            began = time.time()
            best = find_policy(
                self.spec,
                self.profile,
                self.workload,
                self.limits,
                dtype_bytes=self.dtype.itemsize,
                batch_size=8,
            )
            print(
                json.dumps(
                    {**self.name, "search_s": round(time.time() - began, 2), "gap": round(best.gap, 3)}
                ),
                flush=True,
            )
            found.append(("autoflex", best.best.policy))
        if "naive" in wanted:
            found.append(("naive", self.naive()))
        for name, (w_gpu, w_cpu, c_gpu, c_cpu, size, count) in BY_HAND.items():
            if "hand" in wanted or name in wanted:
                found.append(
                    (
                        name,
                        Policy(
                            micro_batch_size=size,
                            num_micro_batches=count,
                            weights=Placement.from_percent(w_gpu, w_cpu),
                            kv_cache=Placement.from_percent(c_gpu, c_cpu),
                        ),
                    )
                )
        return found

    def naive(self) -> Policy:
        """Fill the GPU with weights, a batch's KV beside them, the rest of the weights in host memory."""
        for percent in range(100, -1, -1):
            policy = Policy(micro_batch_size=8, weights=Placement.from_percent(percent, 100 - percent))
            if self.limits.fits(self.place(policy)):
                return policy
        return policy

    def place(self, policy: Policy) -> PlacementPlan:
        return plan_placement(
            self.spec,
            policy,
            self.workload,
            self.dtype.itemsize,
            in_place=self.device == "cpu",
            gpu_cap_bytes=self.limits.gpu_bytes,
        )

    def run(self, policy: Policy, *, probed: bool) -> dict[str, Any]:
        plan = self.place(policy)
        shares = [round(100 * share, 1) for kind in (policy.weights, policy.kv_cache, policy.activations)
                  for share in (kind.gpu, kind.cpu, kind.disk)]  # fmt: skip
        result: dict[str, Any] = {
            "cut": f"{policy.micro_batch_size}x{policy.num_micro_batches}",
            "overlap": policy.overlap,
            "sep_layer": policy.sep_layer,
            "shares": shares,
        }
        try:
            check_fits(plan, gpu_bytes=self.limits.gpu_bytes, cpu_bytes=self.limits.cpu_bytes)
            return {**result, **self.measured(policy, plan, probed=probed)}
        except OffloadError as error:
            return {**result, "error": str(error).splitlines()[0][:200]}
        except torch.OutOfMemoryError as error:
            return {**result, "error": "OUT OF MEMORY " + str(error)[:150]}
        finally:
            gc.collect()

    def measured(self, policy: Policy, plan: PlacementPlan, *, probed: bool) -> dict[str, Any]:
        block = min(policy.block_size, self.workload.num_sequences)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(
            5, self.spec.vocab_size, (block, self.workload.prompt_tokens), generator=generator
        )
        began = time.time()
        with FlexEngine.load(
            self.spec,
            RandomCheckpoint(seed=0),
            policy,
            workload=self.workload,
            device=self.device,
            dtype=self.dtype,
            offload_dir=self.args.offload_dir,
            gpu_bytes=self.limits.gpu_bytes,
            cpu_bytes=self.limits.cpu_bytes,
        ) as engine:
            load_s = time.time() - began
            for _ in engine.generate(ids[: policy.micro_batch_size], max_new_tokens=1):
                pass
            began = time.time()
            probe = engine.probe() if probed else None
            probe_s = time.time() - began
            steps = min(self.args.steps, self.workload.gen_tokens - 1)
            times = [time.perf_counter()]
            times += [time.perf_counter() for _ in engine.generate(ids, max_new_tokens=1 + steps)]
            stats = engine.stats()
            asked = getattr(engine._arena, "asked_bytes", stats.host_bytes)
            used = torch.cuda.mem_get_info() if self.device == "cuda" else (0, 0)
        prefill, gaps = times[1] - times[0], [b - a for a, b in itertools.pairwise(times[1:])]
        step = statistics.median(gaps[1:] or gaps)
        # The first step records what the others replay, and finds loads that ran while the prompt did.
        calibration = Calibration() if probe is None else calibrate(plan, self.profile, probe)
        predicted = self.predicted(plan, block, steps, self.profile)
        calibrated = self.predicted(plan, block, steps, corrected(self.profile, calibration, plan))
        decode = self.workload.gen_tokens - 1
        tokens = block * self.workload.gen_tokens * self.ragged(policy, plan)
        measured = tokens / (prefill + decode * step)
        shares = plan.kv_cache.shares
        traffic = Traffic(
            batch_size=block,
            weight_bytes={tier: getattr(plan.weights, tier) for tier in ("gpu", "cpu", "disk")},
            kv_shares={"gpu": shares.gpu, "cpu": shares.cpu, "disk": shares.disk},
            dtype_bytes=plan.dtype_bytes,
            lookup_bytes=lookup_bytes(plan),
        )
        run = Workload(num_sequences=block, prompt_tokens=self.workload.prompt_tokens, gen_tokens=1 + steps)
        best = physical_limit(self.spec, run, traffic, self.profile.best)
        limit = tokens / (best.prefill_s + decode * best.decode_s / max(1, steps))
        guess = tokens / (predicted[0] + decode * predicted[1])
        cost = engine_cost(plan, self.profile)
        assert cost is not None
        return {
            "tok_s": round(measured, 2),
            "predicted_tok_s": round(guess, 2),
            "error": None,
            "prediction_error": round(guess / measured - 1, 3),
            "calibrated_error": round(tokens / (calibrated[0] + decode * calibrated[1]) / measured - 1, 3),
            "calibration": [round(x, 3) for x in (calibration.pace, calibration.link, calibration.disk)],
            "limit_tok_s": round(limit, 2),
            "prefill_s": [round(prefill, 3), round(predicted[0], 3)],
            "step_s": [round(step, 4), round(predicted[1], 4)],
            "bound": cost.decode_bound,
            "planned_gpu_gib": round(plan.gpu_bytes / GiB, 3),
            "peak_gpu_gib": round(stats.device_reserved_peak_bytes / GiB, 3),
            "planned_host_gib": round(plan.cpu_bytes / GiB, 3),
            "host_gib": round(asked / GiB, 3),
            "gpu_used_gib": round((used[1] - used[0]) / GiB, 3),
            "probe_s": round(probe_s, 1),
            "gaps_s": [round(gap, 4) for gap in gaps[:3]],
            "load_s": round(load_s, 1),
        }

    def predicted(
        self, plan: PlacementPlan, block: int, steps: int, profile: HardwareProfile
    ) -> tuple[float, float]:
        """Seconds of the prompt's pass and of a step, for the very steps that are measured."""
        layers = layer_times_for(self.spec, profile.layers)
        assert layers is not None
        passes = simulate_block(
            plan,
            layers,
            profile.typical,
            micro_batches=micro_batch_sizes(block, plan.policy),
            contexts=[self.workload.prompt_tokens + step for step in range(1, steps + 1)],
        )
        return passes.seconds[0], statistics.median(passes.seconds[2:] or passes.seconds[1:])

    def ragged(self, policy: Policy, plan: PlacementPlan) -> float:
        """Throughput of all blocks over that of the full ones, as predicted: 1 where they come out even."""
        if (
            self.workload.num_sequences % policy.block_size == 0
            or policy.block_size > self.workload.num_sequences
        ):
            return 1.0
        full = dataclasses.replace(self.workload, num_sequences=policy.block_size)
        costs = [engine_cost(each, self.profile) for each in (plan, dataclasses.replace(plan, workload=full))]
        assert costs[0] is not None
        assert costs[1] is not None
        return costs[0].generation_tok_s / costs[1].generation_tok_s


if __name__ == "__main__":
    main()
