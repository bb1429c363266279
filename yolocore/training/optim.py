"""Schedule, optimiser and moving average of a pack of K slots.

All K slots are stepped together in a few operations on flat `[K, N]` tensors: one row per slot, the columns ordered by
parameter group, so that a group is a range of columns and a slot's learning rate is a `[K, 1]` factor. What the host
knows in advance (learning rates, momenta, who steps when) is a table made once per epoch; what only the device knows
(norms, overflow) stays there. Which numbers: docs/fidelity.md.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from yolocore.hyperparameters import Hyperparameters
from yolocore.model import YOLOv5
from yolocore.training.config import OptimizerName

NOMINAL_BATCH_SIZE = 64
"""Images per optimiser step that the hyperparameters are written for."""
CLIP_NORM = 10.0
"""Largest L2 norm of one slot's whole gradient."""
MIN_WARMUP_ITERATIONS = 100
NORM_PIECE = 1024
EMA_DECAY = 0.9999
EMA_RAMP = 2000.0
"""Optimiser steps over which the moving average's memory grows."""
ADAM_BETA2 = 0.999
ADAM_EPSILON = 1e-8

GROUPS = ("bias", "decay", "norm")


def initial_accumulate(batch_size: int) -> int:
    """Batches per optimiser step that `weight_decay` is scaled for."""
    return max(round(NOMINAL_BATCH_SIZE / batch_size), 1)


def scaled_weight_decay(weight_decay: float, batch_size: int) -> float:
    """The decay that group "decay" gets: raw decay times the images that one step really sees, over 64."""
    return weight_decay * batch_size * initial_accumulate(batch_size) / NOMINAL_BATCH_SIZE


def ema_decay(updates: int) -> float:
    """Share of the old average that update number `updates` (the first is 1) keeps."""
    return EMA_DECAY * (1 - math.exp(-updates / EMA_RAMP))


def parameter_group(name: str) -> int:
    """Index into `GROUPS` of the parameter with this official name."""
    if name.endswith(".bias"):
        return 0
    return 2 if name.endswith(".bn.weight") else 1


@dataclass(frozen=True, slots=True)
class Clock:
    """Where one slot stands in its own training: batches seen, not wall time."""

    iteration: int = 0
    """Batches this slot has trained on."""
    last_step: int = -1
    """Iteration of the last optimiser step."""
    updates: int = 0
    """Optimiser steps, which the moving average counts."""

    def advance(self, accumulate: int) -> tuple["Clock", bool]:
        """The clock after one more batch, and whether that batch ends in an optimiser step."""
        stepped = self.iteration - self.last_step >= accumulate
        last_step = self.iteration if stepped else self.last_step
        return Clock(self.iteration + 1, last_step, self.updates + stepped), stepped


@dataclass(frozen=True, slots=True)
class Rates:
    """What one slot's optimiser uses for one batch."""

    lr: tuple[float, float, float]
    """Learning rates of bias, decay and norm."""
    momentum: float
    accumulate: int
    """Batches whose gradients are summed before a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate, momentum and accumulation of one slot as pure functions of its iteration."""

    hyperparameters: Hyperparameters
    epochs: int
    batches_per_epoch: int
    batch_size: int
    cosine: bool = False
    adaptive: bool = False
    """Adam and AdamW: no warm-up of the momentum."""

    @property
    def warmup_iterations(self) -> int:
        """The last iteration that still warms up; at least 100, even where `warmup_epochs` is 0."""
        return max(round(self.hyperparameters.warmup_epochs * self.batches_per_epoch), MIN_WARMUP_ITERATIONS)

    @property
    def warmup_epochs(self) -> int:
        """Epochs that the warm-up takes, the last one perhaps in part."""
        return math.ceil(self.warmup_iterations / self.batches_per_epoch)

    def factor(self, epoch: int) -> float:
        """The scheduler's multiple of `lr0` for an epoch."""
        lrf = self.hyperparameters.lrf
        if self.cosine:
            return max((1 - math.cos(epoch * math.pi / self.epochs)) / 2, 0) * (lrf - 1) + 1
        return max(1 - epoch / self.epochs, 0) * (1.0 - lrf) + lrf

    def at(self, iteration: int) -> Rates:
        """Rates at a slot's own iteration, counted from 0.

        The learning rate ramps to the current epoch's value during warm-up and keeps it to the end of the epoch in
        which warm-up ends. Later epochs lag one behind: YOLOv5's scheduler starts one before the first epoch.
        """
        hyp, last = self.hyperparameters, self.warmup_iterations
        epoch = iteration // self.batches_per_epoch
        if iteration > last:
            ended = last // self.batches_per_epoch
            lr = hyp.lr0 * self.factor(epoch if epoch == ended else epoch - 1)
            return Rates((lr, lr, lr), hyp.momentum, initial_accumulate(self.batch_size))
        target = hyp.lr0 * self.factor(epoch)
        bias, other = _ramp(iteration, last, hyp.warmup_bias_lr, target), _ramp(iteration, last, 0.0, target)
        momentum = hyp.momentum if self.adaptive else _ramp(iteration, last, hyp.warmup_momentum, hyp.momentum)
        accumulate = max(1, round(_ramp(iteration, last, 1.0, NOMINAL_BATCH_SIZE / self.batch_size)))
        return Rates((bias, other, other), momentum, accumulate)


