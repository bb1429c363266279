"""What every engine that starts workers has in common: its interface, and when a worker is started again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol, Self

from search.ledger import Ledger

MAX_RESTARTS_WITHOUT_PROGRESS = 5
RESTART_DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0)
EXIT_BAD_INPUT = 2


class Launcher(Protocol):
    """Workers that are restarted when they die; a context manager around `poll`.

    Workers start on entry and hand their tickets back on exit. What a dead worker held is free at once. Call `poll`
    until it returns False.
    """

    @property
    def failures(self) -> list[str]:
        """The last words of workers that were given up."""

    @property
    def bad_input(self) -> bool:
        """Whether one of them ended for a reason that the user can mend."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def poll(self) -> bool:
        """Looks after the workers once; True while a worker runs or waits for its (re)start."""

    def stop(self) -> None:
        """Asks all workers to hand their tickets back, and ends those that do not in time."""


@dataclass(slots=True)
class RestartPolicy:
    """When one worker is started again: after growing pauses, and not for ever if nothing moves on meanwhile."""

    restarts: int = 0
    progress: int = 0
    retry_at: float = 0.0
    """On the clock of `time.monotonic`."""

    def gives_up(self, progress: int) -> bool:
        """Counts one more end that was no good one.

        Args:
            progress: How far the study is (`study_progress`). Restarts since it last moved on must stay few.
        """
        self.restarts = self.restarts + 1 if progress == self.progress else 1
        self.progress = progress
        return self.restarts > MAX_RESTARTS_WITHOUT_PROGRESS

    def postpone(self) -> None:
        """Sets when the next start is due."""
        self.retry_at = time.monotonic() + RESTART_DELAYS[min(self.restarts, len(RESTART_DELAYS)) - 1]

    @property
    def due(self) -> bool:
        """Whether the pause is over."""
        return time.monotonic() >= self.retry_at


def study_progress(ledger: Ledger, study: str) -> int:
    """A number that grows whenever any trial of the study gets on."""
    return sum(ticket.epochs_done + ticket.state.is_final for ticket in ledger.tickets(study))
