"""A stacked model and a validation set give one `DetectionMetrics` per slot, in one pass over the batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolocore.assign import assign_targets
from yolocore.data.loader import Batch, ImageInfo
from yolocore.details import SHOWN_IMAGES, EvaluationDetails, ShownImage, shown_pixels
from yolocore.device import Precision, autocast, images_as_input, input_dtype
from yolocore.loss import LossWeights, detection_loss
from yolocore.metrics import (
    CONFUSION_CONFIDENCE,
    IOU_THRESHOLDS,
    DetectionMetrics,
    class_curves,
    class_metrics,
    confusion,
    match_detections,
    summarise,
)
from yolocore.model import YOLOv5
from yolocore.postprocess import decode, nms

CONFIDENCE = 0.001
"""Validation keeps nearly everything: the precision-recall curve wants its low end."""
NMS_IOU = 0.6
MAX_DETECTIONS = 300


def evaluate(
    model: YOLOv5,
    loader: Iterable[Batch],
    weights: LossWeights,
    anchor_threshold: float,
    device: torch.device,
    precision: Precision,
) -> list[DetectionMetrics]:
    """Score every slot of a model on the same batches.

    The model runs in evaluation mode and is left in the mode it came in.

    Args:
        model: K slots, on `device`.
        loader: validation batches, with `infos`.
        weights: of the K slots; they weight the validation losses and nothing else.
        anchor_threshold: the hyp key `anchor_t`.
        device: where the model is.
        precision: of the forward pass; decoding, losses and metrics are at least float32.

    Returns:
        One per slot. A set without images, labels or detections scores zeros.
    """
    evaluator = Evaluator(model, weights, anchor_threshold, device, precision)
    was_training = model.training
    model.eval()
    try:
        for batch in loader:
            evaluator.add(batch)
    finally:
        model.train(was_training)
    return [slot.metrics for slot in evaluator.results()]


@dataclass(frozen=True, slots=True)
class SlotEvaluation:
    """What one slot scored."""

    metrics: DetectionMetrics
    details: Callable[[int], EvaluationDetails]
    """What pictures are drawn from; takes the epoch, to be noted."""


class Evaluator:
    """Runs the slots of one model over batches and keeps what they found.

    Args:
        model: K slots, on `device`, in evaluation mode.
        weights: of the K slots; they weight the validation losses and nothing else.
        anchor_threshold: the hyp key `anchor_t`.
        device: where the model is.
        precision: of the forward pass; decoding, losses and metrics are at least float32.
    """

    def __init__(
        self,
        model: YOLOv5,
        weights: LossWeights,
        anchor_threshold: float,
        device: torch.device,
        precision: Precision,
    ) -> None:
        dtype = model.anchors.dtype
        self._model = model
        self._device = device
        self._precision = precision
        self._entering = input_dtype(device, precision, dtype)
        self._evaluation = Evaluation(model.num_slots, weights.to(device, dtype), model.anchors, anchor_threshold)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Take in one batch."""
        images = images_as_input(batch.images.to(self._device, non_blocking=True), self._entering)
        with autocast(self._device, self._precision):
            raw = self._model(images)
        decoded = decode(raw, self._model.anchors, self._model.strides)
        height, width = images.shape[2:]
        self._evaluation.add(raw, decoded, batch.targets, batch.infos, (height, width))
        self._evaluation.show(batch)

    def results(self) -> list[SlotEvaluation]:
        """One per slot, of all batches so far."""
        found = self._evaluation
        return [SlotEvaluation(metrics, partial(found.details, slot)) for slot, metrics in enumerate(found.results())]


