"""Decode attention on the CPU against the formula in double precision, and how its kernel is built and kept."""

import ctypes
import functools
import multiprocessing
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexllmgen import cpu_attention
from flexllmgen.compression import dequantise, quantise
from flexllmgen.cpu_attention.build import PROCESSOR, BuildFailedError, is_built, library_path
from flexllmgen.cpu_attention.fallback import attend_with_torch
from flexllmgen.cpu_attention.library import LEVELS, Kernel, Prepared, best_level, compiled, level_for
from flexllmgen.errors import UsageError

# B sequences  S positions  N query heads  K key heads  G groups of a row  H head dim

BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error over the largest value: rounding of the output, and of sums in fp32."""
SHAPES = [
    (1, 8, 8, 128),
    (3, 8, 1, 64),
    (2, 14, 2, 80),
    (2, 5, 5, 16),
    (1, 64, 8, 128),
    (2, 4, 4, 256),
    (2, 6, 2, 20),
]
SPANS = [(0, 1), (0, 37), (5, 203), (0, 300)]


def built(level: str) -> Kernel:
    """Built once and kept in the user's cache, as for any run; the test is skipped where there are no such instructions."""
    try:
        if LEVELS.index(level) > LEVELS.index(best_level(library_path(source=PROCESSOR))):
            pytest.skip(f"no {level} here")
        return Kernel(library_path(*compiled(level)))
    except BuildFailedError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """Of the best level."""
    one = cpu_attention._kernel(128)
    return built("generic") if one is None else one


@pytest.fixture
def afresh() -> Iterator[None]:
    """What is known of processor and libraries is forgotten, before and after."""
    caches = cpu_attention._best, cpu_attention._built
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def expected(
    q_BNH: torch.Tensor, kv_S2BKH: torch.Tensor, length: int, bias_BS: torch.Tensor | None, first: int
) -> torch.Tensor:
    queries = q_BNH.shape[1] // kv_S2BKH.shape[3]
    k, v = (
        kv_S2BKH[first:length, which].double().permute(1, 2, 0, 3).repeat_interleave(queries, 1)
        for which in (0, 1)
    )
    scores = torch.einsum("bnh,bnsh->bns", q_BNH.double(), k) / q_BNH.shape[2] ** 0.5
    if bias_BS is not None:
        scores = scores + bias_BS[:, None, first:length].double()
    return (torch.softmax(scores, -1)[..., None] * v).sum(2)


def error(out_BNH: torch.Tensor, right_BNH: torch.Tensor) -> float:
    return ((out_BNH.double() - right_BNH).abs().max() / right_BNH.abs().max()).item()


def padding(sequences: int, first: int, length: int, positions: int) -> torch.Tensor:
    """Each sequence hides some of its first positions, one more than the one before."""
    bias_BS = torch.zeros(sequences, positions)
    for index in range(sequences):
        bias_BS[index, first : min(first + index + 1, length - 1)] = -torch.inf
    return bias_BS


def attend(
    kernel: Kernel, q: torch.Tensor, kv: torch.Tensor, length: int, bias: torch.Tensor | None, **more: object
) -> torch.Tensor:
    out = torch.full_like(q, torch.nan)
    arguments = {"first": 0, "threads": 1, "scale_S2BKG": None, "zero_S2BKG": None, "group_size": 64} | more
    kernel.prepare(q, kv, length, bias, out_BNH=out, **arguments)()  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def with_and_without() -> tuple[Kernel, Kernel]:
    """Loops for AMX, whether the processor has it or not, and none; what is around needs AVX-512 with its products."""
    without = built("avx512_bf16")
    return Kernel(library_path(*compiled("amx"), "-O1", "-DFLEX_EMULATE_AMX")), without


AMX_SHAPES = [
    (2, 8, 1, 64), (1, 32, 4, 128), (2, 9, 3, 128), (1, 12, 2, 96), (1, 15, 1, 256), (1, 3, 3, 128),
    (2, 8, 2, 32), (1, 12, 1, 64), (1, 5, 1, 160), (1, 32, 2, 128), (1, 8, 1, 192), (1, 4, 1, 224),
    (1, 8, 1, 288), (2, 10, 2, 320), (2, 16, 4, 128), (1, 8, 1, 512), (1, 4, 1, 320),
    (1, 12, 3, 64), (1, 32, 8, 64), (1, 16, 4, 64), (1, 6, 2, 64),
]  # fmt: skip


