"""Lets the threads go that torch's OpenMP keeps for a thread of ours, before another does the work.

libgomp keeps workers for every thread that ever computed, and lets idle ones wait in a loop only while there are no more
of them in all than processors. With the workers of two threads there are more; then each of the many short operations of
a decode step wakes its workers from sleep. Measured on two cores, with nothing else running: a step of transformers' took
81 ms on a thread beside a main thread that had computed before, and 60 ms once that one's workers were gone.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch  # noqa: F401 - what is looked for below is its libgomp

log = logging.getLogger(__name__)

_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0


def release_workers() -> None:
    """Ends the OpenMP workers of the calling thread; it gets new ones when it next needs them. Without libgomp nothing."""
    if (pause := _pause()) is not None and pause(_PAUSE_HARD) != 0:
        log.debug("libgomp did not let its workers go")


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """`omp_pause_resource_all` of the libgomp that this process has loaded; None where there is none."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    except OSError:
        return None
    for path in sorted(mapped):
        if Path(path).name.startswith("libgomp"):
            found: Callable[[int], int] | None = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
            return found
    return None
