"""A contact sheet: labelled images of a split on one page, to see whether boxes and names are where they belong."""

import colorsys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from yolocore.data.dataset import LabelledImage
from yolocore.data.images import read_image
from yolocore.text import one_line

SHEET_IMAGES = 12
_COLUMNS = 3
_CELL_WIDTH, _CELL_HEIGHT, _CAPTION, _GAP = 620, 500, 24, 8
_TEXT, _TAG_HEIGHT, _LEGEND_ROW = 13, 13, 26
_PAPER, _INK = (250, 250, 250), (20, 20, 20)
_GOLDEN = 0.618033988749895
_MAX_NAME = 24

Colour = tuple[int, int, int]


def choose_images(images: Sequence[LabelledImage], count: int = SHEET_IMAGES) -> tuple[LabelledImage, ...]:
    """Images that together show every class, the rare ones too, and one without labels if there is any.

    Args:
        images: All images of a split.
        count: How many to choose at most.

    Returns:
        The chosen ones in the order of the split; the same ones each time.
    """
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    classes = {index: images[index].labels[:, 0].astype(int).tolist() for index in order}
    totals = Counter(label for labels in classes.values() for label in labels)
    rarest_first = sorted(totals, key=lambda label: (totals[label], label))
    background = [index for index in order if not classes[index]][:1]
    turns = zip_longest(*([index for index in order if label in classes[index]] for label in rarest_first))
    wanted = dict.fromkeys((*background, *(index for turn in turns for index in turn if index is not None), *order))
    return tuple(images[index] for index in sorted(tuple(wanted)[:count]))


def contact_sheet(images: Sequence[LabelledImage], names: Sequence[str], title: str) -> Image.Image:
    """Draw labelled images on one page, with a legend of the classes that are shown.

    Args:
        images: The images, each with its labels.
        names: All class names.
        title: First line of the page.

    Returns:
        An RGB image.

    Raises:
        DatasetError: An image cannot be decoded.
    """
    counts = Counter(int(label) for item in images for label in item.labels[:, 0])
    entries = [(index, f"{_short(names[index])} {counts[index]}") for index in sorted(counts)]
    width = _COLUMNS * (_CELL_WIDTH + _GAP) + _GAP
    places, legend = _legend_places([text for _, text in entries], width)
    rows = -(-len(images) // _COLUMNS)
    page = Image.new("RGB", (width, legend + rows * (_CELL_HEIGHT + _CAPTION + _GAP) + _GAP), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_GAP, _GAP), one_line(title), fill=_INK, font=_font(18))
    for (index, text), (x, y) in zip(entries, places, strict=True):
        _tag(draw, (x, y), text, class_colour(index), _font(16))
    for number, item in enumerate(images):
        left = _GAP + (number % _COLUMNS) * (_CELL_WIDTH + _GAP)
        top = legend + (number // _COLUMNS) * (_CELL_HEIGHT + _CAPTION + _GAP)
        caption = f"{one_line(item.image.name)}   {item.size[1]}x{item.size[0]}, {len(item.labels)} boxes"
        draw.text((left, top + 4), caption, fill=_INK, font=_font(_TEXT))
        page.paste(_cell(item, names), (left, top + _CAPTION))
    return page


def class_colour(index: int) -> Colour:
    """A colour for a class, far from those of its neighbours.

    Args:
        index: The class.

    Returns:
        Red, green and blue, 0 to 255.
    """
    red, green, blue = colorsys.hsv_to_rgb((index * _GOLDEN + 0.02) % 1.0, 0.95, (1.0, 0.75)[index // 5 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


@dataclass(frozen=True, slots=True)
class _PixelBox:
    label: int
    left: float
    top: float
    right: float
    bottom: float


def _cell(item: LabelledImage, names: Sequence[str]) -> Image.Image:
    pixels = read_image(item.image)
    ratio = min(_CELL_WIDTH / pixels.shape[1], _CELL_HEIGHT / pixels.shape[0])
    size = (max(1, round(pixels.shape[1] * ratio)), max(1, round(pixels.shape[0] * ratio)))
    method = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
    cell = Image.fromarray(np.ascontiguousarray(cv2.resize(pixels, size, interpolation=method)[:, :, ::-1]))
    draw = ImageDraw.Draw(cell)
    boxes = [_pixel_box(row, size) for row in item.labels.tolist()]
    # Large ones first, and all names last, so that no box hides a smaller one or a name.
    boxes.sort(key=lambda box: (box.left - box.right) * (box.bottom - box.top))
    for polygon, row in zip(item.polygons, item.labels.tolist(), strict=False):
        points = [(float(x) * size[0], float(y) * size[1]) for x, y in polygon]
        draw.line([*points, points[0]], fill=class_colour(int(row[0])), width=1)
    for box in boxes:
        draw.rectangle((box.left, box.top, box.right, box.bottom), outline=class_colour(box.label), width=2)
    for box in boxes:
        # Above the box where there is room, so that it does not cover a small object.
        top = box.top - _TAG_HEIGHT if box.top >= _TAG_HEIGHT else box.top
        _tag(draw, (box.left, top), _short(names[box.label]), class_colour(box.label), _font(_TEXT))
    return cell


def _pixel_box(row: Sequence[float], size: tuple[int, int]) -> _PixelBox:
    label, x, y, w, h = row
    left, right = sorted(min(max(edge * size[0], 0), size[0] - 1) for edge in (x - w / 2, x + w / 2))
    top, bottom = sorted(min(max(edge * size[1], 0), size[1] - 1) for edge in (y - h / 2, y + h / 2))
    return _PixelBox(int(label), left, top, right, bottom)


def _tag(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: Colour, font: ImageFont.FreeTypeFont
) -> None:
    """A name on a patch of its colour, in black or white, whichever can be read on it."""
    left, top, right, bottom = draw.textbbox(at, text, font=font, anchor="lt")
    draw.rectangle((left, top, right + 4, bottom + 3), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    draw.text((at[0] + 2, at[1] + 1), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font, anchor="lt")


def _legend_places(texts: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """Where the entries of the legend go, row by row, and how high the head of the page is."""
    x, y = _GAP, 2 * _GAP + _LEGEND_ROW
    places = []
    for text in texts:
        length = round(_font(16).getlength(text)) + 3 * _GAP
        if x + length > width and x > _GAP:
            x, y = _GAP, y + _LEGEND_ROW
        places.append((x, y))
        x += length
    return places, y + _LEGEND_ROW + _GAP


def _short(name: str) -> str:
    line = one_line(name)
    return line if len(line) <= _MAX_NAME else line[: _MAX_NAME - 3] + "..."


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow without FreeType has no scalable default
    return font