@pytest.mark.parametrize(("sequences", "heads", "num_kv_heads", "size"), AMX_SHAPES)
def test_amx_computes_attention(
    with_and_without: tuple[Kernel, Kernel], sequences: int, heads: int, num_kv_heads: int, size: int
) -> None:
    """Of every type, and of codes; by tiles where they serve, and nearly as without them."""
    torch.manual_seed(0)
    for first, length in SPANS:
        kv = torch.randn(length, 2, sequences, num_kv_heads, size)
        q, bias = torch.randn(sequences, heads, size), padding(sequences, first, length, length)
        for dtype, bound in BOUNDS.items():
            short, numbers = q.to(dtype), kv.to(dtype)
            right = expected(short, numbers, length, bias, first)
            outs = [attend(each, short, numbers, length, bias, first=first) for each in with_and_without]
            assert error(outs[0], right) < bound
            assert error(outs[0], outs[1].double()) < bound
        for group_size in (64, 128):
            codes, scale, zero = quantise(kv, 8, group_size)
            parts = {"scale_S2BKG": scale, "zero_S2BKG": zero, "group_size": group_size, "first": first}
            numbers = dequantise(codes, scale, zero, 8, group_size, torch.empty_like(kv))
            for dtype in (torch.float16, torch.bfloat16):
                short = q.to(dtype)
                out = attend(with_and_without[0], short, codes, length, bias, threads=2, **parts)
                assert error(out, expected(short, numbers, length, bias, first)) < BOUNDS[dtype]


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("heads", [4, 8])
def test_a_value_that_is_no_number_harms_no_more_than_its_pair(
    with_and_without: tuple[Kernel, Kernel], heads: int, broken: float
) -> None:
    torch.manual_seed(0)
    q, kv = torch.randn(1, heads, 64).bfloat16(), torch.randn(70, 2, 1, 1, 64).bfloat16()
    right = expected(q, kv, 70, None, 0)
    kv[13, 1, 0, 0, 5] = broken
    for kernel, harmed in zip(with_and_without, ([4, 5], [5]), strict=True):
        out = attend(kernel, q, kv, 70, None)
        for head in range(heads):
            assert (~out[0, head].isfinite()).nonzero().flatten().tolist() == harmed
        whole = [column for column in range(64) if column not in harmed]
        assert error(out[..., whole], right[..., whole]) < BOUNDS[torch.bfloat16]


def test_scores_that_grow_by_many_powers_of_two(with_and_without: tuple[Kernel, Kernel]) -> None:
    """What was added up so far is scaled down again and again; of each query at other positions, and of some never."""
    torch.manual_seed(0)
    length, size = 300, 128
    for dtype, bound in BOUNDS.items():
        growing = torch.linspace(0, 6, length)[:, None, None, None]
        kv = torch.randn(length, 2, 2, 2, size) * 0.3
        q = torch.randn(2, 16, size)
        q[:, ::3] *= 0.01
        direction = torch.nn.functional.normalize(q.view(2, 2, 8, size).mean(2), dim=-1)
        kv[:, 0] += growing * direction
        short, numbers = (4 * q).to(dtype), kv.to(dtype)
        right = expected(short, numbers, length, None, 0)
        for kernel in (*with_and_without, built("avx2"), built("generic")):
            assert error(attend(kernel, short, numbers, length, None, threads=1), right) < bound


