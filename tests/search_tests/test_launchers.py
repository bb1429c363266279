"""What every launcher promises, on each of them: real workers that end well, are refused, and are killed."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tiny import ENVIRONMENT, NAME, TinyStudy, make_study

from search.launch.launcher import Launcher
from search.launch.local import LocalLauncher
from search.launch.plan import LaunchPlan
from search.launch.ray import launch_on_ray
from search.ledger import Ledger, TicketState
from search.paths import StudyFolder

pytestmark = pytest.mark.slow

Make = Callable[[LaunchPlan, Ledger], Launcher]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_RUNS_DIR", "YOLOSEARCH_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def ray_at_hand() -> Iterator[None]:
    """Ray as a notebook has it: the launcher uses the connection, and leaves it."""
    ray = pytest.importorskip("ray", reason="needs Ray (the extra ray)")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    assert ray.is_initialized()
    ray.shutdown()


@pytest.fixture(params=["local", "ray"])
def launcher_of(request: pytest.FixtureRequest) -> Make:
    if request.param == "local":
        return LocalLauncher
    request.getfixturevalue("ray_at_hand")
    return partial(launch_on_ray, address="local")


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    def create(**options: object) -> TinyStudy:
        study = make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), **options)
        study.create()
        return study

    return create


def plan_of(study: TinyStudy, workers: int = 1) -> LaunchPlan:
    return LaunchPlan(storage_url=study.storage_url, folder=StudyFolder(study.runs, NAME), workers=workers)


def poll_until(launcher: Launcher, condition: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        launcher.poll()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def trained(study: TinyStudy, attempt: int) -> bool:
    return all(ticket.attempt >= attempt and ticket.epochs_done >= 1 for ticket in study.tickets())


def test_finished_study_ends_its_workers(launcher_of: Make, make: Callable[..., TinyStudy]) -> None:
    study = make(trials=3, train={"epochs": 1})

    with launcher_of(plan_of(study, workers=2), study.ledger) as launcher:
        poll_until(launcher, lambda: not launcher.poll())
        views = launcher.views()

    assert study.states() == [TicketState.COMPLETE] * 3
    assert list(launcher.failures) == []
    assert [(view.index, view.phase, view.restarts) for view in views] == [(0, "done", 0), (1, "done", 0)]
    assert all("trials ended here" in Path(view.log).read_text() for view in views)


def test_refused_data_is_told_once(launcher_of: Make, make: Callable[..., TinyStudy]) -> None:
    study = make(trials=1)
    (study.data.parent / "labels" / "train" / "00000.txt").write_text("0 0.5 0.5 0.3 0.3\n")

    with launcher_of(plan_of(study), study.ledger) as launcher:
        poll_until(launcher, lambda: not launcher.poll())
        views = launcher.views()

    assert launcher.bad_input
    assert [(view.phase, view.restarts) for view in views] == [("given up", 0)]
    assert len(launcher.failures) == 1
    assert "ended with exit code 2: " in launcher.failures[0]
    assert "is not that of study tiny" in launcher.failures[0]
    assert views[0].log in launcher.failures[0]


def test_dead_worker_is_replaced_and_a_stop_hands_back(launcher_of: Make, make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 200})

    with launcher_of(plan_of(study), study.ledger) as launcher:
        poll_until(launcher, lambda: trained(study, attempt=1))
        first = launcher.views()[0]
        assert first.phase == "runs"
        os.kill(next(row.pid for row in study.ledger.workers(NAME) if row.id == first.worker_id), signal.SIGKILL)
        poll_until(launcher, lambda: trained(study, attempt=2))
        second = launcher.views()[0]

    assert (second.phase, second.restarts) == ("runs", 1)
    assert second.worker_id != first.worker_id
    assert list(launcher.failures) == []
    assert [(ticket.state, ticket.attempt) for ticket in study.tickets()] == [(TicketState.WAITING, 2)] * 2
    # The kill is told, the stop at the end is no failure.
    for ticket in study.tickets():
        assert len(ticket.history) == 1
        assert f"on {first.worker_id}: its worker died" in ticket.history[0]
