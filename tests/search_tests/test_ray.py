"""Workers on Ray: what needs no cluster, and (slow) real clusters whose actors and nodes are killed."""

import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty import assert_exact, ended, is_zombie, signal_all, until
from tiny import ENVIRONMENT, NAME, TinyStudy, make_study
from typer.testing import CliRunner

from search.cli import app
from search.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserInputError
from search.launch.plan import LaunchPlan, Seat
from search.launch.ray import (
    RayLauncher,
    RayShare,
    WorkerActor,
    WorkerTask,
    environment_on_node,
    forwarded,
    launch_on_ray,
)
from search.ledger import TicketState
from search.paths import StudyFolder

ray = pytest.importorskip("ray", reason="needs Ray (the extra ray)")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "YOLOSEARCH_RUNS_DIR", "YOLOSEARCH_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    def create(**options: Any) -> TinyStudy:
        study = make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), **options)
        study.create()
        return study

    return create


def plan_of(study: TinyStudy, workers: int = 1) -> LaunchPlan:
    return LaunchPlan(storage_url=study.storage_url, folder=StudyFolder(study.runs, NAME), workers=workers)


# ---- without a cluster -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"gpus": 1.5}, "--gpus-per-worker: got 1.5; allowed: 0 to 1, for example 0.5"),
        ({"gpus": -1.0}, "--gpus-per-worker: got -1; allowed: 0 to 1, for example 0.5"),
        ({"cpus": -0.5}, "--cpus-per-worker: got -0.5; allowed: 0 or more"),
        ({"placement": "anywhere"}, "--placement: got 'anywhere'; allowed: spread, pack"),
    ],
)
def test_share_impossible_value_is_one_line(share: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError) as caught:
        RayShare(**share)
    assert str(caught.value) == message


def test_launch_without_ray_names_the_extra(make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch) -> None:
    study = make(trials=1)
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(UserInputError, match=r"ray is not installed .*: pip install '\.\[ray\]'"):
        launch_on_ray(plan_of(study), study.ledger)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nonsense"])
def test_launch_nobody_at_the_address_is_one_line(make: Callable[..., TinyStudy], address: str) -> None:
    study = make(trials=1)

    with pytest.raises(UserInputError) as caught, launch_on_ray(plan_of(study), study.ledger, address):
        pass

    assert str(caught.value).startswith(f"--address: got {address!r}: ")
    assert "; allowed: local, auto" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not ray.is_initialized()


def task_of(study: TinyStudy, **changes: Any) -> WorkerTask:
    task = WorkerTask(
        plan=replace(plan_of(study), storage_url=""),
        worker_id="w.0",
        seat=Seat(index=0, device="cpu"),
        environment={"YOLOSEARCH_STORAGE_URL": study.storage_url, "PGPASSWORD": "secret"},
        seconds_left=None,
        only_host=platform.node(),
    )
    return replace(task, **changes)


def test_task_shows_no_secret(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=1)
    task = task_of(study)
    assert "secret" not in repr(task)
    assert study.storage_url not in repr(task)


def test_everything_that_a_connection_needs_is_forwarded() -> None:
    pq = pytest.importorskip("psycopg").pq
    libpq = {option.envvar.decode() for option in pq.Conninfo.get_defaults() if option.envvar}
    # What docs/deploy.md and docs/scaling.md tell users to set.
    own = {
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
        "YOLOSEARCH_CHECKPOINTS",
        "YOLOSEARCH_OPTUNA_GRPC",
    }
    here = dict.fromkeys(libpq | own, "x")

    assert forwarded({**here, "HOME": "/root", "AWS_SECRET_ACCESS_KEY": "k", "YOLOSEARCH_DATA_ROOT": "/data"}) == here