@pytest.mark.usefixtures("afresh")
def test_the_environment_names_the_best_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_attention.VARIABLE, "generic")
    assert cpu_attention.which() == ("generic" if cpu_attention.available(128) else "torch")
    cpu_attention._best.cache_clear()
    monkeypatch.setenv(cpu_attention.VARIABLE, "quick")
    with pytest.raises(UsageError, match=r"FLEXLLMGEN_CPU_ATTENTION=quick: there is generic, .*amx"):
        cpu_attention.which()


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_instruction_set_computes_attention(name: str, dtype: torch.dtype) -> None:
    kernel = built(name)
    torch.manual_seed(0)
    for sequences, heads, num_kv_heads, size in SHAPES:
        if level_for(size, name) != name:
            continue
        for first, length in SPANS:
            kv = torch.randn(length + 3, 2, sequences, num_kv_heads, size).to(dtype)
            q = torch.randn(sequences, heads, size).to(dtype)
            bias = padding(sequences, first, length, length + 5)
            for threads in (1, 3):
                out = attend(kernel, q, kv, length, bias, first=first, threads=threads)
                assert error(out, expected(q, kv, length, bias, first)) < BOUNDS[dtype], (
                    q.shape,
                    first,
                    length,
                )


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("group_size", [64, 128])
def test_codes_are_turned_back_while_they_are_read(name: str, size: int, group_size: int) -> None:
    kernel = built(name)
    torch.manual_seed(0)
    for sequences, heads, num_kv_heads, length in (
        (2, 4, 4, 150),
        (1, 16, 2, 37),
        (2, 9, 3, 70),
        (1, 11, 1, 12),
    ):
        kv = torch.randn(length, 2, sequences, num_kv_heads, size)
        codes, scale, zero = quantise(kv, 8, group_size)
        numbers = dequantise(codes, scale, zero, 8, group_size, torch.empty_like(kv))
        q = torch.randn(sequences, heads, size)
        for first in (0, 11):
            parts = {"scale_S2BKG": scale, "zero_S2BKG": zero, "group_size": group_size}
            out = attend(kernel, q, codes, length, None, first=first, threads=2, **parts)
            assert error(out, expected(q, numbers, length, None, first)) < 2e-6
            # Of queries in 16 bits too, and with padding.
            bias = padding(sequences, first, length, length)
            for dtype in (torch.bfloat16, torch.float16):
                short = q.to(dtype)
                out = attend(kernel, short, codes, length, bias, first=first, threads=2, **parts)
                assert error(out, expected(short, numbers, length, bias, first)) < BOUNDS[dtype]


def test_codes_through_the_public_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel and fallback agree, for queries in bf16."""
    torch.manual_seed(0)
    codes, scale, zero = quantise(torch.randn(70, 2, 3, 2, 80), 8, 64)
    q = torch.randn(3, 6, 80).bfloat16()
    outs = []
    for one in (cpu_attention._kernel(64), None):
        monkeypatch.setattr(cpu_attention, "_kernel", lambda _, one=one: one)
        outs.append(torch.empty_like(q))
        cpu_attention.prepare_attention(
            q, codes, 61, None, first=2, out_BNH=outs[-1], threads=2, scale_S2BKG=scale, zero_S2BKG=zero
        )()
    assert error(outs[0], outs[1].double()) < 2e-2


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16])
def test_rows_may_be_longer_than_their_content(q_dtype: torch.dtype) -> None:
    """As where the disk wants whole pages; and a count of sequences smaller than there is room for."""
    torch.manual_seed(0)
    content = 2 * 5 * 3 * 32
    rows = torch.randn(50, content + 96).bfloat16()
    kv = rows[:, :content].view(50, 2, 5, 3, 32)[:, :, 1:4]
    q = torch.randn(3, 6, 32).to(q_dtype)
    out = torch.empty_like(q)
    cpu_attention.prepare_attention(q, kv, 50, out_BNH=out, threads=2)()
    assert error(out, expected(q, kv, 50, None, 0)) < BOUNDS[q_dtype]


def together(part: torch.Tensor, axis: int) -> torch.Tensor:
    """The same numbers, a sequence's positions one after another in memory; sequences are the dimension `axis`."""
    return part.transpose(0, axis).contiguous().transpose(0, axis)


@pytest.mark.parametrize("order", ["positions", "sequences"])
@pytest.mark.parametrize(("length", "heads"), [(53, 2), (700, 24)])
def test_the_tokens_own_row_is_written_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, length: int, heads: int, order: str
) -> None:
    """By the kernel, in one piece or many, and by torch; nothing else of the cache changes, in either order of it."""
    torch.manual_seed(0)
    rows = torch.randn(length + 7, 2, 5, heads, 128)
    q, k, v = torch.randn(3, 2 * heads, 128), torch.randn(3, heads, 128), torch.randn(3, heads, 128)
    wanted = rows.clone()
    wanted[length - 1, 0, 1:4], wanted[length - 1, 1, 1:4] = k, v
    right = expected(q, wanted[:, :, 1:4], length, None, 2)
    for one in (cpu_attention._kernel(128), None):
        monkeypatch.setattr(cpu_attention, "_kernel", lambda _, one=one: one)
        cache, out = together(rows, 2) if order == "sequences" else rows.clone(), torch.empty_like(q)
        cpu_attention.prepare_attention(
            q, cache[:, :, 1:4], length, first=2, out_BNH=out, threads=2, k_BKH=k, v_BKH=v
        )()
        assert torch.equal(cache, wanted)
        assert error(out, right) < 2e-6


