"""What a person wants to know of a data set before training on it: counts, sizes, and everything that is wrong.

Errors are what training refuses; warnings are what it accepts and a person should look at. Nothing stops at the first.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolocore.data.dataset import (
    DatasetConfig,
    Float32Array,
    LabelledImage,
    LabelLine,
    SplitName,
    image_paths,
    label_bytes,
    label_lines,
    label_text,
    labelled_image,
)
from yolocore.data.images import label_path, read_damaged_image
from yolocore.errors import DatasetError
from yolocore.text import one_line

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
FEW_BOXES = 50
"""Training boxes of a class below which little can be learned or measured; a rule of thumb."""
LARGE_RATIO = 20.0
"""Boxes of the commonest class per box of the rarest from which imbalance is worth a warning."""
SMALL_SIDE, LARGE_SIDE = 32.0, 96.0
"""Limits of COCO's small, medium and large boxes: square roots of their areas, in pixels."""
VANISHING_SIDE = 2.0
"""Augmentation leaves out boxes with a side of at most so many pixels."""
_EDGE_TOLERANCE = 1e-3
_PERCENTILES = (5, 50, 95)

Spread = tuple[float, float, float]
"""5th percentile, median, 95th percentile."""


@dataclass(frozen=True, slots=True)
class ClassCount:
    """One class in one split."""

    name: str
    boxes: int
    images: int
    """Images with at least one box of it."""


@dataclass(frozen=True, slots=True)
class BoxSizes:
    """How large boxes are; a size is the square root of the area in pixels."""

    size: Spread
    small: int
    """Boxes below 32 pixels."""
    medium: int
    large: int
    """Boxes of 96 pixels and more."""
    vanishing: int
    """Boxes with a side of at most 2 pixels, which augmentation leaves out."""


@dataclass(frozen=True, slots=True)
class SplitReport:
    """The figures of one split."""

    split: SplitName
    images: int
    """Usable images."""
    without_labels: int
    """Images whose label file is missing or empty: background."""
    without_label_file: int
    boxes: int
    polygons: int
    """Boxes that come from polygons."""
    classes: tuple[ClassCount, ...]
    boxes_per_image: Spread
    image_sizes: tuple[tuple[int, int], tuple[int, int]]
    """Smallest and largest (width, height) by area, pixels."""
    image_aspect: Spread
    """Width over height."""
    box_aspect: Spread
    native: BoxSizes
    """In native pixels."""
    scaled: BoxSizes
    """In pixels of images whose longer side is `DatasetReport.image_size`."""


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """Everything that `check_dataset` found."""

    source: Path
    names: tuple[str, ...]
    image_size: int
    splits: tuple[SplitReport, ...]
    imbalance: float | None
    """Training boxes of the commonest class per box of the rarest that has any; None without boxes."""
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether training would accept the data set."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "source": str(self.source), "usable": self.usable}


@dataclass(frozen=True, slots=True)
class _Survey:
    """One split, read."""

    split: SplitName
    images: tuple[LabelledImage, ...]
    digests: dict[str, list[Path]]
    """Content of the image files to their paths."""
    without_file: int
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Inspected:
    """One image, read."""

    path: Path
    item: LabelledImage | None
    digest: str
    has_label_file: bool
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def check_dataset(
    config: DatasetConfig,
    image_size: int = 640,
    splits: Sequence[SplitName] = (),
    *,
    decode: bool = True,
) -> tuple[DatasetReport, dict[SplitName, tuple[LabelledImage, ...]]]:
    """Read a whole data set and say what it holds and what is wrong with it.

    Args:
        config: The data set.
        image_size: Longer side of the images in training, pixels.
        splits: Which splits; empty: all that the YAML names.
        decode: Whether to decode every image, which finds damaged pixels and takes most of the time.

    Returns:
        The report, and the usable images of each split.
    """
    wanted = tuple(splits) or tuple(name for name in SPLITS if config.entries(name))
    surveys = [_survey(config, split, decode) for split in wanted]
    reports = tuple(_split_report(config, survey, image_size) for survey in surveys if survey.images)
    train = next((report for report in reports if report.split == "train"), None)
    warnings = [line for survey in surveys for line in survey.warnings]
    warnings += [*_leaks(surveys), *_class_warnings(config, reports), *_size_warnings(reports, image_size)]
    report = DatasetReport(
        source=config.source,
        names=config.names,
        image_size=image_size,
        splits=reports,
        imbalance=_imbalance(train) if train else None,
        errors=tuple(line for survey in surveys for line in survey.errors),
        warnings=tuple(warnings),
    )
    return report, {survey.split: survey.images for survey in surveys}


