"""Profiles of machines that are not here, for tests of what is computed from a profile."""

from __future__ import annotations

from typing import Any

from flexllmgen.spec import ModelSpec
from profiling.hardware import Disk, Hardware
from profiling.layer_times import HeadPoint, LayerShape, LayerTimes, Point
from profiling.profile import Capacity, HardwareProfile, Measurement

GPU_RATES = {
    "compute_flops_per_s": 7e14,
    "device_bytes_per_s": 3.9e12,
    "device_copy_bytes_per_s": 1.9e12,
    "host_bytes_per_s": 9.4e10,
    "h2d_bytes_per_s": 5.5e10,
    "d2h_bytes_per_s": 5.5e10,
    "h2d_pageable_bytes_per_s": 6.5e9,
    "disk_read_bytes_per_s": 1.75e9,
    "disk_write_bytes_per_s": 1.8e9,
    "cached_file_bytes_per_s": 5e9,
}
CPU_RATES = {
    "compute_flops_per_s": 1e11,
    "device_bytes_per_s": 2e10,
    "device_copy_bytes_per_s": 8e9,
    "host_bytes_per_s": 2e10,
    "disk_read_bytes_per_s": 8e8,
    "disk_write_bytes_per_s": 6e8,
    "cached_file_bytes_per_s": 4e9,
}


def layer_times(
    spec: ModelSpec, *, flops_per_s: float, bytes_per_s: float, issue_s: float, chunk_issue_s: float
) -> LayerTimes:
    """A roofline's layer: the slower of reading its weights and multiplying by them."""
    shape = LayerShape.of(spec)

    def point(rows: int, positions_s: float) -> Point:
        halves = [
            max(weights * 2 / bytes_per_s, 2 * weights * rows / flops_per_s)
            for weights in (shape.attention_weights, shape.mlp_weights)
        ]
        return Point(rows=rows, attention_s=halves[0], per_position_s=positions_s, mlp_s=halves[1])

    kv = 2 * shape.num_kv_heads * shape.head_dim * 2 / bytes_per_s
    scores = 4 * shape.num_heads * shape.head_dim / flops_per_s
    return LayerTimes(
        shape=shape,
        issue_s=issue_s,
        chunk_issue_s=chunk_issue_s,
        prompt=tuple(point(rows, rows * scores) for rows in (64, 256, 1024, 4096)),
        step=tuple(point(rows, rows * kv) for rows in (1, 4, 16, 64, 256)),
        head=tuple(
            HeadPoint(
                rows=rows,
                head_s=max(shape.head_weights * 2 / bytes_per_s, 2 * shape.head_weights * rows / flops_per_s),
            )
            for rows in (1, 16, 256)
        ),
    )


def machine(spec: ModelSpec, device: str = "cuda", **rates: float) -> HardwareProfile:
    """A GPU or CPU machine with a table for this model; `rates` replace its own."""
    gpu = device == "cuda"
    values = {**(GPU_RATES if gpu else CPU_RATES), **rates}
    table = layer_times(
        spec,
        flops_per_s=values["compute_flops_per_s"],
        bytes_per_s=values["device_bytes_per_s"],
        issue_s=1e-4 if gpu else 2e-5,
        chunk_issue_s=2e-4 if gpu else 0.0,
    )
    facts: dict[str, Any] = {
        "fingerprint": "made up",
        "cpu": "a processor",
        "physical_cores": 16,
        "logical_cores": 16,
        "cpu_flags": (),
        "memory_bytes": 128 << 30,
        "gpus": (),
        "driver": None,
        "disk": Disk(path="/x", device="/dev/x", filesystem="ext4", total_bytes=1 << 40, free_bytes=1 << 40),
        "system": "Linux",
        "python": "3.12",
    }
    return HardwareProfile(
        fingerprint="made up",
        hardware=Hardware(**facts),
        device=device,
        dtype="float16" if gpu else "float32",
        torch="2.11",
        threads=16,
        measured_at=0.0,
        took_s=1.0,
        energy_counter=False,
        capacity=Capacity(
            gpu_total_bytes=80 << 30 if gpu else 0,
            gpu_free_bytes=79 << 30 if gpu else 0,
            host_total_bytes=128 << 30,
            host_available_bytes=120 << 30,
            disk_free_bytes=1 << 40,
        ),
        measurements={
            name: Measurement(median=value, best=value, spread=0.0, trials=3)
            for name, value in values.items()
        },
        layers=(table,),
    )
