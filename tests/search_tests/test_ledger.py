import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.pool import Pool
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError

from search.config import parse_study
from search.database import make_engine
from search.errors import (
    DatabaseError,
    LeaseLostError,
    StudyConflictError,
    StudyStoppedError,
    UnknownStudyError,
    UserInputError,
)
from search.ledger import MAX_STALLED, Ledger, StudyRecord, Ticket, TicketState, TrialTakenError, WorkerState
from search.ledger.tables import metadata, to_json_value
from search.study import ask, create_study, load_study, open_storage, orphans

RECORD = StudyRecord(
    name="s",
    config={"trials": 3, "space": {"box": [0.02, 0.2]}},
    fingerprint="f0",
    versions={"torch": "2"},
    created=5.0,
)
SAMPLED = parse_study(
    {
        "name": "s",
        "data": "builtin:digits",
        "space": {"box": {"low": 0.02, "high": 0.2}},
        "trials": 9,
        "sampler": "tpe",
    },
    source="study.yaml",
)
EXPIRED = -1.0
"""Lease seconds of a holder that is late at once."""
PROCESSES = 8


@pytest.fixture
def engine(storage_url: str) -> Iterator[Engine]:
    engine = make_engine(storage_url)
    yield engine
    engine.dispose()


@pytest.fixture
def empty(engine: Engine) -> Ledger:
    ledger = Ledger(engine)
    ledger.initialise()
    return ledger


@pytest.fixture
def ledger(empty: Ledger) -> Ledger:
    """A study `s` with 4 tickets, the first with fixed parameters."""
    assert empty.create_study(RECORD, [{"box": 0.05}, None, None, None])
    return empty


def claim_one(ledger: Ledger, worker: str = "w", lease: float = 60.0) -> Ticket:
    (ticket,) = ledger.claim("s", worker, 1, lease)
    return ticket


def numbers(tickets: Sequence[Ticket]) -> list[int]:
    return [ticket.number for ticket in tickets]


def spend(ledger: Ledger, *states: TicketState) -> None:
    for state in states:
        ledger.finish(claim_one(ledger), state, 0.5, None)


# -- studies ----------------------------------------------------------------------------------------------------------


def test_create_study_stores_record_and_gapless_waiting_tickets(ledger: Ledger) -> None:
    assert ledger.study("s") == RECORD
    tickets = ledger.tickets("s")
    assert numbers(tickets) == [0, 1, 2, 3]
    assert [ticket.fixed_params for ticket in tickets] == [{"box": 0.05}, None, None, None]
    assert {ticket.state for ticket in tickets} == {TicketState.WAITING}
    assert {(ticket.kind, ticket.attempt, ticket.epochs_done, ticket.mirrored) for ticket in tickets} == {
        ("search", 0, 0, False)
    }


def test_create_study_name_taken_returns_false_and_writes_nothing(ledger: Ledger) -> None:
    other = StudyRecord(name="s", config={}, fingerprint="f1", versions={}, created=6.0)
    assert not ledger.create_study(other, [None] * 9)
    assert ledger.study("s") == RECORD
    assert len(ledger.tickets("s")) == 4


def test_create_study_link0_gives_trial_to_ticket_zero(empty: Ledger) -> None:
    empty.create_study(RECORD, [{"box": 0.05}, None], (41, 0, {"box": 0.05}))
    first, second = empty.tickets("s")
    assert (first.trial_id, first.trial_number, first.params) == (41, 0, {"box": 0.05})
    assert (second.trial_id, second.params) == (None, None)


def test_create_study_name_leaves_folder_raises(empty: Ledger) -> None:
    with pytest.raises(UserInputError, match="is not allowed"):
        empty.create_study(StudyRecord(name="../s", config={}, fingerprint="", versions={}, created=0), [])


def test_study_unknown_raises_naming_the_others(ledger: Ledger) -> None:
    with pytest.raises(UnknownStudyError, match="no study 't' in this database; it has: s"):
        ledger.study("t")
    with pytest.raises(UnknownStudyError):
        ledger.claim("t", "w", 1, 60)
    with pytest.raises(UnknownStudyError):
        ledger.stop("t", "why")


def test_studies_oldest_first_and_summary_run_is_kept(ledger: Ledger) -> None:
    ledger.create_study(StudyRecord(name="a", config={}, fingerprint="", versions={}, created=9.0), [None])
    ledger.set_summary_run("s", "run1")
    assert [study.name for study in ledger.studies()] == ["s", "a"]
    assert ledger.study("s").summary_run_id == "run1"
    assert ledger.study("a").summary_run_id is None


