"""`launch`: real workers under a terminal and without one, stopped politely, at once, and by a SIGKILL."""

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from ledger_rows import NAME as ROWS
from ledger_rows import study_config
from tiny import NAME, TinyStudy, make_study, wait_for

from search.cli_launch import existing_job
from search.database import make_engine
from search.ledger import TicketState, WorkerState, schema
from search.ledger.tables import study_table
from search.worker.host import release_dead_neighbours

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL", "YOLOSEARCH_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda **options: make_study(tmp_path / "study", shared, **options)


def test_existing_job_study_of_an_older_version_is_upgraded(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / ROWS
    folder.mkdir(parents=True)
    row = {"name": ROWS, "config": study_config(1).to_json(), "fingerprint": "f", "versions": {}, "created": 0.0}
    with make_engine(f"sqlite:///{folder / 'study.db'}").begin() as connection:
        command.upgrade(schema._config(connection), "0004")
        connection.execute(sa.insert(study_table).values(**row, token="t"))

    job = existing_job(ROWS, None, tmp_path / "runs")

    job.ledger.check_schema()
    assert job.ledger.study(ROWS).name == job.config.name == ROWS


class Terminal:
    """A process on a terminal of 80 columns, and all that it wrote there."""

    def __init__(self, study: TinyStudy, *options: str) -> None:
        self._master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        environment = {"TERM": "xterm", "COLUMNS": "80"}
        self.process = study.start("launch", *options, env=environment, **pipes)
        os.close(slave)
        self._written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # EIO: the other side is closed
            while chunk := os.read(self._master, 65536):
                self._written += chunk

    @property
    def text(self) -> str:
        return self._written.decode()

    @property
    def plain(self) -> str:
        """Without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text)

    def end(self, seconds: float) -> int:
        code = self.process.wait(seconds)
        self._reader.join(10)
        os.close(self._master)
        return code


@contextmanager
def on_terminal(study: TinyStudy, *options: str) -> Iterator[Terminal]:
    terminal = Terminal(study, *options)
    try:
        yield terminal
    finally:
        terminal.process.kill()


def is_training(study: TinyStudy) -> bool:
    return [ticket.epochs_done >= 1 for ticket in study.tickets()] == [True, True]


@pytest.mark.slow
def test_launch_two_workers_finish_a_study_by_its_name_and_show_lines(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 1, "pack": 1})
    study.create()

    process = study.start("launch", "--workers", "2", "--lease", "60")
    output, _ = process.communicate(timeout=300)

    assert process.returncode == 0, output + study.logs()
    assert study.states() == [TicketState.COMPLETE] * 2
    lines = output.splitlines()
    assert len([line for line in lines if re.match(r"worker [01] \(pid \d+\) runs; log: /.*-[01]\.log$", line)]) == 2
    assert any(line.startswith("best hyp: ") for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert len(list((study.runs / NAME / "logs").iterdir())) == 2


def test_launch_of_a_file_creates_the_study_and_prints_json_at_the_end(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=1, train={"epochs": 1})
    words = [*map(str, (sys.executable, "-m", "search", "launch", study.file, "--runs-dir", study.runs, "--json"))]

    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)

    status = json.loads(done.stdout)
    assert (status["finished"], status["counts"]["COMPLETE"]) == (True, 1)
    assert len(status["devices"]) == 1


@pytest.mark.slow
def test_launch_ctrl_c_hands_back_and_leaves_the_terminal_clean(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 400})
    study.create()
    with on_terminal(study, "--stop-seconds", "10") as terminal:
        wait_for(lambda: is_training(study) and " trains " in terminal.plain, terminal.process)
        terminal.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        code = terminal.end(30)

    assert code == 130
    assert time.monotonic() - began < 13
    assert [(ticket.state, ticket.history) for ticket in study.tickets()] == [(TicketState.WAITING, ())] * 2
    text = terminal.text
    assert "stopping: running trials are handed back" in text
    assert "Traceback" not in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    table = terminal.plain[: terminal.plain.index("stopping:")]
    assert max(map(len, re.split(r"[\r\n]+", table))) <= 80


@pytest.mark.slow
def test_launch_second_ctrl_c_ends_everything_at_once(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 400})
    study.create()
    with on_terminal(study, "--stop-seconds", "60") as terminal:
        wait_for(lambda: is_training(study), terminal.process)
        worker = study.ledger.workers(NAME)[0].pid
        os.kill(worker, signal.SIGSTOP)  # it will not answer the first
        terminal.process.send_signal(signal.SIGINT)
        wait_for(lambda: "stopping:" in terminal.text, terminal.process)
        terminal.process.send_signal(signal.SIGINT)
        began = time.monotonic()
        code = terminal.end(30)

    assert code == 130
    assert time.monotonic() - began < 5
    assert "Traceback" not in terminal.text
    assert not Path(f"/proc/{worker}").exists()
    # What the next worker of this host does first: it does not wait for a lease.
    assert release_dead_neighbours(study.ledger, NAME) == 2


@pytest.mark.slow
def test_launch_killed_launcher_workers_hand_back_and_end(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 400})
    study.create()
    process = study.start("launch", "--workers", "1")
    wait_for(lambda: is_training(study), process)

    process.kill()
    process.wait()

    deadline = time.monotonic() + 60
    while [worker.state for worker in study.ledger.workers(NAME)] != [WorkerState.EXITED]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [(ticket.state, ticket.history) for ticket in study.tickets()] == [(TicketState.WAITING, ())] * 2


@pytest.mark.slow
def test_launch_killed_worker_is_shown_replaced_and_its_trials_go_on(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 400})
    study.create()
    with on_terminal(study) as terminal:
        wait_for(lambda: is_training(study), terminal.process)
        os.kill(study.ledger.workers(NAME)[0].pid, signal.SIGKILL)
        # At once: the lease is 300 s.
        wait_for(lambda: [ticket.attempt for ticket in study.tickets()] == [2, 2], terminal.process, seconds=60)
        wait_for(lambda: re.search(r"cpu +trains +1 +0-1 ", terminal.plain) is not None, terminal.process)
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end(30) == 130


def test_launch_gpus_that_are_not_there_exit_2(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()

    process = study.start("launch", "--gpus", "0,1")
    output, _ = process.communicate(timeout=60)

    assert (process.returncode, output) == (
        2,
        "--gpus: got '0', which is not there; allowed: none: this host has no GPU (or UUIDs), each once\n",
    )
