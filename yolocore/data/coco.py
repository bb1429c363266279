"""Reads detection data sets in COCO's JSON format."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolocore.data.dataset import SplitName
from yolocore.data.sources import (
    Corners,
    MissingImageError,
    Points,
    SourceDataset,
    SourceImage,
    SourceObject,
    checked_size,
    find_image,
    safe_relative,
)
from yolocore.errors import DatasetError
from yolocore.text import is_unicode

CROWD = "crowd regions"
MISSING = "images that do not exist"
_FARTHEST = 1e9
"""Coordinates are pixels: what is farther out is no coordinate, and squares of much larger ones are no numbers."""
_SPLIT_WORDS: tuple[tuple[SplitName, tuple[str, ...]], ...] = (
    ("train", ("train",)),
    ("val", ("val", "valid", "validation")),
    ("test", ("test",)),
)


def find_coco_files(source: Path) -> dict[SplitName, Path]:
    """The JSON file of each split, by its name or its folder's.

    Args:
        source: A JSON file, which becomes the train split, or a folder: its own ``*.json``, those in ``annotations``,
            and ``<split>/*.json``.

    Returns:
        At least the train split.

    Raises:
        DatasetError: No train split, or two files for one split.
    """
    if source.is_file():
        return {"train": source}
    found: dict[SplitName, list[Path]] = {}
    for file in sorted({*source.glob("*.json"), *source.glob("annotations/*.json"), *source.glob("*/*.json")}):
        split = _split_of(file, source)
        if split is not None:
            found.setdefault(split, []).append(file)
    for split, files in found.items():
        # COCO's own folder also holds captions and keypoints.
        files[:] = [file for file in files if file.stem.startswith("instances_")] or files
        if len(files) > 1:
            names = ", ".join(str(file.relative_to(source)) for file in files)
            raise DatasetError(f"{source}: several files for {split}: {names}; name one with --{split}")
    if "train" not in found:
        raise DatasetError(
            f"{source}: no COCO JSON file for train; expected a name with 'train' in it, or --train FILE"
        )
    return {split: files[0] for split, files in found.items()}


def _split_of(file: Path, source: Path) -> SplitName | None:
    """By the file's name; a name that says nothing leaves it to the folder's."""
    folder = file.parent.name if file.parent != source and file.parent.name != "annotations" else ""
    for text in (file.stem, folder):
        words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
        for split, names in _SPLIT_WORDS:
            if any(name in words for name in names):
                return split
    return None


def read_coco(
    files: Mapping[SplitName, Path],
    root: Path,
    image_folders: Sequence[Path] = (),
    *,
    polygons: bool = True,
    skip_missing: bool = False,
) -> SourceDataset:
    """Read COCO JSON files.

    Args:
        files: The JSON file of each split.
        root: Folder of the data set.
        image_folders: Where the images are; empty: the usual places are tried.
        polygons: Whether to keep segmentations.
        skip_missing: Whether an image that is not there is left out instead of an error.

    Returns:
        The images. Classes are numbered in the order of their category ids.

    Raises:
        DatasetError: One line naming file and entry.
    """
    skipped: Counter[str] = Counter()
    categories: dict[int, str] = {}
    splits: dict[SplitName, list[SourceImage]] = {}
    for split, file in files.items():
        document = _load(file)
        own = _categories(file, document)
        _merge(categories, own, file)
        folders = tuple(image_folders) or _usual_folders(file, root, split)
        reader = _CocoFile(file, own, folders, polygons=polygons, skip_missing=skip_missing, skipped=skipped)
        splits[split] = reader.images(document)
    return SourceDataset(splits, tuple(categories[key] for key in sorted(categories)), skipped)