def _ramp(x: int, end: int, start_value: float, end_value: float) -> float:
    """Straight line from `start_value` at 0 to `end_value` at `end`, exact at both ends."""
    return end_value if x >= end else (end_value - start_value) / end * x + start_value


@dataclass(slots=True)
class EarlyStopping:
    """Says when fitness has not improved for `patience` epochs; patience 0 never stops."""

    patience: int
    best: float = -1.0
    best_epoch: int = 0

    @classmethod
    def after(cls, patience: int, curve: Iterable[tuple[int, float]]) -> Self:
        """Where a training stands whose evaluated epochs gave this fitness, as (epoch, fitness) in order."""
        stopping = cls(patience)
        for epoch, fitness in curve:
            stopping.update(epoch, fitness)
        return stopping

    def exhausted(self, epoch: int) -> bool:
        """Whether training should stop after this epoch."""
        return self.patience > 0 and epoch - self.best_epoch >= self.patience

    def update(self, epoch: int, fitness: float) -> bool:
        """Take in one epoch's fitness; True when training should stop after this epoch."""
        if fitness > self.best:
            self.best, self.best_epoch = fitness, epoch
        return self.exhausted(epoch)

    def imminent(self, epoch: int) -> bool:
        """Whether the next epoch without improvement would stop the training."""
        return self.patience > 0 and epoch - self.best_epoch >= self.patience - 1


