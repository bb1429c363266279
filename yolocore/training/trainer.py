"""Training as the rest of the house sees it: starts in, one report per slot and epoch out."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from yolocore.data.augment import AugmentSettings
from yolocore.data.dataset import SplitName, load_dataset_config, scan_split
from yolocore.data.loader import Batch, TrainLoader, ValLoader
from yolocore.data.sampling import class_weights
from yolocore.details import EvaluationDetails
from yolocore.device import resolve_device, resolve_precision
from yolocore.errors import DatasetError, TrainingError
from yolocore.evaluate import SlotEvaluation
from yolocore.host import loader_processes
from yolocore.hyperparameters import Hyperparameters
from yolocore.metrics import DetectionMetrics
from yolocore.training.config import TrainConfig
from yolocore.training.lanes import Lanes
from yolocore.training.multiscale import batch_sizes
from yolocore.training.pack import PackSlot, SlotEpoch, check_compatible, fresh_state
from yolocore.training.start import start_weights

_log = logging.getLogger(__name__)

VALIDATION_BATCH_FACTOR = 2
"""Validation keeps no gradients and takes larger batches."""

STREAM_EPOCH = "stream_epoch"
"""Key of a slot's state: the epoch of the image stream that its pack would train on next."""

CLASS_MAP = "class_map"
"""Where the state of a slot has its last mAP of every class, by which image weights draw."""

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
    stream_epoch: int = 0
    """The pack's epoch, which says which images this was: slots that started together are at the same one."""
    slots: int = 1
    """Slots that shared the pack's epoch, and its `seconds`."""
    evaluation_seconds: float = 0.0
    """Part of `seconds` that validation took."""


@dataclass(slots=True)
class TrainingData:
    """The data set as loaders. Decoding images is expensive, so packs that follow each other share one of these."""

    config: TrainConfig
    num_classes: int
    train: TrainLoader
    validation: ValLoader
    settings: AugmentSettings
    seed: int
    _test: ValLoader | None = field(default=None, init=False)
    _test_is_read: bool = field(default=False, init=False)

    @classmethod
    def load(cls, config: TrainConfig, hyperparameters: Hyperparameters) -> Self:
        """Read the data set, check its labels and fill the caches.

        Args:
            config: Names the data set, image and batch size, cache and workers.
            hyperparameters: Whose augmentation keys the training images follow.

        Raises:
            DatasetError: The data set cannot be used.
        """
        data = load_dataset_config(config.data, single_class=config.single_cls)
        device = resolve_device(config.device).type
        batch_bytes = 3 * config.batch_size * config.image_size**2
        loaders = loader_processes(config.workers, device, batch_bytes)
        settings = AugmentSettings.from_hyperparameters(hyperparameters)
        common: dict[str, Any] = {"cache": config.cache, "pin_memory": device == "cuda"}
        train, size = scan_split(data, "train"), config.image_size
        train_loader = TrainLoader(
            train, settings, size, config.batch_size, config.seed, workers=loaders, rect=config.rect, **common
        )
        return cls(
            config, data.num_classes, train_loader, _evaluation_loader(config, "val", device), settings, config.seed
        )

    def test_loader(self) -> ValLoader | None:
        """The batches of the test split, read when first asked for; None where the data set has none to judge by."""
        if not self._test_is_read:
            self._test_is_read = True
            data = load_dataset_config(self.config.data, single_class=self.config.single_cls)
            if data.entries("test"):
                try:
                    self._test = _evaluation_loader(self.config, "test", resolve_device(self.config.device).type)
                except DatasetError as error:
                    _log.warning("the test split is left out: %s", error)
        return self._test

    def stream(self, config: TrainConfig, hyperparameters: Hyperparameters) -> TrainLoader:
        """The training loader for a pack with these augmentation keys and this seed, over the same decoded images.

        Raises:
            TrainingError: The pack wants other images, or other sizes, than were loaded.
        """
        for name in ("data", "image_size", "batch_size", "rect", "single_cls"):
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
        if self._test is not None:
            self._test.close()


def _evaluation_loader(config: TrainConfig, split: SplitName, device: str) -> ValLoader:
    """The batches that models are evaluated on; without augmentation an image is half the work."""
    data = load_dataset_config(config.data, single_class=config.single_cls)
    loaders = loader_processes(config.workers, device, 3 * config.batch_size * config.image_size**2)
    return ValLoader(
        scan_split(data, split),
        config.image_size,
        VALIDATION_BATCH_FACTOR * config.batch_size,
        config.cache,
        (loaders + 1) // 2,
        pin_memory=device == "cuda",
    )


