"""The record's table and plot from its JSON. Knows nothing of engines; matplotlib is imported to draw only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from record_rows import ENGINE, ROWS, TITLES, Row

Result = dict[str, Any]


def read(files: Iterable[Path]) -> tuple[list[dict[str, Any]], list[Result]]:
    """The machines and the results of several files: of each row and engine the last that ran, else the last.

    A result gets the number of its file, `run`: what is of another run than our engine's figure is marked in the table.
    """
    machines: list[dict[str, Any]] = []
    found: dict[tuple[str, str], Result] = {}
    for run, file in enumerate(files):
        record = json.loads(file.read_text())
        machines.append(record["machine"])
        for result in record["results"]:
            key = (result["row"], result["engine"])
            if "tok_s" in result or "tok_s" not in found.get(key, {}):
                found[key] = {**result, "run": run}
    return machines, list(found.values())


def ours(results: Iterable[Result], row: str) -> Result | None:
    """What our engine measured in a row; None where it did not run."""
    return next((r for r in _ran(results, row) if r["engine"] == ENGINE), None)


def best_peer(results: Iterable[Result], row: str) -> Result | None:
    """The fastest peer of a row; None where none ran."""
    peers = [r for r in _ran(results, row) if r["engine"] != ENGINE]
    return max(peers, key=lambda each: each["tok_s"], default=None)


def _ran(results: Iterable[Result], row: str) -> list[Result]:
    return [each for each in results if each["row"] == row and "tok_s" in each]


def report(machines: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> Iterator[str]:
    """Lines of markdown: the runs, the table, every measurement, and what did not run with its reason."""
    for run, machine in enumerate(machines):
        if not machine:
            continue
        numbered = f"Run {run + 1}: " if len(machines) > 1 else ""
        yield numbered + "; ".join(f"{name} {value}" for name, value in machine.items() if value) + "."
        yield ""
    yield from table(results)
    yield ""
    yield from everything(results)
    failed = list(not_run(results))
    if failed:
        yield ""
        yield "What did not run:"
        yield ""
        yield from failed


def table(results: Sequence[Result]) -> Iterator[str]:
    """One line a row, of those that were measured."""
    yield (
        "| case | autoflex, tok/s | asked | best peer | ratio | limit | attainment | bound by | predicted | error "
        "| peak / cap, GiB | policy |"
    )
    yield "|" + "---|" * 12
    for name, row in ROWS.items():
        if not any(each["row"] == name for each in results):
            continue
        own, peer = ours(results, name), best_peer(results, name)
        beside = f"{TITLES[peer['engine']]} {number(peer['tok_s'])}" if peer else ""
        if own and peer and peer.get("run") != own.get("run"):
            beside += f" (run {peer['run'] + 1})"
        if own is None:
            yield f"| {row.title} | did not run | {asked(row)} | {beside} |" + " |" * 8
            continue
        cells = [
            row.title,
            number(own["tok_s"]),
            asked(row),
            beside or row.known,
            number(own["tok_s"] / peer["tok_s"]) if peer else "",
            number(own["limit_tok_s"]),
            f"{own['tok_s'] / own['limit_tok_s']:.0%}",
            own["limit_bound"],
            number(own["predicted_tok_s"]),
            f"{own['prediction_error']:+.1%}",
            f"{own['peak_gpu_gib']:.2f} / {row.gpu_gib:g}",
            f"{own['cut']}, {described(own['policy'])}",
        ]
        yield "| " + " | ".join(cells) + " |"


def asked(row: Row) -> str:
    """What a row asks of our engine."""
    if row.asked_tok_s is not None:
        return f"{row.asked_tok_s:g}"
    return "" if row.asked_attainment is None else f"{row.asked_attainment:.0%} of the limit"


def everything(results: Sequence[Result]) -> Iterator[str]:
    """One line a measurement."""
    yield "| case | engine | run | sequences | prefill, s | step, s | tok/s | steps run | peak, GiB | load, s | as |"
    yield "|" + "---|" * 11
    for name, row in ROWS.items():
        for each in sorted(_ran(results, name), key=lambda each: -each["tok_s"]):
            prefill, step = _first(each["prefill_s"]), _first(each.get("step_s", each.get("decode_step_s")))
            policy = each["policy"]
            steps = each["steps"] if "steps" in each else each["columns"] - 1
            peak = each.get("peak_gpu_gib")
            cells = [
                row.title,
                TITLES[each["engine"]],
                str(each.get("run", 0) + 1),
                f"{each['sequences']} ({each['cut']})",
                number(prefill),
                number(step),
                number(each["tok_s"]),
                f"{steps} of {row.gen - 1}",
                "" if peak is None else f"{peak:.2f}",
                f"{each['load_s']:.1f}",
                policy if isinstance(policy, str) else described(policy),
            ]
            yield "| " + " | ".join(cells) + " |"


def not_run(results: Iterable[Result]) -> Iterator[str]:
    """What has no figure, and why."""
    for each in results:
        if "tok_s" not in each:
            reason = str(each.get("error", "no figure")).replace("|", "/")
            yield f"- {ROWS[each['row']].title}, {TITLES[each['engine']]}: {reason}"


def described(policy: Mapping[str, Any]) -> str:
    """A policy in a few words: shares on gpu, cpu and disk, and what of it is not plain."""
    parts = []
    for key, name in (("weights", "weights"), ("kv_cache", "KV"), ("activations", "activations")):
        shares = [policy[key][tier] for tier in ("gpu", "cpu", "disk")]
        if key != "activations" or shares[0] < 1:
            parts.append(f"{name} {'/'.join(f'{100 * share:.0f}' for share in shares)}")
    for key, value in policy.items():
        if key.endswith("_bits") and value:
            parts.append(
                f"{value}-bit {key.removesuffix('_bits').replace('kv', 'KV').replace('weight', 'weights')}"
            )
    if policy.get("cpu_attention"):
        parts.append("attention on the CPU")
    if policy.get("recompute"):
        parts.append(f"{policy['recompute']:.0%} of the KV in host memory made anew")
    if policy.get("chosen_experts"):
        parts.append("chosen experts only")
    if policy.get("attn_sparsity", 1.0) != 1.0:
        parts.append(f"top {policy['attn_sparsity']:.0%} of the values")
    return ", ".join(parts)


def number(value: float) -> str:
    """Three or four figures.

    >>> number(1234.5), number(65.432), number(0.0123)
    ('1,234', '65.4', '0.0123')
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _first(value: Any) -> float:
    """Ours are pairs of measured and predicted."""
    return float(value[0] if isinstance(value, list) else value)


