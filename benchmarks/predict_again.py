"""Runs that were measured elsewhere, predicted again by today's cost model from that machine's profiles: no GPU is needed.

    python benchmarks/predict_again.py --profiles benchmarks/h200/profile-*.json \
        --runs benchmarks/h200/record-2026-11-24.json

Takes what record_table.py and planner_case.py wrote, of our engine. Profiles are told apart by their number type. What a
calibration would make of each step is shown, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

from policy_run import policy_of, predicted_s, published_spec
from record_rows import ENGINE, ROWS

from flexllmgen.engine import Probe
from flexllmgen.models.published import published_config
from flexllmgen.placement import plan_placement
from flexllmgen.policy import Placement, Policy
from flexllmgen.units import GiB
from flexllmgen.workload import Workload
from profiling.calibration import calibrate
from profiling.profile import HardwareProfile


@dataclass(frozen=True, kw_only=True)
class Run:
    """A policy that was run: `row` holds what was measured."""

    model: str
    gpu_gib: float
    workload: Workload
    policy: Policy
    row: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profiles", type=Path, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    kept = [HardwareProfile.from_dict(json.loads(file.read_text())) for file in args.profiles]
    profiles = {profile.dtype: profile for profile in kept}
    errors = []
    print("| model, cap | workload | policy | step, s | predicted | tok/s off by | calibration |")
    print("|---|---|---|---:|---:|---:|---|")
    for run in (run for file in args.runs for run in read(file)):
        line, error = predicted(run, profiles)
        errors.append(abs(error))
        print(line, flush=True)
    print(f"\n{len(errors)} runs, median |error| {statistics.median(errors):.1%}, worst {max(errors):.1%}")


def read(file: Path) -> Iterator[Run]:
    """Our engine's runs of a record (JSON) or of planner_case.py (JSON lines)."""
    text = file.read_text()
    if file.suffix == ".json":
        for each in json.loads(text)["results"]:
            if each["engine"] == ENGINE and "tok_s" in each:
                row = ROWS[each["row"]]
                yield Run(
                    model=row.model,
                    gpu_gib=row.gpu_gib,
                    workload=workload_of(row.sequences, row.prompt, row.gen),
                    policy=policy_of(each["policy"]),
                    row=each,
                )
        return
    for each in map(json.loads, text.splitlines()):
        if "policy" in each and "tok_s" in each:
            yield Run(
                model=each["model"],
                gpu_gib=each["gpu_gib"],
                workload=workload_of(*each["workload"]),
                policy=policy_told(each),
                row=each,
            )


def workload_of(sequences: int, prompt: int, gen: int) -> Workload:
    """So many requests of so many tokens."""
    return Workload(num_sequences=sequences, prompt_tokens=prompt, gen_tokens=gen)


def policy_told(row: dict[str, Any]) -> Policy:
    """A policy as planner_case.py tells it: shares in tenths of a percent."""
    size, count = map(int, row["cut"].split("x"))
    shares = (Placement.from_percent(*row["shares"][start : start + 2]) for start in (0, 3, 6))
    return Policy(
        micro_batch_size=size,
        num_micro_batches=count,
        **dict(zip(("weights", "kv_cache", "activations"), shares, strict=True)),
        **{key: row[key] for key in ("overlap", "sep_layer", "cpu_attention", "recompute")},
    )


def predicted(run: Run, profiles: dict[str, HardwareProfile]) -> tuple[str, float]:
    """A line of the table, and the error of the throughput."""
    spec, profile = published_spec(run.model), profiles[published_config(run.model)["torch_dtype"]]
    plan = plan_placement(spec, run.policy, run.workload, 2, gpu_cap_bytes=int(run.gpu_gib * GiB))
    first_s, mine_s = predicted_s(plan, run.row["sequences"], run.row["steps"], profile)
    (prompt_s, _), (step_s, _) = run.row["prefill_s"], run.row["step_s"]
    prompt, steps = run.workload.prompt_tokens, run.workload.gen_tokens - 1
    error = (prompt_s + steps * step_s) / (first_s + steps * mine_s) - 1
    found = calibrate(plan, profile, Probe(stage=1, load_s=None, step_s=step_s, context=prompt + 3))
    causes = ("pace", "link", "disk", "attention")
    told = [f"{name} {getattr(found, name):.2f}" for name in causes if getattr(found, name) != 1]
    work = run.workload
    cells = [
        f"{run.model}, {run.gpu_gib:g} GiB",
        f"{work.num_sequences}/{prompt}/{work.gen_tokens}",
        f"{run.row['cut']}, weights {run.policy.weights.gpu:.1%}, {run.policy.recompute:.0%} made anew",
        f"{step_s:.4f}",
        f"{mine_s:.4f}",
        f"{error:+.1%}",
        ", ".join(told),
    ]
    return f"| {' | '.join(cells)} |", error


if __name__ == "__main__":
    main()
