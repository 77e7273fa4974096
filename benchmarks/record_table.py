"""The record: our engine beside its peers, row by row, on whatever machine this is.

    python benchmarks/record_table.py --out record.json --markdown record.md --plot record.png
    python benchmarks/record_table.py --out record.json --rows opt-30b opt-6.7b --engines autoflex flexgen --seconds 500
    python benchmarks/record_table.py --from first.json second.json --markdown record.md --plot record.png

Each measurement is a process of its own with a time-out. The JSON is written after each; one that lies there already is not
run again unless it failed or --again is given. The table is printed, too. The plot needs matplotlib, the rest does not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from processes import measure
from record_report import draw, read, report
from record_rows import ROWS, TITLES

CASE = Path(__file__).with_name("record_case.py")
_LEAST_S = 20
"""With less time left than that nothing is begun."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="measure, and write the JSON here")
    parser.add_argument("--from", dest="files", type=Path, nargs="+", default=[], help="JSON of earlier runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--engines", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of the whole run")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for every case")
    parser.add_argument("--again", action="store_true", help="measure what lies in --out, too")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.out is None and not args.files:
        parser.error("give --out to measure or --from to report")
    if args.out is not None:
        run(args)
    machines, results = read([*args.files, *([args.out] if args.out else [])])
    text = "\n".join(report(machines, results))
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    if args.plot:
        draw(results, args.plot)


def run(args: argparse.Namespace) -> None:
    """Measures what is asked for and writes each result when it is there."""
    began = time.time()
    earlier = [] if not args.out.exists() else json.loads(args.out.read_text())["results"]
    results = {(each["row"], each["engine"]): each for each in earlier}
    facts = machine_facts()
    write(args.out, facts, list(results.values()))
    for row, engine, seconds in planned(args.rows, args.engines):
        if not args.again and "tok_s" in results.get((row, engine), {}):
            continue
        left = args.seconds - (time.time() - began)
        if left < _LEAST_S:
            print(f"out of time before {row} {engine}", file=sys.stderr, flush=True)
            break
        arguments = [row, engine, *(["--set", *args.set] if args.set else [])]
        result = {"row": row, "engine": engine, **measure(CASE, arguments, min(seconds, left))}
        print(json.dumps(result), flush=True)
        results[row, engine] = {key: value for key, value in result.items() if key != "stderr"}
        write(args.out, facts, list(results.values()))


def planned(rows: list[str], engines: list[str]) -> Iterator[tuple[str, str, int]]:
    """Row, engine and seconds allowed, in the rows' order."""
    for row in rows:
        for engine, each in ROWS[row].measures.items():
            if engine in engines:
                yield row, engine, each.seconds


def write(path: Path, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The whole record at once: what is there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    lines = ",\n".join(json.dumps(each) for each in results)
    partial.write_text(f'{{"machine": {json.dumps(machine)},\n"results": [\n{lines}\n]}}\n')
    partial.replace(path)


def machine_facts() -> dict[str, Any]:
    """What the figures depend on, as far as it can be told without loading torch."""
    versions = {}
    for name in (
        "torch",
        "transformers",
        "accelerate",
        "bitsandbytes",
        "deepspeed",
        "diffusers",
        "flextensor",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "gpu": _gpu(),
        "cores": os.cpu_count(),
        "Python": platform.python_version(),
        **versions,
    }


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0].replace(",", ", driver")


if __name__ == "__main__":
    main()
