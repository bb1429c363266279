"""Writes a data set that another format's reader gave as YOLO folders with a data set YAML."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from yolocore.data.dataset import SplitName
from yolocore.data.images import label_path
from yolocore.data.sources import Points, SourceDataset, SourceImage, SourceObject
from yolocore.errors import DatasetError
from yolocore.text import one_line

YAML_NAME = "data.yaml"
MARK = "# Converted by yolosearch from "
"""First words of the YAML: only a folder whose YAML starts so is ever replaced."""
NO_AREA = "boxes without area inside the image"
NOT_LISTED = "objects of classes that are not listed"
_ORDER: tuple[SplitName, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What was written, and what was not."""

    yaml: Path
    names: tuple[str, ...]
    images: Mapping[SplitName, int]
    background: Mapping[SplitName, int]
    """Images without objects."""
    boxes: Mapping[SplitName, tuple[int, ...]]
    """Boxes of each class."""
    polygons: int
    skipped: Mapping[str, int]
    """Why something was left out, and how often."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "yaml": str(self.yaml),
            "names": list(self.names),
            "images": dict(self.images),
            "background": dict(self.background),
            "boxes": {split: dict(zip(self.names, counts, strict=True)) for split, counts in self.boxes.items()},
            "polygons": self.polygons,
            "skipped": dict(self.skipped),
        }


def select_classes(source: SourceDataset, names: Sequence[str]) -> SourceDataset:
    """Keep some classes, in a given order.

    Args:
        source: The data set.
        names: The classes that are kept; the position becomes the index.

    Returns:
        The data set with the other objects left out and counted.

    Raises:
        DatasetError: A name appears twice or is no class of the data set.
    """
    for name in names:
        if name not in source.names:
            raise DatasetError(
                f"classes: {name!r} is not in the data; allowed: {', '.join(map(one_line, source.names))}"
            )
        if list(names).count(name) > 1:
            raise DatasetError(f"classes: {name!r} appears twice")
    skipped = Counter(source.skipped)
    splits: dict[SplitName, list[SourceImage]] = {}
    for split, images in source.splits.items():
        splits[split] = []
        for image in images:
            kept = tuple(found for found in image.objects if found.name in names)
            skipped[NOT_LISTED] += len(image.objects) - len(kept)
            splits[split].append(replace(image, objects=kept))
    return SourceDataset(splits, tuple(names), skipped)


def split_at_random(source: SourceDataset, fraction: float, seed: int) -> SourceDataset:
    """Move a random part of the training images into a validation split, if there is none.

    Args:
        source: The data set.
        fraction: Share of the training images, above 0 and below 1.
        seed: Not negative; the same seed and images give the same split.

    Returns:
        The data set with both splits.

    Raises:
        DatasetError: Fewer than two images.
    """
    if source.splits.get("val"):
        return source
    images = sorted(source.splits["train"], key=lambda image: image.name)
    if len(images) < 2:
        raise DatasetError(f"{len(images)} training images cannot be split; at least 2 are needed, or a val split")
    count = min(max(1, round(fraction * len(images))), len(images) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(images))[:count].tolist())
    train = [image for index, image in enumerate(images) if index not in chosen]
    val = [image for index, image in enumerate(images) if index in chosen]
    return replace(source, splits={**source.splits, "train": train, "val": val})


def write_yolo(
    source: SourceDataset, out: Path, origin: str, *, link: bool = False, overwrite: bool = False
) -> ConversionReport:
    """Write YOLO folders: ``images/<split>``, ``labels/<split>`` and ``data.yaml``; all or nothing.

    Args:
        source: The data set.
        out: The new folder.
        origin: What it was converted from, for the YAML's first line.
        link: Whether images become symbolic links instead of copies.
        overwrite: Whether an earlier conversion in `out` is replaced; nothing else ever is.

    Returns:
        What was written.

    Raises:
        DatasetError: `out` exists, or the data set cannot be written as it is.
    """
    out = out.absolute()
    _check_target(out, source, overwrite)
    if not source.names:
        raise DatasetError(f"{origin}: no class in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as made:
        writer = _Writer(Path(made) / "new", source.names, link)
        for split in _ORDER:
            if source.splits.get(split):
                writer.write(split, source.splits[split])
        report = writer.report(out / YAML_NAME, source.skipped)
        (Path(made) / "new" / YAML_NAME).write_text(_yaml_text(report, out, origin), encoding="utf-8")
        if out.exists():
            out.rename(Path(made) / "old")
        (Path(made) / "new").rename(out)
    return report


def _check_target(out: Path, source: SourceDataset, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise DatasetError(f"{out}: exists; allowed: a new folder, or --overwrite for an earlier conversion")
    try:
        ours = not out.is_symlink() and (out / YAML_NAME).read_text(encoding="utf-8").startswith(MARK)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise DatasetError(f"{out}: is no earlier conversion, so it is not overwritten; allowed: another folder")
    real = out.resolve()
    for images in source.splits.values():
        for image in images:
            if real in image.file.resolve().parents:
                raise DatasetError(f"{out}: holds {image.file}, which is to be converted; allowed: another folder")


def _yaml_text(report: ConversionReport, out: Path, origin: str) -> str:
    # YOLOv5 takes a relative `path` as relative to its own folder, so that only an absolute one suits both programs.
    document: dict[str, Any] = {
        "path": str(out),
        **{split: f"images/{split}" for split in report.images},
        "names": dict(enumerate(report.names)),
    }
    note = "# `path` is absolute for YOLOv5's sake; yolosearch takes this file's folder where it is left out.\n"
    return f"{MARK}{json.dumps(origin)}\n{note}{yaml.safe_dump(document, sort_keys=False, allow_unicode=True)}"


class _Writer:
    """Writes split after split into a new folder and counts."""

    def __init__(self, folder: Path, names: Sequence[str], link: bool) -> None:
        self._folder = folder
        self._index = {name: index for index, name in enumerate(names)}
        self._link = link
        self._images: dict[SplitName, int] = {}
        self._background: dict[SplitName, int] = {}
        self._boxes: dict[SplitName, tuple[int, ...]] = {}
        self._skipped: Counter[str] = Counter()
        self._polygons = 0

    def write(self, split: SplitName, images: Sequence[SourceImage]) -> None:
        """Write one split, which is not empty."""
        folder = self._folder / "images" / split
        folder.mkdir(parents=True)
        (self._folder / "labels" / split).mkdir(parents=True)
        counts: Counter[int] = Counter()
        background = 0
        for image, name in zip(images, flat_names(images), strict=True):
            target = folder / name
            self._place(image, target)
            objects = self._inside(image)
            label_path(target).write_text("".join(self._lines(image, objects)), encoding="ascii")
            counts.update(self._index[found.name] for found in objects)
            background += not objects
        self._images[split], self._background[split] = len(images), background
        self._boxes[split] = tuple(counts[index] for index in range(len(self._index)))

    def report(self, path: Path, skipped: Counter[str]) -> ConversionReport:
        """What was written."""
        left_out = {reason: count for reason, count in (skipped + self._skipped).items() if count}
        names = tuple(self._index)
        return ConversionReport(path, names, self._images, self._background, self._boxes, self._polygons, left_out)

    def _place(self, image: SourceImage, target: Path) -> None:
        try:
            if self._link:
                target.symlink_to(image.file.resolve())
            else:
                shutil.copyfile(image.file, target)
        except OSError as error:
            raise DatasetError(f"{target}: cannot write the image ({error.strerror or error})") from None

    def _inside(self, image: SourceImage) -> list[SourceObject]:
        """The objects clipped to the image; those of which nothing is left are counted."""
        height, width = image.size
        limit = np.array((width, height), dtype=np.float64)
        found = []
        for item in image.objects:
            corners = np.clip(np.array(item.box).reshape(2, 2), 0, limit)
            outline = None if item.polygon is None else np.clip(item.polygon, 0, limit)
            if (corners[1] <= corners[0]).any():
                self._skipped[NO_AREA] += 1
                continue
            left, top, right, bottom = corners.ravel().tolist()
            if outline is not None and (np.ptp(outline, axis=0) <= 0).any():
                outline = None
            found.append(SourceObject(item.name, (left, top, right, bottom), outline))
        return found

    def _lines(self, image: SourceImage, objects: Sequence[SourceObject]) -> list[str]:
        """Label lines. A file holds boxes or polygons, never both, so beside polygons a box becomes one."""
        scale = np.array((image.size[1], image.size[0]), dtype=np.float64)
        if not any(found.polygon is not None for found in objects):
            return [_line(self._index[found.name], _centre_size(found) / np.tile(scale, 2)) for found in objects]
        self._polygons += len(objects)
        outlines = (found.polygon if found.polygon is not None else _rectangle(found) for found in objects)
        return [
            _line(self._index[found.name], (outline / scale).ravel())
            for found, outline in zip(objects, outlines, strict=True)
        ]


def flat_names(images: Sequence[SourceImage]) -> list[str]:
    """File names without folders: the bare names if no two images would share a label file, else with their folders.

    Args:
        images: The images of a split.

    Returns:
        One name for each image.

    Raises:
        DatasetError: Two images still share one.
    """
    for folders in (False, True):
        paths = [PurePosixPath(image.name) for image in images]
        names = ["_".join(path.parts) if folders else path.name for path in paths]
        stems: dict[str, SourceImage] = {}
        clash = None
        for image, name in zip(images, names, strict=True):
            # Some file systems do not tell a.txt from A.txt.
            other = stems.setdefault(name.rsplit(".", 1)[0].casefold(), image)
            if other is not image:
                clash = (other, image)
        if clash is None:
            return names
    assert clash is not None
    raise DatasetError(f"{clash[1].where}: image {clash[1].name!r} would share its label file with {clash[0].name!r}")


def _centre_size(found: SourceObject) -> Points:
    left, top, right, bottom = found.box
    return np.array(((left + right) / 2, (top + bottom) / 2, right - left, bottom - top))


def _rectangle(found: SourceObject) -> Points:
    left, top, right, bottom = found.box
    return np.array(((left, top), (right, top), (right, bottom), (left, bottom)))


def _line(label: int, values: Points) -> str:
    # Nine digits tell float32 numbers apart; rounding must not carry a value above 1.
    return " ".join((str(label), *(f"{value:.9g}" for value in np.clip(values, 0, 1)))) + "\n"
