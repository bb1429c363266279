"""The trainer: a process of its own that trains packs and knows neither database nor MLflow.

It may segfault, run out of memory or hang without taking the supervisor along, and a supervisor that waits for its
database does not stop the training. It ends when its supervisor closes the pipe, or dies.
"""

from __future__ import annotations

import gc
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from search.checkpoints import CheckpointStore, LoadedCheckpoint
from search.config import objective_value
from search.paths import StudyFolder
from search.settings import ObjectiveConfig
from search.worker.messages import (
    Alive,
    EpochDone,
    PackCrashed,
    PackEnded,
    PackStarted,
    Secured,
    StartPack,
    TrialStart,
)
from yolocore.checkpoint import save_weights
from yolocore.errors import CheckpointError, InputError
from yolocore.training.config import TrainConfig
from yolocore.training.optim import EarlyStopping
from yolocore.training.trainer import EpochReport, PackTrainer, SlotStart, TrainingData

logger = logging.getLogger(__name__)

ALIVE_SECONDS = 1.0
VERDICT_SECONDS = 5.0
"""How long training pauses at an epoch boundary for the verdict. Longer than a healthy database takes, and short enough
that an outage costs little."""


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

    def open_checkpoints(self) -> CheckpointStore:
        """The store of this study's checkpoints."""
        return CheckpointStore(self.checkpoints, self.folder.study, owner=self.owner)


