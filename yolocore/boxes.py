"""Box formats, IoU and CIoU: stateless functions on tensors."""

import math

import torch
from torch import Tensor

IOU_EPSILON = 1e-7
"""Keeps the denominators of IoU and CIoU away from zero."""

MINIMUM_HEIGHT = 1e-12
"""Floor of a height where CIoU divides by it; see `ciou`."""


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners, in whatever unit and frame the boxes are.

    Args:
        boxes: [..., 4] (x, y, w, h).

    Returns:
        [..., 4] (x1, y1, x2, y2).
    """
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Corners to centre and size, in whatever unit and frame the boxes are.

    Args:
        boxes: [..., 4] (x1, y1, x2, y2).

    Returns:
        [..., 4] (x, y, w, h).
    """
    first, last = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((first + last) / 2, last - first), dim=-1)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of every box with every other box.

    Args:
        boxes: [n, 4] corners (x1, y1, x2, y2).
        others: [m, 4] corners in the same unit and frame.

    Returns:
        [n, m] in [0, 1]; a pair of empty boxes gives 0.
    """
    first = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    last = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (last - first).clamp(min=0).prod(dim=-1)
    return shared / (_area(boxes)[:, None] + _area(others)[None, :] - shared + IOU_EPSILON)


def ciou(predicted: Tensor, target: Tensor) -> Tensor:
    """Complete IoU (IoU less centre distance and aspect-ratio terms) of boxes given as centre and size.

    The weight of the aspect-ratio term takes no gradient, as in the CIoU paper (Zheng et al., 2020).

    Guard: where the aspect ratio w/h of a prediction is taken, h counts as at least `MINIMUM_HEIGHT`. YOLOv5 has no
    such guard: in float32 a height logit below about -24 makes its gradient NaN, and two size logits below about -53
    its loss. The floor is that of a height logit near -14.5; above it nothing differs, and below it the loss differs
    only where the predicted width is as small too.

    Args:
        predicted: [..., 4] (x, y, w, h), sizes >= 0, any unit; broadcasts against `target`.
        target: [..., 4] in the same unit and frame, sizes > 0.

    Returns:
        [...] elementwise, at most 1; negative for boxes far apart.
    """
    px, py, pw, ph = predicted.unbind(-1)
    tx, ty, tw, th = target.unbind(-1)
    px1, px2, py1, py2 = px - pw / 2, px + pw / 2, py - ph / 2, py + ph / 2
    tx1, tx2, ty1, ty2 = tx - tw / 2, tx + tw / 2, ty - th / 2, ty + th / 2
    width = (torch.minimum(px2, tx2) - torch.maximum(px1, tx1)).clamp(min=0)
    height = (torch.minimum(py2, ty2) - torch.maximum(py1, ty1)).clamp(min=0)
    shared = width * height
    iou = shared / (pw * ph + tw * th - shared + IOU_EPSILON)
    hull_width = torch.maximum(px2, tx2) - torch.minimum(px1, tx1)
    hull_height = torch.maximum(py2, ty2) - torch.minimum(py1, ty1)
    diagonal = hull_width.square() + hull_height.square() + IOU_EPSILON
    distance = ((tx1 + tx2 - px1 - px2).square() + (ty1 + ty2 - py1 - py2).square()) / 4
    aspect = _aspect_difference(pw, ph, tw, th)
    alpha = (aspect / (1 - iou + aspect + IOU_EPSILON)).detach()
    return iou - (distance / diagonal + alpha * aspect)


def _aspect_difference(pw: Tensor, ph: Tensor, tw: Tensor, th: Tensor) -> Tensor:
    """Squared difference of the two boxes' diagonal angles, scaled to [0, 1]."""
    angle = torch.atan(tw / th) - torch.atan(pw / ph.clamp(min=MINIMUM_HEIGHT))
    return angle.square() * (4 / math.pi**2)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=-1)
