"""How a worker is asked to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(Exception):  # noqa: N818 - not an error: somebody asked the worker to end
    """A signal, a dead launcher, a lost lease or `yolosearch stop --now` ends the work between two batches."""


class StopFlag:
    """Set by SIGTERM, SIGINT, or when the launcher that started this worker is gone.

    A second Ctrl-C is immediate. Further SIGTERMs change nothing: a service manager that ends a whole control group
    sends one, and the launcher in that group another one, and what is being handed back is to be handed back.

    Args:
        parent: Process id of the launcher.
        seconds: After so long the process ends even if the database or MLflow did not answer meanwhile; what was not
            handed back then goes on when its lease ends. None waits for them.
    """

    def __init__(self, parent: int | None = None, seconds: float | None = None) -> None:
        self._event = threading.Event()
        self._interrupted = False
        """Whether a SIGINT was among the signals."""
        self._parent = parent
        self._seconds = seconds
        self._timer: threading.Timer | None = None

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        """Handles the signals inside the block."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._timer is not None:
                self._timer.cancel()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(128 + number)
            self._interrupted = True
        self._set(number)

    def _set(self, number: int) -> None:
        """Asks for the end, which comes with the exit code of signal `number` where it has to be forced."""
        self._event.set()
        if self._seconds is not None and self._timer is None:
            self._timer = threading.Timer(self._seconds, os._exit, [128 + number])
            self._timer.daemon = True
            self._timer.start()

    @property
    def is_set(self) -> bool:
        """Whether the worker should end."""
        if not self._event.is_set() and self._parent is not None and os.getppid() != self._parent:
            self._set(signal.SIGTERM)
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        """Sleeps, but not longer than until a signal arrives."""
        self._event.wait(seconds)
