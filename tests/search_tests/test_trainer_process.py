"""The trainer, spoken to through its pipe as a supervisor does whose database is slow."""

import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from tiny import write_data

from search.paths import StudyFolder
from search.settings import ObjectiveConfig
from search.worker import trainer_process
from search.worker.messages import Alive, EpochDone, PackCrashed, PackEnded, StartPack, TrialStart, Verdict
from search.worker.trainer_process import TrainerSettings, _Trainer
from yolocore.hyperparameters import Hyperparameters
from yolocore.training.config import TrainConfig


@pytest.fixture
def settings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainerSettings:
    torch.set_num_threads(1)
    data = write_data(tmp_path_factory.getbasetemp())
    return TrainerSettings(
        train=TrainConfig(model="n", data=data, image_size=64, batch_size=8, epochs=2, device="cpu"),
        folder=StudyFolder(tmp_path, "tiny"),
        checkpoints=str(tmp_path),
        owner="",
        objective=ObjectiveConfig(),
        class_names=("digit 0", "digit 4"),
        pulse_seconds=60.0,
        keep_weights=False,
    )


@pytest.fixture
def supervisor(settings: TrainerSettings) -> Iterator[Connection]:
    """The supervisor's end of the pipe of a trainer that serves in a thread."""
    ours, theirs = Pipe()
    trainer = _Trainer(theirs, settings)

    def serve() -> None:
        try:
            trainer.serve()
        except (EOFError, OSError):
            trainer.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield ours
    ours.close()
    thread.join()


def start(key: str, attempt: int = 1) -> TrialStart:
    return TrialStart(key, int(key), attempt, Hyperparameters(), 0)


def next_epoch(connection: Connection) -> EpochDone | PackCrashed | PackEnded:
    """The next message that is not about progress on the way."""
    while not isinstance(message := connection.recv(), EpochDone | PackCrashed | PackEnded):
        pass
    return message


def test_trainer_answered_in_the_middle_of_an_epoch_says_again_that_it_is_alive(settings: TrainerSettings) -> None:
    # Otherwise an epoch that is longer than `hang_seconds` would end in a kill after each slow verdict.
    ours, theirs = Pipe()
    trainer = _Trainer(theirs, settings)
    trainer._owed = 1

    trainer._tell_alive()
    assert not ours.poll()  # nobody listens yet

    ours.send(Verdict())
    trainer._alive_at = 0.0
    trainer._tell_alive()
    assert ours.poll()
    assert isinstance(ours.recv(), Alive)


def test_trainer_verdict_heard_within_an_epoch_takes_effect_at_its_end(
    supervisor: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_process, "VERDICT_SECONDS", 0.0)
    monkeypatch.setattr(trainer_process, "ALIVE_SECONDS", 0.0)
    supervisor.send(StartPack((start("1"), start("2"))))
    first = next_epoch(supervisor)

    supervisor.send(Verdict(drop=("1",), join=(start("3"),)))

    reports = [first]
    while not isinstance(reports[-1], PackEnded):
        reports.append(next_epoch(supervisor))
        supervisor.send(Verdict())
    trained = [(report.key, report.epoch) for done in reports if isinstance(done, EpochDone) for report in done.reports]
    assert [epoch for key, epoch in trained if key == "2"] == [0, 1]
    assert [epoch for key, epoch in trained if key == "3"] == [0, 1]


def test_trainer_trial_that_joins_as_a_new_attempt_replaces_the_old_one(supervisor: Connection) -> None:
    supervisor.send(StartPack((start("1"), start("2"))))
    next_epoch(supervisor)

    # The old attempt was lost before any of its reports was answered.
    supervisor.send(Verdict(join=(start("2", attempt=2),)))

    second = next_epoch(supervisor)
    assert isinstance(second, EpochDone)
    assert {report.key: report.epoch for report in second.reports} == {"1": 1, "2": 0}
    supervisor.send(Verdict())
    third = next_epoch(supervisor)
    assert isinstance(third, EpochDone)
    assert {report.key: report.epoch for report in third.reports} == {"2": 1}
    supervisor.send(Verdict())
    assert isinstance(next_epoch(supervisor), PackEnded)
