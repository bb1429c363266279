"""Training as the rest of the house sees it: starts in, one report per slot and epoch out."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from yolocore.checkpoint import load_weights, transfer
from yolocore.data.augment import AugmentSettings
from yolocore.data.dataset import load_dataset_config, scan_split
from yolocore.data.loader import Batch, TrainLoader, ValLoader
from yolocore.device import resolve_device, resolve_precision
from yolocore.errors import TrainingError, WeightsError
from yolocore.evaluate import evaluate
from yolocore.hyperparameters import Hyperparameters
from yolocore.metrics import DetectionMetrics
from yolocore.model import initial_state
from yolocore.training.config import TrainConfig
from yolocore.training.pack import Pack, PackSlot, SlotEpoch, check_compatible, fresh_state

VALIDATION_BATCH_FACTOR = 2
"""Validation keeps no gradients and takes larger batches."""

FAILURE_CHECK_BATCHES = 50
"""How often the host asks whether any slot is left; each time it waits for the device."""


@dataclass(frozen=True, slots=True)
class SlotStart:
    """A trial that starts, or goes on, in a pack."""

    key: str
    """Name of the trial, unique in the pack."""
    hyperparameters: Hyperparameters
    state: Mapping[str, Any] | None = None
    """From `PackTrainer.slot_state`, to go on where another trainer stopped; None starts anew."""


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What one epoch of one slot gave."""

    key: str
    epoch: int
    """The slot's own, from 0."""
    metrics: DetectionMetrics | None
    """Of the moving average; None if this epoch is not evaluated or the slot failed."""
    train_box: float
    """Mean over the batches of the weighted box loss; likewise objectness and classes."""
    train_obj: float
    train_cls: float
    lr: tuple[float, float, float]
    """Learning rates of the last batch: biases, decayed weights, norms."""
    seconds: float
    """Wall time of the pack's epoch, evaluation included."""
    failure: str | None
    """Why the slot cannot go on; it has then left the pack."""


@dataclass(slots=True)
class TrainingData:
    """The data set as loaders. Decoding images is expensive, so packs that follow each other share one of these."""

    config: TrainConfig
    num_classes: int
    train: TrainLoader
    validation: ValLoader
    settings: AugmentSettings
    seed: int

    @classmethod
    def load(cls, config: TrainConfig, hyperparameters: Hyperparameters) -> Self:
        """Read the data set, check its labels and fill the caches.

        Args:
            config: Names the data set, image and batch size, cache and workers.
            hyperparameters: Whose augmentation keys the training images follow.

        Raises:
            DatasetError: The data set cannot be used.
        """
        data = load_dataset_config(config.data)
        pin = resolve_device(config.device).type == "cuda"
        settings = AugmentSettings.from_hyperparameters(hyperparameters)
        common: dict[str, Any] = {"cache": config.cache, "workers": config.workers, "pin_memory": pin}
        train, size = scan_split(data, "train"), config.image_size
        train_loader = TrainLoader(train, settings, size, config.batch_size, config.seed, **common)
        batch = VALIDATION_BATCH_FACTOR * config.batch_size
        validation_loader = ValLoader(scan_split(data, "val"), size, batch, **common)
        return cls(config, data.num_classes, train_loader, validation_loader, settings, config.seed)

    def stream(self, config: TrainConfig, hyperparameters: Hyperparameters) -> TrainLoader:
        """The training loader for a pack with these augmentation keys and this seed, over the same decoded images.

        Raises:
            TrainingError: The pack wants other images, or other sizes, than were loaded.
        """
        for name in ("data", "image_size", "batch_size"):
            loaded, wanted = getattr(self.config, name), getattr(config, name)
            if loaded != wanted:
                raise TrainingError(f"{name}: the data was loaded for {loaded}, the training wants {wanted}")
        settings = AugmentSettings.from_hyperparameters(hyperparameters)
        if (settings, config.seed) != (self.settings, self.seed):
            self.train.close()
            self.train = self.train.restarted(settings, config.seed)
            self.settings, self.seed = settings, config.seed
        return self.train

    def close(self) -> None:
        """Stop the worker processes, if any; the caches stay."""
        self.train.close()
        self.validation.close()


