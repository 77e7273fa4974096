"""One measurement in a process of its own, held to a time: the JSON line it prints, or why there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
        process.communicate()
        return {"error": f"over {seconds:.0f} s"}
    lines = [line for line in stdout.splitlines() if line.startswith("{")]
    result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if not lines or (process.returncode and "error" not in result):
        result["error"] = " | ".join(stderr.strip().splitlines()[-6:])[-1500:]
    if "error" in result:
        result["stderr"] = stderr[-3000:]
    return {**result, "wall_s": round(time.time() - start, 1)}
