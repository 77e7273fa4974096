"""What MLflow shows of a run, worked out from its record: params, metrics, tags, description.

Pure functions from a `RunResult` to names, numbers and words. Knows nothing of MLflow but its limits
on names and lengths, so that what is shown can be tested without a store.
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from harness.quality.words import is_lossy, losses
from harness.results import Provenance, RunError, RunResult, Scalar, Timeline

PARAM_LIMIT, TAG_LIMIT, NAME_LIMIT = 6000, 8000, 250
SAMPLE_INTERVAL_S = 1.0
MAX_SAMPLES = 3600  # of one series; the UI draws no more, and a store keeps every row
MEGABYTE = 1e6  # MLflow's own system metrics count decimal megabytes

# Series of a Timeline -> MLflow's name for it, factor, how samples of one second become one.
# A peak of memory must survive the resampling; a rate is fairer as a mean.
_SYSTEM: dict[str, tuple[str, float, Callable[[Sequence[float]], float]]] = {
    "cpu_percent": ("cpu_utilization_percentage", 1.0, fmean),
    "rss_bytes": ("process_rss_megabytes", 1 / MEGABYTE, max),
    "system_memory_bytes": ("system_memory_usage_megabytes", 1 / MEGABYTE, max),
    "system_memory_percent": ("system_memory_usage_percentage", 1.0, max),
    "device_allocated_bytes": ("device_allocated_megabytes", 1 / MEGABYTE, max),
    "device_reserved_bytes": ("device_reserved_megabytes", 1 / MEGABYTE, max),
    "memory_bytes": ("memory_usage_megabytes", 1 / MEGABYTE, max),
    "utilization_percent": ("utilization_percentage", 1.0, fmean),
    "power_w": ("power_usage_watts", 1.0, fmean),
}
# Counters: shown since the start of the run, as MLflow shows network traffic, and as a rate.
_COUNTERS = {"disk_read_bytes": "disk_read_megabytes", "disk_write_bytes": "disk_write_megabytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One point of one metric."""

    key: str
    value: float
    timestamp_ms: int
    step: int


def clean_name(name: str) -> str:
    """A name that every MLflow store takes: letters, digits, `_ - . / :` and spaces, no odd path.

    >>> clean_name("top-p (95%)")
    'top-p _95__'
    """
    name = re.sub(r"[^\w\-. /:]", "_", name)
    # A store may keep names as files: `a//b` and `../a` would resolve to other names.
    parts = [part for part in name.split("/") if part.strip(". ")]
    return "/".join(parts)[:NAME_LIMIT].rstrip("/") or "_"


