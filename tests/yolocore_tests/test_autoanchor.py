"""AutoAnchor against the reference's figures."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from yolocore.autoanchor import (
    anchor_fit,
    anchor_fitness,
    autoanchor,
    label_sizes,
    make_anchors,
)
from yolocore.data.dataset import LabelledImage
from yolocore.model.anchors import DEFAULT_ANCHORS, STRIDES

CASES = ("coco_like", "small_objects", "thr3", "elongated")


@pytest.fixture(scope="module")
def golden(small_golden_dir: Path) -> Mapping[str, np.ndarray]:
    return np.load(small_golden_dir / "autoanchor.npz")


@pytest.fixture(scope="module")
def about(small_golden_dir: Path) -> dict:
    return json.loads((small_golden_dir / "autoanchor.json").read_text())


def images(golden: Mapping[str, np.ndarray], case: str) -> list[LabelledImage]:
    rows = golden[f"{case}/labels_img_w_h"]
    found = []
    for index, (width, height) in enumerate(golden[f"{case}/image_wh"].tolist()):
        own = rows[rows[:, 0] == index, 1:]
        labels = np.concatenate([np.zeros((len(own), 1)), np.full((len(own), 2), 0.5), own], axis=1)
        found.append(LabelledImage(Path(f"{index}.png"), labels.astype(np.float32), (height, width)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_anchor_fit_matches_golden(golden, about, case) -> None:
    sizes = label_sizes(images(golden, case), about[case]["img_size"], golden[f"{case}/scale_draws"][:, 0])
    before = golden[f"{case}/anchors_before_pixels"].astype(np.float64).reshape(-1, 2)
    strides = np.array(STRIDES, dtype=np.float64).reshape(-1, 1, 1)
    after = (golden[f"{case}/anchors_after_grid_units"].astype(np.float64) * strides).reshape(-1, 2)
    thr, expected = about[case]["thr"], about[case]

    fits = [anchor_fit(sizes, anchors, thr) for anchors in (before, after)][: len(expected["bpr"])]

    np.testing.assert_allclose([fit.bpr for fit in fits], expected["bpr"], rtol=0, atol=1e-6)
    np.testing.assert_allclose([fit.aat for fit in fits], expected["aat"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_autoanchor_decides_as_the_reference_and_its_anchors_are_no_worse(golden, about, case) -> None:
    split, size, thr = images(golden, case), about[case]["img_size"], about[case]["thr"]

    result = autoanchor(split, DEFAULT_ANCHORS, size, thr, seed=0)

    assert result.outcome == ("replaced" if about[case]["replaced"] else "kept")
    assert result.labels == len(golden[f"{case}/labels_img_w_h"])
    if result.outcome == "kept":
        assert result.anchors == DEFAULT_ANCHORS
        return
    assert result.after.bpr > result.before.bpr
    anchors = np.array(result.anchors)
    assert anchors.shape == (3, 3, 2)
    assert (np.diff(anchors.prod(axis=2).ravel()) >= 0).all()
    sizes = label_sizes(split, size)
    assert anchor_fitness(sizes, anchors.reshape(-1, 2), thr) > about[case]["fitness"][1] - 0.01
    assert autoanchor(split, DEFAULT_ANCHORS, size, thr, seed=0) == result


def test_make_anchors_refinement_raises_the_fitness_of_k_means(golden, about) -> None:
    case = "coco_like"
    sizes = label_sizes(images(golden, case), 640)
    made = make_anchors(sizes, 9, 640, 4.0, np.random.default_rng(0))
    assert anchor_fitness(sizes, made, 4.0) > about[case]["fitness"][0]


def test_make_anchors_of_equal_labels_starts_from_random_ones(caplog) -> None:
    sizes = np.full((20, 2), 40.0)
    made = make_anchors(sizes, 9, 640, 4.0, np.random.default_rng(0))
    assert "too few different label sizes for 9 anchors" in caplog.text
    assert anchor_fit(sizes, made, 4.0).bpr == 1.0


def test_autoanchor_without_labels_keeps_the_anchors() -> None:
    empty = [LabelledImage(Path("a.png"), np.zeros((0, 5), dtype=np.float32), (64, 64))]
    result = autoanchor(empty, DEFAULT_ANCHORS, 640, 4.0, seed=0)
    assert (result.outcome, result.labels, result.anchors) == ("kept", 0, DEFAULT_ANCHORS)
