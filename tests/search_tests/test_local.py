"""The launcher: real worker processes, killed and restarted."""

import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import ENVIRONMENT, NAME, TinyStudy, make_study

from search.launch.local import LocalLauncher
from search.launch.plan import LaunchPlan
from search.ledger import TicketState
from search.paths import StudyFolder
from search.worker.host import release_dead_neighbours


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def study(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    study = make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), trials=2, train={"epochs": 40})
    study.create()
    return study


def plan_of(study: TinyStudy) -> LaunchPlan:
    return LaunchPlan(storage_url=study.storage_url, folder=StudyFolder(study.runs, NAME))


def poll_until(launcher: LocalLauncher, condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        launcher.poll()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_launcher_killed_worker_is_replaced_and_its_trials_go_on(study: TinyStudy) -> None:
    with LocalLauncher(plan_of(study), study.ledger) as launcher:
        poll_until(launcher, lambda: all(ticket.epochs_done >= 1 for ticket in study.tickets()))
        first = launcher.pids
        os.kill(first[0], signal.SIGKILL)
        poll_until(launcher, lambda: any(ticket.attempt == 2 for ticket in study.tickets()))
        second = launcher.pids

    assert len(first) == len(second) == 1
    assert first != second
    assert launcher.pids == ()
    assert launcher.failures == []
    for ticket in study.tickets():
        # The kill is told, the stop at the end is not a failure.
        assert (ticket.state, len(ticket.history)) == (TicketState.WAITING, 1)
        assert "its worker died" in ticket.history[0]
        assert ticket.epochs_done >= 1


def test_launcher_worker_that_refuses_its_data_is_not_restarted(study: TinyStudy) -> None:
    (study.data.parent / "labels" / "train" / "00000.txt").write_text("0 0.5 0.5 0.3 0.3\n")

    with LocalLauncher(plan_of(study), study.ledger) as launcher:
        poll_until(launcher, lambda: not launcher.poll())

    assert launcher.bad_input
    assert len(launcher.failures) == 1
    assert "ended with exit code 2: " in launcher.failures[0]
    assert "is not that of study tiny" in launcher.failures[0]
    assert str(launcher.log_paths[0]) in launcher.failures[0]


def command_line(pid: int) -> list[str]:
    """A process's words; for a moment after its start the kernel does not show them yet."""
    deadline = time.monotonic() + 10
    while not (text := Path(f"/proc/{pid}/cmdline").read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return text.decode().split("\0")


def test_launcher_passes_the_url_by_the_environment_and_devices_in_turn(study: TinyStudy) -> None:
    secret = replace(plan_of(study), storage_url="postgresql://me:secret@127.0.0.1:9/db", devices=("cpu", "cuda:7"))
    with LocalLauncher(replace(secret, workers=3), study.ledger) as launcher:
        lines = [command_line(pid) for pid in launcher.pids]

    assert [line[line.index("--device") + 1] for line in lines] == ["cpu", "cuda:7", "cpu"]
    assert all(line[0] == sys.executable for line in lines)
    assert not any("secret" in word for line in lines for word in line)


def test_launcher_worker_that_cannot_start_ends_those_that_did(study: TinyStudy) -> None:
    launcher = LocalLauncher(replace(plan_of(study), workers=3), study.ledger)
    # The log of the third is a folder.
    StudyFolder(study.runs, NAME).log(f"{platform.node()}-{os.getpid()}-2").mkdir(parents=True)

    with pytest.raises(IsADirectoryError), launcher:
        pytest.fail("it started")

    assert launcher.pids == ()
    assert len(launcher.log_paths) == 3
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if is_worker_of(pid, study)]


def is_worker_of(process: Path, study: TinyStudy) -> bool:
    with suppress(OSError):
        words = (process / "cmdline").read_text().split("\0")
        return "worker" in words and str(study.runs) in words
    return False


def test_launcher_finished_study_needs_no_restart(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    study = make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), trials=1, train={"epochs": 1})
    study.create()

    with LocalLauncher(plan_of(study), study.ledger) as launcher:
        poll_until(launcher, lambda: not launcher.poll())

    assert study.states() == [TicketState.COMPLETE]
    assert launcher.failures == []
    assert "1 trials ended here" in study.logs()
    assert release_dead_neighbours(study.ledger, NAME) == 0
