"""Trials for tickets while another process is halted in the middle of asking."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from search.config import parse_study
from search.database import HALTED_SECONDS, make_engine
from search.errors import LeaseLostError
from search.ledger import Ledger, StudyRecord, Ticket, TicketState
from search.study import create_study, load_study, open_storage
from search.worker.linking import link_trial

CONFIG = parse_study(
    {"name": "s", "data": "builtin:digits", "space": {"box": {"low": 0.02, "high": 0.2}}, "trials": 6},
    source="study.yaml",
)
LEASE_LOST = 3


def halt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


class HaltsBeforeTheLink(Ledger):
    """The trial is there, and the ticket does not know it yet."""

    def link_trial(self, ticket: Ticket, trial_id: int, trial_number: int, params: Mapping[str, Any]) -> Ticket:
        halt()
        return super().link_trial(ticket, trial_id, trial_number, params)


class HaltsWhileItAsks(Ledger):
    """Nothing is there yet: the sampler is at work."""

    def owned_trial_ids(self, ticket: Ticket, running: Mapping[int, int | None]) -> set[int]:
        owned = super().owned_trial_ids(ticket, running)
        halt()
        return owned


class HaltsInTheTransaction(Ledger):
    """Optuna's row of the study is locked, the trial is written and not committed."""

    halted = False

    def condition(self, ticket: Ticket) -> Callable[[Any], None]:  # type: ignore[override]
        check = super().condition(ticket)

        def halt_once(connection: Any) -> None:
            check(connection)
            if not self.halted:
                self.halted = True
                halt()

        return halt_once


def ask_and_halt(kind: type[Ledger], url: str, lease_seconds: float) -> None:
    ledger = kind(make_engine(url))
    study = load_study(CONFIG, open_storage(url))
    (ticket,) = ledger.claim("s", "halted", 1, lease_seconds)
    try:
        link_trial(ledger, study, CONFIG, ticket)
    except LeaseLostError:
        os._exit(LEASE_LOST)


@contextmanager
def halted(kind: type[Ledger], url: str, lease_seconds: float) -> Iterator[BaseProcess]:
    process = multiprocessing.get_context("spawn").Process(target=ask_and_halt, args=(kind, url, lease_seconds))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not is_halted(process):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.join()


