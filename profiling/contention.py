"""How much of the processors other processes take while something is measured. Knows nothing of what is measured."""

import time

import psutil

SHOWS_FROM_SHARE = 0.1
"""From this share of the processors on, what others use of them shows in what is measured."""


class Others:
    """What all other processes use, from now on, of the processors that this process may run on."""

    def __init__(self) -> None:
        self._others_s, self._at_s = _others_s(), time.perf_counter()

    def cores(self) -> float:
        """Processors that they kept busy, on average since the beginning; 0 where the system does not tell."""
        elapsed = time.perf_counter() - self._at_s
        return max(0.0, _others_s() - self._others_s) / elapsed if elapsed > 0 else 0.0


def usable_cores() -> list[int]:
    """Numbers of the processors that this process may run on."""
    process = psutil.Process()
    # Not every system has an affinity.
    return (
        process.cpu_affinity() if hasattr(process, "cpu_affinity") else list(range(psutil.cpu_count() or 1))
    )


def _others_s() -> float:
    """Seconds of processor time since the machine was started, without this process's own.

    Interrupts do not count: they are mostly what this process makes the disk and the links do. What a hypervisor
    gave to other machines (steal) does.
    """
    by_core = psutil.cpu_times(percpu=True)
    kinds = ("user", "nice", "system", "steal")
    busy_s = sum(
        getattr(by_core[core], kind, 0.0) for core in usable_cores() if core < len(by_core) for kind in kinds
    )
    return busy_s - time.process_time()
