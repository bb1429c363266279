"""The trainer: a process of its own that trains packs and knows neither database nor MLflow.

It may segfault, run out of memory or hang without taking the supervisor along, and a supervisor that waits for its
database does not stop the training. It ends when its supervisor closes the pipe, or dies.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from search.checkpoints import CheckpointStore, LoadedCheckpoint
from search.config import objective_value
from search.paths import StudyFolder
from search.settings import ObjectiveConfig
from search.weights import WeightsStore
from search.worker.messages import (
    Alive,
    CapacityMeasured,
    Cohort,
    EpochDone,
    MeasureCapacity,
    Measured,
    PackCrashed,
    PackEnded,
    Secured,
    Standing,
    StartPack,
    TrialStart,
    Verdict,
)
from yolocore.errors import CheckpointError, InputError, TrainingError, YolocoreError
from yolocore.hyperparameters import Hyperparameters
from yolocore.memory import is_out_of_memory
from yolocore.metrics import DetectionMetrics
from yolocore.training.capacity import measure_capacity
from yolocore.training.config import TrainConfig
from yolocore.training.optim import EarlyStopping
from yolocore.training.pack import check_state
from yolocore.training.trainer import EpochReport, PackTrainer, SlotStart, TrainingData

logger = logging.getLogger(__name__)

ALIVE_SECONDS = 1.0
VERDICT_SECONDS = 5.0
"""How long training pauses at an epoch boundary for the verdict. Longer than a healthy database takes, also to propose
the next trials, and short enough that an outage costs little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What a trainer is started with."""

    train: TrainConfig
    folder: StudyFolder
    checkpoints: str
    """Root of the checkpoint store."""
    owner: str
    """Tells this study's checkpoints from those of an earlier one of the same name."""
    objective: ObjectiveConfig
    class_names: tuple[str, ...]
    pulse_seconds: float
    """How long one call that cannot say so itself (reading the data, a checkpoint) is taken for alive."""
    fidelity: TrainConfig | None = None
    """How the cheap training goes that comes before the full one, if the study has one."""
    keep_weights: bool = True
    """Whether the weights of the epochs that give trials their values are stored."""
    keep_details: bool = False
    """Whether what pictures of these epochs are drawn from is stored."""

    def open_checkpoints(self) -> CheckpointStore:
        """The store of this study's checkpoints: those of its trials."""
        return CheckpointStore(self.checkpoints, self.folder.study, owner=self.owner)

    def train_config(self, pack: StartPack) -> TrainConfig:
        """How a pack is trained."""
        if pack.cohort is not None:
            return replace(self.train, seed=pack.cohort.seed, epochs=pack.cohort.epochs)
        return self.fidelity or self.train if pack.in_fidelity else self.train

    def weights_metadata(self, ticket_number: int, epochs_done: int) -> dict[str, str]:
        """What a file of trained weights says about itself."""
        return {
            "study": self.folder.study,
            "trial": str(ticket_number),
            "epochs": str(epochs_done),
            "model": f"yolov5{self.train.model}",
            "names": json.dumps(self.class_names),
        }


