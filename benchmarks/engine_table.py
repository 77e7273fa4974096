"""Runs a set of measurements one after another, each in its own process with a time-out, and prints a table.

python benchmarks/engine_table.py --set large --out results.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from processes import measure

CASE = Path(__file__).with_name("engine_case.py")

# name -> (seconds allowed, arguments). Peers stand beside the row of ours that they are compared with.
SMALL = {
    "links": (60, "links"),
    "llama-8b": (60, "ours --model Meta-Llama-3-8B --gpu-gib 8 --batch 64 --trace {out}/trace-8b.json"),
    "llama-8b-accelerate-32": (
        60,
        "accelerate --model Meta-Llama-3-8B --gpu-gib 8 --weights-gib 3 --batch 32 --steps 4",
    ),
    "llama-8b-accelerate-48": (
        60,
        "accelerate --model Meta-Llama-3-8B --gpu-gib 8 --weights-gib 1 --batch 48 --steps 4",
    ),
    "all-gpu-6.7b": (40, "ours --model opt-6.7b --batch 2 --weights-gpu 1 --kv-gpu 1"),
    "all-gpu-6.7b-transformers": (50, "accelerate --model opt-6.7b --weights-gib 15 --batch 2"),
    "all-gpu-8b": (40, "ours --model Meta-Llama-3-8B --gpu-gib 24 --batch 16 --weights-gpu 1 --kv-gpu 1"),
    "all-gpu-8b-transformers": (
        50,
        "accelerate --model Meta-Llama-3-8B --gpu-gib 24 --weights-gib 24 --batch 16",
    ),
    "kv-host-6.7b": (90, "ours --model opt-6.7b --gpu-gib 8 --batch 32 --batches 6"),
    "kv-host-6.7b-flexgen": (80, "flexgen --model opt-6.7b --gpu-gib 8 --batch 32 --batches 4 --steps 6"),
    "kv-host-6.7b-accelerate": (
        60,
        "accelerate --model opt-6.7b --gpu-gib 8 --weights-gib 2 --batch 16 --steps 5",
    ),
    "disk-6.7b": (
        90,
        "ours --model opt-6.7b --batch 8 --weights-gpu 0 --weights-disk 1 --kv-gpu 1 --steps 3",
    ),
}
LARGE = {
    "links": (60, "links"),
    "stream-30b": (80, "ours --model opt-30b --batch 8 --kv-gpu 1 --steps 5 --trace {out}/trace-30b.json"),
    "kv-host-30b": (120, "ours --model opt-30b --batch 24 --batches 3 --steps 16"),
    "kv-host-30b-flexgen": (140, "flexgen --model opt-30b --batch 48 --steps 5"),
    "kv-host-30b-accelerate": (140, "accelerate --model opt-30b --weights-gib 6 --batch 8 --steps 3"),
}
SETS = {"small": SMALL, "large": LARGE}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", choices=SETS, default="small")
    parser.add_argument("--only", default="", help="comma-separated names")
    parser.add_argument("--out", default="results.json")
    args = parser.parse_args()
    out = Path(args.out)
    results = []
    for name, (seconds, arguments) in SETS[args.set].items():
        if args.only and name not in args.only.split(","):
            continue
        results.append({"name": name, **measure(CASE, arguments.format(out=out.parent).split(), seconds)})
        print(json.dumps(results[-1]), flush=True)
        out.write_text(json.dumps(results, indent=1))
    print(
        f"{'name':20} {'seqs':>5} {'load':>6} {'prefill':>8} {'step':>8} {'tok/s':>8} {'h2d':>6} {'peak':>6}"
    )
    for each in results:
        row = [each.get(key, "") for key in ("sequences", "load_s", "prefill_s", "decode_step_s", "tok_s")]
        row += [each.get("h2d_decode_gb_s", ""), each.get("peak_gpu_gib", "")]
        widths = (5, 6, 8, 8, 8, 6, 6)
        cells = " ".join(f"{value!s:>{width}}" for value, width in zip(row, widths, strict=True))
        print(f"{each['name']:20} {cells} {'ERROR' if 'error' in each else ''}")


if __name__ == "__main__":
    main()
