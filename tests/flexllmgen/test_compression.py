"""Group-wise integers: how far a number may come back from where it was, and in how many bytes."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from flexllmgen import compression
from flexllmgen.compression import (
    check_bits,
    compressed_bytes,
    dequantise,
    num_groups,
    quantise,
    split_compressed,
)
from flexllmgen.errors import PolicyError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3, 128), (5, 64), (2, 192), (4, 100), (3, 65), (7, 1), (2, 63), (300,), (2, 3, 130)]
BITS = [8, 4]


def _numbers(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 3 + 1


def _back(x: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return dequantise(*quantise(x, bits, group_size), bits, group_size, torch.empty_like(x, dtype=dtype))


def _scales(x: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Each number's own scale."""
    scale = quantise(x, bits, group_size)[1].float()
    return scale.repeat_interleave(group_size, dim=-1)[..., : x.shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_a_scale(shape: tuple[int, ...], bits: int, group_size: int, dtype: torch.dtype) -> None:
    x = _numbers(shape).to(dtype)
    off = (_back(x, bits, group_size, torch.float32) - x.float()).abs()
    assert (off <= 0.5001 * _scales(x, bits, group_size)).all()
    # And the scale is what the range of a group needs, not more.
    span = x.float().max() - x.float().min()
    assert _scales(x, bits, group_size).max() <= 1.01 * span / (2**bits - 1) + 1e-3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes(shape: tuple[int, ...], bits: int) -> None:
    parts = quantise(_numbers(shape), bits, 64)
    assert [part.dtype for part in parts] == [torch.uint8, torch.float16, torch.float16]
    assert all(part.is_contiguous() for part in parts)
    total = sum(part.numel() * part.element_size() for part in parts)
    assert total == compressed_bytes(shape, bits, 64)
    views = split_compressed(torch.zeros(total, dtype=torch.uint8), shape, bits, 64)
    assert [view.shape for view in views] == [part.shape for part in parts]
    for view, part in zip(views, parts, strict=True):
        view.copy_(part)
    out = dequantise(*views, bits, 64, torch.empty(shape))
    assert torch.equal(out, _back(_numbers(shape), bits, 64))


def test_the_first_of_two_neighbours_lies_in_the_low_half() -> None:
    x = torch.arange(16.0).repeat(4)
    codes, scale, zero = quantise(x, 4, 64)
    assert (scale, zero) == (1.0, 0.0)
    assert codes[:3].tolist() == [0x10, 0x32, 0x54]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3333, 1e-9, -1e-9, 12345.678, 65504.0, -65504.0])
def test_constant_groups(value: float, bits: int) -> None:
    x = torch.full((2, 100), value)
    off = (_back(x, bits, 64) - x).abs().max()
    # An fp16 alone would be off by up to 2^-11 of the value.
    assert off <= max(abs(value) * 2**-14, 2**-24)


@pytest.mark.parametrize("bits", BITS)
def test_a_small_range_far_from_zero(bits: int) -> None:
    x = 100 + 0.01 * _numbers((4, 256))
    off = (_back(x, bits, 64) - x).abs()
    assert (off <= 0.51 * _scales(x, bits, 64) + 1e-5).all()
    # The least is rounded down to an fp16: the range to cover grows by up to one step of it.
    span = x.max() - x.min()
    assert _scales(x, bits, 64).max() <= (span + 2**-4) / (2**bits - 1) * 1.01


@pytest.mark.parametrize("bits", BITS)
def test_numbers_at_and_beyond_fp16s_range(bits: int) -> None:
    x = torch.tensor([65504.0, -65504.0, 1e6, -1e30, 0.0, 3.0, float("inf"), 65000.0] * 8)
    parts = quantise(x, bits, 64)
    assert all(bool(part.float().isfinite().all()) for part in parts)
    kept = x.clamp(-65504, 65504)
    back = _back(x, bits, 64, torch.float16)
    assert back.isfinite().all()
    assert ((back.float() - kept).abs() <= 1.01 * parts[1].float()).all()


@pytest.mark.parametrize("bits", BITS)
def test_scales_too_small_for_fp16(bits: int) -> None:
    x = 1e-8 * _numbers((3, 128))
    assert (_back(x, bits, 64) - x).abs().max() <= 2**-24


def test_a_row_alone_comes_back_as_among_others() -> None:
    x = _numbers((2000, 700))
    whole = _back(x, 4, 64)
    assert torch.equal(whole[1537], _back(x[1537], 4, 64))
    assert torch.equal(whole[1999:], _back(x[1999:], 4, 64))


@pytest.mark.parametrize("bits", BITS)
def test_into_memory_with_gaps(bits: int) -> None:
    x = _numbers((3, 4, 128))
    parts = quantise(x, bits, 64)
    out = torch.zeros(3, 10, 128)
    dequantise(*parts, bits, 64, out[:, 2:6])
    assert torch.equal(out[:, 2:6], _back(x, bits, 64))
    assert not out[:, 6:].any()
    assert not out[:, :2].any()


def test_without_a_kernel_torch_does_its_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "flexllmgen.compression_triton", None)
    compression._kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert compression._kernel() is None
            assert compression._kernel() is None
    finally:
        compression._kernel.cache_clear()
    assert caplog.text.count("torch turns them back instead") == 1


@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (8, 32), (16, 64)])
def test_other_bits_and_groups_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(PolicyError, match=r"weight_(bits must be 8 or 4|group_size must be 64 or 128)"):
        check_bits(bits, group_size, "weight")
    with pytest.raises(PolicyError, match=r"kv_(bits must be 8 or 4|group_size must be 32, 64 or 128), not"):
        check_bits(bits, group_size + 8, "kv")
    check_bits(4, 32, "kv")
    assert num_groups(65, 64) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 4096), (77, 4100)], ids=str)
def test_cuda_gives_the_same_numbers(
    shape: tuple[int, ...], bits: int, group_size: int, dtype: torch.dtype
) -> None:
    x = _numbers(shape).to(dtype)
    there = quantise(x.cuda(), bits, group_size)
    on_cpu = dequantise(*(part.cpu() for part in there), bits, group_size, torch.empty(shape, dtype=dtype))
    on_cuda = dequantise(*there, bits, group_size, torch.empty(shape, dtype=dtype, device="cuda"))
    assert torch.equal(on_cuda.cpu(), on_cpu)
    # Its scales may be the next numbers to the CPU's, where a division is rounded the other way.
    here = dequantise(*quantise(x, bits, group_size), bits, group_size, torch.empty(shape, dtype=dtype))
    worst, theirs = ((each.double() - x.double()).abs().max() for each in (on_cpu, here))
    assert worst < 1.01 * theirs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", BITS)
def test_cuda_batches_with_steps_of_their_own(bits: int) -> None:
    x = _numbers((5, 30, 128)).half()
    codes, scale, zero = (part.cuda() for part in quantise(x, bits, 64))
    padded = [
        torch.zeros(5, 31, part.shape[-1], dtype=part.dtype, device="cuda") for part in (codes, scale, zero)
    ]
    for target, part in zip(padded, (codes, scale, zero), strict=True):
        target[:, :30].copy_(part)
    out = torch.zeros(5, 33, 128, dtype=torch.float16, device="cuda")
    dequantise(*(part[:, :30] for part in padded), bits, 64, out[:, :30])
    assert torch.equal(out[:, :30].cpu(), _back(x, bits, 64))
    assert not out[:, 30:].any()
