"""One pack, seen from the supervisor: every report goes to the ledger first, then to the mirrors."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from search.checkpoints import CheckpointStore
from search.config import objective_value, objective_values
from search.errors import LeaseLostError, SearchError, UserInputError
from search.ledger import KINDS, EpochRow, Ticket, TicketState
from search.settings import ObjectiveConfig
from search.study import mirror_reports, should_prune, tell, trial_value
from search.transforms import hyperparameters
from search.weights import WeightsStore, kept_numbers, value_row
from search.worker.context import WorkerContext
from search.worker.lease import LeaseKeeper
from search.worker.messages import (
    Cohort,
    EpochDone,
    PackCrashed,
    PackEnded,
    Secured,
    Standing,
    StartPack,
    TrialStart,
    Verdict,
)
from search.worker.mirror import Mirror
from search.worker.trainer_link import TrainerLink
from yolocore.errors import CheckpointError, HyperparameterError
from yolocore.metrics import DetectionMetrics
from yolocore.training.optim import EarlyStopping
from yolocore.training.trainer import EpochReport

logger = logging.getLogger(__name__)

Refill = Callable[[int], Sequence[Ticket]]
"""Gives further tickets, with their trials, to a pack that trains so many now."""


class PackCrashedError(SearchError):
    """An exception in the trainer ended the pack."""

    def __init__(self, message: PackCrashed) -> None:
        """Keeps what the trainer said."""
        super().__init__(message.reason)
        self.out_of_memory = message.out_of_memory
        self.started = message.started


class PackRun:
    """One pack from its first to its last epoch.

    Attributes:
        alive: Tickets that are in the pack and not ended, by id.
        total: How many tickets ever were in it.
    """

    in_fidelity = False
    """Whether this is the cheap training before the full one."""

    def __init__(
        self,
        context: WorkerContext,
        mirror: Mirror,
        leases: LeaseKeeper,
        trainer: TrainerLink,
        store: CheckpointStore,
        tickets: Sequence[Ticket],
        refill: Refill | None = None,
    ) -> None:
        """Takes the tickets that start together, at least one; without `refill` the pack only shrinks.

        Reruns have no trial in Optuna, are not pruned, and leave no weights.
        """
        self._context = context
        self._config = context.config
        self._ledger = context.ledger
        self._mirror = mirror
        self._leases = leases
        self._trainer = trainer
        self._cohort = cohort_of(tickets[0])
        self._epochs = context.train.epochs if self._cohort is None else self._cohort.epochs
        self._checkpoints = store if self._cohort is None else store.of_kind(self._cohort.kind)
        self._refill = refill
        self._weights = WeightsStore(store.place, context.config.name)
        self.alive = {ticket.id: ticket for ticket in tickets}
        self.total = len(tickets)

    def train(self) -> None:
        """Trains all trials to their ends, those included that join on the way.

        Raises:
            TrainerDiedError: The trainer process is gone.
            PackCrashedError: Something in the pack raised.
            UserInputError: Data, weights or device cannot be used; no trial is to blame.
        """
        starts = self._starts(list(self.alive.values()))
        if not starts:
            return
        self._trainer.send(StartPack(starts, self.in_fidelity, self._cohort))
        while not isinstance(message := self._trainer.receive(), PackEnded):
            match message:
                case Standing():
                    self._note_standing(message)
                case EpochDone():
                    self._settle(message)
                    over = tuple(report.key for report in message.reports if int(report.key) not in self.alive)
                    self._trainer.send(Verdict(over, self._join()))
                case Secured():
                    self._note_progress(message)
                case PackCrashed():
                    raise UserInputError(message.reason) if message.fixable else PackCrashedError(message)

    def _join(self) -> tuple[TrialStart, ...]:
        """The trials that take the places of those that have ended."""
        tickets = () if self._refill is None else self._refill(len(self.alive))
        self.alive.update({ticket.id: ticket for ticket in tickets})
        self.total += len(tickets)
        return self._starts(tickets)

    def _starts(self, tickets: Iterable[Ticket]) -> tuple[TrialStart, ...]:
        """What the trainer needs of them. One whose hyperparameters mean nothing fails, and the others go on."""
        starts = []
        for ticket in tickets:
            try:
                starts.append(self._start(ticket))
            except HyperparameterError as error:
                logger.warning("%s fails: %s", ticket.label, error)
                self._unless_lost(ticket, partial(self.fail, ticket, f"cannot be trained: {error}"))
        return tuple(starts)

    def fail(self, ticket: Ticket, reason: str) -> None:
        """Ends a trial as FAIL."""
        self._finish(ticket, TicketState.FAIL, None, reason)
        self._mirror.notify(ticket.id)

    def _start(self, ticket: Ticket) -> TrialStart:
        rows = self._ledger.reports(ticket.id)
        found = trial_value(counting_best(self._config.objective), rows)
        done = [row for row in rows if row.epoch < ticket.epochs_done]
        return TrialStart(
            key=str(ticket.id),
            number=ticket.number,
            attempt=ticket.attempt,
            hyperparameters=hyperparameters(self._config, ticket.params or {}),
            epochs_done=ticket.epochs_done,
            checkpoint=ticket.checkpoint,
            best_value=None if found is None else found[0],
            stopping=early_stopping(self._context.train.patience, done),
        )

    def _note_standing(self, message: Standing) -> None:
        """Takes note of trials that do not start where their checkpoint should have been."""
        for note in message.notes:
            logger.warning("%s", note)
        for key, (epochs, reference) in message.epochs.items():
            ticket = self.alive.get(int(key))
            if ticket is not None and epochs != ticket.epochs_done:
                self._unless_lost(ticket, partial(self._ledger.save_progress, ticket, epochs, reference))

    def _note_progress(self, message: Secured) -> None:
        for key, (epochs, name) in message.checkpoints.items():
            ticket = self.alive.get(int(key))
            if ticket is not None:
                self._unless_lost(ticket, partial(self._progressed, ticket, epochs, name))

    def _progressed(self, ticket: Ticket, epochs: int, reference: str) -> None:
        self._ledger.save_progress(ticket, epochs, reference)
        # Only now: an attempt that is over has failed above, and deletes nothing of its successor's.
        self._tidy(partial(self._checkpoints.keep_latest, ticket.number, epochs))
        if self._config.objective.at == "best" and self._keeps_weights:
            self._tidy(partial(self._drop_beaten_weights, ticket))

    def _drop_beaten_weights(self, ticket: Ticket) -> None:
        """Deletes the weights of epochs that were a trial's best once."""
        rows = self._ledger.reports(ticket.id)
        found = trial_value(self._config.objective, rows)
        best = next((row for row in rows if found is not None and row.epoch == found[1]), None)
        if (file := self._weights.find(ticket.number, best)) is not None:
            self._weights.drop_before(ticket.number, file)

    def _settle(self, message: EpochDone) -> None:
        """Stores the epoch of every slot before any is judged, so that those at the same epoch are compared."""
        for ticket_id in self._leases.lost & set(self.alive):
            self._forget(self.alive[ticket_id])
        for act in (partial(self._store, test=message.test), self._judge):
            for report in message.reports:
                ticket = self.alive.get(int(report.key))
                if ticket is not None:
                    self._unless_lost(ticket, partial(act, ticket, report))
                    self._mirror.notify(ticket.id)

    def _unless_lost(self, ticket: Ticket, act: Callable[[], object]) -> None:
        # Each may wait for the database for long.
        self._leases.note_alive()
        try:
            act()
        except LeaseLostError:
            self._forget(ticket)

    def _store(self, ticket: Ticket, report: EpochReport, test: Mapping[str, DetectionMetrics]) -> None:
        """Writes the report; a repeated epoch keeps what was stored the first time."""
        if report.failure is not None:
            self.fail(ticket, report.failure)
        elif report.metrics is not None:
            metrics = epoch_metrics(report, test.get(report.key))
            value = objective_value(self._config.objective, metrics, self._context.class_names)
            if (tested := test.get(report.key)) is not None:
                names = self._context.class_names
                on_test = objective_value(self._config.objective, tested.to_mapping(), names)
                metrics[f"{TEST_PREFIX}objective"] = on_test
            row = self._ledger.record_epoch(ticket, report.epoch, value, metrics, time.time())
            if not ticket.is_rerun and not self._config.objectives:  # Optuna has no curves of several
                mirror_reports(self._context.study, trial_id_of(ticket), [row])

    def _judge(self, ticket: Ticket, report: EpochReport) -> None:
        """Ends the trial, or lets it go on."""
        if report.epoch + 1 >= self._epochs:
            self._end(ticket, TicketState.COMPLETE)
        elif report.metrics is not None and self._is_stuck(ticket, report.epoch):
            patience = self._context.train.patience
            self._end(ticket, TicketState.COMPLETE, f"no better fitness for {patience} epochs: ended by patience")
        elif report.metrics is not None and self._decide(ticket, report.epoch):
            self._end(ticket, TicketState.PRUNED)

    def _is_stuck(self, ticket: Ticket, epoch: int) -> bool:
        """Whether the stored epochs say that fitness has not improved for `train.patience` epochs."""
        patience = self._context.train.patience
        if patience == 0 or epoch < patience:
            return False
        rows = [row for row in self._ledger.reports(ticket.id) if row.epoch <= epoch]
        return early_stopping(patience, rows).exhausted(epoch)

    def _decide(self, ticket: Ticket, epoch: int) -> bool:
        if ticket.is_rerun:
            return False
        # Pruners change their state when asked, so each evaluation is asked about once and the answer is kept.
        stored = next((row for row in self._ledger.reports(ticket.id) if row.epoch == epoch), None)
        if stored is None or stored.prune is None:
            prune = should_prune(self._context.study, self._config, trial_id_of(ticket), epoch + 1)
            stored = self._ledger.decide(ticket, epoch, prune)
        return bool(stored.prune)

    def _end(self, ticket: Ticket, state: TicketState, reason: str | None = None) -> None:
        """Ends a trial with the value that its stored epochs give it."""
        rows = self._ledger.reports(ticket.id)
        found = trial_value(self._config.objective, rows)
        value, epoch = found or (None, None)
        values = self._values_at(rows, epoch)
        if state is TicketState.COMPLETE and (found is None or not all(map(math.isfinite, values))):
            self.fail(ticket, "the objective of the last epoch is not finite")
        else:
            self._finish(ticket, state, value, reason, epoch, values or None)

    def _values_at(self, rows: Sequence[EpochRow], epoch: int | None) -> tuple[float, ...]:
        """The values of one stored epoch under several objectives; () in a study of one."""
        row = next((row for row in rows if row.epoch == epoch), None)
        return () if row is None else objective_values(self._config, row.metrics, self._context.class_names)

    def _finish(
        self,
        ticket: Ticket,
        state: TicketState,
        value: float | None,
        reason: str | None,
        epoch: int | None = None,
        values: tuple[float, ...] | None = None,
    ) -> None:
        ended = self._ledger.finish(ticket, state, value, reason, epoch, values)
        self._close(ticket)
        if not ticket.is_rerun:
            tell(self._context.study, trial_id_of(ticket), state, ended.told)
        self._tidy(partial(self._checkpoints.delete, ticket.number))
        if self._keeps_weights:
            self._tidy(partial(self._sort_weights, ticket))

    @property
    def _keeps_weights(self) -> bool:
        return self._cohort is None and self._config.train.keep_weights != "none"

    def _sort_weights(self, ticket: Ticket) -> None:
        """Keeps the weights of a trial that has ended if they count, and lets go of those that they beat."""
        policy, tickets = self._config.train.keep_weights, self._ledger.tickets(self._config.name, KINDS)
        kept = kept_numbers(tickets, policy)
        kept_before = kept_numbers([other for other in tickets if other.id != ticket.id], policy)
        # What two workers at the same moment leave, `clean` finds.
        for number in {ticket.number, *kept_before} - kept:
            self._weights.keep(number, None)
        if ticket.number in kept:
            row = value_row(self._ledger.ticket(ticket.id), self._ledger.reports(ticket.id))
            file = self._weights.find(ticket.number, row)
            if file is None:
                logger.warning("trial %s: the weights of its epoch are not there", ticket.trial_number)
            else:
                self._weights.keep(ticket.number, file)

    @staticmethod
    def _tidy(act: Callable[[], object]) -> None:
        """Deletes what nobody needs; where that fails, `yolosearch clean` does it later."""
        try:
            act()
        except CheckpointError as error:
            logger.warning("%s", error)

    def _forget(self, ticket: Ticket) -> None:
        """Another worker continues this trial: nothing more of it is written here."""
        logger.warning("%s was taken over by another worker", ticket.label)
        self._close(ticket)

    def _close(self, ticket: Ticket) -> None:
        self.alive.pop(ticket.id, None)
        self._leases.release([ticket.id])


