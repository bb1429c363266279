"""Batches: the stream is a function of (seed, epoch, image), validation batches are the reference's."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from yolocore.data.augment import AugmentSettings
from yolocore.data.dataset import LabelledImage, Split
from yolocore.data.loader import Batch, ImageCache, TrainLoader, ValLoader, pad_targets, plan_rect_batches
from yolocore.errors import DatasetError
from yolocore.hyperparameters import Hyperparameters

RECT_CASES = {
    "bs4_img640_pad0.5_stride32": (4, 640, 0.5, 32),
    "bs3_img320_pad0.5_stride32": (3, 320, 0.5, 32),
    "bs4_img320_pad0.0_stride32": (4, 320, 0.0, 32),
    "bs2_img160_pad0.5_stride64": (2, 160, 0.5, 64),
}


@pytest.fixture(scope="module")
def geometry(small_golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(small_golden_dir / "geometry.npz"))


def make_split(folder: Path, sizes: list[tuple[int, int]], labels: list[np.ndarray]) -> Split:
    images = []
    for index, (size, rows) in enumerate(zip(sizes, labels, strict=True)):
        path = folder / f"{index:02d}.png"
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        assert cv2.imwrite(str(path), pixels)
        images.append(LabelledImage(path, rows.astype(np.float32), size))
    return Split(images=tuple(images), problems=())


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Eleven images of different shapes, the third without labels."""
    rng = np.random.default_rng(0)
    sizes = [(40 + 5 * index, 90 - 4 * index) for index in range(11)]
    labels = [
        np.column_stack((rng.integers(0, 3, n), rng.uniform(0.3, 0.7, (n, 2)), rng.uniform(0.2, 0.5, (n, 2))))
        for n in (2, 1, 0, 3, 2, 4, 1, 2, 2, 1, 3)
    ]
    return make_split(tmp_path_factory.mktemp("images"), sizes, labels)


