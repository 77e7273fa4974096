"""MLflow stores: how one is named, and how it is reached without waiting long for one that is away.

MLflow itself retries for minutes or hours; here a store is asked within its time first, and one that has
cost time in vain is not asked again at once. Knows nothing of what is written. MLflow is imported when first
needed; importing this module costs nothing.
"""

import contextlib
import fcntl
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from flexllmgen.errors import UsageError
from harness.provenance import without_credentials
from harness.summary import shorten

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 2  # of a small request; a whole number, as MLflow wants it
BULK_TIMEOUT_S = 60  # of an upload: a slow server first hands the file on to a store of its own
COSTLY_S = 1.0  # a failure that took longer is remembered
FAILURE_HOLDS_S = 5.0
LOCK_TIMEOUT_S = 60.0  # the first process creates the tables, which takes seconds
LOCKED_RETRIES = 4

# MLflow reads these when it is imported or at each request; what the user has set stays.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_SERVERS = ("http", "https")
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
        return without_credentials(self.tracking_uri)

    @property
    def is_server(self) -> bool:
        """Whether it is reached over HTTP, and then has a UI of its own."""
        return _scheme(self.tracking_uri) in _SERVERS

    @property
    def sqlite_path(self) -> Path | None:
        """The database file of a sqlite store."""
        if _scheme(self.tracking_uri) != "sqlite":
            return None
        return Path(_sqlite_file(self.tracking_uri))


def resolve_store(tracking_uri: str | None, base: Path, *, create: bool = True) -> Store:
    """Find the store: the option, else MLFLOW_TRACKING_URI, else `base`/mlruns/mlflow.db.

    A sqlite store keeps its artifacts beside the database file; its folders are created, unless it is only to be read.

    Raises:
        UsageError: a bare path or file: address, which MLflow no longer writes to; an unknown scheme; a
            folder that cannot be created.
    """
    folder = base.absolute() / "mlruns"
    default = _sqlite_uri(folder / "mlflow.db")
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default
    scheme = _scheme(uri)
    if scheme in _SERVERS or uri.startswith("databricks"):
        return Store(tracking_uri=uri, artifact_location=None)
    if scheme not in _DATABASES:
        path = uri.removeprefix("file:")
        nearest = default if "://" in path else _sqlite_uri(Path(path).absolute() / "mlflow.db")
        raise UsageError(
            f"tracking URI {uri!r} is not a store that MLflow writes to; "
            f"give a database file as {nearest}, or a server as http://host:5000"
        )
    if scheme == "sqlite":
        path, _, options = uri.partition(":///")[2].partition("?")
        if path in ("", ":memory:"):
            raise UsageError(f"tracking URI {uri!r} names no database file; give one as {default}")
        database = Path(unquote(path)).absolute()
        folder = database.parent
        uri = _sqlite_uri(database) + (f"?{options}" if options else "")
    # A database that is not behind a server has nobody to decide where files go.
    artifacts = folder / "artifacts"
    try:
        if create:
            artifacts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot create {artifacts}: {error.strerror}; name another store with --tracking-uri"
        ) from error
    return Store(tracking_uri=uri, artifact_location=artifacts.as_uri())


class Connection:
    """The way to one store. Every use asks first whether the store answers: it may have gone since."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._client: Any = None
        self._failure: DeliveryError | None = None
        self._failed_at = 0.0

    def call(
        self, action: Callable[[Any], Value], *, timeout_s: int = REQUEST_TIMEOUT_S, anew: bool = True
    ) -> Value:
        """Do `action` with MLflow's client, again where another process held the database meanwhile.

        MLflow waits `timeout_s` for each answer of a server, or what the user has set. A failure that cost
        time is raised again, without asking, for some seconds; without `anew`, for as long as this lives.

        Raises:
            DeliveryError: the store is unreachable or refuses.
        """
        if self._failure is not None:
            if not anew or time.monotonic() - self._failed_at < FAILURE_HOLDS_S:
                raise self._failure
            self._failure = None
        with self.translated():
            if self.store.sqlite_path is None:
                self._ask()  # before MLflow is imported, which takes seconds
            mlflow = preload()
            began = time.monotonic()
            try:
                with _request_timeout(timeout_s):
                    return self._retried(mlflow, action)
            except Exception as error:
                if time.monotonic() - began > COSTLY_S:
                    self._remember(self._told(error))
                raise

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn whatever the store throws into one line."""
        try:
            yield
        except (DeliveryError, UsageError):
            raise
        except Exception as error:
            log.debug("delivery failed", exc_info=True)
            raise self._told(error) from error

    def _told(self, error: Exception) -> DeliveryError:
        # MLflow, SQLAlchemy, requests and the artifact stores share no base class.
        if isinstance(error, DeliveryError):
            return error
        # SQLAlchemy appends the whole statement.
        # MLflow quotes the address as it was given.
        reason = without_credentials(" ".join(str(error).partition("[SQL:")[0].split()))
        return DeliveryError(
            f"MLflow store {self.store.shown_uri}: {shorten(reason or type(error).__name__, 300)}"
        )

    def _retried(self, mlflow: Any, action: Callable[[Any], Value]) -> Value:
        for attempt in range(LOCKED_RETRIES):
            try:
                return action(self._connected(mlflow))
            except DeliveryError:
                raise
            except Exception as error:
                if "database is locked" not in str(error) or attempt == LOCKED_RETRIES - 1:
                    raise
                log.debug("the database is locked; trying again")
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def _connected(self, mlflow: Any) -> Any:
        path = self.store.sqlite_path
        if self._client is None:
            # Asked under the lock, lest a database whose tables are just being made pass for a stuck one.
            with _first_use(path):
                if path is not None:
                    self._ask()
                    if not path.exists() or not path.stat().st_size:
                        _make_database(path)
                self._client = mlflow.MlflowClient(tracking_uri=self.store.tracking_uri)
        elif path is not None:
            self._ask()
        return self._client

    def _ask(self) -> None:
        scheme = _scheme(self.store.tracking_uri)
        if scheme == "sqlite":
            probe = _probe_sqlite
        elif scheme in _SERVERS:
            probe = _probe_server
        elif scheme in _DATABASES:
            probe = _probe_database
        else:
            return
        if (failure := _probe_failure(probe, self.store)) is not None:
            self._remember(failure)
            raise failure

    def _remember(self, failure: DeliveryError) -> None:
        self._failure, self._failed_at = failure, time.monotonic()


