"""What `watch` reads of a ledger."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ledger_rows import NAME, claim, complete, make_ledger, report, study_config

from search.ledger import Ledger, TicketState
from search.report import StudyRows
from search.snapshot import Snapshot, take_snapshot

CONFIG = study_config(trials=8)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return make_ledger(tmp_path, CONFIG)


def look(ledger: Ledger, later: float = 0.0) -> Snapshot:
    rows = StudyRows.read(ledger, NAME)
    return take_snapshot(replace(rows, now=rows.now + later), CONFIG)


def test_take_snapshot_study_without_workers_has_only_its_queue(ledger: Ledger) -> None:
    snapshot = look(ledger)

    assert (snapshot.waiting, snapshot.workers, snapshot.best, snapshot.value_range) == (8, (), None, None)
    assert (snapshot.epochs_per_minute, snapshot.eta_seconds, snapshot.finished) == (None, None, False)


def test_take_snapshot_worker_shows_its_slots_with_their_curves(ledger: Ledger) -> None:
    tickets = claim(ledger, "w", 3)
    report(ledger, tickets[0], [0.1, 0.2, None])
    report(ledger, tickets[1], [0.3])

    snapshot = look(ledger)

    (worker,) = snapshot.workers
    assert (worker.host, worker.pid, worker.device, worker.pack) == ("a-host", 4_000_000, "cpu bf16", 4)
    assert worker.condition == "trains"
    assert [slot.curve for slot in worker.slots] == [(0.1, 0.2, None), (0.3,), ()]
    assert [(slot.epoch, slot.epochs, slot.value) for slot in worker.slots] == [(3, 6, 0.2), (1, 6, 0.3), (0, 6, None)]
    assert snapshot.value_range == (0.1, 0.3)
    assert (snapshot.waiting, snapshot.counts["RUNNING"]) == (5, 3)


def test_take_snapshot_best_so_far_follows_the_order_of_the_ends(ledger: Ledger) -> None:
    tickets = claim(ledger, "w", 4)
    for index, value in ((1, 0.2), (0, 0.1), (3, 0.4), (2, 0.3)):
        complete(ledger, tickets[index], [value])

    snapshot = look(ledger)

    assert snapshot.best_so_far == (0.2, 0.2, 0.4, 0.4)
    assert snapshot.best is not None
    assert snapshot.base is not None
    assert (snapshot.best.number, snapshot.base.value) == (3, 0.1)
    assert snapshot.workers[0].condition == "idle"


def test_take_snapshot_pace_counts_the_reports_of_the_last_ten_minutes(ledger: Ledger) -> None:
    tickets = claim(ledger, "w", 1)
    report(ledger, tickets[0], [0.1, 0.2, 0.3])

    assert look(ledger, later=60.0).epochs_per_minute == pytest.approx(3.0, rel=0.05)
    assert look(ledger, later=300.0).epochs_per_minute == pytest.approx(0.6, rel=0.05)
    assert look(ledger, later=700.0).epochs_per_minute is None


def test_take_snapshot_worker_that_misses_its_beats_is_silent_and_one_without_trials_then_goes(ledger: Ledger) -> None:
    claim(ledger, "busy", 1)
    claim(ledger, "empty", 0)

    silent = look(ledger, later=130.0)
    gone = look(ledger, later=4000.0)

    assert [(worker.id, worker.condition) for worker in silent.workers] == [("busy", "silent"), ("empty", "silent")]
    assert [worker.id for worker in gone.workers] == ["busy"]


def test_take_snapshot_released_worker_is_counted_as_dead_and_its_trial_waits(ledger: Ledger) -> None:
    claim(ledger, "w", 2)
    ledger.release_worker("w")

    snapshot = look(ledger)

    assert (snapshot.workers, snapshot.workers_died, snapshot.waiting) == ((), 1, 8)


def test_take_snapshot_failures_are_in_the_order_in_which_they_came(ledger: Ledger) -> None:
    first, second = claim(ledger, "w", 2)
    ledger.finish(second, TicketState.FAIL, None, "out of memory")
    ledger.finish(first, TicketState.FAIL, None, "not finite")

    assert [(failure.name, failure.reason) for failure in look(ledger).failures] == [
        ("1", "out of memory"),
        ("0", "not finite"),
    ]


def test_take_snapshot_json_is_plain(ledger: Ledger) -> None:
    report(ledger, claim(ledger, "w", 1)[0], [0.1])

    data = json.loads(json.dumps(look(ledger).to_json()))

    assert data["workers"][0]["slots"][0]["curve"] == [0.1]
    assert data["finished"] is False
