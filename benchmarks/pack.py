"""What a pack saves: trial-steps per second of K trials in one network, and of the same trials run otherwise.

A step is a whole one: the loader's images, forward, assignment, loss, backward, optimiser, moving average. The rivals,
a lone trial and K single-thread processes of one trial each, are measured in turn over several rounds; the best round
of each counts, since machines are noisy. "frozen" is with `freeze: 10`, the backbone, which a pack computes once for
all. Peak memory is that of fresh processes which hold nothing else; of several processes it is the sum. Data and start
weights are BCCD and yolov5n.pt where they are given, else digits and random weights. The last line is the ratio of the
largest pack's throughput to a lone trial's.

    python benchmarks/pack.py --quick
    python benchmarks/pack.py --sizes 160 --freeze --data fixtures/data/bccd --weights fixtures/weights/yolov5n.pt
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from search.demo import DigitsSpec, write_digits
from yolocore.data.dataset import load_dataset_config, scan_split
from yolocore.data.loader import TrainLoader
from yolocore.device import resolve_device, resolve_precision
from yolocore.hyperparameters import Hyperparameters
from yolocore.training.config import TrainConfig
from yolocore.training.lanes import Lanes
from yolocore.training.pack import PackSlot, fresh_state
from yolocore.training.start import start_weights

BATCH_SIZE = 16
IMAGES = 128
STEPS = IMAGES // BATCH_SIZE
SLOTS = (1, 2, 4, 8)
FROZEN_LAYERS = 10


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    data: Path
    image_size: int
    precision: str
    weights: Path | None
    freeze: int = 0


def make_loader(case: Case) -> TrainLoader:
    dataset = load_dataset_config(case.data)
    return TrainLoader(scan_split(dataset, "train"), Hyperparameters(), case.image_size, BATCH_SIZE, stream_seed=0)


def make_pack(case: Case, slots: int) -> Lanes:
    config = TrainConfig(
        model="n",
        data=case.data,
        image_size=case.image_size,
        batch_size=BATCH_SIZE,
        epochs=10,
        freeze=case.freeze,
        workers=0,
        weights=case.weights,
    )
    classes = load_dataset_config(case.data).num_classes
    hyp, device = Hyperparameters(), resolve_device("auto")
    state = fresh_state(start_weights(config, classes).state)
    return Lanes(
        config,
        [PackSlot(str(slot), hyp.replace(box=0.05 + 0.001 * slot), state) for slot in range(slots)],
        num_classes=classes,
        batches_per_epoch=STEPS,
        device=device,
        precision=resolve_precision(case.precision, device),
    )


def epoch_seconds(pack: Lanes, loader: TrainLoader, epoch: int) -> float:
    started = time.perf_counter()
    pack.begin_epoch()
    for batch in itertools.islice(loader.epoch(epoch), STEPS):
        pack.train_step(batch.images, batch.targets)
    pack.end_epoch()
    return time.perf_counter() - started


def in_process(
    case: Case,
    slots: int,
    threads: int,
    start: "multiprocessing.synchronize.Barrier",
    results: "multiprocessing.Queue[tuple[float, float]]",
) -> None:
    """Seconds of the second epoch, and the peak memory in MiB, of a process of its own."""
    torch.set_num_threads(threads)
    pack, loader = make_pack(case, slots), make_loader(case)
    epoch_seconds(pack, loader, 0)
    start.wait()
    seconds = epoch_seconds(pack, loader, 1)
    results.put((seconds, peak_mib()))


def peak_mib() -> float:
    """Largest resident memory of this process so far (getrusage would count what the parent had when it started us)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def processes(case: Case, count: int, *, slots: int = 1, threads: int = 1) -> tuple[float, float]:
    """Trial-steps per second, and the sum of the peak memories in MiB, of processes side by side."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(count), context.Queue()
    arguments = (case, slots, threads, start, results)
    workers = [context.Process(target=in_process, args=arguments) for _ in range(count)]
    for worker in workers:
        worker.start()
    measured = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return count * slots * STEPS / max(seconds for seconds, _ in measured), sum(memory for _, memory in measured)


def pack_rates(cases: dict[str, tuple[Case, int]], rounds: int) -> dict[str, float]:
    """Trial-steps per second by contender: its case and its number of slots."""
    loader = make_loader(next(iter(cases.values()))[0])
    packs = {name: make_pack(case, slots) for name, (case, slots) in cases.items()}
    best = dict.fromkeys(cases, float("inf"))
    for pack in packs.values():
        epoch_seconds(pack, loader, 0)
    for epoch in range(1, rounds + 1):
        for name, pack in packs.items():
            best[name] = min(best[name], epoch_seconds(pack, loader, epoch))
    return {name: slots * STEPS / best[name] for name, (_, slots) in cases.items()}


def measure(
    case: Case, slots: list[int], rivals: list[int], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Trial-steps per second and MiB by contender."""
    cases = {f"K={count}": (case, count) for count in slots}
    if options.freeze:
        frozen = replace(case, freeze=FROZEN_LAYERS)
        cases |= {f"frozen K={count}": (frozen, count) for count in sorted({1, slots[-1]})}
    rates, memory, threads = pack_rates(cases, options.rounds), {}, torch.get_num_threads()
    if not options.rates_only:
        memory = {name: processes(one, 1, slots=count, threads=threads)[1] for name, (one, count) in cases.items()}
    for count in rivals:
        measured = [processes(case, count) for _ in range(min(options.rounds, 2))]
        rates[f"{count} processes"] = max(rate for rate, _ in measured)
        memory[f"{count} processes"] = max(peak for _, peak in measured)
    return {"rate": rates, "mib": memory}