class Evaluation:
    """Collects batches of predictions and turns them into metrics.

    Args:
        num_slots: K.
        weights: of the K slots, on the device of the predictions.
        anchors: [L, A, 2] grid units, on the device of the predictions.
        anchor_threshold: the hyp key `anchor_t`.
    """

    def __init__(self, num_slots: int, weights: LossWeights, anchors: Tensor, anchor_threshold: float) -> None:
        self._weights = weights
        self._anchors = anchors
        self._anchor_threshold = anchor_threshold
        self._slots = [_Matches() for _ in range(num_slots)]
        self._label_classes: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.float32]] = []
        self._shown: list[tuple[NDArray[np.uint8], tuple[int, int]]] = []
        self._num_classes = 0
        self._losses = torch.zeros(num_slots, 3, dtype=torch.float64)
        self._batches = 0
        self._images = 0

    @torch.no_grad()
    def add(
        self,
        raw: Sequence[Tensor],
        decoded: Tensor,
        targets: Tensor,
        infos: Sequence[ImageInfo],
        image_size: tuple[int, int],
    ) -> None:
        """Take in one batch.

        Args:
            raw: L maps [K, B, A, H, W, 5 + C], for the losses.
            decoded: [K, B, N, 5 + C] from `decode`, for the detections.
            targets: [T, 6] image, class, x, y, width, height as fractions of the network input; padding rows have
                image -1. Best on the host, where the loader leaves them.
            infos: B, how the images were fitted into the network input.
            image_size: (height, width) of the network input in pixels.
        """
        labels = _native_labels(targets.cpu().numpy(), infos, image_size)
        self._label_classes += [rows[:, 0] for rows in labels]
        self._labels += labels
        self._num_classes = decoded.shape[-1] - 5
        detections = _native_detections(
            nms(decoded.flatten(0, 1), CONFIDENCE, NMS_IOU, MAX_DETECTIONS, multi_label=True), infos
        )
        for slot, matches in enumerate(self._slots):
            for image, rows in enumerate(labels):
                matches.add(detections[slot * len(infos) + image], rows)
        self._losses += self._batch_losses(raw, targets.to(raw[0].device)).cpu()
        self._batches += 1
        self._images += len(infos)

    def show(self, batch: Batch) -> None:
        """Keep small copies of the first images; the batch has been added before."""
        for image, info in zip(batch.images.numpy(), batch.infos, strict=True):
            if len(self._shown) < SHOWN_IMAGES:
                self._shown.append((shown_pixels(image, info), info.native))

    def details(self, slot: int, epoch: int) -> EvaluationDetails:
        """What pictures of one slot are drawn from.

        Args:
            slot: which of the K.
            epoch: to be noted.
        """
        matches = self._slots[slot]
        target = np.concatenate([np.zeros(0, dtype=np.float32), *self._label_classes])
        matrix = np.zeros((self._num_classes + 1, self._num_classes + 1), dtype=np.int64)
        for detections, labels in zip(matches.confident, self._labels, strict=True):
            matrix += confusion(detections, labels, self._num_classes)
        rows = class_metrics(*matches.joined(), target)
        images = tuple(
            ShownImage(pixels, native, labels, detections)
            for (pixels, native), labels, detections in zip(self._shown, self._labels, matches.confident, strict=False)
        )
        counts = np.unique(target, return_counts=True)[1].astype(np.int64)
        curves = class_curves(*matches.joined(), target)
        return EvaluationDetails(epoch, curves, rows.ap[:, 0], rows.ap.mean(axis=1), counts, matrix, images)

    def _batch_losses(self, raw: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Weighted box, objectness and classification loss of one batch, [K, 3]."""
        sizes = [(level.shape[3], level.shape[4]) for level in raw]
        assignment = assign_targets(targets, sizes, self._anchors, raw[0].shape[1], self._anchor_threshold)
        return detection_loss(raw, assignment, self._weights).weighted

    def results(self) -> list[DetectionMetrics]:
        """The metrics of each slot over all batches so far."""
        target = np.concatenate([np.zeros(0, dtype=np.float32), *self._label_classes])
        losses = (self._losses / max(self._batches, 1)).tolist()
        return [
            summarise(*matches.joined(), target, (box, obj, cls), self._images)
            for matches, (box, obj, cls) in zip(self._slots, losses, strict=True)
        ]


class _Matches:
    """The matched detections of one slot."""

    def __init__(self) -> None:
        self._correct = [np.zeros((0, len(IOU_THRESHOLDS)), dtype=np.bool_)]
        self._scored = [np.zeros((0, 2), dtype=np.float32)]
        self.confident: list[NDArray[np.float32]] = []
        """The detections [n, 6] of each image that a person would take for found."""

    def add(self, detections: NDArray[np.float32], labels: NDArray[np.float32]) -> None:
        """Match the detections [n, 6] and labels [m, 5] of one image, in native pixels."""
        self._correct.append(match_detections(detections, labels))
        self._scored.append(detections[:, 4:])
        self.confident.append(detections[detections[:, 4] > CONFUSION_CONFIDENCE])

    def joined(self) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        """Correctness [n, t], confidence [n] and class [n] of all detections."""
        scored = np.concatenate(self._scored)
        return np.concatenate(self._correct), scored[:, 0], scored[:, 1]


def _native_labels(
    targets: NDArray[np.float32], infos: Sequence[ImageInfo], image_size: tuple[int, int]
) -> list[NDArray[np.float32]]:
    """Labels [m, 5] (class, corners in native pixels) of each image."""
    targets = targets[targets[:, 0] >= 0].astype(np.float32)
    image = targets[:, 0].astype(np.int64)
    height, width = image_size
    boxes: NDArray[np.float32] = targets[:, 2:] * np.array([width, height, width, height], dtype=np.float32)
    half = boxes[:, 2:] * np.float32(0.5)
    corners: NDArray[np.float32] = np.concatenate((boxes[:, :2] - half, boxes[:, :2] + half), axis=1)
    labels = np.concatenate((targets[:, 1:2], _to_native(corners, image, infos)), axis=1)
    return [labels[image == i] for i in range(len(infos))]


def _native_detections(found: Sequence[Tensor], infos: Sequence[ImageInfo]) -> list[NDArray[np.float32]]:
    """Detections [n, 6] in native pixels, of K times B images; one copy from the device for all of them."""
    counts = [len(rows) for rows in found]
    rows: NDArray[np.float32] = torch.cat(list(found)).float().cpu().numpy()
    image = np.repeat(np.arange(len(found)) % max(len(infos), 1), counts)
    rows = np.concatenate((_to_native(rows[:, :4], image, infos), rows[:, 4:]), axis=1)
    return np.split(rows, np.cumsum(counts)[:-1])


def _to_native(
    corners: NDArray[np.float32], image: NDArray[np.int64], infos: Sequence[ImageInfo]
) -> NDArray[np.float32]:
    """Map corners [n, 4] of the network input to native pixels of their image, clipped to it.

    Both axes are divided by the one gain, as YOLOv5 does, although rounding makes the width's ratio slightly different.
    """
    pad = np.array([info.pad * 2 for info in infos], dtype=np.float32)[image]
    gain = np.array([info.gain for info in infos], dtype=np.float32)[image, None]
    limit = np.array([info.native[::-1] * 2 for info in infos], dtype=np.float32)[image]
    native: NDArray[np.float32] = ((corners - pad) / gain).clip(0, limit)
    return native
