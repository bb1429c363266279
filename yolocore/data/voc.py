"""Reads detection data sets in Pascal VOC's XML format."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from yolocore.data.dataset import SplitName
from yolocore.data.images import IMAGE_SUFFIXES
from yolocore.data.sources import (
    Corners,
    MissingImageError,
    SourceDataset,
    SourceImage,
    SourceObject,
    checked_size,
    find_image,
    safe_relative,
)
from yolocore.errors import DatasetError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

DIFFICULT = "difficult objects"
MISSING = "images that do not exist"
_XML_FOLDERS = ("Annotations", "annotations", ".")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", ".")
_LISTS: tuple[tuple[SplitName, str], ...] = (("train", "train.txt"), ("val", "val.txt"), ("test", "test.txt"))


def read_voc(
    root: Path,
    image_folders: Sequence[Path] = (),
    *,
    keep_difficult: bool = False,
    one_based: bool = False,
    skip_missing: bool = False,
) -> SourceDataset:
    """Read a folder of Pascal VOC XML files.

    Args:
        root: Folder with ``Annotations/*.xml`` (or XML files itself), ``JPEGImages`` and perhaps ``ImageSets/Main``.
        image_folders: Where the images are; empty: the usual places are tried.
        keep_difficult: Whether objects that are marked difficult are kept.
        one_based: Whether corners are pixel numbers from 1, both inclusive, as in the original challenge; otherwise
            they are edges, as annotation tools write them.
        skip_missing: Whether an image that is not there is left out instead of an error.

    Returns:
        The images, classes in alphabetical order. The splits are those of ``ImageSets/Main/{train,val,test}.txt``;
        without them everything is train.

    Raises:
        DatasetError: One line naming file and element.
    """
    folders = tuple(image_folders) or tuple(root / name for name in _IMAGE_FOLDERS)
    reader = _VocReader(folders, keep_difficult, one_based, skip_missing, Counter())
    splits = {split: list(reader.images(files)) for split, files in _annotation_files(root).items()}
    names = {found.name for images in splits.values() for image in images for found in image.objects}
    return SourceDataset(splits, tuple(sorted(names)), reader.skipped)


def _annotation_files(root: Path) -> dict[SplitName, list[Path]]:
    folder = next((root / name for name in _XML_FOLDERS if any((root / name).glob("*.xml"))), None)
    if folder is None:
        raise DatasetError(f"{root}: no XML file in it or in {root / 'Annotations'}")
    lists = root / "ImageSets" / "Main"
    splits = {split: _listed(lists / name, folder) for split, name in _LISTS if (lists / name).is_file()}
    if splits and "train" not in splits:
        raise DatasetError(f"{lists}: no train.txt; there must be one if there is {', '.join(splits)}.txt")
    return splits or {"train": sorted(folder.glob("*.xml"))}


def _listed(listing: Path, folder: Path) -> list[Path]:
    """The XML files that a list of stems names; a second column (of per-class lists) is ignored."""
    files = []
    for number, line in enumerate(_list_text(listing).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{listing}:{number}"
        file = folder / f"{safe_relative(where, line.split()[0])}.xml"
        if not file.is_file():
            raise DatasetError(f"{where}: {file} does not exist")
        files.append(file)
    return files


def _list_text(listing: Path) -> str:
    try:
        return listing.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{listing}: cannot read the list ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{listing}: not UTF-8 text (byte {error.start}); expected names of XML files") from None


class _VocReader:
    """Reads images with the options of one conversion."""

    def __init__(
        self,
        folders: Sequence[Path],
        keep_difficult: bool,
        one_based: bool,
        skip_missing: bool,
        skipped: Counter[str],
    ) -> None:
        self.folders = folders
        self.keep_difficult = keep_difficult
        self.one_based = one_based
        self.skip_missing = skip_missing
        self.skipped = skipped

    def images(self, files: Sequence[Path]) -> Iterator[SourceImage]:
        for file in files:
            root = _parse(file)
            try:
                name, image = self._image_file(file, root)
            except MissingImageError:
                if not self.skip_missing:
                    raise
                self.skipped[MISSING] += 1
                continue
            size = checked_size(f"{file}: size", image, _declared_size(file, root))
            yield SourceImage(str(file), image, name, size, tuple(self._objects(file, root)))

    def _image_file(self, file: Path, root: "Element") -> tuple[str, Path]:
        """By the element `filename`, or else by the name of the XML file."""
        where = f"{file}: filename"
        text = root.findtext("filename")
        names = [safe_relative(where, text)] if text else []
        if not names or names[0].suffix.lower() not in IMAGE_SUFFIXES:
            names = [PurePosixPath(file.stem + suffix) for suffix in sorted(IMAGE_SUFFIXES)]
        for name in names[:-1]:
            try:
                return str(name), find_image(where, name, self.folders)
            except MissingImageError:
                continue
        return str(names[-1]), find_image(where, names[-1], self.folders)

    def _objects(self, file: Path, root: "Element") -> Iterator[SourceObject]:
        for index, element in enumerate(root.iter("object")):
            where = f"{file}: object[{index}]"
            name = (element.findtext("name") or "").strip()
            if not name:
                raise DatasetError(f"{where}: name: missing")
            if not self.keep_difficult and (element.findtext("difficult") or "0").strip() == "1":
                self.skipped[DIFFICULT] += 1
                continue
            yield SourceObject(name, self._corners(where, element))

    def _corners(self, where: str, element: "Element") -> Corners:
        left, top, right, bottom = (
            _number(where, element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")
        )
        if right < left or bottom < top:
            raise DatasetError(
                f"{where}: bndbox: {left:g} {top:g} {right:g} {bottom:g}; allowed: xmin <= xmax, ymin <= ymax"
            )
        first = 1.0 if self.one_based else 0.0
        return left - first, top - first, right, bottom


def _parse(file: Path) -> "Element":
    try:
        # No document type at all: entities can blow up memory or read files.
        root = parse(file, forbid_dtd=True).getroot()
    except OSError as error:
        raise DatasetError(f"{file}: cannot read the annotations ({error.strerror or error})") from None
    except DefusedXmlException as error:
        raise DatasetError(
            f"{file}: refused, it declares a document type or entities ({type(error).__name__})"
        ) from None
    except ParseError as error:
        raise DatasetError(f"{file}:{error.position[0]}: not valid XML ({error.msg})") from None
    except (ValueError, LookupError) as error:
        raise DatasetError(f"{file}: not usable XML ({error})") from None
    if root is None or root.tag != "annotation":
        raise DatasetError(f"{file}: root element {getattr(root, 'tag', None)!r}; expected 'annotation'")
    return root


def _declared_size(file: Path, root: "Element") -> tuple[int, int] | None:
    """Some tools leave the size out or write 0."""
    where = f"{file}: size"
    if root.find("size/width") is None or root.find("size/height") is None:
        return None
    width, height = _number(where, root, "size/width"), _number(where, root, "size/height")
    return (round(height), round(width)) if width and height else None


def _number(where: str, element: "Element", path: str) -> float:
    text = element.findtext(path)
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DatasetError(f"{where}: {path}: got {text!r}; allowed: a number")
    return value
