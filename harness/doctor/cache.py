"""Checks of what is kept on the disk (profiles, packed weights, the built-in model) and of what was left behind.

`prune` removes packs and profiles that are old and leftovers of processes that are gone. Nothing that a process has
open is removed, nor what another process is just making: it holds the lock, or used it a moment ago.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from flexllmgen.units import gib
from harness.doctor.finding import Finding, note, ok

DAY_S = 24 * 3600
# Between taking a pack's lock and opening its files, a run holds neither.
_JUST_USED_S = 600
_LEFT_AFTER_S = 3600
_LARGE_BYTES = 50 << 30
# What our own processes make under hidden names while they work, with their pid where the name has one.
_TEMPORARY = re.compile(
    r"^\.(?:(?:rate|cached|direct|write)-(?P<pid>\d+)|.+-(?P<pid2>\d+)\.tmp|accelerate-[0-9a-f]{12}"
    r"|(?:result|benchmark|requests|plan|hardware_profile|timeline|environment|run|error|git|profile-[0-9a-f]+|table)"
    r"\.[a-z]+\.[\w]{8}|report\.html\.[\w]{8}|SmolLM2[^/]*\.[\w]{8})$"
)
_ACCELERATE_LOCK = ".lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Something on the disk: `in_use` by a process that runs; `last_used_s` is Unix time."""

    path: Path
    num_bytes: int
    last_used_s: float
    in_use: bool

    def old(self, now_s: float, days: float) -> bool:
        """Whether nobody uses it and nobody has for so many days."""
        return not self.in_use and now_s - self.last_used_s >= days * DAY_S


def packs(offload_dir: Path) -> list[Kept]:
    """Packed and quantised weights, which `flexgen` and `autoflex` keep for the next run of the same model."""
    opened = open_files(offload_dir)
    found = []
    for folder in sorted([*offload_dir.glob("weights-*"), *offload_dir.glob("quantised-*")]):
        if not folder.is_dir():
            continue
        used_s = _last_used_s(folder)
        busy = (
            any(path.is_relative_to(folder.resolve()) for path in opened)
            or time.time() - used_s < _JUST_USED_S
            or _is_locked(folder / ".lock")
        )
        found.append(Kept(path=folder, num_bytes=tree_bytes(folder), last_used_s=used_s, in_use=busy))
    return found


def profiles(cache: Path) -> list[Kept]:
    """Kept profiles of machines."""
    files = sorted((cache / "profiles").glob("profile-*.json"))
    return [
        Kept(path=path, num_bytes=path.stat().st_size, last_used_s=path.stat().st_mtime, in_use=False)
        for path in files
    ]


def leftovers(folders: Sequence[Path]) -> list[Kept]:
    """Half-written files and folders of processes that are gone, directly in these folders or one level down."""
    found: dict[Path, Kept] = {}
    for folder in folders:
        opened = open_files(folder)
        candidates = [*folder.glob(".*"), *folder.glob("*/.*"), *folder.glob("accelerate-*")]
        for path in candidates:
            match = _TEMPORARY.match(path.name)
            whole = path.name.startswith("accelerate-") and (path / _ACCELERATE_LOCK).exists()
            if (match is None and not whole) or path.is_symlink():
                continue
            with suppress(OSError):
                written_s = path.stat().st_mtime
                pid = next((text for text in match.groups() if text), None) if match else None
                if whole:
                    gone = not _is_locked(path / _ACCELERATE_LOCK)
                elif pid is not None and not psutil.pid_exists(int(pid)):
                    gone = True
                else:
                    gone = time.time() - written_s > _LEFT_AFTER_S
                if any(one.is_relative_to(path.resolve()) for one in opened):
                    gone = False
                if gone:
                    found[path] = Kept(
                        path=path, num_bytes=tree_bytes(path), last_used_s=written_s, in_use=False
                    )
    return [found[path] for path in sorted(found)]


def check_cache(cache: Path, offload_dir: Path, *, days: float, left: Sequence[Kept]) -> Iterator[Finding]:
    """What is kept and what it takes."""
    now = time.time()
    kept_profiles = profiles(cache)
    stale = [one for one in kept_profiles if one.old(now, days)]
    found = f"{len(kept_profiles)}, {gib(_total(kept_profiles))} in {cache / 'profiles'}"
    yield ok("profiles", found + (f"; {len(stale)} older than {days:g} days" if stale else ""))
    kept = packs(offload_dir)
    old = [one for one in kept if one.old(now, days)]
    used = [one for one in kept if one.in_use]
    found = f"{len(kept)}, {gib(_total(kept))} in {offload_dir}" + (f"; {len(used)} in use" if used else "")
    if old:
        found += f"; {len(old)} with {gib(_total(old))} not used for {days:g} days"
        yield note("packed weights", found, "harness doctor --prune removes those")
    elif _total(kept) > _LARGE_BYTES:
        yield note("packed weights", found, "harness doctor --prune --older-than 0 removes those not in use")
    else:
        yield ok("packed weights", found)
    model = cache / "models"
    size = tree_bytes(model)
    yield ok("built-in model", f"{gib(size)} in {model}" if size else "not unpacked yet; the first run does")
    if left:
        names = ", ".join(str(one.path) for one in left[:3]) + (" ..." if len(left) > 3 else "")
        found = f"{len(left)} left by processes that are gone, {gib(_total(left))}: {names}"
        yield note("leftovers", found, "harness doctor --prune removes them")
    else:
        yield ok("leftovers", "none")


def prune(cache: Path, offload_dir: Path, *, days: float, left: Sequence[Kept]) -> list[Kept]:
    """Remove what is old and what was left; return what was removed."""
    now = time.time()
    removed = [pack for pack in packs(offload_dir) if pack.old(now, days) and _remove_pack(pack)]
    removed += [
        one for one in (*profiles(cache), *left) if (one in left or one.old(now, days)) and _remove(one.path)
    ]
    return removed


def tree_bytes(path: Path) -> int:
    """Bytes that a file or folder takes; links are not followed, but for `path` itself."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):
                total += os.lstat(Path(parent, name)).st_size
    return total


def open_files(folder: Path) -> set[Path]:
    """Files under a folder that some process has open, as far as this user may see."""
    root = folder.resolve()
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            found |= {path for one in process.open_files() if (path := Path(one.path)).is_relative_to(root)}
    return found


def _last_used_s(folder: Path) -> float:
    """A run touches the lock when it uses a pack."""
    times = [folder.stat().st_mtime]
    with suppress(OSError):
        times.append((folder / ".lock").stat().st_mtime)
    return max(times)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _remove_pack(pack: Kept) -> bool:
    """Under the pack's own lock: who waits for it finds that it is gone and makes a new one."""
    try:
        with (pack.path / ".lock").open("a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if any(path.is_relative_to(pack.path.resolve()) for path in _others(open_files(pack.path))):
                return False
            # The lock goes first: a folder without it is no pack that anybody holds.
            for path in sorted(pack.path.iterdir(), key=lambda path: path.name != ".lock"):
                path.unlink()
            pack.path.rmdir()
    except OSError:
        return False
    return True


def _others(paths: set[Path]) -> set[Path]:
    """Without the lock, which this process itself has open."""
    return {path for path in paths if path.name != ".lock"}


def _remove(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
    return not path.exists()


def _total(kept: Sequence[Kept]) -> int:
    return sum(one.num_bytes for one in kept)
