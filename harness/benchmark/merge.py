"""Makes one result of the processes that measured a cell, in a result folder like that of any run.

Knows nothing of how the launches came about.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flexllmgen.units import gib
from harness.benchmark.record import Benchmark, Cell, CellStatus, cell_folder
from harness.benchmark.table import predicted_peaks
from harness.measure import median_and_spread, ratios_to_plan
from harness.quality.words import is_lossy, losses
from harness.results import CellLink, RunError, RunResult, RunStatus, write_text

# What a result folder holds beside the result; one launch's stand for all.
_BULK = (
    "requests.jsonl",
    "plan.json",
    "hardware_profile.json",
    "timeline.json",
    "environment.txt",
    "git.diff",
    "run.log",
)
# What an error's message goes on with where it tells of peaks.
PEAKS = " (peak "
_TIERS = {"gpu": "on the compute device", "cpu": "in host memory", "disk": "on disk"}


def launch_folder(folder: Path, cell: str, run_uuid: str) -> Path:
    """The result folder of one launch of a cell of the benchmark at `folder`."""
    return cell_folder(folder, cell) / "launches" / run_uuid


def merge(benchmark: Benchmark, cell: Cell, launches: Sequence[RunResult]) -> RunResult:
    """The cell's result: every repeat of every launch, and the median over launches of each launch's median.

    `spread` is (max - min) / median over the launches' medians where there are several, else over the repeats. Launches of a
    strategy that plans for itself may run different policies: the plan is that of most of them, and so is what is said only
    once (peaks, load time, prediction, quality: the median over those), and a warning tells of the others. The result is
    RUNNING while launches are missing, or KILLED where the benchmark was interrupted.

    Args:
        launches: their results, in order; at least one.
    """
    measured = [one for one in launches if one.repeats]
    shown, alike = shown_launch(launches), _of_most(measured or launches)
    repeats = [
        repeat.model_copy(update={"launch": number})
        for number, one in enumerate(launches)
        for repeat in one.repeats
    ]
    metrics, spread = _figures(measured or list(launches), alike)
    if repeats:
        metrics["repeats"] = float(len(repeats))
        metrics["launches"] = float(len(measured))
    ended = [one.ended_at_ms for one in launches if one.ended_at_ms is not None]
    status = {CellStatus.FINISHED: RunStatus.FINISHED, CellStatus.FAILED: RunStatus.FAILED}.get(
        cell.status, RunStatus.KILLED if benchmark.status is RunStatus.KILLED else RunStatus.RUNNING
    )
    params = {**shown.params, "results_dir": cell.common.get("results_dir"), "run_name": None}
    return shown.model_copy(
        update={
            "run_uuid": f"{benchmark.benchmark_uuid}-{cell.name}",
            "run_name": cell.name,
            "status": status,
            "started_at_ms": launches[0].started_at_ms,
            "ended_at_ms": max(ended) if ended and status is not RunStatus.RUNNING else None,
            "process": benchmark.process,
            "params": params,
            "metrics": metrics,
            "spread": spread,
            "repeats": [repeat.model_copy(update={"index": index}) for index, repeat in enumerate(repeats)],
            "cold": next((one.cold for one in launches if one.cold), {}),
            "itl_s": [gaps for one in launches for gaps in one.itl_s],
            "cell": CellLink(
                benchmark_uuid=benchmark.benchmark_uuid,
                cell=cell.name,
                launches=[one.run_uuid for one in launches],
            ),
            "warnings": list(
                dict.fromkeys(
                    [*(text for one in launches for text in one.warnings), *_others(measured, alike)]
                )
            ),
            "error": cell.error,
        }
    )


def shown_launch(launches: Sequence[RunResult]) -> RunResult:
    """The launch whose plan and requests stand for the cell: the last that ran the policy of most of them."""
    return _of_most([one for one in launches if one.repeats] or launches)[-1]


def write_cell(folder: Path, result: RunResult, bulk_of: Path) -> None:
    """Write the cell's result folder; what is too big to merge is taken over from the launch at `bulk_of`."""
    assert result.cell is not None
    inside = cell_folder(folder, result.cell.cell)
    inside.mkdir(parents=True, exist_ok=True)
    for name in _BULK:
        if (bulk_of / name).exists():
            temporary = inside / f".{name}"
            shutil.copyfile(bulk_of / name, temporary)
            temporary.replace(inside / name)
    if result.error is not None and result.error.traceback:
        write_text(inside / "error.txt", result.error.traceback)
    else:
        (inside / "error.txt").unlink(missing_ok=True)
    for picture in inside.glob("*.png"):
        # It was of fewer launches.
        picture.unlink()
    result.write(inside)


