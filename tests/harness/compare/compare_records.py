"""A git repository with real commits, and results of them as runs leave them."""

import itertools
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from records import START_MS, make_result

from harness.compare.select import Records
from harness.results import Provenance, Repeat, RunResult, RunStatus, write_json

WORKLOAD = "tiny/humaneval-01234567/n8/in128/gen32/float32"
HARDWARE: dict[str, Any] = {
    "cpu": "AMD EPYC",
    "logical_cores": 2,
    "memory_bytes": 24 << 30,
    "gpus": [],
    "driver": None,
    "disk": {"filesystem": "ext4"},
}
POLICY = {"micro_batch_size": 4, "num_micro_batches": 1, "overlap": 1}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Tree:
    """A repository and its results folder; `commits` are the shas of `First` to `Fifth`, oldest first."""

    folder: Path
    commits: tuple[str, ...]
    warnings: list[str] = field(default_factory=list)

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def records(self, store: Callable[[], object] | None = None) -> Records:
        return Records(self.results, store=store, cwd=self.folder, warn=self.warnings.append)  # type: ignore[arg-type]


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command, as nobody."""
    identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, subject: str) -> str:
    """Make a commit that changes a file, and return its name."""
    (folder / "code.py").write_text(f"subject = {subject!r}\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "-qm", subject)
    return git(folder, "rev-parse", "HEAD")


def leave(
    results: Path,
    sha: str | None,
    tok_s: float,
    *,
    hardware: dict[str, Any] | None = None,
    fingerprint: str = "c0ffee",
    origin: dict[str, Any] | None = None,
    peak_bytes: float = 1.5e9,
    **changes: Any,
) -> RunResult:
    """Leave a run of `sha` that made `tok_s` tokens a second, half a percent apart in its two repeats."""
    number = next(_numbers)
    rates = (tok_s * 0.9975, tok_s * 1.0025)
    repeats = [
        Repeat(
            index=index,
            ended_at_ms=START_MS + number * 1000 + index,
            metrics={"generation_tok_s": rate, "ttft_s": 10 / rate, "tpot_s": 1 / rate},
        )
        for index, rate in enumerate(rates)
    ]
    fields: dict[str, Any] = {
        "run_uuid": f"{number:032x}",
        "run_name": "flexgen tiny b4",
        "strategy": "flexgen",
        "params": {
            "strategy": "flexgen", "model": "owner/tiny", "batch_size": 4, "gpu_mem": None, "cpu_mem": None, "device": "cpu",
            "weights": "pretrained", "repeats": 2, "overlap": 1, "policy_overlap": 1,
        },
        "param_sources": {"batch_size": "option --batch-size", "gpu_mem": "default", "cpu_mem": "default",
                          "overlap": "default (flexgen.toml)"},
        "started_at_ms": START_MS + number * 1000,
        "ended_at_ms": START_MS + number * 1000 + 500,
        "metrics": {"generation_tok_s": tok_s, "ttft_s": 10 / tok_s, "tpot_s": 1 / tok_s, "peak_rss_bytes": peak_bytes},
        "spread": {},
        "repeats": repeats,
        "itl_s": [],
        "provenance": Provenance(
            **{
                "git_commit": sha,
                "git_branch": "trunk",
                "git_dirty": False,
                "versions": {"torch": "2.13.0"},
                "versions_digest": "0" * 16,
                **(origin or {}),
            }
        ),
        "hardware_fingerprint": fingerprint,
        "workload_key": WORKLOAD,
        "plan": {"policy": POLICY, "shares": {"weights": {"gpu": 100.0, "cpu": 0.0, "disk": 0.0}}},
        **changes,
    }  # fmt: skip
    result = make_result(**fields)
    result.write(results / result.run_uuid)
    write_json(results / result.run_uuid / "hardware_profile.json", {"hardware": hardware or HARDWARE})
    return result


def leave_many(results: Path, sha: str | None, rates: Sequence[float], **changes: Any) -> list[RunResult]:
    """Leave one run for each rate: the launches of one setup at one commit."""
    return [leave(results, sha, rate, **changes) for rate in rates]


def leave_failed(results: Path, sha: str | None, message: str, **changes: Any) -> RunResult:
    """Leave a run that failed before it measured anything."""
    from harness.results import RunError

    error = RunError(type="OutOfMemory", message=message, exit_code=5)
    return leave(results, sha, 1.0, status=RunStatus.FAILED, repeats=[], metrics={}, error=error, **changes)
