"""THE SHARED LOSS CORE: the YOLOv5 loss of K slots at once, every weight a vector over the slots.

`docs/loss.md` explains each term and weight with its formula. The slots share one assignment and meet in no operation,
so a slot that turns non-finite leaves the values and gradients of the others untouched.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolocore.assign import Assignment
from yolocore.boxes import ciou
from yolocore.errors import HyperparameterError
from yolocore.hyperparameters import Hyperparameters

DEFAULT_BALANCE = (4.0, 1.0, 0.4)
"""Weights of the objectness of strides 8, 16 and 32."""

OTHER_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
"""The same for models that do not have three levels."""

NOMINAL_CLASSES = 80
"""Number of classes for which the hyp key `cls` is the effective gain."""

NOMINAL_IMAGE_SIZE = 640
"""Image size in pixels for which the hyp key `obj` is the effective gain."""

SOFTPLUS_THRESHOLD = 35.0
"""Where log(1+e^x) becomes x: there they agree to the last bit of float64 (torch's own 20 loses digits)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """What the loss multiplies with, one entry per slot: *effective* gains, no raw hyp values."""

    box: Tensor
    """[K] gain of the box loss."""
    obj: Tensor
    """[K] gain of the objectness loss."""
    cls: Tensor
    """[K] gain of the class loss."""
    cls_pw: Tensor
    """[K], or [K, C] for one per class: weight of the positives in the class loss."""
    obj_pw: Tensor
    """[K] weight of the positives in the objectness loss."""
    fl_gamma: Tensor
    """[K] exponent of the focal loss; 0 is the plain loss."""
    label_smoothing: Tensor
    """[K] share of the class target that is spread evenly over "is" and "is not"."""
    uses_focal: bool
    """Whether any `fl_gamma` is above 0; known on the host, so that plain packs pay nothing for the focal loss."""

    @classmethod
    def from_hyperparameters(
        cls,
        hyp: Hyperparameters,
        num_classes: int,
        image_size: int,
        num_levels: int = 3,
        label_smoothing: float = 0.0,
    ) -> "LossWeights":
        """The effective weights of one slot, as float64 tensors [1] on the CPU; `cls_pw` [1, C] if given per class.

        Args:
            hyp: raw values.
            num_classes: C; the class gain grows with C/80.
            image_size: nominal side of the training images, pixels; the objectness gain grows with (size/640) squared.
            num_levels: levels of the head; all gains shrink with 3/levels.
            label_smoothing: from 0 to below 1; a training option, not a hyp key.

        Raises:
            HyperparameterError: a label smoothing outside [0, 1), or weights per class for another number of classes.
        """
        per_class = hyp.cls_pw_per_class
        if per_class is not None and len(per_class) != num_classes:
            raise HyperparameterError(
                f"cls_pw_per_class has {len(per_class)} numbers; allowed is one for each of the {num_classes} classes"
            )
        if not 0 <= label_smoothing < 1:
            raise HyperparameterError(f"label smoothing is {label_smoothing!r}; allowed is a number from 0 to below 1")
        share = 3 / num_levels
        values = {
            "box": hyp.box * share,
            "obj": hyp.obj * (image_size / NOMINAL_IMAGE_SIZE) ** 2 * share,
            "cls": hyp.cls * (num_classes / NOMINAL_CLASSES) * share,
            "cls_pw": hyp.cls_pw if per_class is None else list(per_class),
            "obj_pw": hyp.obj_pw,
            "fl_gamma": hyp.fl_gamma,
            "label_smoothing": label_smoothing,
        }
        tensors = {key: torch.tensor([value], dtype=torch.float64) for key, value in values.items()}
        return cls(**tensors, uses_focal=hyp.fl_gamma > 0)

    @classmethod
    def stack(cls, weights: Sequence["LossWeights"]) -> "LossWeights":
        """One pack from several, slots in the order given; `cls_pw` becomes [K, C] where any of them is."""
        width = max(one.cls_pw[0].numel() for one in weights)
        per_class = any(one.cls_pw.dim() == 2 for one in weights)
        stacked = {key: torch.cat([getattr(one, key) for one in weights]) for key in _VECTORS if key != "cls_pw"}
        columns = [
            one.cls_pw.reshape(len(one.box), -1).expand(-1, width) if per_class else one.cls_pw for one in weights
        ]
        return cls(**stacked, cls_pw=torch.cat(columns), uses_focal=any(one.uses_focal for one in weights))

    def select(self, slots: Sequence[int]) -> "LossWeights":
        """The weights of some slots, in the order given. Reads `fl_gamma` back, so not for the inside of a step."""
        picked = {key: torch.stack([getattr(self, key)[slot] for slot in slots]) for key in _VECTORS}
        return LossWeights(**picked, uses_focal=self.uses_focal and bool((picked["fl_gamma"] > 0).any()))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LossWeights":
        """The same weights on another device or in another precision."""
        moved = {key: getattr(self, key).to(device=device, dtype=dtype) for key in _VECTORS}
        return dataclasses.replace(self, **moved)


_VECTORS = tuple(field.name for field in dataclasses.fields(LossWeights) if field.name != "uses_focal")


@dataclass(frozen=True, slots=True)
class LossComponents:
    """The loss of every slot; K entries each, differentiable."""

    box: Tensor
    """[K] 1 - CIoU, mean over the matches of a level, summed over levels."""
    obj: Tensor
    """[K] objectness, mean over the cells of a level, summed over levels with the balance."""
    cls: Tensor
    """[K] class loss, mean over the matches and classes of a level, summed over levels; 0 for one class."""
    weighted: Tensor
    """[K, 3] box, obj and cls times their gains."""
    total: Tensor
    """[K] sum of `weighted` times the batch size; what is differentiated."""
    obj_levels: Tensor
    """[L, K] objectness of each level, without balance and gain; what `update_balance` reads."""


def detection_loss(
    predictions: Sequence[Tensor], assignment: Assignment, weights: LossWeights, balance: Tensor | None = None
) -> LossComponents:
    """The YOLOv5 loss of K slots on one batch.

    Computed in float32, or float64 for float64 predictions, also inside autocast. Nothing waits for the device.

    Args:
        predictions: L tensors [K, B, A, H, W, 5+C] of raw outputs (tx, ty, tw, th, objectness, classes), any strides.
        assignment: of this batch, shared by the slots.
        weights: of the K slots, on the device of the predictions.
        balance: [K, L] weight of each level in the objectness; None for YOLOv5's constants.
    """
    dtype = torch.float64 if predictions[0].dtype == torch.float64 else torch.float32
    if predictions[0].device.type == "cpu":
        # A device would have to be waited for; here it is free to know how many rows match, and most do not.
        assignment = assignment.matched()
    with torch.autocast(predictions[0].device.type, enabled=False):
        weights = weights.to(dtype=dtype)
        rows = _Rows.of(assignment, dtype)
        objectness, outputs = _read_predictions(predictions, assignment, rows, dtype)
        offsets, centre, logits = outputs.split_with_sizes((4, 1, outputs.shape[-1] - 5), dim=-1)
        iou = matched_iou(offsets, rows.anchor_size, rows.box)
        box = rows.mean(1 - iou)
        levels = _objectness_losses(objectness, centre.squeeze(-1), iou, assignment, weights)
        obj = _balanced(levels, balance)
        cls = _class_loss(logits, rows, weights) if logits.shape[-1] > 1 else torch.zeros_like(box)
        weighted = torch.stack((box * weights.box, obj * weights.obj, cls * weights.cls), dim=-1)
        total = weighted.sum(dim=-1) * predictions[0].shape[1]
    return LossComponents(box=box, obj=obj, cls=cls, weighted=weighted, total=total, obj_levels=levels)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of all levels, one level behind the other: M = the sum of their N."""

    anchor_size: Tensor
    """[M, 2] grid units."""
    box: Tensor
    """[M, 4] grid units."""
    cls: Tensor
    """[M] int64."""
    valid: Tensor
    """[M] bool."""
    share: Tensor
    """[M] weight of the row in the sum over levels of the means over a level's matches."""

    @classmethod
    def of(cls, assignment: Assignment, dtype: torch.dtype) -> "_Rows":
        levels = assignment.levels
        share = [(level.valid / level.count.clamp(min=1)).to(dtype) for level in levels]
        return cls(
            torch.cat([level.anchor_size for level in levels]).to(dtype),
            torch.cat([level.box for level in levels]).to(dtype),
            torch.cat([level.cls for level in levels]),
            torch.cat([level.valid for level in levels]),
            torch.cat(share),
        )

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the matches of each level, 0 for a level without, summed over levels: [K, M] to [K]."""
        return (torch.where(self.valid, values, 0.0) * self.share).sum(dim=-1)


def update_balance(balance: Tensor, obj_levels: Tensor) -> Tensor:
    """The level balance after one batch (autobalance): a hard level slowly gains weight, stride 16 stays at 1.

    Args:
        balance: [K, L], float64 if tiny steps are to add up exactly.
        obj_levels: [L, K] from `LossComponents`.

    Returns:
        [K, L], without gradient.
    """
    moved = 0.9999 * balance + 0.0001 / obj_levels.detach().to(balance.dtype).T
    reference = min(1, balance.shape[1] - 1)
    return moved / moved[:, reference : reference + 1]


def matched_iou(offsets: Tensor, anchor_size: Tensor, box: Tensor) -> Tensor:
    """CIoU of what the matched cells predict with the objects they were matched to.

    Args:
        offsets: [K, N, 4] raw (tx, ty, tw, th) of an assignment's rows.
        anchor_size: [N, 2] width and height of the rows' anchors, grid units.
        box: [N, 4] the rows' objects, centre relative to the cell's corner and size, grid units.

    Returns:
        [K, N]; finite and meaningless where the row is not valid.
    """
    activated = offsets.sigmoid() * 2
    centre, size = activated.split_with_sizes((2, 2), dim=-1)
    return ciou(torch.cat((centre - 0.5, size.square() * anchor_size), dim=-1), box)


def objectness_targets(iou: Tensor, winner: Tensor) -> Tensor:
    """What the objectness of each cell of one level should be: the CIoU, at least 0, of the last row that claims it.

    Args:
        iou: [K, N] CIoU of the level's rows.
        winner: [B*A*H*W] int64, row that claims the cell or -1.

    Returns:
        [K, B*A*H*W] in [0, 1], without gradient.
    """
    if iou.shape[-1] == 0:
        return iou.new_zeros(iou.shape[0], winner.shape[0])
    claimed = iou.detach().clamp(min=0).index_select(1, winner.clamp(min=0))
    return torch.where(winner >= 0, claimed, 0.0)


def binary_cross_entropy(logits: Tensor, target: Tensor, pos_weight: Tensor | float = 1.0) -> Tensor:
    """Elementwise BCE with logits, (1-y)*log(1+e^x) + w*y*log(1+e^-x), exact in both tails.

    Args:
        logits: x, any shape.
        target: y in [0, 1], may be a fraction; broadcasts.
        pos_weight: w; broadcasts.
    """
    negative = softplus(logits)
    positive = softplus(-logits) * pos_weight
    return torch.lerp(negative, positive, target)


def softplus(x: Tensor) -> Tensor:
    """Elementwise log(1+e^x), exact in both tails."""
    if x.device.type == "cpu":
        exact: Tensor = _HostSoftplus.apply(x)
        return exact
    return F.softplus(x, threshold=SOFTPLUS_THRESHOLD)


class _HostSoftplus(torch.autograd.Function):
    """The same in a quarter of the time on the CPU, where log1p is ten times as slow as log.

    log(1+t), t = e^-|x|, is log(u) for the rounded u = 1+t, less what the rounding added, ((u-1)-t)/u.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        t = x.abs().neg_().exp_()
        u = t + 1
        added = (u - 1).sub_(t).div_(u)
        result: Tensor = u.log_().sub_(added).add_(x.clamp(min=0))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return x.sigmoid().mul_(gradient)


def focal_factor(logits: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
    """Elementwise factor of the focal loss, (y/4 + 3(1-y)/4) * (1-p_t)^gamma, with gradient.

    1-p_t has a floor at the smallest normal number: at 0 the derivative of a power below 1 would be infinite.

    Args:
        logits: x, any shape.
        target: y in [0, 1]; broadcasts.
        gamma: exponent; broadcasts.
    """
    probability = logits.sigmoid()
    missed = target * (1 - probability) + (1 - target) * probability
    floor = torch.finfo(logits.dtype).tiny
    return (0.75 - 0.5 * target) * missed.clamp(min=floor).pow(gamma)


def _elementwise_loss(logits: Tensor, target: Tensor, pos_weight: Tensor, gamma: Tensor, uses_focal: bool) -> Tensor:
    """BCE, times the focal factor in the slots with gamma above 0."""
    loss = binary_cross_entropy(logits, target, pos_weight)
    if not uses_focal:
        return loss
    return torch.where(gamma > 0, loss * focal_factor(logits, target, gamma), loss)


def _objectness_losses(
    dense: Sequence[Tensor], centre: Tensor, iou: Tensor, assignment: Assignment, weights: LossWeights
) -> Tensor:
    """Objectness of each level without balance, [L, K].

    Args:
        dense: L tensors [K, B*A*H*W], the logits of all cells.
        centre: [K, M] the logits of the matched cells, once more.
        iou: [K, M] of the rows.
        assignment: whose rows these are.
        weights: of the K slots.
    """
    sizes = [len(level.valid) for level in assignment.levels]
    parts = zip(
        dense, centre.split_with_sizes(sizes, 1), iou.split_with_sizes(sizes, 1), assignment.levels, strict=True
    )
    levels = []
    for cells, rows, overlap, level in parts:
        loss = _plain_objectness(cells, rows, overlap, level.wins(), weights)
        if weights.uses_focal:
            loss = torch.where(weights.fl_gamma > 0, _focal_objectness(cells, overlap, level.winner, weights), loss)
        levels.append(loss)
    return torch.stack(levels)


def _focal_objectness(logits: Tensor, iou: Tensor, winner: Tensor, weights: LossWeights) -> Tensor:
    """Mean over the cells [K, B*A*H*W] of one level: [K]."""
    target = objectness_targets(iou, winner)
    pos_weight, gamma = weights.obj_pw[:, None], weights.fl_gamma[:, None]
    return _elementwise_loss(logits, target, pos_weight, gamma, weights.uses_focal).mean(dim=-1)


def _plain_objectness(logits: Tensor, centre: Tensor, iou: Tensor, wins: Tensor, weights: LossWeights) -> Tensor:
    """The same without focal loss.

    Nearly all cells have the target 0, where the loss is log(1+e^x) alone. So that is summed over all cells, and the
    few with a target are set right by their row: y (w log(1+e^-x) - log(1+e^x)).
    """
    everywhere = softplus(logits).sum(dim=-1)
    negative = softplus(centre)
    positive = softplus(-centre) * weights.obj_pw[:, None]
    target = torch.where(wins, iou.detach().clamp(min=0), 0.0)
    return (everywhere + (target * (positive - negative)).sum(dim=-1)) / logits.shape[-1]


def _class_loss(logits: Tensor, rows: _Rows, weights: LossWeights) -> Tensor:
    """Mean over the matches and classes of a level, summed over levels: [K, M, C] to [K]."""
    K, num_classes = logits.shape[0], logits.shape[-1]
    is_class = rows.cls[:, None] == torch.arange(num_classes, device=logits.device)
    off = weights.label_smoothing.view(K, 1, 1) / 2
    target = torch.where(is_class, 1 - off, off)
    pos_weight = weights.cls_pw.reshape(K, 1, -1)
    gamma = weights.fl_gamma.view(K, 1, 1)
    loss = _elementwise_loss(logits, target, pos_weight, gamma, weights.uses_focal)
    return rows.mean(loss.mean(dim=-1))


def _balanced(levels: Tensor, balance: Tensor | None) -> Tensor:
    """Weighted sum over the levels: [L, K] to [K]."""
    if balance is not None:
        return (levels * balance.to(levels.dtype).T).sum(dim=0)
    # Constants stay numbers on the host: a tensor made of them would have to be copied to the device.
    constants = DEFAULT_BALANCE if len(levels) == len(DEFAULT_BALANCE) else OTHER_BALANCE[: len(levels)]
    return torch.stack([level * constant for level, constant in zip(levels, constants, strict=True)]).sum(dim=0)


def _read_predictions(
    predictions: Sequence[Tensor], assignment: Assignment, rows: _Rows, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Objectness of every cell, L tensors [K, B*A*H*W], and the raw outputs of the matched cells, [K, M, 5+C].

    Rows that are not valid read as 0 and pass no gradient back. Together with the mask after the loss this is the
    "double where": neither a NaN in a cell that nobody matched nor one that arises behind it reaches the gradient.
    """
    objectness, outputs = [], []
    for prediction, level in zip(predictions, assignment.levels, strict=True):
        dense, matched = _ReadCells.apply(prediction, level.image, level.anchor, level.row, level.column)
        objectness.append(dense.to(dtype))
        outputs.append(matched)
    return objectness, torch.where(rows.valid[:, None], torch.cat(outputs, dim=1).to(dtype), 0.0)


class _ReadCells(torch.autograd.Function):
    """Reads one level's objectness and matched cells in one go, with one gradient buffer for both.

    Plain indexing would make, and add up, two buffers of the size of the predictions, by far the largest tensors here.
    The buffer has the strides of the predictions, so that the head's permuted view costs no copy in either direction.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, *index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*index)
        ctx.like = prediction.new_empty(0)  # shape, strides and dtype are enough: the values can be freed
        ctx.shape, ctx.stride = prediction.shape, prediction.stride()
        image, anchor, row, column = index
        dense = prediction[..., 4].clone(memory_format=torch.contiguous_format).flatten(1)
        return dense, prediction[:, image, anchor, row, column]

    @staticmethod
    def backward(ctx: Any, dense_gradient: Tensor, row_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.like.new_empty_strided(ctx.shape, ctx.stride).zero_()
        gradient[..., 4] = dense_gradient.reshape(ctx.shape[:-1])
        # What the gradient of plain indexing calls: deterministic on every device, and "unsafe" as the forward pass
        # has checked the bounds already. The public index_put_ would check them again and wait for the device.
        torch.ops.aten._index_put_impl_(gradient, [None, *ctx.saved_tensors], row_gradient, True, True)
        return gradient, None, None, None, None
