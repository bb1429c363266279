"""Starts workers on this machine and watches over them."""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from search.errors import EXIT_BAD_INPUT, EXIT_STOPPED, DatabaseError
from search.launch.launcher import RestartPolicy, WorkerPhase, WorkerView, study_progress
from search.launch.plan import LaunchPlan, Seat
from search.ledger import SEARCH, Ledger

logger = logging.getLogger(__name__)

KILL_GRACE_SECONDS = 2.0
"""A worker ends by itself within the plan's `stop_seconds`; one that is still there so much later is killed."""


@dataclass(slots=True)
class _Child:
    seat: Seat
    worker_id: str = ""
    log_path: Path = Path()
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    done: bool = False
    given_up: bool = False

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass(slots=True)
class LocalLauncher:
    """Worker processes on this host; see `search.launch.launcher.Launcher` for the contract."""

    plan: LaunchPlan
    ledger: Ledger
    failures: list[str] = field(default_factory=list)
    bad_input: bool = False
    _children: list[_Child] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)
    _stopping: bool = False

    def __enter__(self) -> Self:
        try:
            for seat in self.plan.seats():
                child = _Child(seat)
                self._children.append(child)
                self._start(child)
        except BaseException:
            # Nobody calls `__exit__`: those that started would train on without a launcher.
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that run now."""
        return tuple(child.process.pid for child in self._children if child.process is not None and child.running)

    @property
    def log_paths(self) -> tuple[Path, ...]:
        """Where the workers' output goes."""
        return tuple(child.log_path for child in self._children)

    def views(self) -> tuple[WorkerView, ...]:
        """All workers, by number."""
        return tuple(self._view(child) for child in self._children)

    def _view(self, child: _Child) -> WorkerView:
        return WorkerView(
            index=child.seat.index,
            worker_id=child.worker_id,
            phase=self._phase(child),
            pid=child.process.pid if child.process is not None and child.running else None,
            place=child.seat.label,
            restarts=max(0, child.starts - 1),
            log=str(child.log_path),
        )

    def _phase(self, child: _Child) -> WorkerPhase:
        if child.running:
            return "stops" if self._stopping else "runs"
        if child.given_up:
            return "given up"
        return "done" if child.done else "waits"

    def poll(self) -> bool:
        """Looks after the workers once.

        Returns:
            True while a worker runs or waits for its restart.
        """
        for child in self._children:
            if not child.done and not child.running:
                try:
                    self._look_after(child)
                except DatabaseError as error:
                    logger.warning("worker %s ended, and the database is away: %s", child.worker_id, error)
        return not all(child.done for child in self._children)

    def stop(self) -> None:
        """Asks all workers to hand their tickets back, and kills those that do not end in time.

        Raises:
            KeyboardInterrupt: A second one; all workers are dead by then, and what they held is free when the next
                worker on this host starts.
        """
        self._stopping = True
        for child in self._children:
            child.done = True
            if child.process is not None and child.running:
                child.process.send_signal(signal.SIGTERM)
        try:
            buried = self._bury_all()
        except KeyboardInterrupt:
            for child in self._children:
                self._kill(child)
            raise
        try:
            self._hand_back(child.worker_id for child in buried)
        except DatabaseError as error:
            logger.warning("what killed workers held is free when its lease ends, the database is away: %s", error)

    def _bury_all(self) -> list[_Child]:
        deadline = time.monotonic() + self.plan.stop_seconds + KILL_GRACE_SECONDS
        return [child for child in self._children if self._bury(child, max(0.1, deadline - time.monotonic()))]

    def _look_after(self, child: _Child) -> None:
        if child.process is None:
            if child.restart.is_due:
                self._start(child)
            return
        code = child.code = child.process.returncode
        # First all that needs the database: while that is away the child stays as it is, and is looked at again.
        self._release(child)
        is_over = code in {0, EXIT_STOPPED} or self._is_stopped()
        given_up = not is_over and (code == EXIT_BAD_INPUT or child.restart.gives_up(self._progress()))
        self._bury(child, timeout=1.0)
        if is_over:
            child.done = True
        elif given_up:
            child.done = child.given_up = True
            self.bad_input |= code == EXIT_BAD_INPUT
            self.failures.append(f"worker {child.worker_id} ended with exit code {code}: {_last_line(child.log_path)}")
        else:
            child.restart.postpone()

    def _is_stopped(self) -> bool:
        """Whether the search gives out no more tickets: a new worker would end like the last one."""
        return SEARCH in self.plan.kinds and self.ledger.study(self.plan.folder.study).stop_reason is not None

    def _progress(self) -> int:
        return study_progress(self.ledger, self.plan.folder.study)

    def _release(self, child: _Child) -> None:
        """Frees what a process held that did not end well: nobody has to wait for the lease of a dead one."""
        if child.code != 0:
            self.ledger.release_worker(child.worker_id)

    def _hand_back(self, worker_ids: Iterable[str]) -> None:
        """Frees what processes held that had to be killed; they were asked to end, so no trial is charged."""
        self.ledger.hand_back(self.ledger.held_by(worker_ids))

    def _bury(self, child: _Child, timeout: float) -> bool:
        """Waits for the end of a process; False if there is none."""
        if child.process is None:
            return False
        try:
            child.process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._kill(child)
        child.code = child.process.returncode
        child.process = None
        return True

    def _kill(self, child: _Child) -> None:
        """Ends a worker at once, and what it started: its trainer would hold the GPU a little longer."""
        if child.process is not None and child.running:
            os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()

    def _start(self, child: _Child) -> None:
        seat = f"{platform.node()}-{os.getpid()}-{child.seat.index}"
        # A new name for every start: what the dead process still held is told apart from what the new one claims.
        child.worker_id = f"{seat}.{child.starts}"
        child.starts += 1
        child.log_path = self.plan.folder.log(seat)
        child.log_path.parent.mkdir(parents=True, exist_ok=True)
        with child.log_path.open("ab") as log:
            child.process = subprocess.Popen(
                self._command(child),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.plan.worker_environment(child.seat)},
                # Its own session: a Ctrl-C in the terminal reaches the launcher only, which stops the workers once.
                start_new_session=True,
            )

    def _command(self, child: _Child) -> list[str]:
        timeout = self.plan.timeout
        left = None if timeout is None else timeout - (time.monotonic() - self._started)
        return self.plan.worker_command(child.worker_id, child.seat, parent=os.getpid(), seconds_left=left)


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError as error:
        return f"its log cannot be read ({error})"
    return f"{lines[-1]} (log: {path})" if lines else f"it printed nothing (log: {path})"