def explain(error: RunError, result: RunResult | None, seen: Mapping[str, int]) -> RunError:
    """`error` with the peaks that were predicted and those that were reached, where either is known.

    Args:
        seen: peaks that this process saw from outside, by tier, in bytes; the result's own go first.
    """
    metrics = {} if result is None else result.metrics
    planned = (None, None, None) if result is None else predicted_peaks(result)
    reached = {
        "gpu": metrics.get("peak_device_allocated_bytes"),
        "cpu": metrics.get("peak_rss_bytes"),
        "disk": metrics.get("offload_disk_bytes"),
    }
    words = []
    for (tier, place), predicted in zip(_TIERS.items(), planned, strict=True):
        actual = reached[tier] or seen.get(tier)
        if not predicted and not actual:
            continue
        texts = [
            f"predicted {_bytes(predicted)}" if predicted else "",
            f"reached {_bytes(actual)}" if actual else "",
        ]
        words.append(f"{place} " + ", ".join(text for text in texts if text))
    if not words:
        return error
    return error.model_copy(update={"message": f"{error.message}{PEAKS}{'; '.join(words)})"})


def _bytes(size: float) -> str:
    return f"{gib(size)} = {int(size)} bytes"


def _of_most(launches: Sequence[RunResult]) -> list[RunResult]:
    """The launches that ran the policy of most of them; among equals the first one's. Shares differ from start to start."""
    by_policy: dict[str, list[RunResult]] = {}
    for one in launches:
        policy = {**(one.plan.get("policy") or {}), "recompute": None}
        by_policy.setdefault(repr(sorted(policy.items())), []).append(one)
    return max(by_policy.values(), key=len)


def _others(measured: Sequence[RunResult], alike: Sequence[RunResult]) -> Iterator[str]:
    """A line on launches that ran another policy than the one that is shown."""
    others = [one for one in measured if one not in alike]
    if not others:
        return
    told = [f"{(one.metrics.get('generation_tok_s') or 0):,.4g} tok/s{_quality(one)}" for one in others]
    yield (
        f"the plan shown is that of {len(alike)} of {len(measured)} launches; other policies, planned again by what those "
        f"launches measured: {'; '.join(told)}"
    )


def _quality(one: RunResult) -> str:
    ratio = one.metrics.get("perplexity_ratio")
    lossy = f", {losses(one.plan)}" if is_lossy(one.plan) else ", lossless"
    return lossy if ratio is None else f"{lossy}, perplexity {ratio - 1:+.2%}"


def _figures(
    launches: Sequence[RunResult], alike: Sequence[RunResult]
) -> tuple[dict[str, float], dict[str, float]]:
    metrics, spread = median_and_spread([one.metrics for one in launches])
    repeated = {name for one in launches for repeat in one.repeats for name in repeat.metrics}
    # What one policy's launches say once is not mixed with another's.
    once, _ = median_and_spread([one.metrics for one in alike])
    metrics = {name: value for name, value in metrics.items() if name in repeated} | {
        name: value for name, value in once.items() if name not in repeated
    }
    spread = {name: value for name, value in spread.items() if name in repeated}
    if len(launches) == 1:
        spread = dict(launches[0].spread)
    # A median of ratios need not be the ratio of the medians beside it.
    return metrics | ratios_to_plan(metrics), spread
