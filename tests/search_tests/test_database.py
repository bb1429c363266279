import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from faulty import Postgres
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, OperationalError

from search.database import (
    READ_ONLY,
    STORAGE_URL_VARIABLE,
    check_study_name,
    configure_sqlite,
    database_errors,
    default_storage_url,
    init_lock,
    is_transient,
    make_engine,
    mask_url,
    named_lock,
    refuse_foreign_schema,
    resolve_storage_url,
    retry,
    schema_owner,
    sqlite_path,
    wait_until_ready,
)
from search.errors import DatabaseError, UserInputError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se@cret@h/db", "postgresql://u:***@h/db"),
        ("postgresql://u:se/cret@h:5432/db", "postgresql://u:***@h:5432/db"),
        ("postgresql://u:se cret@h/db", "postgresql://u:***@h/db"),
        ("postgresql+psycopg://u:s%40t@h/db?sslmode=require", "postgresql+psycopg://u:***@h/db?sslmode=require"),
        ("postgresql://u@h/db?password=secret&x=1", "postgresql://u@h/db?password=***&x=1"),
        ("cannot reach postgresql://u:secret@h/db: refused", "cannot reach postgresql://u:***@h/db: refused"),
        ("postgresql://u:secret@h/db?a=b is full: see x", "postgresql://u:***@h/db?a=b is full: see x"),
        ("sqlite:////tmp/x.db is full", "sqlite:////tmp/x.db is full"),
        ("host=h password=secret user=u", "host=h password=*** user=u"),
        ("host=h password='se cret' user=u", "host=h password=*** user=u"),
        ("postgresql://h:5432/db", "postgresql://h:5432/db"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
    ],
)
def test_mask_url_password_anywhere_is_hidden(url: str, shown: str) -> None:
    assert mask_url(url) == shown


@pytest.mark.parametrize("name", ["a", "quick-start_2.v1", "-x", "0", "a" * 128])
def test_check_study_name_allowed_returns_it(name: str) -> None:
    assert check_study_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a b", "ä", "a\n", "a" * 129])
def test_check_study_name_could_leave_the_folder_raises(name: str) -> None:
    with pytest.raises(UserInputError, match="is not allowed"):
        check_study_name(name)


