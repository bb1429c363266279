"""Geometry and augmentation of training samples, on NumPy arrays and without state.

Drawing is separate from applying: a `draw_*` function takes a `numpy.random.Generator` and gives plain frozen data, and
the other functions are deterministic in it. A sample is therefore a function of its draw, and draws that another
implementation logged can be fed in.

Images are uint8 ``[height, width, 3]`` BGR until the very end. Boxes are float32 ``[n, 5]``: class and either fractions
(x, y, w, h) or corners in pixels (x1, y1, x2, y2), as each function says. Polygons are float32 ``[points, 2]``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from yolocore.hyperparameters import Hyperparameters

UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Polygons = tuple[Float32Array, ...]

FILL = 114
"""Grey level of everything outside the images."""
POLYGON_POINTS = 1000
MIXUP_BETA = 32.0
_FILL_BGR = (FILL, FILL, FILL)
_TINY = 1e-16
_EDGE = 1e-3
_SEED_LIMIT = 2**63 - 1


# ------------------------------------------------------------------------------------------- what can be drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentSettings:
    """The augmentation keys of a hyp file, in raw units."""

    hsv_h: float = 0.0
    hsv_s: float = 0.0
    hsv_v: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0
    copy_paste: float = 0.0

    @classmethod
    def from_hyperparameters(cls, hyp: "Hyperparameters") -> "AugmentSettings":
        """Pick the augmentation keys.

        Args:
            hyp: All hyperparameters.

        Returns:
            The thirteen that images depend on.
        """
        return cls(**{field.name: float(getattr(hyp, field.name)) for field in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class PerspectiveDraw:
    """One random perspective; the default changes nothing."""

    perspective_x: float = 0.0
    perspective_y: float = 0.0
    angle: float = 0.0
    """Degrees, counter-clockwise."""
    scale: float = 1.0
    shear_x: float = 0.0
    """Degrees."""
    shear_y: float = 0.0
    """Degrees."""
    translate_x: float = 0.5
    """Where the input's centre lands, as a fraction of the output's width."""
    translate_y: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MosaicDraw:
    """One mosaic of four images."""

    centre_x: int
    """Where the four tiles touch, in pixels of the doubled canvas."""
    centre_y: int
    tiles: tuple[int, int, int, int]
    """Image indices: top left, top right, bottom left, bottom right."""
    copy_paste_seed: int | None = None
    """Seed of the choice of pasted objects (how many there are is known only once the labels are); None: no pasting."""
    copy_paste: float = 0.0
    """Fraction of the polygon objects to paste."""
    perspective: PerspectiveDraw = PerspectiveDraw()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleDraw:
    """Everything random about one training sample."""

    mosaics: tuple[MosaicDraw, ...] = ()
    """Empty: the image alone; two: mixed up."""
    mixup_ratio: float = 1.0
    """Share of the first mosaic."""
    perspective: PerspectiveDraw = PerspectiveDraw()
    """For the image alone; a mosaic has its own."""
    hsv: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Each in [-1, 1]; times the gain it is the relative change."""
    flip_vertical: bool = False
    flip_horizontal: bool = False


def draw_perspective(settings: AugmentSettings, rng: np.random.Generator) -> PerspectiveDraw:
    """Draw a random perspective in the order in which YOLOv5 draws it.

    Args:
        settings: Ranges.
        rng: Source of randomness.

    Returns:
        The draw.
    """

    def around(centre: float, reach: float) -> float:
        return float(rng.uniform(centre - reach, centre + reach))

    return PerspectiveDraw(
        perspective_x=around(0.0, settings.perspective),
        perspective_y=around(0.0, settings.perspective),
        angle=around(0.0, settings.degrees),
        scale=around(1.0, settings.scale),
        shear_x=around(0.0, settings.shear),
        shear_y=around(0.0, settings.shear),
        translate_x=around(0.5, settings.translate),
        translate_y=around(0.5, settings.translate),
    )


