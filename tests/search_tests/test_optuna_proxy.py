"""Workers whose Optuna goes through a gRPC proxy of its own process."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from optuna.storages import GrpcStorageProxy
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from tiny import ENVIRONMENT, make_study

from search.config import parse_study
from search.errors import DatabaseError, UserInputError
from search.ledger import TicketState
from search.study import (
    GRPC_VARIABLE,
    ask,
    create_study,
    load_study,
    mirror_reports,
    open_storage,
    open_worker_storage,
    should_prune,
    tell,
)

pytest.importorskip("grpc", reason="needs the extra grpc")

CONFIG = parse_study(
    {
        "name": "s",
        "data": "builtin:digits",
        "train": {"epochs": 4},
        "space": {"box": {"low": 0.02, "high": 0.2}},
        "pruner": {"name": "median", "n_startup_trials": 1, "min_epochs": 1},
        "trials": 6,
    },
    source="study.yaml",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def proxy(url: str, port: int) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "search.optuna_proxy", "--port", str(port), "--threads", "4"]
    environment = {**os.environ, **ENVIRONMENT, "YOLOSEARCH_STORAGE_URL": url}
    process = subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving Optuna's part of ")
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


class Row:
    epoch = 0
    value: float | None = 0.1


def test_study_through_the_proxy_asks_prunes_and_tells_also_after_its_restart(
    storage_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_study(CONFIG, open_storage(storage_url))
    port = free_port()
    monkeypatch.setenv(GRPC_VARIABLE, f"127.0.0.1:{port}")
    with proxy(storage_url, port):
        storage = open_worker_storage(storage_url)
        assert isinstance(storage, GrpcStorageProxy)
        study = load_study(CONFIG, storage)
        base = study.trials[0]
        Row.value = 0.9
        mirror_reports(study, base._trial_id, [Row()])
        tell(study, base._trial_id, "COMPLETE", 0.9)
        asked = ask(study, CONFIG, 1, linked=())
        assert (asked.number, study.trials[1].params) == (1, asked.params)
        assert ask(study, CONFIG, 1, linked=()) == asked

    Row.value = 0.1
    reporting = threading.Thread(target=mirror_reports, args=(study, asked.trial_id, [Row()]))
    reporting.start()  # nobody answers now
    time.sleep(1)
    with proxy(storage_url, port):
        reporting.join(60)
        assert should_prune(study, CONFIG, asked.trial_id, 1)
        tell(study, asked.trial_id, "PRUNED")

    direct = load_study(CONFIG, open_storage(storage_url)).trials
    assert [(trial.state, trial.value) for trial in direct] == [(TrialState.COMPLETE, 0.9), (TrialState.PRUNED, 0.1)]


def test_run_worker_through_the_proxy_leases_in_the_database_and_ends_the_study(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    study = make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), postgres_url)
    study.create()
    port = free_port()
    with proxy(postgres_url, port):
        monkeypatch.setenv(GRPC_VARIABLE, f"127.0.0.1:{port}")
        assert study.work() == 3

    assert study.states() == [TicketState.COMPLETE] * 3
    trials = study.optuna_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert [trial.value for trial in trials] == [ticket.value for ticket in study.tickets()]


def test_report_through_the_proxy_waits_for_the_proxys_database(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = create_study(CONFIG, open_storage(postgres_url))
    name = str(make_url(postgres_url).database)
    port = free_port()
    monkeypatch.setenv(GRPC_VARIABLE, f"127.0.0.1:{port}")
    server = make_url(postgres_url).set(database="postgres").render_as_string(hide_password=False)
    with proxy(postgres_url, port), psycopg.connect(server, autocommit=True) as connection:
        study = load_study(CONFIG, open_worker_storage(postgres_url))
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        Row.value = 0.3
        reporting = threading.Thread(target=mirror_reports, args=(study, base.trial_id, [Row()]))
        reporting.start()
        time.sleep(1)
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        reporting.join(60)

        assert study.trials[0].intermediate_values == {1: 0.3}


@pytest.mark.parametrize("address", ["nonsense", ":13000", "host:", "host:port"])
def test_open_worker_storage_malformed_address_is_refused(
    sqlite_url: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GRPC_VARIABLE, address)
    with pytest.raises(UserInputError, match=r"YOLOSEARCH_OPTUNA_GRPC: '.*'; allowed: HOST:PORT"):
        open_worker_storage(sqlite_url)


def test_open_worker_storage_nobody_answers_is_one_line(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRPC_VARIABLE, f"127.0.0.1:{free_port()}")
    monkeypatch.setattr("search.study.GRPC_SECONDS", 0.5)
    with pytest.raises(DatabaseError, match=r"nobody answers at 127\.0\.0\.1"):
        open_worker_storage(sqlite_url)
