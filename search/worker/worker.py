"""A worker: claims tickets, trains them as one pack, reports every epoch to the ledger."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import optuna

from search.config import StudyConfig, objective_value
from search.errors import LeaseLostError, SearchError, StudyStoppedError
from search.ledger import Ledger, Ticket, TicketState
from search.paths import StudyFolder
from search.space import hyperparameters, pack_limit
from search.study import ask, mirror_reports, orphans, should_prune, tell, trial_value
from search.worker.host import release_dead_neighbours
from search.worker.lease import LeaseKeeper
from search.worker.mirror import Mirror
from yolocore.checkpoint import load, save_atomic, save_weights
from yolocore.errors import CheckpointError, InputError
from yolocore.hyperparameters import Hyperparameters
from yolocore.training.config import TrainConfig
from yolocore.training.trainer import EpochReport, PackTrainer, SlotStart, TrainingData

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0

Action = Callable[[PackTrainer, Ticket, EpochReport], None]


class StopRequested(Exception):  # noqa: N818 - not an error: somebody asked the worker to end
    """A signal, a dead launcher or a lost lease ends the work between two batches."""


class StopFlag:
    """Set by SIGTERM, SIGINT, or when the launcher that started this worker is gone. A second Ctrl-C is immediate."""

    def __init__(self, parent: int | None = None) -> None:
        self._event = threading.Event()
        self._parent = parent

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        """Handles the signals inside the block."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._event.is_set():
            os._exit(128 + number)
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether the worker should end."""
        if self._parent is not None and os.getppid() != self._parent:
            self._event.set()
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        """Sleeps, but not longer than until a signal arrives."""
        self._event.wait(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Everything a worker needs, opened once."""

    config: StudyConfig
    train: TrainConfig
    class_names: tuple[str, ...]
    ledger: Ledger
    study: optuna.Study
    folder: StudyFolder
    worker_id: str
    lease_seconds: float
    deadline: float | None = None