def main(connection: Connection, settings: TrainerSettings) -> None:
    """Entry point of the process: trains one pack after another until the pipe is closed."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("yolocore.training.start").setLevel(logging.INFO)  # how much of a weights file was taken
    # Signals to the whole process group are the supervisor's to answer: it ends this process once all is handed back.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_supervisor, name="supervisor-watch", daemon=True).start()
    trainer = _Trainer(connection, settings)
    try:
        trainer.serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The supervisor closed the pipe: what is on disk is secured, the rest is trained again.
        trainer.close()


def _end_with_supervisor() -> None:
    """A supervisor that was killed cannot close its trainer, which would keep the device from its successor."""
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        supervisor.join()
    os._exit(1)


@dataclass(slots=True)
class _Trial:
    """A trial in the pack, as far as training it does not need to know."""

    start: TrialStart
    best: float
    """Its best objective so far."""
    stopping: EarlyStopping
    secured: int
    """Epochs that a checkpoint holds."""


class _Trainer:
    """Answers `StartPack` with the messages of one pack."""

    def __init__(self, connection: Connection, settings: TrainerSettings) -> None:
        self._connection = connection
        self._settings = settings
        self._trials_store = self._store = settings.open_checkpoints()
        self._weights = WeightsStore(self._store.place, settings.folder.study)
        self._config = settings.train
        self._cohort: Cohort | None = None
        self._data: TrainingData | None = None
        self._in_fidelity = False
        self._trials: dict[str, _Trial] = {}
        self._started = False
        self._alive_at = 0.0
        self._owed = 0
        """Verdicts that are still to come."""
        self._heard: list[Verdict] = []
        """Verdicts that came in the middle of an epoch; they take effect at its end."""

    def close(self) -> None:
        """Stops loader processes and lets go of the decoded images, whose file goes with the last reference."""
        if self._data is not None:
            self._data.close()
            self._data = None
        gc.collect()

    def serve(self) -> None:
        """Trains until the supervisor closes the pipe."""
        while True:
            match self._connection.recv():
                case StartPack() as pack:
                    self._send(self._guarded(partial(self._train, pack), PackEnded()))
                case MeasureCapacity() as task:
                    self._send(self._guarded(partial(self._measure, task), Measured()))

    def _guarded(self, work: Callable[[], None], done: object) -> object:
        """Does the work and says that it is done, or why not."""
        try:
            work()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except InputError as error:
            return PackCrashed(str(error), fixable=True)
        except Exception as error:
            reason = str(error) if isinstance(error, YolocoreError) else f"{type(error).__name__}: {error}"
            if not isinstance(error, YolocoreError):
                logger.exception("a pack crashed")
            return PackCrashed(reason, False, out_of_memory=is_out_of_memory(error), started=self._started)
        return done

    def _measure(self, task: MeasureCapacity) -> None:
        """Tries packs of growing size on the real data."""
        with self._pulse():
            data = self._training_data(task.hyperparameters)
        found = measure_capacity(self._settings.train, data, task.hyperparameters, task.largest, task.share)
        while True:
            with self._pulse():
                capacity = next(found, None)
            if capacity is None:
                return
            self._send(CapacityMeasured(capacity))

    def _train(self, pack: StartPack) -> None:
        """Trains a pack from its first trials on until nobody is left in it and nobody joins."""
        self._prepare(pack)
        with self._pulse():
            data = self._training_data(pack.trials[0].hyperparameters)
            if self._cohort is not None:
                data.test_loader()
        starts = self._admit(pack.trials)
        if self._cohort is not None and len({trial.secured for trial in self._trials.values()}) > 1:
            return
        trainer = PackTrainer(
            self._config, starts, on_batch=self._on_batch, on_evaluation_batch=self._tell_alive, data=data
        )
        self._started = True
        while not trainer.finished:
            reports = trainer.run_epoch()
            if not self._in_fidelity and self._cohort is None:
                self._keep(trainer, reports)
            self._send(EpochDone(tuple(reports), self._on_test(trainer, reports)))
            self._owed += 1
            self._obey(trainer)
            if not self._in_fidelity:
                self._secure(trainer)

    def _prepare(self, pack: StartPack) -> None:
        """Forgets the pack before, and takes note of what kind this one is."""
        self._trials.clear()
        self._owed = 0
        self._heard.clear()
        self._started = False
        self._cohort = pack.cohort
        self._in_fidelity = pack.in_fidelity
        self._config = self._settings.train_config(pack)
        self._store = self._trials_store if pack.cohort is None else self._trials_store.of_kind(pack.cohort.kind)

    def _on_test(self, trainer: PackTrainer, reports: Sequence[EpochReport]) -> Mapping[str, DetectionMetrics]:
        """What the members of a cohort that end now score on the test split."""
        if self._cohort is None:
            return {}
        return trainer.evaluate_on_test([report.key for report in reports if self._is_last(report)])

    def _admit(self, trials: Sequence[TrialStart]) -> list[SlotStart]:
        """Loads the checkpoints of trials that enter the pack, and says where each really stands."""
        notes: list[str] = []
        with self._pulse():
            found = {trial.key: self._load(trial, notes) for trial in trials}
        epochs = {key: _standing(state) for key, state in found.items()}
        for trial in trials:
            best = -math.inf if trial.best_value is None else trial.best_value
            self._trials[trial.key] = _Trial(trial, best, replace(trial.stopping), epochs[trial.key][0])
        self._send(Standing(epochs, tuple(notes)))
        return [SlotStart(trial.key, trial.hyperparameters, _tree(found[trial.key])) for trial in trials]

    def _load(self, trial: TrialStart, notes: list[str]) -> LoadedCheckpoint | None:
        if trial.epochs_done == 0:
            return None
        try:
            found = self._store.load(trial.number, trial.epochs_done, trial.checkpoint)
            check_state(f"of trial {trial.number}", found.tree, self._config)
        except (CheckpointError, TrainingError) as error:
            notes.append(f"trial {trial.number} starts over with its seed, its checkpoint is unusable: {error}")
            return None
        notes.extend(f"trial {trial.number}: {reason}" for reason in found.skipped)
        return found

    def _training_data(self, hyperparameters: Hyperparameters) -> TrainingData:
        if self._data is None:
            try:
                self._data = TrainingData.load(self._settings.train, hyperparameters)
            except OSError as error:
                # The machine's fault (a full disk, no memory to share), and no trial's.
                raise InputError(f"{self._settings.train.data}: the data cannot be loaded: {error}") from error
        return self._data

    def _obey(self, trainer: PackTrainer) -> None:
        """Takes out who has ended and lets in who joins, as far as the supervisor has answered by now."""
        going_on = set(trainer.unfinished)
        joining: dict[str, TrialStart] = {}
        deadline = time.monotonic() + VERDICT_SECONDS
        # With nothing left to train it waits as long as it takes.
        while self._heard or (self._owed and not ((going_on or joining) and not self._answered(deadline))):
            verdict = self._heard.pop(0) if self._heard else self._hear()
            # A trial that was lost may come back as a new attempt while the old one is still in the pack.
            going_on.difference_update(verdict.drop, (trial.key for trial in verdict.join))
            joining.update({trial.key: trial for trial in verdict.join})
        starts = self._admit(list(joining.values())) if joining else []
        trainer.reshape(drop=[key for key in trainer.active if key not in going_on], add=starts)
        self._trials = {key: self._trials[key] for key in trainer.active}

    def _hear(self) -> Verdict:
        verdict: Verdict = self._connection.recv()
        self._owed -= 1
        return verdict

    def _answered(self, deadline: float) -> bool:
        """Whether the supervisor has said something before the deadline."""
        return self._connection.poll(max(0.0, deadline - time.monotonic()))

    def _keep(self, trainer: PackTrainer, reports: Sequence[EpochReport]) -> None:
        """Writes what is kept of the epoch that gives a trial its value: its last one, or its best one so far."""
        for report in reports:
            if report.metrics is None or report.failure is not None or not self._counts(report):
                continue
            with self._pulse():
                if self._settings.keep_weights:
                    self._keep_weights(trainer, report)
                if self._settings.keep_details:
                    self._keep_details(trainer, report)

    def _keep_weights(self, trainer: PackTrainer, report: EpochReport) -> None:
        trial, epochs = self._trials[report.key].start, report.epoch + 1
        metadata = self._settings.weights_metadata(trial.number, epochs)
        # A full disk ends this trial; the worker, which may have other disks to write to, goes on.
        self._weights.save(trial.number, trial.attempt, epochs, trainer.slot_weights(report.key), metadata)

    def _keep_details(self, trainer: PackTrainer, report: EpochReport) -> None:
        """Pictures are worth no trial: where there is no room for them, they are missing."""
        number = self._trials[report.key].start.number
        details = trainer.slot_details(report.key, report.epoch)
        try:
            if details is not None:
                self._weights.save_details(number, details)
        except CheckpointError as error:
            logger.warning("%s", error)

    def _counts(self, report: EpochReport) -> bool:
        assert report.metrics is not None
        trial = self._trials[report.key]
        if self._settings.objective.at == "last":
            return self._is_last(report)
        value = objective_value(self._settings.objective, report.metrics.to_mapping(), self._settings.class_names)
        if value < trial.best:
            return False
        trial.best = value
        return True

    def _is_last(self, report: EpochReport) -> bool:
        """Whether the trial ends with this epoch; to be asked once. The supervisor will find the same."""
        if report.metrics is None or report.failure is not None:
            return False
        is_stuck = self._trials[report.key].stopping.update(report.epoch, report.metrics.fitness)
        return is_stuck or report.epoch + 1 >= self._config.epochs

    def _secure(self, trainer: PackTrainer) -> None:
        """Puts every slot that goes on on disk, those apart that have just joined."""
        saved: dict[str, tuple[int, str]] = {}
        with self._pulse():
            for key, done in trainer.epochs.items():
                trial = self._trials[key]
                if done > trial.secured:
                    start, state = trial.start, trainer.slot_state(key)
                    saved[key] = done, self._store.save(start.number, start.attempt, done, state)
                    trial.secured = done
        if saved:
            self._send(Secured(saved))

    def _on_batch(self, _done: int, _total: int) -> None:
        self._tell_alive()

    def _tell_alive(self) -> None:
        now = time.monotonic()
        if now - self._alive_at < ALIVE_SECONDS:
            return
        self._alive_at = now
        # One that has answered listens again, however long the epoch lasts, and takes silence for a hang.
        while self._owed and self._connection.poll():
            self._heard.append(self._hear())
        # A supervisor that owes a verdict waits for its database and reads nothing: the pipe must not fill up.
        if not self._owed:
            self._send(Alive())

    @contextmanager
    def _pulse(self) -> Iterator[None]:
        """Says that it is alive while one long call runs that cannot say so itself; nothing else may be sent inside.

        Not for ever: whether such a call moves is not known, and a store of checkpoints may never answer.
        """
        over = threading.Event()

        def beat() -> None:
            deadline = time.monotonic() + self._settings.pulse_seconds
            while not over.wait(ALIVE_SECONDS) and time.monotonic() < deadline:
                with suppress(OSError, EOFError):
                    self._tell_alive()

        thread = threading.Thread(target=beat, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _send(self, message: object) -> None:
        self._connection.send(message)


def _standing(found: LoadedCheckpoint | None) -> tuple[int, str | None]:
    return (0, None) if found is None else (found.epochs_done, found.reference)


def _tree(found: LoadedCheckpoint | None) -> Mapping[str, Any] | None:
    return None if found is None else found.tree
