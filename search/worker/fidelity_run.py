"""A pack of the first fidelity: cheap trainings, the best of which go on to the full one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from search.config import objective_value
from search.fidelity import is_promoted
from search.ledger import Ticket, TicketState, base_numbers
from search.settings import FidelityConfig
from search.worker.pack_run import PackRun, epoch_metrics
from yolocore.metrics import DetectionMetrics
from yolocore.training.trainer import EpochReport


class FidelityRun(PackRun):
    """Trains trials with frozen layers and lets the best back into the queue for their full training.

    It keeps no checkpoints: a training that is cut short is cheap to repeat, and what is stored of it counts.
    """

    in_fidelity = True

    @property
    def _fidelity(self) -> FidelityConfig:
        assert self._config.fidelity is not None
        return self._config.fidelity

    def train(self) -> None:
        """Trains all trials to the end of this fidelity; those that had got there before are only settled.

        Raises:
            TrainerDiedError, PackCrashedError, UserInputError: as in a full training.
        """
        for ticket in list(self.alive.values()):
            if ticket.fidelity_value is not None:
                self._unless_lost(ticket, partial(self._settle_trial, ticket))
                self._mirror.notify(ticket.id)
        if self.alive:
            super().train()

    def _store(self, ticket: Ticket, report: EpochReport, test: Mapping[str, DetectionMetrics]) -> None:  # noqa: ARG002
        if report.failure is not None:
            self.fail(ticket, f"{report.failure}, with {self._fidelity.freeze} layers frozen")
        elif report.metrics is not None:
            metrics = epoch_metrics(report)
            value = objective_value(self._config.objective, metrics, self._context.class_names)
            is_last = self._is_last(report)
            self._ledger.record_fidelity(ticket, report.epoch, value, metrics, is_last=is_last)

    def _judge(self, ticket: Ticket, report: EpochReport) -> None:
        if self._is_last(report):
            self._settle_trial(ticket)

    def _is_last(self, report: EpochReport) -> bool:
        return report.epoch + 1 >= self._fidelity.epochs

    def _settle_trial(self, ticket: Ticket) -> None:
        """Lets the trial go on to its full training, or ends it."""
        trials = [other for other in self._ledger.tickets(ticket.study) if other.kind == ticket.kind]
        is_base = ticket.number in base_numbers(trials)
        factor = self._fidelity.reduction_factor
        settled = self._ledger.settle_fidelity(
            ticket, lambda value, values: is_base or is_promoted(value, values, factor)
        )
        if settled.promoted:
            self._close(ticket)
        elif settled.fidelity_value is None:
            self.fail(ticket, "the objective is not finite after the training with frozen layers")
        else:
            self._finish(ticket, TicketState.PRUNED, None, self._reason(settled.fidelity_value))

    def _reason(self, value: float) -> str:
        fidelity = self._fidelity
        return (
            f"{value:.4g} after {fidelity.epochs} epochs with {fidelity.freeze} layers frozen, "
            f"not among the best 1/{fidelity.reduction_factor} so far"
        )
