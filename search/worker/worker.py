"""The supervisor: claims tickets, gives them to its trainer as one pack, refills it, and answers for all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial

from search.errors import LeaseLostError, StudyStoppedError
from search.fidelity import in_fidelity
from search.ledger import MAX_STALLED, SEARCH, Ticket, TicketState
from search.space import pack_limit
from search.stopping import StoppingRules
from search.study import orphans, tell
from search.worker.capacity import is_measured, largest_useful, measured_limit
from search.worker.context import WorkerContext
from search.worker.existing import OUTAGE_SECONDS
from search.worker.fidelity_run import FidelityRun
from search.worker.host import release_dead_neighbours
from search.worker.lease import LeaseKeeper
from search.worker.mirror import Mirror
from search.worker.pack_run import PackCrashedError, PackRun, Refill
from search.worker.stop import StopFlag, StopRequested
from search.worker.supply import Supply
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
        self._limit = 0 if is_measured(context.config) else pack_limit(context.config)
        """Trials that a pack may have; 0 as long as it is not measured."""
        self._tried = 0
        """The largest pack that was thought useful when packs were measured."""
        self._leases = LeaseKeeper(
            context.ledger,
            context.config.name,
            context.worker_id,
            context.lease_seconds,
            context.hang_seconds + OUTAGE_SECONDS,
        )
        self._rules = StoppingRules(context.config, context.ledger, context.study)
        self._supply = Supply(context, mirror, self._leases, self._is_over, self._check_stop)
        settings = context.trainer_settings()
        self._store = settings.open_checkpoints()
        self._trainer = TrainerLink(settings, context.hang_seconds, self._check_stop)

    def run(self) -> int:
        """Works until nothing is left.

        Returns:
            Number of trials and reruns that ended here.

        Raises:
            StudyStoppedError: Too many trials in a row failed.
        """
        with self._leases, closing(self._trainer):
            if self._limit:
                self._set_limit(self._limit)
            try:
                self._work()
            except StudyStoppedError as error:
                if not error.planned:
                    raise
                logger.info("%s", error)
        return self._conclude()

    def _work(self) -> None:
        while not (self._stop.is_set or self._is_recalled):
            self._leases.note_alive()
            self._check_failures()
            release_dead_neighbours(self._ledger, self._config.name)
            if not self._run_pack():
                if not self._others_are_busy() or self._past_deadline():
                    self._check_failures()  # what ran elsewhere when this was last asked may have failed since
                    break
                # Their tickets may still come back: whatever dies, somebody finishes it.
                self._stop.wait(IDLE_SECONDS)

    def _conclude(self) -> int:
        """Number of tickets that ended here; after the last of the search, Optuna has no trial open either."""
        if not any(self._ledger.open_counts(self._config.name).values()):
            # A ticket that failed between `ask` and its link leaves a trial that nobody pays for.
            # Not one of a ticket that was added just now.
            owned = partial(self._ledger.claimed_trial_ids, self._config.name)
            for trial_id in orphans(self._context.study, owned):
                tell(self._context.study, trial_id, TicketState.FAIL)
        return self._ledger.ended_by(self._context.worker_id)

    def _run_pack(self) -> bool:
        """Trains one pack, refilled as long as there are tickets; whatever happens, none stays with this worker.

        Returns:
            False if there was nothing to train.
        """
        try:
            if any(self._open_counts().values()):
                # Before anything is held: a signal that arrives during the first start finds nothing to hand back.
                self._trainer.start()
                self._measure()
            tickets = self._supply.first(self._limit)
            # Who may kill the trainer once more has it to itself, and a cohort of reruns stays as it started.
            is_closed = any(ticket.is_rerun or ticket.stalled_attempts >= MAX_STALLED - 1 for ticket in tickets)
            if tickets:
                self._train(tickets, None if is_closed else self._refill)
            return bool(tickets)
        except StopRequested:
            return True
        except LeaseLostError as error:
            logger.warning("another worker took over: %s", error)
            return True
        finally:
            self._supply.hand_back()

    def _refill(self, busy: int) -> Sequence[Ticket]:
        return self._supply.more(self._limit - busy)

    def _measure(self) -> None:
        """Finds out how many trials a pack should have, again if the budget has grown since the largest was best."""
        if not is_measured(self._config) or self._is_over():
            return
        largest = largest_useful(self._context)
        if largest > self._tried == self._limit:
            self._set_limit(measured_limit(self._context, self._trainer, largest))
            self._tried = largest

    def _set_limit(self, limit: int) -> None:
        self._limit = limit
        self._ledger.set_pack(self._context.worker_id, limit)

    def _others_are_busy(self) -> bool:
        return self._open_counts()[TicketState.RUNNING] > 0

    def _open_counts(self) -> dict[TicketState, int]:
        """Of the tickets that it may take."""
        return self._ledger.open_counts(self._config.name, self._context.kinds)

    def _past_deadline(self) -> bool:
        return self._context.deadline is not None and time.time() >= self._context.deadline

    def _is_over(self) -> bool:
        """Whether nothing new may be claimed: what runs still runs to its end, unless a signal asks for more."""
        if self._stop.is_set or self._is_recalled or self._past_deadline() or self._failures() is not None:
            return True
        return self._takes_trials and self._rules.apply()

    @property
    def _takes_trials(self) -> bool:
        """Whether it works on the search, and not on reruns alone: what stops a study stops its search."""
        return SEARCH in self._context.kinds

    @property
    def _is_recalled(self) -> bool:
        """Whether somebody stopped the study and wants its trials handed back."""
        return self._takes_trials and self._leases.recalled

    def _failures(self) -> int | None:
        """How many trials in a row failed, if they are too many; a worker that takes no trials does not mind."""
        if not self._takes_trials:
            return None
        count = self._ledger.failures_in_a_row(self._config.name)
        return count if count >= self._config.max_failures_in_a_row else None

    def _check_failures(self) -> None:
        count = self._failures()
        if count is None:
            return
        latest = self._ledger.latest_failures(self._config.name, count)
        reasons = dict.fromkeys(ticket.reason or "no reason known" for ticket in latest)
        message = f"{count} trials in a row failed: {'; '.join(reasons)}"
        self._ledger.stop(self._config.name, message)
        raise StudyStoppedError(f"study {self._config.name} stopped: {message}")

    def _train(self, tickets: Sequence[Ticket], refill: Refill | None = None) -> None:
        """Trains one pack; a pack that crashes is retried trial by trial, so that the guilty one fails alone."""
        if not tickets:
            return
        kind = FidelityRun if in_fidelity(self._config, tickets[0]) else PackRun
        run = kind(self._context, self._mirror, self._leases, self._trainer, self._store, tickets, refill)
        try:
            run.train()
            return
        except (TrainerDiedError, PackCrashedError) as error:
            # A signal to the whole process group ends the trainer as well, and is nobody's fault.
            self._check_stop()
            logger.warning("a pack of %d trials crashed: %s", len(run.alive), error)
            crash = error
        # An exception may leave a device, or its memory, in a state that fails every later pack.
        self._trainer.close()
        alive = self._ours(run.alive.values())
        if isinstance(crash, PackCrashedError) and crash.out_of_memory and len(alive) > 1:
            self._halve(alive, refill)
        elif run.total > 1:
            for ticket in alive:
                self._train(self._ours([ticket]))
        elif alive:
            self._blame(run, alive[0], crash)

    def _halve(self, tickets: Sequence[Ticket], refill: Refill | None) -> None:
        """Goes on with half of a pack that was too large; the others go back to the queue with their checkpoints."""
        half = len(tickets) // 2
        self._set_limit(half)
        logger.warning("out of memory: this worker's packs have at most %d trials from now on", half)
        if refill is None:
            # A cohort is nobody else's: its parts train one after the other.
            for start in range(0, len(tickets), half):
                self._train(self._ours(tickets[start : start + half]))
            return
        self._supply.hand_back(tickets[half:])
        self._train(self._ours(tickets[:half]), refill)

    def _blame(self, run: PackRun, ticket: Ticket, crash: Exception) -> None:
        """One trial crashed alone. A process that dies may do so by chance, what raises does it again."""
        if isinstance(crash, TrainerDiedError):
            self._ledger.abandon(ticket, str(crash))
            self._mirror.notify(ticket.id)
        elif isinstance(crash, PackCrashedError) and not crash.started and ticket.epochs_done > 0:
            logger.warning("%s starts over with its seed: its checkpoint is unusable", ticket.label)
            self._train([self._ledger.save_progress(ticket, 0, None)])
        else:
            run.fail(ticket, str(crash))

    def _ours(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """The tickets as they stand now, as far as the attempts are this worker's: they may have gone to others."""
        now = [(self._ledger.ticket(ticket.id), ticket.attempt) for ticket in tickets]
        me = self._context.worker_id
        return [
            ticket
            for ticket, attempt in now
            if ticket.state is TicketState.RUNNING and ticket.attempt == attempt and ticket.worker == me
        ]

    def _check_stop(self) -> None:
        self._leases.note_alive()
        if self._stop.is_set or self._is_recalled:
            raise StopRequested
