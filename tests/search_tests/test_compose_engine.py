"""The composition on a real Docker engine: two workers run a study to its end, one of them cut off beyond its lease.

Needs an engine and a Compose client; BASE_IMAGE and POSTGRES_IMAGE name the base images where none can be pulled
(`compose_images.sh` makes some), YOLOSEARCH_COMPOSE_OVERRIDE one more Compose file (a build network, for example).
"""

import json
import os
import secrets
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_data

ROOT = Path(__file__).parents[2]
TRIALS = 8
EPOCHS = 40
LEASE_SECONDS = 20
PORT = 5155
STUDY = """\
name: composed
data: /data/digits.yaml
train: {model: n, image_size: 64, batch_size: 8, epochs: 40, pack: 2}
base_hyp: {mosaic: 0}
space:
  box: {low: 0.02, high: 0.2, log: true}
  cls: {low: 0.1, high: 2.0, log: true}
sampler: {name: random}
pruner: none
trials: 8
"""

pytestmark = pytest.mark.slow


class Composition:
    """One project of the composition with passwords and volumes of its own."""

    def __init__(self, folder: Path) -> None:
        v2 = subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
        self._client = ["docker", "compose"] if v2 else ["docker-compose"]
        self._project = f"yolosearch-test-{os.getpid()}"
        studies = folder / "studies"
        studies.mkdir()
        folder.chmod(0o755)
        studies.chmod(0o755)
        (studies / "composed.yaml").write_text(STUDY, encoding="utf-8")
        data = write_data(folder).parent
        settings = {
            **{f"{name}_PASSWORD": secrets.token_hex(12) for name in ("POSTGRES", "STUDIES_DB", "MLFLOW_DB")},
            **{name: os.environ[name] for name in ("BASE_IMAGE", "POSTGRES_IMAGE") if name in os.environ},
            "STUDY": "composed",
            "STUDIES_DIR": str(studies),
            "DATA_DIR": str(data),
            "LEASE_SECONDS": str(LEASE_SECONDS),
            "MLFLOW_PORT": str(PORT),
        }
        self._settings = folder / "env"
        self._settings.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")

    def compose(self, *arguments: str) -> str:
        """What the client says; its errors fail the test."""
        files = ["docker-compose.yml", *filter(None, [os.environ.get("YOLOSEARCH_COMPOSE_OVERRIDE")])]
        named = [part for file in files for part in ("--file", file)]
        asked = [*self._client, "--project-name", self._project, "--env-file", str(self._settings), *named]
        done = subprocess.run([*asked, "--profile", "cpu", *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def workers(self) -> list[str]:
        """Ids of the workers' containers, ended ones included."""
        named = f"label=com.docker.compose.project={self._project}"
        service = "label=com.docker.compose.service=worker-cpu"
        return sorted(docker("ps", "--all", "--quiet", "--no-trunc", "--filter", named, "--filter", service).split())

    @property
    def network(self) -> str:
        """The project's network."""
        return f"{self._project}_default"

    def status(self) -> dict[str, Any]:
        """The study as `yolosearch status` shows it, asked in a container of its own."""
        parsed: dict[str, Any] = json.loads(
            self.compose("run", "--rm", "--no-deps", "-T", "init", "status", "composed", "--json")
        )
        return parsed


def docker(*arguments: str) -> str:
    """Runs the engine's client."""
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def composition(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composition]:
    """A running project with two workers, removed with its volumes at the end."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        pytest.skip("needs a Docker engine")
    made = Composition(tmp_path_factory.mktemp("compose"))
    try:
        made.compose("build")
        made.compose("up", "--detach", "--scale", "worker-cpu=2")
        yield made
    finally:
        made.compose("down", "--volumes", "--remove-orphans")


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(5)


def test_compose_worker_cut_off_beyond_its_lease_loses_nothing(composition: Composition) -> None:
    cut, other = composition.workers()

    def epochs_of(worker: str) -> list[int]:
        trials = composition.status()["trials"]
        return [t["epoch"] for t in trials if t["state"] == "RUNNING" and (t["worker"] or "").startswith(worker[:12])]

    _wait(lambda: any(epochs_of(cut)) and any(epochs_of(other)), 900)
    running = [trial for trial in composition.status()["trials"] if trial["state"] == "RUNNING"]
    held = {trial["ticket"] for trial in running if (trial["worker"] or "").startswith(cut[:12])}
    assert held
    docker("network", "disconnect", composition.network, cut)
    time.sleep(2 * LEASE_SECONDS)
    _wait(lambda: not epochs_of(cut), 600)
    docker("network", "connect", composition.network, cut)
    _wait(lambda: docker("inspect", "--format", "{{.State.Status}}", cut, other).split() == ["exited"] * 2, 1200)

    assert docker("inspect", "--format", "{{.State.ExitCode}}", cut, other).split() == ["0", "0"]
    status = composition.status()
    assert status["counts"] == {"WAITING": 0, "RUNNING": 0, "COMPLETE": TRIALS, "PRUNED": 0, "FAIL": 0}
    assert sorted(trial["number"] for trial in status["trials"]) == list(range(TRIALS))
    assert {trial["epoch"] for trial in status["trials"]} == {EPOCHS}
    # What the cut-off worker held at that moment was continued by an attempt after its own.
    attempts = {trial["ticket"]: trial["attempt"] for trial in status["trials"]}
    assert {attempts[ticket] > 1 for ticket in held} == {True}
    assert _finished_runs() == TRIALS


def test_compose_homes_are_writable_for_their_users(composition: Composition) -> None:
    composition.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "touch", "init", "/home/yolosearch/written")
    composition.compose("exec", "-T", "mlflow", "touch", "/home/mlflow/written")


def _finished_runs() -> int:
    """Trials that MLflow, asked by its service's published port, shows as FINISHED."""
    base = f"http://127.0.0.1:{PORT}/api/2.0/mlflow"
    with urllib.request.urlopen(f"{base}/experiments/get-by-name?experiment_name=composed") as answer:
        experiment = json.load(answer)["experiment"]["experiment_id"]
    wanted = {"experiment_ids": [experiment], "filter": "tags.`yolosearch.kind` = 'trial'", "max_results": 1000}
    request = urllib.request.Request(
        f"{base}/runs/search", json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        runs = json.load(answer)["runs"]
    assert {run["info"]["status"] for run in runs} == {"FINISHED"}
    points = [len(run["data"]["metrics"]) for run in runs]
    assert min(points) > 0
    return len(runs)
