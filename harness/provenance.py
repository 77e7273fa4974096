"""Where a run comes from: the commit of the working directory, uncommitted changes, versions, the process.

Everything here is best effort: a machine without git, or a folder outside any repository, leaves the
fields empty and never fails a run. Knows nothing of MLflow.
"""

import getpass
import hashlib
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import psutil

from harness.results import Provenance, Scalar

log = logging.getLogger(__name__)

# A diff is there to be read; past this size it is somebody's data, not a change of the code.
DIFF_LIMIT_BYTES = 1_000_000
GIT_TIMEOUT_S = 10.0
# psutil derives a start time from the boot time, which moves when the clock is set.
START_TOLERANCE_S = 2.0

_PACKAGES = (
    "offload-harness",
    "flexllmgen",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "bitsandbytes",
    "numpy",
    "mlflow",
)


def collect_provenance(cwd: Path, argv: Sequence[str]) -> Provenance:
    """Say which code runs in `cwd` under the command `argv`, who runs it and where.

    A detached HEAD has a commit and no branch. Untracked files count as dirty: they may be imported.
    Credentials in addresses, the remote's and the command's, are left out. `patch_digest` tells two dirty states of
    one commit apart, `versions_digest` two sets of installed packages.
    """
    commit = git_output(cwd, "rev-parse", "--verify", "HEAD")
    inside = git_output(cwd, "rev-parse", "--is-inside-work-tree") == "true"
    status = git_output(cwd, "status", "--porcelain") if inside else None
    remote = git_output(cwd, "remote", "get-url", "origin") if inside else None
    return Provenance(
        git_commit=commit,
        git_branch=git_output(cwd, "symbolic-ref", "--short", "-q", "HEAD") if inside else None,
        git_dirty=None if status is None else bool(status),
        patch_digest=short_digest(git_diff(cwd) or status) if status else None,
        git_remote=without_credentials(remote) if remote else None,
        command=shlex.join(map(without_credentials, argv)),
        host=socket.gethostname(),
        user=_user(),
        versions=_versions(),
        versions_digest=short_digest(f"python=={platform.python_version()}\n{environment_freeze()}"),
    )


def short_digest(text: str) -> str:
    """16 hexadecimal digits that stand for a text.

    >>> short_digest("a patch")
    '36d65898ac88d593'
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_credentials(text: str) -> str:
    """`text` with every address in it bare of user name and password, for people and records.

    >>> without_credentials("postgresql://user:secret@host/runs")
    'postgresql://host/runs'
    """
    # Up to the last @ before the path: a password may hold one itself.
    return re.sub(r"(\w[\w+.-]*://)[^/\s]*@", r"\1", text)


def git_diff(cwd: Path) -> str | None:
    """Uncommitted changes of the repository around `cwd`: the diff to HEAD, then untracked files by name.

    Cut at `DIFF_LIMIT_BYTES` with a note that says so. None when the tree is clean or there is no git.
    """
    status = git_output(cwd, "status", "--porcelain")
    if not status:
        return None
    # Before the first commit there is no HEAD to compare with; the index is then all there is.
    base = ["HEAD"] if git_output(cwd, "rev-parse", "--verify", "HEAD") else ["--cached"]
    diff = _git_bounded(cwd, "diff", "--no-color", "--no-ext-diff", "--no-textconv", *base)
    untracked = [line[3:] for line in status.splitlines() if line.startswith("??")]
    if untracked:
        listing = "".join(f"#   {name}\n" for name in untracked)
        diff += f"# Untracked files, content not included:\n{listing}"[:DIFF_LIMIT_BYTES]
    return diff or None


def environment_freeze() -> str:
    """Installed distributions as `name==version` lines, sorted by name, each once."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        # A damaged installation has no name; it cannot be imported by one either.
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name:
            # The first on the path is the one that imports.
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), f"{name}=={distribution.version}")
    return "".join(f"{found[key]}\n" for key in sorted(found))


def process_identity() -> dict[str, Scalar]:
    """This process as `RunResult.process` holds it: `host`, `pid`, `pid_started` (Unix seconds).

    A pid alone is reused by the system; with its start time it names one process for ever.
    """
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": round(psutil.Process().create_time(), 2),
    }


def process_is_alive(process: Mapping[str, Scalar]) -> bool | None:
    """Whether the process that `process_identity` described still runs; None where this host cannot know."""
    pid, started = process.get("pid"), process.get("pid_started")
    if process.get("host") != socket.gethostname() or pid is None:
        return None
    try:
        found = psutil.Process(int(pid))
        if found.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(found.create_time() - float(started)) <= START_TOLERANCE_S
    except (psutil.NoSuchProcess, ValueError):
        return False
    except psutil.AccessDenied:
        return True


def git_output(cwd: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where it fails or git is missing."""
    try:
        done = subprocess.run(
            _git_command(cwd, *arguments),
            capture_output=True,
            timeout=GIT_TIMEOUT_S,
            env=_git_env(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("git %s: %s", arguments[0], error)
        return None
    # Only the newline goes: a line of `status` may begin with a space that means something.
    return done.stdout.decode(errors="replace").rstrip("\n") if done.returncode == 0 else None


def _git_bounded(cwd: Path, *arguments: str) -> str:
    """Output of a git command, never reading more than the limit of it into memory."""
    command = _git_command(cwd, *arguments)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_git_env()
    ) as child:
        assert child.stdout is not None
        output = child.stdout.read(DIFF_LIMIT_BYTES + 1)
        child.kill()
    text = output[:DIFF_LIMIT_BYTES].decode(errors="replace")
    if len(output) > DIFF_LIMIT_BYTES:
        text += f"\n# Cut here: the diff is longer than {DIFF_LIMIT_BYTES} bytes.\n"
    return text


def _git_command(cwd: Path, *arguments: str) -> list[str]:
    # quotePath: names outside ASCII stay readable.
    return ["git", "-C", str(cwd), "-c", "core.quotePath=false", *arguments]


def _git_env() -> dict[str, str]:
    # Looking must not take the index lock from someone who works in the same tree.
    return {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a uid that has no name
        return str(os.getuid())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
