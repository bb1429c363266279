"""The loss of a fresh head, and the gains that keep its size under the focal loss."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from yolocore.assign import assign_targets
from yolocore.data.dataset import LabelledImage
from yolocore.hyperparameters import Hyperparameters
from yolocore.initial import (
    BALANCE,
    InitialLevel,
    class_factor,
    class_prior,
    initial_levels,
    letterboxed_targets,
    objectness_factor,
    objectness_prior,
)
from yolocore.loss import DEFAULT_BALANCE, LossComponents, LossWeights, detection_loss
from yolocore.model import initial_state
from yolocore.model.anchors import DEFAULT_ANCHORS, STRIDES

SIZE = 128
ANCHORS = tuple(tuple((float(w), float(h)) for w, h in level) for level in DEFAULT_ANCHORS)


def images(per_image: int, num_classes: int, count: int = 6) -> list[LabelledImage]:
    random = np.random.default_rng(per_image * 100 + num_classes)
    found = []
    for index in range(count):
        classes = random.integers(0, num_classes, (per_image, 1))
        boxes = np.concatenate([random.uniform(0.2, 0.8, (per_image, 2)), random.uniform(0.05, 0.5, (per_image, 2))], 1)
        labels = np.concatenate([classes, boxes], 1).astype(np.float32)
        found.append(LabelledImage(image=Path(f"{index}.png"), labels=labels, size=(90, 120)))
    return found


def fresh_loss(data: list[LabelledImage], num_classes: int, hyp: Hyperparameters, smoothing: float) -> LossComponents:
    """What `yolocore.loss` says of a head that answers everything with its prior."""
    predictions = []
    for stride in STRIDES:
        cells = torch.zeros(1, len(data), 3, SIZE // stride, SIZE // stride, 5 + num_classes, dtype=torch.float64)
        cells[..., 4] = objectness_prior(stride)
        cells[..., 5:] = class_prior(num_classes)
        predictions.append(cells)
    grids = [(SIZE // stride, SIZE // stride) for stride in STRIDES]
    anchors = torch.tensor(ANCHORS, dtype=torch.float64) / torch.tensor(STRIDES).view(-1, 1, 1)
    assignment = assign_targets(letterboxed_targets(data), grids, anchors, len(data), hyp.anchor_t)
    weights = LossWeights.from_hyperparameters(hyp, num_classes, SIZE, label_smoothing=smoothing)
    return detection_loss(predictions, assignment, weights)


@pytest.mark.parametrize("num_classes", [2, 3, 80])
@pytest.mark.parametrize("gamma", [0.001, 0.3, 1.5, 2.0])
@pytest.mark.parametrize(("pos_weight", "smoothing", "per_image"), [(1.0, 0.0, 1), (2.5, 0.1, 12), (0.5, 0.0, 4)])
def test_factors_keep_the_size_of_the_initial_loss(
    num_classes: int, gamma: float, pos_weight: float, smoothing: float, per_image: int
) -> None:
    data = images(per_image, num_classes)
    levels = initial_levels(data, ANCHORS, SIZE, 4.0)
    plain = Hyperparameters(obj=0.7, cls=0.4, obj_pw=pos_weight, cls_pw=pos_weight)
    focal = plain.replace(
        fl_gamma=gamma,
        obj=plain.obj * objectness_factor(levels, gamma, pos_weight),
        cls=plain.cls * class_factor(num_classes, gamma, pos_weight, smoothing),
    )

    without = fresh_loss(data, num_classes, plain, smoothing).weighted[0]
    compensated = fresh_loss(data, num_classes, focal, smoothing).weighted[0]

    assert compensated[0] == without[0] > 0
    assert compensated[1] == pytest.approx(without[1].item(), rel=2e-3)
    assert compensated[2] == pytest.approx(without[2].item(), rel=1e-9)
    uncompensated = fresh_loss(data, num_classes, plain.replace(fl_gamma=gamma), smoothing).weighted[0]
    assert uncompensated[1] < 0.8 * without[1]


def test_factors_without_focal_or_with_one_class_are_one() -> None:
    levels = initial_levels(images(3, 2), ANCHORS, SIZE, 4.0)

    assert objectness_factor(levels, 0.0, 1.7) == 1.0
    assert class_factor(5, 0.0, 1.7) == 1.0
    assert class_factor(1, 1.5, 1.7) == 1.0


def test_initial_levels_counts_cells_of_each_level_per_image() -> None:
    levels = initial_levels(images(0, 2), ANCHORS, SIZE, 4.0)

    assert [(level.cells, level.matched) for level in levels] == [(768, ()), (192, ()), (48, ())]
    # Nothing but background: the factor of every level is that of its prior, here of one level alone.
    single = (InitialLevel(0.0, 10, ()),) * 3
    assert objectness_factor(single, 2.0, 1.0) == pytest.approx(1 / (0.75 * 0.25))


def test_priors_are_those_of_the_model() -> None:
    state = initial_state("n", 7, 0)
    bias = torch.stack([state[f"model.24.m.{level}.bias"].view(3, 12) for level in range(3)])
    spread = 1 / math.sqrt(64)  # of the random part, at most
    for level, stride in enumerate(STRIDES):
        assert (bias[level, :, 4] - objectness_prior(stride)).abs().max() <= spread
        assert (bias[level, :, 5:] - class_prior(7)).abs().max() <= spread
    assert BALANCE == DEFAULT_BALANCE
