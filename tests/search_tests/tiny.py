"""A study that trains in seconds: a few digits at 64 pixels, two trials a pack, everything below one folder."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import yaml

from search.config import StudyConfig, load_study_config
from search.database import make_engine, resolve_storage_url
from search.demo import DigitsSpec, write_digits
from search.launch.prepare import create_or_resume, plan_study
from search.ledger import Ledger, Ticket, TicketState
from search.study import open_storage
from search.tracking import prepare_store
from search.worker.session import WorkerOptions, run_worker

SPEC = DigitsSpec(images_train=16, images_val=8, canvas=64, digits=(0, 4), frequencies=(0.7, 0.3), objects=(1, 3))
SPACE = {"box": {"low": 0.02, "high": 0.2, "log": True}, "cls": {"low": 0.1, "high": 2.0, "log": True}}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
NAME = "tiny"


@cache
def write_data(folder: Path) -> Path:
    """The data set, written once per folder; its YAML."""
    return write_digits(folder / "data", spec=SPEC)


@cache
def _empty_store(folder: Path) -> Path:
    """An MLflow database without runs: making one takes seconds, copying it does not."""
    path = folder / "empty-mlflow.db"
    prepare_store(f"sqlite:///{path}", folder / "mlartifacts")
    return path


@dataclass(frozen=True)
class TinyStudy:
    """A study file, its runs folder and ways to look into both."""

    folder: Path
    storage_url: str

    @property
    def file(self) -> Path:
        return self.folder / "study.yaml"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def data(self) -> Path:
        return self.folder / "data" / "digits.yaml"

    @property
    def config(self) -> StudyConfig:
        return load_study_config(self.file)

    @property
    def ledger(self) -> Ledger:
        return Ledger(make_engine(self.storage_url))

    def write(self, **changes: Any) -> None:
        """Writes the study file; a value None leaves the key out, `train` is merged."""
        train = {"model": "n", "image_size": 64, "batch_size": 8, "epochs": 2, "pack": 2, "device": "cpu"}
        document: dict[str, Any] = {
            "name": NAME,
            "data": str(self.data),
            "train": {**train, "precision": "fp32", **changes.pop("train", {})},
            "base_hyp": {"mosaic": 0},
            "space": SPACE,
            "sampler": "random",
            "pruner": "none",
            "trials": 3,
            "tracking": {"enabled": False},
            **changes,
        }
        kept = {key: value for key, value in document.items() if value is not None}
        self.file.write_text(yaml.safe_dump(kept, sort_keys=False))

    def create(self, more_trials: int = 0) -> bool:
        """What `run` does before it starts workers."""
        return create_or_resume(plan_study(self.config, self.storage_url, self.runs), more_trials)

    def work(self, worker_id: str = "here", **options: Any) -> int:
        """A worker in this process, to its end."""
        own = WorkerOptions(
            storage_url=self.storage_url, study=NAME, runs_dir=self.runs, worker_id=worker_id, **options
        )
        return run_worker(own).ended

    def start(self, command: str, *options: str, **changes: Any) -> subprocess.Popen[str]:
        """`yolosearch COMMAND` as a process of its own, `run` on the file, others on the name."""
        target = str(self.file) if command == "run" else NAME
        words = [sys.executable, "-m", "search", command, target, "--runs-dir", str(self.runs), *options]
        environment = {**os.environ, **ENVIRONMENT, "YOLOSEARCH_STORAGE_URL": self.storage_url}
        environment.pop("MLFLOW_TRACKING_URI", None)
        environment.update(changes.pop("env", {}))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(words, env=environment, text=True, start_new_session=True, **{**pipes, **changes})

    def tickets(self) -> tuple[Ticket, ...]:
        return self.ledger.tickets(NAME)

    def weights(self, number: int) -> list[Path]:
        """What is kept of a trial's trained weights."""
        return sorted((self.runs / NAME / "trials" / f"{number:05d}").glob("weights-*.safetensors"))

    def states(self) -> list[TicketState]:
        return [ticket.state for ticket in self.tickets()]

    def optuna_trials(self) -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name=NAME, storage=open_storage(self.storage_url)).trials

    def logs(self) -> str:
        """What all local workers printed."""
        return "\n".join(path.read_text() for path in sorted((self.runs / NAME / "logs").glob("*.log")))

    def mlflow_runs(self) -> dict[str, Any]:
        """MLflow's runs of the study by their name; several of one name fail the caller's count."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.runs / 'mlflow.db'}")
        experiment = client.get_experiment_by_name(NAME)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        named = {run.info.run_name: run for run in runs}
        assert len(named) == len(runs)
        return named

    def metric_history(self, run: Any, key: str) -> list[tuple[int, float]]:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.runs / 'mlflow.db'}")
        return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))


def make_study(
    folder: Path, shared: Path, storage_url: str | None = None, *, tracked: bool = False, **changes: Any
) -> TinyStudy:
    """A study in `folder` on its own copy of the tiny data set; `shared` keeps what is made once for all tests."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(write_data(shared).parent, folder / "data")
    study = TinyStudy(folder, storage_url or resolve_storage_url(None, folder / "runs", NAME))
    if tracked:
        # Drawing takes seconds; the tests of the review ask for it.
        changes["tracking"] = {"enabled": True, "review": False, **changes.get("tracking", {})}
        study.runs.mkdir()
        with sqlite3.connect(_empty_store(shared)) as store:
            store.execute("VACUUM INTO ?", (str(study.runs / "mlflow.db"),))
    study.write(**changes)
    return study


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 180.0) -> None:
    """Polls until `condition` holds; fails if the process ends before, or the time is over."""
    deadline = time.monotonic() + seconds
    while not _holds(condition):
        assert process.poll() is None, f"ended early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def _holds(condition: Callable[[], bool]) -> bool:
    """False also while there is no database or study to look at yet."""
    with suppress(Exception):
        return condition()
    return False


class SignalWhen(threading.Thread):
    """Sends this very process a signal as soon as a condition holds; a context manager."""

    def __init__(self, condition: Callable[[], bool], number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__(daemon=True)
        self._condition = condition
        self._number = number
        self._over = threading.Event()
        self.sent = False

    def run(self) -> None:
        while not self._over.wait(0.02):
            if _holds(self._condition):
                self.sent = True
                os.kill(os.getpid(), self._number)
                return

    def __enter__(self) -> "SignalWhen":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
