"""What a benchmark's report says in words: what was compared, where, what came out, what was planned. Pure."""

import time
from collections.abc import Iterator, Mapping, Sequence

from harness.benchmark.record import Benchmark
from harness.benchmark.table import Row, fastest, finite, measured_rows
from harness.benchmark.table_text import number, percent, size
from harness.results import RunResult
from harness.words import counted

_PLAN_TITLES = (
    "batch",
    "micro-batches",
    "loads ahead",
    "attention and MLP",
    "host weights",
    "weights",
    "KV cache",
    "expected bound",
    "limit's bound",
    "to device",
    "from device",
    "read from disk",
)


def verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """One sentence for each workload: which cell was fastest, by how much, and how near to the limit."""
    measured = measured_rows(rows)
    for workload in dict.fromkeys(row.workload_key for row in measured):
        group = [row for row in measured if row.workload_key == workload]
        best = fastest(group)
        assert best is not None
        words = [f"{best.name} is the fastest" if len(group) > 1 else f"{best.name} makes"]
        words.append(f"{'at ' if len(group) > 1 else ''}{number(best.generation_tok_s or 0)} tokens/s")
        text = " ".join(words)
        if best.ratio_to_baseline and best.baseline != best.name:
            text += f", {number(best.ratio_to_baseline)}x the baseline {best.baseline}"
        if best.attainment:
            text += f", {percent(best.attainment)} of the physical limit"
        if rivals := [row.name for row in group if row is not best and _overlap(row, best)]:
            text += f"; its range overlaps that of {' and '.join(rivals) if len(rivals) < 3 else f'{len(rivals)} others'}"
        several = len({row.workload_key for row in measured}) > 1
        yield f"{workload}: {text}." if several and workload else f"{text}."
    if not measured:
        done = any(row.status == "FAILED" for row in rows)
        yield "No cell has a measurement" + (": see the failures below." if done else " yet.")
    lossy = {row.name for row in rows if row.lossy}
    differing = [
        row.name
        for row in rows
        if row.parity is not None and row.parity < 1 and not lossy & {row.name, row.baseline}
    ]
    if differing:
        where = ", ".join(differing) if len(differing) <= 4 else f"{len(differing)} of {len(rows)} cells"
        yield f"Not all tokens equal those of the baseline in {where}."
    for row in rows:
        if row.lossy:
            yield f"{row.name} is lossy: {row.lossy}{_quality(row)}."


def _quality(row: Row) -> str:
    words = []
    if row.perplexity_ratio is not None:
        words.append(f"perplexity {row.perplexity_ratio - 1:+.2%} of lossless")
    if row.token_match_share is not None:
        words.append(f"{percent(row.token_match_share)} of the tokens equal")
    return f"; {', '.join(words)}" if words else ""


def _overlap(one: Row, best: Row) -> bool:
    """Whether what was measured of both leaves open which is faster."""
    if one.high_tok_s is None or best.low_tok_s is None:
        return False
    return one.high_tok_s >= best.low_tok_s


def counts(benchmark: Benchmark) -> str:
    """How many cells there are and how they stand."""
    states = [cell.status.value.lower() for cell in benchmark.cells]
    parts = [
        f"{states.count(state)} {state}" for state in ("finished", "failed", "pending") if state in states
    ]
    count = counted(len(states), "cell")
    return f"{count}: {', '.join(parts)}" if parts else count


def facts(benchmark: Benchmark, results: Mapping[str, RunResult]) -> Iterator[tuple[str, str]]:
    """What was compared, where, with which code and prompts: names and texts, in the order of interest."""
    origin = benchmark.provenance
    models = dict.fromkeys(result.model for result in results.values())
    if models:
        yield "model", ", ".join(models)
    yield "compared", _compared(benchmark)
    machine = ", ".join(
        text
        for text in (benchmark.hardware_summary, origin.host, f"fingerprint {benchmark.hardware_fingerprint}")
        if text and not text.endswith(" ")
    )
    yield "machine", machine or "unknown"
    if origin.git_commit:
        dirty = ", with uncommitted changes" if origin.git_dirty else ""
        yield (
            "commit",
            f"{origin.git_commit[:12]}{f' ({origin.git_branch})' if origin.git_branch else ''}{dirty}",
        )
    else:
        yield "commit", "unknown"
    for text in dict.fromkeys(_prompts(result) for result in results.values() if result.dataset):
        yield "prompts", text
    yield "baseline", benchmark.baseline
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(benchmark.started_at_ms / 1000))
    took = ""
    if benchmark.ended_at_ms:
        took = f", took {_duration((benchmark.ended_at_ms - benchmark.started_at_ms) / 1000)}"
    yield "started", started + took
    yield "launches", f"{benchmark.launches} for each cell, every one a process of its own"
    versions = origin.versions
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if origin.command:
        yield "command", origin.command


