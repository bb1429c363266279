"""From the raw maps of the model to detections: decoding and non-maximum suppression.

Both take a stack: `decode` keeps the slot axis K, and `nms` works on images one by one, so that
`nms(decoded.flatten(0, 1))` treats K slots of B images as K * B images.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor

MAX_CANDIDATES = 30_000
"""At most this many best-scored candidates of one image enter the suppression."""

CLASS_OFFSET = 7680.0
"""Pixels between the boxes of two classes, so that one pass suppresses every class by itself."""

_CHUNK_ELEMENTS = 2**24
"""Scores held at once; bounds the memory of a large stack with many classes."""


def decode(raw: Sequence[Tensor], anchors: Tensor, strides: Tensor) -> Tensor:
    """Turn raw maps into boxes and probabilities, in float32 (float64 for float64 maps).

    Args:
        raw: L maps [K, B, A, H, W, 5 + C] as the model returns them, logits (tx, ty, tw, th, objectness, classes...).
        anchors: [L, A, 2] widths and heights in grid units.
        strides: [L] pixels per cell.

    Returns:
        [K, B, N, 5 + C] with N = the sum of A * H * W; centre x, y, width, height in pixels of the network input, then
        probabilities. The rows run over levels, then anchors, rows and columns of the grid.
    """
    return torch.cat([_decode_level(*level) for level in zip(raw, anchors, strides, strict=True)], dim=2)


def _decode_level(raw: Tensor, anchors: Tensor, stride: Tensor) -> Tensor:
    values = raw.to(torch.promote_types(raw.dtype, torch.float32)).sigmoid()
    height, width = raw.shape[3:5]
    y, x = torch.meshgrid(
        torch.arange(height, device=raw.device), torch.arange(width, device=raw.device), indexing="ij"
    )
    cells = torch.stack((x, y), dim=-1).to(values.dtype)
    stride = stride.to(values)
    centre = (2 * values[..., :2] - 0.5 + cells) * stride
    size = (2 * values[..., 2:4]) ** 2 * (anchors.to(values) * stride)[:, None, None]
    return torch.cat((centre, size, values[..., 4:]), dim=-1).flatten(2, 4)


def nms(
    decoded: Tensor,
    conf: float = 0.25,
    iou: float = 0.45,
    max_det: int = 300,
    multi_label: bool = False,
    agnostic: bool = False,
    classes: Sequence[int] | None = None,
) -> list[Tensor]:
    """Keep the best of overlapping boxes, image by image.

    The result is that of sorting all candidates by score, cutting at 30000, suppressing greedily and keeping the first
    `max_det`; candidates of equal score keep the order of their rows and classes, on every device. Unlike YOLOv5
    there is no limit of wall-clock time, so that a slow or busy machine loses no detection.

    Args:
        decoded: [B, N, 5 + C] from `decode`: centre x, y, width, height in pixels, objectness and class probabilities.
        conf: objectness, and objectness times class probability, must exceed this.
        iou: a box is suppressed by a better one of its class if they overlap by more than this.
        max_det: detections kept per image.
        multi_label: a row may give one detection per class above `conf`, instead of its best class only.
        agnostic: boxes of different classes suppress each other too.
        classes: keep these classes only.

    Returns:
        B tensors [n, 6]: x1, y1, x2, y2 in pixels of the network input, score, class; best score first.
    """
    if decoded.device.type == "mps":  # its order statistics of 64-bit integers are not complete
        return [
            kept.to(decoded.device) for kept in nms(decoded.cpu(), conf, iou, max_det, multi_label, agnostic, classes)
        ]
    columns = decoded.shape[2] - 5 if multi_label else 1
    images = max(1, _CHUNK_ELEMENTS // max(1, decoded.shape[1] * columns))
    offset = 0.0 if agnostic else CLASS_OFFSET
    found: list[Tensor] = []
    for chunk in torch.split(decoded, images):
        found += _suppress(_candidates(chunk, conf, multi_label, classes), iou, max_det, offset)
    return found


@dataclass(frozen=True, slots=True)
class _Candidates:
    """All candidates of B images, not yet ordered."""

    boxes: Tensor
    """[B, N, 4] centre x, y, width, height in pixels."""
    scores: Tensor
    """[B, S] with S = N * columns; -1 for what is no candidate."""
    labels: Tensor | None
    """[B, N] class of each row; None where column c of a row stands for class c."""
    counts: list[int]
    """Candidates of each image."""

    def best(self, images: Sequence[int], count: int) -> Tensor:
        """The best candidates of the given images, [len(images), count, 6], best first, padded with score -1."""
        subset = list(images) if len(images) < len(self.counts) else slice(None)
        scores = self.scores[subset]
        index = _order(scores, count)
        row = index // (scores.shape[1] // self.boxes.shape[1])
        label = (
            index % (scores.shape[1] // self.boxes.shape[1])
            if self.labels is None
            else self.labels[subset].gather(1, row)
        )
        boxes = self.boxes[subset].gather(1, row[..., None].expand(-1, -1, 4))
        half = boxes[..., 2:] / 2
        columns = (boxes[..., :2] - half, boxes[..., :2] + half, scores.gather(1, index)[..., None], label[..., None])
        return torch.cat(columns, dim=-1)


def _order(scores: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the best scores, best first, equal scores in index order.

    A 64-bit key makes every candidate unique: the bits of a non-negative float32 order like the float, and the low half
    counts down with the index. `topk` on the scores alone would pick and order equal scores as it likes.
    """
    size = scores.shape[1]
    bits = scores.float().view(torch.int32).to(torch.int64)
    keys = (bits << 32) + torch.arange(size, 0, -1, device=scores.device)
    return keys.topk(count, dim=1).indices


