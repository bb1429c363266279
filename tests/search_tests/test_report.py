"""What people read of a study."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from tiny import NAME, TinyStudy, make_study

from search.config import StudyConfig
from search.ledger import Ledger, StudyRecord, TicketState
from search.report import (
    StudyRows,
    StudyStatus,
    comparison_table,
    epochs_enough,
    headline,
    live_view,
    status_view,
    study_status,
    trials_table,
)

START = 1_700_000_000.0


@pytest.fixture
def study(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    """Four tickets of four epochs, nothing claimed."""
    study = make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), trials=4, train={"epochs": 4})
    study.runs.mkdir()
    ledger = study.ledger
    ledger.initialise()
    record = StudyRecord(
        name=NAME, config=study.config.to_json(), fingerprint="0123456789abcdef", versions={}, created=START
    )
    base = {"box": 0.05, "cls": 0.5}
    ledger.create_study(record, [base, None, None, None], (1, 0, base))
    return study


@pytest.fixture
def worked(study: TinyStudy) -> TinyStudy:
    """Trial 0 complete, 1 better, 2 pruned after two epochs, 3 waiting."""
    ledger = study.ledger
    tickets = list(ledger.claim(NAME, "here", 3, 60.0))
    for number, ticket in enumerate(tickets):
        if number:
            tickets[number] = ledger.link_trial(ticket, number + 1, number, {"box": 0.1 * number, "cls": 1.0})
    for ticket, curve in zip(tickets, ([0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.5], [0.0, 0.1]), strict=True):
        for epoch, value in enumerate(curve):
            ledger.record_epoch(ticket, epoch, value, {"fitness": value})
    ledger.finish(tickets[0], TicketState.COMPLETE, 0.4, None, 3)
    ledger.finish(tickets[1], TicketState.COMPLETE, 0.5, None, 3)
    ledger.finish(tickets[2], TicketState.PRUNED, 0.1, None, 1)
    return study


def status_of(study: TinyStudy) -> StudyStatus:
    return study_status(study.ledger, study.config)


def text_of(renderable: RenderableType) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def row_of(text: str, first: str) -> list[str]:
    """Cells of the table row that begins with `first`."""
    rows = [line.split() for line in text.splitlines()]
    return next(row for row in rows if row[: len(first.split())] == first.split())


def test_study_status_nothing_claimed(study: TinyStudy) -> None:
    status = status_of(study)

    assert status.counts == {"WAITING": 4, "RUNNING": 0, "COMPLETE": 0, "PRUNED": 0, "FAIL": 0}
    assert (status.best, status.eta_seconds, status.slot_epochs, status.workers) == (None, None, 0, 0)
    assert not status.finished
    assert headline(status) == "4 waiting"


def test_study_status_epochs_between_evaluations_are_spent_too(study: TinyStudy) -> None:
    (ticket,) = study.ledger.claim(NAME, "here", 1, 60.0)
    study.ledger.record_epoch(ticket, 2, 0.3, {"fitness": 0.3})

    assert status_of(study).slot_epochs == 3


def test_study_status_best_base_and_counts(worked: TinyStudy) -> None:
    status = status_of(worked)

    assert status.counts == {"WAITING": 1, "RUNNING": 0, "COMPLETE": 2, "PRUNED": 1, "FAIL": 0}
    assert status.best is not None
    assert (status.best.number, status.best.value) == (1, 0.5)
    assert status.base is not None
    assert (status.base.number, status.base.value) == (0, 0.4)
    assert status.slot_epochs == 10
    assert [trial.epoch for trial in status.trials] == [4, 4, 2, 0]
    line = "1 waiting, 2 complete, 1 pruned | best 0.5000 (trial 1) | base 0.4000"
    assert headline(status, with_eta=False) == line
    assert headline(status).startswith(f"{line} | about ")


def test_study_status_equal_values_the_base_wins(study: TinyStudy) -> None:
    ledger = study.ledger
    first, second = ledger.claim(NAME, "here", 2, 60.0)
    second = ledger.link_trial(second, 2, 1, {"box": 0.1, "cls": 1.0})
    for ticket in (second, first):
        ledger.record_epoch(ticket, 3, 0.25, {})
        ledger.finish(ticket, TicketState.COMPLETE, 0.25, None, 3)

    best = status_of(study).best

    assert best is not None
    assert best.number == 0


def test_study_status_eta_is_the_mean_length_at_the_pace_so_far(
    worked: TinyStudy, edit: Callable[[TinyStudy, str], None]
) -> None:
    # Ten epochs of three trials within 100 s: a trial takes 10/3 epochs, an epoch 10 s.
    edit(worked, f"UPDATE yolosearch_ticket SET started = {START} WHERE started IS NOT NULL")
    edit(worked, f"UPDATE yolosearch_epoch SET stored_at = {START + 50}")
    edit(worked, f"UPDATE yolosearch_epoch SET stored_at = {START + 100} WHERE epoch = 3")

    status = status_of(worked)

    assert status.eta_seconds == pytest.approx(100 / 3)
    assert headline(status).endswith("about 33 s left")


@pytest.fixture
def edit() -> Callable[[TinyStudy, str], None]:
    """Runs SQL on a study's SQLite file."""
    import sqlite3

    def run(study: TinyStudy, statement: str) -> None:
        with sqlite3.connect(study.runs / NAME / "study.db") as connection:
            connection.execute(statement)

    return run


