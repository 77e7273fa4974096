"""One measurement in a process of its own, held to a time: the JSON line it prints, or why there is none."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SO_FAR = "so_far"
"""Marks a line that counts if the time ends before the next."""
_GONE_S = 10
_PR_SET_PDEATHSIG = 1


def measure(script: Path, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Runs a script of this folder; what it printed last as JSON, with `wall_s`, or `error`."""
    start = time.time()
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        # A child that left the group may hold the pipes open: it is not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            found = _last_json(process.communicate(timeout=_GONE_S)[0])
            if found.get(SO_FAR):
                return {**found, "over_s": seconds}
        return {"error": f"over {seconds:.0f} s"}
    result = _last_json(stdout)
    if not result or (process.returncode and "error" not in result):
        result["error"] = " | ".join(stderr.strip().splitlines()[-6:])[-1500:]
    if "error" in result:
        result["stderr"] = stderr[-3000:]
    return {**result, "wall_s": round(time.time() - start, 1)}


def _last_json(text: str) -> dict[str, Any]:
    """The last line that is a JSON object, whatever else was printed; empty if none is."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                return found
    return {}


def end_with_parent() -> None:
    """This process, which has a session of its own, is killed when whoever started it ends: it would keep the device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