def draw_mosaic(
    settings: AugmentSettings,
    index: int,
    count: int,
    image_size: int,
    rng: np.random.Generator,
) -> MosaicDraw:
    """Draw a mosaic around one image.

    Args:
        settings: Ranges.
        index: The image that is certainly part of it.
        count: Number of images to take the three others from, with replacement.
        image_size: Side of the sample in pixels.
        rng: Source of randomness.

    Returns:
        The draw.
    """
    centre_y, centre_x = (int(value) for value in rng.uniform(image_size / 2, 3 * image_size / 2, size=2))
    tiles = rng.permutation([index, *rng.integers(count, size=3).tolist()]).tolist()
    pastes = settings.copy_paste > 0
    return MosaicDraw(
        centre_x=centre_x,
        centre_y=centre_y,
        tiles=(tiles[0], tiles[1], tiles[2], tiles[3]),
        copy_paste_seed=int(rng.integers(_SEED_LIMIT)) if pastes else None,
        copy_paste=settings.copy_paste,
        perspective=draw_perspective(settings, rng),
    )


def draw_sample(
    settings: AugmentSettings,
    index: int,
    count: int,
    image_size: int,
    rng: np.random.Generator,
) -> SampleDraw:
    """Draw everything random about one training sample, in the order in which YOLOv5 draws it.

    Args:
        settings: Probabilities and ranges.
        index: The image.
        count: Number of images of the split.
        image_size: Side of the sample in pixels.
        rng: Source of randomness.

    Returns:
        The draw.
    """
    mosaics: tuple[MosaicDraw, ...] = ()
    perspective = PerspectiveDraw()
    ratio = 1.0
    if rng.random() < settings.mosaic:
        mosaics = (draw_mosaic(settings, index, count, image_size, rng),)
        if rng.random() < settings.mixup:
            mosaics += (draw_mosaic(settings, int(rng.integers(count)), count, image_size, rng),)
            ratio = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
    else:
        perspective = draw_perspective(settings, rng)
    hue, saturation, value = rng.uniform(-1, 1, size=3).tolist()
    return SampleDraw(
        mosaics=mosaics,
        mixup_ratio=ratio,
        perspective=perspective,
        hsv=(hue, saturation, value),
        flip_vertical=bool(rng.random() < settings.flipud),
        flip_horizontal=bool(rng.random() < settings.fliplr),
    )


# ------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True, slots=True)
class LetterboxPlan:
    """How an image is fitted into a rectangle."""

    ratio: float
    """Output pixels per input pixel, both axes."""
    resized: tuple[int, int]
    """(height, width) of the image inside."""
    pad: tuple[float, float]
    """Half of the remaining (width, height), unrounded: what labels are shifted by."""
    borders: tuple[int, int, int, int]
    """Pixels of fill: top, bottom, left, right."""


def plan_letterbox(
    size: tuple[int, int],
    target: tuple[int, int],
    *,
    scale_up: bool = True,
    stride: int | None = None,
) -> LetterboxPlan:
    """Fit an image into a rectangle, keeping its aspect ratio.

    Args:
        size: (height, width) of the image in pixels.
        target: (height, width) to fit into.
        scale_up: Whether a small image may grow.
        stride: If given, the fill is reduced to the remainder modulo this ("auto" mode).

    Returns:
        The plan. An odd pixel of fill goes to the right or the bottom.
    """
    ratio = min(target[0] / size[0], target[1] / size[1])
    if not scale_up:
        ratio = min(ratio, 1.0)
    height, width = round(size[0] * ratio), round(size[1] * ratio)
    spare_x, spare_y = target[1] - width, target[0] - height
    if stride is not None:
        spare_x, spare_y = spare_x % stride, spare_y % stride
    dw, dh = spare_x / 2, spare_y / 2
    borders = (round(dh - 0.1), round(dh + 0.1), round(dw - 0.1), round(dw + 0.1))
    return LetterboxPlan(ratio=ratio, resized=(height, width), pad=(dw, dh), borders=borders)


