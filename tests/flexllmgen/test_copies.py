"""Copies between host memories: exact, and by the thread that makes them alone."""

from __future__ import annotations

import threading

import psutil
import pytest
import torch

from flexllmgen.memory.transfer import copy_bytes, copy_whole


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 3), (1, 7), (5, 4, 33)])
def test_what_is_copied_is_the_same(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    memory = torch.full((shape[0] + 2, *shape[1:]), 9, dtype=dtype)
    copy_whole(memory[1:-1], source)
    assert torch.equal(memory[1:-1], source)
    assert (memory[[0, -1]] == 9).all(), "and nothing beside it"


def test_other_sizes_are_refused() -> None:
    with pytest.raises(AssertionError):
        copy_whole(torch.zeros(4), torch.zeros(3))
    with pytest.raises(AssertionError):
        copy_whole(torch.zeros(4, 4).t()[:2], torch.zeros(2, 4))


def test_a_lanes_copy_gets_no_workers() -> None:
    """Workers of more than one thread, together more than processors, slow all of torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    source, target = torch.ones(64 << 20, dtype=torch.uint8), torch.zeros(64 << 20, dtype=torch.uint8)
    counts = []

    def copy() -> None:
        copy_bytes(target, source)
        counts.append(psutil.Process().num_threads())

    try:
        target.copy_(source)  # This thread has its workers.
        counts.append(psutil.Process().num_threads())
        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert counts[1] == counts[0] + 1
