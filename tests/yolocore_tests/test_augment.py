"""Geometry and augmentation against the reference's outputs on logged draws."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yolocore.data.augment import (
    AugmentSettings,
    LoadedImage,
    MosaicDraw,
    PerspectiveDraw,
    SampleDraw,
    assemble_mosaic,
    box_candidates,
    draw_sample,
    flip,
    letterbox,
    mix_up,
    paste_mirrored,
    perspective_matrix,
    plan_letterbox,
    resize_to_fit,
    resized_shape,
    shift_hsv,
    to_corners,
    to_fractions,
    training_sample,
    warp_boxes,
    warp_image,
)
from yolocore.hyperparameters import Hyperparameters

WARP_CASES = (
    "translate_scale",
    "rotate_shear",
    "mosaic_border",
    "perspective",
    "identity",
    "small_scale_filters_boxes",
)
SAMPLE_CASES = (
    "mosaic_scratch_low",
    "mosaic_mixup_flips",
    "no_mosaic",
    "mosaic_half",
    "rect_train_no_mosaic",
)


@pytest.fixture(scope="module")
def golden(small_golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(small_golden_dir / "augment_small.npz"))


@pytest.fixture(scope="module")
def geometry(small_golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(small_golden_dir / "geometry.npz"))


@pytest.fixture(scope="module")
def pixels(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "augment.npz"))


@pytest.fixture(scope="module")
def cases(small_golden_dir: Path) -> dict[str, Any]:
    return json.loads((small_golden_dir / "augment.json").read_text())


def as_perspective(draws: Any) -> PerspectiveDraw:
    px, py, angle, scale, shear_x, shear_y, tx, ty = (float(value) for value in draws)
    return PerspectiveDraw(
        perspective_x=px,
        perspective_y=py,
        angle=angle,
        scale=scale,
        shear_x=shear_x,
        shear_y=shear_y,
        translate_x=tx,
        translate_y=ty,
    )


def as_sample(log: list[Any], settings: AugmentSettings, rect: bool) -> SampleDraw:
    """The reference's log of random calls, read in the order in which YOLOv5 draws it."""
    values = iter(result for _, _, result in log)

    def perspective() -> PerspectiveDraw:
        return as_perspective([next(values) for _ in range(8)])

    def mosaic() -> MosaicDraw:
        centre_y, centre_x = int(next(values)), int(next(values))
        next(values)  # the three others, before shuffling
        tiles = tuple(next(values))
        return MosaicDraw(centre_x=centre_x, centre_y=centre_y, tiles=tiles, perspective=perspective())

    mosaics: tuple[MosaicDraw, ...] = ()
    alone, ratio = PerspectiveDraw(), 1.0
    if not rect and next(values) < settings.mosaic:
        mosaics = (mosaic(),)
        if next(values) < settings.mixup:
            next(values)  # the own index of the second mosaic
            mosaics += (mosaic(),)
            ratio = next(values)
    else:
        alone = perspective()
    hsv = tuple(next(values))
    flips = [next(values) < settings.flipud, next(values) < settings.fliplr]
    assert list(values) == []
    return SampleDraw(
        mosaics=mosaics,
        mixup_ratio=ratio,
        perspective=alone,
        hsv=hsv,
        flip_vertical=flips[0],
        flip_horizontal=flips[1],
    )


# ------------------------------------------------------------------------------------------- letterbox and loading


def test_plan_letterbox_golden_rows_exact(geometry: dict[str, np.ndarray]) -> None:
    for row in geometry["letterbox"]:
        height, width, new_height, new_width, auto, scale_up = row[:6].tolist()
        plan = plan_letterbox(
            (int(height), int(width)),
            (int(new_height), int(new_width)),
            scale_up=bool(scale_up),
            stride=32 if auto else None,
        )
        top, bottom, left, right = plan.borders
        shape = (plan.resized[0] + top + bottom, plan.resized[1] + left + right)
        assert [plan.ratio, plan.ratio, *plan.pad, *shape] == row[6:12].tolist()
        if row[12] >= 0:
            assert [top, bottom, left, right] == row[12:].tolist()


