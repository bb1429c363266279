"""Pictures of one trial."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from search.pictures import draw_pictures
from yolocore.details import EvaluationDetails, ShownImage
from yolocore.metrics import class_curves

NAMES = ("cat", "dog $x$ <b>")


def details(images: int, *, found: bool = True) -> EvaluationDetails:
    count = 8 if found else 0
    curves = class_curves(
        np.ones((count, 10), dtype=np.bool_),
        np.linspace(0.9, 0.1, count, dtype=np.float32),
        np.arange(count, dtype=np.float32) % 2,
        np.array([0.0, 1.0, 1.0]),
    )
    pixels = np.full((60, 90, 3), 90, dtype=np.uint8)
    labels = np.array([[0, 10, 10, 60, 60], [1, 60, 20, 110, 70]], dtype=np.float32)
    boxes = np.array([[12, 8, 58, 62, 0.8, 0]], dtype=np.float32)[:count]
    shown = tuple(ShownImage(pixels, (80, 120), labels, boxes) for _ in range(images))
    ap = np.array([0.6, 0.2]) * found
    return EvaluationDetails(3, curves, ap, ap, np.array([1, 2]), np.array([[1, 0, 1], [0, 1, 0], [0, 1, 0]]), shown)


@pytest.mark.parametrize(("images", "found"), [(16, True), (3, True), (0, False)])
def test_draw_pictures_every_picture_can_be_opened(images: int, found: bool, tmp_path: Path) -> None:
    draw_pictures(details(images, found=found), NAMES, "trial 7", {"cat": 0.5}, tmp_path)

    names = ["2-precision-recall.png", "3-f1-confidence.png", "4-confusion.png", "5-class-ap.png"]
    expected = [*(["1-validation.jpg"] if images else []), *names]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*expected, "class_ap.csv"]
    for name in expected:
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert min(picture.size) > 200


def test_draw_pictures_mosaic_shows_truth_left_and_what_was_found_right(tmp_path: Path) -> None:
    draw_pictures(details(1), NAMES, "trial 7", {}, tmp_path)

    with Image.open(tmp_path / "1-validation.jpg") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    half = pixels.shape[1] // 2
    orange = (np.abs(pixels - [217, 119, 6]).sum(axis=2) < 60).sum(axis=0)  # the second class, which was not found
    assert orange[:half].sum() > 100
    assert orange[half:].sum() < 10


def test_draw_pictures_table_compares_with_the_base(tmp_path: Path) -> None:
    draw_pictures(details(1), NAMES, "trial 7", {"cat": 0.5}, tmp_path)

    rows = list(csv.reader((tmp_path / "class_ap.csv").open()))
    assert rows[0] == ["class", "labels", "AP50", "AP", "AP of the base", "change"]
    assert rows[1] == ["cat", "1", "0.6000", "0.6000", "0.5000", "+0.1000"]
    assert rows[2] == ["dog $x$ <b>", "2", "0.2000", "0.2000", "", ""]
