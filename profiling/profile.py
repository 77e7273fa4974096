"""HardwareProfile: what the machine is and what it can do, measured; JSON with a schema version and a fingerprint.

Everything a prediction needs is in here and nothing else is: a plan can be made from a profile file for a
machine that is far away. Knows nothing of policies.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexllmgen.errors import UsageError
from profiling.hardware import Disk, Gpu, Hardware
from profiling.layer_times import LayerTimes

SCHEMA_VERSION = 16
NOISY = 0.15
"""Relative spread from which a measurement is flagged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A rate per second over some trials: median, best, and (largest - smallest) / median."""

    median: float
    best: float
    spread: float
    trials: int

    @staticmethod
    def of(amount: float, seconds: Sequence[float]) -> "Measurement":
        """The rate at which `amount` was done in each of several trials.

        >>> Measurement.of(100, [1.0, 2.0, 4.0])
        Measurement(median=50.0, best=100.0, spread=1.5, trials=3)
        """
        rates = [amount / each for each in seconds]
        median = statistics.median(rates)
        spread = (max(rates) - min(rates)) / median
        return Measurement(median=median, best=max(rates), spread=spread, trials=len(rates))

    @property
    def noisy(self) -> bool:
        """Whether the trials disagree."""
        return self.spread > NOISY


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Bytes of every tier when the profile was taken.

    `gpu_context_bytes` is what the CUDA context itself takes (0: not told), `gpu_allocator_bytes` what torch's
    allocator keeps when no tensor is left (workspaces of matrix products); both are gone from `gpu_free_bytes`.
    """

    gpu_total_bytes: int = 0
    gpu_free_bytes: int = 0
    gpu_context_bytes: int = 0
    gpu_allocator_bytes: int = 0
    host_total_bytes: int
    host_available_bytes: int
    disk_free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates in bytes or floating-point operations per second; None for what the machine does not have.

    `compute_flops_per_s` and `device_*` are of the compute device; `h2d` and `d2h` are its links to and from
    page-locked host memory: alone, `_both_ways` while the other direction runs too, `_under_reads` while the CPU
    reads memory. Disk rates bypass the page cache, `_alone` with one piece under way; reads and writes per second are of
    single pages; `cached_file_bytes_per_s` is reading a file that lies in it. `dequantise_*` are bytes of numbers that the
    compute device turns compressed weights back into, `kv_*bit_*` compressed KV; `kv_rows_per_s` are steps' rows of one
    layer that it compresses.
    """

    compute_flops_per_s: float
    device_bytes_per_s: float
    device_copy_bytes_per_s: float | None = None
    dequantise_8bit_bytes_per_s: float | None = None
    dequantise_4bit_bytes_per_s: float | None = None
    kv_8bit_bytes_per_s: float | None = None
    kv_4bit_bytes_per_s: float | None = None
    kv_rows_per_s: float | None = None
    host_bytes_per_s: float
    host_copy_bytes_per_s: float | None = None
    host_under_copies_bytes_per_s: float | None = None
    h2d_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None
    h2d_both_ways_bytes_per_s: float | None = None
    d2h_both_ways_bytes_per_s: float | None = None
    h2d_under_reads_bytes_per_s: float | None = None
    h2d_under_attention_bytes_per_s: float | None = None
    h2d_pageable_bytes_per_s: float | None = None
    cpu_attention_bytes_per_s: float | None = None
    cpu_attention_under_copies_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    disk_read_alone_bytes_per_s: float | None = None
    disk_reads_per_s: float | None = None
    disk_writes_per_s: float | None = None
    cached_file_bytes_per_s: float

    def dequantise_bytes_per_s(self, bits: int) -> float:
        """Bytes of numbers a second that compressed ones are turned back into; unmeasured, as a copy of them."""
        measured = self.dequantise_8bit_bytes_per_s if bits == 8 else self.dequantise_4bit_bytes_per_s
        return measured or self.device_copy_bytes_per_s or self.device_bytes_per_s / 2

    def kv_bytes_per_s(self, bits: int) -> float:
        """Bytes of numbers a second that compressed KV is turned back into; unmeasured, as weights."""
        measured = self.kv_8bit_bytes_per_s if bits == 8 else self.kv_4bit_bytes_per_s
        return measured or self.dequantise_bytes_per_s(bits)

    def attention_bytes_per_s(self, times: LayerTimes, kv_bits: int | None = None) -> tuple[float, float]:
        """Bytes of KV a second, as kept, that the CPU attends to, alone and beside copies up.

        For a model whose own rate was measured; otherwise as of many heads; unmeasured, as memory is read. Codes of
        8 bits whose rate was not measured are taken to hold up as many numbers.
        """
        any_model = self.cpu_attention_bytes_per_s or self.host_bytes_per_s
        alone = times.cpu_attention_bytes_per_s or any_model
        if kv_bits is not None:
            alone = times.cpu_attention_codes_bytes_per_s or alone / 2
        beside = self.cpu_attention_under_copies_bytes_per_s or any_model
        # Beside copies in the proportion that was measured for many heads.
        return alone, alone * min(1.0, beside / any_model)

    @property
    def h2d_beside_attention_bytes_per_s(self) -> float | None:
        """Copies up while the CPU attends; unmeasured, while it reads; never more than alone."""
        if self.h2d_bytes_per_s is None:
            return None
        under = self.h2d_under_attention_bytes_per_s or self.h2d_under_reads_bytes_per_s
        return min(self.h2d_bytes_per_s, under or self.h2d_bytes_per_s)

    @property
    def host_in_all_bytes_per_s(self) -> float:
        """What host memory gives to all that read it: the CPU alone often cannot ask for as much as copies beside it do."""
        attending, beside = self.cpu_attention_bytes_per_s, self.cpu_attention_under_copies_bytes_per_s
        return max(
            self.host_bytes_per_s,
            attending or 0.0,
            self.h2d_bytes_per_s or 0.0,
            self.d2h_bytes_per_s or 0.0,
            (self.h2d_both_ways_bytes_per_s or 0.0) + (self.d2h_both_ways_bytes_per_s or 0.0),
            (self.host_under_copies_bytes_per_s or 0.0) + (self.h2d_under_reads_bytes_per_s or 0.0),
            (beside or 0.0) + (self.h2d_under_attention_bytes_per_s or 0.0),
        )

    def as_dict(self) -> dict[str, float]:
        """The rates that exist, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A machine, measured.

    Args:
        fingerprint: of all that the figures depend on; a profile with another one is never used silently.
        measurements: by the names of Rates.
        cpu_attention: what attended on the CPU where that was measured, beside a GPU: the kernel's instructions, or torch.
        layers: how long a decoder layer takes, one table for each shape of model that was measured.
    """

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    hardware: Hardware
    device: str
    dtype: str
    torch: str
    threads: int
    measured_at: float
    took_s: float
    energy_counter: bool
    capacity: Capacity
    measurements: Mapping[str, Measurement]
    cpu_attention: str = ""
    layers: tuple[LayerTimes, ...] = ()

    @property
    def best(self) -> Rates:
        """The best trial of each: what the hardware can do, for limits."""
        return Rates(**{name: each.best for name, each in self.measurements.items()})

    @property
    def typical(self) -> Rates:
        """The median of each: what to expect, for predictions."""
        return Rates(**{name: each.median for name, each in self.measurements.items()})

    @property
    def noisy(self) -> tuple[str, ...]:
        """Measurements whose trials disagree."""
        return tuple(name for name, each in self.measurements.items() if each.noisy)

    @property
    def busy(self) -> bool:
        """Whether so many are noisy that the machine must have had other work while it was measured."""
        return len(self.noisy) > len(self.measurements) / 2

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready view; `from_dict` reads it. `noisy` is in it for those who read the file."""
        return {
            **asdict(self),
            "measurements": {n: asdict(each) for n, each in self.measurements.items()},
            "noisy": list(self.noisy),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "HardwareProfile":
        """The profile that `as_dict` described.

        Raises:
            UsageError: it is none, or of another schema version.
        """
        if not isinstance(data, Mapping) or data.get("schema_version") is None:
            raise UsageError("not a hardware profile; measure one with `harness profile`")
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"a profile of schema version {version}, this harness reads {SCHEMA_VERSION}; "
                "measure it again with `harness profile`"
            )
        try:
            fields = {name: value for name, value in data.items() if name != "noisy"}
            hardware = dict(fields["hardware"])
            hardware["gpus"] = tuple(Gpu(**gpu) for gpu in hardware["gpus"])
            hardware["disk"] = Disk(**hardware["disk"])
            hardware["cpu_flags"] = tuple(hardware["cpu_flags"])
            fields["hardware"] = Hardware(**hardware)
            fields["capacity"] = Capacity(**fields["capacity"])
            fields["measurements"] = {
                name: Measurement(**each) for name, each in fields["measurements"].items()
            }
            fields["layers"] = tuple(LayerTimes.from_dict(each) for each in fields["layers"])
            profile = HardwareProfile(**fields)
            profile.best  # noqa: B018 - a rate that is missing shows here
            return profile
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"not a hardware profile ({error}); measure one with `harness profile`"
            ) from error


def profile_fingerprint(hardware: Hardware, *, device: str, dtype: str, torch: str, threads: int) -> str:
    """What a profile's figures depend on, as 16 hexadecimal digits.

    Not the amount of memory: in some virtual machines it grows while it is used, and no rate follows it. What
    is free is read anew for every plan.
    """
    stable = [
        SCHEMA_VERSION,
        hardware.fingerprint,
        hardware.driver,
        hardware.disk.device,
        hardware.disk.filesystem,
        device,
        dtype,
        torch,
        threads,
    ]
    return hashlib.sha256(json.dumps(stable).encode()).hexdigest()[:16]
