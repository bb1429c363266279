"""What pictures of an evaluation are drawn from: right, small, safe to read."""

from pathlib import Path

import numpy as np
import pytest
import torch

from yolocore.data.loader import ImageInfo
from yolocore.details import EvaluationDetails, ShownImage, load_details, save_details, shown_pixels
from yolocore.errors import CheckpointError
from yolocore.metrics import class_curves, class_metrics, confusion, smooth


def boxes(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.float32).reshape(len(rows), -1)


def test_confusion_pairs_best_overlaps_first_and_counts_what_is_left() -> None:
    labels = boxes((0, 0, 0, 10, 10), (1, 20, 20, 30, 30), (1, 50, 50, 60, 60))
    detections = boxes(
        (0, 0, 10, 9, 0.9, 0),  # the first label
        (0, 0, 10, 10, 0.5, 2),  # overlaps it better, and is another class
        (20, 20, 30, 30, 0.8, 1),
        (80, 80, 90, 90, 0.7, 2),  # nothing is there
    )

    matrix = confusion(detections, labels, num_classes=3)

    expected = np.zeros((4, 4), dtype=np.int64)
    expected[2, 0] = expected[1, 1] = 1  # rows: found, columns: there
    expected[3, 1] = 1  # the third label was not found
    expected[0, 3] = expected[2, 3] = 1  # two were found where nothing is left
    assert matrix.tolist() == expected.tolist()


@pytest.mark.parametrize(("found", "there"), [(0, 0), (0, 2), (2, 0)])
def test_confusion_without_detections_or_labels_counts_the_others(found: int, there: int) -> None:
    detections = np.tile(np.array([[0, 0, 5, 5, 0.9, 1]], dtype=np.float32), (found, 1))
    labels = np.tile(np.array([[0, 0, 0, 5, 5]], dtype=np.float32), (there, 1))

    matrix = confusion(detections, labels, num_classes=2)

    assert (matrix[2, 0], matrix[1, 2], matrix.sum()) == (there, found, found + there)


def test_class_curves_agree_with_the_metrics() -> None:
    draw = np.random.default_rng(3)
    predicted = draw.integers(0, 3, 200).astype(np.float32)
    correct = np.sort(draw.random((200, 10)) < 0.4, axis=1)[:, ::-1]
    confidence = draw.random(200).astype(np.float32)
    target = draw.integers(0, 3, 150).astype(np.float32)

    curves = class_curves(correct, confidence, predicted, target)

    metrics = class_metrics(correct, confidence, predicted, target)
    areas = np.trapezoid(curves.precision, curves.recall, axis=1)
    assert areas == pytest.approx(metrics.ap[:, 0])
    assert curves.f1[:, smooth(curves.f1.mean(axis=0)).argmax()] == pytest.approx(metrics.f1)


def test_class_curves_class_without_detections_is_flat() -> None:
    nothing = np.zeros((0, 10), dtype=np.bool_), np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.float32)

    curves = class_curves(*nothing, np.array([1.0, 1.0]))

    assert curves.classes.tolist() == [1]
    assert not curves.precision.any()
    assert not curves.f1.any()


def test_shown_pixels_cuts_the_letterbox_border_and_shrinks() -> None:
    image = np.zeros((3, 640, 640), dtype=np.uint8)
    image[0, 80:560] = 255  # a 4:3 image between two borders
    info = ImageInfo(native=(960, 1280), gain=0.5, pad=(0.0, 80.0))

    pixels = shown_pixels(image, info)

    assert pixels.shape == (240, 320, 3)
    assert (pixels[..., 0] == 255).all()
    assert not pixels[..., 1:].any()


def details(images: int = 1) -> EvaluationDetails:
    curves = class_curves(
        np.ones((1, 10), dtype=np.bool_),
        np.array([0.9], dtype=np.float32),
        np.array([0.0], dtype=np.float32),
        np.array([0.0, 1.0]),
    )
    shown = ShownImage(
        np.full((20, 30, 3), 120, dtype=np.uint8),
        (40, 60),
        boxes((0, 1, 1, 20, 20)),
        boxes((1, 1, 20, 20, 0.9, 0)),
    )
    ap, counts = np.array([0.5, 0.0]), np.array([1, 1])
    return EvaluationDetails(4, curves, ap, ap, counts, np.eye(3, dtype=np.int64), (shown,) * images)


def test_save_details_load_details_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "details.npz"

    save_details(path, details(images=2))

    found = load_details(path)
    assert found.epoch == 4
    assert found.confusion.tolist() == np.eye(3).tolist()
    assert found.curves.precision == pytest.approx(details().curves.precision)
    assert len(found.images) == 2
    image, original = found.images[0], details().images[0]
    assert image.native == (40, 60)
    assert np.abs(image.pixels.astype(int) - original.pixels).max() < 8
    assert image.detections.tolist() == original.detections.tolist()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"text"])
def test_load_details_of_something_else_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "details.npz"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="no details of an evaluation"):
        load_details(path)


def test_load_details_executes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "details.npz"
    np.savez(path, epoch=np.array([torch.nn.Linear], dtype=object), allow_pickle=True)

    with pytest.raises(CheckpointError):
        load_details(path)
