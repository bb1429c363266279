"""The supervisor's end of the trainer process."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

from search.worker import trainer_process
from search.worker.trainer_process import TrainerSettings
from yolocore.host import use_short_socket_folder

POLL_SECONDS = 0.1
JOIN_SECONDS = 5.0


class TrainerDiedError(Exception):
    """The trainer process ended, or was ended because it hung, in the middle of a pack."""


class TrainerLink:
    """Starts the trainer when it is needed, talks to it, notices its death and its silence.

    Args:
        settings: What the trainer is started with.
        hang_seconds: A trainer that says nothing for so long is killed.
        check: Called several times a second while waiting; what it raises ends the wait.
    """

    def __init__(self, settings: TrainerSettings, hang_seconds: float, check: Callable[[], None]) -> None:
        self._settings = settings
        self._hang_seconds = hang_seconds
        self._check = check
        self._process: BaseProcess | None = None

    def start(self) -> None:
        """Starts the trainer where none runs; the first start imports torch, for seconds in which nobody checks."""
        if self._process is None:
            self._start()

    def send(self, message: object) -> None:
        """Says something, starting the trainer where none runs.

        Raises:
            TrainerDiedError: It is not there to hear it.
        """
        self.start()
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise TrainerDiedError(self._obituary()) from None

    def receive(self) -> object:
        """The trainer's next message.

        Raises:
            TrainerDiedError: It ended, or said nothing for `hang_seconds` and was killed.
        """
        deadline = time.monotonic() + self._hang_seconds
        while time.monotonic() < deadline:
            self._check()
            try:
                if self._connection.poll(POLL_SECONDS):
                    return self._connection.recv()
            except (EOFError, ConnectionResetError):
                raise TrainerDiedError(self._obituary()) from None
        self.kill()
        raise TrainerDiedError(f"the trainer made no progress for {self._hang_seconds:g} s and was killed")

    def close(self) -> None:
        """Lets the trainer end by itself, which it does at its next word, and kills it if it does not."""
        if self._process is not None:
            self._connection.close()
            self._process.join(JOIN_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Ends the trainer at once; what it secured is on disk. The next message starts another."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join(JOIN_SECONDS)
            self._process = None

    def _start(self) -> None:
        context = _context()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(  # type: ignore[attr-defined]
            target=trainer_process.main, args=(theirs, self._settings), name="trainer", daemon=False
        )
        self._process.start()
        # Only the trainer holds its end now, so that its death breaks the pipe.
        theirs.close()

    def _obituary(self) -> str:
        assert self._process is not None
        self._process.join(JOIN_SECONDS)
        code = self._process.exitcode
        self.kill()
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ", out of memory perhaps" if name == "SIGKILL" else ""
            return f"the trainer process was ended by {name}{hint}"
        return f"the trainer process ended with exit code {code}"


def _context() -> BaseContext:
    """Trainers come from a clean server process that has imported torch already, so that the next one starts at once.

    It never touches a device, so CUDA works in what it forks. Where there is none (Windows), they are spawned.
    """
    use_short_socket_folder()
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["search.worker.trainer_process"])
    return context
