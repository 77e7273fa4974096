"""Host memory by the page."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flexllmgen.memory.mapping import map_memory
from flexllmgen.units import PAGE

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE = 64 << 20


def facts(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that an address lies in."""
    inside, found = False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            inside = start <= address < stop
        elif inside:
            found[first.rstrip(":")] = rest.strip()
    return found


def test_it_is_zeroed_aligned_and_can_be_written() -> None:
    memory = torch.frombuffer(map_memory(SIZE), dtype=torch.uint8)
    assert memory.data_ptr() % PAGE == 0
    assert not memory.any()
    memory[-1] = 7
    assert memory[-1] == 7


@pytest.mark.skipif(
    not HUGE.exists() or "[never]" in HUGE.read_text(), reason="this system has no huge pages on demand"
)
def test_it_may_lie_in_huge_pages() -> None:
    memory = torch.frombuffer(map_memory(SIZE), dtype=torch.uint8).fill_(1)
    told = facts(memory.data_ptr())
    assert told.get("THPeligible", "1") == "1"
    assert "hg" in told["VmFlags"].split()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_children_do_not_share_it() -> None:
    memory = torch.frombuffer(map_memory(SIZE), dtype=torch.uint8).fill_(1)
    assert "dc" in facts(memory.data_ptr())["VmFlags"].split()
