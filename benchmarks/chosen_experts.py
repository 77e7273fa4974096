"""A mixture of experts with whole layers streamed, and with only the experts that a step chooses: where the two cross.

    python benchmarks/chosen_experts.py --model qwen3-30b-a3b --gpu-gib 16 --out chosen_experts.json

For each number of sequences, one block of them with random weights and prompts, both ways under the same shares: as much of
the weights on the device as fits beside the largest block, the rest in host memory. Measured and predicted tokens a second,
steps and limits as in `policy_run.py`. Prints one JSON line per run; the file is written after each.

With `--alias-mib` host memory of equal size is shared by several layers, as in `planner_case.py`. Random routers send tokens
to all experts about alike; a trained one's choices repeat more, which moves fewer bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

from policy_run import DEVICE, PolicyRun, machine_limits, measured_profile, published_spec, share_layers

from flexllmgen.fits import find_shortages
from flexllmgen.policy import Placement, Policy
from flexllmgen.workload import Workload

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--gpu-gib", type=float, default=16)
    parser.add_argument("--cpu-gib", type=float, default=0)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--workload", default="128/32", help="prompt/generated tokens")
    parser.add_argument("--weight-bits", type=int, choices=(8, 4))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--offload-dir", default="/tmp/offload")
    parser.add_argument("--profiles", default="/tmp/profiles")
    parser.add_argument("--alias-mib", type=int, default=0, help="see above; 0: every byte is there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    share_layers(args.alias_mib)
    spec, folder = published_spec(args.model, args.layers), Path(args.offload_dir)
    profile, noted = measured_profile(spec, dtype=DTYPE, offload_dir=folder, profiles=Path(args.profiles))
    print(json.dumps(noted), flush=True)
    prompt, generated = (int(part) for part in args.workload.split("/"))
    runs = [
        PolicyRun(
            spec=spec,
            profile=profile,
            workload=Workload(num_sequences=sequences, prompt_tokens=prompt, gen_tokens=generated),
            limits=machine_limits(args.gpu_gib, args.cpu_gib, folder),
            dtype=DTYPE,
            steps=args.steps,
            offload_dir=folder,
        )
        for sequences in args.sequences
    ]
    # The same shares in all rows, so that nothing else differs.
    weights = most_on_device(max(runs, key=lambda run: run.workload.num_sequences), args.weight_bits)
    rows = []
    for run in runs:
        for chosen in (True, False):
            policy = policy_for(run, weights, args.weight_bits, chosen_experts=chosen)
            outcome = run.run(policy, probed=False)
            row = {"sequences": run.workload.num_sequences, "chosen_experts": chosen, **outcome}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                result = {"model": spec.name, "gpu_gib": args.gpu_gib, "workload": args.workload}
                result |= {"profile": noted, "crossover": crossovers(rows), "rows": rows}
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(crossovers(rows)), flush=True)


def policy_for(run: PolicyRun, weights: Placement, bits: int | None, *, chosen_experts: bool) -> Policy:
    """One block of all sequences, everything but weights on the device."""
    return Policy(
        micro_batch_size=run.workload.num_sequences,
        weights=weights,
        weight_bits=bits,
        chosen_experts=chosen_experts,
    )


def most_on_device(run: PolicyRun, bits: int | None) -> Placement:
    """The largest share of the weights, in percent, that fits on the device; at most 99, so that something is streamed."""
    for percent in range(99, 0, -1):
        weights = Placement.from_percent(percent, 100 - percent)
        plan = run.place(policy_for(run, weights, bits, chosen_experts=True))
        if not find_shortages(plan, gpu_bytes=run.limits.gpu_bytes, cpu_bytes=None):
            return weights
    return Placement(cpu=1.0)


def crossovers(rows: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """The fewest sequences at which whole layers are faster, as measured and as predicted; None if at none of them."""
    found: dict[str, int | None] = {}
    for name in ("tok_s", "predicted_tok_s"):
        rates = {(row["sequences"], row["chosen_experts"]): row[name] for row in rows if name in row}
        faster = [
            count
            for count, chosen in rates
            if not chosen and rates[count, False] > rates.get((count, True), float("inf"))
        ]
        found[name] = min(faster, default=None)
    return found


if __name__ == "__main__":
    main()