@contextlib.contextmanager
def data_and_weights(options: argparse.Namespace) -> Iterator[tuple[Path, Path | None]]:
    """What was given, or digits that are drawn for this run."""
    if options.data:
        yield options.data / "bccd.yaml" if options.data.is_dir() else options.data, options.weights
        return
    with tempfile.TemporaryDirectory() as folder:
        spec = DigitsSpec(images_train=IMAGES, images_val=8, canvas=128)
        yield write_digits(Path(folder) / "digits", spec=spec), options.weights


def parse() -> argparse.Namespace:
    fixtures = os.environ.get("YOLOSEARCH_FIXTURES")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=fixtures and Path(fixtures) / "data/bccd", help="a data set's YAML"
    )
    parser.add_argument("--weights", type=Path, default=fixtures and Path(fixtures) / "weights/yolov5n.pt")
    parser.add_argument("--quick", action="store_true", help="96 pixels, fewer rounds: about a minute")
    parser.add_argument("--sizes", default="96,160,320", help="image sizes, comma-separated")
    parser.add_argument("--slots", default="1,2,4,8", help="sizes of packs, from 1, comma-separated")
    parser.add_argument("--rivals", help="numbers of processes, comma-separated (default: the cores, 2, 4 and 8)")
    parser.add_argument("--rounds", type=int, default=4, help="of which the best counts")
    parser.add_argument("--freeze", action="store_true", help="measure with a frozen backbone too")
    parser.add_argument("--rates-only", action="store_true", help="no peak memory of packs, which takes as long again")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    options = parser.parse_args()
    cores = torch.get_num_threads()
    if options.quick:
        options.sizes, options.rounds, options.rivals = "96", 2, options.rivals or str(cores)
    options.rivals = options.rivals or ",".join(map(str, sorted({cores, *SLOTS[1:]})))
    return options


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    options, table = parse(), {}
    slots, rivals = numbers(options.slots), numbers(options.rivals)
    with data_and_weights(options) as (data, weights):
        for size in numbers(options.sizes):
            table[size] = measure(Case(data, size, options.precision, weights), slots, rivals, options)
    largest = f"K={slots[-1]}"
    ratios = {size: found["rate"][largest] / found["rate"]["K=1"] for size, found in table.items()}
    if options.json:
        print(json.dumps({"measured": table, "ratio": ratios, "cores": torch.get_num_threads()}))
        return
    for size, found in table.items():
        show(size, found, largest, [f"{count} processes" for count in rivals])
    print(f"{largest} against K=1: " + ", ".join(f"{ratio:.2f} times at {size} px" for size, ratio in ratios.items()))


def show(size: int, found: dict[str, dict[str, float]], largest: str, rivals: list[str]) -> None:
    rate, mib = found["rate"], found["mib"]
    print(f"{size} px: trial-steps/s " + ", ".join(f"{name} {value:.1f}" for name, value in rate.items()))
    print(f"{size} px: peak MiB " + ", ".join(f"{name} {value:.0f}" for name, value in mib.items()))
    for rival in rivals:
        print(f"{size} px: {largest} against {rival}: {rate[largest] / rate[rival]:.2f} times")
    if "frozen K=1" in rate:
        frozen, lone = rate[f"frozen {largest}"], rate["frozen K=1"]
        print(
            f"{size} px: frozen {largest} is {frozen / lone:.2f} times frozen K=1, {frozen / rate['K=1']:.2f} times K=1"
        )


if __name__ == "__main__":
    main()
