"""Results as a comparison sees them: a setup's launches, the code they ran, the machine they ran on.

Reads result folders and benchmark folders. Knows nothing of MLflow, which hands in the same records
(`harness/store_reader.py`), and nothing of statistics.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from flexllmgen.errors import UsageError
from harness.benchmark.record import Benchmark, Cell, CellStatus, cell_folder
from harness.benchmark.summary import lost_result
from harness.folders import MARKER
from harness.provenance import short_digest
from harness.results import RunResult, RunStatus

SHORT = 8  # digits of a commit or digest, as people see them

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True, order=True)
class Revision:
    """The code of a run: its commit and, where the tree was not clean, the digest of its changes."""

    commit: str = ""
    dirty: bool = False
    patch: str = ""

    def __str__(self) -> str:
        """As it reads, and can be named: `1a2b3c4d`, `1a2b3c4d+dirty.5e6f7a8b`."""
        text = self.commit[:SHORT] or "no commit"
        return text + ("+dirty" + (f".{self.patch[:SHORT]}" if self.patch else "") if self.dirty else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One result: a run of `harness eval`, or a cell of a benchmark with all its launches.

    Args:
        launches: each process's own result; a run of its own is its only one.
        hardware: the facts of its hardware profile; empty where that is missing.
        group: uuid of the run, or of the benchmark it belongs to.
        baseline: name of the benchmark's baseline cell.
        run_ids: names that MLflow has for the run and, of a cell, its benchmark; where they are known.
        source: where it was found, for people.
        patch: digest of its uncommitted changes.
    """

    result: RunResult
    launches: tuple[RunResult, ...]
    hardware: Mapping[str, Any] = field(default_factory=dict)
    group: str
    baseline: str = ""
    run_ids: tuple[str, ...] = ()
    source: str = ""
    patch: str = ""

    @property
    def revision(self) -> Revision:
        """The code that ran."""
        origin = self.result.provenance
        dirty = bool(origin.git_dirty)
        return Revision(origin.git_commit or "", dirty, self.patch if dirty else "")

    @property
    def finished(self) -> bool:
        """Whether it measured all that it should."""
        return self.result.status is RunStatus.FINISHED and bool(self.result.repeats)

    @property
    def name(self) -> str:
        """What it is called among others: the cell, or the run's name."""
        return self.result.cell.cell if self.result.cell else self.result.run_name

    def values(self, metric: str) -> list[float]:
        """One value per launch: the median over its repeats, or what the launch has once; else the cell's only value."""
        found = []
        for launch in self.launches:
            by_launch: dict[int, list[float]] = {}
            for repeat in launch.repeats:
                if metric in repeat.metrics:
                    by_launch.setdefault(repeat.launch, []).append(repeat.metrics[metric])
            found += [median(values) for _, values in sorted(by_launch.items())]
            if not by_launch and metric in launch.metrics:
                found.append(launch.metrics[metric])
        if not found and metric in self.result.metrics:
            # What only the launches together have, as the parity of a cell.
            found = [self.result.metrics[metric]]
        return found

    def repeated(self, metric: str) -> list[float]:
        """Every repeat's value, of all launches."""
        return [
            repeat.metrics[metric]
            for launch in self.launches
            for repeat in launch.repeats
            if metric in repeat.metrics
        ]


def read_results(folder: Path, warn: Warn) -> list[Measured]:
    """All results directly in a results folder, oldest first; what cannot be read costs a warning."""
    found: list[Measured] = []
    for one in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (one / "result.json").is_file() or (one / "benchmark.json").is_file():
            try:
                found += read_folder(one)
            except UsageError as error:
                warn(f"left out: {error}")
    return sorted(found, key=lambda one: one.result.started_at_ms)


def read_folder(folder: Path) -> list[Measured]:
    """The run, or the benchmark's cells, in one folder.

    Raises:
        UsageError: there is none, it is damaged or of a newer schema.
    """
    if not (folder / "benchmark.json").is_file():
        return [_of_folder(folder)]
    benchmark = Benchmark.read(folder)
    found = []
    for cell in benchmark.cells:
        inside = cell_folder(folder, cell.name)
        if (inside / "result.json").is_file():
            found.append(_of_folder(inside, benchmark, folder))
        elif cell.status is CellStatus.FAILED:
            found.append(lost_cell(benchmark, cell))
    return found


def lost_cell(benchmark: Benchmark, cell: Cell) -> Measured:
    """Stands for a cell that failed before it could leave a result."""
    result = lost_result(benchmark, cell)
    return Measured(
        result=result, launches=(result,), group=benchmark.benchmark_uuid, baseline=benchmark.baseline
    )


def read_file(path: Path) -> list[Measured]:
    """The run or benchmark of a JSON file: one in its folder, or a result.json copied elsewhere under any name.

    Raises:
        UsageError: it is none, damaged or of a newer schema.
    """
    if path.name in ("result.json", "benchmark.json"):
        return read_folder(path.parent)
    try:
        result = RunResult.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    patch = result.provenance.patch_digest or ""
    return [Measured(result=result, launches=(result,), group=result.run_uuid, source=str(path), patch=patch)]


def _of_folder(folder: Path, benchmark: Benchmark | None = None, parent: Path | None = None) -> Measured:
    result = RunResult.read(folder)
    launches = tuple(_launches(folder, result))
    inner = sorted((folder / "launches").glob("*/")) if (folder / "launches").is_dir() else []
    folders = [folder, *inner]
    return Measured(
        result=result,
        launches=launches or (result,),
        hardware=next(filter(None, map(_hardware, folders)), {}),
        group=benchmark.benchmark_uuid if benchmark else result.run_uuid,
        baseline=benchmark.baseline if benchmark else "",
        run_ids=tuple(filter(None, map(_run_id, (folder, *((parent,) if parent else ()))))),
        source=str(folder),
        patch=result.provenance.patch_digest or next(filter(None, map(_patch, folders)), ""),
    )


def _launches(folder: Path, result: RunResult) -> Iterator[RunResult]:
    """The launches of a cell that ended well; one that failed has no part in its figures."""
    uuids: Sequence[str] = result.cell.launches if result.cell else ()
    for uuid in uuids:
        with contextlib.suppress(UsageError):
            launch = RunResult.read(folder / "launches" / uuid)
            if launch.status is RunStatus.FINISHED:
                yield launch


def _hardware(folder: Path) -> Mapping[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return hardware_of_profile((folder / "hardware_profile.json").read_bytes())
    return {}


def hardware_of_profile(content: bytes) -> Mapping[str, Any]:
    """The machine's facts out of a hardware_profile.json, and `threads`: how many of its cores torch was given.

    Raises:
        ValueError: it is no JSON.
    """
    profile = json.loads(content)
    facts = profile.get("hardware", profile) if isinstance(profile, dict) else {}
    return {"threads": profile.get("threads"), **facts} if isinstance(facts, dict) else {}


def _patch(folder: Path) -> str:
    """Of a record older than the field."""
    try:
        return short_digest((folder / "git.diff").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""


def _run_id(folder: Path) -> str:
    try:
        return str(json.loads((folder / MARKER).read_text(encoding="utf-8")).get("run_id") or "")
    except (OSError, ValueError, AttributeError):
        return ""
