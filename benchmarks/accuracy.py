"""Whether training here ends where YOLOv5's own ends: final fitness over several seeds, against YOLOv5's figures.

Each seed is one lone training on BCCD from the official yolov5n weights: 160 pixels, batch 16, 30 epochs, YOLOv5's
default ("low") hyperparameters, float32, the last epoch's moving average. YOLOv5's figures for seeds 0 to 7 were
measured with its own `train.py` and the same settings. The last line is the difference of the means with its 95 %
interval (Welch): the two agree if the interval contains 0 and the difference is below 0.015.

Seeds whose results lie in the `--results` folder are not trained again: a long comparison may be made in pieces.

    python benchmarks/accuracy.py --data fixtures/data/bccd --weights fixtures/weights/yolov5n.pt
    python benchmarks/accuracy.py --seeds 0,1 --results runs/accuracy ...
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy import stats

from yolocore.hyperparameters import Hyperparameters
from yolocore.training.config import TrainConfig
from yolocore.training.trainer import PackTrainer, SlotStart

YOLOV5_FITNESS = (0.371, 0.351, 0.344, 0.383, 0.369, 0.385, 0.368, 0.369)
"""Of YOLOv5's train.py after 30 epochs, seeds 0 to 7."""
EPOCHS = 30
ALLOWED_DIFFERENCE = 0.015


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One training."""

    seed: int
    epochs: int
    fitness: float
    """Of the last epoch."""
    map50: float
    map: float
    seconds: float
    """Training and evaluation of every epoch; loading excluded."""


def train(config: TrainConfig, threads: int) -> Run:
    torch.set_num_threads(threads)
    trainer = PackTrainer(config, [SlotStart("seed", Hyperparameters())])
    started = time.perf_counter()
    while not trainer.finished:
        (report,) = trainer.run_epoch()
        if report.failure:
            raise RuntimeError(f"seed {config.seed}: {report.failure}")
    if report.metrics is None:
        raise RuntimeError("the last epoch was not evaluated")
    metrics, seconds = report.metrics, time.perf_counter() - started
    return Run(config.seed, config.epochs, metrics.fitness, metrics.map50, metrics.map, seconds)


def interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Difference of the means and the ends of its 95 % interval, for unequal variances."""
    difference = mean(ours) - mean(theirs)
    shares = [stdev(group) ** 2 / len(group) for group in (ours, theirs)]
    freedom = sum(shares) ** 2 / sum(s**2 / (len(g) - 1) for s, g in zip(shares, (ours, theirs), strict=True))
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(sum(shares))
    return difference, difference - reach, difference + reach


def finished(folder: Path | None, epochs: int, seeds: Sequence[int]) -> dict[int, Run]:
    """Results of earlier calls, by seed."""
    files = [(folder / f"seed-{seed}.json") for seed in seeds] if folder else []
    runs = [Run(**json.loads(file.read_text())) for file in files if file.exists()]
    return {run.seed: run for run in runs if run.epochs == epochs}


def run_seeds(options: argparse.Namespace, seeds: Sequence[int], epochs: int) -> list[Run]:
    done = finished(options.results, epochs, seeds)
    threads = max(1, torch.get_num_threads() // options.processes)
    configs = [make_config(options, seed, epochs) for seed in seeds if seed not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes) as pool:
        for result in [pool.apply_async(train, (config, threads)) for config in configs]:
            run = result.get()
            done[run.seed] = run
            print(f"seed {run.seed}: fitness {run.fitness:.4f} in {run.seconds:.0f} s", file=sys.stderr)
            if options.results:
                options.results.mkdir(parents=True, exist_ok=True)
                (options.results / f"seed-{run.seed}.json").write_text(json.dumps(dataclasses.asdict(run)))
    return [done[seed] for seed in seeds]


def make_config(options: argparse.Namespace, seed: int, epochs: int) -> TrainConfig:
    return TrainConfig(
        model="n",
        data=options.data / "bccd.yaml" if options.data.is_dir() else options.data,
        weights=options.weights,
        image_size=160,
        batch_size=16,
        epochs=epochs,
        seed=seed,
        device="cpu",
        workers=0,
        precision=options.precision,
        eval_every=epochs,
    )


def parse() -> argparse.Namespace:
    fixtures = os.environ.get("YOLOSEARCH_FIXTURES")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=fixtures and Path(fixtures) / "data/bccd", help="BCCD's folder")
    parser.add_argument("--weights", type=Path, default=fixtures and Path(fixtures) / "weights/yolov5n.pt")
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7", help="comma-separated")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--processes", type=int, default=1, help="trainings side by side, which share the cores")
    parser.add_argument("--results", type=Path, help="folder of one file per finished seed")
    parser.add_argument("--quick", action="store_true", help="two seeds, 5 epochs: runs everything, compares nothing")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.data or not options.weights:
        parser.error("--data and --weights are needed where YOLOSEARCH_FIXTURES does not name their folder")
    return options


def main() -> None:
    options = parse()
    seeds = [0, 1] if options.quick else [int(seed) for seed in options.seeds.split(",")]
    epochs = 5 if options.quick else EPOCHS
    runs = run_seeds(options, seeds, epochs)
    ours = [run.fitness for run in runs]
    summary = {"runs": [dataclasses.asdict(run) for run in runs], "yolov5": YOLOV5_FITNESS, "mean": mean(ours)}
    if len(ours) > 1:
        difference, low, high = interval(ours, YOLOV5_FITNESS)
        agree = low <= 0 <= high and abs(difference) < ALLOWED_DIFFERENCE
        summary |= {"difference": difference, "interval": [low, high], "agree": agree, "comparable": epochs == EPOCHS}
    if options.json:
        print(json.dumps(summary))
        return
    print("seed       " + " ".join(f"{seed:6d}" for seed in seeds))
    print("fitness    " + " ".join(f"{value:6.3f}" for value in ours))
    print("YOLOv5     " + " ".join(f"{value:6.3f}" for value in YOLOV5_FITNESS) + "  (seeds 0 to 7, 30 epochs)")
    print(f"mean       {mean(ours):.4f} after {epochs} epochs; YOLOv5 {mean(YOLOV5_FITNESS):.4f} after {EPOCHS}")
    if len(ours) > 1:
        verdict = "agree" if agree else "differ"
        note = verdict if epochs == EPOCHS else "not comparable: fewer epochs"
        print(f"difference of the means {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}: {note}")


if __name__ == "__main__":
    main()
