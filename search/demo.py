"""The built-in data set: real handwritten digits on textured canvases, written as an ordinary YOLO data set.

The digits are the 8x8 scans of the UCI collection that scikit-learn bundles. Classes are deliberately unbalanced and
many objects are small, so that the weights of the loss matter; scans used for validation never occur in training.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from search.errors import UserInputError

UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]

YAML_NAME = "digits.yaml"
_FINISHED = "spec.json"
_LAYOUT = 1
"""Raised when the same spec begins to give other pixels: a folder written before is then made anew."""
_STROKE_LEVELS = 16.0
_UNCOMPRESSED = (cv2.IMWRITE_PNG_COMPRESSION, 0)
"""Another CPU may round a pixel otherwise; without compression the file sizes, hence the fingerprint, stay the same."""
_TRIES_PER_OBJECT = 30
_TOUCHING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsSpec:
    """What the built-in data set looks like; together with a seed it decides every file."""

    images_train: int = 320
    images_val: int = 64
    canvas: int = 64
    """Side of the square images in pixels."""
    digits: tuple[int, ...] = (0, 7, 4)
    """Which digits are classes, from the most to the least frequent; the class index is the position."""
    frequencies: tuple[float, ...] = (0.65, 0.25, 0.10)
    """Share of each class among the objects."""
    objects: tuple[int, int] = (1, 4)
    """Fewest and most objects per image."""
    sizes: tuple[int, int] = (10, 32)
    """Smallest and largest height of a digit in pixels."""
    small_share: float = 0.55
    """Share of the objects whose height lies in the lowest fifth of `sizes`."""
    contrast: float = 0.65
    """Smallest share of the full grey range between stroke and ground."""
    clutter: int = 8
    """Strokes and blobs per image that are no digits."""
    light_share: float = 0.0
    """Share of the images with dark digits on a light ground; the others are light on dark."""
    val_share: float = 0.3
    """Share of the scans of each digit kept for validation."""


def write_digits(folder: Path, seed: int = 0, spec: DigitsSpec | None = None) -> Path:
    """Write the built-in data set, unless the folder holds it already.

    The files are made in a folder beside it and moved into place at the end, so `folder` is complete or absent.

    Args:
        folder: Where to; a folder holding another seed or spec of this data set is replaced.
        seed: Chooses scans, places, textures and clutter.
        spec: What the data set looks like.

    Returns:
        Path of the data set YAML.

    Raises:
        UserInputError: `folder` exists and was not written by this function.
    """
    spec = spec or DigitsSpec()
    identity = json.dumps({"layout": _LAYOUT, "seed": seed, **asdict(spec)}, indent=1)
    if _is_finished(folder, identity):
        return folder / YAML_NAME
    if folder.exists() and any(folder.iterdir()) and not (folder / _FINISHED).is_file():
        raise UserInputError(f"{folder}: exists and holds something else; name another folder for the built-in digits")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(temporary, seed, spec)
        (temporary / _FINISHED).write_text(identity, encoding="utf-8")
        temporary.chmod(0o755)
        _move_into_place(temporary, folder, identity)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / YAML_NAME


def _is_finished(folder: Path, identity: str) -> bool:
    try:
        return (folder / _FINISHED).read_text(encoding="utf-8") == identity
    except OSError:
        return False


def _move_into_place(temporary: Path, folder: Path, identity: str) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.replace(old / "data")
        shutil.rmtree(old, ignore_errors=True)
    try:
        temporary.replace(folder)
    except OSError:
        # Another process was faster; both write the same files, so its folder is as good.
        if not _is_finished(folder, identity):
            raise


def _write(folder: Path, seed: int, spec: DigitsSpec) -> None:
    scans = _scans(seed, spec)
    for number, (split, count) in enumerate((("train", spec.images_train), ("val", spec.images_val))):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, number + 1, index])
            canvas, rows = _image(rng, scans[number], spec)
            cv2.imwrite(str(images / f"{index:05d}.png"), canvas, _UNCOMPRESSED)
            text = "".join(f"{int(row[0])} {' '.join(f'{value:.6f}' for value in row[1:])}\n" for row in rows)
            (labels / f"{index:05d}.txt").write_text(text, encoding="utf-8")
    document = {
        "path": ".",
        "train": "images/train",
        "val": "images/val",
        "names": {index: f"digit {digit}" for index, digit in enumerate(spec.digits)},
    }
    header = "# Handwritten digits (UCI, bundled with scikit-learn) on textured canvases. Written by yolosearch.\n"
    (folder / YAML_NAME).write_text(header + yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def _scans(seed: int, spec: DigitsSpec) -> tuple[list[UInt8Array], list[UInt8Array]]:
    """Scans per class, uint8 [n, 8, 8] with values 0 to 255, for training and for validation."""
    from sklearn.datasets import load_digits  # a second to import, and only this function needs it

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / _STROKE_LEVELS)).astype(np.uint8)
    rng = np.random.default_rng([seed, 0, 1])
    train, val = [], []
    for digit in spec.digits:
        rows = rng.permutation(np.flatnonzero(bunch.target == digit))
        kept = round(len(rows) * spec.val_share)
        val.append(pixels[rows[:kept]])
        train.append(pixels[rows[kept:]])
    return train, val


def _image(rng: np.random.Generator, scans: list[UInt8Array], spec: DigitsSpec) -> tuple[UInt8Array, list[list[float]]]:
    """One canvas (uint8 [side, side, 3] BGR) and its label rows (class, x, y, w, h as fractions)."""
    canvas, ground = _texture(rng, spec.canvas, spec.light_share)
    _clutter(rng, canvas, ground, spec)
    rows: list[list[float]] = []
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(int(rng.integers(spec.objects[0], spec.objects[1] + 1))):
        label = int(rng.choice(len(spec.digits), p=np.array(spec.frequencies) / sum(spec.frequencies)))
        stroke = _stroke(rng, scans[label], spec)
        place = _free_place(rng, stroke.shape[:2], taken, spec.canvas)
        if place is None:
            continue
        _draw(rng, canvas, ground, stroke, place, spec)
        taken.append(place)
        left, top, right, bottom = place
        box = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
        rows.append([label, *(value / spec.canvas for value in box)])
    noise = rng.standard_normal(canvas.shape, dtype=np.float32) * 4
    return np.clip(canvas + noise, 0, 255).astype(np.uint8), rows


def _texture(rng: np.random.Generator, side: int, light_share: float) -> tuple[Float32Array, float]:
    """A canvas of smooth patches around one grey level, float32 [side, side, 3], and that level."""
    ground = float(rng.uniform(165, 235) if rng.random() < light_share else rng.uniform(20, 90))
    coarse = rng.normal(0, 14, (6, 6, 3)).astype(np.float32)
    fine = rng.normal(0, 7, (side // 4, side // 4, 3)).astype(np.float32)
    texture = sum(cv2.resize(layer, (side, side), interpolation=cv2.INTER_LINEAR) for layer in (coarse, fine))
    return np.asarray(ground + texture, dtype=np.float32), ground


def _clutter(rng: np.random.Generator, canvas: Float32Array, ground: float, spec: DigitsSpec) -> None:
    """Lines and blobs of lower contrast than the digits."""
    side = spec.canvas
    for _ in range(spec.clutter):
        level = ground + (1 if ground < 128 else -1) * rng.uniform(20, 70)
        colour = tuple(float(level + shift) for shift in rng.uniform(-20, 20, 3))
        start = rng.integers(0, side, 2)
        if rng.random() < 0.6:
            end = start + rng.integers(-side // 4, side // 4 + 1, 2)
            cv2.line(canvas, start.tolist(), end.tolist(), colour, int(rng.integers(1, 3)), cv2.LINE_AA)
        else:
            axes = rng.integers(1, max(2, side // 12), 2)
            cv2.ellipse(
                canvas, start.tolist(), axes.tolist(), float(rng.uniform(0, 180)), 0, 360, colour, 1, cv2.LINE_AA
            )


def _stroke(rng: np.random.Generator, scans: UInt8Array, spec: DigitsSpec) -> Float32Array:
    """A scan cropped to its ink and enlarged: opacity float32 [h, w] in 0 to 1."""
    scan = scans[rng.integers(len(scans))]
    ys, xs = np.nonzero(scan > 40)
    ink = scan[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    smallest, largest = spec.sizes
    middle = smallest + (largest - smallest) / 5
    small = rng.random() < spec.small_share
    height = round(float(rng.uniform(smallest, middle) if small else rng.uniform(middle, largest)))
    width = max(4, round(height * ink.shape[1] / ink.shape[0]))
    grown = cv2.resize(ink, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(grown, dtype=np.float32) / np.float32(255)


def _free_place(
    rng: np.random.Generator,
    size: tuple[int, ...],
    taken: list[tuple[int, int, int, int]],
    side: int,
) -> tuple[int, int, int, int] | None:
    """Corners (left, top, right, bottom) of a place that touches no other object, or None if none was found."""
    height, width = size
    if height > side or width > side:
        return None
    for _ in range(_TRIES_PER_OBJECT):
        left, top = int(rng.integers(0, side - width + 1)), int(rng.integers(0, side - height + 1))
        right, bottom = left + width, top + height
        free = all(
            right + _TOUCHING <= other[0]
            or other[2] + _TOUCHING <= left
            or bottom + _TOUCHING <= other[1]
            or other[3] + _TOUCHING <= top
            for other in taken
        )
        if free:
            return left, top, right, bottom
    return None


def _draw(
    rng: np.random.Generator,
    canvas: Float32Array,
    ground: float,
    stroke: Float32Array,
    place: tuple[int, int, int, int],
    spec: DigitsSpec,
) -> None:
    """Blend a stroke into the canvas with a colour far from the ground's grey."""
    left, top, right, bottom = place
    distance = rng.uniform(spec.contrast, max(spec.contrast, 0.9)) * 255
    level = ground + distance if ground < 128 else ground - distance
    colour = np.clip(level + rng.uniform(-25, 25, 3), 0, 255).astype(np.float32)
    opacity = np.clip(stroke * 1.4, 0, 1)[..., None]
    region = canvas[top:bottom, left:right]
    region[...] = region * (1 - opacity) + colour * opacity
