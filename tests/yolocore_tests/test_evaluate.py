from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from pack_cases import validation_batches
from torch import Tensor

from yolocore.data.loader import ImageInfo
from yolocore.device import resolve_precision
from yolocore.evaluate import Evaluation, _to_native, evaluate
from yolocore.hyperparameters import Hyperparameters
from yolocore.loss import LossWeights
from yolocore.metrics import DetectionMetrics
from yolocore.model import YOLOv5, initial_state

CASES = ("two_batches", "no_detections", "no_labels", "nc1")
CPU = torch.device("cpu")
Golden = Mapping[str, np.ndarray]


def golden_weights(golden: Golden, case: str) -> LossWeights:
    """The weights of a case, whose gains are stored as the loss uses them."""
    box, obj, cls = (torch.tensor([gain], dtype=torch.float64) for gain in golden[f"{case}/gains"])
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    return LossWeights(
        box=box, obj=obj, cls=cls, cls_pw=one, obj_pw=one, fl_gamma=zero, label_smoothing=zero, uses_focal=False
    )


def add_golden(
    evaluation: Evaluation, golden: Golden, case: str, padding: int = 0, shuffles: tuple[int, ...] = (0,)
) -> None:
    """Feed the batches of a case; one slot per entry of `shuffles`, whose scores move that many rows."""
    height, width = (int(side) for side in golden["imgsz_hw"])
    for prefix in sorted({name.rsplit("/", 1)[0] for name in golden if name.startswith(f"{case}/batch")}):
        raw = [torch.from_numpy(golden[f"{prefix}/raw_{level}"]) for level in range(3)]
        decoded = torch.from_numpy(golden[f"{prefix}/decoded"])
        evaluation.add(
            [torch.stack([level.roll(shift, 0) for shift in shuffles]) for level in raw],
            torch.stack([torch.cat((decoded[..., :4], decoded[..., 4:].roll(shift, 1)), -1) for shift in shuffles]),
            torch.cat((torch.from_numpy(golden[f"{prefix}/targets"]), torch.full((padding, 6), -1.0))),
            golden_infos(golden, prefix),
            (height, width),
        )


def golden_infos(golden: Golden, prefix: str) -> list[ImageInfo]:
    rows = zip(*(golden[f"{prefix}/{name}"].tolist() for name in ("native_hw", "gain", "pad_xy")), strict=True)
    return [ImageInfo((native[0], native[1]), gain, (pad[0], pad[1])) for native, gain, pad in rows]


def golden_evaluation(golden: Golden, case: str, weights: LossWeights, slots: int = 1) -> Evaluation:
    return Evaluation(slots, weights, torch.from_numpy(golden[f"{case}/anchors_grid_units_used_in_loss"]), 4.0)


@pytest.mark.parametrize(
    ("case", "native", "gain", "pad"),
    [
        ("256x320_to_240x333_auto", (240, 333), 320 / 333, (0.0, (256 - 240 * 320 / 333) / 2)),
        ("256x320_to_375x500_gain0.64_pad0_8", (375, 500), 0.64, (0.0, 8.0)),
    ],
)
def test_to_native_golden_boxes_same(
    case: str, native: tuple[int, int], gain: float, pad: tuple[float, float], small_golden_dir: Path
) -> None:
    golden = np.load(small_golden_dir / "geometry.npz")
    boxes = golden["boxes/xywhn2xyxy_w333_h217_padw12.5_padh3.25"]
    mapped = _to_native(boxes, np.zeros(len(boxes), dtype=np.int64), [ImageInfo(native, gain, pad)])
    np.testing.assert_allclose(mapped, golden[f"boxes/scale_boxes_from{case}"], rtol=0, atol=1e-4)


def figures(metrics: DetectionMetrics) -> list[float]:
    losses = [metrics.box_loss, metrics.obj_loss, metrics.cls_loss]
    return [metrics.precision, metrics.recall, metrics.map50, metrics.map, *losses]


