"""A HardwareProfile as tables for people: tiers, rates, layer times. Pure; report.py prints them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from flexllmgen.units import gib
from profiling.layer_times import LayerShape, LayerTimes, Point
from profiling.profile import NOISY, HardwareProfile, Rates

_CONTEXT = 512
_TITLES = {
    "compute_flops_per_s": "matrix products",
    "device_bytes_per_s": "device memory, read",
    "device_copy_bytes_per_s": "device memory, copy",
    "dequantise_8bit_bytes_per_s": "8-bit weights turned back",
    "dequantise_4bit_bytes_per_s": "4-bit weights turned back",
    "kv_8bit_bytes_per_s": "8-bit KV turned back",
    "kv_4bit_bytes_per_s": "4-bit KV turned back",
    "kv_rows_per_s": "steps' rows of KV compressed a second",
    "host_bytes_per_s": "host memory, read",
    "host_copy_bytes_per_s": "host memory, copy",
    "host_under_copies_bytes_per_s": "host memory, read under copies",
    "h2d_bytes_per_s": "host to device",
    "d2h_bytes_per_s": "device to host",
    "h2d_both_ways_bytes_per_s": "host to device, both ways",
    "d2h_both_ways_bytes_per_s": "device to host, both ways",
    "h2d_under_reads_bytes_per_s": "host to device, CPU reading",
    "h2d_under_attention_bytes_per_s": "host to device, CPU attending",
    "h2d_pageable_bytes_per_s": "host to device, not page-locked",
    "cpu_attention_bytes_per_s": "CPU attention, KV read",
    "cpu_attention_under_copies_bytes_per_s": "CPU attention under copies",
    "disk_read_bytes_per_s": "disk, read",
    "disk_write_bytes_per_s": "disk, write",
    "disk_read_alone_bytes_per_s": "disk, read, one piece at a time",
    "disk_reads_per_s": "disk, reads of a page a second",
    "disk_writes_per_s": "disk, writes of a page a second",
    "cached_file_bytes_per_s": "file in the page cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileTable:
    """Rows under a title; all columns but the first are figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def profile_tables(profile: HardwareProfile, layers: LayerTimes | None) -> Iterator[ProfileTable]:
    """The tables of a profile, and of `layers`, the times of the model at hand."""
    hardware = profile.hardware
    yield ProfileTable(
        title=f"{hardware.summary}\n{profile.dtype} on {profile.device}, torch {profile.torch}, "
        f"{profile.threads} threads, energy counter: {'yes' if profile.energy_counter else 'no'}",
        columns=("tier", "total", "free"),
        rows=list(_tier_rows(profile)),
    )
    measured = [field.name for field in fields(Rates) if field.name in profile.measurements]
    yield ProfileTable(
        title="",
        columns=("rate", "median", "best", "spread", ""),
        rows=[_rate_row(name, profile) for name in measured],
    )
    if layers is not None:
        yield _layer_table(layers)


def _tier_rows(profile: HardwareProfile) -> Iterator[tuple[str, str, str]]:
    capacity = profile.capacity
    if capacity.gpu_total_bytes:
        yield "GPU", gib(capacity.gpu_total_bytes), gib(capacity.gpu_free_bytes)
        if capacity.gpu_context_bytes:
            yield "  CUDA context", gib(capacity.gpu_context_bytes), ""
        yield "  allocator's workspace", gib(capacity.gpu_allocator_bytes), ""
    yield "host memory", gib(capacity.host_total_bytes), gib(capacity.host_available_bytes)
    disk = profile.hardware.disk
    yield f"disk ({disk.filesystem}, {disk.path})", gib(disk.total_bytes), gib(capacity.disk_free_bytes)


def _rate_row(name: str, profile: HardwareProfile) -> tuple[str, ...]:
    measured = profile.measurements[name]
    # Which kernel it was sets this rate more than the machine does.
    kernel = (
        f" ({profile.cpu_attention})" if name.startswith("cpu_attention") and profile.cpu_attention else ""
    )

    def reading(rate: float) -> str:
        if name == "compute_flops_per_s":
            return f"{rate / 1e12:,.2f} TFLOP/s"
        if not name.endswith("bytes_per_s"):
            return f"{rate:,.0f} /s"
        return f"{rate / 1e9:,.2f} GB/s"

    return (
        _TITLES[name] + kernel,
        reading(measured.median),
        reading(measured.best),
        f"{measured.spread:.1%}",
        "noisy" if measured.noisy else "",
    )


def _layer_table(times: LayerTimes) -> ProfileTable:
    shape = times.shape
    experts = f", {shape.experts_per_token} of {shape.num_experts} experts" if shape.num_experts else ""
    rows = [_layer_row("prompt", shape, point, min(point.rows, _CONTEXT), 0.5) for point in times.prompt]
    rows += [_layer_row("decode", shape, point, _CONTEXT, 1.0) for point in times.step]
    return ProfileTable(
        title=f"one layer of {shape.family}, width {shape.hidden_size}, {shape.num_heads} heads on "
        f"{shape.num_kv_heads} KV heads, MLP {shape.intermediate_size}{experts}; {_CONTEXT} positions of context; "
        f"{times.issue_s * 1e3:.3f} ms to issue"
        + (
            f" ({times.beside_attention:.2f} times that beside attention)"
            if times.beside_attention > 1
            else ""
        )
        + f"; spread {times.spread:.1%}"
        + (" (noisy)" if times.spread > NOISY else ""),
        columns=("pass", "rows", "attention", "MLP", "rate"),
        rows=rows,
    )


def _layer_row(kind: str, shape: LayerShape, point: Point, positions: int, seen: float) -> tuple[str, ...]:
    """`seen` is the part of the positions that a row attends to, on average."""
    attention_s = point.attention_s + point.per_position_s * positions
    products = 2 * (shape.attention_weights + shape.mlp_weights)
    scores = 4 * shape.num_heads * shape.head_dim * positions * seen
    flops_per_s = point.rows * (products + scores) / (attention_s + point.mlp_s)
    return (
        kind,
        str(point.rows),
        f"{attention_s * 1e3:.3f} ms",
        f"{point.mlp_s * 1e3:.3f} ms",
        f"{flops_per_s / 1e12:.3f} TFLOP/s",
    )
