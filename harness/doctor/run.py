"""The verb `doctor`: asks every theme's checks, mends what it is told to, and reports."""

from collections.abc import Iterator
from pathlib import Path

from flexllmgen.errors import UsageError
from flexllmgen.units import gib
from harness import exit_codes
from harness.config import EvalConfig, cache_dir
from harness.doctor.cache import Kept, check_cache, leftovers, prune
from harness.doctor.disk import check_disk
from harness.doctor.finding import Finding, Level, problem
from harness.doctor.record import check_results, check_store
from harness.doctor.system import check_system
from harness.report import Report
from harness.store import Store, resolve_store
from harness.words import counted


def doctor(
    config: EvalConfig, report: Report, *, fix: bool, prune_old: bool, days: float, as_json: bool
) -> int:
    """Check everything, print a line for each, and return 0, or exit_codes.CHECK_FAILED where there is a problem; notes are none.

    Args:
        fix: mend the store: places of artifacts that moved, runs that died.
        prune_old: remove packs and profiles not used for `days`, and leftovers, before they are counted.
    """
    cache, offload_dir = cache_dir(), config.offload_dir.expanduser().absolute()
    searched = [offload_dir, cache / "models", cache / "profiles", config.results_dir.expanduser()]
    removed: list[Kept] = []
    if prune_old:
        removed = prune(cache, offload_dir, days=days, left=leftovers(searched))
    findings: list[Finding] = []

    def checks() -> Iterator[Finding]:
        yield from check_system()
        yield from check_disk(offload_dir, cache / "profiles")
        yield from check_cache(cache, offload_dir, days=days, left=leftovers(searched))
        yield from check_results(config.results_dir.expanduser())
        store = _store(config)
        if isinstance(store, Finding):
            yield store
        else:
            yield from check_store(store, fix=fix)

    for finding in checks():
        findings.append(finding)
        if not as_json:
            report.finding(finding.level.value, finding.check, finding.found, finding.way_out)
    counts = {level: sum(one.level is level for one in findings) for level in Level}
    healthy = counts[Level.PROBLEM] == 0
    freed_bytes = sum(one.num_bytes for one in removed)
    if as_json:
        report.json(
            {
                "healthy": healthy,
                "findings": [finding.as_dict() for finding in findings],
                "removed": [{"path": str(one.path), "num_bytes": one.num_bytes} for one in removed],
                "freed_bytes": freed_bytes,
            }
        )
    else:
        if prune_old:
            report.text(f"removed {len(removed)} things, {gib(freed_bytes)} freed")
            for one in removed:
                report.text(f"  {one.path} ({gib(one.num_bytes)})")
        notes, problems = counts[Level.NOTE], counts[Level.PROBLEM]
        report.text(f"{counted(problems, 'problem')}, {counted(notes, 'note')}")
    return 0 if healthy else exit_codes.CHECK_FAILED


def _store(config: EvalConfig) -> Store | Finding:
    try:
        return resolve_store(config.tracking_uri, Path.cwd(), create=False)
    except UsageError as error:
        return problem("store", str(error), "mend --tracking-uri or MLFLOW_TRACKING_URI")
