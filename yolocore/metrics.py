"""Average precision and its relatives, from matched detections.

NumPy only: the arrays are small and their sums are wanted in float64. Every figure follows YOLOv5's definition, which
differs from COCO's in two points: a label goes to the *most confident* detection that overlaps it enough, and the area
under the precision-recall curve is a trapezoid sum over 101 points, so that perfect detection scores 0.995.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IOU_THRESHOLDS: NDArray[np.float32] = np.linspace(0.5, 0.95, 10).astype(np.float32)
"""The overlaps of mAP50-95; the first one is that of mAP50."""

_EPSILON = 1e-16
_RECALL_POINTS = np.linspace(0, 1, 101)
_CONFIDENCE_POINTS = np.linspace(0, 1, 1000)
_SMOOTHING = 0.1
_IOU_EPSILON = np.float32(1e-7)


@dataclass(frozen=True, slots=True)
class DetectionMetrics:
    """What one model scored on one validation set; all zeros where there is nothing to score."""

    precision: float = 0.0
    """Mean over classes, at the confidence of the best mean F1."""
    recall: float = 0.0
    f1: float = 0.0
    map50: float = 0.0
    """Mean average precision at an overlap of 0.5."""
    map: float = 0.0
    """Mean average precision over the overlaps 0.5, 0.55, ... 0.95."""
    class_ap: Mapping[int, float] = field(default_factory=dict)
    """Average precision over all overlaps, for each class that has labels."""
    class_ap50: Mapping[int, float] = field(default_factory=dict)
    box_loss: float = 0.0
    """Weighted validation loss, mean over batches; the same for `obj_loss` and `cls_loss`."""
    obj_loss: float = 0.0
    cls_loss: float = 0.0
    images: int = 0
    labels: int = 0

    @property
    def fitness(self) -> float:
        """YOLOv5's measure of a model: 0.1 mAP50 + 0.9 mAP50-95."""
        return 0.1 * self.map50 + 0.9 * self.map

    def to_mapping(self) -> dict[str, float]:
        """A flat mapping for logs: the figures by their short names, and `class_ap/<index>`."""
        figures = {
            "fitness": self.fitness,
            "map50": self.map50,
            "map": self.map,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "val_box": self.box_loss,
            "val_obj": self.obj_loss,
            "val_cls": self.cls_loss,
        }
        return figures | {f"class_ap/{index}": value for index, value in self.class_ap.items()}


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One row per class that has labels, in ascending order of the class; [n] but for `ap`."""

    classes: NDArray[np.int64]
    precision: NDArray[np.float64]
    """At the one confidence where the smoothed mean F1 of all classes is highest; the same for `recall` and `f1`."""
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    true_positives: NDArray[np.float64]
    false_positives: NDArray[np.float64]
    ap: NDArray[np.float64]
    """[n, thresholds] average precision."""


@dataclass(frozen=True, slots=True)
class ClassCurves:
    """Curves at an overlap of 0.5, one row per class that has labels, in ascending order of the class."""

    classes: NDArray[np.int64]
    recall: NDArray[np.float64]
    """[101] points of the precision-recall curve."""
    precision: NDArray[np.float64]
    """[n, 101] the falling envelope at these recalls."""
    confidence: NDArray[np.float64]
    """[p] points of the F1 curve."""
    f1: NDArray[np.float64]
    """[n, p]"""


def pairwise_iou(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Overlap of every box [m, 4] with every box [n, 4], corners x1, y1, x2, y2 in one frame, as [m, n]."""
    first_area = (first[:, 2] - first[:, 0]) * (first[:, 3] - first[:, 1])
    second_area = (second[:, 2] - second[:, 0]) * (second[:, 3] - second[:, 1])
    upper = np.minimum(first[:, None, 2:], second[None, :, 2:])
    lower = np.maximum(first[:, None, :2], second[None, :, :2])
    sides = (upper - lower).clip(min=0)
    inter = sides[..., 0] * sides[..., 1]
    overlap: NDArray[np.float32] = inter / (first_area[:, None] + second_area[None] - inter + _IOU_EPSILON)
    return overlap


