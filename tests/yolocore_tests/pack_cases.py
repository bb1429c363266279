"""Packs of tiny trainings: four trials that differ, images and targets by seed, curves to compare."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from yolocore.data.loader import Batch, ImageInfo, pad_targets
from yolocore.hyperparameters import Hyperparameters
from yolocore.model import initial_state
from yolocore.training.config import TrainConfig
from yolocore.training.pack import Pack, PackSlot, StepResult, fresh_state

CPU = torch.device("cpu")


def padded(targets: np.ndarray, rows: int = 32) -> Tensor:
    out = torch.full((rows, 6), 0.0)
    out[:, 0] = -1
    out[: len(targets)] = torch.from_numpy(targets)
    return out


def widened(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


HYPS = (
    Hyperparameters(),
    Hyperparameters(box=0.1, cls=0.9, obj=1.5, lr0=0.015, momentum=0.8, weight_decay=1e-3, warmup_bias_lr=0.05),
    Hyperparameters(fl_gamma=1.5, cls_pw=2.0, obj_pw=0.7, lrf=0.2, warmup_momentum=0.3),
    Hyperparameters(box=0.02, obj=0.3, obj_pw=2.0, weight_decay=0.0, lr0=0.002, warmup_epochs=0.0),
)
EPOCHS, BATCHES, SIZE = 4, 5, 64


def config(**changes: object) -> TrainConfig:
    base = {"model": "n", "data": Path("none"), "image_size": SIZE, "batch_size": 2, "epochs": EPOCHS}
    return TrainConfig(**(base | changes))


def batches(count: int = BATCHES, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        images = torch.randint(0, 256, (2, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        rows = torch.rand(5, 6, generator=generator)
        rows[:, 0] = torch.tensor([0.0, 0, 0, 1, 1])
        rows[:, 1] = torch.tensor([0.0, 1, 2, 0, 1])
        rows[:, 4:] = 0.1 + 0.5 * rows[:, 4:]
        out.append((images, padded(rows.numpy())))
    return out


def validation_batches() -> list[Batch]:
    """Two batches of different shape: two images of 64 x 96, one of 64 x 64."""
    rng = np.random.default_rng(11)
    batches = []
    for images, width in ((2, 96), (1, 64)):
        labels = [rng.uniform(0.2, 0.8, (4, 5)).astype(np.float32) for _ in range(images)]
        for rows in labels:
            rows[:, 0] = rng.integers(0, 3, 4)
        pixels = torch.from_numpy(rng.integers(0, 256, (images, 3, 64, width), dtype=np.uint8))
        infos = tuple(ImageInfo((128, 2 * width), 0.5, (0.0, 0.0)) for _ in range(images))
        batches.append(Batch(pixels, pad_targets(labels), infos))
    return batches


def make_slots(hyps: Sequence[Hyperparameters], dtype: torch.dtype = torch.float64) -> list[PackSlot]:
    state = fresh_state(widened(initial_state("n", 3, seed=5), dtype))
    return [PackSlot(f"t{i}", hyp, state) for i, hyp in enumerate(hyps)]


def make_pack(slots: Sequence[PackSlot], **changes: object) -> Pack:
    return Pack(config(**changes), slots, num_classes=3, batches_per_epoch=BATCHES, device=CPU)


def train_epoch(pack: Pack, epoch: int = 0) -> list[StepResult]:
    """One epoch on the images of an epoch of the stream."""
    pack.begin_epoch()
    results = [pack.train_step(*batch) for batch in batches(seed=epoch)]
    pack.end_epoch()
    return results


def curve(results: Sequence[StepResult], slot: int) -> Tensor:
    """[steps, 4] of one slot: total and items."""
    return torch.stack([torch.cat([r.total[slot : slot + 1], r.items[slot]]) for r in results])


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert list(a) == list(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
