"""What sharing saves in the loss: forward and backward of the loss core for K slots, against a plain eager loss.

The rival is the same formulas (docs/loss.md) as one would write them for one model: targets filtered with boolean
masks, level by level, one call per term. It runs with K=1, as every lone training does. The shared core is timed with
its assignment, since the rival's matching is part of its time too. The best of several rounds, taken in turn, counts.
The last line is the rival's time over the core's time per slot at K=8.

    python benchmarks/loss.py --quick
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from yolocore.assign import assign_targets
from yolocore.device import resolve_device
from yolocore.hyperparameters import Hyperparameters
from yolocore.loss import DEFAULT_BALANCE, LossWeights, detection_loss
from yolocore.model import STRIDES
from yolocore.model.anchors import default_anchors

BATCH_SIZE = 16
NUM_CLASSES = 3
OBJECTS_PER_IMAGE = 14  # BCCD's mean
SHIFTS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0), (0.0, -0.5))


# ------------------------------------------------------------------------------------------- the plain loss


def eager_targets(
    targets: Tensor, anchors: Tensor, rows: int, columns: int, threshold: float
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor, Tensor]:
    """One level's matches: (image, anchor, row, column), boxes, anchors, classes. `targets` [n, 6] without padding."""
    count = len(targets)
    scale = torch.tensor([columns, rows, columns, rows], dtype=targets.dtype, device=targets.device)
    boxes = targets[:, 2:] * scale
    ratio = boxes[None, :, 2:] / anchors[:, None]
    keep = torch.max(ratio, 1 / ratio).max(2)[0] < threshold
    which = torch.arange(len(anchors), device=targets.device)[:, None].repeat(1, count)[keep]
    kept = torch.cat((targets[:, :2], boxes), 1)[None].repeat(len(anchors), 1, 1)[keep]
    centre = kept[:, 2:4]
    inverse = scale[:2] - centre
    left, top = ((centre % 1 < 0.5) & (centre > 1)).T
    right, bottom = ((inverse % 1 < 0.5) & (inverse > 1)).T
    chosen = torch.stack((torch.ones_like(left), left, top, right, bottom))
    shifts = torch.tensor(SHIFTS, dtype=targets.dtype, device=targets.device)
    kept = kept[None].repeat(5, 1, 1)[chosen]
    which = which[None].repeat(5, 1)[chosen]
    shift = shifts[:, None].repeat(1, chosen.shape[1], 1)[chosen]
    cell = (kept[:, 2:4] - shift).long()
    column, row = cell[:, 0].clamp(0, columns - 1), cell[:, 1].clamp(0, rows - 1)
    box = torch.cat((kept[:, 2:4] - torch.stack((column, row), 1), kept[:, 4:]), 1)
    return (kept[:, 0].long(), which, row, column), box, anchors[which], kept[:, 1].long()


def eager_ciou(predicted: Tensor, wanted: Tensor, eps: float = 1e-7) -> Tensor:
    """Complete IoU of boxes [n, 4] (centre, size) in pairs."""
    (x1, y1, w1, h1), (x2, y2, w2, h2) = predicted.chunk(4, 1), wanted.chunk(4, 1)
    left1, right1, top1, bottom1 = x1 - w1 / 2, x1 + w1 / 2, y1 - h1 / 2, y1 + h1 / 2
    left2, right2, top2, bottom2 = x2 - w2 / 2, x2 + w2 / 2, y2 - h2 / 2, y2 + h2 / 2
    inter = (right1.minimum(right2) - left1.maximum(left2)).clamp(0) * (
        bottom1.minimum(bottom2) - top1.maximum(top2)
    ).clamp(0)
    iou = inter / (w1 * h1 + w2 * h2 - inter + eps)
    width = right1.maximum(right2) - left1.minimum(left2)
    height = bottom1.maximum(bottom2) - top1.minimum(top2)
    diagonal = width**2 + height**2 + eps
    distance = ((left2 + right2 - left1 - right1) ** 2 + (top2 + bottom2 - top1 - bottom1) ** 2) / 4
    v = (4 / math.pi**2) * (torch.atan(w2 / h2) - torch.atan(w1 / h1)) ** 2
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return (iou - (distance / diagonal + v * alpha)).squeeze(1)


