"""Gives a claimed ticket its Optuna trial."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import optuna

from search.config import StudyConfig
from search.ledger import Ledger, Ticket, TrialTakenError
from search.study import ask


def link_trial(ledger: Ledger, study: optuna.Study, config: StudyConfig, ticket: Ticket) -> Ticket:
    """The ticket with its trial: its own, one that a dead worker left unlinked, or a new one.

    No lock is held, so a worker that is halted here keeps nobody else waiting. Trials and tickets stay one to one
    because a trial comes to be only while its ticket's lease holds (checked in the same transaction), says which ticket
    it was made for, so that the next attempt finds it, and is linked once.

    Raises:
        LeaseLostError: the ticket is no longer held.
    """
    while ticket.trial_id is None:
        owned = partial(ledger.owned_trial_ids, ticket)
        trial = ask(study, config, ticket.number, owned, ticket.fixed_params, ledger.condition(ticket))
        # Of two tickets that adopt the same trial at the same time one gets it, and the other takes another.
        with suppress(TrialTakenError):
            ticket = ledger.link_trial(ticket, trial.trial_id, trial.number, trial.params)
    return ticket