def test_create_study_numbers_json_does_not_know_are_strict_json(empty: Ledger, engine: Engine) -> None:
    config = {"a": math.nan, "b": [math.inf, -math.inf], "c": np.float32(0.5), "d": np.int64(3), "e": None, "f": True}
    empty.create_study(StudyRecord(name="s", config=config, fingerprint="", versions={}, created=0.0), [])
    with engine.connect() as connection:
        text = connection.execute(sa.text("SELECT config FROM yolosearch_study")).scalar_one()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    stored = {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": 0.5, "d": 3, "e": None, "f": True}
    assert json.loads(text, parse_constant=refuse) == stored
    assert empty.study("s").config == stored


def test_to_json_value_object_raises() -> None:
    with pytest.raises(TypeError, match="cannot be stored as JSON"):
        to_json_value({"path": object()})


def test_add_tickets_numbers_stay_gapless(ledger: Ledger) -> None:
    ledger.add_tickets("s", 2)
    ledger.add_tickets("s", 1)
    assert numbers(ledger.tickets("s")) == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(UnknownStudyError):
        ledger.add_tickets("t", 1)


def test_add_tickets_other_kind_has_numbers_and_claims_of_its_own(ledger: Ledger) -> None:
    ledger.add_tickets("s", 2, kind="confirm")
    assert numbers(ledger.claim("s", "w", 9, 60, kind="confirm")) == [0, 1]
    assert numbers(ledger.claim("s", "w", 9, 60)) == [0, 1, 2, 3]


def test_stop_no_more_claims_until_resumed(ledger: Ledger) -> None:
    ledger.stop("s", "5 failures in a row")
    assert ledger.study("s").stop_reason == "5 failures in a row"
    with pytest.raises(StudyStoppedError, match="study 's' was stopped: 5 failures in a row"):
        ledger.claim("s", "w", 1, 60)
    ledger.stop("s", None)
    assert numbers(ledger.claim("s", "w", 1, 60)) == [0]


# -- claiming ---------------------------------------------------------------------------------------------------------


def test_claim_fresh_goes_by_number_and_sets_the_lease(ledger: Ledger) -> None:
    before = time.time()
    tickets = ledger.claim("s", "w", 3, 60)
    assert numbers(tickets) == [0, 1, 2]
    assert {(ticket.state, ticket.attempt, ticket.worker) for ticket in tickets} == {(TicketState.RUNNING, 1, "w")}
    assert all(before + 59 < (ticket.lease_expires or 0) < time.time() + 61 for ticket in tickets)
    assert all(before - 1 < (ticket.started or 0) < time.time() + 1 for ticket in tickets)
    assert numbers(ledger.claim("s", "v", 3, 60)) == [3]
    assert ledger.claim("s", "v", 3, 60) == ()


def test_claim_limit_zero_returns_nothing(ledger: Ledger) -> None:
    assert ledger.claim("s", "w", 0, 60) == ()


def test_claim_expired_lease_is_taken_over_with_its_trial(ledger: Ledger) -> None:
    old = claim_one(ledger, "w", EXPIRED)
    ledger.link_trial(old, 10, 0, {"box": 0.05})
    ledger.set_run(old, "run")
    ledger.save_progress(old, 2, "last.pt")
    new = claim_one(ledger, "v")
    assert (new.id, new.attempt, new.worker) == (old.id, 2, "v")
    assert (new.trial_id, new.trial_number, new.params, new.run_id) == (10, 0, {"box": 0.05}, "run")
    assert (new.epochs_done, new.checkpoint, new.stalled_attempts) == (2, "last.pt", 0)
    assert new.started == old.started
    assert new.history == ("attempt 1 on w: its lease expired (2 epochs done)",)


def test_claim_interrupted_tickets_first_then_number(ledger: Ledger) -> None:
    ledger.add_tickets("s", 4)
    tickets = ledger.claim("s", "w", 6, EXPIRED)
    for number, done in {1: 4, 2: 3, 4: 3, 5: 4}.items():
        ledger.save_progress(tickets[number], done, "c")
    ledger.hand_back([tickets[2], tickets[5]])  # the others' leases expire
    groups = [ledger.claim("s", "v", 3, 60) for _ in range(5)]
    assert [numbers(group) for group in groups] == [[1, 2, 4], [0, 3, 5], [6, 7], [], []]
    assert [ticket.epochs_done for ticket in groups[0]] == [4, 3, 3]


def test_claim_attempts_without_progress_end_in_fail_with_all_reasons(ledger: Ledger) -> None:
    for worker in ("a", "b", "c"):
        assert claim_one(ledger, worker, EXPIRED).number == 0
    assert numbers(ledger.claim("s", "d", 9, 60)) == [1, 2, 3]
    failed = ledger.tickets("s")[0]
    assert (failed.state, failed.attempt, failed.stalled_attempts) == (TicketState.FAIL, 3, MAX_STALLED)
    assert failed.reason == (
        "3 attempts without progress: attempt 1 on a: its lease expired (0 epochs done); "
        "attempt 2 on b: its lease expired (0 epochs done); attempt 3 on c: its lease expired (0 epochs done)"
    )
    assert failed.finished is not None
    assert ledger.counts("s")[TicketState.FAIL] == 1


def test_claim_progress_clears_stalled_attempts(ledger: Ledger) -> None:
    for done in range(1, 6):
        claim_one(ledger, "a", EXPIRED)
        ticket = claim_one(ledger, "b", EXPIRED)
        assert (ticket.number, ticket.stalled_attempts) == (0, 1)
        assert ledger.save_progress(ticket, done, "c").stalled_attempts == 0
    assert claim_one(ledger, "c").attempt == 11


def test_claim_last_chance_is_taken_alone(ledger: Ledger) -> None:
    for _ in range(MAX_STALLED - 1):
        assert numbers(ledger.claim("s", "w", 2, EXPIRED)) == [0, 1]
    assert [numbers(ledger.claim("s", "w", 4, 60)) for _ in range(4)] == [[0], [1], [2, 3], []]


def test_claim_joining_leaves_those_on_their_last_chance(ledger: Ledger) -> None:
    for _ in range(MAX_STALLED - 1):
        ledger.claim("s", "w", 2, EXPIRED)
    assert [numbers(ledger.claim("s", "w", 1, 60, joining=True)) for _ in range(3)] == [[2], [3], []]
    # Its lease expired as well, but it made progress: it may join others.
    third = ledger.claim("s", "v", 9, EXPIRED)[0]
    ledger.save_progress(third, 1, "c")
    assert numbers(ledger.claim("s", "u", 4, 60, joining=True)) == [third.number]
    assert numbers(ledger.claim("s", "u", 4, 60)) == [1]


def test_claim_accept_chooses_among_those_that_join(ledger: Ledger) -> None:
    assert ledger.parked("s") == 0
    one = ledger.link_trial(claim_one(ledger), 7, 0, {"mosaic": 1.0})
    ledger.hand_back([one])
    assert ledger.parked("s") == 1
    has_params = [ledger.claim("s", "w", 4, 60, joining=True, accept=lambda ticket: ticket.params is not None)]
    assert [numbers(group) for group in has_params] == [[0]]
    assert ledger.parked("s") == 0
    assert ledger.claim("s", "w", 4, 60, joining=True, accept=lambda ticket: ticket.params is not None) == ()
    assert numbers(ledger.claim("s", "w", 1, 60, joining=True, accept=lambda ticket: ticket.trial_id is None)) == [1]


@pytest.mark.slow
def test_claim_accept_among_more_tickets_than_a_statement_may_name_goes_by_number(ledger: Ledger) -> None:
    ledger.add_tickets("s", 70_000)  # PostgreSQL takes 65 535 values

    joined = ledger.claim("s", "w", 2, 60, joining=True, accept=lambda ticket: ticket.number >= 5)

    assert numbers(joined) == [5, 6]


def test_hand_back_is_not_charged_and_keeps_progress(ledger: Ledger) -> None:
    for attempt in range(1, 6):
        ticket = claim_one(ledger)
        assert (ticket.number, ticket.attempt, ticket.stalled_attempts, ticket.history) == (0, attempt, 0, ())
        assert ledger.hand_back([ticket]) == {ticket.id}
    stored = ledger.ticket(ticket.id)
    assert (stored.state, stored.worker, stored.lease_expires) == (TicketState.WAITING, None, None)
    assert ledger.hand_back([ticket]) == set()


def test_hand_back_lost_ticket_is_left_alone(ledger: Ledger) -> None:
    old = claim_one(ledger, "w", EXPIRED)
    other = ledger.claim("s", "w", 1, 60)
    new = other[0] if other[0].id == old.id else claim_one(ledger, "v")
    kept = claim_one(ledger)
    assert ledger.hand_back([old, kept]) == {kept.id}
    assert ledger.ticket(old.id) == new


def test_abandon_counts_as_crash_with_the_reason(ledger: Ledger) -> None:
    for reason in ("segmentation fault", "out of memory", "no progress for 600 s"):
        stored = ledger.abandon(claim_one(ledger), reason)
    assert stored.state is TicketState.FAIL
    assert stored.reason == (
        "3 attempts without progress: attempt 1 on w: segmentation fault (0 epochs done); "
        "attempt 2 on w: out of memory (0 epochs done); attempt 3 on w: no progress for 600 s (0 epochs done)"
    )
    assert claim_one(ledger).number == 1


def test_release_worker_frees_its_tickets_at_once_and_charges_them(ledger: Ledger) -> None:
    ledger.register_worker("w", "s", "host", 12, "cpu")
    mine = ledger.claim("s", "w", 2, 3600)
    other = ledger.claim("s", "v", 1, 3600)
    assert ledger.release_worker("w", "killed by signal 9") == 2
    assert ledger.release_worker("w", "killed by signal 9") == 0
    assert ledger.ticket(other[0].id) == other[0]
    again = ledger.claim("s", "u", 2, 60)
    assert [ticket.id for ticket in again] == [ticket.id for ticket in mine]
    assert again[0].stalled_attempts == 1
    assert again[0].history == ("attempt 1 on w: killed by signal 9 (0 epochs done)",)
    assert ledger.workers("s")[0].state is WorkerState.DEAD


def test_renew_returns_what_is_still_held(ledger: Ledger) -> None:
    lost = claim_one(ledger, "w", EXPIRED)
    taken = claim_one(ledger, "v")
    kept = claim_one(ledger, "w", EXPIRED)
    assert taken.id == lost.id
    assert ledger.renew("w", [lost.id, kept.id], 500) == {kept.id}
    assert ledger.ticket(kept.id).lease_expires == pytest.approx(time.time() + 500, abs=20)
    assert ledger.ticket(lost.id) == taken
    assert ledger.renew("w", [], 500) == set()


def test_renew_late_but_not_taken_over_keeps_the_ticket(ledger: Ledger) -> None:
    ticket = claim_one(ledger, "w", EXPIRED)
    assert ledger.renew("w", [ticket.id], 60) == {ticket.id}
    assert claim_one(ledger, "v").number == 1
    assert ledger.ticket(ticket.id).attempt == 1


# -- a holder's writes ------------------------------------------------------------------------------------------------


def test_record_epoch_first_commit_wins_over_attempts(ledger: Ledger) -> None:
    first = claim_one(ledger, "w", EXPIRED)
    row = ledger.record_epoch(first, 0, 0.25, {"map": 0.2}, 1000.5)
    assert (row.epoch, row.attempt, row.value, row.metrics, row.stored_at, row.prune) == (
        0, 1, 0.25, {"map": 0.2}, 1000.5, None,
    )  # fmt: skip
    second = claim_one(ledger, "v")
    assert ledger.record_epoch(second, 0, 0.99, {"map": 0.9}, 2000.0) == row
    later = ledger.record_epoch(second, 1, 0.5, {"map": 0.4}, 2001.0)
    assert ledger.reports(first.id) == (row, later)
    assert ledger.all_reports("s") == {first.id: (row, later)}


def test_record_epoch_not_finite_value_is_none_and_metrics_survive(ledger: Ledger) -> None:
    ticket = claim_one(ledger)
    row = ledger.record_epoch(ticket, 0, math.nan, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1}, 1.0)
    assert row.value is None
    assert math.isnan(row.metrics["a"])
    assert (row.metrics["b"], row.metrics["c"], row.metrics["d"]) == (math.inf, -math.inf, 1.0)
    assert ledger.record_epoch(ticket, 1, math.inf, {}, 1.0).value is None


