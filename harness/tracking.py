"""Delivers result folders to an MLflow store. The only file that knows MLflow.

The folder is the record and the store a projection of it, so delivery may fail, be repeated, or come
from another machine: a run is found again by the tag `harness.run_uuid`, and what has arrived is not
sent twice. Nothing here runs while a measurement does. MLflow is imported when first needed; importing
this module costs nothing.
"""

import contextlib
import fcntl
import hashlib
import importlib
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from flexllmgen.errors import UsageError
from harness.provenance import process_is_alive
from harness.results import RunError, RunResult, RunStatus, Timeline, write_json
from harness.summary import (
    MetricRow,
    describe,
    metric_rows,
    params_of,
    shorten,
    system_rows,
    table_view,
    tags_of,
)

log = logging.getLogger(__name__)

MARKER = ".delivered.json"
PROBE_TIMEOUT_S = 2.0
FAILURE_HOLDS_S = 5.0
LOCK_TIMEOUT_S = 60.0  # the first process creates the tables, which takes seconds
LOCKED_RETRIES = 4
METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
DIGEST_LIMIT = 36  # of a dataset, in MLflow

UUID_TAG, DELIVERED_TAG, CONTENT_TAG = "harness.run_uuid", "harness.delivered", "harness.content_digest"
ERROR_TAG, EXIT_TAG, NOTE_TAG = "harness.error", "harness.exit_code", "mlflow.note.content"
# Which layout the UI gives an experiment, and a view of its runs that a link can open.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
VIEW_NAME = "harness"
LAYOUT = "workflowType=machine_learning"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_NAME}"

# MLflow reads these when it is imported or at each request; what the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

Value = TypeVar("Value")


class DeliveryError(Exception):
    """The store cannot be reached or refuses; what was measured is safe in its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Where runs go. Without `artifact_location` the server decides where files lie."""

    tracking_uri: str
    artifact_location: str | None

    @property
    def shown_uri(self) -> str:
        """The address without user name and password, for people and logs."""
        return re.sub(r"^([\w+.-]+://)[^/@]*@", r"\1", self.tracking_uri)

    @property
    def sqlite_path(self) -> Path | None:
        """The database file of a sqlite store."""
        if _scheme(self.tracking_uri) != "sqlite":
            return None
        return Path(self.tracking_uri.partition(":///")[2].partition("?")[0])


def resolve_store(tracking_uri: str | None, base: Path) -> Store:
    """Find the store: the option, else MLFLOW_TRACKING_URI, else `base`/mlruns/mlflow.db.

    A sqlite store keeps its artifacts beside the database file; its folders are created.

    Raises:
        UsageError: a bare path or file: address, which MLflow no longer writes to; an unknown scheme; a
            folder that cannot be created.
    """
    folder = base.absolute() / "mlruns"
    default = f"sqlite:///{folder / 'mlflow.db'}"
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default
    scheme = _scheme(uri)
    if scheme in ("http", "https") or uri.startswith("databricks"):
        return Store(tracking_uri=uri, artifact_location=None)
    if scheme not in _DATABASES:
        path = uri.removeprefix("file:")
        nearest = default if "://" in path else f"sqlite:///{Path(path).absolute() / 'mlflow.db'}"
        raise UsageError(
            f"tracking URI {uri!r} is not a store that MLflow writes to; "
            f"give a database file as {nearest}, or a server as http://host:5000"
        )
    if scheme == "sqlite":
        path, _, options = uri.partition(":///")[2].partition("?")
        if path in ("", ":memory:"):
            raise UsageError(f"tracking URI {uri!r} names no database file; give one as {default}")
        folder = Path(path).absolute().parent
        uri = f"sqlite:///{Path(path).absolute()}" + (f"?{options}" if options else "")
    # A database that is not behind a server has nobody to decide where files go.
    artifacts = folder / "artifacts"
    try:
        artifacts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot create {artifacts}: {error.strerror}; name another store with --tracking-uri"
        ) from error
    return Store(tracking_uri=uri, artifact_location=artifacts.as_uri())


def find_result_folders(path: Path) -> list[Path]:
    """The result folders at `path`: itself, or those directly in it, oldest first.

    Raises:
        UsageError: there are none.
    """
    if (path / "result.json").is_file():
        return [path]
    folders = [file.parent for file in path.glob("*/result.json")] if path.is_dir() else []
    if not folders:
        raise UsageError(f"{path} holds no result; name results/ or a folder results/<uuid> in it")
    return sorted(folders, key=lambda folder: (folder / "result.json").stat().st_mtime)