def _candidates(decoded: Tensor, conf: float, multi_label: bool, classes: Sequence[int] | None) -> _Candidates:
    num_classes = decoded.shape[2] - 5
    objectness = decoded[..., 4:5]
    scores = decoded[..., 5:] * objectness
    scores = torch.where((scores > conf) & (objectness > conf), scores, -1)
    labels = None
    if not multi_label:
        scores, labels = scores.max(dim=2)
    if classes is not None:
        wanted = torch.zeros(num_classes, dtype=torch.bool, device=decoded.device)
        wanted[list(classes)] = True
        scores = torch.where(wanted if labels is None else wanted[labels], scores, -1)
    scores = scores.flatten(1)
    counts: list[int] = (scores >= 0).sum(dim=1).tolist()
    return _Candidates(decoded[..., :4], scores, labels, counts)


def _suppress(candidates: _Candidates, iou: float, max_det: int, offset: float) -> list[Tensor]:
    """Greedy suppression of each image.

    The first detections of a greedy suppression depend on the best candidates only. So it starts with few, and
    takes more for the images that have not filled `max_det` with them: untrained models offer tens of thousands.
    """
    found = [candidates.boxes.new_zeros((0, 6)) for _ in candidates.counts]
    totals = [min(count, MAX_CANDIDATES) for count in candidates.counts]
    pending = [image for image, total in enumerate(totals) if total]
    limit = max_det + max_det // 2
    while pending:
        limit = min(limit, max(totals[image] for image in pending))
        rows = candidates.best(pending, limit)
        shifted = rows[..., :4] + rows[..., 5:6] * offset
        unfilled = []
        counts = [min(limit, totals[image]) for image in pending]
        inputs = [(shifted[i, :count], rows[i, :count, 4], iou) for i, count in enumerate(counts)]
        for i, (image, count, keep) in enumerate(zip(pending, counts, _nms_each(inputs), strict=True)):
            if len(keep) < max_det and count < totals[image]:
                unfilled.append(image)
            else:
                found[image] = rows[i, keep[:max_det]]
        pending, limit = unfilled, 2 * limit
    return found


def _nms_each(inputs: Sequence[tuple[Tensor, Tensor, float]]) -> list[Tensor]:
    """Torchvision's NMS of each image; on the CPU in as many threads as torch uses, as it takes only one by itself."""
    threads = torch.get_num_threads()
    if threads == 1 or len(inputs) == 1 or inputs[0][0].device.type != "cpu":
        return [torchvision.ops.nms(*one) for one in inputs]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda one: torchvision.ops.nms(*one), inputs))
