"""Who else uses the processors: another process counts, this one does not."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from profiling import contention
from profiling.contention import Others, usable_cores


def test_another_process_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        others = Others()
        time.sleep(0.5)
        cores = others.cores()
        other.kill()
    assert cores > 0.2


def test_own_work_interrupts_and_forbidden_cores_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cores the second is not ours; in two seconds 1.5 of the first were ours, 0.4 others', 0.1 interrupts."""
    now = {"s": 100.0, "own": 7.0}

    def times(*, percpu: bool) -> list[SimpleNamespace]:
        assert percpu
        past = now["s"] - 100.0
        ours = SimpleNamespace(
            user=50 + 0.8 * past, nice=0, system=9 + 0.1 * past, steal=0.05 * past, irq=past, idle=past
        )
        return [ours, SimpleNamespace(user=past, nice=0.0, system=0.0)]

    monkeypatch.setattr(contention, "usable_cores", lambda: [0])
    monkeypatch.setattr(psutil, "cpu_times", times)
    monkeypatch.setattr(
        contention,
        "time",
        SimpleNamespace(perf_counter=lambda: now["s"], process_time=lambda: now["own"]),
    )
    others = Others()
    assert others.cores() == 0
    now |= {"s": 102.0, "own": 8.5}
    assert others.cores() == pytest.approx(0.2)
    # A system that counts nothing, as some sandboxes do.
    monkeypatch.setattr(psutil, "cpu_times", lambda **_: [SimpleNamespace(user=0.0, nice=0.0, system=0.0)])
    assert others.cores() == 0


def test_the_cores_are_those_that_may_be_used() -> None:
    assert 1 <= len(usable_cores()) <= (os.cpu_count() or 1)