def test_record_epoch_without_time_takes_the_database_clock(ledger: Ledger) -> None:
    row = ledger.record_epoch(claim_one(ledger), 0, 0.1, {})
    assert row.stored_at == pytest.approx(time.time(), abs=20)


def test_decide_first_decision_wins(ledger: Ledger) -> None:
    ticket = claim_one(ledger)
    ledger.record_epoch(ticket, 3, 0.1, {}, 1.0)
    assert ledger.decide(ticket, 3, True).prune is True
    assert ledger.decide(ticket, 3, False).prune is True
    assert ledger.reports(ticket.id)[0].prune is True
    with pytest.raises(LookupError, match="no report of epoch 4"):
        ledger.decide(ticket, 4, True)


def test_save_progress_lower_starts_over_and_then_counts_as_progress(ledger: Ledger) -> None:
    ledger.save_progress(claim_one(ledger, "w", EXPIRED), 5, "/w/last.pt")
    ticket = claim_one(ledger, "v", EXPIRED)
    ledger.save_progress(ticket, 0, None)
    ledger.save_progress(ticket, 1, "/v/last.pt")
    again = claim_one(ledger, "u")
    assert (again.epochs_done, again.checkpoint, again.stalled_attempts) == (1, "/v/last.pt", 0)


def test_link_trial_one_trial_per_ticket_and_one_ticket_per_trial(ledger: Ledger) -> None:
    one, two = ledger.claim("s", "w", 2, 60)
    assert ledger.link_trial(one, 10, 0, {"box": 0.1}).trial_id == 10
    assert ledger.link_trial(one, 10, 0, {"box": 0.1}).params == {"box": 0.1}
    with pytest.raises(DatabaseError, match="already owns trial id 10"):
        ledger.link_trial(one, 11, 1, {})
    with pytest.raises(DatabaseError, match="trial id 10 of study 's' belongs to another ticket"):
        ledger.link_trial(two, 10, 0, {})
    ledger.link_trial(two, 11, 1, {})
    assert [ticket.trial_id for ticket in ledger.tickets("s")][:2] == [10, 11]