def main(connection: Connection, settings: TrainerSettings) -> None:
    """Entry point of the process: trains one pack after another until the pipe is closed."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
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


class _Trainer:
    """Answers `StartPack` with the messages of one pack."""

    def __init__(self, connection: Connection, settings: TrainerSettings) -> None:
        self._connection = connection
        self._settings = settings
        self._store = settings.open_checkpoints()
        self._data: TrainingData | None = None
        self._trials: dict[str, TrialStart] = {}
        self._best: dict[str, float] = {}
        self._stopping: dict[str, EarlyStopping] = {}
        self._started = False
        self._alive_at = 0.0
        self._owed = 0
        """Verdicts that are still to come."""

    def close(self) -> None:
        """Stops loader processes and lets go of the decoded images, whose file goes with the last reference."""
        if self._data is not None:
            self._data.close()
            self._data = None
        gc.collect()

    def serve(self) -> None:
        """Trains until the supervisor closes the pipe."""
        while True:
            message = self._connection.recv()
            if isinstance(message, StartPack):
                self._send(self._guarded(message))

    def _guarded(self, pack: StartPack) -> PackEnded | PackCrashed:
        try:
            self._train(pack.trials)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except InputError as error:
            return PackCrashed(str(error), fixable=True)
        except Exception as error:
            logger.exception("a pack of %d trials crashed", len(pack.trials))
            reason = f"{type(error).__name__}: {error}"
            return PackCrashed(reason, False, out_of_memory=_is_out_of_memory(error), started=self._started)
        return PackEnded()

    def _train(self, trials: Sequence[TrialStart]) -> None:
        self._trials = {trial.key: trial for trial in trials}
        self._best = {trial.key: trial.best_value for trial in trials if trial.best_value is not None}
        self._stopping = {trial.key: replace(trial.stopping) for trial in trials}
        self._owed = 0
        self._started = False
        with self._pulse():
            data = self._training_data(trials[0])
        starts = self._starts(trials)
        trainer = PackTrainer(
            self._settings.train, starts, on_batch=self._on_batch, on_evaluation_batch=self._tell_alive, data=data
        )
        self._started = True
        while not trainer.finished:
            reports = trainer.run_epoch()
            self._keep_weights(trainer, reports)
            self._send(EpochDone(tuple(reports)))
            self._owed += 1
            dropped = self._dropped(last=trainer.finished)
            trainer.drop([key for key in trainer.active if key in dropped])
            if not trainer.finished:
                self._secure(trainer)

    def _starts(self, trials: Sequence[TrialStart]) -> list[SlotStart]:
        """Loads checkpoints; the largest group that stands at one epoch starts, the others are left out."""
        notes: list[str] = []
        with self._pulse():
            found = {trial.key: self._load(trial, notes) for trial in trials}
        epochs = {key: 0 if state is None else state.epochs_done for key, state in found.items()}
        together = Counter(epochs.values()).most_common(1)[0][0]
        chosen = [trial for trial in trials if epochs[trial.key] == together]
        left_out = tuple(key for key in epochs if epochs[key] != together)
        standing = {key: (epochs[key], None if state is None else state.reference) for key, state in found.items()}
        self._send(PackStarted(standing, left_out, tuple(notes)))
        return [SlotStart(trial.key, trial.hyperparameters, _tree(found[trial.key])) for trial in chosen]

    def _load(self, trial: TrialStart, notes: list[str]) -> LoadedCheckpoint | None:
        if trial.epochs_done == 0:
            return None
        try:
            found = self._store.load(trial.number, trial.epochs_done, trial.checkpoint)
        except CheckpointError as error:
            notes.append(f"trial {trial.number} starts over with its seed, its checkpoint is unusable: {error}")
            return None
        notes.extend(f"trial {trial.number}: {reason}" for reason in found.skipped)
        return found

    def _training_data(self, trial: TrialStart) -> TrainingData:
        if self._data is None:
            try:
                self._data = TrainingData.load(self._settings.train, trial.hyperparameters)
            except OSError as error:
                # The machine's fault (a full disk, no memory to share), and no trial's.
                raise InputError(f"{self._settings.train.data}: the data cannot be loaded: {error}") from error
        return self._data

    def _dropped(self, *, last: bool) -> set[str]:
        """Trials that the supervisor has ended by now. After the last epoch its verdict is waited for."""
        drop: set[str] = set()
        deadline = time.monotonic() + VERDICT_SECONDS
        while self._owed and (last or self._connection.poll(max(0.0, deadline - time.monotonic()))):
            drop.update(self._connection.recv().drop)
            self._owed -= 1
        return drop

    def _keep_weights(self, trainer: PackTrainer, reports: Sequence[EpochReport]) -> None:
        """Writes the weights of the epoch that gives a trial its value: its last one, or its best one so far."""
        for report in reports:
            if report.metrics is not None and report.failure is None and self._counts(report):
                path = self._settings.folder.weights(self._trials[report.key].number)
                save_weights(path, trainer.slot_weights(report.key))

    def _counts(self, report: EpochReport) -> bool:
        assert report.metrics is not None
        if self._settings.objective.at == "last":
            # The supervisor, who decides from the stored epochs, will find the same.
            is_stuck = self._stopping[report.key].update(report.epoch, report.metrics.fitness)
            return is_stuck or report.epoch + 1 >= self._settings.train.epochs
        value = objective_value(self._settings.objective, report.metrics.to_mapping(), self._settings.class_names)
        if value < self._best.get(report.key, -math.inf):
            return False
        self._best[report.key] = value
        return True

    def _secure(self, trainer: PackTrainer) -> None:
        """Puts every slot that goes on on disk."""
        saved: dict[str, tuple[int, str]] = {}
        with self._pulse():
            for key in trainer.active:
                trial = self._trials[key]
                epochs = trainer.epochs[key]
                saved[key] = epochs, self._store.save(trial.number, trial.attempt, epochs, trainer.slot_state(key))
        self._send(Secured(saved))

    def _on_batch(self, _done: int, _total: int) -> None:
        self._tell_alive()

    def _tell_alive(self) -> None:
        now = time.monotonic()
        # A supervisor that owes a verdict waits for its database and reads nothing: the pipe must not fill up.
        if now - self._alive_at >= ALIVE_SECONDS and not self._owed:
            self._alive_at = now
            self._send(Alive())

    @contextmanager
    def _pulse(self) -> Iterator[None]:
        """Says that it is alive while one long call runs that cannot say so itself; nothing else may be sent inside."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(ALIVE_SECONDS):
                with suppress(OSError):
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


def _is_out_of_memory(error: Exception) -> bool:
    """Also on the CPU, where torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _tree(found: LoadedCheckpoint | None) -> Mapping[str, Any] | None:
    return None if found is None else found.tree
