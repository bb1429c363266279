"""The server behind `yolosearch ui`: its command line, and a real one from start to end."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.errors import UserInputError
from search.launch.mlflow_ui import MlflowUi, choose_port, server_command, server_environment
from search.tracking import MlflowTracker, TrackingError


def fetch(url: str) -> Any:
    """The JSON (or else the text) that a server on this machine answers with."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=20) as answer:
        text = answer.read().decode()
        return json.loads(text) if "json" in answer.headers["Content-Type"] else text


def group_members(leader: int) -> list[str]:
    """The processes, without zombies, of a process group."""
    listing = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    return [row[2] for row in rows if int(row[0]) == leader and not row[1].startswith("Z")]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_server_command_serves_artifacts_on_one_worker_without_naming_the_store(tmp_path: Path) -> None:
    command = server_command("127.0.0.1", 5005, tmp_path / "mlartifacts")

    assert command[1:] == [
        *("-m", "mlflow", "server", "--host", "127.0.0.1", "--port", "5005", "--workers", "1"),
        *("--artifacts-destination", f"file://{tmp_path}/mlartifacts"),
    ]


def test_server_command_with_allowed_hosts_passes_them(tmp_path: Path) -> None:
    command = server_command("0.0.0.0", 80, tmp_path, allowed_hosts="mlflow.example:80")

    assert command[-2:] == ["--allowed-hosts", "mlflow.example:80"]


def test_server_environment_names_the_store_and_keeps_the_server_private() -> None:
    before = {"PATH": "/bin", "MLFLOW_TRACKING_URI": "http://elsewhere", "MLFLOW_DISABLE_TELEMETRY": "false"}

    environment = server_environment("postgresql://ann:s3cret@db/mlflow", before)

    assert environment == {
        "PATH": "/bin",
        "MLFLOW_BACKEND_STORE_URI": "postgresql://ann:s3cret@db/mlflow",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }


def test_choose_port_that_is_taken_names_it(taken_port: int) -> None:
    with pytest.raises(UserInputError, match=f"cannot listen on 127.0.0.1 port {taken_port}: .*choose another"):
        choose_port("127.0.0.1", taken_port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("192.0.2.1", None)])
def test_choose_port_that_cannot_be_had_is_the_users_error(host: str, port: int | None) -> None:
    with pytest.raises(UserInputError, match=f"cannot listen on {host}"):
        choose_port(host, port)


def test_choose_port_unasked_gives_one_that_can_be_bound() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", choose_port("127.0.0.1", None)))


def test_start_on_a_server_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"open http://ann:\*\*\*@mlflow\.example:5000 in a browser"):
        MlflowUi.start("http://ann:s3cret@mlflow.example:5000", tmp_path)


def test_server_that_cannot_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with (tmp_path / "ui.log").open("wb") as log:
        script = "import sys; print('starting'); sys.exit('no such store: postgresql://ann:s3cret@db/mlflow')"
        process = subprocess.Popen([sys.executable, "-c", script], stdout=log, stderr=log, start_new_session=True)
    ui = MlflowUi(process, "127.0.0.1", 1, tmp_path / "ui.log")

    with pytest.raises(TrackingError, match=r"ended with code 1: no such store: postgresql://ann:\*\*\*@db/mlflow"):
        ui.wait_until_healthy()


def test_real_server_shows_a_study_and_leaves_no_process(tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    uri = f"sqlite:///{runs_dir}/mlflow.db"
    tracker = MlflowTracker(uri, runs_dir / "mlartifacts")
    run = tracker.ensure_trial_run("digits", "0", "trial-00000", {"box": 0.05}, {})
    tracker.log_artifacts(run, {"hyp.yaml": "box: 0.05\n"})

    with MlflowUi.start(uri, runs_dir, port=0) as ui:
        ui.wait_until_healthy()
        found = fetch(f"{ui.address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=digits")
        artifact = fetch(f"{ui.address}/get-artifact?run_uuid={run}&path=hyp.yaml")
        page = fetch(ui.address + "/")
        leader = os.getpgid(ui.pid)
        started = group_members(leader)

    assert found["experiment"]["name"] == "digits"
    assert artifact == "box: 0.05\n"
    assert "<title>MLflow</title>" in page
    assert leader == ui.pid != os.getpgid(0)
    assert started
    # No job runner: the launcher and its one web worker.
    assert len(started) == 2, started
    assert group_members(leader) == []
    assert not ui.running


def start_stand_in(script: str, tmp_path: Path) -> MlflowUi:
    """A server that only sleeps: what ends it does not depend on what it serves."""
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return MlflowUi(process, "127.0.0.1", 1, tmp_path / "ui.log")


def test_stop_of_a_server_that_ignores_the_request_ends_it_and_its_children(tmp_path: Path) -> None:
    ui = start_stand_in("trap '' TERM; sleep 300 & echo ready; sleep 300", tmp_path)

    code = ui.stop(timeout=0.2)

    assert code == -signal.SIGKILL
    assert group_members(ui.pid) == []
    assert ui.stop() == code


WAITER = """
import subprocess, sys
from pathlib import Path
from search.launch.mlflow_ui import MlflowUi
server = subprocess.Popen(["sh", "-c", "sleep 300 & sleep 300"], start_new_session=True, stdout=subprocess.DEVNULL)
ui = MlflowUi(server, "127.0.0.1", 1, Path("ui.log"))
print(ui.pid, flush=True)
ui.wait()
print("stopped", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_wait_interrupted_stops_the_server_and_its_children(number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", WAITER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as waiter:
        assert waiter.stdout is not None
        leader = int(waiter.stdout.readline())
        # Until then the waiter may not have its handler yet, and a SIGTERM would end it.
        while "S" not in Path(f"/proc/{waiter.pid}/stat").read_text().rpartition(")")[2].split()[0]:
            pass
        running = group_members(leader)

        waiter.send_signal(number)
        last_line = waiter.stdout.readline()

    assert running
    assert (last_line, waiter.returncode) == ("stopped\n", 0)
    assert group_members(leader) == []