def letterbox(image: UInt8Array, plan: LetterboxPlan) -> UInt8Array:
    """Apply a letterbox plan.

    Args:
        image: uint8 [h, w, 3].
        plan: From `plan_letterbox` for this image's size.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = plan.resized
    if image.shape[:2] != plan.resized:
        image = _u8(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR))
    top, bottom, left, right = plan.borders
    if not any(plan.borders):
        return image
    result = np.full((height + top + bottom, width + left + right, 3), FILL, dtype=np.uint8)
    result[top : top + height, left : left + width] = image
    return result


def resized_shape(size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """Size of an image after loading: the longer side becomes `image_size`, the other is rounded up.

    Args:
        size: Native (height, width).
        image_size: Length of the longer side in pixels.

    Returns:
        (height, width).
    """
    ratio = image_size / max(size)
    if ratio == 1:
        return size
    return math.ceil(size[0] * ratio), math.ceil(size[1] * ratio)


def resize_to_fit(image: UInt8Array, image_size: int, *, augmenting: bool) -> UInt8Array:
    """Resize an image as loading does: bilinear when training or growing, else area averages.

    Args:
        image: uint8 [h, w, 3] as decoded.
        image_size: Length of the longer side afterwards, in pixels.
        augmenting: Whether this is for training.

    Returns:
        uint8 [H, W, 3] of shape `resized_shape`.
    """
    size = (image.shape[0], image.shape[1])
    height, width = resized_shape(size, image_size)
    if (height, width) == size:
        return image
    bilinear = augmenting or image_size > max(size)
    method = cv2.INTER_LINEAR if bilinear else cv2.INTER_AREA
    return _u8(cv2.resize(image, (width, height), interpolation=method))


def to_corners(
    labels: Float32Array,
    size: tuple[float, float],
    pad: tuple[float, float] = (0.0, 0.0),
) -> Float32Array:
    """Fractions to pixel corners.

    Args:
        labels: [n, 5] class, x, y, w, h as fractions.
        size: (height, width) of the image in pixels.
        pad: Shift (x, y) in pixels.

    Returns:
        float32 [n, 5] class, x1, y1, x2, y2 in pixels.
    """
    height, width = size
    x, y, w, h = labels[:, 1], labels[:, 2], labels[:, 3], labels[:, 4]
    corners = np.empty_like(labels)
    corners[:, 0] = labels[:, 0]
    corners[:, 1] = width * (x - w / 2) + pad[0]
    corners[:, 2] = height * (y - h / 2) + pad[1]
    corners[:, 3] = width * (x + w / 2) + pad[0]
    corners[:, 4] = height * (y + h / 2) + pad[1]
    return corners


def to_fractions(boxes: Float32Array, size: tuple[int, int]) -> Float32Array:
    """Pixel corners to fractions, clipped to the image less a thousandth of a pixel.

    Args:
        boxes: [n, 5] class, x1, y1, x2, y2 in pixels.
        size: (height, width) of the image in pixels.

    Returns:
        float32 [n, 5] class, x, y, w, h as fractions.
    """
    height, width = size
    x1, x2 = (boxes[:, column].clip(0, width - _EDGE) for column in (1, 3))
    y1, y2 = (boxes[:, column].clip(0, height - _EDGE) for column in (2, 4))
    labels = np.empty_like(boxes)
    labels[:, 0] = boxes[:, 0]
    labels[:, 1] = (x1 + x2) / 2 / width
    labels[:, 2] = (y1 + y2) / 2 / height
    labels[:, 3] = (x2 - x1) / width
    labels[:, 4] = (y2 - y1) / height
    return labels


def polygons_to_pixels(
    polygons: Polygons,
    size: tuple[float, float],
    pad: tuple[float, float] = (0.0, 0.0),
) -> Polygons:
    """Polygons as fractions to pixels.

    Args:
        polygons: Each float32 [points, 2], x and y as fractions.
        size: (height, width) of the image in pixels.
        pad: Shift (x, y) in pixels.

    Returns:
        Each float32 [points, 2] in pixels.
    """
    scale = np.array((size[1], size[0]), dtype=np.float32)
    shift = np.array(pad, dtype=np.float32)
    return tuple(points * scale + shift for points in polygons)


# ------------------------------------------------------------------------------------------- random perspective


def perspective_matrix(draw: PerspectiveDraw, size_in: tuple[int, int], size_out: tuple[int, int]) -> Float64Array:
    """The map from input to output pixels, ``M = T Sh R P C``.

    Args:
        draw: What was drawn.
        size_in: (height, width) of the input.
        size_out: (height, width) of the output.

    Returns:
        float64 [3, 3].
    """
    centre = np.eye(3)
    centre[:2, 2] = -size_in[1] / 2, -size_in[0] / 2
    perspective = np.eye(3)
    perspective[2, :2] = draw.perspective_x, draw.perspective_y
    theta = math.radians(draw.angle)
    cosine, sine = draw.scale * math.cos(theta), draw.scale * math.sin(theta)
    rotation = np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])
    shear = np.eye(3)
    shear[0, 1] = math.tan(math.radians(draw.shear_x))
    shear[1, 0] = math.tan(math.radians(draw.shear_y))
    shift = np.eye(3)
    shift[:2, 2] = draw.translate_x * size_out[1], draw.translate_y * size_out[0]
    return np.asarray(shift @ shear @ rotation @ perspective @ centre)


def _is_projective(draw: PerspectiveDraw) -> bool:
    return draw.perspective_x != 0 or draw.perspective_y != 0


def warp_image(image: UInt8Array, draw: PerspectiveDraw, size_out: tuple[int, int]) -> UInt8Array:
    """Apply a random perspective to an image, bilinear, filled with grey.

    Args:
        image: uint8 [h, w, 3].
        draw: What was drawn.
        size_out: (height, width) of the result.

    Returns:
        uint8 [H, W, 3]; the image itself if nothing changes.
    """
    size_in = (image.shape[0], image.shape[1])
    matrix = perspective_matrix(draw, size_in, size_out)
    if size_in == size_out and (matrix == np.eye(3)).all():
        return image
    size = (size_out[1], size_out[0])
    if _is_projective(draw):
        return _u8(cv2.warpPerspective(image, matrix, dsize=size, borderValue=_FILL_BGR))
    return _u8(cv2.warpAffine(image, matrix[:2], dsize=size, borderValue=_FILL_BGR))


def warp_boxes(
    boxes: Float32Array,
    draw: PerspectiveDraw,
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    polygons: Polygons = (),
) -> Float32Array:
    """Apply a random perspective to boxes and leave out what became too small, too thin or mostly invisible.

    Args:
        boxes: [n, 5] class, x1, y1, x2, y2 in pixels of the input.
        draw: What was drawn.
        size_in: (height, width) of the input.
        size_out: (height, width) of the output.
        polygons: One per box, in pixels of the input, or none: then the boxes' corners are mapped.

    Returns:
        float32 [m, 5] in pixels of the output, clipped to it; m <= n.
    """
    if not len(boxes):
        return boxes
    matrix = perspective_matrix(draw, size_in, size_out)
    by_polygon = len(polygons) == len(boxes)
    if by_polygon:
        moved = np.stack([_mapped_polygon_box(points, matrix, draw, size_out) for points in polygons])
    else:
        moved = _mapped_corner_boxes(boxes[:, 1:], matrix, draw, size_out)
    kept = box_candidates(boxes[:, 1:] * draw.scale, moved, smallest_area=0.01 if by_polygon else 0.10)
    result = boxes[kept]
    result[:, 1:] = moved[kept]
    return result


def _mapped(points: NDArray[np.floating], matrix: Float64Array, draw: PerspectiveDraw) -> Float64Array:
    mapped = points.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    result = mapped[:, :2] / mapped[:, 2:] if _is_projective(draw) else mapped[:, :2]
    return np.asarray(result)


def _mapped_corner_boxes(
    corners: Float32Array,
    matrix: Float64Array,
    draw: PerspectiveDraw,
    size_out: tuple[int, int],
) -> Float64Array:
    points = corners[:, [0, 1, 2, 3, 0, 3, 2, 1]].reshape(-1, 2)
    mapped = _mapped(points, matrix, draw).reshape(-1, 4, 2)
    result = np.concatenate((mapped.min(axis=1), mapped.max(axis=1)), axis=1)
    result[:, [0, 2]] = result[:, [0, 2]].clip(0, size_out[1])
    result[:, [1, 3]] = result[:, [1, 3]].clip(0, size_out[0])
    return result


def _mapped_polygon_box(
    points: Float32Array,
    matrix: Float64Array,
    draw: PerspectiveDraw,
    size_out: tuple[int, int],
) -> Float64Array:
    mapped = _mapped(resample_polygon(points), matrix, draw)
    inside = ((mapped >= 0) & (mapped <= (size_out[1], size_out[0]))).all(axis=1)
    if not inside.any():
        return np.zeros(4)
    visible = mapped[inside]
    return np.concatenate((visible.min(axis=0), visible.max(axis=0)))


def resample_polygon(points: Float32Array, count: int = POLYGON_POINTS) -> Float32Array:
    """Spread points over a closed polygon, evenly in the number of its corners.

    Args:
        points: [n, 2] corners; the last is joined to the first.
        count: How many points to make.

    Returns:
        float32 [count, 2].
    """
    closed = np.concatenate((points, points[:1]))
    position = np.linspace(0, len(closed) - 1, count)
    known = np.arange(len(closed))
    return np.stack([np.interp(position, known, closed[:, axis]) for axis in (0, 1)], axis=1).astype(np.float32)


def box_candidates(
    before: NDArray[np.floating],
    after: NDArray[np.floating],
    *,
    smallest_side: float = 2.0,
    largest_ratio: float = 100.0,
    smallest_area: float = 0.1,
) -> BoolArray:
    """Which boxes are still worth learning after a warp.

    Args:
        before: [n, 4] corners before, multiplied by the drawn scale.
        after: [n, 4] corners after clipping.
        smallest_side: Pixels that both sides must exceed.
        largest_ratio: Limit of the longer side over the shorter.
        smallest_area: Share of the old area that must be left.

    Returns:
        bool [n].
    """
    old_w, old_h = before[:, 2] - before[:, 0], before[:, 3] - before[:, 1]
    w, h = after[:, 2] - after[:, 0], after[:, 3] - after[:, 1]
    ratio = np.maximum(w / (h + _TINY), h / (w + _TINY))
    visible = w * h / (old_w * old_h + _TINY)
    large = (w > smallest_side) & (h > smallest_side)
    return np.asarray(large & (visible > smallest_area) & (ratio < largest_ratio))


# ------------------------------------------------------------------------------------------- colour, flips, mixing


def shift_hsv(
    image: UInt8Array,
    gains: tuple[float, float, float],
    units: tuple[float, float, float],
) -> UInt8Array:
    """Multiply hue, saturation and value.

    Args:
        image: uint8 [h, w, 3] BGR.
        gains: Largest relative change of hue, saturation, value; all zero leaves the image alone.
        units: Drawn numbers in [-1, 1].

    Returns:
        uint8 [h, w, 3] BGR, a new array unless all gains are zero.
    """
    if not any(gains):
        return image
    hue_factor, saturation_factor, value_factor = (1 + unit * gain for unit, gain in zip(units, gains, strict=True))
    level = np.arange(256, dtype=np.float64)
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
    merged = cv2.merge(
        (
            cv2.LUT(hue, ((level * hue_factor) % 180).astype(np.uint8)),
            cv2.LUT(saturation, np.clip(level * saturation_factor, 0, 255).astype(np.uint8)),
            cv2.LUT(value, np.clip(level * value_factor, 0, 255).astype(np.uint8)),
        ),
    )
    return _u8(cv2.cvtColor(merged, cv2.COLOR_HSV2BGR))


def flip(image: UInt8Array, labels: Float32Array, *, vertical: bool) -> tuple[UInt8Array, Float32Array]:
    """Swap top and bottom, or left and right.

    Args:
        image: uint8 [h, w, 3].
        labels: [n, 5] fractions.
        vertical: Whether top and bottom are swapped.

    Returns:
        Image and labels.
    """
    axis, centre = (0, 2) if vertical else (1, 1)
    flipped = labels.copy()
    flipped[:, centre] = 1 - flipped[:, centre]
    return np.flip(image, axis), flipped


def mix_up(first: UInt8Array, second: UInt8Array, ratio: float) -> UInt8Array:
    """Blend two images, truncating.

    Args:
        first: uint8 [h, w, 3].
        second: The same shape.
        ratio: Share of the first.

    Returns:
        uint8 [h, w, 3].
    """
    return _u8((first * ratio + second * (1 - ratio)).astype(np.uint8))


def paste_mirrored(
    image: UInt8Array,
    boxes: Float32Array,
    polygons: Polygons,
    chosen: Sequence[int],
) -> tuple[UInt8Array, Float32Array, Polygons]:
    """Copy-paste: paste objects into the mirrored place where they hide less than 30 % of every other.

    Args:
        image: uint8 [h, w, 3].
        boxes: [n, 5] class and corners in pixels.
        polygons: One per box, in pixels.
        chosen: Rows to try, in order.

    Returns:
        Image, boxes and polygons with the pasted ones appended.
    """
    width = image.shape[1]
    mask = np.zeros(image.shape[:2], dtype=np.uint8)
    for row in chosen:
        left, top, right, bottom = boxes[row, 1:]
        box = np.array((width - right, top, width - left, bottom), dtype=np.float32)
        if (_hidden_share(box, boxes[:, 1:]) >= 0.30).any():
            continue
        mirrored = polygons[row] * np.array((-1, 1), np.float32) + np.array((width, 0), np.float32)
        boxes = np.concatenate((boxes, [[boxes[row, 0], *box]])).astype(np.float32)
        polygons = (*polygons, mirrored)
        cv2.drawContours(mask, [mirrored.astype(np.int32)], -1, 1, cv2.FILLED)
    result = np.where(mask[..., None] > 0, image[:, ::-1], image)
    return result, boxes, polygons


def _hidden_share(box: Float32Array, others: Float32Array) -> Float32Array:
    overlap = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    area = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return np.asarray(overlap.clip(0).prod(axis=1) / (area + _TINY), dtype=np.float32)


# ------------------------------------------------------------------------------------------- whole samples


@dataclass(frozen=True, slots=True, eq=False)
class LoadedImage:
    """An image after loading and resizing, with labels as fractions."""

    image: UInt8Array
    labels: Float32Array
    polygons: Polygons = ()


LoadImage = Callable[[int], LoadedImage]


def assemble_mosaic(load: LoadImage, draw: MosaicDraw, image_size: int) -> tuple[UInt8Array, Float32Array, Polygons]:
    """Lay four images around a centre on a canvas of twice the size.

    Args:
        load: Gives an image by its index.
        draw: Centre and indices.
        image_size: Side of the sample in pixels.

    Returns:
        The canvas uint8 [2S, 2S, 3]; boxes [n, 5] as clipped corners in its pixels; polygons, clipped too.
    """
    side = 2 * image_size
    canvas = np.full((side, side, 3), FILL, dtype=np.uint8)
    boxes: list[Float32Array] = []
    polygons: list[Float32Array] = []
    for corner, index in enumerate(draw.tiles):
        tile = load(index)
        height, width = tile.image.shape[:2]
        left = draw.centre_x if corner % 2 else draw.centre_x - width
        top = draw.centre_y if corner >= 2 else draw.centre_y - height
        _paint(canvas, tile.image, left, top)
        boxes.append(to_corners(tile.labels, (height, width), (left, top)))
        polygons.extend(polygons_to_pixels(tile.polygons, (height, width), (left, top)))
    merged = np.concatenate(boxes)
    merged[:, 1:] = merged[:, 1:].clip(0, side)
    return canvas, merged, tuple(points.clip(0, side) for points in polygons)


def _paint(canvas: UInt8Array, tile: UInt8Array, left: int, top: int) -> None:
    """Copy the part of a tile that lies on the canvas."""
    bottom = min(top + tile.shape[0], canvas.shape[0])
    right = min(left + tile.shape[1], canvas.shape[1])
    y, x = max(top, 0), max(left, 0)
    canvas[y:bottom, x:right] = tile[y - top : bottom - top, x - left : right - left]


def mosaic_sample(load: LoadImage, draw: MosaicDraw, image_size: int) -> tuple[UInt8Array, Float32Array]:
    """A whole mosaic: assembled, copy-pasted, warped back to the sample's size.

    Args:
        load: Gives an image by its index.
        draw: What was drawn.
        image_size: Side S of the sample in pixels.

    Returns:
        uint8 [S, S, 3] and boxes [n, 5] as corners in its pixels.
    """
    canvas, boxes, polygons = assemble_mosaic(load, draw, image_size)
    if draw.copy_paste_seed is not None and polygons and len(polygons) == len(boxes):
        rng = np.random.default_rng(draw.copy_paste_seed)
        chosen = rng.permutation(len(polygons))[: round(draw.copy_paste * len(polygons))].tolist()
        canvas, boxes, polygons = paste_mirrored(canvas, boxes, polygons, chosen)
    size_in, size_out = (2 * image_size, 2 * image_size), (image_size, image_size)
    warped = warp_image(canvas, draw.perspective, size_out)
    return warped, warp_boxes(boxes, draw.perspective, size_in, size_out, polygons)


def single_sample(
    item: LoadedImage,
    draw: PerspectiveDraw,
    size: tuple[int, int],
) -> tuple[UInt8Array, Float32Array]:
    """One image alone: letterboxed and warped in place.

    Args:
        item: The loaded image.
        draw: What was drawn.
        size: (height, width) of the sample in pixels.

    Returns:
        uint8 [H, W, 3] and boxes [n, 5] as corners in its pixels.
    """
    height, width = item.image.shape[:2]
    plan = plan_letterbox((height, width), size)
    scaled = (plan.ratio * height, plan.ratio * width)
    image = letterbox(item.image, plan)
    boxes = to_corners(item.labels, scaled, plan.pad)
    polygons = polygons_to_pixels(item.polygons, scaled, plan.pad)
    return warp_image(image, draw, size), warp_boxes(boxes, draw, size, size, polygons)


def training_sample(
    load: LoadImage,
    index: int,
    draw: SampleDraw,
    settings: AugmentSettings,
    size: tuple[int, int],
) -> tuple[UInt8Array, Float32Array]:
    """Make one training sample.

    Args:
        load: Gives an image, resized to the longer side of the sample, by its index.
        index: The image (used when there is no mosaic).
        draw: Everything random.
        settings: The HSV gains.
        size: (height, width) of the sample in pixels; square for mosaics.

    Returns:
        uint8 [3, H, W] RGB, contiguous, and labels float32 [n, 5] (class, x, y, w, h as fractions).
    """
    if draw.mosaics:
        image, boxes = mosaic_sample(load, draw.mosaics[0], size[0])
        for other in draw.mosaics[1:]:
            second, more = mosaic_sample(load, other, size[0])
            image, boxes = mix_up(image, second, draw.mixup_ratio), np.concatenate((boxes, more))
    else:
        image, boxes = single_sample(load(index), draw.perspective, size)
    labels = to_fractions(boxes, size)
    image = shift_hsv(image, (settings.hsv_h, settings.hsv_s, settings.hsv_v), draw.hsv)
    if draw.flip_vertical:
        image, labels = flip(image, labels, vertical=True)
    if draw.flip_horizontal:
        image, labels = flip(image, labels, vertical=False)
    return to_planes(image), labels


def to_planes(image: UInt8Array) -> UInt8Array:
    """BGR rows to RGB planes.

    Args:
        image: uint8 [h, w, 3] BGR.

    Returns:
        uint8 [3, h, w] RGB, contiguous.
    """
    return np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))


def _u8(image: object) -> UInt8Array:
    """OpenCV's stubs promise any array; these calls keep uint8."""
    return np.asarray(image, dtype=np.uint8)