@pytest.fixture(scope="module")
def reference(split: Split) -> list[list[Batch]]:
    """Two epochs made in this process."""
    loader = TrainLoader(split, Hyperparameters(mixup=0.5), 64, 4, stream_seed=9)
    return [list(loader.epoch(epoch)) for epoch in range(2)]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert [batch.index for batch in first] == [batch.index for batch in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert one.infos == other.infos


# ------------------------------------------------------------------------------------------- training


def test_train_loader_epoch_shapes_and_every_image_once(reference: list[list[Batch]]) -> None:
    for batches in reference:
        assert [tuple(batch.images.shape) for batch in batches] == [(4, 3, 64, 64), (4, 3, 64, 64), (3, 3, 64, 64)]
        assert all(batch.images.dtype == torch.uint8 for batch in batches)
        assert sorted(row for batch in batches for row in batch.index) == list(range(11))
    assert [batch.index for batch in reference[0]] != [batch.index for batch in reference[1]]


def test_train_loader_targets_valid_rows_first_then_padding(reference: list[list[Batch]]) -> None:
    for batch in (batch for batches in reference for batch in batches):
        rows = batch.targets
        valid = rows[:, 0] >= 0
        count = int(valid.sum())
        assert len(rows) % 32 == 0
        assert valid[:count].all()
        assert (rows[count:] == torch.tensor([-1.0, 0, 0, 0, 0, 0])).all()
        assert (rows[:count, 0].diff() >= 0).all()
        assert set(rows[:count, 0].tolist()) <= set(range(len(batch.index)))
        assert (rows[:count, 2:] >= 0).all()
        assert (rows[:count, 2:] <= 1).all()


def test_train_loader_two_worker_processes_same_stream(split: Split, reference: list[list[Batch]]) -> None:
    before = torch.random.get_rng_state()
    loader = TrainLoader(split, Hyperparameters(mixup=0.5), 64, 4, stream_seed=9, workers=2)
    try:
        next(loader.epoch(0))  # an epoch left unfinished must not leak into the next
        for epoch in (1, 0):
            assert_same(list(loader.epoch(epoch)), reference[epoch])
    finally:
        loader.close()
    assert torch.equal(before, torch.random.get_rng_state())


def test_train_loader_worker_meets_missing_image_one_line(split: Split, tmp_path: Path) -> None:
    gone = LabelledImage(tmp_path / "gone.png", np.zeros((0, 5), np.float32), (20, 20))
    loader = TrainLoader(Split((gone,), ()), AugmentSettings(), 64, 4, 0, cache="none", workers=1)
    try:
        with pytest.raises(DatasetError, match=r"gone\.png: cannot read the image \(No such file") as caught:
            list(loader.epoch(0))
    finally:
        loader.close()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_train_loader_other_batch_size_same_samples(
    batch_size: int, split: Split, reference: list[list[Batch]]
) -> None:
    loader = TrainLoader(split, Hyperparameters(mixup=0.5), 64, batch_size, stream_seed=9)
    batches = list(loader.epoch(1))
    assert len(batches) == len(loader) == -(-11 // batch_size)
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(images, torch.cat([batch.images for batch in reference[1]]))


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_train_loader_other_cache_same_stream(
    cache: Any, split: Split, reference: list[list[Batch]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOSEARCH_CACHE_DIR", str(tmp_path / "cache"))
    loader = TrainLoader(split, Hyperparameters(mixup=0.5), 64, 4, 9, cache=cache)
    for _ in range(2):  # the second time from what the first has kept
        assert_same(list(loader.epoch(0)), reference[0])
        assert_same(list(loader.epoch(1)), reference[1])
    assert len(list(tmp_path.glob("cache/*/*.npy"))) == (11 if cache == "disk" else 0)


def test_train_loader_other_seed_other_stream(split: Split, reference: list[list[Batch]]) -> None:
    other = TrainLoader(split, Hyperparameters(mixup=0.5), 64, 4, stream_seed=10)
    assert [batch.index for batch in other.epoch(0)] != [batch.index for batch in reference[0]]


def test_train_loader_restarted_same_images_new_stream(split: Split, reference: list[list[Batch]]) -> None:
    first = TrainLoader(split, AugmentSettings(), 64, 4, stream_seed=1)
    again = first.restarted(Hyperparameters(mixup=0.5), stream_seed=9)
    assert again.images is first.images
    assert_same(list(again.epoch(0)), reference[0])


def test_train_loader_no_augmentation_letterboxed_image_and_its_labels(split: Split) -> None:
    batch = next(TrainLoader(split, AugmentSettings(), 90, 11, stream_seed=0).epoch(0))
    position = batch.index.index(0)
    native = cv2.imread(str(split.images[0].image))[..., ::-1].transpose(2, 0, 1)
    assert (batch.images[position, :, 25:65].numpy() == native).all()
    assert (batch.images[position, :, :25] == 114).all()
    rows = batch.targets[batch.targets[:, 0] == position].numpy()
    expected = split.images[0].labels.copy()
    expected[:, 2] = (expected[:, 2] * 40 + 25) / 90
    expected[:, 4] *= 40 / 90
    np.testing.assert_allclose(rows[:, 1:], expected, atol=2e-5)


def test_pad_targets_counts_padded_to_a_multiple_of_32() -> None:
    assert [len(pad_targets([np.zeros((n, 5), np.float32)])) for n in (0, 1, 32, 33)] == [32, 32, 32, 64]


# ------------------------------------------------------------------------------------------- rect


def test_train_loader_rect_batches_by_aspect_every_epoch_alike(split: Split) -> None:
    loader = TrainLoader(split, Hyperparameters(mixup=0.5), 64, 4, stream_seed=9, rect=True)
    first, second = list(loader.epoch(0)), list(loader.epoch(1))
    order = [row for batch in first for row in batch.index]
    aspects = [split.images[row].size[0] / split.images[row].size[1] for row in order]
    assert aspects == sorted(aspects)
    assert [batch.index for batch in second] == [batch.index for batch in first]
    assert [tuple(batch.images.shape) for batch in first] == [(4, 3, 64, 64), (4, 3, 64, 64), (3, 3, 64, 64)]
    pairs = TrainLoader(split, AugmentSettings(), 160, 2, 9, rect=True).epoch(0)
    wide = [tuple(batch.images.shape[2:]) for batch in pairs]
    assert wide == [(96, 160), (128, 160), (160, 160), (160, 160), (160, 128), (160, 96)]
    assert not torch.equal(first[0].images, second[0].images)  # still augmented


def test_train_loader_rect_two_worker_processes_share_the_disk_cache_same_stream(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOSEARCH_CACHE_DIR", str(tmp_path))
    before = sorted(path.name for path in split.images[0].image.parent.iterdir())
    hyp = Hyperparameters(degrees=10, flipud=0.5)
    here = list(TrainLoader(split, hyp, 96, 3, stream_seed=9, rect=True).epoch(2))
    loader = TrainLoader(split, hyp, 96, 3, stream_seed=9, cache="disk", rect=True, workers=2)
    try:
        assert_same(list(loader.epoch(2)), here)
    finally:
        loader.close()
    assert sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file()) == [".npy"] * 11
    assert sorted(path.name for path in split.images[0].image.parent.iterdir()) == before


def test_train_loader_rect_images_letterboxed_without_waste_and_enlarged(tmp_path: Path) -> None:
    labels = [np.array([[1, 0.5, 0.5, 0.5, 0.5]])] * 2
    split = make_split(tmp_path, [(40, 80), (20, 40)], labels)
    (batch,) = TrainLoader(split, AugmentSettings(), 128, 2, stream_seed=0, rect=True).epoch(0)
    assert tuple(batch.images.shape) == (2, 3, 64, 128)
    assert not (batch.images == 114).all(dim=1).all(dim=2).any()
    np.testing.assert_allclose(batch.targets[:2], [[0, 1, 0.5, 0.5, 0.5, 0.5], [1, 1, 0.5, 0.5, 0.5, 0.5]], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_train_loader_rect_golden_sizes_same_batches(
    batch_size: int, geometry: dict[str, np.ndarray], tmp_path: Path
) -> None:
    sizes = [tuple(size) for size in geometry["rect/image_hw"].tolist()]
    split = make_split(tmp_path, sizes, [np.zeros((0, 5))] * len(sizes))
    loader = TrainLoader(split, AugmentSettings(), 320, batch_size, stream_seed=0, cache="none", rect=True)
    batches = list(loader.epoch(0))
    if batch_size == 4:
        case = "rect/bs4_img320_pad0.0_stride32"
        assert [row for batch in batches for row in batch.index] == geometry[f"{case}/order"].tolist()
        assert [list(batch.images.shape[2:]) for batch in batches] == geometry[f"{case}/batch_shapes_hw"].tolist()
    assert len(batches) == len(loader) == -(-14 // batch_size)


# ------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("case", RECT_CASES)
def test_plan_rect_batches_golden_sizes_same_batches(case: str, geometry: dict[str, np.ndarray]) -> None:
    batch_size, image_size, pad, stride = RECT_CASES[case]
    sizes = [tuple(size) for size in geometry["rect/image_hw"].tolist()]
    batches = plan_rect_batches(sizes, batch_size, image_size, stride=stride, pad=pad)
    assert [row for batch in batches for row in batch.index] == geometry[f"rect/{case}/order"].tolist()
    assert [list(batch.shape) for batch in batches] == geometry[f"rect/{case}/batch_shapes_hw"].tolist()
    numbers = [number for number, batch in enumerate(batches) for _ in batch.index]
    assert numbers == geometry[f"rect/{case}/batch_index"].tolist()


@pytest.mark.parametrize("case", ["bs4_img640_pad0.5_stride32", "bs3_img320_pad0.5_stride32"])
def test_val_loader_golden_images_same_labels_and_infos(
    case: str,
    geometry: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    batch_size, image_size, _, _ = RECT_CASES[case]
    sizes = [tuple(size) for size in geometry["rect/image_hw"].tolist()]
    split = make_split(tmp_path, sizes, [geometry[f"rect/labels_{index}"] for index in range(len(sizes))])
    position = 0
    for batch in ValLoader(split, image_size, batch_size):
        for place, info in enumerate(batch.infos):
            rows = batch.targets[batch.targets[:, 0] == place, 1:].numpy()
            expected = geometry[f"rect/{case}/labels_out_{position}"]
            np.testing.assert_allclose(rows, expected[:, 1:].reshape(-1, 5), atol=1e-6, rtol=0)
            native_and_out = geometry[f"rect/{case}/native_hw_out_hw"][position].tolist()
            assert [*info.native, *batch.images.shape[2:]] == native_and_out
            gain, _, pad_x, pad_y = geometry[f"rect/{case}/gain_hh0_ww0_padx_pady"][position].tolist()
            assert (info.gain, info.pad) == (pytest.approx(gain, abs=1e-12), (pad_x, pad_y))
            position += 1
    assert position == 14


def test_val_loader_worker_process_same_batches_every_pass(split: Split) -> None:
    here = list(ValLoader(split, 64, 4))
    there = ValLoader(split, 64, 4, workers=1)
    try:
        assert len(there) == 3
        assert_same(list(there), here)
        assert_same(list(there), here)
    finally:
        there.close()


# ------------------------------------------------------------------------------------------- cache


def test_image_cache_ram_survives_deleted_files_and_none_does_not(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(split.images[0].image.read_bytes())
    item = LabelledImage(path, split.images[0].labels, split.images[0].size)
    kept = ImageCache([item], 64, "ram", augmenting=True)
    read = ImageCache([item], 64, "none", augmenting=True)
    assert (kept[0] == read[0]).all()
    path.unlink()
    assert kept[0].shape == (29, 64, 3)
    with pytest.raises(DatasetError, match=r"a\.png: cannot read the image"):
        read[0]


def test_image_cache_shared_pickled_without_pixels_and_file_removed(split: Split) -> None:
    cache = ImageCache(split.images, 64, "ram", augmenting=True, shared=True)
    file = cache._file
    assert file is not None
    data = pickle.dumps(cache)
    assert len(data) < cache[0].nbytes
    copy = pickle.loads(data)  # noqa: S301
    assert (copy[3] == cache[3]).all()
    del copy
    assert file.exists()
    del cache
    assert not file.exists()


def test_image_cache_image_replaced_after_scan_refused(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((30, 30, 3), np.uint8))
    item = LabelledImage(path, split.images[0].labels, (30, 60))
    with pytest.raises(DatasetError, match=r"a\.png: image is 30x30 pixels now and was 60x30"):
        ImageCache([item], 64, "ram", augmenting=True)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LabelledImage, Path]:
    """A black image of 64x64 pixels, and the empty folder of the disk cache."""
    monkeypatch.setenv("YOLOSEARCH_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.zeros((64, 64, 3), np.uint8))
    return LabelledImage(path, np.zeros((0, 5), np.float32), (64, 64)), tmp_path / "cache"


def test_image_cache_disk_decodes_once(kept: tuple[LabelledImage, Path]) -> None:
    item, folder = kept
    assert ImageCache([item], 64, "disk", augmenting=True)[0].max() == 0
    (file,) = folder.glob("*/*.npy")
    np.save(file, np.full((64, 64, 3), 9, np.uint8))
    assert ImageCache([item], 64, "disk", augmenting=True)[0].max() == 9


def test_image_cache_disk_changed_image_read_anew(kept: tuple[LabelledImage, Path]) -> None:
    item, _ = kept
    cache = ImageCache([item], 64, "disk", augmenting=True)
    assert cache[0].max() == 0
    cv2.imwrite(str(item.image), np.full((64, 64, 3), 7, np.uint8))
    stamp = item.image.stat().st_mtime
    os.utime(item.image, (stamp + 10, stamp + 10))
    assert cache[0].max() == 7


def test_image_cache_disk_damaged_file_written_anew(kept: tuple[LabelledImage, Path]) -> None:
    item, folder = kept
    cache = ImageCache([item], 64, "disk", augmenting=True)
    assert cache[0].shape == (64, 64, 3)
    (file,) = folder.glob("*/*.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert cache[0].max() == 0
    assert file.read_bytes() == whole


def test_image_cache_more_than_memory_reads_anew_and_warns(split: Split, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cache = ImageCache(split.images, 64, "ram", augmenting=True, memory=1000)
    assert cache.mode == "none"
    assert "images are read anew" in caplog.text