# ------------------------------------------------------------------------------------------------ reading


def _survey(config: DatasetConfig, split: SplitName, decode: bool) -> _Survey:
    errors: list[str] = []
    try:
        paths = image_paths(config, split, errors)
    except DatasetError as error:
        return _Survey(split, (), {}, 0, (str(error),), ())
    # Reading and decoding release the GIL.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        inspected = list(pool.map(lambda path: _inspect(path, config, decode), paths))
    items = tuple(one.item for one in inspected if one.item is not None)
    errors += [line for one in inspected for line in one.errors]
    if items and not any(len(item.labels) for item in items):
        expected = label_path(items[0].image)
        errors.append(f"{config.source}: {split}: no image has a label; expected label files such as {expected}")
    digests: dict[str, list[Path]] = defaultdict(list)
    for one in inspected:
        digests[one.digest].append(one.path)
    warnings = [line for one in inspected for line in one.warnings]
    warnings += [*_same_images(digests), *_orphans(config, split, paths)]
    without_file = sum(one.item is not None and not one.has_label_file for one in inspected)
    return _Survey(split, items, digests, without_file, tuple(errors), tuple(warnings))


def _inspect(path: Path, config: DatasetConfig, decode: bool) -> _Inspected:
    file = label_path(path)
    lines = list(_label_findings(file, config))
    errors = [str(line) for line in lines if isinstance(line, DatasetError)]
    warnings = [line for line in lines if isinstance(line, str)]
    item: LabelledImage | None = None
    digest = ""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        item = labelled_image(path, config, [])
        if decode and read_damaged_image(path)[1]:
            warnings.append(f"{path}: the JPEG has no end marker; pixels that are missing are made up")
    except (DatasetError, OSError) as error:
        if str(error) not in errors:
            errors.append(str(error) if isinstance(error, DatasetError) else f"{path}: cannot read ({error.strerror})")
    return _Inspected(path, item, digest, file.exists(), tuple(errors), tuple(warnings))


def _label_findings(file: Path, config: DatasetConfig) -> Iterator[DatasetError | str]:
    """Everything that is wrong (exceptions) or odd (text) about the lines of a label file."""
    try:
        data = label_bytes(file)
        text = "" if data is None else label_text(file, data)
    except DatasetError as error:
        yield error
        return
    seen: dict[bytes, int] = {}
    for line in label_lines(text, file, config.label_classes or config.num_classes):
        if isinstance(line, DatasetError):
            yield line
            continue
        first = seen.setdefault(line.row.tobytes(), line.number)
        if first != line.number:
            yield f"{file}:{line.number}: the same as line {first}; duplicates are left out"
        yield from (f"{file}:{line.number}: {remark}" for remark in _box_remarks(line))


def _box_remarks(line: LabelLine) -> Iterator[str]:
    _, x, y, w, h = line.row.tolist()
    if w == 0 or h == 0:
        yield "the box has no area; it is never learned"
    beyond = max(w / 2 - x, x + w / 2 - 1, h / 2 - y, y + h / 2 - 1)
    if beyond > _EDGE_TOLERANCE:
        yield f"the box reaches {beyond:.1%} of the side beyond the image"


# ------------------------------------------------------------------------------------------------ warnings


def _same_images(digests: dict[str, list[Path]]) -> Iterator[str]:
    for digest, paths in digests.items():
        if digest:
            yield from (f"{path}: the same image as {paths[0]}" for path in paths[1:])


def _leaks(surveys: Sequence[_Survey]) -> Iterator[str]:
    """Images that are in two splits, so that the later one measures memory."""
    for index, survey in enumerate(surveys):
        for other in surveys[index + 1 :]:
            for digest in sorted(survey.digests.keys() & other.digests.keys() - {""}):
                seen, again = survey.digests[digest][0], other.digests[digest][0]
                yield f"{again}: in {other.split}, and the same image is in {survey.split} as {seen}"


