"""How many trials train together fastest on a device: a few real steps at K = 1, 2, 4, 8, ..."""

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from yolocore.data.loader import Batch
from yolocore.device import resolve_device, resolve_precision
from yolocore.hyperparameters import Hyperparameters
from yolocore.memory import free_bytes, is_out_of_memory, peak_bytes
from yolocore.training.config import TrainConfig
from yolocore.training.lanes import Lanes
from yolocore.training.pack import PackSlot, fresh_state
from yolocore.training.start import start_weights
from yolocore.training.trainer import TrainingData

BATCHES = 3
"""Different batches that the steps go through in turn."""
WARM_UP_STEPS = 2
SECONDS = 0.8
"""Steps are timed for at least so long, but no more than `MAX_STEPS` and no fewer than two."""
BUDGET_SECONDS = 60.0
"""No larger pack is tried that would take the whole measurement beyond this."""
MAX_STEPS = 12
USABLE_SHARE = 0.8
"""Part of the free memory that a pack may be expected to take; validation and the unforeseen need the rest."""
PAST_THE_PEAK = 0.9
"""Larger packs are not tried once two in a row have fallen so far behind the best; one may have been disturbed."""
AS_GOOD = 0.97
"""Of packs whose throughput differs by less than the noise of the measurement, the smallest is taken."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was found out about packs of one size."""

    slots: int
    steps_per_second: float
    """Trial-steps per second: K over the time of a step, loading included unless that runs beside. 0: untried."""
    memory: int
    """Bytes at the peak; on the CPU of the whole process."""
    note: str = ""
    """Why it was not measured, if so."""


def measure_capacity(
    config: TrainConfig, data: TrainingData, hyperparameters: Hyperparameters, largest: int, share: int = 1
) -> Iterator[Capacity]:
    """Measure packs of growing size until memory, `largest` or the peak of the throughput ends it.

    Args:
        config: Of the training.
        data: Loaded for it.
        hyperparameters: Of any trial; no value changes the time of a step, but whether the loss is focal does.
        largest: The most slots that are wanted.
        share: Processes that have this device's memory to share.

    Yields:
        One per size, in growing order, as soon as it is known.
    """
    config = replace(config, compile="none")  # each size would be compiled, for minutes
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.multi_scale  # as the training does
    batches, loading = _load(data, config, hyperparameters)
    state = fresh_state(start_weights(config, data.num_classes).state)
    free = free_bytes(device)
    usable = None if free is None else int(free * USABLE_SHARE / share)
    before, began = peak_bytes(device), time.perf_counter()
    best, previous, behind, took = 0.0, 0, 0, 0.0
    for slots in _sizes(largest):
        # Activations and weights grow with the slots; what the first pack needed besides is counted again.
        expected, started = 2 * previous, time.perf_counter()
        if note := _too_much(slots, expected, usable, started - began + 2 * took):
            yield Capacity(slots, 0.0, expected, note)
            return
        found = [PackSlot(str(slot), hyperparameters, state) for slot in range(slots)]
        try:
            seconds = _step_seconds(config, found, batches, data.num_classes, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield Capacity(slots, 0.0, peak_bytes(device), "out of memory")
            return
        finally:
            _release(device)
        peak = peak_bytes(device)
        previous = peak - before
        rate = slots / (seconds + loading)
        yield Capacity(slots, rate, peak)
        took = time.perf_counter() - started
        behind = behind + 1 if rate < PAST_THE_PEAK * best else 0
        if behind == 2:
            return
        best = max(best, rate)


def best_size(found: Sequence[Capacity]) -> int:
    """The number of slots to train with: the smallest whose throughput is as good as the best; 1 if none is known."""
    best = max((one.steps_per_second for one in found), default=0.0)
    good = [one.slots for one in found if one.steps_per_second >= AS_GOOD * best > 0]
    return min(good, default=1)


def epoch_seconds(config: TrainConfig, data: TrainingData, hyperparameters: Hyperparameters, found: Capacity) -> float:
    """What an epoch of a pack takes, evaluation included, from what was measured and a few validation batches.

    Args:
        config: Of the training.
        data: Loaded for it.
        hyperparameters: Of any trial.
        found: Measured for the pack's size.
    """
    batches = len(data.stream(config, hyperparameters))
    training = batches * found.slots / found.steps_per_second
    return training + _evaluation_seconds(config, data, hyperparameters, found.slots) / config.eval_every


def _evaluation_seconds(config: TrainConfig, data: TrainingData, hyperparameters: Hyperparameters, slots: int) -> float:
    """One pass over the validation images; the first batch, which every engine prepares itself for, is not timed."""
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    state = fresh_state(start_weights(config, data.num_classes).state)
    found = [PackSlot(str(slot), hyperparameters, state) for slot in range(slots)]
    classes = data.num_classes
    pack = Lanes(config, found, num_classes=classes, batches_per_epoch=1, device=device, precision=precision)
    count = len(data.validation)
    timed = min(count, BATCHES)
    images = list(itertools.islice(data.validation, timed))
    try:
        pack.evaluate(images[:1], range(slots))
        started = time.perf_counter()
        pack.evaluate(images, range(slots))
        _wait(device)
        return (time.perf_counter() - started) * count / timed
    finally:
        _release(device)


def _too_much(slots: int, memory: int, usable: int | None, seconds: float) -> str:
    """Why packs of this size are not tried, "" if they are."""
    if usable is not None and memory > usable:
        return f"not tried: {usable / 2**30:.1f} GiB are free for it"
    return "not tried: it would take too long" if slots > 2 and seconds > BUDGET_SECONDS else ""


def _sizes(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest itself."""
    powers = list(itertools.takewhile(lambda size: size < largest, (2**power for power in range(32))))
    return [*powers, largest]


def _load(data: TrainingData, config: TrainConfig, hyperparameters: Hyperparameters) -> tuple[list[Batch], float]:
    """A few batches of the real stream, and the seconds that each costs a training step."""
    stream = data.stream(config, hyperparameters)
    started = time.perf_counter()
    batches = list(itertools.islice(stream.epoch(0), BATCHES))
    seconds = (time.perf_counter() - started) / len(batches)
    return batches, 0.0 if stream.runs_beside else seconds


def _step_seconds(
    config: TrainConfig, slots: Sequence[PackSlot], batches: Sequence[Batch], num_classes: int, device: torch.device
) -> float:
    pack = Lanes(
        config,
        slots,
        num_classes=num_classes,
        batches_per_epoch=WARM_UP_STEPS + MAX_STEPS,
        device=device,
        precision=resolve_precision(config.precision, device),
    )
    pack.begin_epoch()
    endless = itertools.cycle(batches)
    for batch in itertools.islice(endless, WARM_UP_STEPS):
        pack.train_step(batch.images, batch.targets)
    _wait(device)
    times: list[float] = []
    while len(times) < 2 or (len(times) < MAX_STEPS and sum(times) < SECONDS):
        batch = next(endless)
        started = time.perf_counter()
        pack.train_step(batch.images, batch.targets)
        _wait(device)
        times.append(time.perf_counter() - started)
    # The fastest: what else the machine does only ever adds.
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