def test_node_keeps_its_own_places_of_files_and_nothing_else() -> None:
    sent = {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": "/launcher/root.pem", "PGPASSFILE": "/launcher/pgpass"}

    worker = environment_on_node(sent, {"PGSSLMODE": "prefer", "PGSSLROOTCERT": "/node/root.pem", "HOME": "/root"})

    assert worker == {
        "HOME": "/root",
        "PGSSLMODE": "verify-full",
        "PGSSLROOTCERT": "/node/root.pem",
        "PGPASSFILE": "/launcher/pgpass",
    }


def test_actor_on_another_host_refuses_a_database_file(make: Callable[..., TinyStudy], tmp_path: Path) -> None:
    end = WorkerActor().run(task_of(make(trials=1), only_host="elsewhere"), str(tmp_path / "log"))

    assert end.code == EXIT_BAD_INPUT
    assert end.words.startswith("SQLite is for one host: elsewhere has the file, ")
    assert not (tmp_path / "log").exists()


def test_actor_stopped_before_its_start_starts_nothing(make: Callable[..., TinyStudy], tmp_path: Path) -> None:
    actor = WorkerActor()
    actor.stop(1.0)
    study = make(trials=1)

    assert actor.run(task_of(study), str(tmp_path / "log")).code == EXIT_INTERRUPTED
    assert study.ledger.workers(NAME) == ()


def test_actor_whose_log_cannot_be_written_says_where(make: Callable[..., TinyStudy], tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    end = WorkerActor().run(task_of(make(trials=1)), str(tmp_path / "file" / "log"))

    assert end.code is None
    assert end.words.startswith(f"{tmp_path / 'file'}: ")
    assert end.words.endswith(f" on {platform.node()}")


def test_actor_runs_a_worker_and_hands_its_trials_back_when_stopped(
    make: Callable[..., TinyStudy], tmp_path: Path
) -> None:
    study = make(trials=2, train={"epochs": 200})
    actor = WorkerActor()
    ends: list[Any] = []
    thread = threading.Thread(target=lambda: ends.append(actor.run(task_of(study), str(tmp_path / "log"))))
    thread.start()
    until(lambda: any(ticket.worker == "w.0" for ticket in study.tickets()))

    actor.stop(20.0)
    thread.join(20.0)

    assert [end.code for end in ends] == [EXIT_INTERRUPTED]
    assert [(ticket.state, ticket.history) for ticket in study.tickets()] == [(TicketState.WAITING, ())] * 2


def test_actor_takes_its_folder_from_the_nodes_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    folder = StudyFolder(Path("/launcher/runs"), NAME)
    here = WorkerActor().spot(folder, "w", 0.0)
    monkeypatch.setenv("YOLOSEARCH_RUNS_DIR", str(tmp_path))
    there = WorkerActor().spot(folder, "w", 0.0)

    assert here.log == "/launcher/runs/tiny/logs/w.log"
    assert there.log == f"{tmp_path}/tiny/logs/w.log"
    assert here.label == platform.node()
    assert WorkerActor().spot(folder, "w", 0.5).label == f"{platform.node()} gpu 3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--placement", "pack"), "--placement: got 'pack'; allowed: with --on ray only"),
        (("--gpus-per-worker", "0.5"), "--gpus-per-worker: got 0.5; allowed: with --on ray only"),
        (("--on", "ray"), "--workers: got none; allowed with --on ray: a number of workers, 1 or more"),
        (
            ("--on", "ray", "--workers", "2", "--gpus", "0"),
            "--gpus: got '0'; allowed with --on ray: --gpus-per-worker, Ray chooses which",
        ),
        (("--on", "ray", "--workers", "2", "--placement", "x"), "--placement: got 'x'; allowed: spread, pack"),
    ],
)
def test_launch_options_that_do_not_fit_are_refused_before_anything_starts(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    words = ["launch", "no-such-study.yaml", "--runs-dir", str(tmp_path), *options]
    result = CliRunner().invoke(app, words)

    assert isinstance(result.exception, UserInputError)
    assert str(result.exception) == message
    assert list(tmp_path.iterdir()) == []


# ---- real clusters ---------------------------------------------------------------------------------------------------


class Nodes:
    """A head that gives no room, and nodes for two workers each, all on this host."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self._client_port = free_port()
        head = {"num_cpus": 0, "include_dashboard": False, "ray_client_server_port": self._client_port}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        # A GPU that Ray believes in is enough to see how it deals them out.
        self.nodes = [self._cluster.add_node(num_cpus=2, num_gpus=1) for _ in range(count)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def client_address(self) -> str:
        """For a process outside of the cluster."""
        return f"ray://127.0.0.1:{self._client_port}"

    @property
    def session(self) -> Path:
        return Path(self._cluster.head_node.get_session_dir_path())

    def processes(self, index: int) -> list[int]:
        """All processes of a node: its raylet, and whatever that or its actors started."""
        raylet = self.nodes[index].all_processes["raylet"][0].process.pid
        mark = f"RAY_RAYLET_PID={raylet}".encode()
        return [raylet, *(pid for pid in all_pids() if mark in environment_of(pid))]

    def holds(self, index: int, pid: int) -> bool:
        return pid in self.processes(index)

    def close(self) -> None:
        for index in range(len(self.nodes)):
            signal_all(self.processes(index), signal.SIGCONT)
        self._cluster.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def environment_of(pid: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # an empty one forbids a node its GPU
    nodes = Nodes(2)
    yield nodes
    nodes.close()


def working(study: TinyStudy) -> dict[str, int]:
    """Workers that hold trials with an epoch done, and their processes."""
    holders = {ticket.worker for ticket in study.tickets() if ticket.epochs_done and ticket.worker}
    return {worker.id: worker.pid for worker in study.ledger.workers(NAME) if worker.id in holders}


def poll_until(launcher: RayLauncher, condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        launcher.poll()
        assert launcher.failures == []
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def finish(launcher: RayLauncher) -> None:
    poll_until(launcher, lambda: not launcher.poll(), seconds=600.0)


def charged_workers(study: TinyStudy) -> set[str]:
    """Workers whose death ended an attempt."""
    return {
        words.split(" on ", 1)[1].split(":", 1)[0]
        for ticket in study.tickets()
        for words in ticket.history
        if "its worker died" in words
    }


@pytest.mark.slow
@pytest.mark.faults
def test_an_actor_then_a_node_killed_the_study_ends_exactly(make: Callable[..., TinyStudy], nodes: Nodes) -> None:
    study = make(trials=6, train={"epochs": 60}, tracked=True)
    with launch_on_ray(plan_of(study, workers=2), study.ledger, nodes.address) as launcher:
        poll_until(launcher, lambda: len(working(study)) == 2)
        first = working(study)
        assert {nodes.holds(0, pid) for pid in first.values()} == {True, False}  # spread over both nodes
        victim, pid = next(iter(first.items()))
        os.kill(parent_of(pid), signal.SIGKILL)
        killed_at = time.monotonic()
        poll_until(launcher, lambda: len(working(study)) == 2 and victim not in working(study))
        print(f"actor killed: another worker trains after {time.monotonic() - killed_at:.1f} s")

        # The new actor may be on either node: lost is one on which somebody works.
        doomed = 0 if any(nodes.holds(0, pid) for pid in working(study).values()) else 1
        lost = {name for name, pid in working(study).items() if nodes.holds(doomed, pid)}
        signal_all(nodes.processes(doomed), signal.SIGKILL)
        killed_at = time.monotonic()
        poll_until(launcher, lambda: lost <= charged_workers(study))
        print(f"node with {len(lost)} workers killed: their trials are free after {time.monotonic() - killed_at:.1f} s")
        finish(launcher)
        restarts = [view.restarts for view in launcher.views()]

    print(f"restarts {restarts}, attempts {[ticket.attempt for ticket in study.tickets()]}")
    assert lost
    # One more where Ray has put a new actor on the killed node before it knew of its end.
    assert sum(restarts) in (1 + len(lost), 2 + len(lost))
    assert study.states() == [TicketState.COMPLETE] * 6
    assert_exact(study, 6, epochs=60)


@pytest.mark.slow
@pytest.mark.faults
def test_a_node_that_was_taken_for_dead_wakes_up_and_changes_nothing(
    make: Callable[..., TinyStudy], nodes: Nodes
) -> None:
    study = make(trials=4, train={"epochs": 60}, tracked=True)
    with launch_on_ray(plan_of(study, workers=2), study.ledger, nodes.address) as launcher:
        poll_until(launcher, lambda: len(working(study)) == 2)
        halted = nodes.processes(1)
        stale = {name for name, pid in working(study).items() if pid in halted}
        assert len(stale) == 1
        signal_all(halted, signal.SIGSTOP)
        poll_until(launcher, lambda: stale <= charged_workers(study))
        signal_all(halted, signal.SIGCONT)
        finish(launcher)

    assert charged_workers(study) == stale
    assert study.states() == [TicketState.COMPLETE] * 4
    assert_exact(study, 4, epochs=60)


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_launcher_leaves_no_worker_and_its_trials_go_on(make: Callable[..., TinyStudy], nodes: Nodes) -> None:
    study = make(trials=4, train={"epochs": 20}, tracked=True)
    process = study.start("launch", "--on", "ray", "--address", nodes.address, "--workers", "2")
    with ended(process):
        until(lambda: len(working(study)) == 2, process)
        pids = working(study).values()
        process.kill()
        killed_at = time.monotonic()
        until(lambda: all(is_zombie(pid) for pid in pids), seconds=60.0)
        print(f"launcher killed: its workers are gone after {time.monotonic() - killed_at:.1f} s")

    # On their host nobody has to wait for leases that nobody handed back.
    study.work("successor")
    assert study.states() == [TicketState.COMPLETE] * 4
    assert_exact(study, 4, epochs=20)


@pytest.mark.slow
def test_packed_workers_of_a_client_share_a_node_and_no_secret_is_written(
    make: Callable[..., TinyStudy], nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "a-secret-of-the-launcher")
    study = make(trials=4, train={"epochs": 100})
    share = RayShare(placement="pack")
    with launch_on_ray(plan_of(study, workers=2), study.ledger, nodes.client_address, share) as launcher:
        poll_until(launcher, lambda: len(working(study)) == 2)
        pids = list(working(study).values())
        assert nodes.holds(0, pids[0]) == nodes.holds(0, pids[1])
        for pid in pids:
            told = {b"PGPASSWORD=a-secret-of-the-launcher", b"YOLOSEARCH_WORKERS_ON_HOST=2", b"CUDA_VISIBLE_DEVICES="}
            assert told <= set(environment_of(pid))

    files = [path for path in nodes.session.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"a-secret-of-the-launcher" in path.read_bytes()]
    # Asked to end, not killed: all is handed back at no charge.
    assert [(ticket.state, ticket.history) for ticket in study.tickets()] == [(TicketState.WAITING, ())] * 4


@pytest.mark.slow
def test_launch_in_a_process_that_has_used_ray_before_starts_a_cluster_of_its_own(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 64)
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    ray.shutdown()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    study = make(trials=1, train={"epochs": 1})

    with launch_on_ray(plan_of(study), study.ledger, "local") as launcher:
        finish(launcher)

    assert study.states() == [TicketState.COMPLETE]


@pytest.mark.slow
def test_more_workers_than_room_take_turns_and_end_with_the_study(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=3, train={"epochs": 2})
    room = len(os.sched_getaffinity(0))
    with launch_on_ray(plan_of(study, workers=room + 1), study.ledger, "local") as launcher:
        assert isinstance(launcher, RayLauncher)
        poll_until(launcher, lambda: [view.phase for view in launcher.views()].count("runs") == room)
        assert [view.phase for view in launcher.views()].count("waits") == 1
        with pytest.raises(UserInputError, match=r"--gpus-per-worker: 1 x 1, and this host has 0 GPU; allowed: less"):
            launch_on_ray(plan_of(study), study.ledger, "local", RayShare(gpus=1.0)).__enter__()
        finish(launcher)

    assert study.states() == [TicketState.COMPLETE] * 3


@pytest.mark.slow
def test_two_workers_share_a_gpu_and_are_told_to_use_it(make: Callable[..., TinyStudy], nodes: Nodes) -> None:
    study = make(trials=1)
    share = RayShare(gpus=0.5, placement="pack")
    with launch_on_ray(plan_of(study, workers=4), study.ledger, nodes.address, share) as launcher:
        until(lambda: not launcher.poll())
        places = [view.place for view in launcher.views()]

    assert places == [f"{platform.node()} gpu 0"] * 4
    assert launcher.bad_input
    assert len(launcher.failures) == 4
    assert all("device 'cuda': not on this machine" in words for words in launcher.failures)