class PackTrainer:
    """Trains a pack of trials epoch by epoch, evaluates their moving averages and reports.

    All slots see the same images: the stream is a function of (seed, epoch, image). Fresh slots start from the same
    weights, a function of the seed or of `config.weights`.

    Args:
        config: What all slots share.
        starts: At least one; all at the same epoch, and equal in every hyperparameter that a pack shares.
        on_batch: Called after each batch with (batches done, batches of the epoch).
        on_evaluation_batch: Called before each batch of a validation.
        data: Loaders to reuse; read from `config.data` if None.

    Raises:
        TrainingError: The starts do not go together.
        InputError: Data, weights, device or precision cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        starts: Sequence[SlotStart],
        *,
        on_batch: Callable[[int, int], None] | None = None,
        on_evaluation_batch: Callable[[], None] | None = None,
        data: TrainingData | None = None,
    ) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        self._on_batch = on_batch
        self._on_evaluation_batch = on_evaluation_batch
        check_compatible([start.key for start in starts], [start.hyperparameters for start in starts])
        self.data = data or TrainingData.load(config, starts[0].hyperparameters)
        self._stream = self.data.stream(config, starts[0].hyperparameters)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes repeat: let it pick the fastest kernels once
        self._pack: Pack | None = Pack(
            config,
            self._slots(starts),
            num_classes=self.data.num_classes,
            batches_per_epoch=len(self._stream),
            device=self.device,
            precision=self.precision,
        )
        self._epoch = self._common_epoch(self._pack)

    def _slots(self, starts: Sequence[SlotStart]) -> list[PackSlot]:
        fresh: dict[str, Any] = {}
        if any(start.state is None for start in starts):
            fresh = fresh_state(start_weights(self.config, self.data.num_classes))
        return [
            PackSlot(start.key, start.hyperparameters, fresh if start.state is None else start.state)
            for start in starts
        ]

    @staticmethod
    def _common_epoch(pack: Pack) -> int:
        if len(set(pack.epochs)) > 1:
            stands = ", ".join(f"{key} at {epoch}" for key, epoch in zip(pack.keys, pack.epochs, strict=True))
            raise TrainingError(f"the slots of a pack must start at the same epoch: {stands}")
        return pack.epochs[0]

    @property
    def active(self) -> tuple[str, ...]:
        """Keys of the slots that are still in the pack."""
        return self._pack.keys if self._pack else ()

    @property
    def epoch(self) -> int:
        """Epochs that the pack has behind it."""
        return self._epoch

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self._pack is None or self._epoch >= self.config.epochs

    @property
    def evaluates_next(self) -> bool:
        """Whether the coming epoch is evaluated."""
        done = self._epoch + 1
        return done % self.config.eval_every == 0 or done == self.config.epochs

    def run_epoch(self) -> list[EpochReport]:
        """Train all slots for one epoch, evaluate if the epoch is on the grid, and report every slot.

        A slot whose loss or gradients are not finite reports its failure once and leaves the pack.

        Raises:
            TrainingError: Nothing is left to train.
        """
        if self._pack is None or self.finished:
            raise TrainingError(f"nothing is left to train: {self._epoch} of {self.config.epochs} epochs are done")
        started = time.perf_counter()
        rows = self._train(self._pack)
        self.drop([row.key for row in rows if row.failure])
        metrics = self._evaluate() if self.evaluates_next else {}
        self._epoch += 1
        seconds = time.perf_counter() - started
        return [_report(row, metrics.get(row.key), seconds) for row in rows]

    def _train(self, pack: Pack) -> list[SlotEpoch]:
        pack.begin_epoch()
        count = len(self._stream)
        for done, batch in enumerate(self._stream.epoch(self._epoch), start=1):
            pack.train_step(batch.images, batch.targets)
            if self._on_batch:
                self._on_batch(done, count)
            if done % FAILURE_CHECK_BATCHES == 0 and pack.all_failed():
                break
        return pack.end_epoch()

    def _evaluate(self) -> dict[str, DetectionMetrics]:
        pack = self._pack
        if pack is None:
            return {}
        threshold = pack.hyperparameters[0].anchor_t
        results = evaluate(
            pack.evaluation_model(),
            self._watched(self.data.validation),
            pack.loss_weights,
            threshold,
            self.device,
            self.precision,
        )
        return dict(zip(pack.keys, results, strict=True))

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._on_evaluation_batch:
                self._on_evaluation_batch()
            yield batch

    def drop(self, keys: Sequence[str]) -> None:
        """Take slots out of the pack; the others do not notice. Between epochs only.

        Raises:
            TrainingError: A key is not in the pack.
        """
        if not keys:
            return
        gone = {self._index(key) for key in keys}
        if self._pack and len(gone) < len(self._pack.keys):
            self._pack.drop(sorted(gone))
        else:
            self._pack = None

    def slot_state(self, key: str) -> dict[str, Any]:
        """Everything a slot needs to go on elsewhere, on the host: plain data and tensors, fit for `save_atomic`."""
        state = _on_host(self._existing().slot_state(self._index(key)))
        assert isinstance(state, dict)
        return state

    def slot_weights(self, key: str) -> dict[str, Tensor]:
        """A slot's moving average as an official state dict, float32, on the host."""
        return {name: t.cpu() for name, t in self._existing().slot_weights(self._index(key)).items()}

    def _existing(self) -> Pack:
        if self._pack is None:
            raise TrainingError("every slot has left the pack")
        return self._pack

    def _index(self, key: str) -> int:
        if key not in self.active:
            raise TrainingError(f"slot {key} is not in the pack; it holds {', '.join(self.active) or 'none'}")
        return self.active.index(key)


def start_weights(config: TrainConfig, num_classes: int) -> dict[str, Tensor]:
    """The weights that every fresh slot starts from: by seed, or what fits of a weights file.

    Raises:
        WeightsError: The file cannot be read, or nothing of it fits.
    """
    fresh = initial_state(config.model, num_classes, config.seed)
    if config.weights is None:
        return fresh
    merged, taken, total = transfer(load_weights(config.weights), fresh)
    if taken == 0:
        raise WeightsError(
            f"{config.weights}: none of the {total} tensors of yolov5{config.model} fits in name and shape"
        )
    return merged


def _report(row: SlotEpoch, metrics: DetectionMetrics | None, seconds: float) -> EpochReport:
    box, obj, cls = row.items
    return EpochReport(row.key, row.epoch, metrics, box, obj, cls, row.lr, seconds, row.failure)


def _on_host(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, Mapping):
        return {key: _on_host(value) for key, value in tree.items()}
    return [_on_host(value) for value in tree] if isinstance(tree, list) else tree
