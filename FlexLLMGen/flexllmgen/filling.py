"""Makes the bytes of an image from a checkpoint: read or drawn, compressed where the plan says so, spread over its parts.

Knows nothing of tiers: a part is a range of the image's bytes and the memory it goes to.
"""

# R rows  N numbers of a row

import math
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from flexllmgen.checkpoint import PIECE_NUMBERS, Checkpoint, RandomCheckpoint
from flexllmgen.compression import code_bytes, num_groups, quantise, split_compressed
from flexllmgen.images import Image, PackedTensor
from flexllmgen.memory.pack import Part, spread
from flexllmgen.spec import ModelSpec

WINDOW_BYTES = 128 << 20
"""Random weights are made in so much device memory, which every plan has for work that comes later."""
_QUANTISED_NUMBERS = 2 << 20
"""Numbers that a device compresses at once: its temporaries take some twenty bytes for each."""
_CPU_QUANTISED_NUMBERS = 1 << 17
"""The same on the CPU: they stay in its cache."""
# The window holds one image's numbers only, and so does what compressing takes: one thread at a time uses a device.
_device_lock = threading.Lock()


def fill_on_host(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    image: Image,
    memory: torch.Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Fills all of an image, one tensor after another, in host memory; compresses on `device`.

    Args:
        memory: uint8 [image.num_bytes]; what lies between tensors is left as it is.
    """
    for name, tensor in image.tensors.items():
        raw = memory[tensor.offset : tensor.end]
        if not tensor.bits:
            checkpoint.fill(spec, image.layer, name, raw.view(dtype).view(tensor.shape))
            continue
        dense_RN = torch.empty(tensor.shape, dtype=dtype)
        checkpoint.fill(spec, image.layer, name, dense_RN)
        with _alone(device):
            parts = split_compressed(raw, tensor.shape, tensor.bits, tensor.group_size)
            _quantise_rows(dense_RN, tensor, parts, device)


def fill_by_windows(
    checkpoint: RandomCheckpoint,
    image: Image,
    parts: Sequence[Part],
    *,
    device: torch.device,
    dtype: torch.dtype,
    window_bytes: int = WINDOW_BYTES,
) -> None:
    """Makes an image's numbers on the device, a window of it at a time: device memory is planned to the byte."""
    with _alone(device):
        if image.compressed:
            for name, tensor in image.tensors.items():
                _draw(checkpoint, image.layer, name, tensor, parts, device, dtype)
        else:
            _fill_windows(checkpoint, image, parts, device, dtype, window_bytes)


def _fill_windows(
    checkpoint: RandomCheckpoint,
    image: Image,
    parts: Sequence[Part],
    device: torch.device,
    dtype: torch.dtype,
    window_bytes: int,
) -> None:
    size = dtype.itemsize
    window = torch.zeros(max(window_bytes, PIECE_NUMBERS * size), dtype=torch.uint8, device=device)
    first = last = 0
    for name, tensor in image.tensors.items():

        def take(start: int, stop: int, offset: int = tensor.offset) -> torch.Tensor:
            nonlocal first, last
            start, stop = offset + start * size, offset + stop * size
            if stop - first > len(window):
                spread(window[: last - first], first, parts)
                # Zeros, so that the gaps between tensors are the same in every pack of the same weights.
                window.zero_()
                first = start
            last = stop
            return window[start - first : stop - first].view(dtype)

        for _ in checkpoint.pieces(image.layer, name, tensor.num_bytes // size, take):
            pass
    spread(window[: last - first], first, parts)


def _draw(
    checkpoint: RandomCheckpoint,
    layer: int,
    name: str,
    tensor: PackedTensor,
    parts: Sequence[Part],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Draws a tensor on the device, and spreads it; a compressed one piece by piece, in whole rows."""
    size = tensor.shape[-1]
    rows = math.prod(tensor.shape[:-1])
    buffer = torch.empty(min(rows * size, PIECE_NUMBERS + size), dtype=dtype, device=device)
    held = done = 0

    def take(start: int, stop: int) -> torch.Tensor:
        return buffer[held : held + stop - start]

    for start, stop in checkpoint.pieces(layer, name, rows * size, take):
        held += stop - start
        if not tensor.bits:
            spread(buffer[:held].view(torch.uint8), tensor.offset + start * dtype.itemsize, parts)
            held = 0
            continue
        ready = held // size
        groups, row = num_groups(size, tensor.group_size), code_bytes(size, tensor.bits)
        codes = torch.empty(ready, row, dtype=torch.uint8, device=device)
        scale, zero = torch.empty(2, ready, groups, dtype=torch.float16, device=device)
        _quantise_rows(buffer[: ready * size].view(ready, size), tensor, (codes, scale, zero), device)
        zeros_at = tensor.offset + 2 * groups * rows
        codes_at = zeros_at + 2 * groups * rows
        spread(scale.view(-1).view(torch.uint8), tensor.offset + 2 * groups * done, parts)
        spread(zero.view(-1).view(torch.uint8), zeros_at + 2 * groups * done, parts)
        spread(codes.view(-1), codes_at + row * done, parts)
        # What is left of a row waits for the rest of it.
        rest = buffer[ready * size : held].clone()
        done, held = done + ready, len(rest)
        buffer[:held].copy_(rest)


def _quantise_rows(
    dense_RN: torch.Tensor,
    tensor: PackedTensor,
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    device: torch.device,
) -> None:
    assert tensor.bits is not None
    numbers = _CPU_QUANTISED_NUMBERS if device.type == "cpu" else _QUANTISED_NUMBERS
    at_once = max(1, numbers // dense_RN.shape[-1])
    for first in range(0, len(dense_RN), at_once):
        here = slice(first, first + at_once)
        made = quantise(dense_RN[here].to(device), tensor.bits, tensor.group_size)
        for target, part in zip(targets, made, strict=True):
            target[here].copy_(part)


def _alone(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.type == "cpu" else _device_lock
