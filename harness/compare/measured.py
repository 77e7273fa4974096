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
from flexllmgen.units import gib
from harness.benchmark.record import Benchmark, CellStatus, cell_folder
from harness.benchmark.summary import lost_result
from harness.config import EvalConfig
from harness.provenance import short_digest
from harness.results import RunResult, RunStatus, Scalar

SHORT = 8  # digits of a commit or digest, as people see them
# Options that shape what is measured and are not in the workload key; of the others only strategies' own keys count.
_SHAPING = ("model", "batch_size", "device", "gpu_mem", "cpu_mem", "weights")
# What came out of planning, and where files lie.
_OUTCOME = ("model_path", "model_revision", "path")
MARKER = ".delivered.json"

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
        """One value per launch: the median over its repeats, or what the launch has once."""
        found = []
        for launch in self.launches:
            by_launch: dict[int, list[float]] = {}
            for repeat in launch.repeats:
                if metric in repeat.metrics:
                    by_launch.setdefault(repeat.launch, []).append(repeat.metrics[metric])
            found += [median(values) for _, values in sorted(by_launch.items())]
            if not by_launch and metric in launch.metrics:
                found.append(launch.metrics[metric])
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
            lost = lost_result(benchmark, cell)
            found.append(Measured(result=lost, launches=(lost,), group=benchmark.benchmark_uuid))
    return found


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


def setup_of(result: RunResult) -> dict[str, Scalar]:
    """What was asked for, beside workload and strategy: batch size, caps, device, the strategy's keys."""
    found: dict[str, Scalar] = {}
    for name, value in result.params.items():
        common = name in EvalConfig.model_fields
        if name in _SHAPING or not (common or name in _OUTCOME or name.startswith("policy_")):
            found[name] = value
    # A local model is the same model in another folder.
    model = str(found.get("model") or result.model).rstrip("/")
    found["model"] = model.rsplit("/", 1)[-1] if model.startswith(("/", ".", "~")) else model
    return found


def setup_differences(base: RunResult, new: RunResult) -> dict[str, tuple[str, str]]:
    """What tells two setups apart, name to both values; empty for launches of the same cell.

    A key that one of them lacks, since its code is older, counts only where the other does not leave it at its default.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, one, other in (
        ("workload", base.workload_key, new.workload_key),
        ("strategy", base.strategy, new.strategy),
    ):
        if one != other:
            found[name] = (one, other)
    return found | key_differences(base, new, setup_of(base), setup_of(new))


def key_differences(
    base: RunResult, new: RunResult, base_keys: Mapping[str, Scalar], new_keys: Mapping[str, Scalar]
) -> dict[str, tuple[str, str]]:
    """Those of the keys whose values differ."""
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(set(base_keys) | set(new_keys)):
        if name in base_keys and name in new_keys:
            same = base_keys[name] == new_keys[name]
        else:
            present = base if name in base_keys else new
            same = present.param_sources.get(name, "").startswith("default")
        if not same:
            found[name] = (scalar_text(base_keys.get(name)), scalar_text(new_keys.get(name)))
    return found


def hardware_differences(base: Measured, new: Measured) -> dict[str, tuple[str, str]]:
    """What tells two machines apart, name to both values; empty for the same machine by its fingerprint."""
    if base.result.hardware_fingerprint == new.result.hardware_fingerprint != "":
        return {}
    one, other = _hardware_facts(base), _hardware_facts(new)
    found = {
        name: (one.get(name, "unknown"), other.get(name, "unknown"))
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    }
    pair = (base.result.hardware_fingerprint or "unknown", new.result.hardware_fingerprint or "unknown")
    return found or {"fingerprint": pair}


def machine_of(measured: Measured) -> str:
    """The machine in a few words; its fingerprint where nothing else is known."""
    facts = _hardware_facts(measured)
    known = [facts[name] for name in ("GPU", "processor") if facts.get(name, "none") != "none"]
    if not known:
        return f"machine {measured.result.hardware_fingerprint[:SHORT] or 'unknown'}"
    return ", ".join(known) + f", {facts['cores']} cores"


def version_differences(base: Measured, new: Measured) -> dict[str, tuple[str, str]]:
    """Installed packages that differ, as far as they are known by name; else their digests."""
    one, other = base.result.provenance, new.result.provenance
    names = sorted(set(one.versions) & set(other.versions))
    found = {
        name: (one.versions[name], other.versions[name])
        for name in names
        if one.versions[name] != other.versions[name]
    }
    digests = (one.versions_digest, other.versions_digest)
    if not found and None not in digests and digests[0] != digests[1]:
        found["other packages"] = (str(digests[0])[:SHORT], str(digests[1])[:SHORT])
    return found


def scalar_text(value: Scalar) -> str:
    """A setting as people write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "unset" if value is None else str(value)


def told(differences: Mapping[str, tuple[str, str]], *, between: str = " against ", limit: int = 6) -> str:
    """Differences in one line: `cores 2 against 16, GPU none against H200`."""
    shown = [f"{name} {one}{between}{other}" for name, (one, other) in list(differences.items())[:limit]]
    more = len(differences) - limit
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _hardware_facts(measured: Measured) -> dict[str, str]:
    facts, result = measured.hardware, measured.result
    found: dict[str, str] = {}
    if facts:
        gpus = [f"{gpu['name']} {gib(gpu['memory_bytes'])}" for gpu in facts.get("gpus") or ()]
        found["GPU"] = " + ".join(gpus) or "none"
        found["processor"] = str(facts.get("cpu"))
        found["cores"] = str(facts.get("logical_cores"))
        found["memory"] = gib(float(facts.get("memory_bytes") or 0))
        found["driver"] = str(facts.get("driver") or "none")
        found["file system"] = str((facts.get("disk") or {}).get("filesystem"))
    if torch := result.provenance.versions.get("torch"):
        found["torch"] = torch
    return found


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
    """The machine's facts out of a hardware_profile.json.

    Raises:
        ValueError: it is no JSON.
    """
    profile = json.loads(content)
    facts = profile.get("hardware", profile) if isinstance(profile, dict) else {}
    return facts if isinstance(facts, dict) else {}


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
