"""Builds the kernel's shared library at first use, and finds it again afterwards.

Compiled directly and not through torch's extension builder: the kernel needs no header of torch's, so it takes
some seconds, and neither ninja nor setuptools has to be there. What is built serves any processor of the machine's
kind: instruction sets are chosen when it runs. Knows nothing of attention.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
)
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300


class BuildFailedError(Exception):
    """The library is not there and cannot be made; the message says why."""


def library_path(*flags: str) -> Path:
    """The library, built if it is not there yet, with `flags` more. Processes that want it at once wait for the first.

    Raises:
        BuildFailedError: no compiler, a compiler's error, or a folder that cannot be written.
    """
    compiler = _compiler()
    try:
        folder = _cache_dir() / "cpu_attention"
        path = folder / f"{_key(compiler, flags)}.so"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        # The system lets go of the lock when its holder ends, however that happens.
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(compiler, flags, path)
        return path
    except OSError as error:
        raise BuildFailedError(f"{error.strerror}: {error.filename}") from error


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compiles beside `path` and renames: what has the library's name is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *_FLAGS, *flags, str(SOURCES / "kernel.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            raise BuildFailedError(f"{compiler} took more than {_TIMEOUT_S} s") from error
        if done.returncode:
            said = next(
                (line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:]
            )
            raise BuildFailedError(f"{compiler} failed: {said or f'exit code {done.returncode}'}")
        made.replace(path)


def _compiler() -> str:
    """The C++ compiler: CXX, else the first of the usual names."""
    own = os.environ.get("CXX")
    for name in (own,) if own else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildFailedError(f"no C++ compiler ({own or ', '.join(_COMPILERS)}); install g++ or set CXX")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with the sources, the flags, the compiler and the kind of machine."""
    digest = hashlib.sha256(
        " ".join((platform.system(), platform.machine(), compiler, *_FLAGS, *flags)).encode()
    )
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    digest.update(version.stdout)
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexllmgen"
