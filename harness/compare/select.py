"""What A and B of a comparison name: commits, branches, tags, runs, benchmarks, the latest, files.

Looked for among the result folders first, then in the MLflow store. All runs of one setup at one commit are its launches.
Knows nothing of MLflow.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flexllmgen.errors import UsageError
from harness.compare.commits import describe, distance, resolve
from harness.compare.measured import SHORT, Measured, Revision, Warn, read_file, read_folder, read_results
from harness.results import RunStatus

if TYPE_CHECKING:
    from harness.store_reader import StoreReader

_LATEST = re.compile(r"@latest(?:~(?P<back>\d+))?(?::(?P<strategy>[^~]+))?(?:~(?P<back2>\d+))?")
_DIRTY = re.compile(r"(?P<name>.+)\+dirty(?:\.(?P<patch>[0-9a-f]+))?")
# MLflow's ids and ours; a cell's goes on with its name.
_RUN_ID = re.compile(r"[0-9a-f-]{32}")
# The first digits, as a list of runs shows them.
_ID_BEGINNING = re.compile(r"[0-9a-f-]{8,}")
_SHA = re.compile(r"[0-9a-f]{4,40}")
_LISTED = 5  # how many commits an error names


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a name stands for.

    Args:
        title: the name and what it came to, for people.
        measured: results with figures, oldest first; `failed` those that ended without.
    """

    name: str
    title: str
    measured: tuple[Measured, ...]
    failed: tuple[Measured, ...] = ()

    @property
    def run_uuids(self) -> set[str]:
        """Which results these are."""
        return {one.result.run_uuid for one in (*self.measured, *self.failed)}


class Records:
    """Where results are looked for.

    Args:
        results_dir: folder of result folders; it need not exist.
        store: makes the reader of the MLflow store when it is first needed; None where there is no store.
        cwd: where git is asked.
    """

    def __init__(
        self, results_dir: Path, *, store: "Callable[[], StoreReader] | None", cwd: Path, warn: Warn
    ) -> None:
        self.results_dir = results_dir
        self.cwd = cwd
        self._open_store = store
        self.warn = warn

    @cached_property
    def local(self) -> list[Measured]:
        """Results of the folder that have ended, oldest first."""
        return [one for one in read_results(self.results_dir, self.warn) if _ended(one)]

    @cached_property
    def store(self) -> "StoreReader | None":
        """The store, where there is one."""
        return self._open_store() if self._open_store else None

    def everything(self) -> list[Measured]:
        """All finished results of folder and store, each once, oldest first.

        Raises:
            UsageError: the store is unreachable, and the folder has nothing.
        """
        found = list(self.local)
        try:
            if self.store is not None:
                found += self.store.newest(but={one.result.run_uuid for one in self.local})
        except UsageError as error:
            if not self.local:
                raise
            self.warn(f"{error}; what follows is of {self.results_dir} alone")
        return sorted((one for one in found if one.finished), key=lambda one: one.result.started_at_ms)

    def select(self, name: str) -> Selection:
        """Find what `name` stands for.

        Raises:
            UsageError: nothing, or several dirty states of one commit; the message lists what there is. Or the store
                is unreachable.
        """
        if match := _LATEST.fullmatch(name):
            back = int(match["back"] or match["back2"] or 0)
            return self._latest(name, back, match["strategy"])
        if name.startswith("@"):
            raise UsageError(f"{name!r}: after @ there is only latest: @latest, @latest~1, @latest:flexgen")
        if (path := _existing(name)) is not None and (found := _of_path(path)) is not None:
            return self._chosen(name, [one for one in found if _ended(one)])
        if found := self._of_run(name):
            return self._chosen(name, found)
        return self._of_revision(name)

    def _latest(self, name: str, back: int, strategy: str | None) -> Selection:
        found = _of_strategy(_nth_group(reversed(self.local), back, strategy), strategy)
        if not self.local and self.store is not None:
            newest = _nth_group(self.store.newest(), back, strategy, first_only=True)
            group = self.store.of_run(newest[0].run_ids[-1]) if newest else []
            found = _of_strategy([one for one in group if _ended(one)], strategy)
        if not found:
            groups = len(dict.fromkeys(one.group for one in self.local if one.finished))
            strategies = sorted({one.result.strategy for one in self.local if one.finished})
            there = f"{groups} finished runs and benchmarks" + (
                f" of {', '.join(strategies)}" if strategies else ""
            )
            raise UsageError(f"{name}: there are {there} in {self.results_dir}; see `harness history`")
        return self._chosen(name, found)

    def _of_run(self, name: str) -> list[Measured]:
        """Results by our ids or MLflow's, of runs, cells and benchmarks; folders first."""

        def is_named(one: Measured) -> bool:
            return name in _ids(one)

        found = [one for one in self.local if is_named(one)] or self._beginning(name)
        if not found and _RUN_ID.match(name) and self.store is not None:
            found = [one for one in self.store.of_run(name) if _ended(one)]
        return found

    def _beginning(self, name: str) -> list[Measured]:
        """Results of the folder whose ids begin with `name`, if it is long enough and no commit's.

        Raises:
            UsageError: several runs or benchmarks begin so.
        """
        if not _ID_BEGINNING.fullmatch(name):
            return []
        found = [one for one in self.local if any(each.startswith(name) for each in _ids(one))]
        if not found or resolve(self.cwd, name):
            return []
        groups = sorted({one.group for one in found})
        if len(groups) > 1:
            shown = ", ".join(groups[:_LISTED])
            raise UsageError(f"{name!r} begins the ids of several runs: {shown}; give more digits")
        return found

    def _of_revision(self, name: str) -> Selection:
        match = _DIRTY.fullmatch(name)
        plain = match["name"] if match else name
        commit = resolve(self.cwd, plain) or (plain if _SHA.fullmatch(plain) else None)
        if commit is None:
            raise UsageError(
                f"{name!r} is no commit, branch or tag here, no run and no result file; {self._listed(None)}"
            )
        found = [one for one in self.local if one.revision.commit.startswith(commit)]
        if not found and self.store is not None:
            found = [one for one in self.store.of_commit(commit) if _ended(one)]
        commits = sorted({one.revision.commit for one in found})
        if len(commits) > 1:
            shown = ", ".join(one[: SHORT + 4] for one in commits[:_LISTED])
            raise UsageError(f"{name!r} begins several commits that have results: {shown}; give more digits")
        revisions = sorted({one.revision for one in found})
        wanted = [one for one in revisions if _is_wanted(one, bool(match), match["patch"] if match else None)]
        if not wanted:
            others = "; it has results of " + ", ".join(map(str, revisions)) if revisions else ""
            shown = f"{name} ({commit[:SHORT]})" if not commit.startswith(plain) else name
            raise UsageError(
                f"no results of {shown}{' from a clean tree' if others and not match else ''}"
                f"{others or '; ' + self._listed(commit)}"
            )
        if len(wanted) > 1:
            raise UsageError(f"{name} has several dirty states: name one of {', '.join(map(str, wanted))}")
        return self._chosen(name, [one for one in found if one.revision == wanted[0]])

    def _chosen(self, name: str, found: Sequence[Measured]) -> Selection:
        measured = tuple(one for one in found if one.finished)
        failed = tuple(one for one in found if not one.finished)
        if not measured:
            reason = next(
                (one.result.error.message for one in failed if one.result.error), "nothing measured"
            )
            raise UsageError(f"{name}: no run that finished ({reason})")
        revisions = list(dict.fromkeys(one.revision for one in measured))
        title = ", ".join(self._revision_title(one) for one in revisions[:3])
        if len(revisions) > 3:
            title += f" and {len(revisions) - 3} more"
        return Selection(name=name, title=title, measured=measured, failed=failed)

    def _revision_title(self, revision: Revision) -> str:
        known = describe(self.cwd, [revision.commit]).get(revision.commit)
        return f"{revision} {known.subject}" if known else str(revision)

    def _listed(self, commit: str | None) -> str:
        """Commits that have results, in words; the nearest to `commit` first, or else the newest."""
        counts: dict[str, int] = {}
        for one in reversed(self.local):
            if one.revision.commit and one.finished:
                counts[one.revision.commit] = counts.get(one.revision.commit, 0) + 1
        if not counts and self.store is not None:
            counts = self.store.commits()
        if not counts:
            where = f"{self.results_dir}" + (" and the store hold" if self.store is not None else " holds")
            return f"{where} no results of any commit: run `harness eval` or `harness benchmark` first"
        words = {sha: f"{sha[:SHORT]} ({count})" for sha, count in counts.items()}
        if commit is not None:
            away = {
                sha: steps for sha in [*counts][:50] if (steps := distance(self.cwd, commit, sha)) is not None
            }
            for sha, steps in away.items():
                words[sha] = f"{sha[:SHORT]} ({counts[sha]}, {steps} commit{'s' if steps != 1 else ''} away)"
            words = {sha: words[sha] for sha in sorted(words, key=lambda sha: away.get(sha, 10**9))}
        shown = ", ".join([*words.values()][:_LISTED])
        more = f" and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
        return f"commits with results: {shown}{more}"