class Worker:
    """Claims, trains and reports until the study's budget is spent or somebody asks it to stop."""

    def __init__(self, context: WorkerContext, mirror: Mirror, stop: StopFlag) -> None:
        self._context = context
        self._config = context.config
        self._ledger = context.ledger
        self._mirror = mirror
        self._stop = stop
        self._base = context.config.base_hyperparameters()
        self._data: TrainingData | None = None
        self._leases = LeaseKeeper(context.ledger, context.worker_id, context.lease_seconds)

    def run(self) -> int:
        """Works until nothing is left.

        Returns:
            Number of trials that ended here.

        Raises:
            StudyStoppedError: Too many trials in a row failed.
        """
        with self._leases:
            while not self._stop.is_set:
                self._check_failures()
                release_dead_neighbours(self._ledger, self._config.name)
                tickets = () if self._past_deadline() else self._claim()
                if tickets:
                    self._run_tickets(tickets)
                elif self._others_are_busy() and not self._past_deadline():
                    # Their tickets may still come back: whatever dies, somebody finishes it.
                    self._stop.wait(IDLE_SECONDS)
                else:
                    break
        return self._conclude()

    def _conclude(self) -> int:
        """Number of trials that ended here; after the last of the study, Optuna has no trial open either."""
        tickets = self._ledger.tickets(self._config.name)
        if all(ticket.state.is_final for ticket in tickets):
            with self._ledger.ask_lock(self._config.name):
                # A ticket that failed between `ask` and its link leaves a trial that nobody pays for.
                linked = self._ledger.linked_trial_ids(self._config.name)
                for trial_id in orphans(self._context.study, linked):
                    tell(self._context.study, trial_id, TicketState.FAIL)
        return sum(ticket.worker == self._context.worker_id and ticket.state.is_final for ticket in tickets)

    def _claim(self) -> tuple[Ticket, ...]:
        limit = pack_limit(self._config)
        tickets = self._ledger.claim(self._config.name, self._context.worker_id, limit, self._context.lease_seconds)
        self._leases.hold(ticket.id for ticket in tickets)
        return tickets

    def _others_are_busy(self) -> bool:
        return self._ledger.counts(self._config.name).get(TicketState.RUNNING, 0) > 0

    def _past_deadline(self) -> bool:
        return self._context.deadline is not None and time.time() >= self._context.deadline

    def _check_failures(self) -> None:
        count = self._ledger.failures_in_a_row(self._config.name)
        if count < self._config.max_failures_in_a_row:
            return
        failed = [t for t in self._ledger.tickets(self._config.name) if t.state is TicketState.FAIL]
        latest = sorted(failed, key=lambda ticket: ticket.finished or 0.0)[-count:]
        reasons = dict.fromkeys(ticket.reason or "no reason known" for ticket in latest)
        message = f"{count} trials in a row failed: {'; '.join(reasons)}"
        self._ledger.stop(self._config.name, message)
        raise StudyStoppedError(f"study {self._config.name} stopped: {message}")

    def _run_tickets(self, tickets: Sequence[Ticket]) -> None:
        """Trains claimed tickets to their ends; whatever happens, none stays with this worker."""
        try:
            linked = [self._with_trial(ticket) for ticket in tickets]
            for ticket in linked:
                self._mirror.notify(ticket.id)
            self._train(self._startable(linked))
        except StopRequested:
            return
        except LeaseLostError as error:
            logger.warning("another worker took over: %s", error)
        finally:
            self._hand_back(tickets)

    def _hand_back(self, tickets: Sequence[Ticket]) -> None:
        """Gives back those that are still ours and not finished, uncharged, at their last checkpoint."""
        self._leases.release(ticket.id for ticket in tickets)
        self._ledger.hand_back(tickets)
        for ticket in tickets:
            self._mirror.notify(ticket.id)

    def _with_trial(self, ticket: Ticket) -> Ticket:
        """Links the ticket to its Optuna trial: its own, one that a dead worker left unlinked, or a new one."""
        if ticket.trial_id is not None:
            return ticket
        with self._ledger.ask_lock(self._config.name):
            # Under the lock nobody is between `ask` and the link, so an unlinked running trial has lost its owner.
            linked = self._ledger.linked_trial_ids(self._config.name)
            trial = ask(self._context.study, self._config, ticket.number, linked, ticket.fixed_params)
            return self._ledger.link_trial(ticket, trial.trial_id, trial.number, trial.params)

    def _startable(self, tickets: Sequence[Ticket]) -> list[Trial]:
        """Loads checkpoints; trials of one pack start at the same epoch, so others wait for the next claim."""
        groups: dict[int, list[Trial]] = defaultdict(list)
        for ticket in tickets:
            trial = self._load(ticket)
            groups[trial.ticket.epochs_done].append(trial)
        largest = max(groups.values(), key=len)
        self._hand_back([trial.ticket for group in groups.values() if group is not largest for trial in group])
        return largest

    def _load(self, ticket: Ticket) -> Trial:
        if ticket.epochs_done == 0:
            return self._fresh(ticket)
        try:
            state = load(self._context.folder.checkpoint(ticket.number, ticket.epochs_done))
        except (CheckpointError, OSError) as error:
            return self._start_over(ticket, error)
        return Trial(ticket, replace(self._fresh(ticket).start, state=state))

    def _fresh(self, ticket: Ticket) -> Trial:
        hyp = hyperparameters(self._base, ticket.params or {})
        return Trial(ticket, SlotStart(key=str(ticket.id), hyperparameters=hyp))

    def _start_over(self, ticket: Ticket, error: Exception) -> Trial:
        logger.warning("trial %s starts over with its seed, its checkpoint is unusable: %s", ticket.trial_number, error)
        self._ledger.save_progress(ticket, 0, None)
        return self._fresh(replace(ticket, epochs_done=0, checkpoint=None))

    def _train(self, trials: Sequence[Trial]) -> None:
        """Trains one pack; a pack that crashes is retried trial by trial, so that the guilty one fails alone."""
        data = self._training_data(trials[0].start.hyperparameters)  # what fails here is no trial's fault
        run = PackRun(self._context, self._mirror, self._leases, self._check_stop, trials)
        try:
            run.train(data)
            return
        except (StopRequested, InputError, SearchError, CheckpointError):
            raise
        except Exception as error:  # whatever a trial raises is that trial's failure, not the study's
            logger.exception("a pack of %d trials crashed", len(trials))
            crash = error.with_traceback(None)  # the frames hold the pack's memory
        data.close()  # the pack may have died of its loader processes; new ones start by themselves
        alive = [trial for trial in trials if trial.ticket.id in run.alive and self._is_ours(trial.ticket)]
        if len(trials) > 1:
            for trial in alive:
                self._train([self._load(self._ledger.ticket(trial.ticket.id))])
        elif alive and alive[0].start.state is not None and not run.started:
            self._train([self._start_over(alive[0].ticket, crash)])
        elif alive:
            run.fail(alive[0].ticket, f"{type(crash).__name__}: {crash}")

    def _is_ours(self, ticket: Ticket) -> bool:
        """Whether the attempt still is this worker's: what the ledger has now may be another's."""
        now = self._ledger.ticket(ticket.id)
        return now.state is TicketState.RUNNING and now.attempt == ticket.attempt

    def _training_data(self, hyp: Hyperparameters) -> TrainingData:
        if self._data is None:
            self._data = TrainingData.load(self._context.train, hyp)
        return self._data

    def _check_stop(self, _done: int, _total: int) -> None:
        if self._stop.is_set:
            raise StopRequested


