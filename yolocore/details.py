"""What pictures of one model's evaluation are drawn from: curves, confusions, a few images with their boxes.

Small (a few hundred kilobytes), so that a trial can leave it on disk and whoever wants pictures draws them later.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from yolocore.errors import CheckpointError
from yolocore.metrics import ClassCurves

if TYPE_CHECKING:
    from yolocore.data.loader import ImageInfo

SHOWN_IMAGES = 16
LARGEST_SIDE = 320
"""Of an image that is shown, pixels."""

_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 85)


@dataclass(frozen=True, slots=True, eq=False)
class ShownImage:
    """A validation image with its boxes, in pixels of the native image."""

    pixels: NDArray[np.uint8]
    """[H, W, 3] RGB, without the letterbox's border, at most `LARGEST_SIDE` wide and high."""
    native: tuple[int, int]
    """(height, width) of the frame of the boxes."""
    labels: NDArray[np.float32]
    """[m, 5] class, x1, y1, x2, y2."""
    detections: NDArray[np.float32]
    """[n, 6] x1, y1, x2, y2, score, class; best score first."""


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationDetails:
    """One slot on the whole validation set."""

    epoch: int
    """Counted from 0."""
    curves: ClassCurves
    ap50: NDArray[np.float64]
    """[n] of the classes that have labels; the same for `ap`."""
    ap: NDArray[np.float64]
    label_counts: NDArray[np.int64]
    """[n]"""
    confusion: NDArray[np.int64]
    """[C + 1, C + 1] found by row, there by column; the last one is nothing."""
    images: tuple[ShownImage, ...]


def shown_pixels(image: NDArray[np.uint8], info: "ImageInfo") -> NDArray[np.uint8]:
    """An image of a batch without its border, small enough to be kept.

    Args:
        image: [3, H, W] RGB, the network's input.
        info: How it was fitted.
    """
    (height, width), (left, top) = info.native, info.pad
    rows = slice(round(top), max(round(top + height * info.gain), round(top) + 1))
    columns = slice(round(left), max(round(left + width * info.gain), round(left) + 1))
    inner = np.ascontiguousarray(image[:, rows, columns].transpose(1, 2, 0))
    scale = min(1.0, LARGEST_SIDE / max(inner.shape[:2]))
    size = (max(1, round(inner.shape[1] * scale)), max(1, round(inner.shape[0] * scale)))
    return inner if scale == 1 else cv2.resize(inner, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def save_details(path: Path, details: EvaluationDetails) -> None:
    """Writes everything into one `.npz` file that is read without executing anything."""
    arrays: dict[str, NDArray[Any]] = {
        "epoch": np.array(details.epoch),
        "classes": details.curves.classes,
        "recall": details.curves.recall.astype(np.float32),
        "precision": details.curves.precision.astype(np.float32),
        "confidence": details.curves.confidence.astype(np.float32),
        "f1": details.curves.f1.astype(np.float32),
        "ap50": details.ap50,
        "ap": details.ap,
        "label_counts": details.label_counts,
        "confusion": details.confusion,
    }
    for number, image in enumerate(details.images):
        _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image.pixels, cv2.COLOR_RGB2BGR), _JPEG)
        arrays[f"image{number:02d}_jpeg"] = encoded
        arrays[f"image{number:02d}_native"] = np.array(image.native)
        arrays[f"image{number:02d}_labels"] = image.labels
        arrays[f"image{number:02d}_detections"] = image.detections
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_details(path: Path) -> EvaluationDetails:
    """Reads what `save_details` wrote.

    Raises:
        CheckpointError: The file is damaged or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            return _details({name: found[name] for name in found.files})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, cv2.error) as error:
        raise CheckpointError(f"{path}: no details of an evaluation: {error}") from None


def _details(arrays: dict[str, NDArray[Any]]) -> EvaluationDetails:
    return EvaluationDetails(
        epoch=int(arrays["epoch"]),
        curves=ClassCurves(*(arrays[name] for name in ("classes", "recall", "precision", "confidence", "f1"))),
        ap50=arrays["ap50"],
        ap=arrays["ap"],
        label_counts=arrays["label_counts"],
        confusion=arrays["confusion"],
        images=tuple(_image(arrays, name.removesuffix("_jpeg")) for name in sorted(arrays) if name.endswith("_jpeg")),
    )


def _image(arrays: dict[str, NDArray[Any]], name: str) -> ShownImage:
    decoded = cv2.imdecode(arrays[f"{name}_jpeg"], cv2.IMREAD_COLOR)
    if decoded is None:
        raise ValueError(f"{name} is no image")
    height, width = arrays[f"{name}_native"].tolist()
    return ShownImage(
        pixels=cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB).astype(np.uint8),
        native=(height, width),
        labels=arrays[f"{name}_labels"],
        detections=arrays[f"{name}_detections"],
    )