@pytest.mark.parametrize("state", [TicketState.COMPLETE, TicketState.PRUNED, TicketState.FAIL])
def test_finish_spends_the_ticket_once(ledger: Ledger, state: TicketState) -> None:
    ticket = claim_one(ledger)
    done = ledger.finish(ticket, state, 0.75, "why", best_epoch=4)
    assert (done.state, done.value, done.reason, done.best_epoch) == (state, 0.75, "why", 4)
    assert (done.lease_expires, done.worker) == (None, "w")
    assert done.finished is not None
    assert ledger.finish(ticket, state, 0.1, "again") == done
    with pytest.raises(LeaseLostError):
        ledger.finish(ticket, TicketState.FAIL if state is not TicketState.FAIL else TicketState.PRUNED, None, None)
    assert ledger.ticket(ticket.id) == done
    assert numbers(ledger.claim("s", "w", 9, 60)) == [1, 2, 3]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_finish_complete_without_finite_value_raises(ledger: Ledger, value: float | None) -> None:
    ticket = claim_one(ledger)
    with pytest.raises(ValueError, match="COMPLETE needs a finite value"):
        ledger.finish(ticket, TicketState.COMPLETE, value, None)
    with pytest.raises(ValueError, match="does not finish"):
        ledger.finish(ticket, TicketState.RUNNING, 0.5, None)
    assert ledger.ticket(ticket.id).state is TicketState.RUNNING


WRITES: dict[str, Callable[[Ledger, Ticket], object]] = {
    "link_trial": lambda ledger, ticket: ledger.link_trial(ticket, 99, 9, {}),
    "record_epoch": lambda ledger, ticket: ledger.record_epoch(ticket, 7, 0.9, {"map": 1.0}),
    "decide": lambda ledger, ticket: ledger.decide(ticket, 0, True),
    "save_progress": lambda ledger, ticket: ledger.save_progress(ticket, 9, "stale"),
    "finish": lambda ledger, ticket: ledger.finish(ticket, TicketState.COMPLETE, 0.9, "stale"),
    "abandon": lambda ledger, ticket: ledger.abandon(ticket, "stale"),
}


@pytest.mark.parametrize("write", list(WRITES))
@pytest.mark.parametrize("fate", ["taken over", "handed back", "finished"])
def test_lost_lease_writes_nothing(ledger: Ledger, write: str, fate: str) -> None:
    stale = claim_one(ledger, "w", EXPIRED)
    ledger.record_epoch(stale, 0, 0.1, {}, 1.0)
    if fate == "taken over":
        assert claim_one(ledger, "v").id == stale.id
    elif fate == "handed back":
        ledger.hand_back([stale])
    else:
        ledger.finish(stale, TicketState.PRUNED, 0.1, "pruned")
    before = (ledger.tickets("s"), ledger.all_reports("s"))
    with pytest.raises(LeaseLostError, match="trial 0 of study 's': attempt 1 is over, nothing was written"):
        WRITES[write](ledger, stale)
    assert (ledger.tickets("s"), ledger.all_reports("s")) == before


def test_set_run_of_a_trial_that_has_ended_is_stored_but_not_after_a_later_attempt(ledger: Ledger) -> None:
    ended = claim_one(ledger, "v")
    stale = claim_one(ledger, "w", EXPIRED)
    assert claim_one(ledger, "u").id == stale.id
    ledger.finish(ended, TicketState.PRUNED, 0.1, "pruned")

    assert ledger.set_run(ended, "run").run_id == "run"
    with pytest.raises(LeaseLostError, match="attempt 1 is over, nothing was written"):
        ledger.set_run(stale, "stale")
    assert ledger.ticket(stale.id).run_id is None


def test_mark_mirrored_only_final_tickets(ledger: Ledger) -> None:
    one, two = ledger.claim("s", "w", 2, 60)
    ledger.finish(one, TicketState.FAIL, None, "boom")
    assert [ticket.id for ticket in ledger.unmirrored("s")] == [one.id]
    ledger.mark_mirrored(one.id)
    ledger.mark_mirrored(two.id)
    assert ledger.unmirrored("s") == ()
    assert [ticket.mirrored for ticket in ledger.tickets("s")] == [True, False, False, False]


# -- reading ----------------------------------------------------------------------------------------------------------


def test_counts_every_state_is_a_key(ledger: Ledger) -> None:
    spend(ledger, TicketState.COMPLETE, TicketState.PRUNED)
    claim_one(ledger)
    assert ledger.counts("s") == {
        TicketState.WAITING: 1,
        TicketState.RUNNING: 1,
        TicketState.COMPLETE: 1,
        TicketState.PRUNED: 1,
        TicketState.FAIL: 0,
    }


