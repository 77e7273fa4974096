"""One measurement of the record in a process of its own: prints one JSON line.

    python benchmarks/record_case.py opt-30b autoflex
    python benchmarks/record_case.py opt-30b prefetch --set batch=8 steps=6

`autoflex` searches a policy for the row's workload on this machine's profile (with lossy ones where the row admits them),
loads it and runs one block. The others are peers. What is set wins over the row.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "FlexLLMGen")]

from peers import PEERS
from peers.case import DEVICE, Case
from processes import SO_FAR, end_with_parent
from record_rows import ENGINE, ROWS
from replanning import goes_back


def main() -> None:
    end_with_parent()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("engine", choices=[ENGINE, *PEERS])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of peers.case.Case"
    )
    args = parser.parse_args()
    case = case_of(args.row, args.engine, args.set)
    began = time.time()
    asked = {key: value for key, value in dataclasses.asdict(case).items() if value != _DEFAULTS.get(key)}

    def tell(result: dict[str, Any]) -> None:
        line = {"row": args.row, "engine": args.engine, "asked": asked, **result}
        print(json.dumps(line | {"process_s": round(time.time() - began, 1)}), flush=True)

    try:
        result = autoflex(case, tell) if args.engine == ENGINE else peer(args.engine, case)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is what its row says
        traceback.print_exc()
        last = str(error).strip().splitlines()
        result = {"error": f"{type(error).__name__}: {last[0] if last else ''}"[:300]}
    tell(result)
    # A peer's threads may never end.
    os._exit(1 if "error" in result else 0)


_DEFAULTS = {each.name: each.default for each in dataclasses.fields(Case)}


def case_of(row: str, engine: str, changes: list[str]) -> Case:
    """The row's case for an engine, with FIELD=VALUE changes.

    >>> case_of("opt-30b", "prefetch", ["batch=8"]).batch
    8
    """
    options = ROWS[row].options(engine) if engine in ROWS[row].measures else ROWS[row].options(ENGINE)
    kinds = get_type_hints(Case)
    for change in changes:
        name, _, value = change.partition("=")
        if name not in kinds:
            raise SystemExit(f"no field {name}; there are {', '.join(kinds)}")
        if name == "percent":
            options[name] = tuple(int(part) for part in value.split())
        else:
            options[name] = value in ("1", "true", "True") if kinds[name] is bool else kinds[name](value)
    return Case(**options)


def peer(name: str, case: Case) -> dict[str, Any]:
    """A peer's figures; what it needs is imported only here."""
    module, _, function = PEERS[name].partition(":")
    result: dict[str, Any] = getattr(importlib.import_module(f"peers.{module}"), function)(case)
    return result


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the policy that was given up."""
    return {name: result[name] for name in ("cut", "shares", "tok_s", "prediction_error", "calibration")}


def autoflex(case: Case, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The search's policy (or the case's own), planned, loaded and run.

    Where it plans again, `tell` is given what was measured before, so that this is not lost with the time.
    """
    import policy_run

    from flexllmgen.workload import Workload

    policy_run.share_layers(case.alias_mib)
    spec = policy_run.published_spec(case.model, case.layers)
    folder = Path(case.offload_dir)
    profile, noted = policy_run.measured_profile(
        spec, dtype=case.torch_dtype, offload_dir=folder, profiles=Path(case.profiles)
    )
    print(json.dumps(noted), file=sys.stderr, flush=True)
    run = policy_run.PolicyRun(
        spec=spec,
        profile=profile,
        workload=Workload(num_sequences=case.sequences, prompt_tokens=case.prompt, gen_tokens=case.gen),
        limits=policy_run.machine_limits(case.gpu_gib, case.cpu_gib, folder),
        dtype=case.torch_dtype,
        steps=case.steps,
        offload_dir=folder,
    )
    began = time.time()
    if case.policy:
        policy = policy_run.policy_of(json.loads(case.policy))
    else:
        policy = run.search(profile, batch_size=case.batch or 8, allow_lossy=case.lossy).best.policy
    searched_s = time.time() - began

    def whole(result: dict[str, Any]) -> dict[str, Any]:
        if result.get("error", "") is None:
            del result["error"]
        return result | {
            "device": DEVICE,
            "policy": dataclasses.asdict(policy),
            "search_s": round(searched_s, 1),
            "profile_s": noted["profile_s"],
            "rates_1e9": noted["rates_1e9"],
        }

    result = run.run(policy, probed=True)
    if not case.policy and (again := run.replanned(policy, result, allow_lossy=case.lossy)) is not None:
        tell(whole(dict(result)) | {SO_FAR: True})
        before, first = result, policy
        run, policy = again
        result = run.run(policy, probed=True)
        if "tok_s" in result and goes_back(before, result):
            result, policy = before | {"planned_again": brief(result)}, first
        else:
            result |= {"planned_before": brief(before)}
    return whole(result)


if __name__ == "__main__":
    main()
