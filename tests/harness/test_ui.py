"""The MLflow UI as `harness ui` serves it."""

import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from records import make_folder, make_result

from harness.store import DeliveryError, Store
from harness.tracking import Tracker
from harness.ui import run_ui


@pytest.mark.slow
def test_ui_serves_and_is_a_store_itself(tmp_path: Path, store: Store, tracker: Tracker) -> None:
    """Its server takes the next port where one is taken, delivers over HTTP, and ends with its parent."""
    import requests

    tracker.deliver(make_folder(tmp_path / "results"))
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from harness.store import resolve_store
        from harness.ui import run_ui
        store, say = resolve_store(None, Path(sys.argv[1])), lambda words: print(words, flush=True)
        run_ui(store, port=int(sys.argv[2]), open_browser=False, announce=say)
    """)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-c", code, str(tmp_path), str(taken.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout is not None
            assert "is taken" in child.stdout.readline()
            page = child.stdout.readline().split()[3]
            assert "/#/experiments/1/runs?viewStateShareKey=harness" in page
            address = page.partition("/#")[0]
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    if requests.get(f"{address}/health", timeout=1).ok:
                        break
                except requests.RequestException:
                    time.sleep(0.2)
            remote = Tracker(Store(tracking_uri=address, artifact_location=None))
            folder = make_folder(tmp_path / "more", make_result(run_uuid="over http"))
            assert remote.deliver(folder) == remote.deliver(folder)
            assert remote.reap() == 0
            child.terminate()
            assert child.wait(timeout=20) == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{address}/health", timeout=1)


def test_ui_without_a_run_says_so(fake_server: Any) -> None:
    said: list[str] = []
    server = fake_server(lambda method, path: 0.0)
    assert run_ui(server.store, port=5000, open_browser=False, announce=said.append) == 0
    assert said[0] == "no runs here yet; harness eval makes one"


def test_ui_of_a_server_is_its_own(closed_port: int) -> None:
    store = Store(tracking_uri=f"http://127.0.0.1:{closed_port}", artifact_location=None)
    with pytest.raises(DeliveryError, match="unreachable"):
        run_ui(store, port=5000, open_browser=False)
