"""The planner's table and plot from the JSON lines of planner_case.py.

    python benchmarks/planner_table.py call1.jsonl call2.jsonl --json planner.json --plot planner.png > table.md

A case (model, GPU memory, workload) may lie in several files: the last that measured a policy counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from replanning import goes_back

Row = dict[str, Any]
Case = tuple[str, float, tuple[int, int, int]]
NAMES = {"opt-6.7b": "OPT-6.7B", "opt-30b": "OPT-30B", "Meta-Llama-3-8B": "Llama-3-8B"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    cases = read(args.files)
    rows = [row for case in sorted(cases) for row in cases[case]]
    if args.json:
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    if args.plot:
        draw(cases, args.plot)
    print("\n".join(table(cases)))
    print("\n".join(["", *summary(cases)]))


def read(files: Iterable[Path]) -> dict[Case, list[Row]]:
    """Rows of policies by case; the rows of a JSON array, or of JSON lines.

    Of a case that several files have, each policy's row is that of the last file where it ran, and autoflex's rows are
    all of the last one where autoflex did.
    """
    cases: dict[Case, dict[str, Row]] = {}
    for file in files:
        text = file.read_text()
        lines = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
        mine = [{"file": file.stem, **row} for row in lines if "policy" in row]
        ran = {case_of(row) for row in mine if row["policy"] == "autoflex" and "tok_s" in row}
        for case in ran & cases.keys():
            cases[case] = {name: row for name, row in cases[case].items() if not is_own(row)}
        for row in mine:
            case = cases.setdefault(case_of(row), {})
            if "tok_s" in row or "tok_s" not in case.get(row["policy"], {}):
                case[row["policy"]] = row
    return {case: list(rows.values()) for case, rows in cases.items()}


def case_of(row: Row) -> Case:
    return row["model"], row["gpu_gib"], tuple(row["workload"])


def is_own(row: Row) -> bool:
    """Of autoflex, planned once or again."""
    return bool(row["policy"].startswith("autoflex"))


def measured(rows: Sequence[Row], policy: str | None = None) -> list[Row]:
    """Rows that ran: of one policy, or of all but autoflex's, the fastest first."""
    ran = [row for row in rows if "tok_s" in row]
    if policy == "autoflex":
        own = [row for row in ran if is_own(row)]
        # What it stayed with: where it planned again, that, unless it proved slower.
        return own[:1] if len(own) > 1 and goes_back(*own[:2]) else own[-1:]
    if policy is not None:
        return [row for row in ran if row["policy"] == policy]
    return sorted((row for row in ran if not is_own(row)), key=lambda row: -row["tok_s"])


