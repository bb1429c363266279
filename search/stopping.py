"""When a study should give out no more trials: its time is over, or nothing is left to gain beyond the noise."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.terminator import RegretBoundEvaluator
from optuna.trial import FrozenTrial, TrialState

from search.config import StudyConfig
from search.errors import UserInputError
from search.ledger import NOISE, Ledger, StopKind, StudyRecord, Ticket, TicketState
from search.statistics import spread

logger = logging.getLogger(__name__)

LEAST_SEEDS = 3
"""Fewer reruns say too little of the noise to end a study by it."""

LEAST_TRIALS = 20
"""Optuna's own smallest number for such a decision."""

LEAST_NEW_TRIALS = 5
"""A study that was taken up again after it had stopped gets at least so many."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a study gives out no more tickets."""

    kind: StopKind
    reason: str


def measured_noise(tickets: Sequence[Ticket]) -> float | None:
    """Standard deviation of the base over seeds, from the study's noise tickets; None as long as there are too few."""
    values = [
        ticket.value
        for ticket in tickets
        if ticket.kind == NOISE and ticket.state is TicketState.COMPLETE and ticket.value is not None
    ]
    return spread(values).sd if len(values) >= LEAST_SEEDS else None


def require_noise(config: StudyConfig, ledger: Ledger | None, planned: int = 0) -> None:
    """Refuses `stop.below_noise` where no noise will ever be known.

    Args:
        config: the study.
        ledger: in its database; None where the study does not exist yet.
        planned: reruns of the base that are added next, beside those of the study file.

    Raises:
        UserInputError: the study file measures no noise, and the study has no noise tickets.
    """
    if not config.stop.below_noise or max(config.noise.seeds, planned) >= LEAST_SEEDS:
        return
    if ledger is not None and len(ledger.tickets(config.name, (NOISE,))) >= LEAST_SEEDS:
        return
    # By its name a study is only found once it exists; by its file it is created.
    study = "STUDY.yaml" if ledger is None else config.name
    creates = ", which creates the study" if ledger is None else ""
    raise UserInputError(
        f"study {config.name}: stop.below_noise: got true, and nothing measures the noise; allowed: with "
        f"noise: {{seeds: {LEAST_SEEDS} or more}} in the study file, or after "
        f"`yolosearch noise {study} --seeds {LEAST_SEEDS}`{creates}"
    )


def gain_left(trials: Sequence[FrozenTrial]) -> float:
    """An upper bound of what the search may still gain over its best trials, in the objective's unit.

    The regret bound of Optuna's terminator (Makarova et al. 2022): a Gaussian process through the better half of the
    trials, its upper confidence bound anywhere in the space less its lower one at the best trial.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        evaluator = RegretBoundEvaluator(seed=0)
    return float(evaluator.evaluate(list(trials), StudyDirection.MAXIMIZE))


def out_of_time(record: StudyRecord, now: float, hours: float) -> Stop | None:
    """Whether a study's hours are over, counted from its creation, or from when it was taken up again.

    Args:
        record: of the study.
        now: UTC epoch seconds.
        hours: that it has.
    """
    if now - max(record.created, record.resumed or 0.0) < hours * 3600:
        return None
    return Stop(StopKind.TIME, f"its {hours:g} hours are over (stop.hours)")


class StoppingRules:
    """The rules of one study, asked by every worker before it claims; whoever finds one met stops the study for all.

    Args:
        config: the study.
        ledger: in its database.
        study: in Optuna.
    """

    def __init__(self, config: StudyConfig, ledger: Ledger, study: optuna.Study) -> None:
        self._config = config
        self._ledger = ledger
        self._study = study
        self._judged = 0
        """Complete trials when the gain that is left was judged last."""

    def apply(self) -> bool:
        """Whether the study gives out no more tickets; stops it if a rule says so now."""
        stop = self._config.stop
        if stop.hours is None and not stop.below_noise:
            return False
        record = self._ledger.study(self._config.name)
        if record.stop_reason is not None:
            return True
        found = None if stop.hours is None else out_of_time(record, self._ledger.now(), stop.hours)
        if found is None and stop.below_noise:
            found = self._below_noise(record)
        if found is not None:
            logger.info("study %s stops: %s", self._config.name, found.reason)
            self._ledger.stop(self._config.name, found.reason, found.kind)
        return found is not None

    def _below_noise(self, record: StudyRecord) -> Stop | None:
        """Judges once for each trial that became complete."""
        tickets = self._ledger.tickets(self._config.name)
        ended = [ticket for ticket in tickets if ticket.state is TicketState.COMPLETE]
        new = sum((ticket.finished or 0.0) > (record.resumed or 0.0) for ticket in ended)
        noise = measured_noise(self._ledger.tickets(self._config.name, (NOISE,)))
        is_too_early = len(ended) < LEAST_TRIALS or (record.resumed is not None and new < LEAST_NEW_TRIALS)
        if noise is None or is_too_early or len(ended) == self._judged:
            return None
        self._judged = len(ended)
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(complete) < LEAST_TRIALS:
            return None
        gain = gain_left(complete)
        logger.info("study %s: at most %.4f left to gain, noise %.4f", self._config.name, gain, noise)
        if gain >= noise:
            return None
        text = f"at most {gain:.4f} is left to gain, less than the noise of a rerun ({noise:.4f}, stop.below_noise)"
        return Stop(StopKind.NOISE, f"{text} after {len(complete)} complete trials")
