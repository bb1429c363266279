"""Kills a process before a chosen one of its writes. The product knows nothing of it: SQLAlchemy has listeners.

Between two commits a database holds exactly what the first of them wrote, so killing before the n-th, for every n, is
killing between any two writes, statements inside of a transaction included.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from tiny import NAME, TinyStudy

from search.confirm import add_confirmation
from search.housekeeping import retry
from search.launch.local import LocalLauncher
from search.launch.plan import LaunchPlan, Seat
from search.ledger import CONFIRM
from search.paths import StudyFolder
from search.worker import trainer_process, worker
from search.worker.trainer_link import TrainerLink
from search.worker.trainer_process import TrainerSettings

WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "CREATE", "ALTER", "DROP"})


@dataclass(frozen=True)
class KillPoint:
    """Before which commit a process dies, and where it notes the commits that came to pass."""

    number: int | None
    """Counted from 1; None: it lives."""
    log: Path
    after: str = ""
    """Counting starts with the first statement that contains this."""
    asked: bool = False
    """Whether the process is asked to end (SIGTERM) when counting starts."""

    def install(self) -> None:
        """From now on in this process, whatever engine writes."""
        lock = threading.Lock()
        count = 0
        counting = not self.after

        def note(
            connection: Connection, _cursor: object, statement: str, _values: object, _context: object, _many: bool
        ) -> None:
            nonlocal counting
            if not counting and self.after in statement:
                counting = True
                if self.asked:
                    os.kill(os.getpid(), signal.SIGTERM)
            if counting and statement.split(None, 1)[0].upper() in WRITES:
                connection.info.setdefault("written", []).append(" ".join(statement.split()[:4]))

        def commit(connection: Connection) -> None:
            nonlocal count
            written = connection.info.pop("written", [])
            if not written:
                return
            with lock:
                count += 1
                if count == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)
                with self.log.open("a") as log:
                    log.write(f"{'; '.join(dict.fromkeys(written))}\n")

        event.listen(Engine, "before_cursor_execute", note)
        event.listen(Engine, "commit", commit)
        event.listen(Engine, "rollback", lambda connection: connection.info.pop("written", None))


class TrainerThread:
    """The real trainer in a thread of the supervisor: whatever kills one of them kills both."""

    exitcode = 0

    def __init__(self, pipe: Pipe, settings: TrainerSettings) -> None:
        self._thread = threading.Thread(target=self._serve, args=(pipe, settings), daemon=True)
        self._thread.start()

    @staticmethod
    def _serve(pipe: Pipe, settings: TrainerSettings) -> None:
        trainer = trainer_process._Trainer(pipe, settings)
        try:
            trainer.serve()
        except (EOFError, OSError):
            trainer.close()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def kill(self) -> None:
        """It ends when its pipe is closed, which was done before."""


class ThreadLink(TrainerLink):
    """Spares each of many workers the start of a process that imports torch."""

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()  # type: ignore[assignment]
        self._process = TrainerThread(theirs, self._settings)  # type: ignore[assignment]


# ---- entry points of processes: each to its end, or to the kill point ------------------------------------------------


def work(study: TinyStudy, worker_id: str, point: KillPoint) -> None:
    """A worker."""
    _begin(point)
    study.work(worker_id)


def create(study: TinyStudy, point: KillPoint) -> None:
    """What `run` does before it starts workers."""
    _begin(point)
    study.create()


def confirm(study: TinyStudy, worker_id: str, point: KillPoint) -> None:
    """What `confirm` does: it adds the reruns of the best trial and of the base on one seed, and trains them."""
    _begin(point)
    add_confirmation(study.ledger, study.config, top=1, seeds=1, epochs=study.config.train.epochs)
    study.work(worker_id, kinds=(CONFIRM,))


def try_again(study: TinyStudy, point: KillPoint) -> None:
    """What `retry` does."""
    _begin(point)
    retry(study.ledger, study.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlyPlan(LaunchPlan):
    """Workers that register and claim a trial as all do; the first then dies, the others do not end when asked to."""

    def worker_command(
        self, worker_id: str, seat: Seat, *, parent: int | None = None, seconds_left: float | None = None
    ) -> list[str]:
        return [sys.executable, str(Path(__file__).with_name("deadly.py")), worker_id, str(seat.index), str(parent)]


def launch(study: TinyStudy, point: KillPoint) -> None:
    """A launcher that sees one of its two workers die, and then ends, for which it has to kill the other one."""
    _begin(point)
    plan = DeadlyPlan(storage_url=study.storage_url, folder=StudyFolder(study.runs, NAME), workers=2, stop_seconds=0.1)
    ledger = study.ledger
    with LocalLauncher(plan, ledger) as launcher:
        while not all(ticket.attempt for ticket in ledger.tickets(NAME)) or len(launcher.pids) > 1:
            time.sleep(0.05)
        launcher.poll()


def _begin(point: KillPoint) -> None:
    _quiet(point.log)
    torch.set_num_threads(1)
    worker.TrainerLink = ThreadLink  # type: ignore[misc]
    point.install()


def _quiet(log: Path) -> None:
    """Failures are read where the test shows them."""
    handle = log.with_suffix(".err").open("a")
    os.dup2(handle.fileno(), 2)
    sys.stderr = handle


def run_process(context: Any, target: Callable[..., None], *arguments: object) -> int:
    """Runs it to its end; its exit code."""
    process = context.Process(target=target, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "still there after 240 s"
    return int(process.exitcode)