def test_letterbox_golden_pixels_within_two_levels(geometry: dict[str, np.ndarray]) -> None:
    image = geometry["letterbox_pixels_in"]
    result = letterbox(image, plan_letterbox(image.shape[:2], (64, 64)))
    assert np.abs(result.astype(int) - geometry["letterbox_pixels_out_64x64"]).max() <= 2


def test_resized_shape_golden_sizes_exact(geometry: dict[str, np.ndarray]) -> None:
    sizes = [tuple(size) for size in geometry["rect/image_hw"].tolist()]
    assert [list(resized_shape(size, 320)) for size in sizes] == geometry["load_image_320/hw_resized"].tolist()


def test_to_corners_golden_boxes_exact(geometry: dict[str, np.ndarray]) -> None:
    labels = with_class(geometry["boxes/xywhn"])
    corners = to_corners(labels, (217, 333), (12.5, 3.25))[:, 1:]
    np.testing.assert_array_equal(corners, geometry["boxes/xywhn2xyxy_w333_h217_padw12.5_padh3.25"])


def test_to_fractions_golden_boxes_exact_clipped_and_inside(geometry: dict[str, np.ndarray]) -> None:
    corners = with_class(geometry["boxes/xywhn2xyxy_w333_h217_padw12.5_padh3.25"])
    fractions = to_fractions(corners, (230, 350))[:, 1:]
    np.testing.assert_array_equal(fractions, geometry["boxes/xyxy2xywhn_w350_h230_clip_eps1e-3"])
    # There is no other way to ask for it, but boxes that lie inside are the same without clipping.
    inside = (corners[:, 1:] >= 0).all(axis=1) & (corners[:, 3:] <= (349.999, 229.999)).all(axis=1)
    assert 0 < inside.sum() < len(inside)
    np.testing.assert_array_equal(fractions[inside], geometry["boxes/xyxy2xywhn_w350_h230_noclip"][inside])


def with_class(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate((np.zeros((len(boxes), 1), np.float32), boxes), axis=1)


def test_resize_to_fit_shrinking_for_validation_averages_areas() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, 2:] = 100
    image[0, 0] = 40
    result = resize_to_fit(image, 2, augmenting=False)
    assert result[..., 0].tolist() == [[10, 100], [0, 100]]


