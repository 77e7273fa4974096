"""Builds the kernel's shared library at first use, and finds it again afterwards.

Compiled directly and not through torch's extension builder: the kernel needs no header of torch's, so it takes
some seconds, and neither ninja nor setuptools has to be there. A library is built for the instructions that its flags
name, and these are part of its name: machines that share a cache folder find each its own. Knows nothing of attention.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
KERNEL, PROCESSOR = "kernel.cpp", "processor.cpp"
_FLAGS = (
    "-O3",  # With -O2 loops over registers are not unrolled, which makes the kernel two times slower.
    "-std=c++17",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
)
_PARTS = {KERNEL: 4, PROCESSOR: 1}
"""In so many parts a source is compiled at once; each is told its number."""
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_S = 300


class BuildFailedError(Exception):
    """The library is not there and cannot be made; the message says why."""


def library_path(*flags: str, source: str = KERNEL) -> Path:
    """The library, built if it is not there yet, with `flags` more. Processes that want it at once wait for the first.

    Raises:
        BuildFailedError: no compiler, a compiler's error, or a folder that cannot be written.
    """
    try:
        compiler, path = _place(source, flags)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # The system lets go of the lock when its holder ends, however that happens.
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                log.info("building %s for %s", source, " ".join(flags) or "any processor")
                _compile(compiler, flags, source, path)
        return path
    except OSError as error:
        raise BuildFailedError(f"{error.strerror}: {error.filename}") from error


def is_built(*flags: str, source: str = KERNEL) -> bool:
    """Whether the library is there already.

    Raises:
        BuildFailedError: no compiler.
    """
    try:
        return _place(source, flags)[1].exists()
    except OSError as error:
        raise BuildFailedError(f"{error.strerror}: {error.filename}") from error


def _place(source: str, flags: tuple[str, ...]) -> tuple[str, Path]:
    """The compiler, and where what it makes is kept."""
    compiler = _compiler()
    return compiler, _cache_dir() / "cpu_attention" / f"{_key(compiler, source, flags)}.so"


def _compile(compiler: str, flags: tuple[str, ...], source: str, path: Path) -> None:
    """Compiles all parts at once beside `path` and renames: what has the library's name is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        parts = [made.with_suffix(f".{part}.o") for part in range(_PARTS[source])]
        commands = [
            [compiler, *_FLAGS, *flags, f"-DFLEX_PART={part}", "-c", str(SOURCES / source), "-o", str(file)]
            for part, file in enumerate(parts)
        ]
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(_run, commands))
        _run([compiler, *_FLAGS, *flags, "-shared", *map(str, parts), "-o", str(made)])
        made.replace(path)


def _run(command: list[str]) -> None:
    compiler = command[0]
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


def _compiler() -> str:
    """The C++ compiler: CXX, else the first of the usual names."""
    own = os.environ.get("CXX")
    for name in (own,) if own else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildFailedError(f"no C++ compiler ({own or ', '.join(_COMPILERS)}); install g++ or set CXX")


def _key(compiler: str, source: str, flags: tuple[str, ...]) -> str:
    """Changes with the sources, the flags, the compiler and the kind of machine."""
    digest = hashlib.sha256(
        " ".join(
            (platform.system(), platform.machine(), compiler, source, str(_PARTS[source]), *_FLAGS, *flags)
        ).encode()
    )
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    digest.update(version.stdout)
    for file in (SOURCES / source, *sorted(SOURCES.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexllmgen"