@pytest.mark.parametrize("order", ["positions", "sequences"])
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "heads"), [(53, 2), (700, 24)])
def test_a_row_of_codes_is_written_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, length: int, heads: int, q_dtype: torch.dtype, order: str
) -> None:
    """[position, sequence, key or value], in either order in memory; of the first three of five sequences."""
    torch.manual_seed(0)
    numbers = torch.randn(length + 7, 5, 2, heads * 64)
    rows = quantise(numbers, 8, 64)
    new = quantise(torch.randn(3, 2, heads * 64), 8, 64)
    wanted = tuple(part.clone() for part in rows)
    for part, row in zip(wanted, new, strict=True):
        part[length - 1, :3] = row
    dense = (
        dequantise(*wanted, 8, 64, torch.empty_like(numbers))[:, :3]
        .unflatten(-1, (heads, 64))
        .transpose(1, 2)
    )
    q = torch.randn(3, 2 * heads, 64).to(q_dtype)
    right, bound = expected(q, dense, length, None, 2), 1e-4 if q_dtype == torch.float32 else 2e-2
    for one in (cpu_attention._kernel(64), None):
        monkeypatch.setattr(cpu_attention, "_kernel", lambda _, one=one: one)
        cache = tuple(together(part, 1) if order == "sequences" else part.clone() for part in rows)
        codes, scale, zero = (part[:, :3].unflatten(-1, (heads, -1)).transpose(1, 2) for part in cache)
        out = torch.empty_like(q)
        cpu_attention.prepare_attention(
            q, codes, length, first=2, out_BNH=out, threads=2, scale_S2BKG=scale, zero_S2BKG=zero, row=new
        )()
        assert all(torch.equal(part, other) for part, other in zip(cache, wanted, strict=True))
        assert error(out, right) < bound


def check_many_sequences(kernel: Kernel) -> None:
    """So many that threads take the next while they compute one; as the engine has them: in its order, with new rows."""
    torch.manual_seed(0)
    sequences, length, num_kv_heads, size = 48, 150, 2, 128
    numbers, new = torch.randn(length, sequences, 2, num_kv_heads * size), torch.randn(sequences, 2, 256)
    for heads in (2, 8, 16):
        q = torch.randn(sequences, heads, size)
        for dtype, bound in BOUNDS.items():
            kv = together(numbers.to(dtype).unflatten(-1, (num_kv_heads, -1)).transpose(1, 2), 2)
            k, v = (new[:, half].to(dtype).unflatten(-1, (num_kv_heads, -1)).contiguous() for half in (0, 1))
            short = q.to(dtype)
            out = attend(kernel, short, kv, length, None, threads=2, k_BKH=k, v_BKH=v)
            assert torch.equal(kv[-1, 0], k)
            assert torch.equal(kv[-1, 1], v)
            assert error(out, expected(short, kv, length, None, 0)) < bound
        for group_size in (64, 128):
            parts = tuple(together(part, 1) for part in quantise(numbers, 8, group_size))
            row = quantise(new, 8, group_size)
            codes, scale, zero = (part.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2) for part in parts)
            sides = {"scale_S2BKG": scale, "zero_S2BKG": zero, "group_size": group_size, "row": row}
            for dtype in (torch.float16, torch.bfloat16):
                short = q.to(dtype)
                out = attend(kernel, short, codes, length, None, threads=2, **sides)
                dense = dequantise(*parts, 8, group_size, torch.empty_like(numbers))
                right = dense.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2)
                assert all(torch.equal(part[-1], each) for part, each in zip(parts, row, strict=True))
                assert error(out, expected(short, right, length, None, 0)) < BOUNDS[dtype]


def test_many_sequences(kernel: Kernel) -> None:
    check_many_sequences(kernel)


def test_many_sequences_by_amx(with_and_without: tuple[Kernel, Kernel]) -> None:
    check_many_sequences(with_and_without[0])


def test_calls_that_follow_at_once_find_their_threads(kernel: Kernel) -> None:
    """Of any number, awake or asleep; each writes its own output."""
    torch.manual_seed(0)
    kv, q = torch.randn(700, 2, 3, 4, 64), torch.randn(3, 4, 64)
    right = expected(q, kv, 700, None, 0)
    for index in range(200):
        if index % 50 == 0:
            time.sleep(0.001)
        out = attend(kernel, q, kv, 700, None, threads=(2, 5, 1, 3)[index % 4])
        assert error(out, right) < 2e-6


