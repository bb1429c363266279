"""The supervisor: claims tickets, gives them to its trainer as one pack, and answers for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing

from search.errors import LeaseLostError, StudyStoppedError
from search.ledger import Ticket, TicketState
from search.space import pack_limit
from search.study import orphans, tell
from search.worker.context import WorkerContext
from search.worker.host import release_dead_neighbours
from search.worker.lease import LeaseKeeper
from search.worker.linking import link_trial
from search.worker.mirror import Mirror
from search.worker.pack_run import PackCrashedError, PackRun
from search.worker.stop import StopFlag, StopRequested
from search.worker.trainer_link import TrainerDiedError, TrainerLink

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0


class Worker:
    """Claims, trains and reports until the study's budget is spent or somebody asks it to stop."""

    def __init__(self, context: WorkerContext, mirror: Mirror, stop: StopFlag) -> None:
        self._context = context
        self._config = context.config
        self._ledger = context.ledger
        self._mirror = mirror
        self._stop = stop
        self._limit = pack_limit(context.config)
        self._leases = LeaseKeeper(context.ledger, context.worker_id, context.lease_seconds)
        settings = context.trainer_settings()
        self._store = settings.open_checkpoints()
        self._trainer = TrainerLink(settings, context.hang_seconds, self._check_stop)

    def run(self) -> int:
        """Works until nothing is left.

        Returns:
            Number of trials that ended here.

        Raises:
            StudyStoppedError: Too many trials in a row failed.
        """
        with self._leases, closing(self._trainer):
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
        if not any(self._ledger.open_counts(self._config.name).values()):
            # A ticket that failed between `ask` and its link leaves a trial that nobody pays for.
            linked = self._ledger.linked_trial_ids(self._config.name)
            for trial_id in orphans(self._context.study, linked):
                tell(self._context.study, trial_id, TicketState.FAIL)
        return self._ledger.ended_by(self._context.worker_id)

    def _claim(self) -> tuple[Ticket, ...]:
        if any(self._ledger.open_counts(self._config.name).values()):
            # Before anything is held: a signal that arrives during the first start finds nothing to hand back.
            self._trainer.start()
        if self._stop.is_set:
            return ()
        context = self._context
        tickets = self._ledger.claim(self._config.name, context.worker_id, self._limit, context.lease_seconds)
        self._leases.hold(ticket.id for ticket in tickets)
        return tickets

    def _others_are_busy(self) -> bool:
        return self._ledger.open_counts(self._config.name)[TicketState.RUNNING] > 0

    def _past_deadline(self) -> bool:
        return self._context.deadline is not None and time.time() >= self._context.deadline

    def _check_failures(self) -> None:
        count = self._ledger.failures_in_a_row(self._config.name)
        if count < self._config.max_failures_in_a_row:
            return
        latest = self._ledger.latest_failures(self._config.name, count)
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
            self._train(linked)
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
        return link_trial(self._ledger, self._context.study, self._config, ticket)

    def _train(self, tickets: Sequence[Ticket]) -> None:
        """Trains one pack; a pack that crashes is retried trial by trial, so that the guilty one fails alone."""
        run = PackRun(self._context, self._mirror, self._leases, self._trainer, self._store, tickets)
        try:
            run.train()
            return
        except (TrainerDiedError, PackCrashedError) as error:
            # A signal to the whole process group ends the trainer as well, and is nobody's fault.
            self._check_stop()
            logger.warning("a pack of %d trials crashed: %s", len(tickets), error)
            crash = error
        # An exception may leave a device, or its memory, in a state that fails every later pack.
        self._trainer.close()
        alive = list(run.alive.values())
        if len(tickets) > 1:
            for part in self._parts(alive, crash):
                current = [now for ticket in part if (now := self._ours(ticket)) is not None]
                if current:
                    self._train(current)
        elif alive and (ours := self._ours(alive[0])) is not None:
            self._blame(run, ours, crash)

    def _parts(self, tickets: list[Ticket], crash: Exception) -> list[list[Ticket]]:
        """How a crashed pack is tried again: in halves if it was too large, from now on, and else one by one."""
        if isinstance(crash, PackCrashedError) and crash.out_of_memory and len(tickets) > 1:
            self._limit = half = max(1, len(tickets) // 2)
            logger.warning("out of memory: this worker's packs have at most %d trials from now on", half)
            return [tickets[start : start + half] for start in range(0, len(tickets), half)]
        return [[ticket] for ticket in tickets]

    def _blame(self, run: PackRun, ticket: Ticket, crash: Exception) -> None:
        """One trial crashed alone. A process that dies may do so by chance, what raises does it again."""
        if isinstance(crash, TrainerDiedError):
            self._ledger.abandon(ticket, str(crash))
            self._mirror.notify(ticket.id)
        elif isinstance(crash, PackCrashedError) and not crash.started and ticket.epochs_done > 0:
            logger.warning("trial %s starts over with its seed: its checkpoint is unusable", ticket.trial_number)
            self._train([self._ledger.save_progress(ticket, 0, None)])
        else:
            run.fail(ticket, str(crash))

    def _ours(self, ticket: Ticket) -> Ticket | None:
        """The ticket as it stands now, if the attempt still is this worker's: it may have gone to another."""
        now = self._ledger.ticket(ticket.id)
        held = now.state is TicketState.RUNNING and now.attempt == ticket.attempt
        return now if held and now.worker == self._context.worker_id else None

    def _check_stop(self) -> None:
        if self._stop.is_set:
            raise StopRequested
