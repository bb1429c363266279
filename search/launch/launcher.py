"""What every engine that starts workers has in common: its interface, and when a worker is started again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from search.ledger import Ledger

MAX_RESTARTS_WITHOUT_PROGRESS = 5
RESTART_DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0)

WorkerPhase = Literal["runs", "waits", "stops", "done", "given up"]
"""`waits`: for its restart. `given up`: it will not be started again, and not because it was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What a launcher knows of one worker at one moment."""

    index: int
    worker_id: str
    """As the ledger knows it."""
    phase: WorkerPhase
    pid: int | None
    place: str
    """Where it runs, in a few letters: `gpu 0`, `cpu`; empty where the study says it."""
    restarts: int
    log: str
    """File of its output, or words that say where that is."""


class Launcher(Protocol):
    """Workers that somebody looks after: a context manager around calls of `poll`.

    Workers start on entry. On exit they hand their tickets back and end; those that do not within the plan's
    `stop_seconds` are killed. A KeyboardInterrupt while that lasts kills them at once. A worker that dies is started
    again, and what it held is released as soon as the launcher sees that it is dead.
    """

    @property
    def failures(self) -> Sequence[str]:
        """The last words of workers that were given up."""

    @property
    def bad_input(self) -> bool:
        """Whether one of them ended for a reason that the user can mend (exit code 2)."""

    def __enter__(self) -> Self:
        """Starts the workers."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops them."""

    def poll(self) -> bool:
        """Looks after the workers once; True while one runs or waits for its restart."""

    def views(self) -> tuple[WorkerView, ...]:
        """All workers, by number."""


@dataclass(slots=True)
class RestartPolicy:
    """When one worker is started again: after growing pauses, and not for ever if nothing moves on meanwhile."""

    restarts: int = 0
    """Without progress of the study in between."""
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
    def is_due(self) -> bool:
        """Whether the pause is over."""
        return time.monotonic() >= self.retry_at


def study_progress(ledger: Ledger, study: str) -> int:
    """A number that grows whenever any trial of the study gets on."""
    return ledger.progress(study)
