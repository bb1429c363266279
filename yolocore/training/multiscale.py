"""Multi-scale training: every batch at a size of its own, the same for all slots of a pack."""

import math

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from yolocore.training.config import LARGEST_STRIDE, TrainConfig

_STREAM = 1
"""Keeps these draws apart from those of the epoch's order of images, whose seed is one number shorter."""


def batch_sizes(config: TrainConfig, epoch: int, batches: int) -> tuple[int | None, ...]:
    """The longer side of every batch of an epoch, a function of (seed, epoch, batch).

    Args:
        config: With `multi_scale`; its `seed` is that of the image stream.
        epoch: Of the image stream, from 0.
        batches: How many.

    Returns:
        Pixels, multiples of 32 from half to one and a half times `image_size`; None leaves a batch as it is.
    """
    if not config.multi_scale:
        return (None,) * batches
    low, high = config.image_size // 2, config.image_size * 3 // 2 + LARGEST_STRIDE
    drawn = np.random.default_rng([config.seed, epoch, 0, _STREAM]).integers(low, high, size=batches)
    # Half of the smallest image size would round to nothing.
    return tuple(max(size // LARGEST_STRIDE, 1) * LARGEST_STRIDE for size in drawn.tolist())


def resized(pixels: Tensor, size: int | None) -> Tensor:
    """A batch at another size; targets are fractions and stay as they are.

    Args:
        pixels: `[B, 3, H, W]` floating point.
        size: The longer side that is wanted; None changes nothing.

    Returns:
        `[B, 3, H', W']`, both sides rounded up to multiples of 32.
    """
    height, width = pixels.shape[-2:]
    if size is None or size == max(height, width):
        return pixels
    ratio = size / max(height, width)
    shape = [math.ceil(side * ratio / LARGEST_STRIDE) * LARGEST_STRIDE for side in (height, width)]
    return F.interpolate(pixels, size=shape, mode="bilinear", align_corners=False)
