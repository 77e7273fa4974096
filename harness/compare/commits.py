"""Commits of the working directory's repository: names resolved, distances, order, subjects.

All of it is best effort: without git, or for commits that this repository does not hold, the answers are empty.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.provenance import git_output

_SHA = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
# How many commits git is asked about at once: a command line is not endless.
_BATCH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A commit as the repository knows it; `committed_s` in Unix time."""

    sha: str
    committed_s: int
    subject: str


def resolve(cwd: Path, name: str) -> str | None:
    """The commit that git means by `name`: a commit, full or short, a branch, a tag, `HEAD~2`."""
    if not name or name.startswith("-"):
        return None
    return git_output(cwd, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}") or None


def describe(cwd: Path, shas: Iterable[str]) -> Mapping[str, Commit]:
    """What the repository knows of these commits, by sha; the unknown are left out."""
    found: dict[str, Commit] = {}
    wanted = [sha for sha in dict.fromkeys(shas) if _SHA.fullmatch(sha)]
    for start in range(0, len(wanted), _BATCH):
        batch = wanted[start : start + _BATCH]
        listing = ("--no-walk=unsorted", "--ignore-missing", "--format=%H%x09%ct%x09%s")
        for line in (git_output(cwd, "log", *listing, *batch) or "").split("\n"):
            sha, _, rest = line.partition("\t")
            # Where all are missing, git shows the tip instead.
            if sha in batch:
                committed, _, subject = rest.partition("\t")
                found[sha] = Commit(sha=sha, committed_s=int(committed), subject=subject)
    return found


def in_order(cwd: Path, shas: Sequence[str]) -> list[str]:
    """Those of the commits that the repository knows, each after its ancestors."""
    known = list(describe(cwd, shas))
    if len(known) < 2:
        return known
    listed = git_output(cwd, "rev-list", "--topo-order", "--reverse", *known) or ""
    wanted = set(known)
    return [sha for sha in listed.splitlines() if sha in wanted] or known


def distance(cwd: Path, one: str, other: str) -> int | None:
    """How many commits lie between two: those that only one of them has."""
    count = git_output(cwd, "rev-list", "--count", f"{one}...{other}")
    return int(count) if count else None
