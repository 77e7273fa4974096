"""Whether cells generated the same tokens from the same prompts. Knows nothing of how they were run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexllmgen.errors import UsageError
from harness.benchmark.merge import launch_folder
from harness.benchmark.record import Benchmark, Parity
from harness.benchmark.table import baseline_of
from harness.quality.words import is_lossy
from harness.results import RunResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """The prompts of a run and what it made of them, row by row, as token ids."""

    input_ids: Sequence[Sequence[int]]
    output_ids: Sequence[Sequence[int]]


def read_sequences(folder: Path) -> Sequences | None:
    """The token ids of the result folder; None where it holds none, or a run that was cut short made not all.

    Raises:
        UsageError: the file is damaged.
    """
    path = folder / "requests.jsonl"
    if not path.exists():
        return None
    try:
        # Bytes: lines of text would also end at characters that a prompt may hold (U+2028).
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        inputs = [[int(token) for token in row["input_ids"]] for row in rows]
        outputs = [[int(token) for token in row["output_ids"]] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); run the cell again") from error
    return Sequences(input_ids=inputs, output_ids=outputs) if rows and all(outputs) else None


def compare(baseline: Sequences, other: Sequences) -> Parity:
    """How far the tokens agree.

    Raises:
        UsageError: the prompts are not the same token ids, row by row.
    """
    if [list(ids) for ids in baseline.input_ids] != [list(ids) for ids in other.input_ids]:
        raise UsageError("the prompts' token ids differ, so that the tokens made of them cannot be compared")
    equal = 0
    first: int | None = None
    for mine, theirs in zip(other.output_ids, baseline.output_ids, strict=True):
        position = _divergence(mine, theirs)
        if position is None:
            equal += 1
        else:
            first = position if first is None else min(first, position)
    return Parity(equal_share=equal / len(baseline.output_ids), first_divergence=first)


def parity_of(
    folder: Path, benchmark: Benchmark, results: Mapping[str, RunResult]
) -> tuple[dict[str, Parity], list[str]]:
    """Each cell's tokens beside those of its baseline, by cell name, and a line for each that cannot be compared.

    The baseline is the one that the table holds the cell against. A cell of several launches is as equal as the least
    equal of them; the baseline's own launches are compared with its first.
    """
    parities: dict[str, Parity] = {}
    refused: list[str] = []
    for cell in benchmark.cells:
        if cell.name not in results:
            continue
        base = baseline_of(cell, benchmark, results)
        theirs = None if base is None else _first(folder, results[base], base)
        mine = [_sequences(folder, cell.name, uuid) for uuid in _launches(results[cell.name])]
        there = [one for one in mine if one is not None]
        if base is None or theirs is None or not there:
            continue
        try:
            found = [compare(theirs, one) for one in there]
        except UsageError as error:
            refused.append(f"{cell.name} and {base}: {error}")
            continue
        divergences = [one.first_divergence for one in found if one.first_divergence is not None]
        parities[cell.name] = Parity(
            equal_share=min(one.equal_share for one in found),
            first_divergence=min(divergences) if divergences else None,
            expected=not any(is_lossy(results[name].plan) for name in (cell.name, base)),
        )
    return parities, refused


def with_parity(result: RunResult, parity: Parity) -> RunResult:
    """The result with its parity among the metrics; no divergence is no metric."""
    metrics = {name: value for name, value in result.metrics.items() if name != "first_divergence"} | {
        "parity": parity.equal_share
    }
    if parity.first_divergence is not None:
        metrics["first_divergence"] = float(parity.first_divergence)
    return result.model_copy(update={"metrics": metrics})


def _divergence(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    for position, (one, other) in enumerate(zip(mine, theirs, strict=False)):
        if one != other:
            return position
    return None if len(mine) == len(theirs) else min(len(mine), len(theirs))


def _launches(result: RunResult) -> list[str]:
    return list(result.cell.launches) if result.cell is not None else []


def _first(folder: Path, result: RunResult, cell: str) -> Sequences | None:
    return next(
        (one for uuid in _launches(result) if (one := _sequences(folder, cell, uuid)) is not None), None
    )


def _sequences(folder: Path, cell: str, run_uuid: str) -> Sequences | None:
    return read_sequences(launch_folder(folder, cell, run_uuid))
