"""Result folders as delivery sees them: where they are, which files count, whether they have changed, where they went.

Knows nothing of MLflow.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from flexllmgen.errors import UsageError
from harness.results import write_json

MARKER = ".delivered.json"
RESULT, BENCHMARK = "result.json", "benchmark.json"
_DEPTH_OF_A_LAUNCH = 4  # <benchmark>/cells/<cell>/launches/<uuid>


def find_folders(path: Path) -> list[Path]:
    """The folders at `path` that are delivered as a whole, runs and benchmarks: itself or those directly in it, oldest first.

    A folder within a benchmark stands for its benchmark.

    Raises:
        UsageError: there are none.
    """
    if (path / BENCHMARK).is_file():
        return [path]
    if path.is_dir():
        for above in list(path.absolute().parents)[:_DEPTH_OF_A_LAUNCH]:
            if (above / BENCHMARK).is_file():
                return [above]
    if (path / RESULT).is_file():
        return [path]
    found = {
        file.parent: file.stat().st_mtime for name in (RESULT, BENCHMARK) for file in path.glob(f"*/{name}")
    }
    if not found:
        if not path.exists():
            raise UsageError(f"there is no folder {path}; name results/ or a folder results/<uuid> in it")
        raise UsageError(f"{path} holds no result; name results/ or a folder results/<uuid> in it")
    return sorted(found, key=lambda folder: found[folder])


def files_of(folder: Path, *, without: Iterable[str] = ()) -> list[Path]:
    """Files of the record: all but hidden ones, which are markers and halves of files, and the folders `without`."""
    left_out = set(without)
    files = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if parts[0] not in left_out and not any(part.startswith(".") for part in parts) and path.is_file():
            files.append(path)
    return files


def digest_of(folder: Path, files: Sequence[Path], *, more: str = "") -> str:
    """A digest of the files' names and contents, and of `more` that a run holds beside them."""
    digest = hashlib.sha256(more.encode())
    for file in files:
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder)}\0{inner}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def marked_run(folder: Path, address: str) -> str | None:
    """The run that this folder became in the store at `address`, as its marker says; only a hint, the store decides."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return str(marker["run_id"]) if marker["tracking_uri"] == address else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark(folder: Path, address: str, run_id: str) -> None:
    """Remember the run that this folder became in the store at `address`."""
    # A folder that cannot be written to, on a mounted medium say, is delivered all the same.
    with contextlib.suppress(OSError):
        write_json(folder / MARKER, {"tracking_uri": address, "run_id": run_id})
