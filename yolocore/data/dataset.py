"""YOLO data sets: the data set YAML, the images of a split, their checked labels, and the fingerprint of it all."""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from yolocore.data.images import IMAGE_SUFFIXES, allowed_suffixes, label_path, native_size
from yolocore.errors import DatasetError
from yolocore.text import is_unicode

SplitName = Literal["train", "val", "test"]
Float32Array = NDArray[np.float32]

SINGLE_CLASS = "item"
"""What YOLOv5 calls the class that takes the place of all others."""
_BOX_COLUMNS = 5
_SHOWN_VALUE = 60
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """A checked data set YAML."""

    source: Path
    """The YAML file itself."""
    root: Path
    """What relative split entries are joined to: `path`, itself relative to the YAML's folder."""
    train: tuple[Path, ...]
    """Folders (searched recursively) and list files of the training images."""
    val: tuple[Path, ...]
    test: tuple[Path, ...]
    """May be empty."""
    names: tuple[str, ...]
    """Class names; the position is the class index."""
    label_classes: int = 0
    """Classes that the label files may name, where those are more than `names`: all of them then count as class 0."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    def entries(self, split: SplitName) -> tuple[Path, ...]:
        """Folders and list files of one split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImage:
    """One image and its labels; nothing is decoded yet."""

    image: Path
    labels: Float32Array
    """float32 [n, 5]: class, x, y, w, h; centre and size as fractions of the native image."""
    size: tuple[int, int]
    """Native (height, width) in pixels."""
    polygons: tuple[Float32Array, ...] = ()
    """Either empty or one float32 [points, 2] (x, y as fractions) per label."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """All images of a split, sorted by path."""

    images: tuple[LabelledImage, ...]
    problems: tuple[str, ...]
    """What was repaired or left out, one line each."""

    @property
    def label_count(self) -> int:
        """Number of labels over all images."""
        return sum(len(item.labels) for item in self.images)


# ------------------------------------------------------------------------------------------------ the YAML


def load_dataset_config(path: Path | str, *, single_class: bool = False) -> DatasetConfig:
    """Read and check a data set YAML.

    Args:
        path: The YAML file with ``train``, ``val`` and ``names``, and optionally ``path``, ``test`` and ``nc``.
        single_class: Whether all classes become one, called `SINGLE_CLASS`, if there are several.

    Returns:
        The configuration with absolute paths; the entries of train and val exist.

    Raises:
        DatasetError: Naming file, key, value and what is allowed.
    """
    source = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100 - resolve() would follow links
    document = _read_yaml(source)
    for key in ("train", "val", "names"):
        if document.get(key) in (None, "", [], {}):
            raise DatasetError(f"{source}: {key}: missing; a data set needs train, val and names")
    names = _names(source, document["names"])
    _check_class_count(source, document.get("nc"), names)
    merged = single_class and len(names) > 1
    root = _root(source, document.get("path"))
    hint = " (its `download` entry is never run: fetch the data first)" if document.get("download") else ""
    return DatasetConfig(
        source=source,
        root=root,
        train=_split_entries(source, root, "train", document["train"], hint),
        val=_split_entries(source, root, "val", document["val"], hint),
        test=_split_entries(source, root, "test", document.get("test") or [], hint, must_exist=False),
        names=(SINGLE_CLASS,) if merged else names,
        label_classes=len(names) if merged else 0,
    )


def _read_yaml(source: Path) -> dict[str, object]:
    try:
        document = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"{source}: cannot read the data set YAML ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{source}: not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise DatasetError(f"{source}{line}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(document, dict):
        raise DatasetError(
            f"{source}: expected a mapping with train, val and names, found {_shown(document)}",
        )
    return document


def _names(source: Path, value: object) -> tuple[str, ...]:
    if isinstance(value, dict):
        keys = list(value)
        if any(isinstance(key, bool) or not isinstance(key, int) for key in keys):
            raise DatasetError(f"{source}: names: keys must be the integers 0, 1, 2, ..., found {_shown(keys)}")
        if sorted(keys) != list(range(len(keys))):
            raise DatasetError(
                f"{source}: names: keys must run from 0 to {len(keys) - 1} without a gap, found {_shown(sorted(keys))}",
            )
        value = [value[index] for index in range(len(keys))]
    if not isinstance(value, list):
        raise DatasetError(f"{source}: names: expected a list or a mapping of class names, found {_shown(value)}")
    names = tuple(_name(source, index, item) for index, item in enumerate(value))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DatasetError(f"{source}: names: {repeated[0]!r} appears more than once; class names must differ")
    return names


def _name(source: Path, index: int, value: object) -> str:
    # YAML reads bare no, yes, on and off as booleans: a class called "no" would silently become "False".
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "" or not is_unicode(str(value)):
        raise DatasetError(f"{source}: names: class {index} is {_shown(value)}; expected text (put it into quotes)")
    return str(value)


def _check_class_count(source: Path, value: object, names: tuple[str, ...]) -> None:
    if value is not None and value != len(names):
        raise DatasetError(
            f"{source}: nc: {_shown(value)} differs from the {len(names)} entries of names; correct it or leave it out",
        )


def _root(source: Path, value: object) -> Path:
    if value is None or value == "":
        return source.parent
    if not isinstance(value, str):
        raise DatasetError(f"{source}: path: expected a folder, found {_shown(value)}")
    root = _absolute(source.parent, value)
    if not root.is_dir():
        raise DatasetError(
            f"{source}: path: {value!r} is not a folder (looked at {root}; relative to the YAML's folder)"
        )
    return root


def _split_entries(
    source: Path,
    root: Path,
    key: str,
    value: object,
    hint: str,
    *,
    must_exist: bool = True,
) -> tuple[Path, ...]:
    items = value if isinstance(value, list) else [value]
    entries = []
    for item in items:
        if not isinstance(item, str) or not item:
            raise DatasetError(
                f"{source}: {key}: expected a folder, a list file or a list of these, found {_shown(item)}"
            )
        entry = _absolute(root, item)
        if not entry.exists() and item.startswith("../"):
            # Exported data sets often say ../train/images although the folder lies beside the YAML.
            entry = _absolute(root, item[3:])
        if must_exist and not entry.exists():
            raise DatasetError(f"{source}: {key}: {item!r} does not exist (looked at {_absolute(root, item)}){hint}")
        entries.append(entry)
    return tuple(entries)


def _absolute(base: Path, value: str) -> Path:
    return Path(os.path.abspath(base / Path(value).expanduser()))  # noqa: PTH100 - resolve() would follow links


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN_VALUE else text[: _SHOWN_VALUE - 3] + "..."


# ------------------------------------------------------------------------------------------------ the images


def image_paths(config: DatasetConfig, split: SplitName, problems: list[str] | None = None) -> tuple[Path, ...]:
    """All images of a split, without opening them.

    Args:
        config: The data set.
        split: Which split.
        problems: Takes what is wrong, one line each, instead of an exception for the first.

    Returns:
        Absolute paths, sorted by path string, each once.

    Raises:
        DatasetError: The split has no entry or no image, or a list file names a file that is missing or no image.
    """
    entries = config.entries(split)
    if not entries:
        raise DatasetError(f"{config.source}: {split}: missing; expected a folder, a list file or a list of these")
    found: set[Path] = set()
    for entry in entries:
        items = tuple(_images_of(config, split, entry))
        images = [item for item in items if isinstance(item, Path)]
        wrong = [item for item in items if isinstance(item, str)]
        if not items:
            wrong = [f"{config.source}: {split}: no image in {entry}; allowed suffixes: {allowed_suffixes()}"]
        if wrong and problems is None:
            raise DatasetError(wrong[0])
        if problems is not None:
            problems.extend(wrong)
        found.update(images)
    return tuple(sorted(found, key=str))


def _images_of(config: DatasetConfig, split: SplitName, entry: Path) -> Iterator[Path | str]:
    """The images of an entry, and as text what is wrong with it."""
    if entry.is_dir():
        yield from _images_below(entry)
    elif _is_image(entry.name):
        yield f"{config.source}: {split}: {entry} is an image; expected a folder or a text file of paths"
    else:
        yield from _listed_images(config, split, entry)


def _images_below(top: Path) -> Iterator[Path]:
    # Data sets are often made of links, so linked folders are entered, each once lest a loop never ends.
    entered: set[str] = set()
    for folder, inner, files in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            inner.clear()
            continue
        entered.add(real)
        yield from (Path(folder, name) for name in files if _is_image(name))


def _listed_images(config: DatasetConfig, split: SplitName, listing: Path) -> Iterator[Path | str]:
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield f"{config.source}: {split}: cannot read the list file {listing} ({error})"
        return
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        image = _absolute(listing.parent if text.startswith("./") else config.root, text)
        if not _is_image(image.name):
            yield f"{listing}:{number}: {text!r} is no image; allowed suffixes: {allowed_suffixes()}"
        elif not image.is_file():
            yield f"{listing}:{number}: image {text!r} does not exist (looked at {image})"
        else:
            yield image


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def scan_split(config: DatasetConfig, split: SplitName, *, strict: bool = True) -> Split:
    """Find the images of a split and read and check their labels.

    An image without a label file, or with an empty one, is background.

    Args:
        config: The data set.
        split: Which split.
        strict: Whether an image that cannot be used is an error. YOLOv5 drops it and goes on; so does False, and says
            so in `Split.problems`.

    Returns:
        Images with labels, sorted by path.

    Raises:
        DatasetError: The split is empty or has no label at all, or (strict) an image or label file is bad: the first,
            with file and line, and how many more there are.
    """
    images: list[LabelledImage] = []
    refused: list[str] = []
    notes: list[str] = []
    for path in image_paths(config, split):
        try:
            images.append(labelled_image(path, config, notes))
        except DatasetError as error:
            refused.append(str(error))
    if refused and (strict or not images):
        more = f" (and {len(refused) - 1} more bad files in {split})" if len(refused) > 1 else ""
        raise DatasetError(refused[0] + more)
    if not any(len(item.labels) for item in images):
        expected = label_path(images[0].image)
        raise DatasetError(
            f"{config.source}: {split}: none of the {len(images)} images has a label; "
            f"expected label files such as {expected}",
        )
    dropped = (f"image left out: {line}" for line in refused)
    return Split(images=tuple(images), problems=(*notes, *dropped))


def labelled_image(path: Path, config: DatasetConfig, notes: list[str]) -> LabelledImage:
    """Read the size and the labels of one image.

    Args:
        path: The image.
        config: The data set.
        notes: Takes what was repaired.

    Returns:
        The image with its checked labels; without any where there is no label file.

    Raises:
        DatasetError: The image or its label file cannot be used.
    """
    size = native_size(path)
    file = label_path(path)
    data = label_bytes(file)
    if data is None:
        return LabelledImage(image=path, labels=np.zeros((0, 5), np.float32), size=size)
    classes = config.label_classes or config.num_classes
    labels, polygons, duplicates = parse_labels(label_text(file, data), file, classes)
    if config.label_classes:
        labels[:, 0] = 0
    if duplicates:
        notes.append(f"{file}: {duplicates} duplicate label{'s' if duplicates > 1 else ''} removed")
    return LabelledImage(image=path, labels=labels, size=size, polygons=polygons)


def label_bytes(file: Path) -> bytes | None:
    """Content of a label file, None where there is none.

    Raises:
        DatasetError: It exists and cannot be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DatasetError(f"{file}: cannot read the label file ({error.strerror or error})") from None


