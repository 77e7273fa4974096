"""`harness ui`: MLflow's UI on the store, from a server that ends with this process."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable

from flexllmgen.errors import UsageError
from harness.store import ENVIRONMENT, Store
from harness.tracking import Tracker

log = logging.getLogger(__name__)


def run_ui(store: Store, *, port: int, open_browser: bool, announce: Callable[[str], None] = log.info) -> int:
    """Serve the MLflow UI of `store` on the loopback address until interrupted; return the exit code.

    A store without a run is served too, and `announce` says that it has none. Where `port` is taken, the
    next free one serves and `announce` says so. A store that is a server has a UI of its own, whose address
    is announced.

    Raises:
        UsageError: no port near `port` is free.
        DeliveryError: the store cannot be created.
    """
    # Asking first also creates a missing database under the lock that runs respect; the server has none.
    page = Tracker(store).runs_page()
    if not page:
        announce("no runs here yet; harness eval makes one")
    if store.is_server:
        url = store.shown_uri.rstrip("/") + page
        announce(f"the store is a server with a UI of its own: {url}")
        if open_browser:
            webbrowser.open(url)
        return 0
    free = _free_port(port)
    if free != port:
        announce(f"port {port} is taken, using {free}")
    url = f"http://127.0.0.1:{free}{page}"
    # No artifact proxy: experiments made in the UI then keep their files where `harness eval` finds them.
    options = {
        "--backend-store-uri": store.tracking_uri,
        "--host": "127.0.0.1",
        "--port": str(free),
        "--workers": "1",
        "--uvicorn-opts": "--log-level warning",
    }
    if store.artifact_location:
        options["--default-artifact-root"] = store.artifact_location
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--no-serve-artifacts",
        *(word for pair in options.items() for word in pair),
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
    environment = {**ENVIRONMENT, **quiet, **os.environ}
    ends = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in ends]
    server = None
    try:
        # A session of its own, so that one signal ends the server with all its workers.
        server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        announce(f"MLflow UI at {url} (Ctrl-C ends it), store {store.shown_uri}")
        if open_browser and _answers(free, server):
            webbrowser.open(url)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        if server is not None:
            _end(server)
        for number, handler in zip(ends, before, strict=True):
            signal.signal(number, handler)


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, number)
            server.wait(timeout=5)


def _free_port(port: int) -> int:
    for candidate in range(port, min(port + 20, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", candidate))
                return candidate
    raise UsageError(f"ports {port} to {min(port + 19, 65535)} are all taken; name another with --port")


def _answers(port: int, server: subprocess.Popen[bytes]) -> bool:
    """Wait until the server listens; False where it ended instead."""
    while server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        time.sleep(0.2)
    return False
