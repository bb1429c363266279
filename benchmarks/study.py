"""What a study costs, counted in trainings: 60 trials with ASHA against one lone training, end to end.

Both are `yolosearch run` on BCCD from the official yolov5n weights (160 pixels, batch 16, 30 epochs, the six loss
weights), each in a process of its own, start-up included. The lone training is a study of one trial, evaluated after
every epoch as YOLOv5 does. `--precision` goes for both, so that the ratio is that of the study and not of the
arithmetic.

Pruning is only as good as the rungs: the Spearman correlation between the value at each rung and at the end is printed
for the trials that ran to the end (pruning kept the better ones, which makes it look worse than it is). With
`--unpruned N` another N random trials run to their ends, which nothing distorts, and the study's rungs are replayed on
their curves: the regret is what the best trial that survives loses against the best of all.

    python benchmarks/study.py --data fixtures/data/bccd --weights fixtures/weights/yolov5n.pt --keep runs/headline
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import spearmanr

from search.database import default_storage_url, make_engine
from search.ledger import Ledger, TicketState

YOLOV5_SECONDS = 60.0
"""One training of YOLOv5 itself with these settings, on two idle cores with AVX512-bf16."""

SPACE = {
    "box": {"low": 0.02, "high": 0.2, "log": True},
    "cls": {"low": 0.1, "high": 2.0, "log": True},
    "obj": {"low": 0.25, "high": 4.0, "log": True},
    "cls_pw": {"low": 0.5, "high": 4.0, "log": True},
    "obj_pw": {"low": 0.5, "high": 4.0, "log": True},
    "fl_gamma": {"choices": [0.0, 0.5, 1.0, 1.5]},
}
Curve = Mapping[int, float]
"""Epochs trained to the objective then."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One study, finished."""

    seconds: float
    """Wall time of the command."""
    slot_epochs: int
    counts: Mapping[str, int]
    base: float | None
    best: float | None
    curves: tuple[Curve, ...]
    """Of the trials that ran to the end, in the order in which they were proposed."""


def run_study(study: Mapping[str, Any], folder: Path) -> Outcome:
    """Runs it by the command that users run; a study that is there already goes on where it was.

    Raises:
        subprocess.CalledProcessError: The study did not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{study['name']}.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    started = time.perf_counter()
    command = [sys.executable, "-m", "search", "run", str(file), "--runs-dir", str(folder / "runs")]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return read_outcome(study["name"], folder / "runs", time.perf_counter() - started)


def read_outcome(name: str, runs_dir: Path, seconds: float) -> Outcome:
    ledger = Ledger(make_engine(default_storage_url(runs_dir, name), create=False))
    tickets, reports = ledger.tickets(name), ledger.all_reports(name)
    complete = [ticket for ticket in tickets if ticket.state is TicketState.COMPLETE and ticket.value is not None]
    return Outcome(
        seconds=seconds,
        slot_epochs=sum(rows[-1].epoch + 1 for rows in reports.values()),
        counts={state.value: sum(ticket.state is state for ticket in tickets) for state in TicketState},
        base=tickets[0].value,
        best=max((ticket.value for ticket in complete if ticket.value is not None), default=None),
        curves=tuple(
            {row.epoch + 1: row.value for row in reports[ticket.id] if row.value is not None} for ticket in complete
        ),
    )


def study_files(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The studies that are run, by their part in the comparison."""
    train = {
        "model": "n",
        "weights": str(options.weights.resolve()),
        "image_size": 160,
        "batch_size": 16,
        "epochs": options.epochs,
        "precision": options.precision,
    }
    pruner = {"name": "asha", "min_epochs": options.first_rung, "reduction_factor": options.reduction}
    common = {"data": str(data_yaml(options.data)), "space": SPACE}
    pack = {**train, "eval_every": options.first_rung}
    studies = {
        "lone": {"name": "lone", **common, "train": {**train, "pack": 1}, "pruner": "none", "trials": 1},
        "study": {"name": "study", **common, "train": pack, "pruner": pruner, "trials": options.trials},
    }
    if options.unpruned:
        random = {"sampler": {"name": "random", "seed": 1}, "pruner": "none", "trials": options.unpruned}
        studies["unpruned"] = {"name": "unpruned", **common, "train": pack, **random}
    return studies


def data_yaml(data: Path) -> Path:
    return (data / "bccd.yaml" if data.is_dir() else data).resolve()


def rungs(options: argparse.Namespace) -> list[int]:
    """Epochs after which ASHA decides."""
    found, rung = [], options.first_rung
    while rung < options.epochs:
        found.append(rung)
        rung *= options.reduction
    return found


