"""Keeps the leases of a worker's tickets alive while it trains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from types import TracebackType

from search.errors import SearchError
from search.ledger import Ledger, StopKind, WorkerRow, WorkerState
from search.worker.existing import HANG_SECONDS, OUTAGE_SECONDS

logger = logging.getLogger(__name__)

DEFAULT_LEASE_SECONDS = 300.0
RENEWALS_PER_LEASE = 6
HEARTBEAT_SECONDS = 60.0
"""A worker says at least so often that it lives, however long its leases are."""

SILENT_BEATS = 2
"""A worker that has missed so many beats may be dead."""

ASK_SECONDS = 5.0
"""How often it asks whether somebody wants its trials back."""


def is_fresh(worker: WorkerRow, now: float) -> bool:
    """Whether it lives, as far as the database knows: it has missed no two beats."""
    return worker.state is WorkerState.RUNNING and now - worker.heartbeat < SILENT_BEATS * HEARTBEAT_SECONDS


class LeaseKeeper:
    """A thread that renews leases several times per lease and survives outages of the database.

    A ticket that another worker took over in the meantime shows up in `lost`; its trial must not go on here.

    Args:
        ledger: Of the study.
        study: Its name.
        worker_id: Of the worker whose tickets these are.
        lease_seconds: From each renewal on.
        silence_seconds: A worker that has not called `note_alive` for so long is stuck; its leases run out, so that
            others go on with its trials. Longer than the outage of a database that is waited for in one call.
    """

    def __init__(
        self,
        ledger: Ledger,
        study: str,
        worker_id: str,
        lease_seconds: float,
        silence_seconds: float = HANG_SECONDS + OUTAGE_SECONDS,
    ) -> None:
        self._ledger = ledger
        self._study = study
        self._recalled = False
        self._worker_id = worker_id
        self._lease_seconds = lease_seconds
        self._silence_seconds = silence_seconds
        self._alive_at = time.monotonic()
        self._is_stuck = False
        self._held: set[int] = set()
        self._lost: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    @property
    def lost(self) -> frozenset[int]:
        """Tickets that were ours and are not any more."""
        with self._lock:
            return frozenset(self._lost)

    @property
    def held(self) -> frozenset[int]:
        """Tickets that are ours as far as is known."""
        with self._lock:
            return frozenset(self._held)

    @property
    def recalled(self) -> bool:
        """Whether the study was stopped by somebody who wants its trials handed back."""
        return self._recalled

    def note_alive(self) -> None:
        """Says that the worker moves; to be called by what would be stuck, not by another thread."""
        self._alive_at = time.monotonic()

    def ask(self) -> None:
        """Looks once whether the trials are wanted back; normally called by the thread."""
        self._recalled = self._ledger.study(self._study).stop_kind is StopKind.NOW

    def hold(self, ticket_ids: Iterable[int]) -> None:
        """Renews these tickets from now on."""
        with self._lock:
            taken = set(ticket_ids)
            self._held |= taken
            # A new attempt has nothing to do with one of before that was lost.
            self._lost -= taken

    def release(self, ticket_ids: Iterable[int]) -> None:
        """Stops renewing these tickets."""
        with self._lock:
            self._held.difference_update(ticket_ids)
            self._lost.difference_update(ticket_ids)

    def renew(self) -> None:
        """Renews once; normally called by the thread."""
        with self._lock:
            asked = set(self._held)
        self._ledger.heartbeat(self._worker_id)
        if not asked:
            return
        kept = self._ledger.renew(self._worker_id, asked, self._lease_seconds)
        with self._lock:
            # Tickets finished while the renewal was under way are no longer held, and not lost either.
            gone = (asked - kept) & self._held
            self._held -= gone
            self._lost |= gone

    def _run(self) -> None:
        every = min(self._lease_seconds / RENEWALS_PER_LEASE, HEARTBEAT_SECONDS)
        due = time.monotonic() + every
        while not self._stop.wait(min(every, ASK_SECONDS)):
            try:
                self.ask()
                if time.monotonic() >= due:
                    if not self._stuck():
                        self.renew()
                    due = time.monotonic() + every
            except SearchError as error:
                logger.warning("leases could not be renewed, trying again: %s", error)
            except Exception:
                # The thread must outlive anything the database does; training goes on meanwhile.
                logger.exception("leases could not be renewed, trying again")

    def _stuck(self) -> bool:
        """Whether the worker has been silent for too long; told once."""
        silent = time.monotonic() - self._alive_at
        was_stuck, self._is_stuck = self._is_stuck, silent > self._silence_seconds
        if self._is_stuck and not was_stuck:
            logger.error("this worker has not moved for %.0f s: its leases run out, and others take its trials", silent)
        return self._is_stuck