def _existing(name: str) -> Path | None:
    """The file or folder of that name, where there is one."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        # Too long for a file, or a home that nobody has: `~1` may well be meant for git.
        return None


def _of_path(path: Path) -> list[Measured] | None:
    """The records that a path names; None where it names none.

    Raises:
        UsageError: a record that cannot be read, or a folder of many.
    """
    if path.is_file() and path.suffix == ".json":
        return read_file(path)
    if not path.is_dir():
        return None
    if (path / "benchmark.json").is_file() or (path / "result.json").is_file():
        return read_folder(path)
    if any(path.glob("*/result.json")) or any(path.glob("*/benchmark.json")):
        raise UsageError(f"{path} holds several results: name one folder in it, or give it as --results-dir")
    return None


def _nth_group(
    newest_first: Iterator[Measured], back: int, strategy: str | None, *, first_only: bool = False
) -> list[Measured]:
    """The run, or the cells of the benchmark, that comes `back` places after the newest; of the latter perhaps one."""
    groups: dict[str, list[Measured]] = {}
    # A group counts by what it finished, and has all of its cells, also those that failed after that.
    counting: dict[str, None] = {}
    for one in newest_first:
        groups.setdefault(one.group, []).insert(0, one)
        if one.finished and strategy in (None, one.result.strategy):
            counting[one.group] = None
            if first_only and len(counting) > back:
                break
    return groups[[*counting][back]] if len(counting) > back else []


def _of_strategy(found: Sequence[Measured], strategy: str | None) -> list[Measured]:
    return [one for one in found if strategy in (None, one.result.strategy)]


def _is_wanted(revision: Revision, dirty: bool, patch: str | None) -> bool:
    return revision.dirty == dirty and (patch is None or revision.patch.startswith(patch))


def _ids(one: Measured) -> tuple[str, ...]:
    """What a result may be named by: our id, its benchmark's, MLflow's."""
    return (one.result.run_uuid, one.group, *one.run_ids)


def _ended(one: Measured) -> bool:
    return one.result.status is not RunStatus.RUNNING