def warnings(results: Mapping[str, RunResult]) -> Iterator[tuple[str, str]]:
    """Each warning once, with the cells that gave it."""
    cells: dict[str, list[str]] = {}
    for name, result in results.items():
        for warning in result.warnings:
            cells.setdefault(warning, []).append(name)
    for warning, names in cells.items():
        yield ("all cells" if len(names) == len(results) > 1 else ", ".join(names)), warning


def plan_table(rows: Sequence[Row], results: Mapping[str, RunResult]) -> dict[str, list[str]]:
    """Title to a text per row: what tells the plans apart; titles that no plan knows are left out."""
    table: dict[str, list[str]] = {title: [] for title in _PLAN_TITLES}
    for index, row in enumerate(rows):
        for title, text in _plan_facts(results.get(row.name)):
            table[title] = table[title] or ["-"] * len(rows)
            table[title][index] = text
    return {title: texts for title, texts in table.items() if texts}


def _compared(benchmark: Benchmark) -> str:
    values: dict[str, dict[str, None]] = {}
    for cell in benchmark.cells:
        for name, value in cell.axes.items():
            values.setdefault(name, {})[str(value)] = None
    return "; ".join(f"{name} {', '.join(known)}" for name, known in values.items()) or "one cell"


def _prompts(result: RunResult) -> str:
    data = result.dataset
    assert data is not None
    return f"{data.num_prompts} of {data.name}, digest {data.digest[:12]}"


def _plan_facts(result: RunResult | None) -> Iterator[tuple[str, str]]:
    if result is None or not (plan := result.plan):
        return
    policy = plan.get("policy") or {}
    if plan.get("batch_size"):
        yield "batch", str(plan["batch_size"])
    if policy.get("num_micro_batches"):
        yield "micro-batches", f"{policy['num_micro_batches']} of {policy.get('micro_batch_size', '?')}"
    if "overlap" in policy:
        yield "loads ahead", str(policy["overlap"])
    if "sep_layer" in policy:
        yield "attention and MLP", "apart" if policy["sep_layer"] else "together"
    if policy.get("chosen_experts"):
        yield "experts", "only those that a step chooses"
    if policy.get("cpu_attention"):
        yield "attention to KV in host memory", "on the CPU"
    if policy.get("recompute"):
        yield "KV in host memory", f"{policy['recompute']:.0%} of it made anew at each step"
    if "pin_weight" in policy:
        yield "host weights", "page-locked" if policy["pin_weight"] else "pageable"
    for name, title in (("weight_bytes", "weights"), ("kv_bytes", "KV cache")):
        sizes = [value for one in (plan.get(name) or {}).values() if (value := finite(one))]
        if sizes:
            yield title, size(sum(sizes))
    for estimate, how in (("predicted", "expected bound"), ("limit", "limit's bound")):
        one = plan.get(estimate) or {}
        bounds = {
            phase: one[f"{phase}_bound"] for phase in ("prefill", "decode") if one.get(f"{phase}_bound")
        }
        if len(set(bounds.values())) == 1:
            yield how, str(next(iter(bounds.values())))
        elif bounds:
            yield how, " / ".join(str(name) for name in bounds.values())
    moved = (plan.get("predicted") or {}).get("decode_moved_bytes") or {}
    for link, title in (("h2d", "to device"), ("d2h", "from device"), ("disk_read", "read from disk")):
        if value := finite(moved.get(link)):
            yield title, size(value)


def _duration(length_s: float) -> str:
    minutes, rest = divmod(round(length_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