def test_study_status_json_is_plain_and_complete(worked: TinyStudy) -> None:
    data = json.loads(json.dumps(status_of(worked).to_json(), allow_nan=False))

    assert data["finished"] is False
    assert data["best"]["number"] == 1
    assert [trial["state"] for trial in data["trials"]] == ["COMPLETE", "COMPLETE", "PRUNED", "WAITING"]
    assert data["trials"][2]["params"] == {"box": 0.2, "cls": 1.0}


def test_live_view_shows_the_slots_that_train(study: TinyStudy) -> None:
    ledger = study.ledger
    ticket = ledger.claim(NAME, "here", 1, 60.0)[0]
    ledger.record_epoch(ticket, 0, 0.125, {})

    text = text_of(live_view(status_of(study)))

    assert row_of(text, "base 0")[:6] == ["base", "0", "1/4", "0.1250", "0.05", "0.5"]
    assert "3 waiting, 1 running" in text


def test_live_view_nothing_trains_has_no_table(worked: TinyStudy) -> None:
    text = text_of(live_view(status_of(worked)))

    assert "epoch" not in text
    assert "1 pruned" in text


def test_trials_table_has_every_trial_and_its_reason(worked: TinyStudy) -> None:
    ledger = worked.ledger
    last = ledger.claim(NAME, "here", 1, 60.0)[0]
    last = ledger.link_trial(last, 4, 3, {"box": 0.15, "cls": 1.5})
    ledger.finish(last, TicketState.FAIL, None, "the loss is not finite (epoch 0, batch 1)")

    text = text_of(trials_table(status_of(worked)))

    assert row_of(text, "1")[:6] == ["1", "COMPLETE", "4/4", "0.5000", "0.1", "1"]
    assert row_of(text, "2")[:4] == ["2", "PRUNED", "2/4", "0.1000"]
    assert row_of(text, "3")[:5] == ["3", "FAIL", "0/4", "0.15", "1.5"]
    assert "trial 3: the loss is not finite (epoch 0, batch 1)" in text.splitlines()


def test_comparison_table_shows_what_was_searched_or_differs(worked: TinyStudy) -> None:
    base = {"lr0": 0.01, "box": 0.05, "cls": 0.5, "obj": 1.0}

    text = text_of(comparison_table(status_of(worked), base, {**base, "box": 0.1, "obj": 0.75}))

    assert row_of(text, "objective") == ["objective", "0.4000", "0.5000"]
    assert row_of(text, "box") == ["box", "0.05", "0.1"]
    assert row_of(text, "cls") == ["cls", "0.5", "0.5"]
    assert row_of(text, "obj") == ["obj", "1", "0.75"]
    assert "lr0" not in text


def test_study_status_worker_that_was_silent_for_long_is_not_counted(
    study: TinyStudy, edit: Callable[[TinyStudy, str], None]
) -> None:
    ledger = study.ledger
    ledger.register_worker("fresh", NAME, "host@1", 1, "cpu")
    ledger.register_worker("silent", NAME, "host@1", 2, "cpu")
    ledger.register_worker("left", NAME, "host@1", 3, "cpu")
    ledger.retire_worker("left")
    edit(study, "UPDATE yolosearch_worker SET heartbeat = heartbeat - 3600 WHERE id = 'silent'")

    assert status_of(study).workers == 1


