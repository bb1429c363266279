"""AutoAnchor: do the anchors fit the labels of a data set, and which would fit better?

A label is matched with an anchor when neither side differs by a factor of `anchor_t` or more. Two figures say how well
a set of anchors does: the best possible recall (BPR), the share of the labels that any anchor matches, and the anchors
above threshold (AAT), how many match a label on average. Where the BPR is 0.98 or less new anchors are made by k-means
over the labels' sizes and refined by random mutations; they are taken if their BPR is larger.

Sizes are (width, height) in pixels of the training image. Which numbers: docs/fidelity.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # it would bring torch, and results are read where nobody waits for that
    from yolocore.data.dataset import LabelledImage

ENOUGH_RECALL = 0.98
"""With a BPR above this the anchors stay."""
SMALLEST_SIDE = 2.0
"""Pixels. Labels with both sides below take no part in k-means, and no anchor gets smaller."""
RESTARTS = 30
GENERATIONS = 1000
MUTATION_CHANCE = 0.9
MUTATION_SIZE = 0.1
FACTOR_LIMITS = (0.3, 3.0)
"""How far one mutation may change a side."""
JITTER = (0.9, 1.1)
"""Images are trained at many scales; each gets one of these as its size."""

FloatArray = NDArray[np.float64]
Outcome = Literal["kept", "replaced", "no better"]
AnchorTuple = tuple[tuple[tuple[float, float], ...], ...]
"""[L][A] (width, height), pixels."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AnchorFit:
    """How well anchors fit labels."""

    bpr: float
    """Best possible recall: share of the labels that at least one anchor matches."""
    aat: float
    """Anchors above threshold: mean number of anchors that match a label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoAnchorResult:
    """What AutoAnchor found, and the anchors to train with."""

    outcome: Outcome
    """Whether the anchors stay because they fit, are replaced, or stay because nothing better was found."""
    before: AnchorFit
    after: AnchorFit
    """Of the anchors to train with."""
    anchors: AnchorTuple
    """Pixels, in the order of the strides."""
    labels: int
    """How many labels were looked at."""

    def describe(self) -> str:
        """The outcome in a line."""
        fit = f"best possible recall {self.before.bpr:.4f}, {self.before.aat:.2f} anchors per label"
        if self.outcome == "kept":
            return f"kept: {fit}"
        if self.outcome == "no better":
            return f"kept, no better ones found: {fit}"
        return f"replaced: {fit}; now {self.after.bpr:.4f}, {self.after.aat:.2f}"


def label_sizes(images: Sequence[LabelledImage], image_size: int, factors: FloatArray | None = None) -> FloatArray:
    """Sizes of all labels in the training image.

    Args:
        images: The images of a split.
        image_size: Longer side of the images in training, pixels.
        factors: [images] further factor of each image; all 1 if None.

    Returns:
        [n, 2] (width, height) in pixels.
    """
    sizes = [np.zeros((0, 2))]
    for index, item in enumerate(images):
        height, width = item.size
        factor = 1.0 if factors is None else factors[index]
        shape = image_size * np.array([width, height], dtype=np.float64) / max(width, height) * factor
        sizes.append(item.labels[:, 3:5].astype(np.float64) * shape)
    return np.concatenate(sizes)


def anchor_fit(sizes: FloatArray, anchors: FloatArray, anchor_t: float) -> AnchorFit:
    """Best possible recall and anchors above threshold.

    Args:
        sizes: [n, 2] of the labels, pixels.
        anchors: [m, 2] pixels.
        anchor_t: Largest factor between the sides of a label and of a matching anchor.

    Returns:
        Perfect recall where there is no label that could be missed.
    """
    if not len(sizes):
        return AnchorFit(1.0, 0.0)
    matched = _closeness(sizes, anchors) > 1 / anchor_t
    return AnchorFit(float(matched.any(axis=1).mean()), float(matched.sum(axis=1).mean()))


def _closeness(sizes: FloatArray, anchors: FloatArray) -> FloatArray:
    """[n, m]: the smaller of the ratios of the sides, 1 for equal shapes."""
    with np.errstate(divide="ignore"):  # a side of 0 pixels is close to nothing
        ratio = sizes[:, None] / anchors[None]
        closeness: FloatArray = np.minimum(ratio, 1 / ratio).min(axis=2)
    return closeness


def anchor_fitness(sizes: FloatArray, anchors: FloatArray, anchor_t: float) -> float:
    """Mean closeness of each label to its closest anchor, 0 where that does not match."""
    best = _closeness(sizes, anchors).max(axis=1)
    return float((best * (best > 1 / anchor_t)).mean())


def autoanchor(
    images: Sequence[LabelledImage], anchors: AnchorTuple, image_size: int, anchor_t: float, seed: int
) -> AutoAnchorResult:
    """Check anchors against the labels of a training split, and make better ones where they do not fit.

    Args:
        images: The training split.
        anchors: Those that training would use, pixels.
        image_size: Longer side of the training image, pixels.
        anchor_t: As in the hyp file.
        seed: Of all random draws: the result is a function of the arguments.
    """
    rng = np.random.default_rng(seed)
    old = np.array(anchors, dtype=np.float64)
    jittered = _jittered_sizes(images, image_size, rng)
    before = anchor_fit(jittered, old.reshape(-1, 2), anchor_t)
    outcome, after, chosen = _choose(images, jittered, old, before, image_size, anchor_t, rng)
    return AutoAnchorResult(
        outcome=outcome,
        before=before,
        after=after,
        anchors=anchors if outcome != "replaced" else _as_tuples(chosen),
        labels=len(jittered),
    )


def current_fit(
    images: Sequence[LabelledImage], anchors: AnchorTuple, image_size: int, anchor_t: float, seed: int
) -> AnchorFit:
    """How well anchors fit, as `autoanchor` sees it with the same arguments before it decides."""
    sizes = _jittered_sizes(images, image_size, np.random.default_rng(seed))
    return anchor_fit(sizes, np.array(anchors, dtype=np.float64).reshape(-1, 2), anchor_t)


def _jittered_sizes(images: Sequence[LabelledImage], image_size: int, rng: np.random.Generator) -> FloatArray:
    return label_sizes(images, image_size, rng.uniform(*JITTER, size=len(images)))


def _choose(
    images: Sequence[LabelledImage],
    jittered: FloatArray,
    old: FloatArray,
    before: AnchorFit,
    image_size: int,
    anchor_t: float,
    rng: np.random.Generator,
) -> tuple[Outcome, AnchorFit, FloatArray]:
    """Whether anchors [L, A, 2] stay or are replaced, how well the chosen ones fit, and these."""
    if before.bpr > ENOUGH_RECALL:
        return "kept", before, old
    new = make_anchors(label_sizes(images, image_size), old.shape[0] * old.shape[1], image_size, anchor_t, rng)
    after = anchor_fit(jittered, new, anchor_t)
    return ("replaced", after, new.reshape(old.shape)) if after.bpr > before.bpr else ("no better", before, old)


def make_anchors(
    sizes: FloatArray, count: int, image_size: int, anchor_t: float, rng: np.random.Generator
) -> FloatArray:
    """Anchors for labels of these sizes, by k-means and random mutations.

    Args:
        sizes: [n, 2] pixels.
        count: How many anchors.
        image_size: Side of the training image, pixels.
        anchor_t: As in the hyp file.
        rng: Where all draws come from.

    Returns:
        [count, 2] pixels, by ascending area.
    """
    usable = sizes[(sizes >= SMALLEST_SIDE).any(axis=1)]
    anchors = _cluster(usable, count, image_size, rng)
    if len(usable):
        anchors = refine(usable, anchors, anchor_t, rng)
    return anchors[np.argsort(anchors.prod(axis=1), kind="stable")]


def _cluster(sizes: FloatArray, count: int, image_size: int, rng: np.random.Generator) -> FloatArray:
    """The centres of k-means over sizes in units of their spread; random ones where there is too little to cluster."""
    from scipy.cluster.vq import kmeans

    if len(np.unique(sizes, axis=0)) >= count:
        spread = sizes.std(axis=0)
        spread[spread == 0] = 1.0
        centres: FloatArray = kmeans(sizes / spread, count, iter=RESTARTS, rng=rng)[0] * spread
        if len(centres) == count:
            return centres
    _log.warning("AutoAnchor: too few different label sizes for %d anchors, starting from random ones", count)
    return np.maximum(np.sort(rng.random(count * 2)).reshape(count, 2) * image_size, SMALLEST_SIDE)


def refine(
    sizes: FloatArray,
    anchors: FloatArray,
    anchor_t: float,
    rng: np.random.Generator,
    generations: int = GENERATIONS,
) -> FloatArray:
    """Mutate anchors and keep what raises their fitness.

    Args:
        sizes: [n, 2] pixels; at least one.
        anchors: [m, 2] pixels, where to start.
        anchor_t: As in the hyp file.
        rng: Where the draws come from.
        generations: How many mutations are tried.

    Returns:
        [m, 2] pixels, at least as fit.
    """
    best = anchor_fitness(sizes, anchors, anchor_t)
    for _ in range(generations):
        mutant = np.maximum(anchors * _mutation(anchors.shape, rng), SMALLEST_SIDE)
        fitness = anchor_fitness(sizes, mutant, anchor_t)
        if fitness > best:
            best, anchors = fitness, mutant
    return anchors


def _mutation(shape: tuple[int, ...], rng: np.random.Generator) -> FloatArray:
    """Factors of which at least one is not 1."""
    while True:
        chosen = rng.random(shape) < MUTATION_CHANCE
        factors = np.clip(chosen * rng.random() * rng.normal(size=shape) * MUTATION_SIZE + 1, *FACTOR_LIMITS)
        if (factors != 1).any():
            return factors


def _as_tuples(anchors: FloatArray) -> AnchorTuple:
    # Three digits are finer than any label, and read back as written.
    return tuple(tuple((round(float(w), 3), round(float(h), 3)) for w, h in level) for level in anchors)
