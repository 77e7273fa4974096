"""C functions in a stream's order, and page-locked memory as kernels see it."""

import ctypes
import time

import pytest
import torch

from flexllmgen.memory.arena import HostArena
from flexllmgen.memory.host_calls import call_in_order, mapped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def page_locked(num_bytes: int) -> tuple[HostArena, torch.Tensor]:
    arena = HostArena(register=True)
    region = arena.reserve(num_bytes)
    arena.commit()
    return arena, arena.view(region)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_read_and_write_the_hosts_memory(dtype: torch.dtype) -> None:
    arena, host = page_locked(1 << 20)
    seen = mapped(host, CUDA).view(dtype)
    assert seen.device.type == "cuda"
    numbers = torch.randn(seen.numel(), device=CUDA).to(dtype)
    torch.mul(numbers, 1, out=seen)
    torch.cuda.synchronize()
    assert torch.equal(host.view(dtype), numbers.cpu())
    host.view(dtype).neg_()
    assert torch.equal(torch.mul(seen, 1), -numbers)
    del seen
    arena.close()


def test_a_call_waits_for_what_came_before_and_holds_up_what_comes_after() -> None:
    arena, host = page_locked(4096)
    seen, rounds = mapped(host, CUDA).view(torch.int32), 40
    host.zero_()

    # Only C may run there; a callback of Python's is C enough for a test of so few calls that this thread, which may hold
    # Python's lock, need not wait until the driver takes another.
    found: list[int] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def look(_: int) -> None:
        found.append(int(host.view(torch.int32)[0]))
        host.view(torch.int32)[1] = found[-1]

    stream, answers = torch.cuda.Stream(), torch.zeros(rounds, dtype=torch.int32, device=CUDA)
    stream.wait_stream(torch.cuda.current_stream())
    address = ctypes.cast(look, ctypes.c_void_p).value
    assert address is not None
    with torch.cuda.stream(stream):
        for index in range(rounds):
            seen[:1].fill_(index + 1)
            call_in_order(stream, address, 0)
            torch.mul(seen[1:2], 1, out=answers[index : index + 1])
    stream.synchronize()
    assert found == list(range(1, rounds + 1))
    assert answers.tolist() == found
    del seen
    arena.close()


def test_more_calls_than_the_driver_keeps_are_waited_for() -> None:
    rounds, microseconds = 300, 500
    address = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value
    assert address is not None
    stream, count = torch.cuda.Stream(), torch.zeros(1, dtype=torch.int32, device=CUDA)
    stream.wait_stream(torch.cuda.current_stream())
    started = time.perf_counter()
    with torch.cuda.stream(stream):
        for _ in range(rounds):
            call_in_order(stream, address, microseconds)
            count.add_(1)
    stream.synchronize()
    assert time.perf_counter() - started >= rounds * microseconds / 1e6
    assert int(count) == rounds