def test_few_sequences_use_all_threads_to_the_same_effect(kernel: Kernel) -> None:
    """One sequence's positions are cut into pieces, whose sums are put together; one piece is hidden as a whole."""
    torch.manual_seed(0)
    kv, q = torch.randn(1500, 2, 1, 2, 64), 4 * torch.randn(1, 4, 64)
    bias = torch.zeros(1, 1500)
    bias[:, :400] = -torch.inf
    outs = [attend(kernel, q, kv, 1500, bias, threads=threads) for threads in (1, 2, 4, 7)]
    right = expected(q, kv, 1500, bias, 0)
    assert all(error(out, right) < 2e-6 for out in outs)


def test_scores_far_apart_neither_overflow_nor_vanish(kernel: Kernel) -> None:
    kv, q = torch.randn(200, 2, 1, 1, 64), torch.randn(1, 2, 64)
    kv[:, 0] *= 300
    out = attend(kernel, q, kv, 200, None)
    assert error(out, expected(q, kv, 200, None, 0)) < 1e-4


def test_the_same_call_from_c(kernel: Kernel) -> None:
    """As a driver's thread makes it: by the addresses of the function and of its argument."""
    torch.manual_seed(0)
    kv, q = torch.randn(20, 2, 2, 2, 32), torch.randn(2, 4, 32)
    bias = padding(2, 0, 20, 20)
    out = torch.empty_like(q)
    call = cpu_attention.prepare_attention(q, kv, 20, bias.clone(), out_BNH=out, threads=1)
    assert isinstance(call, Prepared)
    function, argument = call.in_c
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
    assert error(out, expected(q, kv, 20, bias, 0)) < 2e-6


def test_a_head_of_an_odd_size_goes_through_torch() -> None:
    torch.manual_seed(0)
    kv, q = torch.randn(20, 2, 2, 2, 6), torch.randn(2, 4, 6)
    out = torch.empty_like(q)
    cpu_attention.prepare_attention(q, kv, 20, out_BNH=out, threads=1)()
    assert error(out, expected(q, kv, 20, None, 0)) < 2e-6


def test_a_forked_process_has_threads_of_its_own(kernel: Kernel) -> None:
    """The parent's are not in it: it would wait for them for ever."""
    torch.manual_seed(0)
    kv, q = torch.randn(900, 2, 2, 2, 64), torch.randn(2, 4, 64)
    attend(kernel, q, kv, 900, None, threads=3)
    out = torch.empty_like(q).share_memory_()

    def child() -> None:
        kernel.prepare(
            q, kv, 900, None, first=0, out_BNH=out, threads=3, scale_S2BKG=None, zero_S2BKG=None, group_size=64,
        )()  # fmt: skip

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert error(out, expected(q, kv, 900, None, 0)) < 2e-6


def test_reading_reads_all(kernel: Kernel) -> None:
    data = torch.ones(5 << 20)
    assert kernel.read(data, 2) == data.numel()


@pytest.mark.usefixtures("afresh")
def test_without_a_compiler_torch_serves_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    torch.manual_seed(0)
    kv, q = torch.randn(40, 2, 3, 2, 32).half(), torch.randn(3, 4, 32).half()
    bias = padding(3, 3, 37, 40)
    for _ in range(2):
        out = torch.empty_like(q)
        cpu_attention.prepare_attention(q, kv, 37, bias, first=3, out_BNH=out, threads=1)()
        assert error(out, expected(q, kv, 37, bias, 3)) < 2e-3
    assert not cpu_attention.available(16)
    assert cpu_attention.is_ready()
    assert cpu_attention.which() == "torch"
    (line,) = [record.getMessage() for record in caplog.records if "through torch" in record.getMessage()]
    assert "no C++ compiler (no-such-compiler); install g++ or set CXX" in line


@pytest.mark.usefixtures("afresh")
def test_a_compiler_older_than_the_processor_is_told_of_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def library(*flags: str, source: str = "") -> str:
        if flags:
            raise BuildFailedError("g++ failed: unrecognized option -mavx512bf16")
        return source

    monkeypatch.setattr(cpu_attention, "library_path", library)
    monkeypatch.setattr(cpu_attention, "best_level", lambda path: "avx512_bf16")
    monkeypatch.delenv(cpu_attention.VARIABLE, raising=False)
    assert cpu_attention.which() == cpu_attention.which(64) == "torch"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("unrecognized option -mavx512bf16; FLEXLLMGEN_CPU_ATTENTION=avx512 does with less")