@dataclass(frozen=True, slots=True)
class Trial:
    """A claimed ticket and how its slot starts."""

    ticket: Ticket
    start: SlotStart


class PackRun:
    """One pack from its first to its last epoch, every report going to the ledger first."""

    def __init__(
        self,
        context: WorkerContext,
        mirror: Mirror,
        leases: LeaseKeeper,
        on_batch: Callable[[int, int], None],
        trials: Sequence[Trial],
    ) -> None:
        self._context = context
        self._config = context.config
        self._ledger = context.ledger
        self._mirror = mirror
        self._leases = leases
        self._on_batch = on_batch
        self._trials = trials
        self.started = False
        self.alive = {trial.ticket.id: trial.ticket for trial in trials}

    def train(self, data: TrainingData) -> None:
        """Trains all trials to their ends."""
        starts = [trial.start for trial in self._trials]
        trainer = PackTrainer(self._context.train, starts, data=data, on_batch=self._on_batch)
        self.started = True
        while not trainer.finished:
            self._settle(trainer, trainer.run_epoch())
            trainer.drop([key for key in trainer.active if int(key) not in self.alive])

    def fail(self, ticket: Ticket, reason: str) -> None:
        """Ends a trial as FAIL."""
        self._finish(ticket, TicketState.FAIL, None, reason)

    def _settle(self, trainer: PackTrainer, reports: Sequence[EpochReport]) -> None:
        """Stores the epoch of every slot before any is judged, so that neighbours are compared at the same epoch."""
        for ticket_id in self._leases.lost & set(self.alive):
            self._forget(self.alive[ticket_id])
        for act in (self._store, self._judge):
            for report in reports:
                ticket = self.alive.get(int(report.key))
                if ticket is not None:
                    self._guarded(act, trainer, ticket, report)

    def _guarded(self, act: Action, trainer: PackTrainer, ticket: Ticket, report: EpochReport) -> None:
        try:
            act(trainer, ticket, report)
        except LeaseLostError:
            self._forget(ticket)
        self._mirror.notify(ticket.id)

    def _store(self, trainer: PackTrainer, ticket: Ticket, report: EpochReport) -> None:
        """Writes the report; a repeated epoch keeps what was stored the first time."""
        if report.failure is not None:
            self.fail(ticket, report.failure)
        elif report.metrics is not None:
            metrics = epoch_metrics(report)
            value = objective_value(self._config.objective, metrics, self._context.class_names)
            row = self._ledger.record_epoch(ticket, report.epoch, value, metrics, time.time())
            mirror_reports(self._context.study, trial_id_of(ticket), [row])
            self._keep_weights(trainer, ticket, report)

    def _judge(self, trainer: PackTrainer, ticket: Ticket, report: EpochReport) -> None:
        """Ends the trial, or secures it at this epoch boundary."""
        if report.epoch + 1 >= self._context.train.epochs:
            self._end(ticket, TicketState.COMPLETE)
        elif report.metrics is not None and self._decide(ticket, report.epoch):
            self._end(ticket, TicketState.PRUNED)
        else:
            self._save_checkpoint(trainer, ticket, report.epoch + 1)

    def _decide(self, ticket: Ticket, epoch: int) -> bool:
        # Pruners change their state when asked, so each evaluation is asked about once and the answer is kept.
        stored = next((row for row in self._ledger.reports(ticket.id) if row.epoch == epoch), None)
        if stored is None or stored.prune is None:
            prune = should_prune(self._context.study, self._config, trial_id_of(ticket), epoch + 1)
            stored = self._ledger.decide(ticket, epoch, prune)
        return bool(stored.prune)

    def _end(self, ticket: Ticket, state: TicketState) -> None:
        """Ends a trial with the value that its stored epochs give it."""
        found = trial_value(self._config.objective, self._ledger.reports(ticket.id))
        if found is None and state is TicketState.COMPLETE:
            self.fail(ticket, "the objective of the last epoch is not finite")
        else:
            value, epoch = found or (None, None)
            self._finish(ticket, state, value, None, epoch)

    def _finish(
        self, ticket: Ticket, state: TicketState, value: float | None, reason: str | None, epoch: int | None = None
    ) -> None:
        self._ledger.finish(ticket, state, value, reason, epoch)
        self._close(ticket)
        tell(self._context.study, trial_id_of(ticket), state, value)
        for path in self._context.folder.checkpoints(ticket.number):
            path.unlink(missing_ok=True)

    def _save_checkpoint(self, trainer: PackTrainer, ticket: Ticket, epochs_done: int) -> None:
        path = self._context.folder.checkpoint(ticket.number, epochs_done)
        save_atomic(path, trainer.slot_state(str(ticket.id)))
        self._ledger.save_progress(ticket, epochs_done, str(path))
        for old in self._context.folder.checkpoints(ticket.number):
            if old != path:
                old.unlink(missing_ok=True)

    def _keep_weights(self, trainer: PackTrainer, ticket: Ticket, report: EpochReport) -> None:
        """Keeps the weights of the epoch that gives the trial its value, as far as that is known by now."""
        found = trial_value(self._config.objective, self._ledger.reports(ticket.id))
        is_last = report.epoch + 1 >= self._context.train.epochs
        if found is not None and found[1] == report.epoch and (is_last or self._config.objective.at == "best"):
            save_weights(self._context.folder.weights(ticket.number), trainer.slot_weights(report.key))

    def _forget(self, ticket: Ticket) -> None:
        """Another worker continues this trial: nothing more of it is written here."""
        logger.warning("trial %s was taken over by another worker", ticket.trial_number)
        self._close(ticket)

    def _close(self, ticket: Ticket) -> None:
        self.alive.pop(ticket.id, None)
        self._leases.release([ticket.id])


def trial_id_of(ticket: Ticket) -> int:
    """The Optuna trial of a ticket that trains."""
    if ticket.trial_id is None:
        raise LookupError(f"ticket {ticket.number} of study {ticket.study} has no trial yet")
    return ticket.trial_id


def epoch_metrics(report: EpochReport) -> dict[str, float]:
    """What the ledger keeps of an evaluated epoch: metrics, losses, learning rates, seconds."""
    metrics = report.metrics.to_mapping() if report.metrics is not None else {}
    bias, decay, norm = report.lr
    return {
        **metrics,
        "train_box": report.train_box,
        "train_obj": report.train_obj,
        "train_cls": report.train_cls,
        "lr_bias": bias,
        "lr_decay": decay,
        "lr_norm": norm,
        "seconds": report.seconds,
    }