@pytest.mark.parametrize("case", CASES)
def test_evaluation_golden_case_equals_reference(small_golden_dir: Path, case: str) -> None:
    golden = np.load(small_golden_dir / "val_end_to_end.npz")
    evaluation = golden_evaluation(golden, case, golden_weights(golden, case))
    add_golden(evaluation, golden, case)
    (metrics,) = evaluation.results()
    expected = golden[f"{case}/results_P_R_map50_map_box_obj_cls"]
    np.testing.assert_allclose(figures(metrics), expected, rtol=0, atol=1e-6)
    class_map = [metrics.class_ap.get(index, metrics.map) for index in range(int(golden[f"{case}/nc"]))]
    np.testing.assert_allclose(class_map, golden[f"{case}/maps"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics.fitness, golden[f"{case}/fitness"][0], rtol=0, atol=1e-6)


def test_evaluation_padding_rows_change_nothing(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "val_end_to_end.npz")
    results = []
    for padding in (0, 24):
        evaluation = golden_evaluation(golden, "two_batches", golden_weights(golden, "two_batches"))
        add_golden(evaluation, golden, "two_batches", padding)
        results += evaluation.results()
    assert figures(results[1]) == pytest.approx(figures(results[0]), abs=1e-7)
    assert (results[1].labels, results[1].images) == (12, 3)


def test_evaluation_slots_differ_in_weights_only_in_the_losses(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "val_end_to_end.npz")
    weights = golden_weights(golden, "two_batches")
    double = LossWeights(
        box=weights.box * 2,
        obj=weights.obj * 3,
        cls=weights.cls * 5,
        cls_pw=weights.cls_pw,
        obj_pw=weights.obj_pw,
        fl_gamma=weights.fl_gamma,
        label_smoothing=weights.label_smoothing,
        uses_focal=False,
    )
    evaluation = golden_evaluation(golden, "two_batches", LossWeights.stack([weights, double]), slots=2)
    add_golden(evaluation, golden, "two_batches", shuffles=(0, 0))
    plain, scaled = evaluation.results()
    expected = np.array(figures(plain)) * [1, 1, 1, 1, 2, 3, 5]
    np.testing.assert_allclose(figures(scaled), expected, rtol=1e-6)


def test_evaluation_slots_with_different_predictions_equal_each_alone(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "val_end_to_end.npz")
    weights = golden_weights(golden, "two_batches")
    shuffles = (0, 3, 7)
    evaluation = golden_evaluation(golden, "two_batches", LossWeights.stack([weights] * 3), slots=3)
    add_golden(evaluation, golden, "two_batches", shuffles=shuffles)
    together = evaluation.results()
    assert len({round(metrics.map50, 3) for metrics in together}) == 3
    for slot, shift in enumerate(shuffles):
        lone = golden_evaluation(golden, "two_batches", weights)
        add_golden(lone, golden, "two_batches", shuffles=(shift,))
        assert together[slot].to_mapping() == pytest.approx(lone.results()[0].to_mapping(), abs=1e-7)


def test_evaluation_no_batches_gives_zeros(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "val_end_to_end.npz")
    weights = golden_weights(golden, "nc1")
    evaluation = golden_evaluation(golden, "nc1", LossWeights.stack([weights, weights]), slots=2)
    assert evaluation.results() == [DetectionMetrics(), DetectionMetrics()]


def test_evaluation_no_labels_and_no_detections_gives_zeros_and_objectness_loss(small_golden_dir: Path) -> None:
    golden = dict(np.load(small_golden_dir / "val_end_to_end.npz"))
    golden["no_labels/batch0/decoded"] = golden["no_labels/batch0/decoded"] * 0
    evaluation = golden_evaluation(golden, "no_labels", golden_weights(golden, "no_labels"))
    add_golden(evaluation, golden, "no_labels")
    (metrics,) = evaluation.results()
    assert metrics == DetectionMetrics(obj_loss=metrics.obj_loss, images=1)
    assert metrics.obj_loss == pytest.approx(golden["no_labels/results_P_R_map50_map_box_obj_cls"][5], abs=1e-6)


def sample_states() -> list[dict[str, Tensor]]:
    return [initial_state("n", 3, seed=seed) for seed in (1, 2)]


def sample_weights(*gains: float) -> LossWeights:
    return LossWeights.stack(
        [LossWeights.from_hyperparameters(Hyperparameters(box=gain), num_classes=3, image_size=96) for gain in gains]
    )


def test_evaluate_two_slots_equals_each_alone() -> None:
    states, batches, precision = sample_states(), validation_batches(), resolve_precision("fp32", CPU)
    together = evaluate(YOLOv5.stack("n", 3, states).double(), batches, sample_weights(0.05, 0.2), 4.0, CPU, precision)
    assert [(metrics.images, metrics.labels) for metrics in together] == [(3, 12), (3, 12)]
    assert together[0].box_loss != pytest.approx(together[1].box_loss, rel=0.5)
    for slot, gain in enumerate((0.05, 0.2)):
        model = YOLOv5.stack("n", 3, [states[slot]]).double()
        (alone,) = evaluate(model, batches, sample_weights(gain), 4.0, CPU, precision)
        assert together[slot].to_mapping() == pytest.approx(alone.to_mapping(), abs=1e-9)


@pytest.mark.parametrize("channels", [slice(None), slice(0, 4)])  # everything, or the boxes alone
def test_evaluate_slot_not_finite_fails_alone(channels: slice) -> None:
    states, batches, precision = sample_states(), validation_batches(), resolve_precision("fp32", CPU)
    model = YOLOv5.stack("n", 3, states)
    healthy, _ = evaluate(model, batches, sample_weights(0.05, 0.05), 4.0, CPU, precision)
    for level in range(3):
        states[1][f"model.24.m.{level}.bias"].view(3, 8)[:, channels] = float("nan")
    model = YOLOv5.stack("n", 3, states)
    beside, broken = evaluate(model, batches, sample_weights(0.05, 0.05), 4.0, CPU, precision)
    assert beside == healthy
    assert np.isnan(broken.box_loss)
    assert (broken.fitness, broken.images, broken.labels) == (0.0, 3, 12)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_model_keeps_mode_and_statistics(training: bool) -> None:
    model = YOLOv5.stack("n", 3, sample_states()[:1]).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, validation_batches(), sample_weights(0.05), 4.0, CPU, resolve_precision("fp32", CPU))
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_evaluate_bfloat16_is_close_to_float32() -> None:
    model = YOLOv5.stack("n", 3, sample_states()[:1])
    exact, rounded = (
        evaluate(model, validation_batches(), sample_weights(0.05), 4.0, CPU, resolve_precision(name, CPU))[0]
        for name in ("fp32", "bf16")
    )
    losses = [(metrics.box_loss, metrics.obj_loss, metrics.cls_loss) for metrics in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_evaluate_empty_loader_gives_zeros() -> None:
    model = YOLOv5.stack("n", 3, sample_states())
    metrics = evaluate(model, [], sample_weights(0.05, 0.2), 4.0, CPU, resolve_precision("fp32", CPU))
    assert metrics == [DetectionMetrics(), DetectionMetrics()]
