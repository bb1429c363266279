"""The pack: K trials trained as one network, each slot with its own schedule, optimiser, average and fate.

A pack is driven in epochs: `begin_epoch`, `train_step` for every batch, `end_epoch`; between epochs slots are read
(`slot_state`), leave and join (`reshape`). Every slot has its own clock, so a slot that joins later warms up while its
neighbours are far on. A train step never waits for the device: what the host must know was computed at the start of the
epoch, and what went wrong on the device is read at its end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from yolocore.assign import assign_targets
from yolocore.data.loader import Batch
from yolocore.device import Precision, autocast, images_as_input, input_dtype, keep_freed_memory
from yolocore.errors import TrainingError
from yolocore.evaluate import Evaluator, SlotEvaluation
from yolocore.hyperparameters import SHARED_KEYS, Hyperparameters
from yolocore.loss import DEFAULT_BALANCE, LossComponents, LossWeights, detection_loss, update_balance
from yolocore.model import STRIDES, YOLOv5
from yolocore.model.trunk import Trunk
from yolocore.training.compiled import compiled
from yolocore.training.config import TrainConfig
from yolocore.training.multiscale import resized
from yolocore.training.optim import CLIP_NORM, Clock, PackEMA, PackOptimizer, Schedule, StepTable, row_norms

STATE_FORMAT = 1
"""Version of the tree that `Pack.slot_state` gives."""

INITIAL_LOSS_SCALE = 65536.0
LOSS_SCALE_INTERVAL = 2000
"""Sound steps after which the loss scale of a slot doubles (fp16 only)."""

FAILURES = ("", "the loss is not finite", "the gradient is not finite", "the running statistics are not finite")
_BAD_LOSS, _BAD_GRADIENT, _BAD_STATISTICS = 1, 2, 3


@dataclass(frozen=True, slots=True)
class PackSlot:
    """A trial as it enters a pack."""

    key: str
    """Name of the trial, unique in the pack."""
    hyperparameters: Hyperparameters
    state: Mapping[str, Any]
    """From `fresh_state`, or from `Pack.slot_state` to go on where another pack stopped."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one batch gave, still on the device."""

    total: Tensor
    """`[K]`: sum of the weighted items times the batch size."""
    items: Tensor
    """`[K, 3]`: weighted box, obj, cls."""
    norm: Tensor | None
    """`[K]`: gradient norms before clipping; None if no slot stepped."""
    stepped: tuple[bool, ...]
    """Whose turn it was to step (on the host)."""


@dataclass(frozen=True, slots=True)
class SlotEpoch:
    """One slot's epoch, on the host."""

    key: str
    epoch: int
    """The slot's own, from 0."""
    items: tuple[float, float, float]
    """Means of the weighted box, obj and cls over the batches."""
    lr: tuple[float, float, float]
    """Learning rates of the last batch: bias, decay, norm."""
    failure: str | None
    """Why the slot cannot go on, if so."""


