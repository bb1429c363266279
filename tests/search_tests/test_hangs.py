"""Calls that never return: in the trainer, which is killed, and in the supervisor, whose trials others take."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing import Pipe
from pathlib import Path

import blocked
import pytest
import torch
from tiny import NAME, SignalWhen, TinyStudy, make_study, wait_for

from search.ledger import Ledger, TicketState
from search.worker import context, trainer_process
from search.worker.lease import LeaseKeeper
from search.worker.messages import Alive

COMPLETE = TicketState.COMPLETE


@pytest.fixture
def make(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., TinyStudy]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    torch.set_num_threads(1)
    shared = tmp_path_factory.getbasetemp()
    return lambda **options: make_study(tmp_path / "study", shared, **options)


def not_for_ever(seconds: float = 240.0) -> SignalWhen:
    """Ends the worker in this process if nothing else does."""
    deadline = time.monotonic() + seconds
    return SignalWhen(lambda: time.monotonic() > deadline)


def test_trainer_whose_checkpoint_is_never_written_is_killed_and_the_trials_go_on(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = make(trials=2)
    study.create()
    monkeypatch.setattr(trainer_process, "main", partial(blocked.main, tmp_path / "marker"))
    monkeypatch.setattr(context, "PULSE_HANGS", 1)

    with not_for_ever() as guard:
        study.work(hang_seconds=12.0)

    assert not guard.sent
    assert (tmp_path / "marker").exists()
    assert "made no progress for 12 s and was killed" in caplog.text
    assert study.states() == [COMPLETE] * 2


def test_trainer_says_that_it_is_alive_in_a_long_call_but_not_for_ever(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_process, "ALIVE_SECONDS", 0.01)
    ours, theirs = Pipe()
    trainer = trainer_of(make(), theirs, pulse_seconds=0.3)

    with trainer._pulse():
        time.sleep(1.0)
        heard = []
        while ours.poll():
            heard.append(ours.recv())

        assert len(heard) > 3
        assert all(isinstance(message, Alive) for message in heard)
        assert not ours.poll(0.3)


def trainer_of(
    study: TinyStudy, connection: "trainer_process.Connection", pulse_seconds: float
) -> "trainer_process._Trainer":
    from search.paths import StudyFolder

    settings = trainer_process.TrainerSettings(
        train=study.config.train_config(study.data),
        folder=StudyFolder(study.runs, NAME),
        checkpoints=str(study.runs),
        owner="",
        objective=study.config.objective,
        class_names=("digit 0", "digit 4"),
        pulse_seconds=pulse_seconds,
    )
    return trainer_process._Trainer(connection, settings)


def renewed(ledger: Ledger, ticket_id: int, before: float | None) -> bool:
    return ledger.ticket(ticket_id).lease_expires != before


def test_lease_keeper_worker_that_does_not_move_keeps_nothing_until_it_moves_again(
    make: Callable[..., TinyStudy], caplog: pytest.LogCaptureFixture
) -> None:
    study = make()
    study.create()
    ledger = study.ledger
    ticket = ledger.claim(NAME, "here", 1, 60.0)[0]

    with LeaseKeeper(ledger, NAME, "here", 0.6, silence_seconds=0.5) as keeper:
        keeper.hold([ticket.id])
        until(lambda: "has not moved for" in caplog.text)
        stale = ledger.ticket(ticket.id).lease_expires
        time.sleep(1.0)
        assert not renewed(ledger, ticket.id, stale)

        until(lambda: keeper.note_alive() or renewed(ledger, ticket.id, stale))

    assert caplog.text.count("has not moved for") == 1


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_worker_whose_supervisor_is_stuck_loses_its_trials_to_another(
    make: Callable[..., TinyStudy], tmp_path: Path
) -> None:
    study = make(trials=2, train={"epochs": 3})
    study.create()
    marker = tmp_path / "marker"
    words = [sys.executable, blocked.__file__, str(marker), study.storage_url, NAME, str(study.runs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(words, text=True, **pipes)
    with ExitStack() as stack:
        stack.callback(process.communicate)
        stack.callback(process.kill)
        wait_for(marker.exists, process)

        guard = stack.enter_context(not_for_ever())
        study.work("second")

        assert not guard.sent
        assert process.poll() is None
    assert study.states() == [COMPLETE] * 2
    assert [ticket.attempt for ticket in study.tickets()] == [2, 2]
