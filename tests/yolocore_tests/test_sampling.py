"""Image weights against the reference, and the weighted stream."""

from pathlib import Path

import numpy as np
import pytest
import torch

from yolocore.data.augment import AugmentSettings
from yolocore.data.dataset import LabelledImage, Split
from yolocore.data.images import read_image
from yolocore.data.loader import TrainLoader
from yolocore.data.sampling import class_weights, draw_images, image_weights
from yolocore.hyperparameters import Hyperparameters


def labels_of(golden: np.lib.npyio.NpzFile) -> list[np.ndarray]:
    rows = golden["class_weights/labels"]
    return [np.pad(rows[rows[:, 0] == image, 1:], ((0, 0), (0, 4))).astype(np.float32) for image in range(4)]


def test_class_and_image_weights_match_golden(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "schedules.npz")
    labels = labels_of(golden)

    weights = class_weights(labels, 5)

    np.testing.assert_allclose(weights, golden["class_weights/out_nc5"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(image_weights(labels, weights), golden["image_weights/out"], rtol=0, atol=1e-7)


def test_draw_images_follows_the_weights_and_never_draws_a_zero() -> None:
    weights = np.tile([3.0, 1.0, 0.0], 2000)
    drawn = np.array(draw_images(weights, np.random.default_rng(0))) % 3
    assert len(drawn) == 6000
    assert (drawn == 2).sum() == 0
    assert (drawn == 0).mean() == pytest.approx(0.75, abs=0.02)
    assert len(set(draw_images(np.zeros(100), np.random.default_rng(0)))) > 50


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Twelve images, of which the last alone holds class 1."""
    import cv2

    folder = tmp_path_factory.mktemp("weighted")
    images = []
    for index in range(12):
        path = folder / f"{index:02}.png"
        cv2.imwrite(str(path), np.full((64, 64, 3), index * 20, dtype=np.uint8))
        label = np.array([[int(index == 11), 0.5, 0.5, 0.5, 0.5]], dtype=np.float32)
        images.append(LabelledImage(path, label, read_image(path).shape[:2]))
    return Split(tuple(images), ())


def stream(split: Split, workers: int = 0, mosaic: float = 0.0) -> TrainLoader:
    settings = AugmentSettings.from_hyperparameters(Hyperparameters(mosaic=mosaic))
    return TrainLoader(split, settings, 64, 4, stream_seed=3, workers=workers)


def test_weighted_epoch_draws_the_rare_class_and_augments_each_draw_anew(split: Split) -> None:
    loader = stream(split)
    batches = list(loader.epoch(0, (0.1, 0.9)))
    index = [row for batch in batches for row in batch.index]

    assert len(batches) == len(loader) == 3
    assert len(index) == 12
    assert index.count(11) >= 3  # 45 % of the draws
    images = torch.cat([batch.images for batch in batches])
    own = [images[place] for place, row in enumerate(index) if row == 11]
    assert not torch.equal(own[0], own[1])
    assert [batch.index for batch in loader.epoch(1, (0.1, 0.9))] != [batch.index for batch in batches]
    assert sorted(row for batch in loader.epoch(0) for row in batch.index) == list(range(12))


def test_weighted_epoch_makes_mosaics_of_drawn_images_only(split: Split) -> None:
    batches = list(stream(split, mosaic=1.0).epoch(0, (0.0, 1.0)))
    classes = torch.cat([batch.targets[batch.targets[:, 0] >= 0, 1] for batch in batches])
    assert classes.unique().tolist() == [1.0]


def test_weighted_epoch_is_the_same_with_worker_processes(split: Split) -> None:
    lone, shared = stream(split, mosaic=1.0), stream(split, workers=2, mosaic=1.0)
    for one, other in zip(lone.epoch(2, (0.2, 0.8)), shared.epoch(2, (0.2, 0.8)), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
    shared.close()