@dataclass(frozen=True, slots=True)
class StepTable:
    """One epoch's per-slot numbers, made on the host and sent to the device in one piece.

    Columns of `values`: learning rates of the three groups, momentum, 1 where the slot steps, the share of the model in
    the moving average's update, the slot's iteration.
    """

    values: Tensor
    """`[batches, K, 7]` on the device."""
    stepped: tuple[tuple[bool, ...], ...]
    """Per batch and slot, on the host."""
    clocks: tuple[Clock, ...]
    """The slots' clocks at the end of the epoch."""

    @classmethod
    def make(
        cls,
        schedules: Sequence[Schedule],
        clocks: Sequence[Clock],
        batches: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """The next `batches` batches of K slots, each from its own clock."""
        rows: list[list[list[float]]] = []
        stepped: list[tuple[bool, ...]] = []
        current = list(clocks)
        for _ in range(batches):
            row, flags = [], []
            for slot, schedule in enumerate(schedules):
                iteration = current[slot].iteration
                rates = schedule.at(iteration)
                current[slot], steps = current[slot].advance(rates.accumulate)
                share = 1 - ema_decay(current[slot].updates) if steps else 0.0
                row.append([*rates.lr, rates.momentum, float(steps), share, float(iteration)])
                flags.append(steps)
            rows.append(row)
            stepped.append(tuple(flags))
        values = torch.tensor(rows, dtype=dtype).to(device)
        return cls(values, tuple(stepped), tuple(current))


def row_norms(flat: Tensor) -> Tensor:
    """L2 norm of each row of `[K, N]`: `[K]`.

    Summed in pieces: on the CPU one float32 sum over millions of squares is wrong in the fourth digit, which decides
    how much a gradient is clipped.
    """
    whole = flat.shape[1] // NORM_PIECE * NORM_PIECE
    pieces = torch.linalg.vector_norm(torch.unflatten(flat[:, :whole], 1, (-1, NORM_PIECE)), dim=2)
    norms: Tensor = torch.linalg.vector_norm(torch.cat((pieces, flat[:, whole:]), dim=1), dim=1)
    return norms


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Which columns of a flat `[K, N]` tensor belong to which official tensor."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    """Shape of one slot's tensor."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Layout of stacked tensors `[K, ...]` in the order given."""
        return cls(tuple(tensors), tuple(tensor.shape[1:] for tensor in tensors.values()))

    @property
    def sizes(self) -> list[int]:
        """Columns of each tensor."""
        return [shape.numel() for shape in self.shapes]

    def gather(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Stacked tensors `[K, ...]` side by side as `[K, N]`."""
        return torch.cat([tensor.flatten(1) for tensor in tensors], dim=1, out=out)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The columns of `flat` `[K, N]` as stacked tensors `[K, ...]` that share its memory."""
        parts = flat.split_with_sizes(self.sizes, dim=1)
        return [torch.unflatten(part, 1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def row(self, flat: Tensor, slot: int) -> dict[str, Tensor]:
        """One slot's tensors by name, cloned."""
        parts = flat[slot].split_with_sizes(self.sizes)
        return {n: p.view(s).clone() for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def load_row(self, flat: Tensor, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one slot's tensors into its row."""
        for name, view in zip(self.names, self.views(flat), strict=True):
            view[slot].copy_(tensors[name])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).to(like.device).unsqueeze(1)


class PackOptimizer:
    """SGD with Nesterov momentum, Adam or AdamW for K stacked models, each with its own rates, clipping and decay.

    The optimiser owns the parameters as one flat `[K, N]` tensor, `flat`, and writes them into the model after a step.
    Frozen parameters (those that require no gradient) are none of its business.

    Args:
        model: Where the parameters live. Device, type and memory format must be final.
        hyperparameters: One per slot.
        batch_size: Images per batch, which scales the weight decay.
        name: Which rule.
    """

    def __init__(
        self,
        model: YOLOv5,
        hyperparameters: Sequence[Hyperparameters],
        batch_size: int,
        name: OptimizerName = "SGD",
    ) -> None:
        # The sort is stable: official order inside a group.
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        parameters = dict(sorted(trained, key=lambda item: parameter_group(item[0])))
        self._model = model
        self._owners = list(parameters.values())
        self._targets = [model.per_slot(owner.detach()) for owner in self._owners]
        self.layout = FlatLayout.of(dict(zip(parameters, self._targets, strict=True)))
        self.groups = _group_ranges(self.layout)
        self.name = name
        self.flat = self.layout.gather(self._targets)
        """Parameters `[K, N]`."""
        self.gradient = torch.zeros_like(self.flat)
        self._gradient_is_clear = True
        self._work = torch.empty_like(self.flat)
        decay = [scaled_weight_decay(hyp.weight_decay, batch_size) for hyp in hyperparameters]
        self.weight_decay = _column(decay, self.flat)
        """Effective decay of group "decay" `[K, 1]`."""
        buffers = {"SGD": ("momentum",), "Adam": ("mean", "square"), "AdamW": ("mean", "square")}[name]
        self.buffers = {key: torch.zeros_like(self.flat) for key in buffers}
        """What the rule remembers, each `[K, N]`."""
        self.steps = torch.zeros_like(self.weight_decay)
        """Steps that were really taken `[K, 1]` (for Adam's bias correction)."""

    def clear_gradients(self) -> None:
        """Throw away what was accumulated: YOLOv5 does so at the start of every epoch."""
        for owner in self._owners:
            owner.grad = None
        self._gradient_is_clear = True

    def collect(self) -> Tensor:
        """Move the gradients of the backward passes since the last call into `gradient` and return it, `[K, N]`."""
        grads = [
            torch.zeros_like(target) if owner.grad is None else self._model.per_slot(owner.grad)
            for owner, target in zip(self._owners, self._targets, strict=True)
        ]
        if self._gradient_is_clear:
            self.layout.gather(grads, out=self.gradient)
        else:
            self.gradient += self.layout.gather(grads, out=self._work)
        for owner in self._owners:
            owner.grad = None
        self._gradient_is_clear = False
        return self.gradient

    def step(self, rates: Tensor, apply: Tensor, coefficient: Tensor) -> None:
        """One step of the slots in `apply`; the others keep every bit.

        Args:
            rates: `[K, 7]` row of a `StepTable`.
            apply: `[K]` bool: who steps. A slot that is not applied may hold any gradient, also NaN.
            coefficient: `[K]` factor of the gradient: clipping over loss scale.
        """
        mask = apply.unsqueeze(1)
        gradient = torch.mul(self.gradient, coefficient.unsqueeze(1), out=self._work)
        # NaN times 0 is NaN: a slot that stands aside needs real zeros. On the host looking first is free.
        if gradient.device.type != "cpu" or not bool(apply.all()):
            gradient.masked_fill_(~mask, 0.0)
        lr = torch.where(mask, rates[:, :3], 0.0)
        self.steps += mask
        rule = self._step_sgd if self.name == "SGD" else self._step_adam
        rule(gradient, mask, lr, rates[:, 3:4])
        torch._foreach_copy_(self._targets, self.layout.views(self.flat))

    def _step_sgd(self, gradient: Tensor, mask: Tensor, lr: Tensor, momentum: Tensor) -> None:
        decay, buffer = self.groups[1], self.buffers["momentum"]
        gradient[:, decay].addcmul_(self.flat[:, decay], torch.where(mask, self.weight_decay, 0.0))
        keep = torch.where(mask, momentum, 1.0)
        torch.addcmul(gradient, buffer, keep, out=buffer)
        self._descend(gradient.addcmul_(buffer, keep), lr)

    def _step_adam(self, gradient: Tensor, mask: Tensor, lr: Tensor, beta1: Tensor) -> None:
        decay, mean, square = self.groups[1], self.buffers["mean"], self.buffers["square"]
        amount = torch.where(mask, self.weight_decay, 0.0)
        if self.name == "Adam":
            gradient[:, decay].addcmul_(self.flat[:, decay], amount)
        else:
            self.flat[:, decay].mul_(1 - lr[:, 1:2] * amount)
        mean.lerp_(gradient, torch.where(mask, 1 - beta1, 0.0))
        square.mul_(torch.where(mask, torch.full_like(beta1, ADAM_BETA2), 1.0)).addcmul_(
            gradient, gradient * (1 - ADAM_BETA2)
        )
        steps = self.steps.clamp(min=1.0)
        root = square.sqrt().div_((1 - ADAM_BETA2**steps).sqrt()).add_(ADAM_EPSILON)
        self._descend(mean / root, lr / (1 - beta1**steps))

    def _descend(self, direction: Tensor, lr: Tensor) -> None:
        for group, columns in enumerate(self.groups):
            self.flat[:, columns].addcmul_(direction[:, columns], lr[:, group : group + 1], value=-1)

    def clear_stepped(self, stepped: Sequence[bool]) -> None:
        """Zero the gradients of the slots whose turn this was, overflow or not."""
        if all(stepped):
            self._gradient_is_clear = True
            return
        for slot, done in enumerate(stepped):
            if done:
                self.gradient[slot].zero_()

    def slot_state(self, slot: int) -> dict[str, object]:
        """What one slot's optimiser remembers, by official names."""
        buffers = {key: self.layout.row(buffer, slot) for key, buffer in self.buffers.items()}
        return {"name": self.name, "steps": float(self.steps[slot]), "buffers": buffers}

    def load_slot(self, slot: int, buffers: Mapping[str, Mapping[str, Tensor]], steps: float) -> None:
        """Restore what `slot_state` gave."""
        for key, buffer in self.buffers.items():
            self.layout.load_row(buffer, slot, buffers[key])
        self.steps[slot] = steps


def _group_ranges(layout: FlatLayout) -> tuple[slice, slice, slice]:
    ends = [0, 0, 0]
    for name, size in zip(layout.names, layout.sizes, strict=True):
        ends[parameter_group(name)] += size
    bias, decay = ends[0], ends[0] + ends[1]
    return slice(0, bias), slice(bias, decay), slice(decay, decay + ends[2])


class PackEMA:
    """Moving averages of K models: one flat `[K, M]` tensor of trained parameters, statistics and frozen parameters.

    Frozen parameters do not move, so their averages need no step of their own: how much of the old average is left is
    one number per slot, applied by `settle`.

    Args:
        model: Where the running statistics live.
        optimizer: Owner of the parameters.
    """

    def __init__(self, model: YOLOv5, optimizer: PackOptimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        trained, parameters = set(optimizer.layout.names), {name for name, _ in model.named_parameters()}
        official = model.official_tensors()
        frozen = {k: v for k, v in official.items() if k in parameters - trained}
        moving = {k: v for k, v in official.items() if k not in parameters and v.is_floating_point()}
        self._statistics, self._frozen = _Columns(model, moving), _Columns(model, frozen)
        parts = [optimizer.layout, self._statistics.layout, self._frozen.layout]
        names = tuple(name for part in parts for name in part.names)
        self.layout = FlatLayout(names, tuple(shape for part in parts for shape in part.shapes))
        self.flat = torch.cat([optimizer.flat, self._statistics.gather(), self._frozen.gather()], dim=1)
        """Averages `[K, M]`; those of frozen parameters as they were when last settled."""
        self._left = torch.ones_like(self.flat[:, :1])

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of the trained parameters, of the statistics and of the frozen parameters."""
        trained, moving = self._optimizer.flat.shape[1], self._statistics.count
        first, second, third = self.flat.split_with_sizes([trained, moving, self._frozen.count], dim=1)
        return first, second, third

    def update(self, share: Tensor, apply: Tensor) -> None:
        """Blend the model in: `v <- (1 - share) v + share model` for the slots in `apply`; the others keep every bit.

        Args:
            share: `[K]`, one minus the decay.
            apply: `[K]` bool.
        """
        mask = apply.unsqueeze(1)
        weight = torch.where(mask, share.unsqueeze(1), 0.0)
        trained, statistics, _ = self._parts()
        # The parameters of a failed slot are frozen and finite; its running statistics may not be.
        trained.lerp_(self._optimizer.flat, weight)
        statistics.copy_(torch.where(mask, statistics.lerp(self._statistics.gather(), weight), statistics))
        self._left *= 1 - weight

    def settle(self) -> None:
        """Bring the averages of frozen parameters up to date; changes no bit where nobody stepped since the last."""
        if self._frozen.count:
            averages = self._parts()[2]
            averages.lerp_(self._frozen.gather(), 1 - self._left)
            self._left.fill_(1.0)

    def slot_weights(self, slot: int) -> dict[str, Tensor]:
        """One slot's averages by official name, in the layout's order."""
        self.settle()
        return self.layout.row(self.flat, slot)

    def load_slot(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore one slot's averages."""
        self.layout.load_row(self.flat, slot, tensors)


class _Columns:
    """Some of a model's tensors side by side, `[K, N]`; of a shared trunk every slot reads its cohort's row."""

    def __init__(self, model: YOLOv5, tensors: Mapping[str, Tensor]) -> None:
        shared = {name: tensor for name, tensor in tensors.items() if model.trunk.holds(name)}
        own = {name: tensor for name, tensor in tensors.items() if name not in shared}
        self._cohorts = model.cohorts
        self._shared, self._own = list(shared.values()), list(own.values())
        self._shared_layout, self._own_layout = FlatLayout.of(shared), FlatLayout.of(own)
        self._empty = torch.empty(model.num_slots, 0, dtype=model.anchors.dtype, device=model.anchors.device)
        self.layout = FlatLayout.of({**shared, **own})
        self.count = sum(self.layout.sizes)

    def gather(self) -> Tensor:
        """What they hold now."""
        parts = [self._empty]
        if self._shared:
            parts.append(self._shared_layout.gather(self._shared).index_select(0, self._cohorts))
        if self._own:
            parts.append(self._own_layout.gather(self._own))
        return torch.cat(parts, dim=1) if len(parts) > 2 else parts[-1]