def test_sums_over_a_study_count_what_its_tickets_say(ledger: Ledger) -> None:
    first, second, third = ledger.claim("s", "a", 3, 600)
    ledger.save_progress(first, 2, "c")
    ledger.finish(first, TicketState.COMPLETE, 0.5, None)
    ledger.finish(second, TicketState.COMPLETE, 0.5, None)
    ledger.finish(third, TicketState.FAIL, None, "broke")
    ledger.mark_mirrored(second.id)
    fourth = claim_one(ledger, "b")

    assert ledger.open_counts("s") == {TicketState.WAITING: 0, TicketState.RUNNING: 1}
    assert ledger.progress("s") == 2 + 3
    assert ledger.best("s") == ledger.ticket(first.id)
    ended = ledger.ticket(first.id).finished or 0.0
    assert ledger.best_value("s", until=ended) == 0.5
    assert ledger.best_value("s", until=ended - 1) is None
    assert [ticket.reason for ticket in ledger.latest_failures("s", 5)] == ["broke"]
    assert (ledger.ended_by("a"), ledger.ended_by("b")) == (3, 0)
    assert [ticket.id for ticket in ledger.held_by(["a", "b"])] == [fourth.id]
    assert ledger.unsettled("s") == (first.id, third.id)
    ledger.set_run(fourth, "run")
    ledger.hand_back([fourth])
    assert ledger.unsettled("s") == (first.id, third.id, fourth.id)
    ledger.retry_tickets("s", {third.number: None})
    assert (ledger.budget("s"), len(ledger.tickets("s"))) == (4, 5)


def test_best_and_best_value_of_a_study_without_complete_trials_are_none(ledger: Ledger) -> None:
    assert (ledger.best("s"), ledger.best_value("s", until=1e12), ledger.latest_failures("s", 3)) == (None, None, ())


def test_owned_trial_ids_tells_who_may_still_link_from_who_cannot(ledger: Ledger) -> None:
    mine, other, linked, failed = ledger.claim("s", "a", 4, 600)
    ledger.link_trial(linked, 100, 3, {})
    ledger.finish(failed, TicketState.FAIL, None, "broke")
    running = {
        100: linked.number,
        101: linked.number,
        102: other.number,
        103: failed.number,
        104: mine.number,
        105: None,
    }

    # 101: its ticket has another trial; 103: its ticket is over; 104: our own; 105: nobody's.
    assert ledger.owned_trial_ids(mine, running) == {100, 102}
    ledger.hand_back([other])
    assert ledger.owned_trial_ids(mine, running) == {100, 102}
    ledger.hand_back([mine])
    with pytest.raises(LeaseLostError):
        ledger.owned_trial_ids(mine, running)
    assert ledger.claimed_trial_ids("s", running) == {100, 102, 104}


def test_orphans_trial_of_a_ticket_added_meanwhile_is_not_lost(empty: Ledger, storage_url: str) -> None:
    storage = open_storage(storage_url)
    empty.create_study(RECORD, [None], create_study(SAMPLED, storage))
    study = load_study(SAMPLED, storage)
    (base,) = empty.claim("s", "first", 1, 600)
    empty.finish(base, TicketState.FAIL, None, "broke")
    lost = ask(study, SAMPLED, 7, linked={base.trial_id or 0})
    # The first worker believes now that the study is over.
    empty.add_tickets("s", 1)
    (added,) = empty.claim("s", "second", 1, 600)
    ask(study, SAMPLED, added.number, linked={base.trial_id or 0, lost.trial_id})

    assert orphans(study, partial(empty.claimed_trial_ids, "s")) == (lost.trial_id,)


def test_ask_by_an_attempt_that_is_over_makes_no_trial(empty: Ledger, storage_url: str) -> None:
    storage = open_storage(storage_url)
    empty.create_study(RECORD, [None, None], create_study(SAMPLED, storage))
    study = load_study(SAMPLED, storage)
    _, stale = empty.claim("s", "stale", 2, EXPIRED)

    def taken_over(_running: object) -> set[int]:
        """Between the stale worker's last look and its trial."""
        assert len(empty.claim("s", "next", 2, 600)) == 2
        return {trial._trial_id for trial in study.trials}

    with pytest.raises(LeaseLostError):
        ask(study, SAMPLED, stale.number, taken_over, None, empty.condition(stale))

    assert [trial.number for trial in study.trials] == [0]
    ticket = empty.tickets("s")[1]
    assert ask(study, SAMPLED, 1, {study.trials[0]._trial_id}, None, empty.condition(ticket)).number == 1


def test_failures_in_a_row_counts_since_the_last_success_or_resume(ledger: Ledger) -> None:
    ledger.add_tickets("s", 4)
    assert ledger.failures_in_a_row("s") == 0
    spend(ledger, TicketState.FAIL, TicketState.FAIL)
    assert ledger.failures_in_a_row("s") == 2
    spend(ledger, TicketState.PRUNED)
    assert ledger.failures_in_a_row("s") == 0
    spend(ledger, TicketState.FAIL, TicketState.FAIL, TicketState.FAIL)
    assert ledger.failures_in_a_row("s") == 3
    ledger.stop("s", "3 failures in a row")
    assert ledger.failures_in_a_row("s") == 3
    ledger.stop("s", None)
    assert ledger.failures_in_a_row("s") == 0
    spend(ledger, TicketState.FAIL)
    assert ledger.failures_in_a_row("s") == 1


def test_ticket_unknown_raises(ledger: Ledger) -> None:
    with pytest.raises(LookupError, match="no ticket 99"):
        ledger.ticket(99)


def test_register_worker_heartbeat_and_retirement_show(ledger: Ledger) -> None:
    row = ledger.register_worker("w1", "s", "host", 12, "cuda:0")
    assert ledger.register_worker("w1", "s", "host", 12, "cuda:0").heartbeat >= row.heartbeat
    ledger.register_worker("w2", "s", "host", 13, "cpu")
    ledger.heartbeat("w1")
    ledger.retire_worker("w2")
    one, two = ledger.workers("s")
    assert (one.id, one.host, one.pid, one.device, one.state) == ("w1", "host", 12, "cuda:0", WorkerState.RUNNING)
    assert one.heartbeat >= one.started
    assert (two.id, two.state) == ("w2", WorkerState.EXITED)
    with pytest.raises(UnknownStudyError):
        ledger.register_worker("w3", "t", "host", 1, "cpu")


