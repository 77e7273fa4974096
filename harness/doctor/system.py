"""Checks of the installation and the machine: Python, packages, torch and its GPU, limits, compiler.

What is found out (versions, limits, devices) and what it means are separate, so that every verdict can be tested on
any machine. Loads no model.
"""

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flexllmgen.units import gib
from harness.doctor.finding import Finding, note, ok, problem

OLDEST, NEWEST = (3, 11), (3, 14)
_FEW_FILES, _ENOUGH_FILES = 256, 1024
_LITTLE_MEMORY_BYTES = 2 << 30
_DISTRIBUTION = "offload-harness"
_INSTALL = "pip install -c constraints.txt -e FlexLLMGen -e '.[builtin]'"


def check_system() -> Iterator[Finding]:
    """Everything of this theme, in the order in which one thing needs the other."""
    yield python_finding(sys.version_info[:2], platform.python_version())
    yield packages_finding()
    yield from torch_findings(look_at_torch())
    yield memory_finding()
    yield pinned_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _has_nvidia())
    yield files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield compiler_finding()
    yield git_finding(shutil.which("git"))


def python_finding(version: tuple[int, ...], text: str) -> Finding:
    """Python within the range that is supported."""
    if OLDEST <= version[:2] <= NEWEST:
        return ok("Python", text)
    newest = ".".join(map(str, NEWEST))
    return problem("Python", text, f"make the virtual environment with Python 3.11 to {newest}")


def packages_finding(distribution: str = _DISTRIBUTION) -> Finding:
    """Whether what is installed is what the project asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires(distribution) or ()]
    except metadata.PackageNotFoundError:
        return problem("packages", f"{distribution} is not installed", _INSTALL)
    wrong, met = [], 0
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            met += 1
        else:
            wrong.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
    if wrong:
        return problem("packages", "; ".join(wrong), _INSTALL)
    return ok("packages", f"all {met} that {distribution} {metadata.version(distribution)} asks for")


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchState:
    """What torch and the driver say of themselves.

    Args:
        cuda: the CUDA version torch was built with; None for a build without.
        works: whether torch can use a GPU now.
        driver_cuda: the newest CUDA version that the driver runs.
        capabilities: of each GPU, like "9.0"; `architectures` those the build has code for, like "sm_90".
    """

    version: str
    cuda: str | None
    works: bool
    gpus: tuple[str, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    capabilities: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    device_files: bool = False
    hip: str | None = None


def look_at_torch() -> TorchState:
    """Ask torch and NVML; starts no CUDA context unless torch needs one to answer."""
    import torch

    from profiling.hardware import nvml, read_hardware

    hardware = read_hardware(Path.cwd())
    with nvml() as lib:
        number = lib.nvmlSystemGetCudaDriverVersion_v2() if lib is not None else None
    return TorchState(
        version=torch.__version__,
        cuda=torch.version.cuda,
        works=torch.cuda.is_available(),
        gpus=tuple(f"{gpu.name} {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in hardware.gpus),
        driver=hardware.driver,
        driver_cuda=None if number is None else f"{number // 1000}.{number % 1000 // 10}",
        capabilities=tuple(gpu.compute_capability for gpu in hardware.gpus),
        architectures=tuple(torch.cuda.get_arch_list()) if torch.version.cuda else (),
        device_files=_has_nvidia(),
        hip=torch.version.hip,
    )


def torch_findings(state: TorchState) -> Iterator[Finding]:
    """Whether the torch that is installed fits the GPU and the driver that are there."""
    build = f"CUDA {state.cuda}" if state.cuda else f"ROCm {state.hip}" if state.hip else "CPU only"
    name = f"{state.version}, {build}"
    cuda_build = "install the CUDA build: see https://pytorch.org/get-started/locally"
    if not state.gpus:
        if state.device_files:
            yield problem(
                "GPU and driver",
                "there are NVIDIA devices in /dev, but the driver does not answer",
                "see what nvidia-smi says; in a container, start it with --gpus all",
            )
        else:
            yield note("GPU and driver", "no NVIDIA GPU; runs compute on the CPU")
        if state.cuda and not state.works:
            yield note("torch", f"{name}, on a machine without GPU", "the CPU build is much smaller")
        else:
            yield ok("torch", name)
        return
    what = f"{', '.join(state.gpus)}; driver {state.driver}, up to CUDA {state.driver_cuda or 'unknown'}"
    yield ok("GPU and driver", what)
    if state.cuda is None and state.hip is None:
        yield problem("torch", f"{name}, but there is a GPU", cuda_build)
    elif not state.works:
        way_out = "update the driver, or install a torch for its CUDA version"
        if state.driver_cuda and state.cuda and _major(state.driver_cuda) >= _major(state.cuda):
            way_out = (
                "see what `python -c 'import torch; torch.cuda.init()'` says; is CUDA_VISIBLE_DEVICES empty?"
            )
        yield problem("torch", f"{name}, cannot use the GPU (driver: CUDA {state.driver_cuda})", way_out)
    elif foreign := [one for one in state.capabilities if not _has_code(one, state.architectures)]:
        yield problem("torch", f"{name}, has no code for compute capability {foreign[0]}", cuda_build)
    else:
        yield ok("torch", name)


def _has_code(capability: str, architectures: tuple[str, ...]) -> bool:
    """Binary code of an older minor version of the same generation runs; so does intermediate code of any older one."""
    major, _, minor = capability.partition(".")
    for one in architectures:
        kind, _, digits = one.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        has = (int(digits[:-1]), int(digits[-1]))
        wanted = (int(major), int(minor or 0))
        if has <= wanted and (kind == "compute" or has[0] == wanted[0]):
            return True
    return not architectures


def memory_finding() -> Finding:
    """Host memory, within the control group's limit."""
    from profiling.hardware import available_memory_bytes, read_hardware

    total, free = read_hardware(Path.cwd()).memory_bytes, available_memory_bytes()
    found = f"{gib(total)}, {gib(free)} available"
    if free < _LITTLE_MEMORY_BYTES:
        return note(
            "host memory", found, "end other programs, or --cpu-mem keeps less of the model in memory"
        )
    return ok("host memory", found)