class PackTrainer:
    """Trains a pack of trials epoch by epoch, evaluates their moving averages and reports.

    Every slot has its own clock: slots may start at different epochs, join a running pack (`reshape`), and each ends
    after its own `config.epochs`. All slots see the same images: the stream is a function of (seed, the pack's epoch,
    image). A pack of fresh slots starts at epoch 0 of the stream; with resumed slots it goes on where the furthest of
    them had stopped, also when that one joins later, so that no slot meets the same epoch twice. Fresh slots start from
    the same weights, a function of the seed or of `config.weights`.

    Args:
        config: What all slots share.
        starts: At least one, equal in every hyperparameter that a pack shares.
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
        self._refuse_pack(len(starts))
        self.data = data or TrainingData.load(config, starts[0].hyperparameters)
        if self.device.type == "cuda":
            # Shapes repeat: let it pick the fastest kernels once. With multi-scale it would measure ever again.
            torch.backends.cudnn.benchmark = not config.multi_scale
        self._fresh: dict[str, Any] | None = None
        self._class_map: dict[str, tuple[float, ...]] = {}
        self._evaluated: dict[str, SlotEvaluation] = {}
        self._pack: Lanes | None = None
        self._start(starts)

    def _start(self, starts: Sequence[SlotStart]) -> None:
        """Make a pack where there is none; its stream begins anew."""
        self._stream = self.data.stream(self.config, starts[0].hyperparameters)
        self._pack = Lanes(
            self.config,
            self._slots(starts),
            num_classes=self.data.num_classes,
            batches_per_epoch=len(self._stream),
            device=self.device,
            precision=self.precision,
        )
        self._stream_epoch = self._furthest(starts)

    def _refuse_pack(self, slots: int) -> None:
        if self.config.image_weights and slots > 1:
            raise TrainingError(f"image_weights: the images depend on the model, so a pack has one slot, not {slots}")

    def _furthest(self, starts: Sequence[SlotStart]) -> int:
        """Where the stream goes on so that none of these slots meets an epoch of it again."""
        return max((stream_epoch(start.state, len(self._stream)) for start in starts if start.state), default=0)

    def _slots(self, starts: Sequence[SlotStart]) -> list[PackSlot]:
        self._class_map.update({s.key: tuple(s.state[CLASS_MAP]) for s in starts if s.state and CLASS_MAP in s.state})
        if self._fresh is None and any(start.state is None for start in starts):
            self._fresh = fresh_state(start_weights(self.config, self.data.num_classes).state)
        return [
            PackSlot(start.key, start.hyperparameters, (self._fresh or {}) if start.state is None else start.state)
            for start in starts
        ]

    @property
    def active(self) -> tuple[str, ...]:
        """Keys of the slots in the pack, those that have ended since the last epoch included."""
        return self._pack.keys if self._pack else ()

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Keys of the slots that have epochs left to train."""
        return tuple(key for key, done in self.epochs.items() if done < self.config.epochs)

    @property
    def epochs(self) -> dict[str, int]:
        """Epochs that each slot in the pack has behind it."""
        return dict(zip(self._pack.keys, self._pack.epochs, strict=True)) if self._pack else {}

    @property
    def stream_epoch(self) -> int:
        """Epoch of the image stream that the pack trains on next."""
        return self._stream_epoch

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return not self.unfinished

    def run_epoch(self) -> list[EpochReport]:
        """Train all slots for one epoch, evaluate those for whom it is on their grid, and report every slot.

        A slot whose loss or gradients are not finite reports its failure once and leaves the pack. One that has its
        `config.epochs` behind it can still be read, and leaves before the next epoch.

        Raises:
            TrainingError: Nothing is left to train.
        """
        self.drop([key for key in self.active if key not in self.unfinished])
        if self._pack is None:
            raise TrainingError(f"nothing is left to train: every slot has left or has its {self.config.epochs} epochs")
        started = time.perf_counter()
        rows = self._train(self._pack)
        self.drop([row.key for row in rows if row.failure])
        trained = time.perf_counter()
        metrics = self._evaluate()
        ended = time.perf_counter()
        stream_epoch, self._stream_epoch = self._stream_epoch, self._stream_epoch + 1
        return [
            EpochReport(
                row.key,
                row.epoch,
                metrics.get(row.key),
                *row.items,
                row.lr,
                ended - started,
                row.failure,
                stream_epoch,
                len(rows),
                ended - trained,
            )
            for row in rows
        ]

    def _train(self, pack: Lanes) -> list[SlotEpoch]:
        pack.begin_epoch()
        count = len(self._stream)
        sizes = batch_sizes(self.config, self._stream_epoch, count)
        for done, batch in enumerate(self._stream.epoch(self._stream_epoch, self._class_weights()), start=1):
            pack.train_step(batch.images, batch.targets, sizes[done - 1])
            if self._on_batch:
                self._on_batch(done, count)
            if done % FAILURE_CHECK_BATCHES == 0 and pack.all_failed():
                break
        return pack.end_epoch()

    def _class_weights(self) -> tuple[float, ...] | None:
        """With image weights: of rare classes, and of those that the last evaluation found badly detected."""
        if not self.config.image_weights:
            return None
        (key,) = self.active
        classes = self.data.num_classes
        found = np.array(self._class_map.get(key, (0.0,) * classes))
        weights: list[float] = (class_weights(self._stream.images.labels(), classes) * (1 - found) ** 2).tolist()
        return tuple(weights)

    def _evaluate(self) -> dict[str, DetectionMetrics]:
        """One pass over the validation images for all slots that are due, each on its own grid of epochs."""
        due = [key for key, done in self.epochs.items() if self._is_evaluated(done)]
        found = self._evaluate_on(self.data.validation, due)
        self._class_map.update({key: class_map(metrics, self.data.num_classes) for key, metrics in found.items()})
        return found

    def evaluate_on_test(self, keys: Sequence[str]) -> dict[str, DetectionMetrics]:
        """Score the moving averages of some slots on the test split; empty where the data set has none.

        Raises:
            TrainingError: A key is not in the pack.
        """
        loader = self.data.test_loader() if keys else None
        return {} if loader is None else self._evaluate_on(loader, keys)

    def _evaluate_on(self, loader: ValLoader, keys: Sequence[str]) -> dict[str, DetectionMetrics]:
        if not keys:
            return {}
        found = self._existing().evaluate(self._watched(loader), [self._index(key) for key in keys])
        self._evaluated = dict(zip(keys, found, strict=True))
        return {key: one.metrics for key, one in self._evaluated.items()}

    def slot_details(self, key: str, epoch: int) -> EvaluationDetails | None:
        """What pictures of a slot's last evaluation are drawn from; None if the last one was without it.

        Args:
            key: of the slot.
            epoch: that was evaluated, to be noted.
        """
        found = self._evaluated.get(key)
        return None if found is None else found.details(epoch)

    def _is_evaluated(self, done: int) -> bool:
        return done % self.config.eval_every == 0 or done == self.config.epochs

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
        self.reshape(drop=keys)

    def add(self, starts: Sequence[SlotStart]) -> None:
        """Let trials into the pack; those that are there do not notice. Between epochs only.

        Raises:
            TrainingError: They do not go with those that are there.
        """
        self.reshape(add=starts)

    def reshape(self, *, drop: Sequence[str] = (), add: Sequence[SlotStart] = ()) -> None:
        """Take slots out and let others in, in one rebuild. Between epochs only.

        A trial that joins anew starts its own warm-up, schedule, average and accumulation; its images are those of the
        pack's epoch. If nobody stays, those who join are a new pack.

        Raises:
            TrainingError: A key is not in the pack, or the slots do not go together; the pack is then as it was.
        """
        gone = {self._index(key) for key in drop}
        self._refuse_pack(len(self.active) - len(gone) + len(add))
        pack = self._pack
        if pack is not None and len(gone) < len(pack.keys):
            pack.reshape(drop=sorted(gone), add=self._slots(add))
            self._stream_epoch = max(self._stream_epoch, self._furthest(add))
        elif add:
            self._start(add)
        elif gone:
            self._pack = None

    def slot_state(self, key: str) -> dict[str, Any]:
        """Everything a slot needs to go on elsewhere, on the host: plain data and tensors, fit for `save_atomic`."""
        state = _on_host(self._existing().slot(self._index(key)).state)
        own = {CLASS_MAP: list(self._class_map[key])} if self.config.image_weights and key in self._class_map else {}
        return {**state, STREAM_EPOCH: self._stream_epoch, **own}

    def slot_weights(self, key: str) -> dict[str, Tensor]:
        """A slot's moving average as an official state dict, float32, on the host."""
        return {name: t.cpu() for name, t in self._existing().slot_weights(self._index(key)).items()}

    def _existing(self) -> Lanes:
        if self._pack is None:
            raise TrainingError("every slot has left the pack")
        return self._pack

    def _index(self, key: str) -> int:
        if key not in self.active:
            raise TrainingError(f"slot {key} is not in the pack; it holds {', '.join(self.active) or 'none'}")
        return self.active.index(key)


def class_map(metrics: DetectionMetrics, num_classes: int) -> tuple[float, ...]:
    """mAP50-95 of every class; the mean over the others for one that has no labels to be judged by."""
    return tuple(metrics.class_ap.get(index, metrics.map) for index in range(num_classes))


def stream_epoch(state: Mapping[str, Any], batches_per_epoch: int) -> int:
    """The first epoch of the image stream that a slot has not met; states without it come from packs without joiners.

    Args:
        state: Of a slot.
        batches_per_epoch: Batches that every epoch has.
    """
    own = int(state["clock"]["iteration"]) // batches_per_epoch
    return int(state.get(STREAM_EPOCH, own))


def _on_host(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, Mapping):
        return {key: _on_host(value) for key, value in tree.items()}
    return [_on_host(value) for value in tree] if isinstance(tree, list) else tree