def test_to_corners_golden_within_tolerance(geometry: dict[str, np.ndarray]) -> None:
    fractions = geometry["boxes/xywhn"]
    labels = np.concatenate((np.zeros((len(fractions), 1), np.float32), fractions), axis=1)
    corners = to_corners(labels, (217, 333), (12.5, 3.25))
    expected = geometry["boxes/xywhn2xyxy_w333_h217_padw12.5_padh3.25"]
    np.testing.assert_allclose(corners[:, 1:], expected, atol=1e-4, rtol=0)
    back = to_fractions(corners, (230, 350))
    np.testing.assert_allclose(back[:, 1:], geometry["boxes/xyxy2xywhn_w350_h230_clip_eps1e-3"], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------- random perspective


@pytest.mark.parametrize("case", WARP_CASES)
def test_warp_boxes_golden_draws_same_boxes(
    case: str,
    golden: dict[str, np.ndarray],
    cases: dict[str, Any],
) -> None:
    draw = as_perspective(golden[f"rp/{case}/draws"])
    height, width = golden["rp/image_hw_in"][WARP_CASES.index(case)].tolist()
    border_y, border_x = cases[f"rp/{case}"]["border"]
    size_out = (height + 2 * border_y, width + 2 * border_x)
    matrix = golden[f"rp/{case}/M_used"]
    computed = perspective_matrix(draw, (height, width), size_out)
    np.testing.assert_allclose(computed[: len(matrix)], matrix, atol=1e-4, rtol=0)
    boxes = warp_boxes(golden[f"rp/{case}/targets_in"], draw, (height, width), size_out)
    np.testing.assert_allclose(boxes, golden[f"rp/{case}/targets_out"], atol=1e-4, rtol=0)


def test_warp_boxes_golden_polygons_same_boxes(golden: dict[str, np.ndarray]) -> None:
    draw = as_perspective(golden["rp_segments/draws"])
    size = tuple(golden["rp_segments/image_hw"].tolist())
    polygons = tuple(golden[f"rp_segments/segment_{index}"] for index in range(4))
    boxes = warp_boxes(golden["rp_segments/targets_in"], draw, size, size, polygons)
    np.testing.assert_allclose(boxes, golden["rp_segments/targets_out"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", WARP_CASES)
def test_warp_image_golden_draws_same_pixels(
    case: str,
    pixels: dict[str, np.ndarray],
    cases: dict[str, Any],
) -> None:
    image = pixels[f"rp/{case}/image_in"]
    border_y, border_x = cases[f"rp/{case}"]["border"]
    size_out = (image.shape[0] + 2 * border_y, image.shape[1] + 2 * border_x)
    result = warp_image(image, as_perspective(pixels[f"rp/{case}/draws"]), size_out)
    assert np.abs(result.astype(int) - pixels[f"rp/{case}/image_out"]).max() <= 2


@pytest.mark.parametrize("area", [0.1, 0.01])
def test_box_candidates_golden_pairs_same_choice(area: float, golden: dict[str, np.ndarray]) -> None:
    before, after = golden["box_candidates/before"], golden["box_candidates/after"]
    kept = box_candidates(before, after, smallest_area=area)
    assert kept.tolist() == golden[f"box_candidates/keep_area{area}"].tolist()


# ------------------------------------------------------------------------------------------- colour and mixing


@pytest.mark.parametrize("case", [0, 1, 2])
def test_shift_hsv_golden_draws_same_pixels(case: int, golden: dict[str, np.ndarray]) -> None:
    gains, units = golden[f"hsv/{case}/gains_hsv"].tolist(), golden[f"hsv/{case}/unit_draws"].tolist()
    result = shift_hsv(golden[f"hsv/{case}/image_in_bgr"], tuple(gains), tuple(units))
    assert np.abs(result.astype(int) - golden[f"hsv/{case}/image_out_bgr"]).max() <= 2


def test_mix_up_golden_ratio_same_pixels(golden: dict[str, np.ndarray]) -> None:
    mixed = mix_up(golden["mixup/in1"], golden["mixup/in2"], 0.4375)
    assert (mixed == golden["mixup/out_r0.4375"]).all()


@pytest.mark.parametrize(
    ("vertical", "place", "centre"), [(False, (1, 6), [0.8125, 0.375]), (True, (2, 1), [0.1875, 0.625])]
)
def test_flip_label_moves_with_its_pixels(vertical: bool, place: tuple[int, int], centre: list[float]) -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[1, 1] = 255
    flipped, labels = flip(image, np.array([[2, 0.1875, 0.375, 0.125, 0.25]], np.float32), vertical=vertical)
    assert np.argwhere(flipped[..., 0]).tolist() == [list(place)]
    assert labels.tolist() == [[2, *centre, 0.125, 0.25]]


def test_paste_mirrored_free_place_copies_object_and_label() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[5:11, 2:9] = 200
    boxes = np.array([[1, 2, 5, 8, 10]], np.float32)
    polygon = np.array([[2, 5], [8, 5], [8, 10], [2, 10]], np.float32)
    result, pasted, polygons = paste_mirrored(image, boxes, (polygon,), [0])
    assert pasted.tolist() == [[1, 2, 5, 8, 10], [1, 32, 5, 38, 10]]
    assert polygons[1].tolist() == [[38, 5], [32, 5], [32, 10], [38, 10]]
    assert (result[6:10, 33:37] == 200).all()
    assert image[6, 35].tolist() == [0, 0, 0]


def test_paste_mirrored_covered_place_leaves_everything() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    boxes = np.array([[1, 2, 5, 8, 10], [0, 31, 4, 39, 11]], np.float32)
    polygon = np.array([[2, 5], [8, 5], [8, 10], [2, 10]], np.float32)
    _, pasted, polygons = paste_mirrored(image, boxes, (polygon, polygon), [0])
    assert len(pasted) == len(polygons) == 2


# ------------------------------------------------------------------------------------------- whole samples


@pytest.mark.parametrize("case", SAMPLE_CASES)
def test_training_sample_golden_log_same_sample(
    case: str,
    pixels: dict[str, np.ndarray],
    cases: dict[str, Any],
) -> None:
    about = cases[f"ds/{case}"]
    settings = AugmentSettings(**about["hyp"])
    files = [int(name.split(".")[0]) for name in about["order_of_files"]]

    def load(index: int) -> LoadedImage:
        image = resize_to_fit(pixels[f"ds/image_{files[index]}_bgr"], about["img_size"], augmenting=True)
        return LoadedImage(image, pixels[f"ds/labels_{files[index]}"].astype(np.float32))

    expected = pixels[f"ds/{case}/image_out_rgb_chw"]
    draw = as_sample(about["draws"], settings, about["rect"])
    image, labels = training_sample(load, about["index"], draw, settings, expected.shape[1:])
    assert np.abs(image.astype(int) - expected).max() <= 2
    np.testing.assert_allclose(labels, pixels[f"ds/{case}/labels_out"][:, 1:], atol=1e-6, rtol=0)


def test_assemble_mosaic_tiles_touch_the_centre_and_are_cropped() -> None:
    levels = [10, 20, 30, 40]

    def load(index: int) -> LoadedImage:
        image = np.full((8, 8, 3), levels[index], np.uint8)
        return LoadedImage(image, np.array([[index, 0.5, 0.5, 1, 1]], np.float32))

    draw = MosaicDraw(centre_x=5, centre_y=9, tiles=(0, 1, 2, 3))
    canvas, boxes, _ = assemble_mosaic(load, draw, 8)
    assert canvas[[8, 8, 9, 9], [4, 5, 4, 5], 0].tolist() == levels
    assert canvas[0, 5, 0] == 114
    assert boxes.tolist() == [[0, 0, 1, 5, 9], [1, 5, 1, 13, 9], [2, 0, 9, 5, 16], [3, 5, 9, 13, 16]]


def test_draw_sample_same_generator_same_draw() -> None:
    settings = AugmentSettings.from_hyperparameters(Hyperparameters(mixup=0.5, copy_paste=0.5, degrees=10.0))
    first = draw_sample(settings, 3, 10, 64, np.random.default_rng(5))
    again = draw_sample(settings, 3, 10, 64, np.random.default_rng(5))
    other = draw_sample(settings, 3, 10, 64, np.random.default_rng(6))
    assert first == again
    assert first != other
    assert 3 in first.mosaics[0].tiles


def test_draw_sample_many_draws_stay_in_their_ranges() -> None:
    settings = AugmentSettings(mosaic=0.5, mixup=0.5, translate=0.1, scale=0.5, degrees=7.0, fliplr=0.5)
    draws = [draw_sample(settings, 0, 4, 64, np.random.default_rng(seed)) for seed in range(400)]
    warps = [mosaic.perspective for draw in draws for mosaic in draw.mosaics]
    warps += [draw.perspective for draw in draws if not draw.mosaics]
    assert {len(draw.mosaics) for draw in draws} == {0, 1, 2}
    assert 150 < sum(bool(draw.mosaics) for draw in draws) < 250
    assert 150 < sum(draw.flip_horizontal for draw in draws) < 250
    assert not any(draw.flip_vertical for draw in draws)
    assert 0.5 <= min(warp.scale for warp in warps) < 0.55
    assert 1.45 < max(warp.scale for warp in warps) <= 1.5
    assert 6.5 < max(abs(warp.angle) for warp in warps) <= 7
    assert 0.4 <= min(warp.translate_x for warp in warps) < 0.41
    assert {warp.shear_x for warp in warps} == {0.0}
    centres = [mosaic.centre_x for draw in draws for mosaic in draw.mosaics]
    assert 32 <= min(centres) < 36
    assert 92 < max(centres) < 96


def test_draw_sample_probabilities_zero_only_the_image_itself() -> None:
    draw = draw_sample(AugmentSettings(), 2, 4, 64, np.random.default_rng(0))
    assert draw.mosaics == ()
    assert draw.perspective == PerspectiveDraw()
    assert (draw.flip_vertical, draw.flip_horizontal) == (False, False)
