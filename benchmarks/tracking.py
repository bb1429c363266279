"""What recording costs the training: the same study with MLflow (and its plots and pictures) and without.

The trainer does not know MLflow. What it could feel is a verdict that comes later because the worker is busy recording,
what it writes for the pictures of a trial, and the processor that it shares with the process that draws. All of this
lies between the end of one epoch's training and the start of the next one's: the time from one epoch's report to the
next, less the seconds that the epoch itself took. Runs with and without take turns; the ratio is of medians.

    python benchmarks/tracking.py            # about 4 minutes
    python benchmarks/tracking.py --quick    # about a minute
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from search.config import load_study_config
from search.database import resolve_storage_url
from search.launch.prepare import create_or_resume, plan_study
from search.worker.messages import EpochDone
from search.worker.session import WorkerOptions, run_worker
from search.worker.trainer_link import TrainerLink

GOAL = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """One study."""

    epoch_seconds: float
    """Training and evaluating one epoch of the pack, median."""
    between_seconds: float
    """From there to the start of the next epoch, mean: the rare long ones count."""
    wall_seconds: float
    """Of the whole study."""


@contextmanager
def listened(heard: list[tuple[float, Any]]) -> Iterator[None]:
    """Notes what the trainer says and when."""
    receive = TrainerLink.receive

    def noting(link: TrainerLink) -> object:
        message = receive(link)
        heard.append((time.monotonic(), message))
        return message

    TrainerLink.receive = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainerLink.receive = receive  # type: ignore[method-assign]


def run_study(folder: Path, *, tracked: bool, trials: int, epochs: int) -> Costs:
    """Runs a small study to its end in this process."""
    document = {
        "name": "logging",
        "data": "builtin:digits",
        "train": {"model": "n", "image_size": 64, "epochs": epochs, "pack": 4, "optimizer": "AdamW"},
        "base_hyp": {"mosaic": 0},
        "space": {"box": {"low": 0.02, "high": 0.2, "log": True}, "cls": {"low": 0.1, "high": 2.0, "log": True}},
        "sampler": "random",
        "pruner": "none",
        "trials": trials,
        "tracking": {"enabled": tracked},
    }
    file, runs = folder / "logging.yaml", folder / "runs"
    file.write_text(yaml.safe_dump(document))
    config = load_study_config(file)
    url = resolve_storage_url(None, runs, config.name)
    create_or_resume(plan_study(config, url, runs))
    heard: list[tuple[float, Any]] = []
    began = time.monotonic()
    with listened(heard):
        run_worker(WorkerOptions(storage_url=url, study=config.name, runs_dir=runs, worker_id="benchmark"))
    return costs_of(heard, time.monotonic() - began)


def costs_of(heard: Sequence[tuple[float, Any]], wall: float) -> Costs:
    """Epochs and pauses; a pause across the start of another pack is none."""
    epochs, pauses = [], []
    before: float | None = None
    for moment, message in heard:
        if isinstance(message, EpochDone):
            seconds = message.reports[0].seconds
            epochs.append(seconds)
            if before is not None:
                pauses.append(max(0.0, moment - before - seconds))
            before = moment
        elif type(message).__name__ in {"Standing", "PackEnded"}:
            before = None
    return Costs(epoch_seconds=statistics.median(epochs), between_seconds=statistics.fmean(pauses), wall_seconds=wall)


def main() -> None:
    """Prints a table, or JSON; the ratio last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    trials, epochs, repeats = (4, 5, 1) if options.quick else (8, 8, 2)
    found: dict[str, list[Costs]] = {"none": [], "mlflow": []}
    for _ in range(repeats):
        for name, costs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                costs.append(run_study(Path(folder), tracked=name == "mlflow", trials=trials, epochs=epochs))
    between = {name: statistics.median(one.between_seconds for one in costs) for name, costs in found.items()}
    epoch = statistics.median(one.epoch_seconds for one in found["none"])
    delay = between["mlflow"] - between["none"]
    if options.json:
        runs = {name: [asdict(one) for one in costs] for name, costs in found.items()}
        print(json.dumps({"runs": runs, "epoch": epoch, "between": between, "ratio": delay / epoch, "goal": GOAL}))
        return
    for name, costs in found.items():
        for one in costs:
            print(
                f"{name:>7}: epoch {one.epoch_seconds:.3f} s, between epochs {1000 * one.between_seconds:.1f} ms, "
                f"study {one.wall_seconds:.0f} s"
            )
    print(f"recording delays the trainer by {1000 * delay:.1f} ms an epoch of {epoch:.2f} s")
    print(f"ratio {100 * delay / epoch:.2f} % of a trial's time (goal: below {100 * GOAL:.0f} %)")


if __name__ == "__main__":
    main()