def shorten(text: str, limit: int) -> str:
    """`text`, or its beginning and an ellipsis where it is longer than `limit`."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def params_of(result: RunResult) -> dict[str, str]:
    """Params by name, and how many prompts were new and cut; None reads `none`, truth values as in TOML."""
    params = dict(result.params)
    if data := result.dataset:
        params |= {"prompts_unique": data.prompts_unique, "prompts_truncated": data.prompts_truncated}
    return {clean_name(name): shorten(param_text(value), PARAM_LIMIT) for name, value in params.items()}


def metric_rows(result: RunResult) -> list[MetricRow]:
    """All points of all metrics but the system's, each of them finite.

    A repeat is a step, and the run's own value (the median) comes last at step R, so that what MLflow
    calls the latest value is the median. Steps of `itl_by_position_s` are numbers of generated tokens.
    The spread and the cold run's value bear a suffix, not a folder: the UI shows folders first, and in
    alphabetical order each then stands beside its metric.
    """
    ended_ms = result.ended_at_ms or max([result.started_at_ms, *(one.ended_at_ms for one in result.repeats)])
    rows = [
        # By position: the repeats of a cell come from several processes, each of which counts its own.
        MetricRow(key=name, value=value, timestamp_ms=one.ended_at_ms, step=step)
        for step, one in enumerate(result.repeats)
        for name, value in one.metrics.items()
    ]
    repeated = {row.key for row in rows}
    last = len(result.repeats)
    for name, value in result.metrics.items():
        step = last if name in repeated else 0
        rows.append(MetricRow(key=name, value=value, timestamp_ms=ended_ms, step=step))
    for name, value in result.spread.items():
        rows.append(MetricRow(key=f"{name}_spread", value=value, timestamp_ms=ended_ms, step=0))
    for name, value in result.cold.items():
        rows.append(MetricRow(key=f"{name}_cold", value=value, timestamp_ms=ended_ms, step=0))
    for token, gap_s in enumerate(position_medians(result.itl_s), start=2):
        # The first token is number 1, so the first gap ends at token 2.
        rows.append(MetricRow(key="itl_by_position_s", value=gap_s, timestamp_ms=ended_ms, step=token))
    return [_renamed(row) for row in rows if math.isfinite(row.value)]


def position_medians(rows: Sequence[Sequence[float]]) -> list[float]:
    """Median over rows of each position; rows may differ in length.

    >>> position_medians([[1.0, 4.0], [3.0]])
    [2.0, 4.0]
    """
    length = max(map(len, rows), default=0)
    return [median(row[position] for row in rows if position < len(row)) for position in range(length)]


def system_rows(timeline: Timeline) -> list[MetricRow]:
    """System metrics under MLflow's names, one point a second; a short run still has two."""
    rows: list[MetricRow] = []
    for series, values in timeline.series.items():
        points = [
            (time, value)
            for time, value in zip(timeline.time_s, values, strict=False)
            if value is not None and math.isfinite(value)
        ]
        if not points:
            continue
        if series in _COUNTERS:
            rows += _counter_rows(timeline, _COUNTERS[series], points)
            continue
        match = re.fullmatch(r"(gpu_\d+_)?(.+)", series)
        assert match is not None
        if match[2] not in _SYSTEM:
            continue
        name, factor, reduce = _SYSTEM[match[2]]
        for step, bucket in enumerate(_seconds(points)):
            value = factor * reduce([value for _, value in bucket])
            rows.append(_system_row(timeline, f"{match[1] or ''}{name}", value, bucket[-1][0], step))
    return rows


def tags_of(result: RunResult, error: RunError | None) -> dict[str, str]:
    """Tags of the run: the user's, then ours and MLflow's own, which the user's may not replace."""
    cell = result.cell
    ours: dict[str, Scalar] = {
        "harness.kind": "cell" if cell else "eval",
        "harness.run_uuid": result.run_uuid,
        "harness.benchmark_uuid": cell.benchmark_uuid if cell else None,
        "harness.cell": cell.cell if cell else None,
        "harness.strategy": result.strategy,
        "harness.model": result.model,
        "harness.hardware_fingerprint": result.hardware_fingerprint,
        "harness.workload_key": result.workload_key,
        "harness.prompts_digest": result.dataset.digest if result.dataset else None,
    }
    return origin_tags(result.tags, ours, result.process, result.provenance, error)


def origin_tags(
    given: Mapping[str, str],
    ours: Mapping[str, Scalar],
    process: Mapping[str, Scalar],
    origin: Provenance,
    error: RunError | None,
) -> dict[str, str]:
    """`given` by the user, then `ours`, then where a run comes from and how it failed; later ones win."""
    words = shlex.split(origin.command) if origin.command else ["harness"]
    # `/a/long/path/harness eval` shows as `harness eval`; the options are params.
    source = " ".join([Path(words[0]).name, *(word for word in words[1:2] if not word.startswith("-"))])
    known: dict[str, Scalar] = {
        **ours,
        "harness.versions_digest": origin.versions_digest,
        "harness.patch_digest": origin.patch_digest,
        "harness.host": process.get("host") or origin.host,
        "harness.pid": process.get("pid"),
        "harness.pid_started": process.get("pid_started"),
        "harness.error": f"{error.type}: {error.message}" if error else None,
        "harness.exit_code": error.exit_code if error else None,
        "mlflow.user": origin.user,
        "mlflow.source.name": source,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": origin.git_commit,
        "mlflow.source.git.branch": origin.git_branch,
        "mlflow.source.git.dirty": origin.git_dirty,
        "mlflow.source.git.repoURL": origin.git_remote,
    }
    texts = {name: param_text(value) for name, value in known.items() if value not in (None, "")}
    cleaned = {clean_name(name): value for name, value in given.items()}
    return {name: shorten(value, TAG_LIMIT) for name, value in {**cleaned, **texts}.items()}


