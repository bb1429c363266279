"""The built-in digits: an ordinary, deterministic, unbalanced YOLO data set."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from search.demo import DigitsSpec, _scans, write_digits
from search.errors import UserInputError
from yolocore.data import fingerprint, load_dataset_config, scan_split

SMALL = DigitsSpec(images_train=24, images_val=8)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_write_digits_default_spec_unbalanced_with_many_small_objects(tmp_path: Path) -> None:
    spec = DigitsSpec()
    config = load_dataset_config(write_digits(tmp_path / "digits"))
    train, val = scan_split(config, "train"), scan_split(config, "val")
    assert (len(train.images), len(val.images)) == (spec.images_train, spec.images_val)
    assert config.names == tuple(f"digit {digit}" for digit in spec.digits)
    labels = np.concatenate([item.labels for item in train.images])
    shares = np.bincount(labels[:, 0].astype(int), minlength=config.num_classes) / len(labels)
    np.testing.assert_allclose(shares, spec.frequencies, atol=0.06)
    heights = labels[:, 4] * spec.canvas
    assert heights.min() >= spec.sizes[0] - 0.01
    assert heights.max() <= spec.sizes[1] + 0.01
    assert np.mean(heights < 15) > 0.4
    assert set(np.concatenate([item.labels for item in val.images])[:, 0].tolist()) == {0, 1, 2}


def test_write_digits_same_seed_same_files_other_seed_other_files(tmp_path: Path) -> None:
    first = write_digits(tmp_path / "a", 3, SMALL)
    second = write_digits(tmp_path / "b" / "c", 3, SMALL)
    third = write_digits(tmp_path / "d", 4, SMALL)
    assert contents(first.parent) == contents(second.parent)
    assert len({image.stat().st_size for image in first.parent.rglob("*.png")}) == 1
    prints = [fingerprint(load_dataset_config(source)) for source in (first, second, third)]
    assert prints[0] == prints[1] != prints[2]


def test_write_digits_finished_folder_left_alone(tmp_path: Path) -> None:
    source = write_digits(tmp_path / "digits", 0, SMALL)
    stamps = {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")}
    assert write_digits(tmp_path / "digits", 0, SMALL) == source
    assert {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")} == stamps
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_write_digits_other_spec_replaces_the_folder(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", 0, SMALL)
    source = write_digits(tmp_path / "digits", 0, DigitsSpec(images_train=5, images_val=8))
    assert len(list((source.parent / "images" / "train").iterdir())) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_write_digits_folder_of_the_user_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserInputError, match="holds something else"):
        write_digits(tmp_path, 0, SMALL)
    assert contents(tmp_path) == {"mine.txt": b"keep"}


def test_scans_of_training_never_in_validation() -> None:
    train, val = _scans(0, DigitsSpec())
    known = {scan.tobytes() for scans in train for scan in scans}
    kept = [scan.tobytes() for scans in val for scan in scans]
    assert len(kept) > 150
    assert not known.intersection(kept)


def test_write_digits_boxes_hold_high_contrast(tmp_path: Path) -> None:
    split = scan_split(load_dataset_config(write_digits(tmp_path / "digits", 0, SMALL)), "train")
    for item in split.images:
        grey = cv2.imread(str(item.image), cv2.IMREAD_GRAYSCALE).astype(float)
        for _, x, y, w, h in item.labels * SMALL.canvas:
            inside = grey[round(y - h / 2) : round(y + h / 2), round(x - w / 2) : round(x + w / 2)]
            assert inside.max() - inside.min() > 90


@pytest.mark.parametrize(("light_share", "light"), [(0.0, 0), (1.0, 5)])
def test_write_digits_light_share_decides_the_ground(light_share: float, light: int, tmp_path: Path) -> None:
    source = write_digits(tmp_path / "digits", 0, DigitsSpec(images_train=5, images_val=4, light_share=light_share))
    images = (source.parent / "images" / "train").iterdir()
    medians = [np.median(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)) for path in images]
    assert sum(median > 128 for median in medians) == light
