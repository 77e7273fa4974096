"""Checks of the disk under the offload directory: room, kind, direct I/O, speed.

Speed is taken from a kept profile of this machine and disk; where there is none it is measured, briefly.
"""

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from flexllmgen.errors import OffloadDirError
from flexllmgen.units import gib
from harness.doctor.finding import Finding, note, ok, problem
from profiling.hardware import check_writable, free_disk_bytes, read_hardware

_LITTLE_BYTES = 10 << 30
_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")
_NETWORK_FILESYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "lustre", "ceph", "virtiofs")
_MEASURE_BYTES = 64 << 20
# Read rates of what is sold, past the page cache: from the fastest down.
CLASSES = (
    (5e9, "fast NVMe (PCIe 4 or newer)"),
    (1.5e9, "NVMe"),
    (3e8, "SATA SSD or cloud volume"),
    (0.0, "hard disk or network"),
)


def check_disk(folder: Path, profiles: Path) -> Iterator[Finding]:
    """Everything of this theme; the rest is skipped where the folder cannot be written.

    A folder that has to be made for it is removed again: a mistyped name leaves nothing.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        yield from _checked(folder, profiles)
    finally:
        with suppress(OSError):
            for one in made:
                one.rmdir()


def _checked(folder: Path, profiles: Path) -> Iterator[Finding]:
    try:
        check_writable(folder, "--offload-dir")
    except OffloadDirError as error:
        yield problem("offload dir", str(error), "name a folder that can be written with --offload-dir")
        return
    hardware = read_hardware(folder)
    yield room_finding(folder, hardware.disk.filesystem, free_disk_bytes(folder))
    yield direct_finding(folder)
    yield speed_finding(folder, profiles, hardware.fingerprint, hardware.disk.device)


def room_finding(folder: Path, filesystem: str, free_bytes: int) -> Finding:
    """How much fits, and whether it is a disk at all."""
    found = f"{folder}: {gib(free_bytes)} free, {filesystem}"
    if filesystem in _MEMORY_FILESYSTEMS:
        return note("offload dir", f"{found}, which is memory, not disk", "name a disk with --offload-dir")
    if filesystem in _NETWORK_FILESYSTEMS:
        return note("offload dir", f"{found}, over a network", "name a local disk with --offload-dir")
    if free_bytes < _LITTLE_BYTES:
        return note("offload dir", found, "harness doctor --prune, or name another disk with --offload-dir")
    return ok("offload dir", found)


def direct_finding(folder: Path) -> Finding:
    """Whether files there can be read past the page cache."""
    path = folder / f".direct-{os.getpid()}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0), 0o600))
    except OSError as error:
        if error.errno != errno.EINVAL:
            return problem("direct I/O", f"{error.strerror}", "name another folder with --offload-dir")
        found = "not on this file system: reads go through the page cache, and figures of disk depend on what it holds"
        return note("direct I/O", found, "name a disk with ext4, xfs or btrfs with --offload-dir")
    finally:
        path.unlink(missing_ok=True)
    if not hasattr(os, "O_DIRECT"):
        return note("direct I/O", "this system has none; reads go through the page cache")
    return ok("direct I/O", "O_DIRECT works")


def speed_finding(folder: Path, profiles: Path, fingerprint: str, device: str) -> Finding:
    """The class of the disk by its read rate."""
    kept = kept_rates(profiles, fingerprint, device)
    if kept is not None:
        read, write, measured_at = kept
        source = f"profile of {time.strftime('%Y-%m-%d', time.localtime(measured_at))}"
    else:
        from profiling.disk import measure_disk

        try:
            rates = measure_disk(folder, _MEASURE_BYTES)
        except OffloadDirError as error:
            return problem("disk speed", str(error), "free some space, or name another --offload-dir")
        read, write = rates["disk_read_bytes_per_s"].median, rates["disk_write_bytes_per_s"].median
        source = f"measured now with {_MEASURE_BYTES >> 20} MiB; harness profile measures it well"
    name = disk_class(read)
    found = f"{name}: reads {read / 1e9:.2f} GB/s, writes {write / 1e9:.2f} GB/s ({source})"
    if name == CLASSES[-1][1]:
        return note("disk speed", found, "weights on this disk will set the pace; name another --offload-dir")
    return ok("disk speed", found)


def disk_class(read_bytes_per_s: float) -> str:
    """The kind of disk that reads so fast.

    >>> disk_class(5.5e8)
    'SATA SSD or cloud volume'
    """
    return next(name for least, name in CLASSES if read_bytes_per_s >= least)


def kept_rates(profiles: Path, fingerprint: str, device: str) -> tuple[float, float, float] | None:
    """Read rate, write rate and time of the newest kept profile of this machine and disk; None without one."""
    newest: tuple[float, float, float] | None = None
    for path in profiles.glob("profile-*.json"):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            hardware, rates = data["hardware"], data["measurements"]
            if hardware["fingerprint"] != fingerprint or hardware["disk"]["device"] != device:
                continue
            read, write = (float(rates[f"disk_{way}_bytes_per_s"]["median"]) for way in ("read", "write"))
            measured_at = float(data["measured_at"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if newest is None or measured_at > newest[2]:
            newest = (read, write, measured_at)
    return newest
