"""Image files: allowed suffixes, the native size from the header, decoding, and where the labels of an image lie."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from yolocore.errors import DatasetError

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".dng", ".jpeg", ".jpg", ".mpo", ".pfm", ".png", ".tif", ".tiff", ".webp"),
)
SMALLEST_SIDE = 10
_EXIF_ORIENTATION = 0x0112
_TURNED_BY_90 = frozenset((5, 6, 7, 8))
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"

UInt8Array = NDArray[np.uint8]


def label_path(image: Path | str) -> Path:
    """Where the label file of an image lies.

    The last ``/images/`` becomes ``/labels/`` and everything behind the last dot becomes ``txt``.

    Args:
        image: Path of the image with forward slashes.

    Returns:
        Path of the label file, which may not exist.
    """
    moved = "/labels/".join(Path(image).as_posix().rsplit("/images/", 1))
    return Path(moved.rsplit(".", 1)[0] + ".txt")


def native_size(path: Path) -> tuple[int, int]:
    """Size of an image as it will be decoded, read from its header where the format allows.

    Args:
        path: The image file.

    Returns:
        ``(height, width)`` in pixels, after the rotation that its EXIF orientation asks for.

    Raises:
        DatasetError: The file cannot be read, or a side is shorter than `SMALLEST_SIDE` pixels.
    """
    height, width = _header_size(path) or read_image(path).shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise DatasetError(f"{path}: image is {width}x{height} pixels; both sides must be at least {SMALLEST_SIDE}")
    return height, width


def _header_size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED_BY_90
    except Exception:  # Pillow raises many types on damaged headers; decoding has the last word
        return None
    return (width, height) if turned else (height, width)


def read_image(path: Path) -> UInt8Array:
    """Decode an image file; a JPEG that is cut off is completed, as YOLOv5 does.

    Args:
        path: The image file.

    Returns:
        uint8 ``[height, width, 3]``, BGR, EXIF orientation applied.

    Raises:
        DatasetError: The file is missing or cannot be decoded.
    """
    image, _ = read_damaged_image(path)
    return image


def read_damaged_image(path: Path) -> tuple[UInt8Array, bool]:
    """Decode an image file as `read_image` does, and say whether it had to be completed.

    Args:
        path: The image file.

    Returns:
        The image, and whether it is a JPEG without its end marker.

    Raises:
        DatasetError: The file is missing or cannot be decoded.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot read the image ({error.strerror or error})") from None
    image, completed = _decoded(data), False
    if image is None and data.startswith(_JPEG_START):
        # From memory OpenCV refuses a JPEG without an end marker, which `cv2.imread` decodes: same pixels with one.
        image, completed = _decoded(data + _JPEG_END), True
    if image is None:
        raise DatasetError(f"{path}: cannot decode the image; allowed are intact {allowed_suffixes()} files")
    return image, completed


def _decoded(data: bytes) -> UInt8Array | None:
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error:
        return None
    return None if image is None else np.asarray(image, dtype=np.uint8)


def allowed_suffixes() -> str:
    """The suffixes of `IMAGE_SUFFIXES` as text for messages."""
    return ", ".join(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))