def test_resolve_storage_url_precedence_is_explicit_environment_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(STORAGE_URL_VARIABLE, raising=False)
    assert resolve_storage_url(None, Path("runs"), "s") == f"sqlite:///{tmp_path}/runs/s/study.db"
    monkeypatch.setenv(STORAGE_URL_VARIABLE, "")
    assert resolve_storage_url("", Path("runs"), "s") == f"sqlite:///{tmp_path}/runs/s/study.db"
    monkeypatch.setenv(STORAGE_URL_VARIABLE, "postgresql://u:secret@h/db")
    assert resolve_storage_url(None, Path("runs"), "s") == "postgresql://u:secret@h/db"
    assert resolve_storage_url("sqlite:///x.db", Path("runs"), "s") == f"sqlite:///{tmp_path}/x.db"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("not a url", "not a url"),
        ("mysql://u:secret@h/db", "mysql"),
        ("postgres://u:secret@h/db", "postgres"),
        ("postgresql+asyncpg://u:secret@h/db", "postgresql\\+asyncpg"),
        ("sqlite://", "no file"),
        ("sqlite:///:memory:", "no file"),
        ("sqlite:///file:x?mode=memory&uri=true", "no file"),
    ],
)
def test_resolve_storage_url_unusable_raises_one_masked_line(
    url: str, named: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(STORAGE_URL_VARIABLE, url)
    with pytest.raises(UserInputError, match=named) as caught:
        resolve_storage_url(None, tmp_path, "s")
    message = str(caught.value)
    assert message.startswith(f"{STORAGE_URL_VARIABLE}: ")
    assert "allowed: sqlite:///" in message
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize("folder", ["my runs 100%", "a?b#c", "a%20b", "u:p@h", "übung"])
def test_default_storage_url_odd_folder_name_is_kept(folder: str, tmp_path: Path) -> None:
    assert sqlite_path(default_storage_url(tmp_path / folder, "s")) == tmp_path / folder / "s" / "study.db"


def test_make_engine_missing_driver_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "from search.database import make_engine\n"
        "from search.errors import UserInputError\n"
        "try: make_engine('postgresql://u:secret@h/db')\n"
        "except UserInputError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install '.[postgresql]'" in result.stdout
    assert result.stdout.startswith("postgresql://u:***@h/db ")
    assert len(result.stdout.splitlines()) == 1


def test_make_engine_missing_file_without_create_raises_and_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"runs/study\.db: no such database file"):
        make_engine(f"sqlite:///{tmp_path}/runs/study.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_make_engine_sqlite_uses_wal_and_begins_immediately(sqlite_url: str) -> None:
    engine = make_engine(sqlite_url)
    with engine.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000
        # A transaction that has read nothing yet excludes other writers already.
        other = sqlite3.connect(str(sqlite_path(sqlite_url)), timeout=0, isolation_level=None)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        with engine.connect().execution_options(**READ_ONLY) as reader:
            assert reader.execute(sa.text("SELECT 1")).scalar() == 1
        other.close()


def test_configure_sqlite_twice_listens_once_and_keeps_transactions(sqlite_url: str) -> None:
    engine = make_engine(sqlite_url)
    configure_sqlite(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE t (x INTEGER)"))
    with engine.connect() as connection:
        connection.execute(sa.text("INSERT INTO t VALUES (1)"))
        connection.rollback()
        connection.execute(sa.text("INSERT INTO t VALUES (2)"))
        connection.commit()
        assert connection.execute(sa.text("SELECT x FROM t")).scalars().all() == [2]


def test_make_engine_postgresql_session_is_utc_and_read_committed(postgres_url: str) -> None:
    engine = make_engine(postgres_url.replace("?", "?options=-csearch_path%3Dpg_catalog&"))
    assert engine.dialect.driver == "psycopg"
    with engine.connect() as connection:
        assert connection.execute(sa.text("SHOW timezone")).scalar() == "UTC"
        assert connection.execute(sa.text("SHOW transaction_isolation")).scalar() == "read committed"
        assert connection.execute(sa.text("SHOW search_path")).scalar() == "pg_catalog"
    engine.dispose()


def test_wait_until_ready_answers_on_both(storage_url: str) -> None:
    wait_until_ready(storage_url, timeout=10)


def test_wait_until_ready_nobody_there_raises_masked_line() -> None:
    with pytest.raises(DatabaseError, match=r"did not answer within 0\.3 s") as caught:
        wait_until_ready("postgresql://u:secret@127.0.0.1:9/db", timeout=0.3)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def guarded_role(postgres_url: str) -> Iterator[str]:
    """A role that may not enter the database of `postgres_url`."""
    name = make_url(postgres_url).database
    engine = make_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE ROLE {name}_out LOGIN"))
        connection.execute(sa.text(f"CREATE ROLE {name}_off NOLOGIN"))
        connection.execute(sa.text(f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC"))
    yield f"{name}_out"
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP ROLE {name}_out, {name}_off"))
    engine.dispose()


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"database": "nothing"}, {}, 'database "nothing" does not exist'),
        ({"username": "nobody"}, {}, 'role "nobody" does not exist'),
        ({"username": "{database}_off"}, {}, "is not permitted to log in"),
        ({"username": "{database}_out"}, {}, "permission denied for database"),
        ({}, {"sslmode": "sometimes"}, 'invalid sslmode value: "sometimes"'),
        ({}, {"target_session_attrs": "fast"}, 'invalid target_session_attrs value: "fast"'),
        ({}, {"ssl_min_protocol_version": "9"}, 'invalid "ssl_min_protocol_version" value: "9"'),
        ({}, {"require_auth": "md5"}, 'authentication method requirement "md5" failed'),
        ({}, {"options": "-c sped=1"}, 'unrecognized configuration parameter "sped"'),
        ({}, {"service": "none"}, 'definition of service "none" not found'),
        ({"host": "127.0.0.1", "port": 99999}, {}, 'invalid port number: "99999"'),
    ],
)
@pytest.mark.usefixtures("guarded_role")
def test_wait_until_ready_what_waiting_cannot_mend_is_told_at_once(
    postgres_url: str, changes: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    url = make_url(postgres_url)
    if "username" in changes:
        changes = {"username": changes["username"].format(database=url.database)}
    # The socket's folder is a parameter of the URL, and would win.
    wrong = url.set(**changes).difference_update_query(changes)
    began = time.monotonic()

    with pytest.raises(DatabaseError) as caught:
        wait_until_ready(wrong.update_query_dict(options), timeout=3600.0)

    assert time.monotonic() - began < 20
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wait_until_ready_wrong_password_is_told_at_once_and_a_restart_is_waited_for() -> None:
    server = Postgres()
    try:
        server.execute("CREATE ROLE me LOGIN PASSWORD 'r1ght'")
        rules = server.folder / "data" / "pg_hba.conf"
        rules.write_text(f"local all me scram-sha-256\n{rules.read_text()}")
        server.stop()
        server.start()
        right, wrong = (make_url(server.url).set(username="me", password=word) for word in ("r1ght", "wr0ng"))
        wait_until_ready(right, timeout=30.0)

        for url, reason in ((wrong, "authentication failed"), (right.set(password=""), "no password")):
            with pytest.raises(DatabaseError, match=reason) as caught:
                wait_until_ready(url, timeout=3600.0)
            assert "wr0ng" not in str(caught.value)

        server.stop()
        starter = threading.Timer(1.0, server.start)
        starter.start()
        wait_until_ready(right, timeout=120.0)
        starter.join()
    finally:
        server.stop("immediate")


def test_wait_until_ready_file_is_no_database_raises(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("this is a text file, long enough to be read as a header\n" * 40)
    with pytest.raises(DatabaseError, match="not a database"):
        wait_until_ready(f"sqlite:///{tmp_path}/study.db")


def test_retry_busy_file_tries_until_it_is_free(sqlite_url: str) -> None:
    impatient = sa.create_engine(sqlite_url, connect_args={"timeout": 0})
    holder = sqlite3.connect(str(sqlite_path(sqlite_url)), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    tries = 0

    def write() -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            holder.rollback()
        with impatient.begin() as connection:
            connection.execute(sa.text("CREATE TABLE t (x INTEGER)"))

    retry(write, patience=20)
    assert tries == 3
    holder.close()


def test_retry_file_that_stays_busy_raises_after_patience(sqlite_url: str) -> None:
    impatient = sa.create_engine(sqlite_url, connect_args={"timeout": 0})
    holder = sqlite3.connect(str(sqlite_path(sqlite_url)), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")

    def write() -> None:
        with impatient.begin() as connection:
            connection.execute(sa.text("CREATE TABLE t (x INTEGER)"))

    with pytest.raises(OperationalError, match="locked"):
        retry(write, patience=0.2)
    holder.close()


def test_retry_connection_killed_in_transaction_runs_again(postgres_url: str) -> None:
    engine = make_engine(postgres_url)
    backends = []

    def work() -> int:
        with engine.begin() as connection:
            backends.append(connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one())
            if len(backends) == 1:
                with engine.connect() as killer:
                    killer.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": backends[0]})
            return connection.execute(sa.text("SELECT 7")).scalar_one()

    assert retry(work, patience=20) == 7
    assert len(set(backends)) == len(backends) == 2
    engine.dispose()


def test_is_transient_syntax_error_and_violated_constraint_are_not(storage_url: str) -> None:
    engine = make_engine(storage_url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE t (x INTEGER PRIMARY KEY)"))
        connection.execute(sa.text("INSERT INTO t VALUES (1)"))
    with pytest.raises(sa.exc.DBAPIError) as missing, engine.begin() as connection:
        connection.execute(sa.text("SELECT * FROM no_such_table"))
    assert not is_transient(missing.value)
    with pytest.raises(IntegrityError) as twice, database_errors(engine.url), engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO t VALUES (1)"))
    assert not is_transient(twice.value)
    engine.dispose()


def test_database_errors_one_masked_line(sqlite_url: str) -> None:
    engine = make_engine(sqlite_url)
    with (
        pytest.raises(DatabaseError, match="no such table: t") as caught,
        database_errors("postgresql://u:secret@h/d"),
        engine.connect() as connection,
    ):
        connection.execute(sa.text("SELECT * FROM t"))
    assert str(caught.value) == "postgresql://u:***@h/d: no such table: t"


def test_schema_owner_knows_empty_optuna_and_other(storage_url: str) -> None:
    engine = make_engine(storage_url)
    assert schema_owner(engine) == "empty"
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
    assert schema_owner(engine) == "other"
    with pytest.raises(DatabaseError, match="another application"):
        refuse_foreign_schema(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE alembic_version"))
    optuna.storages.RDBStorage(engine.url.render_as_string(hide_password=False)).engine.dispose()
    assert schema_owner(engine) == "yolosearch"
    refuse_foreign_schema(engine)
    engine.dispose()


def _lock_error(url: str, name: str) -> str:
    with pytest.raises(DatabaseError) as caught, named_lock(url, name, timeout=0.3):
        pass
    return str(caught.value)


def test_named_lock_held_by_the_same_thread_passes_through_and_is_kept(storage_url: str) -> None:
    with named_lock(storage_url, "x", timeout=5):
        with named_lock(storage_url, "x", timeout=0.3):
            pass
        with ThreadPoolExecutor(1) as elsewhere:
            assert "held the lock" in elsewhere.submit(_lock_error, storage_url, "x").result()


def test_named_lock_held_elsewhere_raises_naming_it_and_other_names_are_free(storage_url: str) -> None:
    with named_lock(storage_url, "ask-s", timeout=5):
        with named_lock(storage_url, "ask-t", timeout=5):
            pass
        with ThreadPoolExecutor(1) as elsewhere:
            error = elsewhere.submit(_lock_error, storage_url, "ask-s").result()
        assert "another process held the lock" in error
        assert "ask-s" in error
    with named_lock(storage_url, "ask-s", timeout=5):
        pass


def test_named_lock_body_raises_frees_it(storage_url: str) -> None:
    with pytest.raises(KeyError), named_lock(storage_url, "x", timeout=5):
        raise KeyError
    with init_lock(storage_url, timeout=5), named_lock(storage_url, "x", timeout=5):
        pass


def test_named_lock_threads_exclude_each_other(storage_url: str) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(3):
            with named_lock(storage_url, "x", timeout=30):
                inside += 1
                most = max(most, inside)
                threading.Event().wait(0.005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_named_lock_holder_killed_frees_it(storage_url: str) -> None:
    program = (
        "import sys, time\n"
        "from search.database import named_lock\n"
        "with named_lock(sys.argv[1], 'ask-s', timeout=20):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, storage_url], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DatabaseError), named_lock(storage_url, "ask-s", timeout=0.2):
            pass
        holder.send_signal(signal.SIGKILL)
        with named_lock(storage_url, "ask-s", timeout=20):
            pass
    assert holder.returncode == -signal.SIGKILL
