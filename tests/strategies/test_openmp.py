"""A thread's OpenMP workers end when they are let go of, and come back when they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from strategies.openmp import _pause, release_workers

SCRIPT = """
import json, os, time
import torch
from strategies.openmp import release_workers

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
alone = threads()
x = torch.arange(4_000_000, dtype=torch.float64)
first = (x + 1).sum().item()
working = threads()
release_workers()
end = time.monotonic() + 10
while threads() > alone and time.monotonic() < end:
    time.sleep(0.01)
released = threads()
again = (x + 1).sum().item()
print(json.dumps({"counts": [alone, working, released, threads()], "sums": [first, again]}))
"""


@pytest.mark.skipif(_pause() is None, reason="torch is not built with libgomp here")
def test_workers_end_and_come_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    told = json.loads(done.stdout)
    alone, working, released, later = told["counts"]
    assert working == alone + 2
    assert released == alone
    assert later == working
    assert told["sums"][0] == told["sums"][1]


def test_without_libgomp_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.openmp._pause", lambda: None)
    release_workers()