# -- lost answers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def lose_answer(engine: Engine) -> Callable[[], None]:
    """The next commit reaches the database, but its answer is lost with the connection."""

    def arm() -> None:
        event.listen(engine, "commit", commit)

    def commit(connection: Connection) -> None:
        event.remove(engine, "commit", commit)
        connection.connection.dbapi_connection.commit()  # type: ignore[union-attr]
        raise OperationalError("COMMIT", None, ConnectionResetError("lost"), connection_invalidated=True)

    return arm


def test_lost_answer_each_write_happens_once(ledger: Ledger, lose_answer: Callable[[], None]) -> None:
    lose_answer()
    assert ledger.create_study(StudyRecord(name="t", config={}, fingerprint="", versions={}, created=0.0), [None])
    lose_answer()
    ledger.add_tickets("s", 2)
    assert numbers(ledger.tickets("s")) == [0, 1, 2, 3, 4, 5]
    lose_answer()
    one, two, three = ledger.claim("s", "w", 3, 60)
    assert numbers([one, two, three]) == [0, 1, 2]
    assert {ticket.attempt for ticket in (one, two, three)} == {1}
    assert ledger.counts("s")[TicketState.RUNNING] == 3
    lose_answer()
    assert ledger.link_trial(one, 5, 0, {"box": 0.1}).trial_id == 5
    lose_answer()
    assert ledger.record_epoch(one, 0, 0.5, {"map": 0.5}, 1.0).value == 0.5
    lose_answer()
    assert ledger.decide(one, 0, True).prune is True
    lose_answer()
    assert ledger.finish(one, TicketState.PRUNED, 0.5, "pruned").state is TicketState.PRUNED
    lose_answer()
    ledger.hand_back([two])
    assert ledger.ticket(two.id).stalled_attempts == 0
    lose_answer()
    ledger.release_worker("w")
    assert ledger.ticket(three.id).stalled_attempts == 1
    assert ledger.counts("s")[TicketState.WAITING] == 5


def test_patience_spent_raises_masked_line(engine: Engine, ledger: Ledger) -> None:
    impatient = Ledger(engine, patience=0.0)

    def fail(connection: Connection) -> None:
        raise OperationalError("BEGIN", None, ConnectionResetError("lost"), connection_invalidated=True)

    event.listen(engine, "begin", fail)
    with pytest.raises(DatabaseError, match=r": lost$"):
        impatient.counts("s")
    event.remove(engine, "begin", fail)
    assert impatient.counts("s")[TicketState.WAITING] == 4


# -- housekeeping -----------------------------------------------------------------------------------------------------


def test_add_tickets_with_parameters_puts_them_on_the_first(ledger: Ledger) -> None:
    ledger.add_tickets("s", 3, fixed_params=[{"box": 0.1}, None])
    assert [ticket.fixed_params for ticket in ledger.tickets("s")[4:]] == [{"box": 0.1}, None, None]
    with pytest.raises(ValueError, match="2 sets of parameters for 1 tickets"):
        ledger.add_tickets("s", 1, fixed_params=[None, None])
    assert len(ledger.tickets("s")) == 7


def test_retry_tickets_adds_new_ones_and_leaves_the_failed(ledger: Ledger) -> None:
    spend(ledger, TicketState.FAIL, TicketState.COMPLETE, TicketState.FAIL)
    added = ledger.retry_tickets("s", {2: None, 0: {"box": 0.05}})
    assert [(ticket.number, ticket.retry_of, ticket.fixed_params) for ticket in added] == [
        (4, 2, None),
        (5, 0, {"box": 0.05}),
    ]
    assert {ticket.state for ticket in added} == {TicketState.WAITING}
    assert [ticket.state for ticket in ledger.tickets("s")[:3]] == [
        TicketState.FAIL,
        TicketState.COMPLETE,
        TicketState.FAIL,
    ]


def test_retry_tickets_of_a_stopped_study_lets_it_go_on_in_the_same_step(ledger: Ledger, engine: Engine) -> None:
    spend(ledger, TicketState.FAIL, TicketState.FAIL)
    ledger.stop("s", "2 trials in a row failed")
    with pytest.raises(UserInputError):
        ledger.retry_tickets("s", {0: None, 9: None})
    assert ledger.study("s").stop_reason == "2 trials in a row failed"
    commits: list[object] = []
    note = commits.append
    event.listen(engine, "commit", note)
    ledger.retry_tickets("s", {0: None, 1: None})
    event.remove(engine, "commit", note)
    assert len(commits) == 1
    assert (ledger.study("s").stop_reason, ledger.study("s").stop_kind) == (None, None)
    assert ledger.failures_in_a_row("s") == 0


@pytest.mark.parametrize(
    ("number", "problem"), [(0, "was retried already, as trial 4"), (1, "is COMPLETE"), (3, "is WAITING"), (9, "does")]
)
def test_retry_tickets_that_cannot_be_retried_raises_and_adds_none(ledger: Ledger, number: int, problem: str) -> None:
    spend(ledger, TicketState.FAIL, TicketState.COMPLETE, TicketState.FAIL)
    ledger.retry_tickets("s", {0: None})
    with pytest.raises(UserInputError, match=rf"study s: trial {number} {problem}"):
        ledger.retry_tickets("s", {2: None, number: None})
    assert len(ledger.tickets("s")) == 5


def test_retry_tickets_of_a_retry_is_allowed(ledger: Ledger) -> None:
    spend(ledger, TicketState.FAIL, TicketState.COMPLETE, TicketState.COMPLETE, TicketState.COMPLETE)
    ledger.retry_tickets("s", {0: None})
    spend(ledger, TicketState.FAIL)
    (again,) = ledger.retry_tickets("s", {4: None})
    assert (again.number, again.retry_of) == (5, 4)


