"""Anchor boxes: the defaults of YOLOv5 and the two rules that bring a set of anchors into a model."""

import torch
from torch import Tensor

from yolocore.errors import WeightsError

STRIDES: tuple[int, ...] = (8, 16, 32)
"""Pixels per grid cell of each output level, finest first."""

DEFAULT_ANCHORS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
"""(width, height) in pixels, per level."""


def default_anchors() -> Tensor:
    """The anchors of YOLOv5 in pixels, [L, A, 2] as (width, height)."""
    return torch.tensor(DEFAULT_ANCHORS, dtype=torch.float32)


def order_anchors(anchors: Tensor, strides: Tensor) -> Tensor:
    """Put the levels of `anchors` in the order of the strides.

    Args:
        anchors: [L, A, 2] pixels, (width, height).
        strides: [L] pixels.

    Returns:
        `anchors`, with its levels reversed if the mean area runs against the strides.
    """
    mean_area = anchors.prod(dim=2).mean(dim=1)
    against = torch.sign(mean_area[-1] - mean_area[0]) != torch.sign(strides[-1] - strides[0])
    return anchors.flip(0) if bool(against) else anchors


def grid_anchors(anchors: Tensor | None, strides: Tensor) -> Tensor:
    """Anchors as the model and the loss want them: ordered, in grid units of their level.

    Args:
        anchors: [L, A, 2] pixels, (width, height), or None for the defaults.
        strides: [L] pixels.

    Returns:
        [L, A, 2] grid units, float32.

    Raises:
        WeightsError: if the shape does not fit the levels or a side is not positive.
    """
    if anchors is None:
        # The defaults need no check, and a check would read data, which fake and meta tensors have not got.
        return default_anchors() / strides.view(-1, 1, 1)
    pixels = anchors.detach().to(strides.device, torch.float32)
    if pixels.ndim != 3 or pixels.shape[0] != len(strides) or pixels.shape[2] != 2:
        raise WeightsError(f"anchors: shape {list(pixels.shape)}, must be [{len(strides)}, anchors per level, 2]")
    if not bool((pixels > 0).all()):
        raise WeightsError("anchors: widths and heights must all be greater than 0 pixels")
    return order_anchors(pixels, strides) / strides.view(-1, 1, 1)
