"""Database URLs, engines, locks and retries: everything that knows how SQLite and PostgreSQL differ.

Optuna's tables and our own live in one database (or one PostgreSQL schema). MLflow's may not: it and Optuna both own a
table `alembic_version`. Passwords never appear in a message: every URL that is shown goes through `mask_url`.
"""

import contextlib
import fcntl
import hashlib
import os
import random
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from search.errors import DatabaseError, ForeignSchemaError, UserInputError, install_extra

STORAGE_URL_VARIABLE = "YOLOSEARCH_STORAGE_URL"
SQLITE_BUSY_SECONDS = 60.0
INIT_LOCK_SECONDS = 120.0
HALTED_SECONDS = 15
"""PostgreSQL ends a transaction that its client leaves alone for so long: a halted process must not keep its locks."""
POOL = {"pool_size": 1, "max_overflow": 4, "pool_timeout": 60, "pool_use_lifo": True}
"""A worker's threads take turns at one connection and open others only while they collide: servers have few."""
READ_ONLY = {"yolosearch_begin": "DEFERRED"}
"""Execution options of a transaction that only reads: on SQLite it waits for no writer."""

_STUDY_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_URL_PASSWORD = re.compile(r"(\w://[^:/@\s]*:)[^\s]*(@)")
_SECRET_KEYS = (
    "password|sslpassword|token|access_token|secret|api_key|accountkey|account_key|sharedaccesssignature|sas_token"
)
_KEY_PASSWORD = re.compile(rf"\b({_SECRET_KEYS})=('[^']*'|[^\s&'\"]+)", re.IGNORECASE)
_SIGNATURE = re.compile(r"([?&]sig=)[^\s&'\"]+", re.IGNORECASE)
"""Of a URL that gives access to a blob."""
_ALLOWED_URLS = "sqlite:///PATH or postgresql://USER@HOST/DATABASE"

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------------------
# Names and URLs


def check_study_name(name: str) -> str:
    """Returns `name` if it is 1 to 128 of `A-Za-z0-9._-` without a leading dot.

    Raises:
        UserInputError: for anything else: a study's name must not lead out of its folder.
    """
    if not _STUDY_NAME.fullmatch(name):
        raise UserInputError(f"study name {name!r} is not allowed: 1 to 128 of A-Z a-z 0-9 . _ - without a leading dot")
    return name


def default_storage_url(runs_dir: Path, study: str) -> str:
    """The SQLite URL of `<runs_dir>/<study>/study.db`, absolute so that a worker may run in another folder."""
    path = (runs_dir / check_study_name(study) / "study.db").resolve()
    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)


def resolve_storage_url(explicit: str | None, runs_dir: Path, study: str) -> str:
    """The storage URL to use: `explicit`, else `YOLOSEARCH_STORAGE_URL`, else the SQLite file of the study.

    Args:
        explicit: what the command line says; None or empty for nothing.
        runs_dir: folder of all studies, used by the default only.
        study: name of the study.

    Returns:
        The URL with its password, a relative SQLite path made absolute. Show it through `mask_url` only.

    Raises:
        UserInputError: naming where the URL came from, its masked value and what is allowed.
    """
    if explicit:
        return _checked_url(explicit, "storage URL").render_as_string(hide_password=False)
    if from_environment := os.environ.get(STORAGE_URL_VARIABLE):
        return _checked_url(from_environment, STORAGE_URL_VARIABLE).render_as_string(hide_password=False)
    return default_storage_url(runs_dir, study)


def mask_url(url: str | URL) -> str:
    """`url` (or any text that holds URLs or `password=...`) with every password replaced by `***`."""
    text = url.render_as_string(hide_password=False) if isinstance(url, URL) else str(url)
    try:
        parsed = None if _is_running_text(text) else make_url(text)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None:
        text = _URL_PASSWORD.sub(r"\1***\2", text)
    else:
        # An "@" inside the password ends up in the host when parsed, so the pattern looks at what is left too.
        if parsed.password is not None:
            text = _URL_PASSWORD.sub(r"\1***\2", parsed.render_as_string(hide_password=True))
    return _SIGNATURE.sub(r"\1***", _KEY_PASSWORD.sub(r"\1=***", text))


