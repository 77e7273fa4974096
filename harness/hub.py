"""The Hugging Face hub: whether it answers, and the library kept quiet, or kept from it.

Left alone, the libraries retry for minutes where there is no network. So whether the hub answers is
asked first, for at most PROBE_S, and where it does not they are told to use their cache.
"""

import contextlib
import importlib
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

PROBE_S = 1.5
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def probe_hub() -> Callable[[], bool]:
    """Begin to ask whether the hub answers; the function returned waits at most PROBE_S for it.

    Any answer counts but a proxy's complaint. Nothing is asked in the libraries' offline mode. Runs in a
    thread, beside the import of a library, and because a name server that keeps silent knows no timeout.

        reachable = probe_hub()
        online = reachable()
    """
    if any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in OFFLINE_VARIABLES):
        return lambda: False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    answers: list[bool] = []
    deadline = time.monotonic() + PROBE_S
    thread = threading.Thread(target=lambda: answers.append(_ask(endpoint)), name="probe-hub", daemon=True)
    thread.start()

    def wait() -> bool:
        thread.join(max(0.0, deadline - time.monotonic()))
        return answers == [True]

    return wait


def _ask(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in {407, 502, 503, 504}
    except urllib.error.URLError as error:
        # It answered. The library has certificates of its own: that these do not fit proves nothing.
        return "CERTIFICATE_VERIFY_FAILED" in str(error)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def quiet_datasets(*, online: bool) -> Iterator[Any]:
    """The module `datasets` without progress bars and chatter, and, unless `online`, without any request.

    with quiet_datasets(online=False) as datasets:
        table = datasets.load_dataset("json", data_files="questions.jsonl", split="train")
    """
    import datasets

    hub: Any = importlib.import_module("huggingface_hub")
    logger = logging.getLogger("datasets")
    settings = datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE
    level = logger.level
    quiet = [library for library in (datasets, hub.utils) if not library.are_progress_bars_disabled()]
    for library in quiet:
        library.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    # Both are looked at with each request, but set from the environment only when imported.
    datasets.config.HF_HUB_OFFLINE = hub.constants.HF_HUB_OFFLINE = not online
    try:
        yield datasets
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.constants.HF_HUB_OFFLINE = settings
        logger.setLevel(level)
        for library in quiet:
            library.enable_progress_bars()