def early_stopping(patience: int, rows: Iterable[EpochRow]) -> EarlyStopping:
    """Where a trial stands whose evaluated epochs are `rows`, in order."""
    return EarlyStopping.after(patience, ((row.epoch, row.metrics["fitness"]) for row in rows))


def counting_best(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same objective, counting a trial's best epoch."""
    return objective.model_copy(update={"at": "best"})


def trial_id_of(ticket: Ticket) -> int:
    """The Optuna trial of a ticket that trains."""
    if ticket.trial_id is None:
        raise LookupError(f"ticket {ticket.number} of study {ticket.study} has no trial yet")
    return ticket.trial_id


def cohort_of(ticket: Ticket) -> Cohort | None:
    """The cohort of a rerun; None for a trial of the search.

    Raises:
        LookupError: A rerun without its seed or its length.
    """
    if not ticket.is_rerun:
        return None
    if ticket.seed is None or ticket.epochs is None:
        raise LookupError(f"{ticket.label} of study {ticket.study} says neither seed nor epochs")
    return Cohort(ticket.kind, ticket.seed, ticket.epochs)


TEST_PREFIX = "test/"
"""Of metrics on the test split."""


def epoch_metrics(report: EpochReport, test: DetectionMetrics | None = None) -> dict[str, float]:
    """What the ledger keeps of an evaluated epoch: metrics, losses, learning rates, seconds."""
    metrics = report.metrics.to_mapping() if report.metrics is not None else {}
    if test is not None:
        metrics |= {f"{TEST_PREFIX}{key}": value for key, value in test.to_mapping().items()}
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
        "eval_seconds": report.evaluation_seconds,
        "slots": report.slots,
        "stream_epoch": report.stream_epoch,
    }
