"""How workers are asked to end: real signals to real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import NAME, TinyStudy, make_study, wait_for

from search.ledger import TicketState, WorkerState

WAITING = TicketState.WAITING
APART_SECONDS = 0.05
"""Between the signals of a service manager and of a launcher that it ends as well."""


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda **options: make_study(tmp_path / "study", shared, **options)


def trains(study: TinyStudy) -> bool:
    return [ticket.epochs_done >= 1 for ticket in study.tickets()] == [True] * 2


def send(process: subprocess.Popen[str], *numbers: signal.Signals) -> None:
    for number in numbers:
        process.send_signal(number)
        time.sleep(APART_SECONDS)


def test_worker_sigterm_again_and_again_hands_back_all_the_same(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=2, train={"epochs": 60})
    study.create()
    process = study.start("worker")
    wait_for(lambda: trains(study) and len(study.mlflow_runs()) == 3, process)

    send(process, *[signal.SIGTERM] * 3)

    assert process.wait(60) == 130, process.communicate()[0]
    assert study.states() == [WAITING] * 2
    assert [(ticket.stalled_attempts, ticket.history) for ticket in study.tickets()] == [(0, ())] * 2
    assert [run.info.status for name, run in study.mlflow_runs().items() if name != "summary"] == ["SCHEDULED"] * 2


def test_run_sigterm_to_launcher_and_workers_hands_back(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 60})
    process = study.start("run", "--lease", "400", "--stop-seconds", "30")
    wait_for(lambda: trains(study), process)
    (worker,) = study.ledger.workers(NAME)
    command = Path(f"/proc/{worker.pid}/cmdline").read_text().split("\0")

    # As systemd does to a control group, to each of its processes, and once more.
    for _ in range(2):
        os.kill(worker.pid, signal.SIGTERM)
        send(process, signal.SIGTERM)

    assert process.wait(60) == 130, process.communicate()[0]
    assert study.states() == [WAITING] * 2
    assert [worker.state for worker in study.ledger.workers(NAME)] == [WorkerState.EXITED]
    given = {option: command[command.index(option) + 1] for option in ("--lease", "--stop-seconds")}
    assert given == {"--lease": "400.0", "--stop-seconds": "30.0"}


FLAG = """
import os, signal, sys, time
from search.worker.stop import StopFlag
parent = os.getppid() if sys.argv[1] == "here" else os.getpid()
with StopFlag(parent, seconds=float(sys.argv[2])).installed() as stop:
    for word in sys.argv[3:]:
        if word == "asked":
            print(stop.is_set)
        else:
            os.kill(os.getpid(), signal.Signals[word])
    time.sleep(3)
"""
"""A process whose launcher is `here` or `gone`, which ends 3 s after all is said."""


@pytest.mark.parametrize(
    ("launcher", "seconds", "words", "code", "said"),
    [
        ("here", "60", ("asked", "SIGTERM", "asked", "SIGTERM", "SIGTERM"), 0, "False True"),
        ("here", "60", ("SIGINT", "asked", "SIGINT"), 130, "True"),
        ("here", "60", ("SIGTERM", "SIGINT"), 0, ""),
        ("here", "0.3", ("SIGTERM",), 143, ""),
        ("gone", "60", ("asked", "SIGTERM", "SIGTERM"), 0, "True"),
        ("gone", "0.3", ("asked",), 143, "True"),
    ],
)
def test_stop_flag_only_a_second_ctrl_c_or_the_time_ends_at_once(
    launcher: str, seconds: str, words: tuple[str, ...], code: int, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-uc", FLAG, launcher, seconds, *words], capture_output=True, text=True, check=False
    )

    assert done.returncode == code, done.stderr
    assert done.stdout.split() == said.split()