def describe(result: RunResult, error: RunError | None, pictures: Mapping[str, str] | None = None) -> str:
    """The run in some five lines of markdown: what ran, what came out, on what, with which prompts, where to look.

    `pictures` maps names of artifacts to links. A run that failed tells its error before the figures, or
    in their place where none were measured.
    """
    lines = [_what(result)]
    if error:
        lines.append(f"**{error.type}**: {shorten(error.message, 600)}")
    figures = _figures(result.metrics, result.spread, len(result.repeats))
    if figures or not error:
        lines.append(figures or "Nothing was measured.")
    if lossy := _quality(result):
        lines.append(lossy)
    lines += [_machine(result), _prompts(result)]
    if pictures:
        # Links: a picture shown right here has no width and pushes the rest of the page aside.
        lines.append("**Pictures**: " + ", ".join(f"[{name}]({link})" for name, link in pictures.items()))
    # The UI folds all but some 100 pixels away: a list takes the fewest of them a line.
    return "\n".join(f"- {line}" for line in lines)


def _what(result: RunResult) -> str:
    model = result.model.rstrip("/")
    line = f"**{result.strategy}** on **{model if model.count('/') <= 1 else model.rsplit('/', 1)[-1]}**"
    details = [
        f"{name} {param_text(result.params[name])}" for name in ("dtype", "weights") if name in result.params
    ]
    # The plan's, which a search may have chosen.
    if (batch := result.plan.get("batch_size", result.params.get("batch_size"))) is not None:
        details.append(f"batch {batch}")
    if (gen := result.params.get("gen_len")) is not None:
        details.append(f"{result.params.get('input_len')} tokens in, {gen} out")
    return f"{line}: {', '.join(details)}" if details else line


def _quality(result: RunResult) -> str:
    """What a lossy run gives up and what that costs; empty for a lossless one."""
    if not is_lossy(result.plan):
        return ""
    get, words = result.metrics.get, []
    if (found := get("perplexity")) is not None:
        text = f" on {result.quality.text}" if result.quality and result.quality.text else ""
        against = f" ({ratio - 1:+.2%} of lossless)" if (ratio := get("perplexity_ratio")) is not None else ""
        words.append(f"perplexity {found:.4g}{against}{text}")
    if (share := get("token_match_share")) is not None:
        words.append(f"{share:.1%} of the tokens equal the lossless ones")
    if (prefix := get("equal_prefix_tokens")) is not None:
        words.append(f"the first {prefix:.3g} on average")
    if not words and result.quality and result.quality.notes:
        words = list(result.quality.notes)
    return f"**Lossy**: {losses(result.plan)}" + (f"; {', '.join(words)}" if words else "")


def _machine(result: RunResult) -> str:
    params = result.params
    words = [f"**Machine**: {result.process.get('host') or result.provenance.host or 'unknown'}"]
    if device := result.plan.get("device") or params.get("device"):
        words.append(f"device {device}")
    for name, what in (("gpu_mem", "GPU memory"), ("cpu_mem", "host memory")):
        size = params.get(name)
        if isinstance(size, int | float):
            words.append(f"{what} cap {_bytes(size)}")
    for name, what in (("peak_device_allocated_bytes", "device"), ("peak_rss_bytes", "RSS")):
        if peak := result.metrics.get(name):
            planned = result.metrics.get("predicted_peak_gpu_bytes") if what == "device" else None
            words.append(
                f"peak {what} {_bytes(peak)}" + (f" (predicted {_bytes(planned)})" if planned else "")
            )
    if commit := result.provenance.git_commit:
        words.append(
            f"commit `{commit[:8]}`" + (" with changes (`git.diff`)" if result.provenance.git_dirty else "")
        )
    return ", ".join(words)