def test_delete_study_takes_all_its_rows_and_no_others(ledger: Ledger, engine: Engine) -> None:
    ledger.create_study(StudyRecord(name="t", config={}, fingerprint="", versions={}, created=6.0), [None])
    for name in ("s", "t"):
        ledger.register_worker(f"w-{name}", name, "h", 1, "cpu")
        (ticket,) = ledger.claim(name, f"w-{name}", 1, EXPIRED)
        ledger.record_epoch(ticket, 0, 0.5, {"map": 0.5})
    ledger.delete_study("s")
    ledger.delete_study("s")
    assert [record.name for record in ledger.studies()] == ["t"]
    with engine.connect() as connection:
        for table, count in (("ticket", 1), ("epoch", 1), ("worker", 1)):
            assert connection.execute(sa.text(f"SELECT count(*) FROM yolosearch_{table}")).scalar() == count


def test_delete_study_with_a_live_lease_raises_unless_forced(ledger: Ledger) -> None:
    ticket = claim_one(ledger, "worker-7")
    for refuse in (ledger.refuse_if_running, ledger.delete_study):
        with pytest.raises(StudyConflictError, match=r"study s: 1 of its trials are running on worker-7 .*--force"):
            refuse("s")
    assert ledger.ticket(ticket.id) == ticket
    ledger.delete_study("s", force=True)
    assert ledger.studies() == ()
    with pytest.raises(LeaseLostError):
        ledger.record_epoch(ticket, 0, 0.5, {})


def test_refuse_if_running_ignores_an_expired_lease(ledger: Ledger) -> None:
    claim_one(ledger, lease=EXPIRED)
    ledger.refuse_if_running("s")


def test_state_counts_gives_every_study_its_states_and_best_value(ledger: Ledger) -> None:
    ledger.create_study(StudyRecord(name="t", config={}, fingerprint="", versions={}, created=6.0), [None])
    for value in (0.25, 0.75):
        ledger.finish(claim_one(ledger), TicketState.COMPLETE, value, None)
    found = [(entry.study, entry.state, entry.count, entry.best) for entry in ledger.state_counts()]
    assert found == [
        ("s", TicketState.COMPLETE, 2, 0.75),
        ("s", TicketState.WAITING, 2, None),
        ("t", TicketState.WAITING, 1, None),
    ]


# -- schema -----------------------------------------------------------------------------------------------------------


def test_initialise_makes_what_the_tables_say(empty: Ledger, engine: Engine) -> None:
    empty.initialise()
    empty.check_schema()
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
        tables = set(sa.inspect(connection).get_table_names())
    assert [(kind, table.name) for kind, table in differences] == [("remove_table", "yolosearch_alembic_version")]
    assert tables == {
        "yolosearch_alembic_version",
        "yolosearch_epoch",
        "yolosearch_fidelity",
        "yolosearch_study",
        "yolosearch_ticket",
        "yolosearch_worker",
    }