def _load(file: Path) -> dict[str, list[Any]]:
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"{file}: cannot read the annotations ({error.strerror or error})") from None
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except (RecursionError, ValueError) as error:
        raise DatasetError(f"{file}: not usable JSON ({type(error).__name__})") from None
    if not isinstance(document, dict):
        raise DatasetError(f"{file}: expected a mapping with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise DatasetError(f"{file}: {key}: missing or no list; COCO files hold images, annotations and categories")
    return document


def _categories(file: Path, document: Mapping[str, list[Any]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, entry in enumerate(document["categories"]):
        where = f"{file}: categories[{index}]"
        key = _whole(f"{where}.id", _get(where, entry, "id"))
        name = _get(where, entry, "name")
        if not isinstance(name, str) or not name.strip() or not is_unicode(name):
            raise DatasetError(f"{where}.name: got {name!r}; allowed: text")
        if key in names or name in names.values():
            raise DatasetError(f"{where}: id {key} or name {name!r} appears twice; both must be unique")
        names[key] = name
    return names


def _merge(known: dict[int, str], more: Mapping[int, str], file: Path) -> None:
    for key, name in more.items():
        other = next((number for number, text in known.items() if text == name), key)
        if known.get(key, name) != name or other != key:
            raise DatasetError(f"{file}: category {key} is {name!r}, another split numbers it differently")
        known[key] = name


def _usual_folders(file: Path, root: Path, split: SplitName) -> tuple[Path, ...]:
    """Beside the file, and in the folders that COCO and its exporters use."""
    suffix = file.stem.removeprefix("instances_")
    names = ("", "images", suffix, f"images/{suffix}", split, f"images/{split}", f"{split}/images")
    return (file.parent, *(root / name for name in names))


class _CocoFile:
    """Reads the images of one file."""

    def __init__(
        self,
        file: Path,
        names: Mapping[int, str],
        folders: Sequence[Path],
        *,
        polygons: bool,
        skip_missing: bool,
        skipped: Counter[str],
    ) -> None:
        self.file = file
        self.names = names
        self.folders = folders
        self.polygons = polygons
        self.skip_missing = skip_missing
        self.skipped = skipped

    def images(self, document: Mapping[str, list[Any]]) -> list[SourceImage]:
        numbers = self._image_numbers(document)
        objects: dict[int, list[SourceObject]] = defaultdict(list)
        for index, entry in enumerate(document["annotations"]):
            where = f"{self.file}: annotations[{index}]"
            image = _whole(f"{where}.image_id", _get(where, entry, "image_id"))
            if image not in numbers:
                raise DatasetError(f"{where}.image_id: no image has the id {image}")
            found = self._object(where, entry)
            if found is not None:
                objects[image].append(found)
        images = (self._image(index, entry, objects) for index, entry in enumerate(document["images"]))
        return [image for image in images if image is not None]

    def _image_numbers(self, document: Mapping[str, list[Any]]) -> set[int]:
        numbers: set[int] = set()
        for index, entry in enumerate(document["images"]):
            where = f"{self.file}: images[{index}]"
            number = _whole(f"{where}.id", _get(where, entry, "id"))
            if number in numbers:
                raise DatasetError(f"{where}.id: {number} appears twice; image ids must be unique")
            numbers.add(number)
        return numbers

    def _image(self, index: int, entry: Any, objects: Mapping[int, list[SourceObject]]) -> SourceImage | None:
        where = f"{self.file}: images[{index}]"
        name = safe_relative(f"{where}.file_name", _get(where, entry, "file_name"))
        try:
            file = find_image(f"{where}.file_name", name, self.folders)
        except MissingImageError:
            if not self.skip_missing:
                raise
            self.skipped[MISSING] += 1
            return None
        declared = None
        if entry.get("height") and entry.get("width"):
            declared = (_pixels(f"{where}.height", entry["height"]), _pixels(f"{where}.width", entry["width"]))
        size = checked_size(where, file, declared)
        return SourceImage(where, file, str(name), size, tuple(objects.get(entry["id"], ())))

    def _object(self, where: str, entry: Any) -> SourceObject | None:
        if entry.get("iscrowd"):
            self.skipped[CROWD] += 1
            return None
        category = _whole(f"{where}.category_id", _get(where, entry, "category_id"))
        if category not in self.names:
            raise DatasetError(f"{where}.category_id: no category has the id {category}")
        polygon = _outline(where, entry.get("segmentation")) if self.polygons else None
        return SourceObject(self.names[category], _corners(where, _get(where, entry, "bbox")), polygon)


def _get(where: str, entry: Any, key: str) -> Any:
    if not isinstance(entry, dict) or entry.get(key) is None:
        raise DatasetError(f"{where}.{key}: missing")
    return entry[key]


def _whole(where: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DatasetError(f"{where}: got {value!r}; allowed: a whole number")
    return value


def _pixels(where: str, value: object) -> int:
    """A whole number, also one that some tool has written as 640.0."""
    return _whole(where, int(value) if isinstance(value, float) and value.is_integer() else value)


def _numbers(where: str, value: object) -> list[float]:
    if not isinstance(value, list) or not all(_is_coordinate(v) for v in value):
        raise DatasetError(
            f"{where}: got {str(value)[:60]}; allowed: a list of numbers from {-_FARTHEST:g} to {_FARTHEST:g}"
        )
    return [float(v) for v in value]


def _is_coordinate(value: object) -> bool:
    # Not NaN either, of which no comparison holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and -_FARTHEST <= value <= _FARTHEST


def _corners(where: str, bbox: object) -> Corners:
    numbers = _numbers(f"{where}.bbox", bbox)
    if len(numbers) != 4:
        raise DatasetError(f"{where}.bbox: {len(numbers)} numbers; expected 4: x, y, width, height in pixels")
    x, y, width, height = numbers
    return x, y, x + width, y + height


def _outline(where: str, segmentation: object) -> Points | None:
    """One ring around all parts of an object; None for masks (RLE) and outlines of fewer than three points."""
    if not isinstance(segmentation, list):
        return None
    parts = []
    for index, part in enumerate(segmentation):
        numbers = _numbers(f"{where}.segmentation[{index}]", part)
        if len(numbers) % 2:
            raise DatasetError(f"{where}.segmentation[{index}]: {len(numbers)} numbers; expected pairs x, y")
        if len(numbers) >= 6:
            parts.append(np.array(numbers).reshape(-1, 2))
    return joined_outline(parts) if parts else None


def joined_outline(parts: Sequence[Points]) -> Points:
    """Join the parts of an object by bridges without width, each at the closest pair of corners.

    Args:
        parts: Closed outlines, each float64 [points, 2].

    Returns:
        One closed outline that covers the same area.
    """
    rest = list(parts)
    ring = rest.pop(0)
    while rest:
        distances = [((ring[:, None] - part[None]) ** 2).sum(axis=2) for part in rest]
        nearest = int(np.argmin([distance.min() for distance in distances]))
        here, there = np.unravel_index(int(distances[nearest].argmin()), distances[nearest].shape)
        part = rest.pop(nearest)
        ring = np.concatenate((ring[: here + 1], part[there:], part[: there + 1], ring[here:]))
    return ring
