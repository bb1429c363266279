from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolocore.metrics import (
    IOU_THRESHOLDS,
    ClassMetrics,
    DetectionMetrics,
    average_precision,
    class_metrics,
    match_detections,
    pairwise_iou,
    smooth,
    summarise,
)

AP_CASES = (
    "three_class",
    "gt_class_without_detections",
    "detected_class_without_gt",
    "one_class_few",
    "single_detection",
    "many",
)
Scene = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


@pytest.mark.parametrize("case", ["basic", "crowded_same_class", "one_gt", "no_match"])
def test_match_detections_golden_case_equals_reference(small_golden_dir: Path, case: str) -> None:
    golden = np.load(small_golden_dir / "metrics_match.npz")
    detections, labels = golden[f"{case}/detections"], golden[f"{case}/labels"]
    np.testing.assert_array_equal(golden["iouv"], IOU_THRESHOLDS)
    np.testing.assert_array_equal(pairwise_iou(labels[:, 1:], detections[:, :4]), golden[f"{case}/iou"])
    np.testing.assert_array_equal(match_detections(detections, labels), golden[f"{case}/correct"])


def test_match_detections_two_for_one_label_takes_more_confident_not_closer() -> None:
    labels = np.array([[0, 0, 0, 10, 10]], dtype=np.float32)
    detections = np.array([[0, 0, 10, 8, 0.9, 0], [0, 0, 10, 10, 0.8, 0]], dtype=np.float32)
    correct = match_detections(detections, labels, np.array([0.5, 0.9], dtype=np.float32))
    assert correct.tolist() == [[True, False], [False, True]]


def test_match_detections_other_class_is_never_correct() -> None:
    labels = np.array([[1, 0, 0, 10, 10]], dtype=np.float32)
    detections = np.array([[0, 0, 10, 10, 0.9, 0]], dtype=np.float32)
    assert not match_detections(detections, labels).any()


@pytest.mark.parametrize(("detections", "labels"), [(0, 2), (3, 0), (0, 0)])
def test_match_detections_empty_side_gives_no_correct(detections: int, labels: int) -> None:
    correct = match_detections(np.zeros((detections, 6), np.float32), np.zeros((labels, 5), np.float32))
    assert correct.shape == (detections, 10)
    assert not correct.any()


