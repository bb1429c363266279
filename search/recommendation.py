"""Which trial a study recommends: one answer for the exported file, the page, MLflow's summary and the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from search.config import StudyConfig
from search.confirm import latest_confirmation
from search.ledger import SEARCH, Ledger, Ticket, base_numbers
from search.statistics import Confirmation
from search.weights import complete_trials


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The trial to train with, and what that rests on."""

    ticket: Ticket
    is_base: bool
    """Whether it is the base: nothing is better, or nothing is shown to be."""
    is_decided: bool
    """Whether a finished confirmation says so; otherwise it is the best of single runs."""

    @property
    def standing(self) -> Literal["confirmed", "unconfirmed", "keep"]:
        """How far to believe it."""
        if self.is_base:
            return "keep"
        return "confirmed" if self.is_decided else "unconfirmed"

    @property
    def trial(self) -> int:
        """Its number, as people know it."""
        return self.ticket.number if self.ticket.trial_number is None else self.ticket.trial_number

    @property
    def why(self) -> str:
        """What it is, in a few words."""
        if self.is_decided:
            return "the base: the confirmation found no winner" if self.is_base else "the winner of the confirmation"
        return "the base: the best so far, unconfirmed" if self.is_base else "the best so far, unconfirmed"


def recommend(
    tickets: Sequence[Ticket], decided: Confirmation | None = None, candidates: Mapping[str, int] | None = None
) -> Recommendation | None:
    """The confirmed winner; the base where a finished confirmation has none; else the best single run.

    Args:
        tickets: All of a study of one objective.
        decided: Its finished confirmation, by the measure that decides; None without one.
        candidates: Trial number of each candidate of it, by what it calls them.

    Returns:
        None as long as there is nothing to recommend.
    """
    trials = [ticket for ticket in tickets if ticket.kind == SEARCH]
    complete, bases = complete_trials(trials), base_numbers(trials)
    if decided is None:
        found = next(iter(complete), None)
    elif decided.winner is not None:
        number = (candidates or {})[decided.winner.candidate]
        found = next(ticket for ticket in complete if number in (ticket.trial_number, ticket.number))
    else:
        # A base that failed in the search, and not in its reruns, has no better ticket than its first one.
        found = next((ticket for ticket in complete if ticket.number in bases), next(iter(trials), None))
    if found is None:
        return None
    return Recommendation(ticket=found, is_base=found.number in bases, is_decided=decided is not None)


def recommended(ledger: Ledger, config: StudyConfig) -> Recommendation | None:
    """What a study recommends as its ledger stands; a confirmation that is under way says nothing yet."""
    report = latest_confirmation(ledger, config)
    tickets = ledger.tickets(config.name)
    return recommend(tickets) if report is None else recommend(tickets, report.outcome, report.trials)
