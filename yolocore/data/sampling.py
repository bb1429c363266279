"""Image weights: images whose classes are rare, or badly detected so far, are drawn more often."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from yolocore.data.augment import Float32Array

FloatArray = NDArray[np.float64]


def class_weights(labels: Sequence[Float32Array], num_classes: int) -> FloatArray:
    """How much a label of each class counts: the inverse of the number of its labels.

    Args:
        labels: float32 [n, 5] (class, x, y, w, h) per image.
        num_classes: C.

    Returns:
        [C], sums to 1. A class without labels counts as if it had one.
    """
    counts = np.maximum(label_counts(labels, num_classes).sum(axis=0), 1)
    inverse = 1 / counts
    shares: FloatArray = inverse / inverse.sum()
    return shares


def image_weights(labels: Sequence[Float32Array], weights: FloatArray) -> FloatArray:
    """The sum of the class weights over the labels of each image.

    Args:
        labels: float32 [n, 5] per image.
        weights: [C].

    Returns:
        [images]; not normalised, 0 for an image without labels.
    """
    found: FloatArray = label_counts(labels, len(weights)) @ weights
    return found


def label_counts(labels: Sequence[Float32Array], num_classes: int) -> FloatArray:
    """[images, C]: labels of each class in each image."""
    rows = [np.bincount(found[:, 0].astype(int), minlength=num_classes) for found in labels]
    return np.array(rows, dtype=np.float64).reshape(len(rows), num_classes)


def draw_images(weights: FloatArray, rng: np.random.Generator) -> list[int]:
    """As many images as there are, with replacement, each in proportion to its weight; evenly if all are 0."""
    total = weights.sum()
    chances = weights / total if total > 0 else None
    drawn: list[int] = rng.choice(len(weights), size=len(weights), p=chances).tolist()
    return drawn