@pytest.mark.parametrize("case", AP_CASES)
def test_class_metrics_golden_case_equals_reference(small_golden_dir: Path, case: str) -> None:
    golden = np.load(small_golden_dir / "metrics_ap.npz")
    inputs = [golden[f"{case}/{name}"] for name in ("tp", "conf", "pred_cls", "target_cls")]
    rows: ClassMetrics = class_metrics(*inputs)
    figures = {
        "classes": rows.classes,
        "p": rows.precision,
        "r": rows.recall,
        "f1": rows.f1,
        "tp": rows.true_positives,
        "fp": rows.false_positives,
        "ap": rows.ap,
    }
    for name, values in figures.items():
        np.testing.assert_allclose(values, golden[f"{case}/out_{name}"], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", AP_CASES)
def test_summarise_golden_case_equals_reference(small_golden_dir: Path, case: str) -> None:
    golden = np.load(small_golden_dir / "metrics_ap.npz")
    inputs = [golden[f"{case}/{name}"] for name in ("tp", "conf", "pred_cls", "target_cls")]
    metrics = summarise(*inputs)
    means = [metrics.precision, metrics.recall, metrics.map50, metrics.map]
    np.testing.assert_allclose(means, golden[f"{case}/out_mp_mr_map50_map"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.f1, golden[f"{case}/out_f1"].mean(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(metrics.fitness, golden[f"{case}/out_fitness"][0], rtol=0, atol=1e-9)
    class_ap = golden[f"{case}/out_ap"]
    assert list(metrics.class_ap) == golden[f"{case}/out_classes"].tolist()
    np.testing.assert_allclose(list(metrics.class_ap.values()), class_ap.mean(axis=1), rtol=0, atol=1e-9)
    np.testing.assert_allclose(list(metrics.class_ap50.values()), class_ap[:, 0], rtol=0, atol=1e-9)


def test_smooth_and_average_precision_golden_equal_reference(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "metrics_ap.npz")
    np.testing.assert_allclose(smooth(golden["smooth/y"]), golden["smooth/out_f0.1"], rtol=0, atol=1e-9)
    area = average_precision(golden["compute_ap/recall"], golden["compute_ap/precision"])
    np.testing.assert_allclose(area, golden["compute_ap/ap"], rtol=0, atol=1e-9)


def test_fitness_golden_rows_equal_reference(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "metrics_ap.npz")
    fitness = [DetectionMetrics(map50=row[2], map=row[3]).fitness for row in golden["fitness/x"]]
    np.testing.assert_allclose(fitness, golden["fitness/out"], rtol=0, atol=1e-12)


def test_summarise_perfect_detection_scores_0995() -> None:
    correct = np.ones((4, 10), dtype=np.bool_)
    classes = np.array([0, 0, 2, 2])
    confidence = np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32)
    metrics = summarise(correct, confidence, classes, classes, images=2)
    assert metrics.map50 == pytest.approx(0.995, abs=1e-12)
    assert metrics.map == pytest.approx(0.995, abs=1e-12)
    assert (metrics.precision, metrics.recall, metrics.images, metrics.labels) == (1.0, 1.0, 2, 4)
    assert metrics.class_ap == {0: pytest.approx(0.995), 2: pytest.approx(0.995)}


def test_summarise_no_correct_detection_gives_zeros() -> None:
    correct = np.zeros((3, 10), dtype=np.bool_)
    confidence = np.array([0.3, 0.2, 0.1], dtype=np.float32)
    metrics = summarise(correct, confidence, np.zeros(3), np.array([0, 1]), images=1)
    assert metrics == DetectionMetrics(class_ap={0: 0.0, 1: 0.0}, class_ap50={0: 0.0, 1: 0.0}, images=1, labels=2)


def test_summarise_nothing_at_all_gives_zeros() -> None:
    none = np.zeros(0, dtype=np.float32)
    assert summarise(np.zeros((0, 10), dtype=np.bool_), none, none, none) == DetectionMetrics()


def test_summarise_detections_without_labels_give_zeros() -> None:
    correct = np.zeros((3, 10), dtype=np.bool_)
    confidence = np.array([0.3, 0.2, 0.1], dtype=np.float32)
    assert summarise(correct, confidence, np.zeros(3), np.zeros(0), images=4) == DetectionMetrics(images=4)


def test_to_mapping_names_every_figure() -> None:
    metrics = DetectionMetrics(0.1, 0.2, 0.3, 0.5, 0.25, {0: 0.2, 4: 0.3}, {0: 0.4, 4: 0.6}, 1.0, 2.0, 3.0, 7, 9)
    assert metrics.to_mapping() == {
        "fitness": pytest.approx(0.275),
        "map50": 0.5,
        "map": 0.25,
        "precision": 0.1,
        "recall": 0.2,
        "f1": 0.3,
        "val_box": 1.0,
        "val_obj": 2.0,
        "val_cls": 3.0,
        "class_ap/0": 0.2,
        "class_ap/4": 0.3,
    }


def scattered_scene(jitter: float) -> Scene:
    """20 images of 12 labels each in cells of their own, found at least once, and 3 detections of nothing."""
    rng = np.random.default_rng(5)
    scene: Scene = []
    for _ in range(20):
        corner = np.stack(np.meshgrid(np.arange(5), np.arange(3)), axis=-1).reshape(-1, 2)[rng.permutation(15)] * 100.0
        size = rng.uniform(30, 60, (15, 2))
        boxes = np.concatenate((corner + 20, corner + 20 + size), axis=1)
        classes = rng.integers(0, 3, 15)
        labels = np.concatenate((classes[:12, None], boxes[:12]), axis=1).astype(np.float32)
        owner = np.concatenate((np.arange(15), rng.integers(0, 12, 8)))
        shaken = boxes[owner] + rng.normal(0, jitter, (len(owner), 4))
        score = rng.uniform(0.05, 1, len(owner))
        rows = np.concatenate((shaken, score[:, None], classes[owner, None]), axis=1)
        scene.append((rows[np.argsort(-score)].astype(np.float32), labels))
    return scene


def coco_evaluation(scene: Scene) -> COCOeval:
    """The scene judged by pycocotools, at our thresholds, with every detection counted."""
    truth = COCO()
    annotations, rows = [], []
    for image, (detections, labels) in enumerate(scene, start=1):
        for label in labels.astype(np.float64):
            width, height = label[3] - label[1], label[4] - label[2]
            row = {"image_id": image, "category_id": int(label[0]), "bbox": [label[1], label[2], width, height]}
            annotations.append(row | {"id": len(annotations) + 1, "area": width * height, "iscrowd": 0})
        x1, y1, x2, y2, score, index = detections.astype(np.float64).T
        rows.append(np.stack((np.full(len(x1), image), x1, y1, x2 - x1, y2 - y1, score, index), axis=1))
    images = [{"id": image} for image in range(1, len(scene) + 1)]
    truth.dataset = {"images": images, "categories": [{"id": i} for i in range(3)], "annotations": annotations}
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(np.concatenate(rows)), "bbox")
    judge.params.iouThrs = IOU_THRESHOLDS.astype(np.float64)
    judge.params.areaRng, judge.params.areaRngLbl, judge.params.maxDets = [[0, 1e10]], ["all"], [300]
    judge.evaluate()
    judge.accumulate()
    return judge


def test_match_detections_labels_apart_equals_pycocotools() -> None:
    # Both definitions give a label to the most confident detection that overlaps it enough, as long as no detection
    # overlaps two labels of its class; where one does, COCO prefers the free label and YOLOv5 the closer one.
    scene = scattered_scene(jitter=2.5)
    judged = np.zeros((sum(len(detections) for detections, _ in scene), 10), dtype=np.bool_)
    for result in coco_evaluation(scene).evalImgs:
        if result is not None:
            judged[np.array(result["dtIds"], dtype=np.int64) - 1] = np.array(result["dtMatches"]).T > 0
    correct = np.concatenate([match_detections(detections, labels) for detections, labels in scene])
    assert 0 < correct[:, -1].sum() < correct[:, 0].sum() < len(correct)
    np.testing.assert_array_equal(correct, judged)


def test_average_precision_every_label_found_agrees_with_pycocotools() -> None:
    # Two quadratures of one falling curve: COCO takes the mean of 101 steps, YOLOv5 the trapezoids between 101 points,
    # so that they differ by less than a step, 0.01. This needs every label found: behind the last recall YOLOv5 draws
    # a line down to (1, 0), where COCO counts 0.
    scene = scattered_scene(jitter=1.0)
    judge = coco_evaluation(scene)
    correct = np.concatenate([match_detections(detections, labels) for detections, labels in scene])
    detections = np.concatenate([rows for rows, _ in scene])
    target = np.concatenate([labels[:, 0] for _, labels in scene])
    metrics = summarise(correct, detections[:, 4], detections[:, 5], target)
    expected = judge.eval["precision"][0, :, :, 0, 0].mean(axis=0)
    assert np.array_equal(judge.eval["recall"][0, :, 0, 0], np.ones(3))
    assert expected.max() < 0.95
    np.testing.assert_allclose(list(metrics.class_ap50.values()), expected, rtol=0, atol=0.01)
