"""How a worker is asked to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(Exception):  # noqa: N818 - not an error: somebody asked the worker to end
    """A signal, a dead launcher or a lost lease ends the work between two batches."""


class StopFlag:
    """Set by SIGTERM, SIGINT, or when the launcher that started this worker is gone. A second Ctrl-C is immediate."""

    def __init__(self, parent: int | None = None) -> None:
        self._event = threading.Event()
        self._parent = parent

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        """Handles the signals inside the block."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._event.is_set():
            os._exit(128 + number)
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether the worker should end."""
        if self._parent is not None and os.getppid() != self._parent:
            self._event.set()
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        """Sleeps, but not longer than until a signal arrives."""
        self._event.wait(seconds)