def test_initialise_newer_schema_raises_naming_it_and_writes_nothing(empty: Ledger, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE yolosearch_alembic_version SET version_num = '0999'"))
    for use in (empty.initialise, empty.check_schema):
        with pytest.raises(DatabaseError, match=r"schema 0999, made by a newer yolosearch; .* update yolosearch"):
            use()
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM yolosearch_alembic_version")).scalar() == "0999"


def test_initialise_version_table_lost_raises(empty: Ledger, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("DROP TABLE yolosearch_alembic_version"))
    with pytest.raises(DatabaseError, match=r"yolosearch_study.* but no yolosearch_alembic_version"):
        empty.initialise()


def test_check_schema_empty_database_raises_and_writes_nothing(engine: Engine) -> None:
    with pytest.raises(DatabaseError, match="holds no study yet"):
        Ledger(engine).check_schema()
    assert sa.inspect(engine).get_table_names() == []


def test_initialise_mlflow_schema_raises_and_writes_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in ("alembic_version", "experiments", "runs"):
            connection.execute(sa.text(f"CREATE TABLE {table} (x INTEGER)"))
    for use in (Ledger(engine).initialise, Ledger(engine).check_schema):
        with pytest.raises(DatabaseError, match="belongs to MLflow, nothing was written: use another"):
            use()
    assert sorted(sa.inspect(engine).get_table_names()) == ["alembic_version", "experiments", "runs"]


@pytest.mark.slow
def test_initialise_real_mlflow_database_raises_and_writes_nothing(storage_url: str, engine: Engine) -> None:
    from mlflow.store.db.utils import _initialize_tables

    _initialize_tables(sa.create_engine(storage_url))
    before = sorted(sa.inspect(engine).get_table_names())
    assert "experiments" in before
    with pytest.raises(DatabaseError, match="belongs to MLflow"):
        Ledger(engine).initialise()
    assert sorted(sa.inspect(engine).get_table_names()) == before


def test_initialise_beside_optuna_in_either_order_works(storage_url: str, engine: Engine) -> None:
    import optuna

    optuna.storages.RDBStorage(storage_url).engine.dispose()
    ledger = Ledger(engine)
    ledger.initialise()
    ledger.check_schema()
    assert {"studies", "yolosearch_study"} <= set(sa.inspect(engine).get_table_names())
    optuna.storages.RDBStorage(storage_url).engine.dispose()


# -- many processes ---------------------------------------------------------------------------------------------------

_barrier: Any = None


def _join(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    """Eight spawned processes; each task of a `map` over eight entries runs in another one, all at once."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES, initializer=_join, initargs=(context.Barrier(PROCESSES, timeout=60),)) as pool:
        yield pool


def _all_at_once(pool: Pool, task: Callable[[str, int], Any], url: str) -> list[Any]:
    return pool.starmap(task, [(url, index) for index in range(PROCESSES)], chunksize=1)


def _start_cold(url: str, index: int) -> tuple[bool, int]:
    _barrier.wait()
    engine = make_engine(url)
    ledger = Ledger(engine)
    ledger.initialise()
    created = ledger.create_study(RECORD, [None] * 5)
    total = len(ledger.tickets("s"))
    engine.dispose()
    return created, total


def _claim_all(url: str, index: int) -> list[tuple[int, int]]:
    engine = make_engine(url)
    ledger = Ledger(engine)
    claimed: list[tuple[int, int]] = []
    _barrier.wait()
    while tickets := ledger.claim("s", f"w{index}", 1 + index % 3, 600):
        claimed.extend((ticket.id, ticket.attempt) for ticket in tickets)
    engine.dispose()
    return claimed


def _add_five(url: str, index: int) -> None:
    engine = make_engine(url)
    _barrier.wait()
    Ledger(engine).add_tickets("s", 5)
    engine.dispose()


def _ask_at_once(url: str, index: int) -> int:
    """What a worker does with a ticket that has no trial, at the same time as all others; the trial's number."""
    engine = make_engine(url)
    ledger = Ledger(engine)
    study = load_study(SAMPLED, open_storage(url))
    _barrier.wait()
    ticket = claim_one(ledger, f"w{index}")
    while ticket.trial_id is None:
        trial = ask(
            study, SAMPLED, ticket.number, partial(ledger.owned_trial_ids, ticket), None, ledger.condition(ticket)
        )
        with suppress(TrialTakenError):
            ticket = ledger.link_trial(ticket, trial.trial_id, trial.number, trial.params)
    engine.dispose()
    return ticket.trial_number if ticket.trial_number is not None else -1


def test_cold_start_of_eight_processes_all_come_up_and_one_creates(storage_url: str, processes: Pool) -> None:
    results = _all_at_once(processes, _start_cold, storage_url)
    assert sorted(created for created, _ in results) == [False] * 7 + [True]
    assert {total for _, total in results} == {5}


def test_claim_eight_processes_sixty_tickets_none_twice(empty: Ledger, storage_url: str, processes: Pool) -> None:
    empty.create_study(RECORD, [None] * 60)
    ids = [ticket.id for ticket in empty.tickets("s")]
    claimed = [entry for entries in _all_at_once(processes, _claim_all, storage_url) for entry in entries]
    assert sorted(claimed) == [(ticket_id, 1) for ticket_id in ids]


def test_claim_racing_for_expired_leases_each_is_taken_over_once(
    empty: Ledger, storage_url: str, processes: Pool
) -> None:
    empty.create_study(RECORD, [None] * 10)
    expected = [ticket.id for ticket in empty.tickets("s")]
    for attempt in range(2, 7):
        late = empty.claim("s", "late", 10, EXPIRED) if attempt == 2 else empty.tickets("s")
        assert len(late) == 10
        if attempt > 2:
            for ticket in late:  # progress, so that no attempt is charged; then the lease runs out
                empty.save_progress(ticket, attempt, "c")
                empty.renew(ticket.worker or "", [ticket.id], EXPIRED)
        taken = [entry for entries in _all_at_once(processes, _claim_all, storage_url) for entry in entries]
        assert sorted(taken) == [(ticket_id, attempt) for ticket_id in expected]


def test_add_tickets_eight_processes_numbers_stay_gapless(ledger: Ledger, storage_url: str, processes: Pool) -> None:
    _all_at_once(processes, _add_five, storage_url)
    assert numbers(ledger.tickets("s")) == list(range(44))


def test_ask_eight_processes_at_once_each_links_a_trial_of_its_own(
    empty: Ledger, storage_url: str, processes: Pool
) -> None:
    storage = open_storage(storage_url)
    base = create_study(SAMPLED, storage)
    empty.create_study(RECORD, [None] * (PROCESSES + 1), base)
    study = load_study(SAMPLED, storage)
    first = claim_one(empty, "w")
    # What a worker left that died between asking and linking, for a ticket that has failed since: anybody may have it.
    lost = claim_one(empty, "dead")
    ask(study, SAMPLED, lost.number, {base.trial_id})
    empty.finish(lost, TicketState.FAIL, None, "died")
    empty.add_tickets("s", 1)

    numbers = _all_at_once(processes, _ask_at_once, storage_url)

    assert first.trial_id == base.trial_id
    assert sorted(numbers) == list(range(1, PROCESSES + 1))
    assert [trial.number for trial in study.trials] == list(range(PROCESSES + 1))


def test_initialise_upgrades_the_first_schema_and_keeps_its_rows(ledger: Ledger, engine: Engine) -> None:
    with engine.begin() as connection:
        for columns in ("study_kind_retry_of", "study_state_finished", "study_state_value"):
            connection.execute(sa.text(f"DROP INDEX ix_yolosearch_ticket_{columns}"))
        for column in ("retry_of", "fidelity_value", "promoted", "candidate", "seed", "epochs"):
            connection.execute(sa.text(f"ALTER TABLE yolosearch_ticket DROP COLUMN {column}"))
        connection.execute(sa.text("DROP TABLE yolosearch_fidelity"))
        connection.execute(sa.text("ALTER TABLE yolosearch_worker DROP COLUMN pack"))
        connection.execute(sa.text("ALTER TABLE yolosearch_ticket DROP COLUMN objective_values"))
        connection.execute(sa.text("ALTER TABLE yolosearch_study DROP COLUMN stop_kind"))
        connection.execute(sa.text("UPDATE yolosearch_alembic_version SET version_num = '0001'"))
    with pytest.raises(
        DatabaseError,
        match="ledger schema 0001 of an older yolosearch; `yolosearch create`, `run` or `worker` upgrades it",
    ):
        ledger.check_schema()
    ledger.initialise()
    ledger.check_schema()
    assert [(ticket.number, ticket.retry_of) for ticket in ledger.tickets("s")] == [(n, None) for n in range(4)]
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    assert [(kind, table.name) for kind, table in differences] == [("remove_table", "yolosearch_alembic_version")]
