"""What a pack saves: trial-steps per second of K trials in one network, and of the same trials run otherwise.

A step is a whole one: the loader's images, forward, assignment, loss, backward, optimiser, moving average. The rivals,
a lone trial and K single-thread processes of one trial each, are measured in turn over several rounds; the best round
of each counts, since machines are noisy. "frozen" is with `freeze: 10`, the backbone. Peak memory is that of fresh
processes which hold nothing else; of several processes it is the sum. The last line is the ratio of the largest pack's
throughput to a lone trial's.

    python benchmarks/pack.py --quick
    python benchmarks/pack.py --sizes 160 --freeze
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
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
STEPS = IMAGES // BATCH_SIZE
SLOTS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    data: Path
    image_size: int
    precision: str
    freeze: int = 0


def make_pack(case: Case, slots: int) -> tuple[Pack, TrainLoader]:
    config = TrainConfig(
        model="n",
        data=case.data,
        image_size=case.image_size,
        batch_size=BATCH_SIZE,
        epochs=10,
        freeze=case.freeze,
        workers=0,
    )
    dataset = load_dataset_config(case.data)
    hyp = Hyperparameters()
    loader = TrainLoader(scan_split(dataset, "train"), hyp, case.image_size, BATCH_SIZE, stream_seed=0)
    device = resolve_device("auto")
    state = fresh_state(initial_state("n", dataset.num_classes, 0))
    pack = Pack(
        config,
        [PackSlot(str(slot), hyp.replace(box=0.05 + 0.001 * slot), state) for slot in range(slots)],
        num_classes=dataset.num_classes,
        batches_per_epoch=len(loader),
        device=device,
        precision=resolve_precision(case.precision, device),
    )
    return pack, loader


def epoch_seconds(pack: Pack, loader: TrainLoader, epoch: int) -> float:
    started = time.perf_counter()
    pack.begin_epoch()
    for batch in loader.epoch(epoch):
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
    pack, loader = make_pack(case, slots)
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


def pack_rates(case: Case, slots: list[int], rounds: int) -> dict[str, float]:
    packs = {count: make_pack(case, count) for count in slots}
    best = dict.fromkeys(slots, float("inf"))
    for pack, loader in packs.values():
        epoch_seconds(pack, loader, 0)
    for epoch in range(1, rounds + 1):
        for count, (pack, loader) in packs.items():
            best[count] = min(best[count], epoch_seconds(pack, loader, epoch))
    return {f"K={count}": count * STEPS / seconds for count, seconds in best.items()}


def measure(case: Case, slots: list[int], rivals: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Trial-steps per second and MiB by contender."""
    rates = pack_rates(case, slots, rounds)
    threads = torch.get_num_threads()
    memory = {f"K={count}": processes(case, 1, slots=count, threads=threads)[1] for count in slots}
    for count in rivals:
        measured = [processes(case, count) for _ in range(min(rounds, 2))]
        rates[f"{count} processes"] = max(rate for rate, _ in measured)
        memory[f"{count} processes"] = max(peak for _, peak in measured)
    return {"rate": rates, "mib": memory}


def measure_frozen(case: Case, rounds: int) -> dict[str, float]:
    """Trial-steps per second with a frozen backbone, by contender."""
    return {f"frozen {name}": rate for name, rate in pack_rates(case, [1, SLOTS[-1]], rounds).items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="96 pixels, fewer rounds: about a minute")
    parser.add_argument("--sizes", default="96,160,320", help="image sizes, comma-separated")
    parser.add_argument("--freeze", action="store_true", help="measure with a frozen backbone too")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    return parser.parse_args()


def main() -> None:
    options = parse()
    sizes, rounds = ([96], 2) if options.quick else ([int(size) for size in options.sizes.split(",")], 4)
    cores = torch.get_num_threads()
    rivals = [cores] if options.quick else sorted({cores, *SLOTS[1:]})
    table: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_digits(Path(folder) / "digits", spec=DigitsSpec(images_train=IMAGES, images_val=8, canvas=128))
        for size in sizes:
            table[size] = measure(Case(data, size, options.precision), list(SLOTS), rivals, rounds)
            if options.freeze:
                table[size]["rate"] |= measure_frozen(Case(data, size, options.precision, freeze=10), rounds)
    largest = f"K={SLOTS[-1]}"
    ratios = {size: found["rate"][largest] / found["rate"]["K=1"] for size, found in table.items()}
    if options.json:
        print(json.dumps({"measured": table, "ratio": ratios, "cores": cores}))
        return
    for size, found in table.items():
        rate, mib = found["rate"], found["mib"]
        print(f"{size} px: trial-steps/s " + ", ".join(f"{name} {value:.1f}" for name, value in rate.items()))
        print(f"{size} px: peak MiB " + ", ".join(f"{name} {value:.0f}" for name, value in mib.items()))
        rival = f"{cores} processes"
        print(f"{size} px: {largest} against {rival}: {rate[largest] / rate[rival]:.2f} times")
        if options.freeze:
            frozen, lone = rate[f"frozen {largest}"], rate["frozen K=1"]
            against = f"{frozen / lone:.2f} times frozen K=1, {frozen / rate['K=1']:.2f} times K=1"
            print(f"{size} px: frozen {largest} is {against}")
    print(f"{largest} against K=1: " + ", ".join(f"{ratio:.2f} times at {size} px" for size, ratio in ratios.items()))


if __name__ == "__main__":
    main()
