"""One model under caps and workloads: what autoflex chooses, and policies written by hand, predicted and measured.

    python benchmarks/planner_case.py --model opt-6.7b --gpu-gib 8 16 --sequences 192 --workloads 512/32 128/128

Random weights and prompts. Of each policy one block is run, after a warm-up of one micro-batch; of long generations only
`--steps` decode steps, the rest projected from their median; predictions are of the very same steps, projected alike.
A policy by hand that is placed and cut alike under several caps runs once, and its row says under which.
All blocks of a workload being alike, its throughput is that of the block (a ragged last one counts as predicted). Prints
one JSON line per policy.

With `--alias-mib` host memory of equal size is shared by several layers: a large model loads in seconds and runs as fast as
it would, with tokens that mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

from policy_run import (
    DEVICE,
    PolicyRun,
    machine_limits,
    measured_profile,
    published_spec,
    share_layers,
)

from flexllmgen.models.published import published_config
from flexllmgen.placement import PlacementPlan
from flexllmgen.policy import Placement, Policy
from flexllmgen.spec import ModelSpec
from flexllmgen.workload import Workload
from profiling.profile import HardwareProfile

AGAIN = "autoflex, planned again"
"""After the calibration of the first, where that says another policy is faster."""

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
    share_layers(args.alias_mib)
    started = time.time()
    spec = published_spec(args.model, args.layers)
    # As it is published, since users run it so; on a CPU in float32.
    dtype = getattr(torch, published_config(args.model)["torch_dtype"]) if DEVICE == "cuda" else torch.float32
    profile, noted = measured_profile(
        spec, dtype=dtype, offload_dir=Path(args.offload_dir), profiles=Path(args.profiles)
    )
    print(json.dumps(noted), flush=True)
    wanted = ["auto", "naive", "hand"] if args.policies == "all" else args.policies.split(",")
    ran: list[tuple[PlacementPlan, dict[str, Any]]] = []
    for workload in args.workloads:
        prompt, generated = (int(part) for part in workload.split("/"))
        for cap in args.gpu_gib:
            case = Case(spec, profile, cap, prompt, generated, args)
            for name, policy in case.policies(wanted):
                own = name != "naive" and name not in BY_HAND
                plan = case.measure.place(policy)
                outcome = None if own else case.known(ran, plan)
                if outcome is None and time.time() - started > args.seconds:
                    outcome = {"error": "out of time"}
                if outcome is None:
                    outcome = case.measure.run(policy, probed=own)
                    ran.append((plan, {"ran_under_gib": cap, **outcome}))
                print(json.dumps({**case.name, "policy": name, **outcome}), flush=True)
                if name != "autoflex" or time.time() - started > args.seconds:
                    continue
                if (again := case.measure.replanned(policy, outcome)) is not None:
                    run, other = again
                    outcome = run.run(other, probed=True)
                    print(json.dumps({**case.name, "policy": AGAIN, **outcome}), flush=True)


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
        self.measure = PolicyRun(
            spec=spec,
            profile=profile,
            workload=Workload(num_sequences=args.sequences, prompt_tokens=prompt, gen_tokens=generated),
            limits=machine_limits(gpu_gib, args.cpu_gib, Path(args.offload_dir)),
            dtype=getattr(torch, profile.dtype),
            steps=args.steps,
            offload_dir=Path(args.offload_dir),
        )
        self.name: dict[str, Any] = {
            "model": args.model,
            "gpu_gib": gpu_gib,
            "workload": [args.sequences, prompt, generated],
        }

    def known(
        self, ran: list[tuple[PlacementPlan, dict[str, Any]]], plan: PlacementPlan
    ) -> dict[str, Any] | None:
        """What a plan came to under another cap, where it fits this one too."""
        if not self.measure.limits.fits(plan):
            return None
        return next((outcome for other, outcome in ran if other == plan and "tok_s" in outcome), None)

    def policies(self, wanted: list[str]) -> list[tuple[str, Policy]]:
        found = []
        if "auto" in wanted:
            began = time.time()
            best = self.measure.search(self.measure.profile)
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
            if self.measure.limits.fits(self.measure.place(policy)):
                return policy
        return policy


if __name__ == "__main__":
    main()