def fresh_state(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of a slot that has not trained yet.

    As YOLOv5 does, the model starts from weights rounded to half precision once; the moving average keeps them whole.

    Args:
        weights: An official state dict, float32 or float64.
    """
    rounded = {name: t.half().to(t.dtype) if t.is_floating_point() else t for name, t in weights.items()}
    return {
        "format": STATE_FORMAT,
        "clock": asdict(Clock()),
        "model": rounded,
        "ema": dict(weights),
        "optimizer": None,
        "balance": list(DEFAULT_BALANCE),
        "loss_scale": [INITIAL_LOSS_SCALE, 0.0],
    }


class Pack:
    """K models that train as one on one device.

    Args:
        config: What all slots share.
        slots: At least one. They must agree on every key in `SHARED_KEYS`.
        num_classes: C.
        batches_per_epoch: Batches that every epoch has.
        device: Where to train.
        precision: fp32, bf16 or fp16 (autocast; the weights stay in the type of the states).

    Raises:
        TrainingError: The slots do not go together; the message names the key.
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
        self.num_classes = num_classes
        self.batches_per_epoch = batches_per_epoch
        self.device = device
        self.precision = precision
        if device.type == "cpu":
            keep_freed_memory()
        self._assemble(slots)

    def _assemble(self, slots: Sequence[PackSlot]) -> None:
        """Build everything that has a slot axis."""
        config, device = self.config, self.device
        check_compatible([slot.key for slot in slots], [slot.hyperparameters for slot in slots])
        for slot in slots:
            check_state(slot.key, slot.state, config)
        states = [slot.state for slot in slots]
        self.keys = tuple(slot.key for slot in slots)
        self.hyperparameters = tuple(slot.hyperparameters for slot in slots)
        self.clocks = tuple(Clock(**state["clock"]) for state in states)
        self.schedules = tuple(self._schedule(hyp) for hyp in self.hyperparameters)
        self.model = self._stack([state["model"] for state in states])
        self._forward = compiled(self.model, config.compile)
        self.dtype = next(self.model.parameters()).dtype
        self.optimizer = PackOptimizer(self.model, self.hyperparameters, config.batch_size, config.optimizer)
        self.ema = PackEMA(self.model, self.optimizer)
        self._not_averaged: list[dict[str, Tensor]] = []
        for index, state in enumerate(states):
            self._restore(index, state)
        gains = [self._loss_weights(hyp) for hyp in self.hyperparameters]
        self.loss_weights = LossWeights.stack(gains).to(device, self.dtype)
        self.balance = self._vector([state["balance"] for state in states])
        scale = self._vector([state["loss_scale"] for state in states])
        self._loss_scale = scale[:, 0] if self.precision == "fp16" else torch.ones_like(scale[:, 0])
        self._sound_steps = scale[:, 1].clone()
        self._failure = torch.zeros(len(slots), dtype=torch.int64, device=device)
        self._failed_at = torch.zeros(len(slots), dtype=self.dtype, device=device)
        self._evaluation_model: YOLOv5 | None = None
        self._table: StepTable | None = None
        self._batch = 0

    def _stack(self, weights: Sequence[Mapping[str, Tensor]]) -> YOLOv5:
        # Fresh slots share one dict, and comparing a dict with itself is free.
        moved = {id(one): {name: tensor.to(self.device) for name, tensor in one.items()} for one in weights}
        states = [moved[id(one)] for one in weights]
        trunk = Trunk.of(self.config.freeze, states)
        model = YOLOv5.stack(self.config.model, self.num_classes, states, trunk=trunk)
        model.model[: self.config.freeze].requires_grad_(False)
        # Faster for float32 and autocast, most of all with several slots; float64 has no kernels for it.
        return model.to(memory_format=torch.channels_last) if model.anchors.dtype == torch.float32 else model

    def _schedule(self, hyp: Hyperparameters) -> Schedule:
        config = self.config
        return Schedule(
            hyperparameters=hyp,
            epochs=config.epochs,
            batches_per_epoch=self.batches_per_epoch,
            batch_size=config.batch_size,
            cosine=config.cos_lr,
            adaptive=config.optimizer != "SGD",
        )

    def _loss_weights(self, hyp: Hyperparameters) -> LossWeights:
        return LossWeights.from_hyperparameters(
            hyp, self.num_classes, self.config.image_size, label_smoothing=self.config.label_smoothing
        )

    def _vector(self, values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype).to(self.device)

    def _restore(self, index: int, state: Mapping[str, Any]) -> None:
        averaged = set(self.ema.layout.names)
        self._not_averaged.append({name: t for name, t in state["ema"].items() if name not in averaged})
        self.ema.load_slot(index, state["ema"])
        remembered = state["optimizer"]
        if remembered is not None:
            self.optimizer.load_slot(index, remembered["buffers"], remembered["steps"])

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epochs that each slot has behind it."""
        return tuple(clock.iteration // self.batches_per_epoch for clock in self.clocks)

    def begin_epoch(self) -> None:
        """Plan the epoch's steps and throw away what is left of unfinished accumulation."""
        self.model.train()
        if self.config.freeze_bn:
            self.model.model[: self.config.freeze].eval()
        self.optimizer.clear_gradients()
        self._table = StepTable.make(self.schedules, self.clocks, self.batches_per_epoch, self.device, self.dtype)
        self._sums = torch.zeros(len(self.keys), 3, dtype=self.dtype, device=self.device)
        self._batch = 0

    def train_step(self, images: Tensor, targets: Tensor, size: int | None = None) -> StepResult:
        """Train every slot on one batch.

        Args:
            images: `[B, 3, H, W]` RGB, uint8, or floating point already divided by 255.
            targets: `[T, 6]` rows (image, class, x, y, w, h), normalised; padding rows have image -1.
            size: Resize the images to this longer side, pixels (multi-scale); None leaves them.
        """
        if self._table is None or self._batch >= self.batches_per_epoch:
            raise TrainingError(f"batch {self._batch} is outside an epoch of {self.batches_per_epoch} batches")
        rates, stepped = self._table.values[self._batch], self._table.stepped[self._batch]
        self._batch += 1
        return self._step(self._send(images), self._send(targets), rates, stepped, size)

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _step(
        self, images: Tensor, targets: Tensor, rates: Tensor, stepped: tuple[bool, ...], size: int | None
    ) -> StepResult:
        """One batch without a single wait for the device."""
        loss = self._loss(images, targets, size)
        # The slots share no parameter, so the gradient of the sum is each slot's own; the weights of the sum are the
        # loss scales, and a slot whose loss is NaN spoils its own rows alone.
        torch.autograd.backward([loss.total], [self._loss_scale])
        if self.config.compile == "cudagraphs":
            self.optimizer.collect()  # the next batch's graph overwrites the gradients of this one
        return self._finish(loss, rates, stepped)

    @torch.no_grad()
    def _finish(self, loss: LossComponents, rates: Tensor, stepped: tuple[bool, ...]) -> StepResult:
        """What follows the backward pass: bookkeeping, and the optimiser where it is somebody's turn."""
        total, items = loss.total.detach(), loss.weighted.detach()
        self._mark(~torch.isfinite(total), _BAD_LOSS, rates)
        self._sums += torch.where(self._failure.unsqueeze(1) == 0, items, 0.0)
        if self.config.autobalance:
            self.balance = update_balance(self.balance, loss.obj_levels)
        norm = self._optimise(rates, stepped) if any(stepped) else None
        return StepResult(total, items, norm, stepped)

    def _loss(self, images: Tensor, targets: Tensor, size: int | None = None) -> LossComponents:
        pixels = self._pixels(images, size)
        height, width = pixels.shape[-2:]
        grids = [(height // stride, width // stride) for stride in STRIDES]
        threshold = self.hyperparameters[0].anchor_t
        assignment = assign_targets(targets.to(self.dtype), grids, self.model.anchors, len(pixels), threshold)
        with autocast(self.device, self.precision):
            predictions = self._forward(pixels)
        return detection_loss(predictions, assignment, self.loss_weights, self.balance)

    def _pixels(self, images: Tensor, size: int | None) -> Tensor:
        """Images as the network takes them; straight in autocast's type unless they are resized first."""
        if images.is_floating_point():
            pixels = resized(images, size)
            return pixels.contiguous(memory_format=torch.channels_last) if self.dtype == torch.float32 else pixels
        dtype = input_dtype(self.device, self.precision, self.dtype) if size is None else self.dtype
        return resized(images_as_input(images, dtype), size)

    def _optimise(self, rates: Tensor, stepped: tuple[bool, ...]) -> Tensor:
        norm = row_norms(self.optimizer.collect()) / self._loss_scale
        turn, finite = rates[:, 4] > 0, torch.isfinite(norm)
        overflow = turn & ~finite
        if self.precision == "fp16":
            self._mark(overflow & (self._loss_scale <= 1), _BAD_GRADIENT, rates)
        else:
            self._mark(overflow, _BAD_GRADIENT, rates)
        alive = self._failure == 0
        coefficient = torch.clamp(CLIP_NORM / (norm + 1e-6), max=1.0) / self._loss_scale
        self.optimizer.step(rates, turn & alive & finite, coefficient)
        self.optimizer.clear_stepped(stepped)
        self.ema.update(rates[:, 5], turn & alive)
        if self.precision == "fp16":
            self._adapt_loss_scale(turn, overflow)
        return norm

    def _adapt_loss_scale(self, turn: Tensor, overflow: Tensor) -> None:
        """Halve the scale of the slots that overflowed; double it after a long sound run. Nobody else notices."""
        sound = torch.where(overflow, 0.0, self._sound_steps + turn)
        grow = sound >= LOSS_SCALE_INTERVAL
        factor = torch.where(overflow, 0.5, 1.0) * torch.where(grow, 2.0, 1.0)
        self._loss_scale = self._loss_scale * factor
        self._sound_steps = torch.where(grow, 0.0, sound)

    def _mark(self, bad: Tensor, code: int, rates: Tensor) -> None:
        """Remember the first failure of each slot, on the device."""
        new = bad & (self._failure == 0)
        self._failure = torch.where(new, code, self._failure)
        self._failed_at = torch.where(new, rates[:, 6], self._failed_at)

    def end_epoch(self) -> list[SlotEpoch]:
        """Read what the epoch gave and move the clocks on. Waits for the device.

        Raises:
            TrainingError: The epoch did not have all its batches (it need not when every slot has failed).
        """
        if self._table is None or (self._batch < self.batches_per_epoch and not self.all_failed()):
            raise TrainingError(f"the epoch ended after {self._batch} of {self.batches_per_epoch} batches")
        self.ema.settle()
        self._mark(~torch.isfinite(self.ema.flat).all(dim=1), _BAD_STATISTICS, self._table.values[-1])
        means = (self._sums / max(self._batch, 1)).tolist()
        failures = [self._failure_text(*pair) for pair in zip(*self._failures_on_host(), strict=True)]
        lr = [schedule.at(clock.iteration - 1).lr for schedule, clock in self._ends()]
        epochs = self.epochs
        self.clocks, self._table = self._table.clocks, None
        return [
            SlotEpoch(key, epoch, (mean[0], mean[1], mean[2]), rate, failure)
            for key, epoch, mean, rate, failure in zip(self.keys, epochs, means, lr, failures, strict=True)
        ]

    def _ends(self) -> list[tuple[Schedule, Clock]]:
        assert self._table is not None
        return list(zip(self.schedules, self._table.clocks, strict=True))

    def _failures_on_host(self) -> tuple[list[int], list[float]]:
        return self._failure.tolist(), self._failed_at.tolist()

    def _failure_text(self, code: int, iteration: float) -> str | None:
        if not code:
            return None
        epoch, batch = divmod(int(iteration), self.batches_per_epoch)
        return f"{FAILURES[code]} (epoch {epoch}, batch {batch})"

    def all_failed(self) -> bool:
        """Whether no slot is left to train. Waits for the device."""
        return bool((self._failure > 0).all())

    def evaluation_model(self, slots: Sequence[int] | None = None) -> YOLOv5:
        """The moving averages of some slots as a model in evaluation mode, overwritten by the next call.

        Args:
            slots: Which, at least one, in this order; all if None.
        """
        chosen = list(range(len(self.keys)) if slots is None else slots)
        self.ema.settle()
        averages = dict(zip(self.ema.layout.names, self.ema.layout.views(self.ema.flat), strict=True))
        trunk = Trunk.of(self.config.freeze, [{n: t[slot] for n, t in averages.items()} for slot in chosen])
        model = self._evaluation_model
        if model is None or model.trunk != trunk:
            model = self._evaluation_model = self.model.select(chosen, trunk).eval().requires_grad_(False)
        users = [chosen[slot] for slot in trunk.first_slots]
        for name, target in model.official_tensors().items():
            if name in averages:
                rows = users if trunk.holds(name) else chosen
                target.copy_(averages[name] if len(rows) == len(self.keys) else averages[name][rows])
        return model

    def evaluator(self, slots: Sequence[int]) -> Evaluator:
        """Scores the moving averages of some slots, at least one, in this order; of use until the pack trains on."""
        weights = self.loss_weights if len(slots) == len(self.keys) else self.loss_weights.select(slots)
        threshold = self.hyperparameters[0].anchor_t
        return Evaluator(self.evaluation_model(slots), weights, threshold, self.device, self.precision)

    def evaluate(self, batches: Iterable[Batch], slots: Sequence[int]) -> list[SlotEvaluation]:
        """Score the moving averages of some slots in one pass over the batches.

        Args:
            batches: With `infos`.
            slots: Which, at least one.

        Returns:
            One per slot, in the order asked for.
        """
        evaluator = self.evaluator(slots)
        for batch in batches:
            evaluator.add(batch)
        return evaluator.results()

    def slot_weights(self, slot: int) -> dict[str, Tensor]:
        """One slot's moving average as an official state dict, in official order."""
        averaged = {**self._not_averaged[slot], **self.ema.slot_weights(slot)}
        return {name: averaged[name] for name in self.model.state_dict() if name in averaged}

    def slot_state(self, slot: int) -> dict[str, Any]:
        """Everything one slot needs to go on elsewhere: plain data and tensors, between epochs only.

        Raises:
            TrainingError: In the middle of an epoch.
        """
        if self._table is not None:
            raise TrainingError("the state of a slot can be read between epochs only")
        scale = float(self._loss_scale[slot]) if self.precision == "fp16" else INITIAL_LOSS_SCALE
        return {
            "format": STATE_FORMAT,
            "clock": asdict(self.clocks[slot]),
            "model": self.model.unstack(slot),
            "ema": self.slot_weights(slot),
            "optimizer": self.optimizer.slot_state(slot),
            "balance": self.balance[slot].tolist(),
            "loss_scale": [scale, float(self._sound_steps[slot])],
        }

    def slots(self) -> list[PackSlot]:
        """All slots as they stand, ready for another pack."""
        return [self.slot(index) for index in range(len(self.keys))]

    def slot(self, slot: int) -> PackSlot:
        """One slot as it stands, ready for another pack."""
        return PackSlot(self.keys[slot], self.hyperparameters[slot], self.slot_state(slot))

    def drop(self, slots: Sequence[int]) -> None:
        """Take slots out between epochs; the others go on as if nothing had happened.

        Raises:
            TrainingError: Nobody would be left.
        """
        self.reshape(drop=slots)

    def add(self, slots: Sequence[PackSlot]) -> None:
        """Let slots in between epochs, behind those that are there, each on its own clock.

        Raises:
            TrainingError: They do not go with those that are there.
        """
        self.reshape(add=slots)

    def reshape(self, *, drop: Sequence[int] = (), add: Sequence[PackSlot] = ()) -> None:
        """Take slots out and let others in, in one rebuild.

        Args:
            drop: Indices of slots that leave.
            add: Slots that join behind the others.

        Raises:
            TrainingError: In the middle of an epoch, nobody would be left, or the slots do not go together; the pack
                is then as it was.
        """
        if drop or add:
            self._assemble(reshaped(self, drop, add))


class _Slots(Protocol):
    """What holds the slots of a pack."""

    @property
    def config(self) -> TrainConfig: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    @property
    def hyperparameters(self) -> tuple[Hyperparameters, ...]: ...
    def slot(self, slot: int) -> PackSlot: ...


def reshaped(pack: _Slots, drop: Sequence[int], add: Sequence[PackSlot]) -> list[PackSlot]:
    """The slots of a pack after some have left and others have joined behind them.

    Args:
        pack: between epochs.
        drop: Indices of slots that leave.
        add: Slots that join.

    Raises:
        TrainingError: In the middle of an epoch, nobody would be left, or the slots do not go together.
    """
    gone = set(drop)
    staying = [index for index in range(len(pack.keys)) if index not in gone]
    check_compatible(
        [*(pack.keys[index] for index in staying), *(slot.key for slot in add)],
        [*(pack.hyperparameters[index] for index in staying), *(slot.hyperparameters for slot in add)],
    )
    for slot in add:
        check_state(slot.key, slot.state, pack.config)
    return [*(pack.slot(index) for index in staying), *add]


def check_compatible(keys: Sequence[str], hyperparameters: Sequence[Hyperparameters]) -> None:
    """Check that trials can share one image stream and one assignment.

    Args:
        keys: Names of the trials.
        hyperparameters: Theirs, in the same order.

    Raises:
        TrainingError: No trial, a key twice, or hyperparameters that differ where they cannot.
    """
    if not keys:
        raise TrainingError("a pack needs at least one slot")
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise TrainingError(f"slot {twice[0]} is in the pack twice")
    for name in sorted(SHARED_KEYS):
        values = [getattr(hyp, name) for hyp in hyperparameters]
        for key, value in zip(keys, values, strict=True):
            if value != values[0]:
                raise TrainingError(f"{name} cannot differ inside a pack: {values[0]} in {keys[0]}, {value} in {key}")


def check_state(key: str, state: Mapping[str, Any], config: TrainConfig) -> None:
    """Check that a slot's state can be taken up.

    Args:
        key: Name of the slot.
        state: Its state.
        config: Of the pack.

    Raises:
        TrainingError: The state is another version's, or of another optimizer.
    """
    found = state.get("format")
    if found != STATE_FORMAT:
        raise TrainingError(f"slot {key}: its state has format {found}, this version reads {STATE_FORMAT}")
    remembered = state["optimizer"]
    if remembered is not None and remembered["name"] != config.optimizer:
        name, wanted = remembered["name"], config.optimizer
        raise TrainingError(f"slot {key}: its state is of optimizer {name}, not {wanted}")