def is_halted(process: BaseProcess) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def go_on(process: BaseProcess) -> int | None:
    """The exit code of a process that was halted."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGCONT)
    process.join(120)
    return process.exitcode


def new_study(url: str) -> Ledger:
    """A study whose base is at work elsewhere, with 5 tickets to ask for."""
    ledger = Ledger(make_engine(url))
    ledger.initialise()
    base = create_study(CONFIG, open_storage(url))
    record = StudyRecord(name="s", config=CONFIG.to_json(), fingerprint="f", versions={}, created=1.0)
    ledger.create_study(record, [None] * 6, base)
    assert ledger.claim("s", "base", 1, 600)
    return ledger


def ask_all(ledger: Ledger, url: str) -> list[int | None]:
    """Numbers of the trials of all tickets that are free now."""
    study = load_study(CONFIG, open_storage(url))
    return [link_trial(ledger, study, CONFIG, ticket).trial_number for ticket in ledger.claim("s", "next", 9, 600)]


def assert_one_to_one(ledger: Ledger, url: str) -> None:
    trials = load_study(CONFIG, open_storage(url)).trials
    assert [trial.state for trial in trials] == [TrialState.RUNNING] * 6
    tickets = ledger.tickets("s")
    assert sorted(ticket.trial_number or 0 for ticket in tickets) == list(range(6))
    params = {trial.number: trial.params for trial in trials}
    assert all(ticket.params == params[ticket.trial_number or 0] for ticket in tickets)


@pytest.mark.parametrize("kind", [HaltsBeforeTheLink, HaltsWhileItAsks])
def test_link_trial_others_ask_on_while_one_is_halted_and_its_ticket_is_taken_over(
    storage_url: str, kind: type[Ledger]
) -> None:
    ledger = new_study(storage_url)
    with halted(kind, storage_url, lease_seconds=0.0) as process:
        # The halted one's lease is over, so its ticket is among the five; its trial is adopted if it made one.
        assert sorted(number or 0 for number in ask_all(ledger, storage_url)) == [1, 2, 3, 4, 5]
        assert is_halted(process)
        assert go_on(process) == LEASE_LOST
    assert_one_to_one(ledger, storage_url)


@pytest.mark.faults
def test_link_trial_halted_in_its_transaction_postgresql_frees_the_others(postgres_url: str) -> None:
    ledger = new_study(postgres_url)
    asked: list[list[int | None]] = []
    with halted(HaltsInTheTransaction, postgres_url, lease_seconds=600.0) as process:
        began = time.monotonic()
        others = threading.Thread(target=lambda: asked.append(ask_all(ledger, postgres_url)), daemon=True)
        others.start()
        others.join(2 * HALTED_SECONDS)
        print(f"others asked on after {time.monotonic() - began:.1f} s")
        assert asked == [[1, 2, 3, 4]]
        assert is_halted(process)
        # Its lease still holds: what the server threw away is made again.
        assert go_on(process) == 0
    assert_one_to_one(ledger, postgres_url)
    assert ledger.open_counts("s")[TicketState.RUNNING] == 6


def make_commits_slow(url: str, table: str, event: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        body = "BEGIN PERFORM pg_sleep(1.5); RETURN NULL; END"
        connection.execute(f"CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS '{body}'")
        deferred = "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()"
        connection.execute(f"CREATE CONSTRAINT TRIGGER slow AFTER {event} ON {table} {deferred}")


def cut_first_commit(engine: sa.Engine, having: str) -> list[str]:
    """Loses the connection while the server is at work on the commit of a transaction with such a statement."""
    cuts: list[str] = []

    def note(connection: sa.Connection, _cursor: Any, statement: str, *_: Any) -> None:
        connection.info["wanted"] = connection.info.get("wanted") or statement.startswith(having)

    def cut(connection: sa.Connection) -> None:
        if connection.info.pop("wanted", False) and not cuts:
            cuts.append(having)
            line = socket.socket(fileno=os.dup(connection.connection.dbapi_connection.fileno()))  # type: ignore[union-attr]
            threading.Timer(0.3, lambda: line.shutdown(socket.SHUT_RDWR)).start()

    sa.event.listen(engine, "before_cursor_execute", note)
    sa.event.listen(engine, "commit", cut)
    return cuts


def test_link_trial_connection_lost_while_the_server_commits_makes_no_second_trial(postgres_url: str) -> None:
    ledger = new_study(postgres_url)
    make_commits_slow(postgres_url, "trials", "INSERT")
    storage = open_storage(postgres_url)
    cuts = cut_first_commit(storage.engine, "INSERT INTO trials ")
    (ticket,) = ledger.claim("s", "next", 1, 600)

    linked = link_trial(ledger, load_study(CONFIG, storage), CONFIG, ticket)

    assert cuts
    trials = load_study(CONFIG, open_storage(postgres_url)).trials
    assert [trial.number for trial in trials] == [0, linked.trial_number] == [0, 1]


def test_finish_connection_lost_while_the_server_commits_is_not_a_lost_lease(postgres_url: str) -> None:
    ledger = new_study(postgres_url)
    (ticket,) = ledger.claim("s", "next", 1, 600)
    make_commits_slow(postgres_url, "yolosearch_ticket", "UPDATE")
    engine = make_engine(postgres_url)
    cuts = cut_first_commit(engine, "UPDATE yolosearch_ticket ")

    ended = Ledger(engine).finish(ticket, TicketState.COMPLETE, 0.5, None)

    assert cuts
    assert (ended.state, ended.value) == (TicketState.COMPLETE, 0.5)