def _is_running_text(text: str) -> bool:
    """Whether words follow, so that parsed as a URL it would be written back as one; a password may have spaces."""
    return any(character.isspace() for character in text.rpartition("@")[2])


def sqlite_path(url: str | URL) -> Path | None:
    """The file of a SQLite URL, None for another database."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database)


def _checked_url(url: str | URL, source: str) -> URL:
    """Parses `url`, resolves a relative SQLite path, and refuses what the service cannot use."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UserInputError(f"{source}: {mask_url(url)!r} is not a database URL; allowed: {_ALLOWED_URLS}") from None
    if parsed.drivername not in {"sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg"}:
        raise UserInputError(f"{source}: {parsed.drivername!r} in {mask_url(url)!r}; allowed: {_ALLOWED_URLS}")
    if parsed.get_backend_name() != "sqlite":
        return parsed
    database = parsed.database or ":memory:"
    if database == ":memory:" or database.startswith("file:") or parsed.host:
        raise UserInputError(
            f"{source}: {mask_url(url)!r} is no file that processes can share; allowed: sqlite:///relative.db or sqlite:////absolute.db"
        )
    return parsed.set(database=str(Path(database).resolve()))


# ---------------------------------------------------------------------------------------------------------------------
# Engines


def engine_options(url: str | URL, connections: int | None = None) -> dict[str, Any]:
    """Keyword arguments for `sqlalchemy.create_engine` (also Optuna's `engine_kwargs`) that suit the URL's database.

    PostgreSQL sessions are pinned to UTC, since Optuna stores naive timestamps, and a host that vanishes is noticed
    within half a minute instead of after the kernel's quarter of an hour. A transaction that is left alone for
    `HALTED_SECONDS` is ended by the server.

    Args:
        url: of the database.
        connections: how many a pool keeps open; by default one.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": SQLITE_BUSY_SECONDS}}
    given = parsed.query.get("options", "")
    options = given if isinstance(given, str) else " ".join(given)
    defaults: dict[str, Any] = {
        "connect_timeout": 10,
        "tcp_user_timeout": 30_000,
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "application_name": "yolosearch",
    }
    connect_args = {key: value for key, value in defaults.items() if key not in parsed.query}
    pinned = f"-c timezone=UTC -c idle_in_transaction_session_timeout={HALTED_SECONDS}s"
    # What the URL says comes last and wins, all but the time zone.
    connect_args["options"] = f"{pinned} {options} -c timezone=UTC".strip()
    pool = POOL if connections is None else {**POOL, "pool_size": connections}
    return {"connect_args": connect_args, "pool_pre_ping": True, "isolation_level": "READ COMMITTED", **pool}


def make_engine(url: str | URL, *, create: bool = True, pooled: bool = True) -> Engine:
    """An engine on `url`, ready for many processes.

    Args:
        url: SQLite or PostgreSQL; plain `postgresql://` means psycopg 3.
        create: whether a missing SQLite file (and its folder) may be created; PostgreSQL databases never are.
        pooled: False for an engine whose connections are closed when given back.

    Raises:
        UserInputError: a URL that cannot be used, or a driver that is not installed (naming the extra).
        DatabaseError: the SQLite file is missing and may not be created, or its folder cannot be.
    """
    parsed = _checked_url(url, "storage URL")
    path = sqlite_path(parsed)
    if path is not None:
        _prepare_sqlite_file(path, create)
    options = engine_options(parsed)
    if not pooled:
        options = {key: value for key, value in options.items() if key not in POOL} | {"poolclass": NullPool}
    try:
        engine = sa.create_engine(parsed, **options)
    except (ImportError, NoSuchModuleError) as error:
        raise UserInputError(
            f"{mask_url(parsed)} needs a driver that is not installed ({_first_line(error)}): "
            f"{install_extra('postgresql')}"
        ) from None
    if path is not None:
        configure_sqlite(engine)
    return engine


def _prepare_sqlite_file(path: Path, create: bool) -> None:
    if path.exists():
        return
    if not create:
        raise DatabaseError(f"{path}: no such database file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserInputError(
            f"{path.parent}: the folder cannot be created: {error.strerror}; allowed: a path in a writable folder"
        ) from None


def configure_sqlite(engine: Engine) -> None:
    """Makes SQLite safe for many processes: WAL, 60 s busy timeout, and every transaction starts with BEGIN IMMEDIATE.

    pysqlite would start a transaction only at the first write, so that two readers could both decide on what they read
    and then write (a double claim). Connections made earlier are closed. Nothing happens for another database.
    """
    if engine.dialect.name != "sqlite" or event.contains(engine, "begin", _begin_sqlite):
        return
    event.listen(engine, "connect", _connect_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    engine.dispose()


def _connect_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {int(SQLITE_BUSY_SECONDS * 1000)}")
    deadline = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        # The change to WAL does not wait for other connections by itself; it is made once in the life of the file.
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not _sqlite_is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.01, 0.1))


def _begin_sqlite(connection: Connection) -> None:
    kind = connection.get_execution_options().get("yolosearch_begin", "IMMEDIATE")
    connection.exec_driver_sql(f"BEGIN {kind}")


# ---------------------------------------------------------------------------------------------------------------------
# Conditions on commits

_condition = threading.local()


def watch_commits(engine: Engine) -> None:
    """Lets `committing` work on the transactions of an engine."""
    if not event.contains(engine, "commit", _check_condition):
        event.listen(engine, "commit", _check_condition)


@contextlib.contextmanager
def committing(check: Callable[[Connection], None]) -> Iterator[None]:
    """Inside, every transaction of this thread on a watched engine is committed only if `check` does not raise.

    `check` runs in that transaction and may lock rows, so that what it has seen still holds when the commit is done.
    What it raises rolls the transaction back.
    """
    _condition.check = check
    try:
        yield
    finally:
        _condition.check = None


def _check_condition(connection: Connection) -> None:
    check = getattr(_condition, "check", None)
    if check is not None:
        check(connection)


# ---------------------------------------------------------------------------------------------------------------------
# Errors and retries


def is_transient(error: BaseException) -> bool:
    """Whether a database error may go away by itself: lost connection, restart, deadlock, busy file."""
    if isinstance(error, sa.exc.TimeoutError):
        return True  # all connections of this process are busy
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    original = error.orig
    if isinstance(original, sqlite3.Error):
        return _sqlite_is_busy(original)
    if not isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        return False
    # 08 connection, 25P03 left alone for too long, 40 rollback (deadlock, serialisation), 53300 too many connections,
    # 57P restart;
    # a connection that cannot be made at all comes without a code.
    state = getattr(original, "sqlstate", None)
    return state is None or state.startswith(("08", "25P03", "40", "53300", "57P"))


def _sqlite_is_busy(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


def is_outage(error: BaseException) -> bool:
    """Whether waiting may help: a lost connection or the like is anywhere in the chain of errors.

    Optuna wraps the driver's error, raises another one while it handles it (its fallback queries use the broken
    session), or leaves a name unbound.
    """
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return any(is_transient(link) or _proxy_is_away(link) for link in chain)


def _proxy_is_away(error: BaseException) -> bool:
    """Whether Optuna's gRPC proxy does not answer, or has lost its own database."""
    code = getattr(error, "code", None)
    if not type(error).__module__.startswith("grpc") or not callable(code):
        return False
    name = getattr(code(), "name", "")
    details = str(getattr(error, "details", lambda: "")())
    # Optuna's StorageInternalError, which does not say what the driver said.
    lost = ("OperationalError", "An exception is raised during the commit")
    return name in {"UNAVAILABLE", "DEADLINE_EXCEEDED"} or (name == "UNKNOWN" and any(word in details for word in lost))


