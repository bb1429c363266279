"""Annotated images on their way from another format into YOLO folders: what the readers give and the writer takes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from numpy.typing import NDArray

from yolocore.data.dataset import SplitName
from yolocore.data.images import IMAGE_SUFFIXES, allowed_suffixes, native_size
from yolocore.errors import DatasetError

Points = NDArray[np.float64]
Corners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class SourceObject:
    """One object as a format describes it."""

    name: str
    """Its class."""
    box: Corners
    """Left, top, right, bottom edge in pixels, not clipped yet."""
    polygon: Points | None = None
    """float64 [points, 2] in pixels, where the format has one."""


@dataclass(frozen=True, slots=True, eq=False)
class SourceImage:
    """One image with its objects."""

    where: str
    """File, and place in it, that describe the image; for messages."""
    file: Path
    name: str
    """How the annotations call the image, a relative path."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    objects: tuple[SourceObject, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SourceDataset:
    """All images of a data set, by split, and what was left out."""

    splits: Mapping[SplitName, Sequence[SourceImage]]
    names: tuple[str, ...]
    """Class names in the order of their new indices."""
    skipped: Counter[str] = field(default_factory=Counter)
    """What was left out, and how often."""


def safe_relative(where: str, name: object) -> PurePosixPath:
    """A file name from an annotation, which must not lead anywhere else.

    Args:
        where: Where it stands, for the message.
        name: What stands there.

    Returns:
        The name as a relative path.

    Raises:
        DatasetError: It is no text, absolute, or goes up.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise DatasetError(f"{where}: {name!r} is no file name; allowed: a relative path")
    path = PurePosixPath(name.strip().replace("\\", "/"))
    windows = PureWindowsPath(name.strip())
    if path.is_absolute() or windows.drive or windows.root or ".." in path.parts or not path.name:
        raise DatasetError(f"{where}: {name!r} leads out of the image folder; allowed: a relative path without '..'")
    return path


def find_image(where: str, name: PurePosixPath, folders: Iterable[Path]) -> Path:
    """The file of an image, in the first folder that has it.

    Args:
        where: Where it is named, for the message.
        name: From `safe_relative`.
        folders: Where to look, in this order.

    Returns:
        Its absolute path.

    Raises:
        DatasetError: No folder has it, or its suffix is not allowed.
    """
    if name.suffix.lower() not in IMAGE_SUFFIXES:
        raise DatasetError(f"{where}: {str(name)!r} is no image; allowed suffixes: {allowed_suffixes()}")
    looked = list(dict.fromkeys(folders))
    for folder in looked:
        if (folder / name).is_file():
            return (folder / name).absolute()
    shown = ", ".join(str(folder) for folder in looked)
    raise MissingImageError(f"{where}: image {str(name)!r} does not exist (looked in {shown})")


class MissingImageError(DatasetError):
    """An image that annotations name is not there."""


def checked_size(where: str, file: Path, declared: tuple[int, int] | None) -> tuple[int, int]:
    """The size of an image, which must be what the annotations were made for.

    Args:
        where: Where the size is declared, for the message.
        file: The image.
        declared: (height, width) in the annotations, None where they do not say.

    Returns:
        (height, width) in pixels.

    Raises:
        DatasetError: The sizes differ, or the image cannot be read.
    """
    height, width = native_size(file)
    if declared is not None and declared != (height, width):
        raise DatasetError(
            f"{where}: the annotations are for {declared[1]}x{declared[0]} pixels, {file} has {width}x{height}; "
            "allowed: boxes in pixels of the image as it is shown"
        )
    return height, width