def _orphans(config: DatasetConfig, split: SplitName, paths: Sequence[Path]) -> Iterator[str]:
    """Label files without an image; a list file may leave images out on purpose."""
    if not all(entry.is_dir() for entry in config.entries(split)):
        return
    expected = {label_path(path) for path in paths}
    images = {path.parent for path in paths}
    for folder in sorted({file.parent for file in expected} - images):
        if folder.is_dir():
            files = sorted(set(folder.glob("*.txt")) - expected)
            yield from (f"{file}: no image belongs to this label file" for file in files)


def _class_warnings(config: DatasetConfig, reports: Sequence[SplitReport]) -> Iterator[str]:
    for report in reports:
        for count in report.classes:
            where = f"{config.source}: {report.split}: class {one_line(count.name)}"
            if not count.boxes:
                yield f"{where} has no box"
            elif report.split == "train" and count.boxes < FEW_BOXES:
                yield f"{where} has {count.boxes} box{'es' if count.boxes > 1 else ''} only"
        ratio = _imbalance(report) if report.split == "train" else None
        if ratio is not None and ratio >= LARGE_RATIO:
            yield f"{config.source}: train: {ratio:.0f} boxes of the commonest class for each of the rarest"


def _size_warnings(reports: Sequence[SplitReport], image_size: int) -> Iterator[str]:
    for report in reports:
        if report.scaled.vanishing:
            yield (
                f"{report.split}: {report.scaled.vanishing} of {report.boxes} boxes have a side of at most "
                f"{VANISHING_SIDE:g} pixels at {image_size} pixels and are hardly ever learned: use a larger image_size"
            )


def _imbalance(report: SplitReport) -> float | None:
    counts = [count.boxes for count in report.classes if count.boxes]
    return max(counts) / min(counts) if counts else None


# ------------------------------------------------------------------------------------------------ figures


def _split_report(config: DatasetConfig, survey: _Survey, image_size: int) -> SplitReport:
    images = survey.images
    sizes = np.array([item.size for item in images], dtype=np.float64)
    labels: Float32Array = np.concatenate([item.labels for item in images])
    owner = np.repeat(np.arange(len(images)), [len(item.labels) for item in images])
    sides = labels[:, 3:].astype(np.float64) * sizes[owner][:, ::-1]
    scale = image_size / sizes.max(axis=1)
    by_area = sorted((item.size for item in images), key=lambda size: (size[0] * size[1], size))
    (least_h, least_w), (most_h, most_w) = by_area[0], by_area[-1]
    return SplitReport(
        split=survey.split,
        images=len(images),
        without_labels=sum(not len(item.labels) for item in images),
        without_label_file=survey.without_file,
        boxes=len(labels),
        polygons=sum(len(item.polygons) for item in images),
        classes=_class_counts(config, labels, owner),
        boxes_per_image=_spread(np.array([len(item.labels) for item in images])),
        image_sizes=((least_w, least_h), (most_w, most_h)),
        image_aspect=_spread(sizes[:, 1] / sizes[:, 0]),
        box_aspect=_spread(sides[:, 0] / np.maximum(sides[:, 1], 1e-9)),
        native=_box_sizes(sides),
        scaled=_box_sizes(sides * scale[owner, None]),
    )


def _class_counts(config: DatasetConfig, labels: Float32Array, owner: NDArray[np.int64]) -> tuple[ClassCount, ...]:
    classes = labels[:, 0].astype(np.int64)
    return tuple(
        ClassCount(name, int((classes == index).sum()), len(np.unique(owner[classes == index])))
        for index, name in enumerate(config.names)
    )


def _box_sizes(sides: NDArray[np.float64]) -> BoxSizes:
    """Figures of boxes [n, 2] (width, height) in pixels."""
    size = np.sqrt(sides.prod(axis=1))
    small, large = int((size < SMALL_SIDE).sum()), int((size >= LARGE_SIDE).sum())
    vanishing = int((sides <= VANISHING_SIDE).any(axis=1).sum())
    return BoxSizes(_spread(size), small, len(size) - small - large, large, vanishing)


def _spread(values: NDArray[Any]) -> Spread:
    if not len(values):
        return (0.0, 0.0, 0.0)
    low, middle, high = np.percentile(values, _PERCENTILES).tolist()
    return low, middle, high
