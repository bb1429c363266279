"""Disks that are full or turn read-only: real small file systems, which needs the right to mount them."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import ENVIRONMENT, TinyStudy, make_study

from search.housekeeping import retry
from search.ledger import TicketState

pytestmark = [pytest.mark.slow, pytest.mark.faults]

COMPLETE, FAIL = TicketState.COMPLETE, TicketState.FAIL
ROOM = 160 << 20
"""Bytes of a disk: a trial's checkpoints and weights, with some to spare."""


@dataclass(frozen=True)
class Disk:
    """A file system in memory."""

    path: Path

    def fill(self) -> None:
        """Leaves one megabyte."""
        (self.path / "filler").write_bytes(bytes(ROOM - (1 << 20)))

    def empty(self) -> None:
        (self.path / "filler").unlink()

    def protect(self) -> None:
        self._remount("ro")

    def release(self) -> None:
        self._remount("rw")

    def _remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], check=True)


@contextmanager
def mounted(path: Path) -> Iterator[Disk]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


class AfterFailure(threading.Thread):
    """Mends the disk as soon as a trial has failed."""

    def __init__(self, study: TinyStudy, disk: Disk, how: str) -> None:
        super().__init__(daemon=True)
        self._study = study
        self._mend = disk.empty if how == "full" else disk.release
        self._over = threading.Event()
        self.mended = False

    def run(self) -> None:
        while not self._over.wait(0.05):
            if FAIL in self._study.states():
                self._mend()
                self.mended = True
                return

    def __enter__(self) -> "AfterFailure":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@pytest.fixture
def study(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> TinyStudy:
    """With its database beside the runs folder, so that either disk can be full."""
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(1)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    return make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), url, train={"pack": 1})


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_disk_of_the_checkpoints_that_takes_nothing_fails_the_trial_with_its_reason_and_not_the_study(
    study: TinyStudy, tmp_path: Path, how: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    with mounted(elsewhere) as disk:
        study.create()
        options = {"checkpoints": str(elsewhere)}
        (disk.fill if how == "full" else disk.protect)()

        with AfterFailure(study, disk, how) as watch:
            study.work("here", **options)

        assert watch.mended
        assert study.states() == [FAIL, COMPLETE, COMPLETE]
        failed = study.tickets()[0]
        print(f"{how}: {failed.reason}")
        assert ("No space left on device" if how == "full" else "Read-only file system") in (failed.reason or "")
        assert str(disk.path) in (failed.reason or "")
        assert (failed.attempt, failed.history) == (1, ())
        retry(study.ledger, study.config)
        study.work("again", **options)
        assert study.states() == [FAIL, COMPLETE, COMPLETE, COMPLETE]
        assert len(study.ledger.reports(study.tickets()[3].id)) == 2


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_disk_of_the_runs_that_takes_nothing_costs_no_trial_whose_files_are_elsewhere(
    study: TinyStudy, tmp_path: Path, how: str
) -> None:
    with mounted(study.runs) as disk:
        study.create()
        (disk.fill if how == "full" else disk.protect)()
        study.work("here", checkpoints=str(tmp_path / "elsewhere"))
        assert study.states() == [COMPLETE] * 3
        assert [len(study.ledger.reports(ticket.id)) for ticket in study.tickets()] == [2, 2, 2]
