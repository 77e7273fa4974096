"""Finds a benchmark that was interrupted or died, and makes this process its owner. Runs nothing."""

from collections.abc import Sequence
from pathlib import Path

from flexllmgen.errors import UsageError
from harness.benchmark.record import Benchmark
from harness.provenance import collect_provenance, process_is_alive
from harness.report import Report
from harness.results import Provenance, RunStatus

LATEST = "@latest"


def find_benchmark(which: str, results_dir: Path, report: Report) -> Path:
    """The folder of a benchmark by its uuid (or the beginning of it), its folder, or @latest of those that can be read.

    Raises:
        UsageError: there is none, or several begin so.
    """
    files = list(results_dir.glob("*/benchmark.json"))
    if which == LATEST:
        started = {}
        for file in files:
            try:
                started[file.parent] = Benchmark.read(file.parent).started_at_ms
            except UsageError as error:
                report.warn(f"left out: {error}")
        if not started:
            raise UsageError(
                f"--resume @latest: {results_dir} holds no benchmark; name its folder, or give --results-dir"
            )
        return max(started, key=lambda folder: started[folder])
    if (Path(which) / "benchmark.json").exists():
        return Path(which)
    found = [file.parent for file in files if which and file.parent.name.startswith(which)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--resume {which}: {len(found)} benchmarks begin so; name more of the uuid")
    raise UsageError(
        f"--resume {which}: no such benchmark in {results_dir}; name its folder, or take {LATEST}"
    )


def take_over(folder: Path, report: Report, argv: Sequence[str]) -> tuple[Benchmark, Provenance]:
    """The benchmark at `folder` and the provenance of the code that is going to run the rest of it.

    Raises:
        UsageError: another process is running it, or it cannot be read.
    """
    benchmark = Benchmark.read(folder)
    if benchmark.status is RunStatus.RUNNING and process_is_alive(benchmark.process):
        raise UsageError(
            f"{folder} is still running (pid {benchmark.process.get('pid')}); wait for it, or interrupt it first"
        )
    now = collect_provenance(Path.cwd(), argv)
    was = benchmark.provenance
    if (was.git_commit, was.patch_digest) != (now.git_commit, now.patch_digest):
        report.warn("the code has changed since this benchmark was started; its cells are not of one state")
    if was.versions_digest != now.versions_digest:
        report.warn("installed packages have changed since this benchmark was started")
    return benchmark, now