def correlations(curves: Sequence[Curve], epochs: Sequence[int]) -> dict[int, float]:
    """Spearman correlation between the value after so many epochs and at the end, over the trials that have both."""
    found = {}
    for epoch in epochs:
        pairs = [(curve[epoch], curve[max(curve)]) for curve in curves if epoch in curve]
        if len(pairs) > 2:
            found[epoch] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return found


def regret(curves: Sequence[Curve], epochs: Sequence[int], reduction: int) -> float:
    """What the best survivor of all rungs loses against the best trial, if only 1/reduction pass each rung."""
    alive = list(curves)
    for epoch in epochs:
        alive = sorted(alive, key=lambda curve: curve[epoch], reverse=True)[: max(1, len(alive) // reduction)]
    return max(curve[max(curve)] for curve in curves) - max(curve[max(curve)] for curve in alive)


def summary(outcomes: Mapping[str, Outcome], options: argparse.Namespace) -> dict[str, Any]:
    study, lone, unpruned = outcomes["study"], outcomes["lone"], outcomes.get("unpruned")
    found: dict[str, Any] = {
        "seconds": {name: outcome.seconds for name, outcome in outcomes.items()},
        "counts": study.counts,
        "slot_epochs": study.slot_epochs,
        "slot_epochs_unpruned": options.trials * options.epochs,
        "base": study.base,
        "best": study.best,
        "rungs": rungs(options),
        "rank_correlation": correlations(study.curves, rungs(options)),
        "lone_trainings": study.seconds / lone.seconds,
        "yolov5_trainings": study.seconds / options.yolov5_seconds,
    }
    if unpruned is not None:
        found["unpruned"] = {
            "trials": len(unpruned.curves),
            "rank_correlation": correlations(unpruned.curves, sorted(unpruned.curves[0])[:-1]),
            "regret": regret(unpruned.curves, rungs(options), options.reduction),
        }
    return found


def parse() -> argparse.Namespace:
    fixtures = os.environ.get("YOLOSEARCH_FIXTURES")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fixtures and Path(fixtures) / "data/bccd", help="BCCD's folder")
    parser.add_argument("--weights", type=Path, default=fixtures and Path(fixtures) / "weights/yolov5n.pt")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--first-rung", type=int, default=6, help="epochs before the first decision")
    parser.add_argument("--reduction", type=int, default=4, help="one of so many passes a rung")
    parser.add_argument("--unpruned", type=int, default=0, help="so many random trials without pruning, for the rungs")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--yolov5-seconds", type=float, default=YOLOV5_SECONDS, help="one training of YOLOv5, here")
    parser.add_argument("--keep", type=Path, help="folder for the studies; called again, it goes on with them")
    parser.add_argument("--quick", action="store_true", help="6 trials of 3 epochs: runs everything, proves nothing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.data or not options.weights:
        parser.error("--data and --weights are needed where YOLOSEARCH_FIXTURES does not name their folder")
    if options.quick:
        options.trials, options.epochs, options.first_rung, options.reduction = 6, 3, 1, 3
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        outcomes = {name: run_study(study, folder) for name, study in study_files(options).items()}
    found = summary(outcomes, options)
    if options.json:
        print(json.dumps(found))
        return
    counts = ", ".join(f"{count} {state}" for state, count in found["counts"].items() if count)
    print(f"trials        {counts}; {found['slot_epochs']} of {found['slot_epochs_unpruned']} slot-epochs")
    print(f"fitness       base {found['base']:.4f}, best {found['best']:.4f} (one seed each, unconfirmed)")
    print(f"rank corr.    {with_ends(found['rank_correlation'])}, over the trials that ran to the end")
    if "unpruned" in found:
        free = found["unpruned"]
        print(f"  unpruned    {with_ends(free['rank_correlation'])}, over {free['trials']} trials")
        print(f"  regret      {free['regret']:.4f} of fitness against the best of them, with the same rungs")
    print(f"seconds       {', '.join(f'{name} {seconds:.0f}' for name, seconds in found['seconds'].items())}")
    print(f"the study costs {found['lone_trainings']:.1f} lone trainings of ours")
    print(f"the study costs {found['yolov5_trainings']:.1f} trainings of YOLOv5 at {options.yolov5_seconds:.0f} s each")


def with_ends(found: Mapping[int, float]) -> str:
    return ", ".join(f"epoch {epoch}: {value:+.2f}" for epoch, value in found.items()) or "too few trials"


if __name__ == "__main__":
    main()