@contextlib.contextmanager
def alone(path: Path, flags: int = os.O_RDONLY) -> Iterator[None]:
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


def preload() -> Any:
    """Import MLflow, quiet, with our defaults for what the user has not set; takes seconds the first time."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


@contextlib.contextmanager
def _request_timeout(seconds: int) -> Iterator[None]:
    """Let MLflow wait `seconds` for each answer, unless the user has said how long; it has no other way."""
    if TIMEOUT_VARIABLE in os.environ:
        yield
        return
    os.environ[TIMEOUT_VARIABLE] = str(seconds)
    try:
        yield
    finally:
        os.environ.pop(TIMEOUT_VARIABLE, None)


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
    if (error := outcome[0]) is None or isinstance(error, DeliveryError):
        return error
    reason = shorten(without_credentials(" ".join(str(error).split())), 200)
    return DeliveryError(f"MLflow store {store.shown_uri} is unreachable: {reason}")


def _probe_server(uri: str) -> None:
    import requests

    # Of the API and with its database behind it: a server may say it is well and yet hang in both.
    url = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true")
    verify = False if insecure else os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True
    try:
        with requests.get(url, timeout=PROBE_TIMEOUT_S, verify=verify, stream=True) as answer:
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


def _probe_sqlite(uri: str) -> None:
    """Raise where the file is no database, cannot be opened or stays locked; a missing one will be created."""
    path = Path(_sqlite_file(uri))
    if not path.exists() and path.parent.is_dir() and os.access(path.parent, os.W_OK):
        return
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=PROBE_TIMEOUT_S)
        ) as file:
            file.execute("select count(*) from sqlite_master")
            file.execute("begin immediate")
    except sqlite3.Error as error:
        if "readonly" in str(error):  # good enough to look at
            return
        way_out = "mend or move the file, or name another store with --tracking-uri"
        if "locked" in str(error):
            way_out = "end the process that holds it, or name another store with --tracking-uri"
        raise DeliveryError(f"MLflow store {path}: {error}; {way_out}") from error


def _first_use(path: Path | None) -> contextlib.AbstractContextManager[None]:
    """Let one process at a time open a sqlite store: the first creates its tables, and two cannot."""
    if path is None:
        return contextlib.nullcontext()
    return alone(path.parent / f".{path.name}.lock", os.O_RDWR | os.O_CREAT)


def _make_database(path: Path) -> None:
    """Create a sqlite store whole or not at all: half of its tables, left by a full disk, could never be completed."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = path.with_name(f".{path.name}.new")
    leftovers = (new, new.with_name(f"{new.name}-journal"))
    for left in leftovers:
        left.unlink(missing_ok=True)
    try:
        made = SqlAlchemyStore(_sqlite_uri(new), "./mlruns")
        made.engine.dispose()
        new.replace(path)
    finally:
        for left in leftovers:
            left.unlink(missing_ok=True)


def _sqlite_uri(path: Path) -> str:
    """The address of a database file. SQLAlchemy decodes it, so that a % of the path's own must be encoded."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def _sqlite_file(uri: str) -> str:
    return unquote(uri.partition(":///")[2].partition("?")[0])


def _scheme(uri: str) -> str:
    """`sqlite`, `postgresql`, `http` and so on, without a database driver."""
    return uri.partition("://")[0].partition("+")[0].lower() if "://" in uri else ""
