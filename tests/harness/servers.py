"""MLflow servers as `harness ui` starts them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from harness.store import Store


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def start_ui(base: Path, port: int) -> Iterator[str]:
    """Run `harness ui` on the store of the folder `base`; give the page it announces once that answers."""
    import requests

    command = [sys.executable, "-m", "harness.cli", "ui", "--no-open", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=base, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        try:
            page = next(word for line in child.stdout for word in line.split() if word.startswith("http"))
            deadline = time.monotonic() + 90
            while True:
                with contextlib.suppress(requests.RequestException):
                    if requests.get(page.partition("/#")[0] + "/health", timeout=1).ok:
                        break
                assert time.monotonic() < deadline, "the server does not answer"
                assert child.poll() is None, "the server ended"
                time.sleep(0.2)
            yield page
        finally:
            child.terminate()
            child.wait(timeout=30)


@contextlib.contextmanager
def start_server(store: Store, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A bare MLflow server on `store` that also takes artifacts, as a team would run one, for as long as it is let live."""
    import requests

    assert store.sqlite_path is not None
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", store.tracking_uri]
    places += ["--artifacts-destination", str(store.sqlite_path.parent / "served")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options, *places],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            deadline = time.monotonic() + 90
            while True:
                with contextlib.suppress(requests.RequestException):
                    if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                        break
                assert time.monotonic() < deadline, "the server does not answer"
                assert server.poll() is None, "the server ended"
                time.sleep(0.2)
            yield server
        finally:
            # Its workers hold the port after it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
