"""Where a worker's tickets come from: claimed, given their trials, kept alive, and handed back if they did not end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from search.errors import LeaseLostError, StudyStoppedError
from search.ledger import Ticket
from search.worker.context import WorkerContext
from search.worker.host import release_dead_neighbours
from search.worker.lease import LeaseKeeper
from search.worker.linking import link_trial
from search.worker.mirror import Mirror

logger = logging.getLogger(__name__)


class Supply:
    """Gives tickets to a worker's packs and takes back what did not end.

    Args:
        context: What the parts of a worker share.
        mirror: Told of every ticket whose state changed.
        leases: Keeps what is claimed.
        is_over: Whether nothing new may be claimed any more.
    """

    def __init__(
        self, context: WorkerContext, mirror: Mirror, leases: LeaseKeeper, is_over: Callable[[], bool]
    ) -> None:
        self._context = context
        self._ledger = context.ledger
        self._study = context.config.name
        self._mirror = mirror
        self._leases = leases
        self._is_over = is_over
        self._claimed: dict[int, Ticket] = {}

    def first(self, limit: int) -> tuple[Ticket, ...]:
        """Tickets with their trials, for a new pack; none if there are none or it is over.

        Raises:
            StudyStoppedError: The study gives out no more tickets.
        """
        return () if self._is_over() else self._with_trials(self._claim(limit, joining=False))

    def more(self, limit: int) -> tuple[Ticket, ...]:
        """Tickets that join a running pack, with their trials. A study that was stopped gives none."""
        if limit < 1 or self._is_over():
            return ()
        # A pack that is refilled may last as long as the study: the dead have to be looked for in between.
        release_dead_neighbours(self._ledger, self._study)
        try:
            return self._with_trials(self._claim(limit, joining=True))
        except StudyStoppedError as error:
            logger.warning("no more trials join: %s", error)
            return ()

    def hand_back(self, tickets: Sequence[Ticket] | None = None) -> None:
        """Gives back those that are still ours and not finished, uncharged, at their last checkpoint.

        Args:
            tickets: Which; all that were claimed and not handed back yet if None.
        """
        held = self._leases.held
        chosen = [ticket for ticket in (self._claimed.values() if tickets is None else tickets) if ticket.id in held]
        self._leases.release(ticket.id for ticket in chosen)
        self._ledger.hand_back(chosen)
        for ticket in chosen:
            self._mirror.notify(ticket.id)
        self._forget_ended()

    def _claim(self, limit: int, *, joining: bool) -> tuple[Ticket, ...]:
        self._forget_ended()
        seconds = self._context.lease_seconds
        tickets = self._ledger.claim(self._study, self._context.worker_id, limit, seconds, joining=joining)
        self._claimed.update({ticket.id: ticket for ticket in tickets})
        self._leases.hold(ticket.id for ticket in tickets)
        return tickets

    def _forget_ended(self) -> None:
        held = self._leases.held
        self._claimed = {number: ticket for number, ticket in self._claimed.items() if number in held}

    def _with_trials(self, tickets: Sequence[Ticket]) -> tuple[Ticket, ...]:
        linked = []
        for ticket in tickets:
            try:
                linked.append(link_trial(self._ledger, self._context.study, self._context.config, ticket))
            except LeaseLostError as error:
                logger.warning("another worker took over: %s", error)
                self._leases.release([ticket.id])
            else:
                self._mirror.notify(ticket.id)
        return tuple(linked)
