"""A pack on the CPU: some of its slots to each thread.

Threads that share one operation wait for each other at its end, a thousand times in a step, and the maps of many slots
together do not fit the processor's caches. Slots share nothing but the images, so on the CPU a large pack is cut into
lanes: each is a `Pack` of some of the slots, trained by a thread of its own, whose operations have an equal part of
torch's threads. Elsewhere, and for few slots, there is one lane.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import chain, pairwise

import torch
from torch import Tensor

from yolocore.data.loader import Batch
from yolocore.device import Precision
from yolocore.evaluate import Evaluator, SlotEvaluation
from yolocore.hyperparameters import Hyperparameters
from yolocore.training.config import TrainConfig
from yolocore.training.pack import Pack, PackSlot, SlotEpoch, check_compatible, reshaped

SLOTS_PER_LANE = 2
"""At least; a lane of one slot is no faster than all threads in turn on every slot."""


def lane_count(slots: int, device: torch.device) -> int:
    """How many lanes a pack of so many slots is cut into."""
    return min(torch.get_num_threads(), max(slots // SLOTS_PER_LANE, 1)) if device.type == "cpu" else 1


class Lanes:
    """A pack whose slots are spread over lanes in their order.

    Arguments, methods and errors are those of `Pack`.
    """

    def __init__(
        self,
        config: TrainConfig,
        slots: Sequence[PackSlot],
        *,
        num_classes: int,
        batches_per_epoch: int,
        device: torch.device,
        precision: Precision = "fp32",
    ) -> None:
        self.config = config
        self._device = device
        self._make = partial(
            Pack,
            config,
            num_classes=num_classes,
            batches_per_epoch=batches_per_epoch,
            device=device,
            precision=precision,
        )
        self.lanes: list[Pack] = []
        self._threads: list[ThreadPoolExecutor] = []
        self._assemble(slots)

    def _assemble(self, slots: Sequence[PackSlot]) -> None:
        check_compatible([slot.key for slot in slots], [slot.hyperparameters for slot in slots])
        count = lane_count(len(slots), self._device)
        self._bounds = [len(slots) * lane // count for lane in range(count + 1)]
        self.lanes = []  # what they hold is freed before the new ones take as much
        self.lanes = [self._make(slots[start:end]) for start, end in pairwise(self._bounds)]
        if len(self._threads) != count:
            threads = torch.get_num_threads() // count
            # One thread to a lane, since torch keeps for each thread how many it may use.
            self._threads = [ThreadPoolExecutor(1, "lane", torch.set_num_threads, (threads,)) for _ in range(count)]

    def _side_by_side(self, acts: Sequence[Callable[[], object]]) -> None:
        """Does one thing per lane; one thing alone gets all of torch's threads."""
        if len(acts) == 1:
            acts[0]()
            return
        running = [thread.submit(act) for thread, act in zip(self._threads, acts, strict=False)]
        wait(running)
        for one in running:
            one.result()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the slots."""
        return tuple(chain.from_iterable(lane.keys for lane in self.lanes))

    @property
    def hyperparameters(self) -> tuple[Hyperparameters, ...]:
        """Of the slots."""
        return tuple(chain.from_iterable(lane.hyperparameters for lane in self.lanes))

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epochs that each slot has behind it."""
        return tuple(chain.from_iterable(lane.epochs for lane in self.lanes))

    def begin_epoch(self) -> None:
        """See `Pack`."""
        for lane in self.lanes:
            lane.begin_epoch()

    def train_step(self, images: Tensor, targets: Tensor, size: int | None = None) -> None:
        """Train every slot on one batch; what it gave is told at the end of the epoch."""
        self._side_by_side([partial(lane.train_step, images, targets, size) for lane in self.lanes])

    def end_epoch(self) -> list[SlotEpoch]:
        """See `Pack`."""
        return list(chain.from_iterable(lane.end_epoch() for lane in self.lanes))

    def all_failed(self) -> bool:
        """See `Pack`."""
        return all(lane.all_failed() for lane in self.lanes)

    def evaluate(self, batches: Iterable[Batch], slots: Sequence[int]) -> list[SlotEvaluation]:
        """Score the moving averages of some slots in one pass over the batches.

        Args:
            batches: With `infos`.
            slots: Which, at least one.

        Returns:
            One per slot, in the order asked for.
        """
        parts = [[slot for slot in slots if start <= slot < end] for start, end in pairwise(self._bounds)]
        evaluators: list[Evaluator] = [
            lane.evaluator([slot - start for slot in part])
            for lane, start, part in zip(self.lanes, self._bounds, parts, strict=False)
            if part
        ]
        for batch in batches:
            self._side_by_side([partial(evaluator.add, batch) for evaluator in evaluators])
        found = chain.from_iterable(evaluator.results() for evaluator in evaluators)
        by_slot = dict(zip(chain.from_iterable(parts), found, strict=True))
        return [by_slot[slot] for slot in slots]

    def _of_slot(self, slot: int) -> tuple[Pack, int]:
        """The lane that a slot is in, and its place there."""
        lane = next(index for index, end in enumerate(self._bounds[1:]) if slot < end)
        return self.lanes[lane], slot - self._bounds[lane]

    def slot_weights(self, slot: int) -> dict[str, Tensor]:
        """See `Pack`."""
        lane, place = self._of_slot(slot)
        return lane.slot_weights(place)

    def slot(self, slot: int) -> PackSlot:
        """See `Pack`."""
        lane, place = self._of_slot(slot)
        return lane.slot(place)

    def reshape(self, *, drop: Sequence[int] = (), add: Sequence[PackSlot] = ()) -> None:
        """See `Pack`; all slots are spread over the lanes anew."""
        if drop or add:
            self._assemble(reshaped(self, drop, add))