def eager_loss(
    predictions: Sequence[Tensor], targets: Tensor, anchors: Tensor, gains: tuple[float, float, float], threshold: float
) -> Tensor:
    """Total loss of one model.

    Args:
        predictions: L tensors [B, A, H, W, 5+C].
        targets: [n, 6] without padding rows.
        anchors: [L, A, 2] grid units.
        gains: effective box, obj, cls.
        threshold: anchor_t.
    """
    weight = torch.tensor([1.0], device=targets.device)
    bce_cls, bce_obj = torch.nn.BCEWithLogitsLoss(pos_weight=weight), torch.nn.BCEWithLogitsLoss(pos_weight=weight)
    box_loss = obj_loss = cls_loss = torch.zeros(1, device=targets.device)
    for i, prediction in enumerate(predictions):
        rows, columns = prediction.shape[2:4]
        index, box, anchor, classes = eager_targets(targets, anchors[i], rows, columns, threshold)
        wanted = torch.zeros(prediction.shape[:4], dtype=prediction.dtype, device=prediction.device)
        if len(classes):
            matched = prediction[index]
            centre, size = matched[:, :2].sigmoid() * 2 - 0.5, (matched[:, 2:4].sigmoid() * 2) ** 2 * anchor
            iou = eager_ciou(torch.cat((centre, size), 1), box)
            box_loss = box_loss + (1 - iou).mean()
            wanted[index] = iou.detach().clamp(0).type(wanted.dtype)
            if matched.shape[1] > 6:
                cls_loss = cls_loss + bce_cls(matched[:, 5:], F.one_hot(classes, matched.shape[1] - 5).to(matched))
        obj_loss = obj_loss + bce_obj(prediction[..., 4], wanted) * DEFAULT_BALANCE[i]
    total = box_loss * gains[0] + obj_loss * gains[1] + cls_loss * gains[2]
    return total * predictions[0].shape[0]


# ------------------------------------------------------------------------------------------- the measurement


def random_targets(generator: torch.Generator) -> Tensor:
    count = BATCH_SIZE * OBJECTS_PER_IMAGE
    image = torch.arange(BATCH_SIZE).repeat_interleave(OBJECTS_PER_IMAGE).float()[:, None]
    classes = torch.randint(NUM_CLASSES, (count, 1), generator=generator).float()
    centre = torch.rand(count, 2, generator=generator)
    size = torch.rand(count, 2, generator=generator) * 0.4 + 0.05
    return torch.cat((image, classes, centre, size), 1)


def random_predictions(slots: int, image_size: int, device: torch.device) -> list[Tensor]:
    """Leaves with the strides that the head gives: channels last, so the 5+C outputs of a cell are contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH_SIZE, image_size // stride, image_size // stride, slots, 3, 5 + NUM_CLASSES) for stride in STRIDES]
    raw = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    return [level.permute(3, 0, 4, 1, 2, 5).requires_grad_() for level in raw]


def milliseconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / repeats * 1000


def contenders(image_size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    targets = random_targets(torch.Generator().manual_seed(1)).to(device)
    anchors = (default_anchors() / torch.tensor(STRIDES).view(-1, 1, 1)).to(device)
    hyp = Hyperparameters()
    one = LossWeights.from_hyperparameters(hyp, NUM_CLASSES, image_size).to(device, torch.float32)
    gains = (float(one.box), float(one.obj), float(one.cls))
    grids = [(image_size // stride, image_size // stride) for stride in STRIDES]
    lone = [level[0].detach().requires_grad_() for level in random_predictions(1, image_size, device)]

    def eager() -> None:
        torch.autograd.grad(eager_loss(lone, targets, anchors, gains, hyp.anchor_t), lone)

    def shared(slots: int) -> Callable[[], object]:
        raw, weights = random_predictions(slots, image_size, device), LossWeights.stack([one] * slots)

        def step() -> None:
            assignment = assign_targets(targets, grids, anchors, BATCH_SIZE, hyp.anchor_t)
            total = detection_loss(raw, assignment, weights).total
            torch.autograd.grad(total, raw, torch.ones_like(total))

        return step

    return {"eager K=1": eager, "core K=1": shared(1), "core K=8": shared(8)}


def measure(image_size: int, device: torch.device, rounds: int, repeats: int) -> dict[str, float]:
    steps = contenders(image_size, device)
    best = dict.fromkeys(steps, math.inf)
    for number in range(rounds + 1):
        for name, step in steps.items():
            spent = milliseconds(step, device, repeats)
            if number:  # the first round warms up
                best[name] = min(best[name], spent)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one image size, fewer rounds: seconds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    image_sizes, rounds = ([160], 5) if options.quick else ([96, 160, 320, 640], 15)
    table = {size: measure(size, device, rounds, 10) for size in image_sizes}
    ratios = {size: row["eager K=1"] / (row["core K=8"] / 8) for size, row in table.items()}
    if options.json:
        print(json.dumps({"milliseconds": table, "ratio_per_slot": ratios, "device": str(device)}))
        return
    print(
        f"{'px':>5} {'eager K=1':>10} {'core K=1':>10} {'core K=8':>10} {'K=8 per slot':>13}   ms, forward + backward"
    )
    for size, row in table.items():
        print(f"{size:5d} " + " ".join(f"{value:10.2f}" for value in row.values()) + f" {row['core K=8'] / 8:13.2f}")
    print(
        "eager K=1 against the core per slot at K=8: "
        + ", ".join(f"{r:.1f} times at {s} px" for s, r in ratios.items())
    )


if __name__ == "__main__":
    main()
