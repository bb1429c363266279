"""What every launcher is told: which study, how many workers, and on what each of them runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from search.database import STORAGE_URL_VARIABLE
from search.errors import UserInputError
from search.ledger import KINDS
from search.paths import StudyFolder
from search.worker.existing import HANG_SECONDS
from search.worker.lease import DEFAULT_LEASE_SECONDS
from yolocore.host import WORKERS_VARIABLE, available_cores

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREADS_VARIABLE = "OMP_NUM_THREADS"
STOP_SECONDS = 10.0
"""How long a worker may take to end when it is asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One worker's place: it keeps the place, whichever process sits in it."""

    index: int
    device: str | None = None
    """Overrides the study's device; None leaves it."""
    gpu: str | None = None
    """What the process sees as its only GPU (a value of CUDA_VISIBLE_DEVICES); None shows it all."""

    @property
    def label(self) -> str:
        """In a few letters, for people; empty where the study says it."""
        return f"gpu {self.gpu}" if self.gpu is not None else self.device or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """How many workers to start, and on what.

    Attributes:
        storage_url: Database of the study. Passed on in the environment, so that no password shows in `ps`.
        folder: Files of the study on this host.
        workers: Number of processes.
        devices: Dealt out to the workers in turn; empty leaves the choice to the study's configuration.
        gpus: Values of CUDA_VISIBLE_DEVICES, dealt out in turn: each worker sees one. Goes before `devices`.
        per_gpu: Workers that share a GPU; under Ray a worker asks for this fraction of one.
        stop_seconds: How long a worker may take to hand its tickets back before it is killed.
        timeout: Seconds after which workers claim nothing new.
        hang_seconds: Seconds after which a silent trainer is killed.
        lease_seconds: Seconds after which a silent worker loses its tickets.
        data: The data set's YAML, where it lies elsewhere on the workers' hosts.
        checkpoints: Folder or URL that all workers of the study see; None for the environment's, or the runs folder.
        only: Kind of the tickets that workers take; None for all.
    """

    storage_url: str
    folder: StudyFolder
    workers: int = 1
    devices: Sequence[str] = ()
    gpus: Sequence[str] = ()
    per_gpu: int = 1
    stop_seconds: float = STOP_SECONDS
    timeout: float | None = None
    hang_seconds: float = HANG_SECONDS
    lease_seconds: float = DEFAULT_LEASE_SECONDS
    data: Path | None = None
    checkpoints: str | None = None
    only: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the tickets that workers take."""
        return KINDS if self.only is None else (self.only,)

    def seats(self) -> tuple[Seat, ...]:
        """One place for each worker: neighbours in number sit on different GPUs."""
        return tuple(self._seat(index) for index in range(self.workers))

    def _seat(self, index: int) -> Seat:
        if self.gpus:
            # The process sees one GPU, which is its first whatever its number on the host.
            return Seat(index=index, device="cuda", gpu=self.gpus[index % len(self.gpus)])
        return Seat(index=index, device=self.devices[index % len(self.devices)] if self.devices else None)

    def worker_command(
        self, worker_id: str, seat: Seat, *, parent: int | None = None, seconds_left: float | None = None
    ) -> list[str]:
        """The words that start a worker with this interpreter; no secret is among them.

        Args:
            worker_id: Unique over all hosts and starts.
            seat: Where it runs.
            parent: Process id of the launcher, if the worker is its child: it ends when that process is gone.
            seconds_left: Of `timeout`, at this start.
        """
        words = [sys.executable, "-m", "search", "worker", self.folder.study]
        words += ["--runs-dir", str(self.folder.runs_dir), "--worker-id", worker_id]
        words += ["--stop-seconds", str(self.stop_seconds), "--hang", str(self.hang_seconds)]
        words += ["--lease", str(self.lease_seconds)]
        optional = {
            "--parent": parent,
            "--device": seat.device,
            "--timeout": None if seconds_left is None else max(0.0, seconds_left),
            "--data": self.data,
            "--checkpoints": self.checkpoints,
            "--only": self.only,
        }
        for option, value in optional.items():
            if value is not None:
                words += [option, str(value)]
        return words

    def worker_environment(self, seat: Seat) -> dict[str, str]:
        """What a worker's environment has besides the launcher's own: the database, its GPU, its share of the cores."""
        environment = {STORAGE_URL_VARIABLE: self.storage_url}
        if seat.gpu is not None:
            environment[GPU_VARIABLE] = seat.gpu
        if self.workers > 1 and WORKERS_VARIABLE not in os.environ:
            environment[WORKERS_VARIABLE] = str(self.workers)
        if self.workers > 1 and THREADS_VARIABLE not in os.environ:
            # Several trainers that each use all cores slow one another down.
            environment[THREADS_VARIABLE] = str(max(1, available_cores() // self.workers))
        return environment


def choose_gpus(asked: str | None, visible: Sequence[str]) -> tuple[str, ...]:
    """The GPUs to launch on, as values of CUDA_VISIBLE_DEVICES.

    Args:
        asked: Numbers as `cuda:N` counts them, or UUIDs, joined by commas; `none` for none; None for all.
        visible: Those of this host that this process may use, in the order in which `cuda:N` counts them.

    Raises:
        UserInputError: A number that is not there, or one that is named twice.
    """
    if asked is None:
        return tuple(visible)
    if asked == "none":
        return ()
    words = [word.strip() for word in asked.split(",")]
    allowed = f"none, or some of {','.join(map(str, range(len(visible))))}" if visible else "none: this host has no GPU"
    for word in words:
        is_there = word.startswith(("GPU-", "MIG-")) or (word.isdecimal() and int(word) < len(visible))
        if not is_there or words.count(word) > 1:
            found = "twice" if is_there else "which is not there"
            raise UserInputError(f"--gpus: got {word!r}, {found}; allowed: {allowed} (or UUIDs), each once")
    return tuple(visible[int(word)] if word.isdecimal() else word for word in words)


def choose_workers(asked: int | None, gpus: int, per_gpu: int) -> int:
    """How many workers to start: one for each share of a GPU unless told otherwise, one without GPUs.

    Raises:
        UserInputError: More than there are shares.
    """
    if asked is None:
        return max(1, gpus * per_gpu)
    if gpus and asked > gpus * per_gpu:
        raise UserInputError(
            f"--workers: got {asked}; allowed: 1 to {gpus * per_gpu}, for {gpus} GPUs with --per-gpu {per_gpu}"
        )
    return asked