def draw(results: Sequence[Result], path: Path) -> None:
    """Bars of attainment, ours and the best peer's, with the limit as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [name for name in ROWS if ours(results, name) is not None]
    figure, axes = plt.subplots(figsize=(1.6 * max(len(rows), 3) + 1.5, 5.2))
    for offset, colour, label in ((-0.2, "#0b6bcb", "autoflex"), (0.2, "#d9822b", "best peer")):
        for place, name in enumerate(rows):
            own, peer = ours(results, name), best_peer(results, name)
            assert own is not None
            shown = own if offset < 0 else peer
            if shown is None:
                continue
            share = shown["tok_s"] / own["limit_tok_s"]
            axes.bar(place + offset, share, 0.38, color=colour, label=label if place == 0 else None)
            text = number(shown["tok_s"]) + (
                "" if shown is own else f"\n{TITLES[shown['engine']].split()[0]}"
            )
            axes.text(place + offset, share + 0.01, text, ha="center", va="bottom", fontsize=8)
    axes.axhline(1.0, color="black", linewidth=1, label="limit of autoflex's placement on this machine")
    titles = [ROWS[name].title.replace(", ", ",\n", 1).replace(" GiB, ", " GiB,\n") for name in rows]
    axes.set_xticks(range(len(rows)), titles, fontsize=8)
    axes.set_ylabel("share of the limit; tokens/s above the bars")
    axes.set_ylim(0, 1.28)
    axes.legend(loc="upper right", ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