def pinned_finding(limit: int, gpu: bool) -> Finding:
    """`ulimit -l`. NVIDIA's driver locks pages itself and mostly does not count them; not every driver does so."""
    if limit in (resource.RLIM_INFINITY, -1):
        return ok("pinned memory", "no limit (ulimit -l)")
    found = f"{gib(limit)} may be locked (ulimit -l)"
    if not gpu:
        return ok("pinned memory", f"{found}; nothing is without a GPU")
    return note(
        "pinned memory",
        f"{found}; the NVIDIA driver's own locks are mostly not counted",
        "if page-locking fails: ulimit -l unlimited, memlock in /etc/security/limits.conf, or docker --ulimit memlock=-1",
    )


def files_finding(soft: int, hard: int) -> Finding:
    """`ulimit -n`: a file per layer on disk, and MLflow's."""
    if soft in (resource.RLIM_INFINITY, -1) or soft >= _ENOUGH_FILES:
        return ok("open files", "no limit" if soft < 0 else f"{soft} (ulimit -n)")
    more = hard if 0 < hard < 4096 else 4096
    way_out = f"ulimit -n {more}" if more > soft else "have the administrator raise nofile in limits.conf"
    found = f"{soft} (ulimit -n); a large model on disk opens a file for each layer"
    return (problem if soft < _FEW_FILES else note)("open files", found, way_out)


def compiler_finding() -> Finding:
    """A C++ compiler, which torch needs to build extensions; nothing of ours must have one."""
    named = os.environ.get("CXX") or ""
    for name in (named, "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return ok("C++ compiler", f"{path}: {_first_line(path)}")
    found = f"CXX={named} is not there" if named else "none"
    return note(
        "C++ compiler",
        f"{found}; what is compiled at first use (extensions, torch.compile) is not available",
        "apt install g++, or the compiler of your system",
    )


def git_finding(path: str | None) -> Finding:
    """Runs record the commit they ran."""
    if path:
        return ok("git", path)
    return note("git", "none; runs are recorded without their commit", "install git")


def _first_line(compiler: str) -> str:
    try:
        done = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({type(error).__name__})"
    return (done.stdout.splitlines() or ["says nothing of its version"])[0]


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _has_nvidia() -> bool:
    return Path("/dev/nvidiactl").exists()