def label_text(file: Path, data: bytes) -> str:
    """Content of a label file as text.

    Raises:
        DatasetError: It is not UTF-8; names the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DatasetError(f"{file}:{line}: not text (byte {data[error.start]:#04x}); expected class x y w h") from None


# ------------------------------------------------------------------------------------------------ the labels


def parse_labels(
    text: str,
    file: Path | str,
    num_classes: int,
) -> tuple[Float32Array, tuple[Float32Array, ...], int]:
    """Read the text of a label file by YOLOv5's rules.

    Each line is ``class x y w h``. If any line has more than six values the whole file is polygons: class, then x, y
    pairs, and the box is the smallest around the points. Empty lines are skipped. Duplicate rows are removed, and only
    then the rows are sorted.

    Args:
        text: Content of the file.
        file: Its name, for messages.
        num_classes: Class indices must be below this.

    Returns:
        float32 [n, 5] (class, x, y, w, h as fractions of the image), the polygons (float32 [points, 2] each; empty if
        the file holds boxes), and how many duplicates were removed.

    Raises:
        DatasetError: A malformed line, naming file, line, value and what is allowed.
    """
    rows: list[Float32Array] = []
    polygons: list[Float32Array] = []
    for line in label_lines(text, file, num_classes):
        if isinstance(line, DatasetError):
            raise line
        rows.append(line.row)
        if line.polygon is not None:
            polygons.append(line.polygon)
    if not rows:
        return np.zeros((0, _BOX_COLUMNS), np.float32), (), 0
    labels = np.stack(rows)
    _, kept = np.unique(labels, axis=0, return_index=True)
    if len(kept) == len(labels):
        return labels, tuple(polygons), 0
    return labels[kept], tuple(polygons[row] for row in kept) if polygons else (), len(labels) - len(kept)


@dataclass(frozen=True, slots=True, eq=False)
class LabelLine:
    """One good line of a label file."""

    number: int
    """From 1."""
    row: Float32Array
    """float32 [5]: class, x, y, w, h."""
    polygon: Float32Array | None
    """float32 [points, 2] if the file holds polygons."""


def label_lines(text: str, file: Path | str, num_classes: int) -> Iterator[LabelLine | DatasetError]:
    """Every line of a label file that is not empty, or what is wrong with it.

    Args:
        text: Content of the file.
        file: Its name, for messages.
        num_classes: Class indices must be below this.

    Returns:
        The lines in order; a malformed one as the exception that `parse_labels` would raise.
    """
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1) if line]
    as_polygons = any(len(tokens) > _BOX_COLUMNS + 1 for _, tokens in lines)
    for number, tokens in lines:
        try:
            yield _label_line(f"{file}:{number}", number, tokens, as_polygons, num_classes)
        except DatasetError as error:
            yield error


def _label_line(where: str, number: int, tokens: list[str], as_polygons: bool, num_classes: int) -> LabelLine:
    values, polygon = _numbers(where, tokens), None
    if as_polygons:
        polygon = _polygon(where, values)
        values = np.concatenate((values[:1], _box_around(polygon)))
    _check_row(where, values, num_classes)
    return LabelLine(number, values, polygon)


def _numbers(where: str, tokens: list[str]) -> Float32Array:
    if not tokens:
        raise DatasetError(f"{where}: the line holds only spaces; expected class x y w h, or nothing at all")
    return np.array([_number(where, token) for token in tokens], dtype=np.float32)


def _number(where: str, token: str) -> float:
    try:
        value = float(token)
    except ValueError:
        raise DatasetError(f"{where}: {_shown(token)} is not a number; expected class x y w h") from None
    if _LARGEST < abs(value) < math.inf:
        raise DatasetError(f"{where}: {_shown(token)} is too large; expected class x y w h, fractions from 0 to 1")
    return value


def _polygon(where: str, values: Float32Array) -> Float32Array:
    coordinates = len(values) - 1
    if coordinates < 4 or coordinates % 2:
        raise DatasetError(
            f"{where}: {coordinates} coordinates after the class; expected two or more pairs x y, "
            "because a line with more than six values makes the whole file polygons",
        )
    return values[1:].reshape(-1, 2)


def _box_around(points: Float32Array) -> Float32Array:
    low, high = points.min(axis=0), points.max(axis=0)
    with np.errstate(all="ignore"):  # what is not finite is refused with its line
        return np.concatenate(((low + high) / np.float32(2), high - low)).astype(np.float32)


def _check_row(where: str, row: Float32Array, num_classes: int) -> None:
    if len(row) != _BOX_COLUMNS:
        raise DatasetError(f"{where}: {len(row)} values; expected 5 (class x y w h)")
    if not row[0] >= 0:
        raise DatasetError(f"{where}: class {row[0]:g} is not allowed; allowed are 0 to {num_classes - 1}")
    if int(min(row[0], np.float32(2**31))) >= num_classes:
        raise DatasetError(
            f"{where}: class {row[0]:g} is not among the {num_classes} names; allowed are 0 to {num_classes - 1}",
        )
    for name, value in zip(("x", "y", "w", "h"), row[1:].tolist(), strict=True):
        if not 0 <= value <= 1:
            raise DatasetError(f"{where}: {name} is {value:g}; allowed is 0 to 1 (fraction of the image)")


# ------------------------------------------------------------------------------------------------ the fingerprint


def fingerprint(config: DatasetConfig) -> str:
    """Identify what training and validation see: names, image paths and sizes in bytes, and label text.

    Independent of where the data set lies, of file times and of how the YAML is written.

    Args:
        config: The data set.

    Returns:
        16 hexadecimal digits of a SHA-256.

    Raises:
        DatasetError: A split cannot be listed or a label file cannot be read.
    """
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

    add("names", *config.names)
    splits: tuple[SplitName, ...] = ("train", "val")
    for split in splits:
        add(split)
        for image in image_paths(config, split):
            relative = Path(os.path.relpath(image, config.root)).as_posix()
            add(relative, str(image.stat().st_size), label_bytes(label_path(image)) or b"")
    return digest.hexdigest()[:16]
