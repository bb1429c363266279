"""Starts workers on this machine and watches over them."""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from search.database import STORAGE_URL_VARIABLE
from search.errors import DatabaseError
from search.ledger import Ledger
from search.paths import StudyFolder
from search.worker.existing import HANG_SECONDS

logger = logging.getLogger(__name__)

MAX_RESTARTS_WITHOUT_PROGRESS = 5
RESTART_DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0)
EXIT_BAD_INPUT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """How many workers to start, and on what.

    Attributes:
        storage_url: Database of the study. Passed on in the environment, so that no password shows in `ps`.
        folder: Files of the study on this host.
        workers: Number of processes.
        devices: Dealt out to the workers in turn; empty leaves the choice to the study's configuration.
        stop_seconds: How long a worker may take to hand its tickets back before it is killed.
        timeout: Seconds after which workers claim nothing new.
        hang_seconds: Seconds after which a silent trainer is killed.
    """

    storage_url: str
    folder: StudyFolder
    workers: int = 1
    devices: Sequence[str] = ()
    stop_seconds: float = 20.0
    timeout: float | None = None
    hang_seconds: float = HANG_SECONDS


@dataclass(slots=True)
class _Child:
    index: int
    device: str | None
    worker_id: str = ""
    log_path: Path = Path()
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    code: int | None = None
    log: BinaryIO | None = None
    restarts: int = 0
    progress: int = 0
    retry_at: float = 0.0
    done: bool = False

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass(slots=True)
class LocalLauncher:
    """Worker processes on this host: restarted when they die, their tickets released at once.

    A context manager: workers start on entry and hand their tickets back on exit. Call `poll` until it returns
    False. `failures` then holds the last words of workers that were given up; `bad_input` says that one of them ended
    for a reason that the user can mend.
    """

    plan: LocalPlan
    ledger: Ledger
    failures: list[str] = field(default_factory=list)
    bad_input: bool = False
    _children: list[_Child] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    def __enter__(self) -> LocalLauncher:
        for index in range(self.plan.workers):
            device = self.plan.devices[index % len(self.plan.devices)] if self.plan.devices else None
            child = _Child(index, device)
            self._children.append(child)
            self._start(child)
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
        """Asks all workers to hand their tickets back, and kills those that do not end in time."""
        for child in self._children:
            child.done = True
            if child.process is not None and child.running:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.plan.stop_seconds
        buried = [child for child in self._children if self._bury(child, max(0.1, deadline - time.monotonic()))]
        try:
            self._hand_back(child.worker_id for child in buried)
        except DatabaseError as error:
            logger.warning("what killed workers held is free when its lease ends, the database is away: %s", error)

    def _look_after(self, child: _Child) -> None:
        if child.process is None:
            if time.monotonic() >= child.retry_at:
                self._start(child)
            return
        code = child.code = child.process.returncode
        # First all that needs the database: while that is away the child stays as it is, and is looked at again.
        self._release(child)
        is_over = code == 0 or self._is_stopped()
        given_up = not is_over and (code == EXIT_BAD_INPUT or self._gives_up(child))
        self._bury(child, timeout=1.0)
        if is_over:
            child.done = True
        elif given_up:
            child.done = True
            self.bad_input |= code == EXIT_BAD_INPUT
            self.failures.append(f"worker {child.worker_id} ended with exit code {code}: {_last_line(child.log_path)}")
        else:
            child.retry_at = time.monotonic() + RESTART_DELAYS[min(child.restarts, len(RESTART_DELAYS)) - 1]

    def _is_stopped(self) -> bool:
        """Whether the study gives out no more tickets: a new worker would end like the last one."""
        return self.ledger.study(self.plan.folder.study).stop_reason is not None

    def _gives_up(self, child: _Child) -> bool:
        """Counts a restart; those since the study last moved on must stay few."""
        progress = self.ledger.progress(self.plan.folder.study)
        child.restarts = child.restarts + 1 if progress == child.progress else 1
        child.progress = progress
        return child.restarts > MAX_RESTARTS_WITHOUT_PROGRESS

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
            child.process.kill()
            child.process.wait()
        child.code = child.process.returncode
        if child.log is not None:
            child.log.close()
        child.process = child.log = None
        return True

    def _start(self, child: _Child) -> None:
        # A new name for every start: what the dead process still held is told apart from what the new one claims.
        child.worker_id = f"{platform.node()}-{os.getpid()}-{child.index}.{child.starts}"
        child.starts += 1
        child.log_path = self.plan.folder.log(child.worker_id)
        child.log_path.parent.mkdir(parents=True, exist_ok=True)
        child.log = child.log_path.open("ab")
        child.process = subprocess.Popen(
            self._command(child),
            stdin=subprocess.DEVNULL,
            stdout=child.log,
            stderr=subprocess.STDOUT,
            env=self._environment(),
            # Its own session: a Ctrl-C in the terminal reaches the launcher only, which then stops the workers once.
            start_new_session=True,
        )

    def _command(self, child: _Child) -> list[str]:
        command = [sys.executable, "-m", "search", "worker", self.plan.folder.study]
        command += ["--runs-dir", str(self.plan.folder.runs_dir), "--worker-id", child.worker_id]
        command += ["--parent", str(os.getpid()), "--stop-seconds", str(self.plan.stop_seconds)]
        command += ["--hang", str(self.plan.hang_seconds)]
        if child.device is not None:
            command += ["--device", child.device]
        if self.plan.timeout is not None:
            left = self.plan.timeout - (time.monotonic() - self._started)
            command += ["--timeout", str(max(0.0, left))]
        return command

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        environment[STORAGE_URL_VARIABLE] = self.plan.storage_url
        if self.plan.workers > 1:
            # Several trainers that each use all cores slow one another down.
            threads = max(1, (os.cpu_count() or 1) // self.plan.workers)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        return environment


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()
    except OSError as error:
        return f"its log cannot be read ({error})"
    return f"{lines[-1]} (log: {path})" if lines else f"it printed nothing (log: {path})"