def match_detections(
    detections: NDArray[np.float32], labels: NDArray[np.float32], thresholds: NDArray[np.float32] = IOU_THRESHOLDS
) -> NDArray[np.bool_]:
    """Decide which detections of one image are correct at each overlap threshold.

    A detection stands for the label of its class that it overlaps most; of the detections that stand for one label with
    enough overlap, the first one is correct.

    Args:
        detections: [n, 6] x1, y1, x2, y2, score, class, best score first, in the labels' frame.
        labels: [m, 5] class, x1, y1, x2, y2.
        thresholds: [t] overlaps.

    Returns:
        [n, t].
    """
    correct = np.zeros((len(detections), len(thresholds)), dtype=np.bool_)
    if not len(detections) or not len(labels):
        return correct
    overlap = pairwise_iou(labels[:, 1:5], detections[:, :4])
    overlap[labels[:, :1] != detections[None, :, 5]] = -1
    label = overlap.argmax(axis=0)
    enough = overlap[label, np.arange(len(detections)), None] >= thresholds
    for column in range(len(thresholds)):
        candidates = np.flatnonzero(enough[:, column])
        _, first = np.unique(label[candidates], return_index=True)
        correct[candidates[first], column] = True
    return correct


def average_precision(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Area under the precision-recall curve: falling envelope, 101 recall points, trapezoid rule.

    Args:
        recall: [n] not falling, 0..1.
        precision: [n] at these recalls.
    """
    return float(np.trapezoid(_envelope(recall, precision), _RECALL_POINTS))


def _envelope(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> NDArray[np.float64]:
    """The falling envelope of a precision-recall curve at the recall points."""
    extended_recall = np.concatenate(([0.0], recall, [1.0]))
    extended_precision = np.concatenate(([1.0], precision, [0.0]))
    envelope = np.maximum.accumulate(extended_precision[::-1])[::-1]
    return np.interp(_RECALL_POINTS, extended_recall, envelope)


def smooth(curve: NDArray[np.float64], fraction: float = _SMOOTHING) -> NDArray[np.float64]:
    """Box filter over twice the `fraction` of the curve's length [n], its ends continued by their last values."""
    width = round(len(curve) * fraction * 2) // 2 + 1
    edge = np.ones(width // 2)
    padded = np.concatenate((edge * curve[0], curve, edge * curve[-1]))
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def class_metrics(
    correct: NDArray[np.bool_],
    confidence: NDArray[np.float32],
    predicted: NDArray[np.generic],
    target: NDArray[np.generic],
) -> ClassMetrics:
    """Precision, recall, F1 and average precision of each class that has labels.

    Args:
        correct: [n, t] from `match_detections`, of all images together, in any order.
        confidence: [n] scores.
        predicted: [n] classes of the detections.
        target: [m] classes of the labels.
    """
    classes, counts = np.unique(np.asarray(target, dtype=np.int64), return_counts=True)
    order = np.lexsort((-confidence, predicted))  # stable: equal scores stay in the order of the images
    correct, confidence, predicted = correct[order], confidence[order], predicted[order]
    starts, ends = np.searchsorted(predicted, classes, "left"), np.searchsorted(predicted, classes, "right")
    ap = np.zeros((len(classes), correct.shape[1]))
    precision_curves, recall_curves = np.zeros((2, len(classes), len(_CONFIDENCE_POINTS)))
    for i, (start, end, count) in enumerate(zip(starts, ends, counts, strict=True)):
        if start < end:
            ap[i], precision_curves[i], recall_curves[i] = _curves(correct[start:end], confidence[start:end], count)
    return _at_best_f1(classes, counts, precision_curves, recall_curves, ap)


def _curves(
    correct: NDArray[np.bool_], confidence: NDArray[np.float32], labels: int
) -> tuple[list[float], NDArray[np.float64], NDArray[np.float64]]:
    """Average precisions [t], and precision and recall over the confidence points, of one class, best first."""
    true_positives = correct.cumsum(axis=0)
    recall = true_positives / (labels + _EPSILON)
    precision = true_positives / np.arange(1, len(correct) + 1)[:, None]
    recall_curve = np.interp(-_CONFIDENCE_POINTS, -confidence, recall[:, 0], left=0)
    precision_curve = np.interp(-_CONFIDENCE_POINTS, -confidence, precision[:, 0], left=1)
    ap = [average_precision(recall[:, j], precision[:, j]) for j in range(correct.shape[1])]
    return ap, precision_curve, recall_curve


def class_curves(
    correct: NDArray[np.bool_],
    confidence: NDArray[np.float32],
    predicted: NDArray[np.generic],
    target: NDArray[np.generic],
) -> ClassCurves:
    """The curves of each class that has labels; arguments as for `class_metrics`."""
    classes, counts = np.unique(np.asarray(target, dtype=np.int64), return_counts=True)
    precisions, f1 = np.zeros((len(classes), len(_RECALL_POINTS))), np.zeros((len(classes), len(_CONFIDENCE_POINTS)))
    for i, (index, count) in enumerate(zip(classes, counts, strict=True)):
        chosen = np.flatnonzero(predicted == index)
        if not len(chosen):
            continue
        chosen = chosen[np.argsort(-confidence[chosen], kind="stable")]
        hits = correct[chosen].cumsum(axis=0)[:, 0]
        precisions[i] = _envelope(hits / (count + _EPSILON), hits / np.arange(1, len(chosen) + 1))
        _, precision, recall = _curves(correct[chosen], confidence[chosen], count)
        f1[i] = 2 * precision * recall / (precision + recall + _EPSILON)
    return ClassCurves(classes, _RECALL_POINTS, precisions, _CONFIDENCE_POINTS, f1)


CONFUSION_CONFIDENCE = 0.25
CONFUSION_IOU = 0.45


def confusion(detections: NDArray[np.float32], labels: NDArray[np.float32], num_classes: int) -> NDArray[np.int64]:
    """Who is taken for whom in one image, whatever its class: each label pairs with the detection it overlaps most.

    Args:
        detections: [n, 6] x1, y1, x2, y2, score, class; those that count as found.
        labels: [m, 5] class, x1, y1, x2, y2.
        num_classes: C.

    Returns:
        [C + 1, C + 1] counts: row what was found, column what is there; the last one is nothing.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    found, there = detections[:, 5].astype(np.int64), labels[:, 0].astype(np.int64)
    overlap = pairwise_iou(labels[:, 1:5], detections[:, :4])
    free_labels, free_detections = np.ones(len(there), dtype=np.bool_), np.ones(len(found), dtype=np.bool_)
    for place in np.argsort(-overlap, axis=None, kind="stable"):
        label, detection = divmod(int(place), len(found))
        if overlap[label, detection] <= CONFUSION_IOU:
            break
        if free_labels[label] and free_detections[detection]:
            free_labels[label] = free_detections[detection] = False
            matrix[found[detection], there[label]] += 1
    matrix[num_classes, :num_classes] = np.bincount(there[free_labels], minlength=num_classes)
    matrix[:num_classes, num_classes] = np.bincount(found[free_detections], minlength=num_classes)
    return matrix


def _at_best_f1(
    classes: NDArray[np.int64],
    counts: NDArray[np.int64],
    precision: NDArray[np.float64],
    recall: NDArray[np.float64],
    ap: NDArray[np.float64],
) -> ClassMetrics:
    """Read the curves [n, points] at the confidence of the best mean F1."""
    if not len(classes):
        none = np.zeros(0)
        return ClassMetrics(classes, none, none, none, none, none, ap)
    f1 = 2 * precision * recall / (precision + recall + _EPSILON)
    best = smooth(f1.mean(axis=0)).argmax()
    precision, recall, f1 = precision[:, best], recall[:, best], f1[:, best]
    true_positives = (recall * counts).round()
    false_positives = (true_positives / (precision + _EPSILON) - true_positives).round()
    return ClassMetrics(classes, precision, recall, f1, true_positives, false_positives, ap)


def summarise(
    correct: NDArray[np.bool_],
    confidence: NDArray[np.float32],
    predicted: NDArray[np.generic],
    target: NDArray[np.generic],
    losses: tuple[float, float, float] = (0.0, 0.0, 0.0),
    images: int = 0,
) -> DetectionMetrics:
    """The figures of a whole validation set; arguments as for `class_metrics`.

    Without a single correct detection precision, recall, F1 and both mAP are 0, as in YOLOv5.

    Args:
        correct: [n, t].
        confidence: [n].
        predicted: [n].
        target: [m].
        losses: weighted validation losses box, objectness, classification.
        images: number of images in the set.
    """
    box, obj, cls = losses
    rows = class_metrics(correct, confidence, predicted, target)
    indices = [int(index) for index in rows.classes]
    scale = 1.0 if correct.any() else 0.0
    return DetectionMetrics(
        precision=scale * _mean(rows.precision),
        recall=scale * _mean(rows.recall),
        f1=scale * _mean(rows.f1),
        map50=_mean(rows.ap[:, 0]),
        map=_mean(rows.ap),
        class_ap=dict(zip(indices, rows.ap.mean(axis=1).tolist(), strict=True)),
        class_ap50=dict(zip(indices, rows.ap[:, 0].tolist(), strict=True)),
        box_loss=box,
        obj_loss=obj,
        cls_loss=cls,
        images=images,
        labels=len(target),
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else 0.0