def test_only_what_serves_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best level up to the processor's whose vectors divide the head; nothing else is asked for, and that once."""
    asked: list[tuple[str, ...]] = []

    def library(*flags: str, source: str = "") -> str:
        asked.append(flags)
        return source

    cached = {name: functools.cache(getattr(cpu_attention, name).__wrapped__) for name in ("_best", "_built")}
    for name, each in cached.items():
        monkeypatch.setattr(cpu_attention, name, each)
    monkeypatch.setattr(cpu_attention, "library_path", library)
    monkeypatch.setattr(cpu_attention, "is_built", lambda *flags: flags in asked)
    monkeypatch.setattr(cpu_attention, "best_level", lambda path: "avx512")
    monkeypatch.setattr(cpu_attention, "Kernel", lambda path: object())
    monkeypatch.delenv(cpu_attention.VARIABLE, raising=False)
    assert not cpu_attention.is_ready(64)
    for size, level in ((64, "avx512"), (128, "avx512"), (24, "avx2"), (20, "generic")):
        assert cpu_attention.which(size) == level
        assert cpu_attention.available(size)
        assert cpu_attention.is_ready(size)
    assert cpu_attention.which(6) == "torch"
    assert cpu_attention.is_ready(6)
    assert asked == [(), compiled("avx512"), compiled("avx2"), compiled("generic")]
    # A level above the processor's is not served, whatever is allowed.
    cached["_best"].cache_clear()
    monkeypatch.setenv(cpu_attention.VARIABLE, "amx")
    assert cpu_attention.which() == "avx512"


def test_the_fallback_leaves_torchs_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    q, kv = torch.randn(1, 2, 8), torch.randn(4, 2, 1, 2, 8)
    attend_with_torch(
        q, kv, 4, None, first=0, out_BNH=torch.empty_like(q), threads=before + 1, scale_S2BKG=None, zero_S2BKG=None,
        group_size=64,
    )  # fmt: skip
    assert torch.get_num_threads() == before


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for a compiler, in a cache of its own: notes each library, and takes a while over all it makes."""
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\n'
        f'for last; do :; done\ncase "$last" in *.so) echo built >> "{tmp_path}/builds";; esac\n'
        'echo half > "$last"\nsleep 0.3\n'
        f'[ -e "{tmp_path}/broken" ] && echo "kernel.cpp:1: error: no" >&2 && exit 1\necho whole >> "$last"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def builds(folder: Path) -> int:
    return len((folder / "builds").read_text().splitlines())


def test_what_was_built_is_not_built_again(compiler: Path) -> None:
    assert not is_built()
    path = library_path()
    assert path.read_text() == "half\nwhole\n"
    assert is_built()
    assert library_path() == path
    assert builds(compiler) == 1


def test_instructions_are_part_of_a_librarys_name(compiler: Path) -> None:
    """Machines of other processors that share the folder find none of these."""
    assert len({library_path(*compiled(level)) for level in LEVELS}) == len(LEVELS)
    assert not is_built()
    assert all(is_built(*compiled(level)) for level in LEVELS)


def test_another_source_or_compiler_is_another_library(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = library_path()
    script = compiler / "compiler"
    script.write_text(script.read_text().replace("echo 1", "echo 2"))
    second = library_path()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "kernel.cpp").write_text("changed")
    monkeypatch.setattr(cpu_attention.build, "SOURCES", tmp_path / "source")
    assert len({first, second, library_path()}) == 3
    assert builds(compiler) == 3


def test_processes_that_want_it_at_once_build_it_once(compiler: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=lambda: results.put(library_path().read_text())) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert found == ["half\nwhole\n"] * 3
    assert builds(compiler) == 1


def test_a_failed_build_leaves_nothing_and_says_why(compiler: Path) -> None:
    (compiler / "broken").touch()
    with pytest.raises(BuildFailedError, match=r"failed: kernel\.cpp:1: error: no"):
        library_path()
    assert [path.suffix for path in (compiler / "cache" / "flexllmgen" / "cpu_attention").iterdir()] == [
        ".lock"
    ]
    (compiler / "broken").unlink()
    assert library_path().read_text() == "half\nwhole\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_told(compiler: Path) -> None:
    (compiler / "cache").mkdir(mode=0o500)
    with pytest.raises(BuildFailedError, match="Permission denied"):
        library_path()
