"""What a pack saves: trial-steps per second of K trials in one network, and of the same trials run otherwise.

A step is a whole one: the loader's images, forward, assignment, loss, backward, optimiser, moving average. The rivals,
a lone trial and one single-thread process per core, are measured in turn over several rounds; the best round of each
counts, since machines are noisy. The last line is the ratio of the largest pack's throughput to a lone trial's.

    python benchmarks/pack.py --quick
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch

from search.demo import DigitsSpec, write_digits
from yolocore.data.dataset import load_dataset_config, scan_split
from yolocore.data.loader import TrainLoader
from yolocore.device import resolve_device, resolve_precision
from yolocore.hyperparameters import Hyperparameters
from yolocore.model import initial_state
from yolocore.training.config import TrainConfig
from yolocore.training.pack import Pack, PackSlot, fresh_state

BATCH_SIZE = 16
IMAGES = 128


def make_pack(data: Path, image_size: int, slots: int, precision: str) -> tuple[Pack, TrainLoader]:
    config = TrainConfig(model="n", data=data, image_size=image_size, batch_size=BATCH_SIZE, epochs=10)
    dataset = load_dataset_config(data)
    hyp = Hyperparameters()
    loader = TrainLoader(scan_split(dataset, "train"), hyp, image_size, BATCH_SIZE, stream_seed=0)
    device = resolve_device("auto")
    state = fresh_state(initial_state("n", dataset.num_classes, 0))
    pack = Pack(
        config,
        [PackSlot(str(slot), hyp.replace(box=0.05 + 0.001 * slot), state) for slot in range(slots)],
        num_classes=dataset.num_classes,
        batches_per_epoch=len(loader),
        device=device,
        precision=resolve_precision(precision, device),
    )
    return pack, loader


def epoch_seconds(pack: Pack, loader: TrainLoader, epoch: int) -> float:
    started = time.perf_counter()
    pack.begin_epoch()
    for batch in loader.epoch(epoch):
        pack.train_step(batch.images, batch.targets)
    pack.end_epoch()
    return time.perf_counter() - started


def lone_process(
    arguments: tuple[Path, int, str],
    start: "multiprocessing.synchronize.Barrier",
    results: "multiprocessing.Queue[float]",
) -> None:
    torch.set_num_threads(1)
    data, image_size, precision = arguments
    pack, loader = make_pack(data, image_size, 1, precision)
    epoch_seconds(pack, loader, 0)
    start.wait()
    results.put(epoch_seconds(pack, loader, 1))


def processes_rate(data: Path, image_size: int, precision: str, count: int) -> float:
    """Trial-steps per second of `count` single-thread processes with one trial each, side by side."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(count), context.Queue()
    arguments = (data, image_size, precision)
    workers = [context.Process(target=lone_process, args=(arguments, start, results)) for _ in range(count)]
    for worker in workers:
        worker.start()
    slowest = max(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return count * (IMAGES / BATCH_SIZE) / slowest


def measure(data: Path, image_size: int, precision: str, sizes: list[int], rounds: int) -> dict[str, float]:
    packs = {slots: make_pack(data, image_size, slots, precision) for slots in sizes}
    best = dict.fromkeys(sizes, float("inf"))
    for pack, loader in packs.values():
        epoch_seconds(pack, loader, 0)
    for epoch in range(1, rounds + 1):
        for slots, (pack, loader) in packs.items():
            best[slots] = min(best[slots], epoch_seconds(pack, loader, epoch))
    steps = IMAGES / BATCH_SIZE
    rates = {f"K={slots}": slots * steps / seconds for slots, seconds in best.items()}
    cores = torch.get_num_threads()
    rates[f"{cores} processes"] = max(processes_rate(data, image_size, precision, cores) for _ in range(min(rounds, 2)))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one image size, fewer rounds: about a minute")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    options = parser.parse_args()
    image_sizes, rounds = ([96], 2) if options.quick else ([96, 160, 320], 4)
    slots = [1, 2, 4, 8]
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_digits(Path(folder) / "digits", spec=DigitsSpec(images_train=IMAGES, images_val=8, canvas=128))
        for image_size in image_sizes:
            table[str(image_size)] = measure(data, image_size, options.precision, slots, rounds)
    ratios = {size: rates[f"K={slots[-1]}"] / rates["K=1"] for size, rates in table.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if options.json:
        print(json.dumps({"trial_steps_per_second": table, "ratio": ratios, "peak_mib": peak}))
        return
    for size, rates in table.items():
        print(f"{size} px: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()) + " trial-steps/s")
    print(f"peak memory of this process: {peak:.0f} MiB")
    print("K=8 against K=1: " + ", ".join(f"{ratio:.2f} times at {size} px" for size, ratio in ratios.items()))


if __name__ == "__main__":
    main()
