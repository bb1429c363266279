"""Where a worker's tickets come from: claimed, given their trials, kept alive, and handed back if they did not end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from search.errors import LeaseLostError, StudyStoppedError
from search.fidelity import in_fidelity
from search.ledger import MAX_STALLED, SEARCH, Ticket
from search.space import PackKey, pack_key, packs_by_value
from search.worker.context import WorkerContext
from search.worker.host import release_dead_neighbours
from search.worker.lease import LeaseKeeper
from search.worker.linking import link_trial
from search.worker.mirror import Mirror

logger = logging.getLogger(__name__)


PARKED_TRIALS = 8
"""So many trials may wait for a pack that they fit into before no more are proposed to fill another one."""


class Supply:
    """Gives tickets to a worker's packs and takes back what did not end.

    Args:
        context: What the parts of a worker share.
        mirror: Told of every ticket whose state changed.
        leases: Keeps what is claimed.
        is_over: Whether nothing new may be claimed any more.
        check: Called before each proposal, which may take a second; what it raises ends the claim.
    """

    def __init__(
        self,
        context: WorkerContext,
        mirror: Mirror,
        leases: LeaseKeeper,
        is_over: Callable[[], bool],
        check: Callable[[], None],
    ) -> None:
        self._context = context
        self._ledger = context.ledger
        self._config = context.config
        self._mirror = mirror
        self._leases = leases
        self._is_over = is_over
        self._check = check
        self._claimed: dict[int, Ticket] = {}
        self._group: tuple[bool, PackKey] | None = None
        """What the trials of the pack have to agree in: whether they are in the first fidelity, and what they share;
        None where anything goes."""
        self._limit = 0
        """The most trials that the pack may have."""

    def first(self, limit: int) -> tuple[Ticket, ...]:
        """Tickets for a new pack, of one kind, trials with their parameters; none if there are none or it is over.

        Raises:
            StudyStoppedError: The search gives out no more tickets, and there are no others.
        """
        for kind in () if self._is_over() else self._context.kinds:
            found = self._first_trials(limit) if kind == SEARCH else self._cohort(kind, limit)
            if found:
                return found
        return ()

    def _cohort(self, kind: str, limit: int) -> tuple[Ticket, ...]:
        """Reruns of one seed that stand at the same epoch; they are claimed at once, so that no two workers share them.

        Those that the pack has no room for come in a later one, or in another worker's, on the same images.
        """
        tickets = self._claim(limit, kind=kind, joining=False, alike=self._alike)
        for ticket in tickets:
            self._mirror.notify(ticket.id)
        return tickets

    def _alike(self, first: Ticket, other: Ticket) -> bool:
        """Whether two reruns may share a pack."""
        if (first.seed, first.epochs, first.epochs_done) != (other.seed, other.epochs, other.epochs_done):
            return False
        return pack_key(self._config, first.params or {}) == pack_key(self._config, other.params or {})

    def _first_trials(self, limit: int) -> tuple[Ticket, ...]:
        self._group, self._limit = None, limit
        if not packs_by_value(self._config) and self._config.fidelity is None:
            return self._with_trials(self._claim(limit, joining=False))
        first = self._with_trials(self._claim(1, joining=False))
        if not first or first[0].stalled_attempts >= MAX_STALLED - 1:
            return first
        self._group = self._group_of(first[0])
        return (*first, *self._fitting(limit - 1))

    def more(self, limit: int) -> tuple[Ticket, ...]:
        """Tickets that join a running pack, with their trials. A study that was stopped gives none."""
        if limit < 1 or self._is_over():
            return ()
        # A pack that is refilled may last as long as the study: the dead have to be looked for in between.
        release_dead_neighbours(self._ledger, self._config.name)
        try:
            if self._group is not None:
                return () if self._full_pack_waits() else self._fitting(limit)
            return self._with_trials(self._claim(limit, joining=True))
        except StudyStoppedError as error:
            logger.warning("no more trials join: %s", error)
            return ()

    def _fitting(self, limit: int) -> tuple[Ticket, ...]:
        """Tickets whose trials may share the pack: known ones first, then new proposals as long as few are turned away.

        A trial that does not fit is parked: it goes back with its parameters and waits for a pack of its own kind.
        """
        found = [*self._with_trials(self._claim(limit, joining=True, accept=self._fits))]
        for _ in range(limit - len(found) if self._takes_proposals() else 0):
            if self._ledger.parked(self._config.name) >= PARKED_TRIALS:
                break
            asked = self._with_trials(self._claim(1, joining=True, accept=_has_no_trial))
            if not asked:
                break
            found += [ticket for ticket in asked if self._fits(ticket)]
            self.hand_back([ticket for ticket in asked if not self._fits(ticket)])
        return tuple(found)

    def _fits(self, ticket: Ticket) -> bool:
        if packs_by_value(self._config) and ticket.params is None:
            return False
        return self._group_of(ticket) == self._group

    def _group_of(self, ticket: Ticket) -> tuple[bool, PackKey]:
        key = pack_key(self._config, ticket.params or {}) if packs_by_value(self._config) else ()
        return in_fidelity(self._config, ticket), key

    def _takes_proposals(self) -> bool:
        """Whether the pack has to look at new proposals one by one; new trials begin in the first fidelity."""
        fresh = self._config.fidelity is not None
        return packs_by_value(self._config) and self._group is not None and self._group[0] == fresh

    def _full_pack_waits(self) -> bool:
        """Whether the first fidelity has found enough for now: a search learns from full trainings."""
        if self._group is None or not self._group[0]:
            return False
        return self._ledger.waiting_promoted(self._config.name) >= self._limit

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

    def _claim(
        self,
        limit: int,
        *,
        joining: bool,
        kind: str = SEARCH,
        accept: Callable[[Ticket], bool] | None = None,
        alike: Callable[[Ticket, Ticket], bool] | None = None,
    ) -> tuple[Ticket, ...]:
        self._forget_ended()
        name, worker, seconds = self._config.name, self._context.worker_id, self._context.lease_seconds
        tickets = self._ledger.claim(
            name, worker, limit, seconds, kind=kind, joining=joining, accept=accept, alike=alike
        )
        self._claimed.update({ticket.id: ticket for ticket in tickets})
        self._leases.hold(ticket.id for ticket in tickets)
        return tickets

    def _forget_ended(self) -> None:
        held = self._leases.held
        self._claimed = {number: ticket for number, ticket in self._claimed.items() if number in held}

    def _with_trials(self, tickets: Sequence[Ticket]) -> tuple[Ticket, ...]:
        linked = []
        for ticket in tickets:
            self._check()
            try:
                linked.append(link_trial(self._ledger, self._context.study, self._config, ticket))
            except LeaseLostError as error:
                logger.warning("another worker took over: %s", error)
                self._leases.release([ticket.id])
            else:
                self._mirror.notify(ticket.id)
        return tuple(linked)


def _has_no_trial(ticket: Ticket) -> bool:
    return ticket.trial_id is None