def retry(
    operation: Callable[[], T], patience: float, *, gives_up: Callable[[Exception, float], Exception] | None = None
) -> T:
    """Runs `operation` until it succeeds, fails for good, or `patience` seconds have passed.

    The pauses grow from 50 ms to 3 s with jitter, so that many workers do not return to a restarted server in step.
    `operation` may have committed although its answer was lost: it has to be idempotent.

    Args:
        operation: what to do.
        patience: seconds.
        gives_up: makes the error for an outage that lasted longer, from the last error and `patience`.

    Raises:
        The last error of `operation`, unchanged without `gives_up`.
    """
    deadline = time.monotonic() + patience
    pause = 0.05
    while True:
        try:
            return operation()
        except Exception as error:
            if not is_outage(error):
                raise
            if time.monotonic() + pause > deadline:
                if gives_up is None:
                    raise
                raise gives_up(error, patience) from error
        time.sleep(random.uniform(0.5, 1.0) * pause)
        pause = min(2 * pause, 3.0)


@contextlib.contextmanager
def database_errors(url: str | URL) -> Iterator[None]:
    """Turns a driver's error into one line of `DatabaseError` that names the masked URL.

    A violated constraint passes unchanged: only the caller can say what it means.
    """
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise DatabaseError(f"{mask_url(url)}: {_first_line(error.orig or error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return mask_url(lines[0].strip()) if lines else type(error).__name__


_HOPELESS = re.compile(
    # who may come in
    r"authentication failed|no password|no pg_hba\.conf entry|authentication method requirement"
    r"|is not permitted to log in|permission denied for database"
    # to what
    r'|(database|role) ".*" does not exist'
    # how
    r"|certificate|does not support SSL|GSSAPI encryption required"
    r'|invalid (port number|value for parameter|"?\w+"? value)|unrecognized configuration parameter'
    r'|definition of service ".*" not found'
)
"""In a refusal that waiting cannot mend: the server is there, or nobody was asked because the URL or libpq's variables
are wrong. A connection that cannot be made has no code to go by."""


def wait_until_ready(url: str | URL, timeout: float = 30.0) -> None:
    """Returns as soon as the database answers a query.

    Raises:
        DatabaseError: it did not within `timeout` seconds, or something is wrong that waiting cannot mend: the
            password, a certificate, the name of the database, a parameter of the URL.
    """
    engine = make_engine(url, pooled=False)
    deadline = time.monotonic() + timeout
    while True:
        try:
            with engine.connect().execution_options(**READ_ONLY) as connection:
                connection.execute(sa.text("SELECT 1"))
            return
        except DBAPIError as error:
            reason = _first_line(error.orig or error)
            if not is_transient(error) or _HOPELESS.search(reason):
                raise DatabaseError(f"{mask_url(url)}: {reason}") from None
            if time.monotonic() >= deadline:
                raise DatabaseError(f"{mask_url(url)} did not answer within {timeout:g} s: {reason}") from None
        time.sleep(random.uniform(0.2, 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# Who owns the schema


SchemaOwner = Literal["empty", "yolosearch", "mlflow", "other"]
_MLFLOW_TABLES = {"experiments", "runs"}
_OPTUNA_TABLES = {"studies", "trials", "version_info"}


def schema_owner(engine: Engine) -> SchemaOwner:
    """Whose tables the database (on PostgreSQL: the schema that new tables go to) holds; writes nothing.

    Optuna's tables count as ours. "other" is a database whose `alembic_version` belongs to neither Optuna nor MLflow.
    """
    with engine.connect().execution_options(**READ_ONLY) as connection:
        tables = set(sa.inspect(connection).get_table_names())
    if tables >= _MLFLOW_TABLES:
        return "mlflow"
    if tables >= _OPTUNA_TABLES or any(table.startswith("yolosearch_") for table in tables):
        return "yolosearch"
    return "other" if "alembic_version" in tables else "empty"


def same_schema(one: str | URL, other: str | URL) -> bool:
    """Whether two URLs lead to one SQLite file, or to one schema of one PostgreSQL database under whatever names.

    Raises:
        DatabaseError: a PostgreSQL server cannot be asked.
    """
    backends = {make_url(url).get_backend_name() for url in (one, other)}
    if backends == {"sqlite"}:
        paths = [path.resolve() for url in (one, other) if (path := sqlite_path(url)) is not None]
        return len(paths) == 2 and paths[0] == paths[1]
    return backends == {"postgresql"} and _postgresql_schema(one) == _postgresql_schema(other)


def _postgresql_schema(url: str | URL) -> tuple[object, ...]:
    """The cluster's own number, the database and the schema that new tables go to."""
    engine = make_engine(make_url(url).set(drivername="postgresql"), pooled=False)
    query = "SELECT system_identifier, current_database(), current_schema() FROM pg_control_system()"
    with database_errors(url), engine.connect() as connection:
        return tuple(connection.execute(sa.text(query)).one())


def refuse_foreign_schema(engine: Engine) -> None:
    """Call before the first table is made.

    Raises:
        ForeignSchemaError: the schema belongs to MLflow or to another Alembic application; nothing was written.
    """
    with database_errors(engine.url):
        owner = schema_owner(engine)
    if owner in {"empty", "yolosearch"}:
        return
    holder = "MLflow" if owner == "mlflow" else "another application (it has an alembic_version table)"
    remedy = (
        "use another file"
        if engine.dialect.name == "sqlite"
        else "use another database, or another schema by ?options=-csearch_path%3DSCHEMA"
    )
    raise ForeignSchemaError(f"{mask_url(engine.url)} belongs to {holder}, nothing was written: {remedy}")


# ---------------------------------------------------------------------------------------------------------------------
# Locks between processes

_held_locks = threading.local()


@contextlib.contextmanager
def init_lock(url: str | URL, timeout: float = INIT_LOCK_SECONDS) -> Iterator[None]:
    """Held while tables are made, so that of many processes started at once each finds a complete schema."""
    with named_lock(url, "init", timeout):
        yield


@contextlib.contextmanager
def named_lock(url: str | URL, name: str, timeout: float) -> Iterator[None]:
    """An exclusive lock between all users of a database, freed when its holder exits or dies.

    PostgreSQL: an advisory lock on a connection of its own. SQLite: `flock` on `<file>.<name>.lock`, which stays.
    A thread that holds it already passes through.

    Raises:
        DatabaseError: somebody else held it for all of `timeout` seconds, or the database cannot be reached.
    """
    key = (make_url(url).render_as_string(hide_password=True), name)
    mine: set[tuple[str, str]] = _held_locks.__dict__.setdefault("keys", set())
    if key in mine:
        yield
        return
    path = sqlite_path(url)
    with _advisory_lock(url, name, timeout) if path is None else _file_lock(path, name, timeout):
        mine.add(key)
        try:
            yield
        finally:
            mine.remove(key)


@contextlib.contextmanager
def _file_lock(path: Path, name: str, timeout: float) -> Iterator[None]:
    lock_path = path.with_name(f"{path.name}.{name}.lock")
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        handle = lock_path.open("a")
    except OSError as error:
        raise DatabaseError(f"{lock_path}: the lock file cannot be written: {error.strerror}") from None
    with handle:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DatabaseError(f"{lock_path}: another process held the lock for {timeout:g} s") from None
                time.sleep(random.uniform(0.005, 0.03))
        yield


@contextlib.contextmanager
def _advisory_lock(url: str | URL, name: str, timeout: float) -> Iterator[None]:
    engine = make_engine(url, pooled=False)
    key = int.from_bytes(hashlib.sha256(f"yolosearch:{name}".encode()).digest()[:8], "big", signed=True)
    try:
        with database_errors(url):
            connection = retry(lambda: _connect_and_lock(engine, key, timeout), patience=timeout)
    except DatabaseError as error:
        if getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) == "55P03":
            message = f"{mask_url(url)}: another process held the lock {name!r} for {timeout:g} s"
            raise DatabaseError(message) from None
        raise
    try:
        yield
    finally:
        # A connection that broke has freed the lock already; the caller's own writes have their own guards.
        with contextlib.suppress(DBAPIError):
            connection.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": key})
        connection.close()


def _connect_and_lock(engine: Engine, key: int, timeout: float) -> Connection:
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        connection.execute(sa.text(f"SET lock_timeout = {max(1, int(timeout * 1000))}"))
        connection.execute(sa.text("SELECT pg_advisory_lock(:key)"), {"key": key})
    except DBAPIError:
        connection.close()
        raise
    return connection