def _prompts(result: RunResult) -> str:
    data = result.dataset
    if data is None:
        return "**Prompts**: none were loaded"
    where = "/".join(part for part in (data.config, data.split) if part)
    count = f"{data.num_prompts} of {data.num_rows} rows"
    if data.prompts_unique < data.num_prompts:
        count += f" ({data.prompts_unique} different ones)"
    # A filled row is cut wherever it is full; that is no loss.
    if data.prompts_truncated and data.prompt_mode == "pad":
        count += f" ({data.prompts_truncated} cut)"
    tokens = f"{data.real_tokens:,} real and {data.padded_tokens:,} padding tokens"
    name = f"{data.name} ({where})" if where else data.name
    return f"**Prompts**: {name}, {count}, {tokens}, digest `{data.digest[:12]}`"


def _figures(metrics: Mapping[str, float], spread: Mapping[str, float], repeats: int) -> str:
    """Headline figures; the measured rate beside the predicted one and the limit where these are known."""
    parts: list[str] = []
    if (rate := metrics.get("generation_tok_s")) is not None:
        wobble = spread.get("generation_tok_s")
        count = f" (median of {repeats}, spread {wobble:.1%})" if wobble is not None and repeats > 1 else ""
        parts.append(f"**{rate:.4g} tokens/s**{count}")
    if (predicted := metrics.get("predicted_tok_s")) is not None:
        parts.append(f"predicted {predicted:.4g}")
    if (limit := metrics.get("limit_tok_s")) is not None:
        share = metrics.get("attainment")
        parts.append(f"limit {limit:.4g}" + (f" ({share:.0%})" if share is not None else ""))
    for name, what in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        if (seconds := metrics.get(name)) is not None:
            parts.append(f"{what} {_seconds_text(seconds)}")
    # A run that failed may have been predicted and no more.
    title = "Measured" if "generation_tok_s" in metrics else "Planned"
    return f"**{title}**: {', '.join(parts)}" if parts else ""


def _seconds_text(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _bytes(size: float) -> str:
    gib = size / 2**30
    return f"{gib:.3g} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"


def param_text(value: Scalar) -> str:
    """A value as params and tags show it.

    >>> param_text(None), param_text(True), param_text(0.5)
    ('none', 'true', '0.5')
    """
    if value is None:
        return "none"
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _renamed(row: MetricRow) -> MetricRow:
    return MetricRow(key=clean_name(row.key), value=row.value, timestamp_ms=row.timestamp_ms, step=row.step)


def _seconds(points: Sequence[tuple[float, float]]) -> Iterator[Sequence[tuple[float, float]]]:
    """Split samples into buckets of a second; wider ones for a long run, halves of a very short one."""
    start_s, length_s = points[0][0], points[-1][0] - points[0][0]
    interval_s = min(max(SAMPLE_INTERVAL_S, length_s / MAX_SAMPLES), max(length_s / 2, 1e-9))
    buckets: dict[int, list[tuple[float, float]]] = {}
    for time, value in points:
        buckets.setdefault(int((time - start_s) / interval_s), []).append((time, value))
    yield from buckets.values()


def _counter_rows(
    timeline: Timeline, name: str, points: Sequence[tuple[float, float]]
) -> Iterable[MetricRow]:
    before_s, before = points[0]
    first = before
    for step, bucket in enumerate(_seconds(points)):
        time, value = bucket[-1]
        yield _system_row(timeline, name, (value - first) / MEGABYTE, time, step)
        if time > before_s:
            rate = (value - before) / MEGABYTE / (time - before_s)
            yield _system_row(timeline, f"{name}_per_second", rate, time, step)
        before_s, before = time, value


def _system_row(timeline: Timeline, name: str, value: float, time_s: float, step: int) -> MetricRow:
    at_ms = timeline.started_at_ms + round(time_s * 1000)
    return MetricRow(key=f"system/{name}", value=value, timestamp_ms=at_ms, step=step)