def test_study_status_from_the_frozen_configuration(worked: TinyStudy) -> None:
    frozen = StudyConfig.from_json(Ledger.study(worked.ledger, NAME).config)

    assert study_status(worked.ledger, frozen).to_json()["trials"][0]["epochs"] == 4


def test_study_status_eta_leaves_out_the_time_in_which_nobody_worked(
    study: TinyStudy, edit: Callable[[TinyStudy, str], None]
) -> None:
    ledger = study.ledger
    first, second, *_ = ledger.claim(NAME, "here", 2, 60.0)
    ledger.link_trial(second, 2, 1, {"box": 0.1, "cls": 1.0})
    # Ten seconds an epoch, a night between two attempts at the second trial.
    for epoch in range(4):
        ledger.record_epoch(first, epoch, 0.1, {"fitness": 0.1}, START + 10 * (epoch + 1))
    for epoch in range(2):
        ledger.record_epoch(second, epoch, 0.1, {"fitness": 0.1}, START + 10 * (epoch + 1))
    ledger.finish(first, TicketState.COMPLETE, 0.1, None, 3)
    edit(study, f"UPDATE yolosearch_ticket SET started = {START} WHERE started IS NOT NULL")
    before = status_of(study).eta_seconds
    ledger.hand_back([second])
    again, *_ = ledger.claim(NAME, "here", 1, 60.0)
    ledger.record_epoch(again, 2, 0.1, {"fitness": 0.1}, START + 36_000)

    # 6 epochs in 40 s, 2 + 4 + 4 are left; then one more in 10 s.
    assert before == pytest.approx(10 * 40 / 6)
    assert status_of(study).eta_seconds == pytest.approx(9 * 50 / 7)


def test_study_status_eta_is_at_the_speed_of_the_live_workers(worked: TinyStudy) -> None:
    ledger = worked.ledger
    ledger.register_worker("alive", NAME, "host@1", 1, "cpu fp32")
    (ticket,) = ledger.claim(NAME, "alive", 1, 60.0)
    ticket = ledger.link_trial(ticket, 9, 3, {"box": 0.1, "cls": 1.0})
    for epoch, moment in enumerate((START, START + 7)):
        ledger.record_epoch(ticket, epoch, 0.1, {"fitness": 0.1}, moment)

    # Of the ended trials with two epochs or more the mean is 10 / 3; a slot-epoch takes 7 s now.
    assert status_of(worked).eta_seconds == pytest.approx((10 / 3 - 2) * 7)


def test_status_view_says_when_it_is_done_and_what_the_curves_show(worked: TinyStudy) -> None:
    status, now = status_of(worked), datetime(2026, 1, 31, 23, 59, tzinfo=UTC)
    assert status.eta_seconds is not None

    curves = epochs_enough(StudyRows.read(worked.ledger, NAME), worked.config)
    text = text_of(status_view(replace(status, eta_seconds=3600.0), curves, now, "trial 2 is better"))

    assert "confirmation: trial 2 is better" in text
    assert (curves.trials, [a.correlation for a in curves.agreements]) == (2, pytest.approx([1.0, 1.0, 1.0]))
    assert "at this pace it is done Sun 2026-02-01 00:59 UTC" in text
    assert "short against full: 2 trials ran to the end, too few to say" in text


def test_headline_names_what_mlflow_does_not_have_yet_and_mixed_precisions(worked: TinyStudy) -> None:
    ledger = worked.ledger
    tracked = worked.config.model_copy(update={"tracking": worked.config.tracking.model_copy(update={"enabled": True})})
    ledger.register_worker("one", NAME, "host@1", 1, "cpu fp32")
    ledger.mark_mirrored(ledger.tickets(NAME)[0].id)

    assert "2 to be sent to MLflow" in headline(study_status(ledger, tracked))
    assert "trained in" not in headline(study_status(ledger, tracked))
    assert study_status(ledger, worked.config).unsent == 0

    ledger.register_worker("two", NAME, "other@1", 1, "cuda:0 bf16")
    assert "trained in bf16 and fp32: set train.precision" in headline(study_status(ledger, tracked))
