"""Stores to deliver to, and addresses where none is."""

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.store import Store, resolve_store
from harness.tracking import Tracker


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables, made once: making them takes longer than a test."""
    base = tmp_path_factory.mktemp("template")
    store = resolve_store(None, base)
    assert Tracker(store).reap() == 0
    assert store.sqlite_path is not None
    return store.sqlite_path


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Store:
    store = resolve_store(None, tmp_path)
    assert store.sqlite_path is not None
    shutil.copy(empty_database, store.sqlite_path)
    return store


@pytest.fixture
def tracker(store: Store) -> Tracker:
    return Tracker(store)


@pytest.fixture
def client(store: Store) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.tracking_uri)


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
    for connection in held:
        connection.close()


class FakeServer(ThreadingHTTPServer):
    """Speaks as much of MLflow's protocol as a delivery needs; each answer waits `delay_s(method, path)`."""

    def __init__(self, delay_s: Callable[[str, str], float]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.delay_s = delay_s
        self.paths: list[str] = []
        self.closing = threading.Event()
        self.store = Store(tracking_uri=f"http://127.0.0.1:{self.server_port}", artifact_location=None)


class _Answer(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.paths.append(path)
        # However long an answer would take, the test ends without it.
        if self.server.closing.wait(self.server.delay_s(self.command, path)):
            return
        experiment = {"experiment_id": "1", "name": "offload-eval", "lifecycle_stage": "active"}
        info = {
            "run_id": "r1",
            "experiment_id": "1",
            "status": "RUNNING",
            "start_time": 1,
            "artifact_uri": "mlflow-artifacts:/1/r1/artifacts",
            "lifecycle_stage": "active",
        }
        answers = {
            "experiments/search": {"experiments": [experiment]},
            "experiments/get-by-name": {"experiment": experiment},
            "runs/create": {"run": {"info": info, "data": {}}},
            "runs/get": {"run": {"info": info, "data": {}}},
            "runs/update": {"run_info": info},
        }
        body = json.dumps(answers.get(path.partition("/mlflow/")[2], {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def fake_server() -> Iterator[Callable[[Callable[[str, str], float]], FakeServer]]:
    """Start a server that makes its clients wait: `fake_server(lambda method, path: 3.0)`."""
    servers: list[FakeServer] = []

    def start(delay_s: Callable[[str, str], float]) -> FakeServer:
        server = FakeServer(delay_s)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()
