"""What the machine can do per second: links, memories, matrix products, disk; measured, not looked up.

Each rate is the best of several trials, since a limit is what the hardware can do when nothing else
runs. Measured once (about 3 s) and kept by machine, device, number type and disk.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flexllmgen.errors import OffloadDirError
from flexllmgen.memory.disk import DirectFile
from profiling.compute import timed_runs
from profiling.hardware import Hardware, free_disk_bytes

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MAX_AGE_S = 7 * 24 * 3600
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured rates in bytes or floating-point operations per second; links are None without a GPU.

    `compute_flops_per_s` and `device_bytes_per_s` are of the compute device. Disk rates bypass the page cache;
    `cached_file_bytes_per_s` is reading a file that lies in it.
    """

    compute_flops_per_s: float
    device_bytes_per_s: float
    host_bytes_per_s: float
    h2d_bytes_per_s: float | None
    d2h_bytes_per_s: float | None
    h2d_pageable_bytes_per_s: float | None
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    cached_file_bytes_per_s: float
    measured_at: float

    def as_dict(self) -> dict[str, float]:
        """The rates that exist, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def measured_rates(
    hardware: Hardware, *, device: str, dtype: str, offload_dir: Path, cache: Path
) -> Rates:
    """The rates of this machine: from `cache` if measured there within a week, else measured now."""
    key = json.dumps(
        [SCHEMA_VERSION, hardware.fingerprint, hardware.disk.device, device, dtype, torch.get_num_threads()]
    )
    path = cache / f"rates-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, TypeError):
        kept = Rates(**json.loads(path.read_text(encoding="utf-8")))
        if 0 <= time.time() - kept.measured_at < MAX_AGE_S:
            return kept
    rates = measure_rates(device=device, dtype=dtype, offload_dir=offload_dir)
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(rates), indent=2), encoding="utf-8")
        temporary.replace(path)
    return rates


def measure_rates(*, device: str, dtype: str, offload_dir: Path) -> Rates:
    """Measure every rate now; takes about three seconds and 512 MiB."""
    started = time.perf_counter()
    kind = getattr(torch, dtype)
    host = _host_read_rate()
    disk_read, disk_write = measure_disk(offload_dir)
    links: dict[str, float | None] = dict.fromkeys(("up", "down", "pageable"))
    device_rate = host
    if device == "cuda":
        links, device_rate = _gpu_rates()
    rates = Rates(
        compute_flops_per_s=_compute_rate(device, kind),
        device_bytes_per_s=device_rate,
        host_bytes_per_s=host,
        h2d_bytes_per_s=links["up"],
        d2h_bytes_per_s=links["down"],
        h2d_pageable_bytes_per_s=links["pageable"],
        disk_read_bytes_per_s=disk_read,
        disk_write_bytes_per_s=disk_write,
        cached_file_bytes_per_s=_cached_file_rate(offload_dir),
        measured_at=time.time(),
    )
    log.info("rates measured in %.1f s: %s", time.perf_counter() - started, rates)
    return rates


def measure_disk(folder: Path, num_bytes: int = 256 * _MIB) -> tuple[float, float]:
    """Sequential read and write rate of the disk that holds `folder`, in bytes per second.

    Goes around the page cache (O_DIRECT) in pieces of 16 MiB of random content; the file is removed. On a disk
    that is nearly full it takes half of what is free: a plan that needs less must not be refused for this.

    Raises:
        OffloadDirError: the folder cannot be written, or is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".rate-{os.getpid()}"
    piece = torch.randint(0, 256, (16 * _MIB,), dtype=torch.uint8)
    num_bytes = _that_fits(folder, num_bytes)
    offsets = range(0, num_bytes, piece.nbytes)
    # O_DIRECT wants aligned memory.
    aligned = _aligned(piece)
    try:
        file = DirectFile(path, writable=True, size=num_bytes)
        try:

            def write() -> None:
                for offset in offsets:
                    file.write(aligned, offset)
                file.sync()

            def read() -> None:
                for offset in offsets:
                    file.read(aligned, offset)

            write_s, read_s = _best(write, trials=2), _best(read, trials=2)
        finally:
            file.close()
    finally:
        path.unlink(missing_ok=True)
    return num_bytes / read_s, num_bytes / write_s


def _cached_file_rate(folder: Path, num_bytes: int = 128 * _MIB) -> float:
    """Reading a file that was just written, through the page cache, into memory already touched."""
    path = folder / f".cached-{os.getpid()}"
    num_bytes = _that_fits(folder, num_bytes)
    target = bytearray(num_bytes)
    try:
        path.write_bytes(os.urandom(_MIB) * (num_bytes // _MIB))

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                file.readinto(target)

        return num_bytes / _best(read, trials=3)
    except OSError as error:
        raise OffloadDirError(
            f"{folder}: cannot be written ({error.strerror}); name another folder"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _that_fits(folder: Path, num_bytes: int) -> int:
    """As much of `num_bytes` as half of the free disk holds, in whole pieces of 16 MiB; one at least."""
    piece = 16 * _MIB
    return max(piece, min(num_bytes, free_disk_bytes(folder) // 2 // piece * piece))


def _aligned(like: torch.Tensor, alignment: int = 4096) -> torch.Tensor:
    """A copy of a byte tensor at an aligned address."""
    room = torch.empty(like.nbytes + alignment, dtype=torch.uint8)
    shift = -room.data_ptr() % alignment
    target = room[shift : shift + like.nbytes]
    target.copy_(like)
    return target


def _host_read_rate() -> float:
    """All cores summing 512 MiB: more than any cache holds."""
    data = torch.ones(128 * _MIB, dtype=torch.float32)
    return data.nbytes / _best(data.sum, trials=4)


def _compute_rate(device: str, dtype: torch.dtype) -> float:
    """A square matrix product in the number type, large enough to hide its launch."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    b = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    return 2 * size**3 / _best(lambda: a @ b, trials=6, device=device)


def _gpu_rates() -> tuple[dict[str, float | None], float]:
    """Pinned copies up and down, a pageable copy up, and a read of device memory."""
    num_bytes = 256 * _MIB
    pinned = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=True)
    pageable = torch.ones(num_bytes, dtype=torch.uint8)
    on_device = torch.ones(num_bytes, dtype=torch.uint8, device="cuda")
    large = torch.ones(1024 * _MIB // 4, dtype=torch.float32, device="cuda")
    links: dict[str, float | None] = {
        "up": num_bytes / _best(lambda: on_device.copy_(pinned, non_blocking=True), trials=5, device="cuda"),
        "down": num_bytes
        / _best(lambda: pinned.copy_(on_device, non_blocking=True), trials=5, device="cuda"),
        "pageable": num_bytes / _best(lambda: on_device.copy_(pageable), trials=3, device="cuda"),
    }
    return links, large.nbytes / _best(large.sum, trials=5, device="cuda")


def _best(action: Callable[[], object], *, trials: int, device: str = "cpu") -> float:
    return min(timed_runs(action, device, trials))
