"""What the machine can do per second, measured and not looked up: all fields of Rates, one Measurement each.

Links are in links.py, memories in memory.py, the disk in disk.py, one model's layers in layer_timing.py.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from flexllmgen.compression import BITS
from profiling.compute import measure_dequantise, measure_kv, timed_runs
from profiling.disk import measure_cached_file, measure_disk
from profiling.links import Links, open_links
from profiling.memory import host_attention, host_read, measure_copy, measure_read
from profiling.profile import Measurement

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Told what is measured next, how many parts are done, and of how many."""
Rated = Mapping[str, Measurement]
Part = tuple[str, Callable[[], Rated]]

_TRIALS = 6


def measure_rates(
    *,
    device: str,
    dtype: str,
    offload_dir: Path,
    on_progress: Progress | None = None,
    aside: tuple[str, Callable[[], object]] | None = None,
) -> dict[str, Measurement]:
    """Measure every rate there is on this machine now, by the names of Rates; takes some seconds and 512 MiB.

    Args:
        aside: a title and what waits for work that the host does meanwhile: it ends before anything of the host is measured.

    Raises:
        OffloadDirError: the offload directory cannot be written, or is full.
    """
    kind = getattr(torch, dtype)
    parts = [*_of_device(device, kind), *_ended(aside), *_of_host(device), *_disk(offload_dir)]
    if device != "cuda":
        return _run(parts, on_progress)
    parts += _beside_gpu(kind)
    with open_links() as links:
        return _run([*parts, *_links(links, kind)], on_progress)


def _run(parts: list[Part], on_progress: Progress | None) -> dict[str, Measurement]:
    measured: dict[str, Measurement] = {}
    for done, (title, measure) in enumerate(parts):
        if on_progress is not None:
            on_progress(title, done, len(parts))
        figures = measure()
        log.info("%s: %s", title, figures)
        measured |= figures
    return measured


def _of_device(device: str, dtype: torch.dtype) -> Iterator[Part]:
    yield "matrix products", lambda: {"compute_flops_per_s": _measure_compute(device, dtype)}
    yield (
        "compressed weights",
        lambda: {
            f"dequantise_{bits}bit_bytes_per_s": measure_dequantise(device, dtype, bits) for bits in BITS
        },
    )
    if device == "cpu":
        yield "compressed KV cache", lambda: measure_kv(dtype)


def _ended(aside: tuple[str, Callable[[], object]] | None) -> Iterator[Part]:
    if aside is not None:
        title, wait = aside

        def ended() -> Rated:
            wait()
            return {}

        yield title, ended


def _of_host(device: str) -> Iterator[Part]:
    def host() -> Rated:
        read, copy = host_read().measure(), measure_copy("cpu")
        rates = {"host_bytes_per_s": read, "host_copy_bytes_per_s": copy}
        if device == "cpu":  # Then memory of the compute device is host memory.
            rates |= {"device_bytes_per_s": read, "device_copy_bytes_per_s": copy}
        return rates

    yield "host memory", host


def _disk(folder: Path) -> Iterator[Part]:
    def direct() -> Rated:
        return measure_disk(folder)

    yield "disk", direct
    yield "page cache", lambda: {"cached_file_bytes_per_s": measure_cached_file(folder)}


def _beside_gpu(dtype: torch.dtype) -> Iterator[Part]:
    # Where the CPU computes everything, it does not attend beside anything.
    yield "attention on the CPU", lambda: {"cpu_attention_bytes_per_s": host_attention(dtype).measure()}
    yield (
        "device memory",
        lambda: {
            "device_bytes_per_s": measure_read("cuda"),
            "device_copy_bytes_per_s": measure_copy("cuda"),
        },
    )


def _links(links: Links, dtype: torch.dtype) -> Iterator[Part]:
    def beside_reads() -> Rated:
        up, host = links.beside(host_read())
        return {"h2d_under_reads_bytes_per_s": up, "host_under_copies_bytes_per_s": host}

    def beside_attention() -> Rated:
        up, attention = links.beside(host_attention(dtype))
        return {"h2d_under_attention_bytes_per_s": up, "cpu_attention_under_copies_bytes_per_s": attention}

    yield "links", links.alone
    yield "links both ways", links.both_ways
    yield "links while the CPU reads", beside_reads
    yield "attention on the CPU under copies", beside_attention


def _measure_compute(device: str, dtype: torch.dtype) -> Measurement:
    """A square matrix product in the number type, large enough to hide its launch.

    As a layer's: on a CPU without instructions for half precision a plain product is slower many times over.
    """
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return Measurement.of(2 * size**3, timed_runs(lambda: torch.nn.functional.linear(a, b), device, _TRIALS))