class Tracker:
    """Writes runs into one store. Safe to use from several processes at once on the same store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._client: Any = None
        self._failure: DeliveryError | None = None
        self._failed_at = 0.0

    def open_run(self, result: RunResult) -> str:
        """Create a RUNNING run for `result`, in an experiment created when needed, and return its id.

        An unreachable store costs at most 2.5 s, not counting the import of MLflow.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        with self._translated():
            return self._retried(lambda client: self._find_or_create(client, result, None))

    def deliver(self, folder: Path, run_id: str | None = None) -> str:
        """Bring the run in `folder` into the store, whole, and return its id.

        The run is `run_id`, or the one tagged with the result's uuid, or a new one. What is there already
        is not sent again, so a delivery that broke off can be repeated. A result left RUNNING by a
        process that is gone counts as FAILED.

        Raises:
            DeliveryError: the store is unreachable or refuses.
            UsageError: the folder holds no readable result, or its run is still going on.
        """
        result = RunResult.read(folder)
        if result.status is RunStatus.RUNNING and process_is_alive(result.process):
            raise UsageError(
                f"{folder} is still running (pid {result.process.get('pid')}); deliver it when it has ended"
            )
        # Alone with the folder, lest two who deliver it at once make two runs of it.
        with self._translated(), _alone(folder):
            files = _files(folder)
            digest = _digest(folder, files)
            return self._retried(lambda client: self._deliver(client, folder, result, files, digest, run_id))

    def reap(self) -> int:
        """Mark FAILED the runs that a dead process of this host left RUNNING; return how many.

        They have no end time: nobody knows it.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        with self._translated():
            return self._retried(self._reap)

    def runs_page(self) -> str:
        """The part of the UI's address that shows the latest experiment's runs with their figures.

        The UI's own defaults hide every metric and lay the page out for tracing chat applications.
        Empty while there is no experiment of ours.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        with self._translated():
            experiments = self._retried(lambda client: list(_pages(client.search_experiments)))
        ours = [one for one in experiments if VIEW_TAG in one.tags]
        if not ours:
            return ""
        latest = max(ours, key=lambda one: (one.last_update_time or 0, one.experiment_id))
        return f"/#/experiments/{latest.experiment_id}/runs?viewStateShareKey={VIEW_NAME}&{LAYOUT}"

    def _reap(self, client: Any) -> int:
        host = socket.gethostname()
        experiments = [one.experiment_id for one in _pages(client.search_experiments)]
        if not experiments:
            return 0
        query = f"attributes.status = 'RUNNING' and tags.`harness.host` = '{host}'"
        reaped = 0
        # Listed first: runs that stop matching while they are paged through would shift the pages.
        for run in list(_pages(client.search_runs, experiment_ids=experiments, filter_string=query)):
            tags = run.data.tags
            process = {
                "host": host,
                "pid": tags.get("harness.pid"),
                "pid_started": tags.get("harness.pid_started"),
            }
            if UUID_TAG not in tags or process_is_alive(process) is not False:
                continue
            client.set_tag(
                run.info.run_id, ERROR_TAG, f"process died: pid {process['pid']} on {host} is gone"
            )
            client.update_run(run.info.run_id, status="FAILED")
            log.info("run %s was left by a dead process; it is FAILED now", run.info.run_name)
            reaped += 1
        return reaped

    def _deliver(
        self,
        client: Any,
        folder: Path,
        result: RunResult,
        files: Sequence[Path],
        digest: str,
        run_id: str | None,
    ) -> str:
        known = run_id or _marked_run(folder, self.store)
        run_id = self._find_or_create(client, result, known)
        run = client.get_run(run_id)
        if run.data.tags.get(DELIVERED_TAG) == "true" and run.data.tags.get(CONTENT_TAG) == digest:
            _mark(folder, self.store, run_id)
            return run_id
        status, error = _ending(result)
        self._log_params(client, run, params_of(result))
        rows = metric_rows(result) + _timeline_rows(folder)
        self._log_metrics(client, run_id, rows)
        _log_dataset(client, run_id, result)
        for file in files:
            parent = file.relative_to(folder).parent.as_posix()
            client.log_artifact(run_id, str(file), None if parent == "." else parent)
        names = [file.name for file in files if file.suffix == ".png" and file.parent == folder]
        page = f"#/experiments/{run.info.experiment_id}/runs/{run_id}/artifacts"
        pictures = {name: f"{page}/{quote(name)}?{LAYOUT}" for name in names}
        self._log_tags(
            client, run_id, {**tags_of(result, error), NOTE_TAG: describe(result, error, pictures)}
        )
        for stale in (ERROR_TAG, EXIT_TAG) if error is None else ():
            # A run that was reaped and then delivered whole did not fail after all.
            if stale in run.data.tags:
                client.delete_tag(run_id, stale)
        client.set_terminated(run_id, status=status.value, end_time=_ended_ms(result, rows))
        # Last, so that it is true: without this tag the next delivery does everything again.
        self._log_tags(client, run_id, {CONTENT_TAG: digest, DELIVERED_TAG: "true"})
        _mark(folder, self.store, run_id)
        return run_id

    def _find_or_create(self, client: Any, result: RunResult, run_id: str | None) -> str:
        run = _get_run(client, run_id) if run_id else None
        if run is not None:
            tags = run.data.tags
            # A run that was delivered and then deleted by hand stays deleted.
            usable = run.info.lifecycle_stage == "active" or tags.get(DELIVERED_TAG) == "true"
            if usable and tags.get(UUID_TAG) == result.run_uuid:
                return str(run_id)
        experiment_id = self._experiment(client, result.experiment)
        query = f"tags.`{UUID_TAG}` = '{result.run_uuid}'"
        if found := client.search_runs([experiment_id], query, max_results=1):
            return str(found[0].info.run_id)
        # The error is unknown yet: `deliver` sets it, or finds that there is none.
        tags = {**tags_of(result, None), NOTE_TAG: describe(result, None) if result.metrics else "Running."}
        run = client.create_run(
            experiment_id, start_time=result.started_at_ms, tags=tags, run_name=result.run_name
        )
        return str(run.info.run_id)

    def _experiment(self, client: Any, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                location = self.store.artifact_location
                tags = {KIND_TAG: KIND, VIEW_TAG: table_view()}
                return str(client.create_experiment(name, artifact_location=location, tags=tags))
            except MlflowException:
                # Another process may have been quicker.
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            uri = f"MLFLOW_TRACKING_URI={self.store.shown_uri}"
            restore = f"{uri} mlflow experiments restore --experiment-id {found.experiment_id}"
            raise DeliveryError(
                f"experiment {name!r} was deleted; restore it with `{restore}` "
                "or name another one with --experiment"
            )
        for tag, value in ((KIND_TAG, KIND), (VIEW_TAG, table_view())):
            if tag not in found.tags:
                client.set_experiment_tag(found.experiment_id, tag, value)
        return str(found.experiment_id)

    def _log_params(self, client: Any, run: Any, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        logged = run.data.params
        for name, value in params.items():
            if logged.get(name, value) != value:
                log.warning("param %s stays %r in the store; MLflow lets none change", name, logged[name])
        new = [Param(name, value) for name, value in params.items() if name not in logged]
        for batch in _batches(new, PARAMS_PER_BATCH):
            client.log_batch(run.info.run_id, params=batch)

    def _log_metrics(self, client: Any, run_id: str, rows: Sequence[MetricRow]) -> None:
        from mlflow.entities import Metric

        # The store drops a row that it has already: same name, time, step and value.
        metrics = [Metric(row.key, row.value, row.timestamp_ms, row.step) for row in rows]
        for batch in _batches(metrics, METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=batch)

    def _log_tags(self, client: Any, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(name, value) for name, value in tags.items()], PARAMS_PER_BATCH):
            client.log_batch(run_id, tags=batch)

    def _retried(self, action: Callable[[Any], Value]) -> Value:
        """Do `action`, again while another process holds the database; every action here bears repeating."""
        for attempt in range(LOCKED_RETRIES):
            try:
                return action(self._connected())
            except Exception as error:
                if "database is locked" not in str(error) or attempt == LOCKED_RETRIES - 1:
                    raise
                log.debug("the database is locked; trying again")
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def _connected(self) -> Any:
        """The client of a store that answers. A server is asked each time: it may have gone since."""
        scheme, path = _scheme(self.store.tracking_uri), self.store.sqlite_path
        if scheme in ("http", "https"):
            self._probe(_probe_server)
        if self._client is None:
            mlflow = _import_mlflow()
            if path is not None:
                _probe_sqlite(path)
            elif scheme in _DATABASES:
                # MLflow itself would go on trying for hours.
                self._probe(_probe_database)
            with _first_use(path):
                self._client = mlflow.MlflowClient(tracking_uri=self.store.tracking_uri)
        return self._client

    def _probe(self, probe: Callable[[str], None]) -> None:
        """Run `probe` within its time; a store that has just failed is not asked again at once."""
        if self._failure is not None and time.monotonic() - self._failed_at < FAILURE_HOLDS_S:
            raise self._failure
        self._failure = _probe_failure(probe, self.store)
        self._failed_at = time.monotonic()
        if self._failure is not None:
            raise self._failure

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn whatever the store throws into one line."""
        try:
            yield
        except (DeliveryError, UsageError):
            raise
        except Exception as error:
            # MLflow, SQLAlchemy, requests and the artifact stores share no base class.
            log.debug("delivery failed", exc_info=True)
            # SQLAlchemy appends the whole statement.
            reason = " ".join(str(error).partition("[SQL:")[0].split()) or type(error).__name__
            raise DeliveryError(f"MLflow store {self.store.shown_uri}: {shorten(reason, 300)}") from error


def run_ui(store: Store, *, port: int, open_browser: bool, announce: Callable[[str], None] = log.info) -> int:
    """Serve the MLflow UI of `store` on the loopback address until interrupted; return the exit code.

    Where `port` is taken, the next free one serves and `announce` says so. A store that is a server has
    a UI of its own, whose address is announced.

    Raises:
        UsageError: no port near `port` is free.
        DeliveryError: the store cannot be created.
    """
    if _scheme(store.tracking_uri) in ("http", "https"):
        url = store.shown_uri.rstrip("/") + Tracker(store).runs_page()
        announce(f"the store is a server with a UI of its own: {url}")
        if open_browser:
            webbrowser.open(url)
        return 0
    free = _free_port(port)
    if free != port:
        announce(f"port {port} is taken, using {free}")
    # Asking first also creates a missing database under the lock that runs respect; the server has none.
    url = f"http://127.0.0.1:{free}" + Tracker(store).runs_page()
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
    environment = {**_ENVIRONMENT, **quiet, **os.environ}
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


def _import_mlflow() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mlflow = importlib.import_module("mlflow")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def _probe_failure(probe: Callable[[str], None], store: Store) -> DeliveryError | None:
    """What is wrong with the store, found in time whatever the probe hangs in, name lookup included."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            probe(store.tracking_uri)
            outcome.append(None)
        except Exception as error:  # noqa: BLE001 - told by the caller
            outcome.append(error)

    # A daemon: a lookup that hangs cannot be ended, and must not keep the program from ending.
    thread = threading.Thread(target=ask, daemon=True, name="store-probe")
    thread.start()
    thread.join(PROBE_TIMEOUT_S + 0.2)
    if not outcome:
        return DeliveryError(f"MLflow store {store.shown_uri} does not answer within {PROBE_TIMEOUT_S:.0f} s")
    if (error := outcome[0]) is None:
        return None
    reason = shorten(" ".join(str(error).split()), 200)
    return DeliveryError(f"MLflow store {store.shown_uri} is unreachable: {reason}")


def _probe_server(uri: str) -> None:
    import requests

    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true")
    verify = False if insecure else os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    try:
        with requests.get(
            f"{uri.rstrip('/')}/health", timeout=PROBE_TIMEOUT_S, verify=verify, stream=True
        ) as answer:
            code, reason = answer.status_code, answer.reason
    except requests.Timeout:
        raise TimeoutError(f"no answer within {PROBE_TIMEOUT_S:.0f} s") from None
    except requests.ConnectionError as error:
        raise ConnectionError(_root_cause(error)) from None
    # Any answer shows a server, even a refusal without credentials; these come from a proxy before none.
    if code in (502, 503, 504):
        raise ConnectionError(f"HTTP {code} {reason}")


def _root_cause(error: BaseException) -> str:
    """The innermost reason: what the system said, without the wrapping of three libraries."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return getattr(error, "strerror", None) or str(error)


def _probe_database(uri: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.connect():
        pass


def _probe_sqlite(path: Path) -> None:
    """Raise where the file is no database or cannot be opened; a missing one will be created."""
    if not path.exists() and path.parent.is_dir() and os.access(path.parent, os.W_OK):
        return
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=1)
        ) as file:
            file.execute("select count(*) from sqlite_master")
    except sqlite3.Error as error:
        if "locked" not in str(error):  # busy is not broken
            way_out = "mend or move the file, or name another store with --tracking-uri"
            raise DeliveryError(f"MLflow store {path}: {error}; {way_out}") from error


def _first_use(path: Path | None) -> contextlib.AbstractContextManager[None]:
    """Let one process at a time open a sqlite store: the first creates its tables, and two cannot."""
    if path is None:
        return contextlib.nullcontext()
    return _alone(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT)


@contextlib.contextmanager
def _alone(path: Path, flags: int = os.O_RDONLY) -> Iterator[None]:
    """Hold the lock on `path`, a file or a folder, that other processes respect; dying releases it."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    handle = os.open(path, flags, 0o644)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    words = f"another process holds {path} for {LOCK_TIMEOUT_S:.0f} s; end it and try again"
                    raise DeliveryError(words) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def _ending(result: RunResult) -> tuple[RunStatus, RunError | None]:
    """How the run ended. One that never said so ended with its process."""
    if result.status is not RunStatus.RUNNING:
        return result.status, result.error
    pid, host = result.process.get("pid"), result.process.get("host")
    return RunStatus.FAILED, result.error or RunError(
        type="ProcessDied", message=f"process died without a word (pid {pid} on {host})"
    )


def _ended_ms(result: RunResult, rows: Sequence[MetricRow]) -> int:
    return result.ended_at_ms or max([result.started_at_ms, *(row.timestamp_ms for row in rows)])


def _timeline_rows(folder: Path) -> list[MetricRow]:
    path = folder / "timeline.json"
    if not path.exists():
        return []
    try:
        return system_rows(Timeline.model_validate_json(path.read_bytes()))
    except ValueError as error:
        log.warning(
            "%s is damaged, the run goes without system metrics: %s", path, str(error).splitlines()[0]
        )
        return []


def _log_dataset(client: Any, run_id: str, result: RunResult) -> None:
    data = result.dataset
    if data is None:
        return
    from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if data.source_type == "file":
        # By name, since the file may lie on another machine: nothing is opened.
        source, kind = json.dumps({"uri": data.source}), "local"
    else:
        origin = HuggingFaceDatasetSource(
            path=data.source, config_name=data.config, split=data.split, revision=data.revision
        )
        source, kind = origin.to_json(), origin._get_source_type()
    profile = {
        "num_prompts": data.num_prompts,
        "num_rows": data.num_rows,
        "prompts_unique": data.prompts_unique,
        "real_tokens": data.real_tokens,
        "padded_tokens": data.padded_tokens,
        "prompt_mode": data.prompt_mode,
        "licence": data.licence,
        "fingerprint": data.fingerprint,
    }
    dataset = Dataset(
        name=data.name,
        digest=data.digest[:DIGEST_LIMIT],
        source_type=kind,
        source=source,
        profile=json.dumps(profile),
    )
    tags = [InputTag("mlflow.data.context", "eval")]
    client.log_inputs(run_id, [DatasetInput(dataset, tags)])


def _files(folder: Path) -> list[Path]:
    """Files of the record: all but hidden ones, which are markers and halves of files."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _digest(folder: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            inner = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder)}\0{inner}\0".encode())
    return digest.hexdigest()[:32]


def _marked_run(folder: Path, store: Store) -> str | None:
    """The run that this folder became in this store, as its marker says; only a hint, the store decides."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return str(marker["run_id"]) if marker["tracking_uri"] == store.shown_uri else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mark(folder: Path, store: Store, run_id: str) -> None:
    # A folder that cannot be written to, on a mounted medium say, is delivered all the same.
    with contextlib.suppress(OSError):
        write_json(folder / MARKER, {"tracking_uri": store.shown_uri, "run_id": run_id})


def _get_run(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _batches(items: Sequence[Value], size: int) -> Iterator[Sequence[Value]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _scheme(uri: str) -> str:
    """`sqlite`, `postgresql`, `http` and so on, without a database driver."""
    return uri.partition("://")[0].partition("+")[0].lower() if "://" in uri else ""