def table(cases: dict[Case, list[Row]]) -> Iterable[str]:
    yield (
        "| model, cap | workload | autoflex | tok/s | as planned | as logged | limit | planned peak "
        "| best by hand | its tok/s | autoflex / best of the others | naive |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for case in sorted(cases):
        model, cap, workload = case
        start = f"| {NAMES.get(model, model)}, {cap:.0f} GiB | {'/'.join(map(str, workload))} "
        own, hand = measured(cases[case], "autoflex"), measured(cases[case])
        naive = measured(cases[case], "naive")
        others = [row for row in hand if row["policy"] != "naive"]
        if not own:
            yield f"{start}| {cases[case][0].get('error') or 'not run'} |" + " |" * 9
            continue
        row = own[0]
        cells = [
            row["cut"] + ending(cases[case], row),
            f"{row['tok_s']:,.0f}" if row["tok_s"] > 1000 else f"{row['tok_s']:.4g}",
            f"{first_of(cases[case])['prediction_error']:+.1%}",
            f"{logged_error(row):+.1%}",
            f"{row['limit_tok_s']:,.0f}" if row["limit_tok_s"] > 1000 else f"{row['limit_tok_s']:.4g}",
            f"{row['planned_gpu_gib'] / row['peak_gpu_gib'] - 1:+.1%}",
            f"{others[0]['policy'].rsplit(' ', 1)[0]}, {others[0]['cut']}" if others else "",
            f"{others[0]['tok_s']:.4g}" if others else "",
            f"{row['tok_s'] / hand[0]['tok_s']:.2f}" if hand else "",
            f"{naive[0]['tok_s']:.4g}" if naive else "does not fit",
        ]
        yield start + "| " + " | ".join(cells) + " |"


def summary(cases: dict[Case, list[Row]]) -> Iterable[str]:
    everything = [
        row
        for rows in cases.values()
        for row in rows
        # What ran once for several caps counts once.
        if "tok_s" in row
        and "again" not in row["policy"]
        and row.get("ran_under_gib", row["gpu_gib"]) == row["gpu_gib"]
    ]
    kept = [(rows, row) for rows in cases.values() for row in measured(rows, "autoflex")]
    for name, errors in (
        ("autoflex, as first planned", [first_of(rows)["prediction_error"] for rows, _ in kept]),
        ("autoflex, as its run logs it", [logged_error(row) for _, row in kept]),
        ("every policy, as planned", [row["prediction_error"] for row in everything]),
    ):
        sizes = [abs(error) for error in errors]
        yield f"{name}: {len(sizes)} runs, median |error| {statistics.median(sizes):.1%}, worst {max(sizes):.1%}"


def first_of(rows: Sequence[Row]) -> Row:
    """What autoflex planned before it had timed anything of the model that it loaded."""
    return next(row for row in rows if row["policy"] == "autoflex")


def logged_error(row: Row) -> float:
    """Of the prediction that a run of autoflex logs: at the rates that its calibration found."""
    error: float = row["calibrated_error"]
    return error


def ending(rows: Sequence[Row], row: Row) -> str:
    """How autoflex came to a policy, if not at once."""
    if row["policy"] != "autoflex":
        return " (planned again)"
    return " (and back)" if sum(is_own(each) and "tok_s" in each for each in rows) > 1 else ""


def draw(cases: dict[Case, list[Row]], path: Path) -> None:
    """Above: predicted against measured, every policy. Below: each case's throughput as a share of its limit."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 11), height_ratios=(1, 1.1))
    rows = [row for group in cases.values() for row in group if "tok_s" in row]
    for own, colour, label in ((False, "#8a8f98", "by hand and naive"), (True, "#0b6bcb", "autoflex")):
        mine = [row for row in rows if is_own(row) is own]
        above.scatter(
            [row["tok_s"] for row in mine],
            [row["predicted_tok_s"] for row in mine],
            s=22,
            color=colour,
            label=f"{label} ({len(mine)})",
        )
    ends = [0.8 * min(row["tok_s"] for row in rows), 1.25 * max(row["tok_s"] for row in rows)]
    above.plot(ends, ends, color="black", linewidth=0.8, label="predicted = measured")
    above.fill_between(
        ends, [0.8 * end for end in ends], [1.2 * end for end in ends], alpha=0.12, label="within 20 %"
    )
    above.set(xscale="log", yscale="log", xlabel="measured, tokens/s", ylabel="predicted, tokens/s")
    above.legend()
    groups = [case for case in sorted(cases) if measured(cases[case], "autoflex")]
    for offset, (policy, colour, label) in enumerate(
        (
            ("autoflex", "#0b6bcb", "autoflex"),
            (None, "#d9822b", "best by hand"),
            ("naive", "#8a8f98", "naive"),
        )
    ):
        shares = []
        for case in groups:
            limit = measured(cases[case], "autoflex")[0]["limit_tok_s"]
            found = measured(cases[case], policy)
            if policy is None:
                found = [row for row in found if row["policy"] != "naive"]
            shares.append(found[0]["tok_s"] / limit if found else 0.0)
        below.bar(
            [x + 0.27 * (offset - 1) for x in range(len(groups))], shares, 0.27, color=colour, label=label
        )
    below.axhline(1.0, color="black", linewidth=0.8, label="physical limit of autoflex's placement")
    below.set_xticks(
        range(len(groups)),
        [f"{NAMES.get(m, m)} {cap:.0f} GiB {w[1]}/{w[2]}" for m, cap, w in groups],
        rotation=60,
        ha="right",
        fontsize=8,
    )
    below.set_ylabel("share of the limit")
    below.legend(loc="upper left", ncols=4, fontsize=8)
    below.set_ylim(0, 1.2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
