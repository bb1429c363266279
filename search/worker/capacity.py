"""How many trials a worker's packs have: what the study says, or what its trainer measures."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from search.config import StudyConfig
from search.errors import UserInputError
from search.ledger import SEARCH, WorkerState
from search.settings import GridSampler, NonePruner, QmcSampler, RandomSampler
from search.space import pack_limit
from search.worker.context import WorkerContext
from search.worker.host import neighbours
from search.worker.messages import CapacityMeasured, MeasureCapacity, Measured, PackCrashed
from search.worker.trainer_link import TrainerDiedError, TrainerLink
from yolocore.training.capacity import Capacity, best_size

logger = logging.getLogger(__name__)

ROUNDS = 3
"""A search that learns from its results has to have some before it proposes the last third of its trials."""


def is_measured(config: StudyConfig) -> bool:
    """Whether the study leaves the size of its packs to a measurement, and there is something to choose."""
    return config.train.pack == "auto" and pack_limit(config) > 1


def measured_limit(context: WorkerContext, trainer: TrainerLink, largest: int) -> int:
    """Lets the trainer try packs of growing size and says which is the fastest. Nothing may be in training.

    Args:
        context: What the parts of a worker share.
        trainer: Without a pack now.
        largest: The most that are useful; 1 needs no measurement.

    Raises:
        UserInputError: Data, weights or device cannot be used.
    """
    if largest == 1:
        return 1
    found: list[Capacity] = []
    share = workers_here(context) if context.train.device == "cpu" else 1
    try:
        trainer.send(MeasureCapacity(context.config.base_hyperparameters(), largest, share))
        while not isinstance(message := trainer.receive(), Measured):
            if isinstance(message, CapacityMeasured):
                found.append(message.capacity)
            elif isinstance(message, PackCrashed):
                if message.fixable:
                    raise UserInputError(message.reason)
                logger.warning("packs could not be measured any further: %s", message.reason)
                # What raised may have left a device in a state that would fail the first trials.
                trainer.close()
                break
    except TrainerDiedError as error:
        # Killed for the memory it took, perhaps: what it had said before still holds.
        logger.warning("packs could not be measured any further: %s", error)
    chosen = best_size(found)
    logger.info("%s", capacity_table(found, chosen))
    return chosen


def largest_useful(context: WorkerContext) -> int:
    """No more slots than this worker's share of the tickets that are left, in rounds where the search learns.

    Cohorts of reruns are wanted whole.
    """
    config = context.config
    cohort = context.ledger.largest_cohort(config.name) if set(context.kinds) != {SEARCH} else 0
    left = sum(context.ledger.open_counts(config.name).values()) if SEARCH in context.kinds else 0
    learns = not isinstance(config.sampler, RandomSampler | QmcSampler | GridSampler)
    rounds = ROUNDS if learns or not isinstance(config.pruner, NonePruner) else 1
    workers = len(context.ledger.workers(config.name, WorkerState.RUNNING))
    return max(1, min(pack_limit(config), max(cohort, math.ceil(left / (max(workers, 1) * rounds)))))


def workers_here(context: WorkerContext) -> int:
    """Workers of this host that have the same memory to share."""
    running = context.ledger.workers(context.config.name, WorkerState.RUNNING)
    # A row names the precision behind the device.
    return max(1, sum(worker.device.split()[:1] == [context.train.device] for worker in neighbours(running)))


def capacity_table(found: Sequence[Capacity], chosen: int) -> str:
    """What was measured, a line for each size."""
    lines = [f"packs of {chosen}: measured"]
    for one in found:
        gigabytes = one.memory / 2**30
        what = one.note or f"{one.steps_per_second:8.1f} trial-steps a second, {gigabytes:.1f} GiB"
        lines.append(f"  {one.slots:3d} slots {what}{' *' if one.slots == chosen else ''}")
    return "\n".join(lines)
