"""The loss of a head that has learned nothing, and how much smaller the focal loss makes it.

A fresh detection head answers every cell with its bias prior: objectness log(8/(640/stride)²), each class
log(0.6/(C-0.99999)), boxes as large as their anchors. So the objectness and class loss of the first batch are known
from the labels alone, for every `fl_gamma`, and with them the gains that keep their size. Formulas: docs/space.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they would bring torch, and factors are computed where nobody waits for that
    from torch import Tensor

    from yolocore.autoanchor import AnchorTuple
    from yolocore.data.dataset import LabelledImage

BALANCE = (4.0, 1.0, 0.4)
"""Weights of the objectness of strides 8, 16 and 32; `yolocore.loss` has the same."""

BINS = 50
"""Intervals of the CIoU in which matched cells are counted."""

LARGEST_SAMPLE = 4000
"""Images that are looked at; of more, every so many-th."""

IMAGES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class InitialLevel:
    """What the objectness of one level is asked for before anything is learned, per image."""

    logit: float
    """Objectness of every cell: the bias prior."""
    cells: int
    """A*H*W."""
    matched: tuple[tuple[float, float], ...]
    """(cells, their mean target) for every interval of the CIoU that has any."""


def objectness_prior(stride: float) -> float:
    """Bias that the objectness of a fresh head has."""
    return math.log(8 / (640 / stride) ** 2)


def class_prior(num_classes: int) -> float:
    """Bias that every class of a fresh head has."""
    return math.log(0.6 / (num_classes - 0.99999))


def initial_levels(
    images: Sequence[LabelledImage], anchors: AnchorTuple, image_size: int, anchor_t: float
) -> tuple[InitialLevel, ...]:
    """Which cells the labels of a split claim, and with which targets a fresh head's boxes meet them.

    Args:
        images: of the training split, as they are: letterboxed, without augmentation.
        anchors: [L][A] (width, height), pixels.
        image_size: side of the training image, pixels.
        anchor_t: largest factor between the sides of a label and of a matching anchor.
    """
    import torch

    from yolocore.model.anchors import STRIDES

    chosen = images[:: max(1, -(-len(images) // LARGEST_SAMPLE))]
    counts = torch.zeros(len(STRIDES), BINS, dtype=torch.float64)
    sums = torch.zeros_like(counts)
    for start in range(0, len(chosen), IMAGES_AT_ONCE):
        batch = chosen[start : start + IMAGES_AT_ONCE]
        for level, targets in enumerate(_initial_targets(batch, anchors, image_size, anchor_t)):
            bins = (targets * BINS).long().clamp(max=BINS - 1)
            counts[level].index_add_(0, bins, torch.ones_like(targets))
            sums[level].index_add_(0, bins, targets)
    found = zip(STRIDES, anchors, counts.tolist(), sums.tolist(), strict=True)
    return tuple(
        InitialLevel(
            objectness_prior(stride),
            len(sizes) * (image_size // stride) ** 2,
            tuple((n / len(chosen), total / n) for n, total in zip(number, target, strict=True) if n),
        )
        for stride, sizes, number, target in found
    )


def _initial_targets(
    images: Sequence[LabelledImage], anchors: AnchorTuple, image_size: int, anchor_t: float
) -> Iterator[Tensor]:
    """For each level the targets [n] of its matched cells, float64."""
    import torch

    from yolocore.assign import assign_targets
    from yolocore.loss import matched_iou
    from yolocore.model.anchors import STRIDES

    grids = [(image_size // stride, image_size // stride) for stride in STRIDES]
    grid_anchors = torch.tensor(anchors, dtype=torch.float64) / torch.tensor(STRIDES).view(-1, 1, 1)
    targets = letterboxed_targets(images)
    for level in assign_targets(targets, grids, grid_anchors, len(images), anchor_t).levels:
        iou = matched_iou(torch.zeros(1, len(level.valid), 4, dtype=torch.float64), level.anchor_size, level.box)[0]
        yield iou[level.wins()].clamp(min=0)


def letterboxed_targets(images: Sequence[LabelledImage]) -> Tensor:
    """Labels as the network sees them without augmentation: [T, 6] float64, the rows of `assign_targets`."""
    import torch

    rows = [torch.zeros(0, 6, dtype=torch.float64)]
    for index, item in enumerate(images):
        height, width = item.size
        share = torch.tensor([width, height], dtype=torch.float64) / max(width, height)
        labels = torch.from_numpy(item.labels).double()
        centre = labels[:, 1:3] * share + (1 - share) / 2
        first = torch.full((len(labels), 1), float(index), dtype=torch.float64)
        rows.append(torch.cat((first, labels[:, :1], centre, labels[:, 3:5] * share), dim=1))
    return torch.cat(rows)


def objectness_factor(levels: Sequence[InitialLevel], gamma: float, pos_weight: float) -> float:
    """Initial objectness loss without the focal factor over that with it: what keeps its size as a factor of `obj`.

    Args:
        levels: from `initial_levels`.
        gamma: the hyp key `fl_gamma`; 0 gives 1.
        pos_weight: the hyp key `obj_pw`.
    """
    return _objectness(levels, 0.0, pos_weight) / _objectness(levels, gamma, pos_weight)


def _objectness(levels: Sequence[InitialLevel], gamma: float, pos_weight: float) -> float:
    total = 0.0
    for level, balance in zip(levels, BALANCE, strict=True):
        background = level.cells - sum(count for count, _ in level.matched)
        sums = background * _element(level.logit, 0.0, pos_weight, gamma)
        sums += sum(count * _element(level.logit, target, pos_weight, gamma) for count, target in level.matched)
        total += balance * sums / level.cells
    return total


def class_factor(num_classes: int, gamma: float, pos_weight: float, label_smoothing: float = 0.0) -> float:
    """The same for the class loss: a factor of `cls`. With one class, which has no class loss, it is 1.

    Args:
        num_classes: C.
        gamma: the hyp key `fl_gamma`; 0 gives 1.
        pos_weight: the hyp key `cls_pw`; of weights per class the mean over the labels.
        label_smoothing: the training option.
    """
    if num_classes == 1:
        return 1.0

    def loss(exponent: float) -> float:
        logit, off = class_prior(num_classes), label_smoothing / 2
        others = (num_classes - 1) * _element(logit, off, pos_weight, exponent)
        return _element(logit, 1 - off, pos_weight, exponent) + others

    return loss(0.0) / loss(gamma)


def _element(logit: float, target: float, pos_weight: float, gamma: float) -> float:
    """What one cell (or class) costs; `yolocore.loss` in plain numbers."""
    softplus = max(logit, 0.0) + math.log1p(math.exp(-abs(logit)))
    cost = (1 - target) * softplus + pos_weight * target * (softplus - logit)
    if gamma == 0:
        return cost
    probability = 1 / (1 + math.exp(-logit))
    missed = target * (1 - probability) + (1 - target) * probability
    return cost * (0.75 - 0.5 * target) * math.pow(missed, gamma)
