import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

from yolocore.postprocess import MAX_CANDIDATES, decode, nms

STRIDES = torch.tensor([8.0, 16.0, 32.0])
ANCHORS = (
    torch.tensor(
        [
            [[10.0, 13.0], [16.0, 30.0], [33.0, 23.0]],
            [[30.0, 61.0], [62.0, 45.0], [59.0, 119.0]],
            [[116.0, 90.0], [156.0, 198.0], [373.0, 326.0]],
        ]
    )
    / STRIDES[:, None, None]
)
NMS_CASES = (
    "val_multilabel",
    "single_label",
    "detect_default",
    "agnostic",
    "classes_filter",
    "max_det",
    "nothing_left",
    "nc1_multilabel_requested",
)


def random_maps(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(2, 3, 3, 4 // s, 8 // s, 7, generator=generator).to(dtype) for s in (1, 2, 4)]


def random_rows(images: int, rows: int, classes: int, spread: float) -> Tensor:
    """Decoded rows whose boxes lie within `spread` pixels of each other: the smaller, the more are suppressed."""
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(images, rows, 5 + classes, generator=generator)
    values[..., :2] *= spread
    values[..., 2:4] = 20 + 20 * values[..., 2:4]
    return values


def plain_nms(decoded: Tensor, conf: float, iou: float, max_det: int) -> Tensor:
    """Multi-label suppression of one image [N, 5 + C] as the definition reads: every candidate, one sort, one pass."""
    scores = decoded[:, 5:] * decoded[:, 4:5]
    row, label = (scores > conf).nonzero(as_tuple=True)
    score = scores[row, label]
    order = score.argsort(descending=True, stable=True)
    row, label, score = row[order], label[order], score[order]
    half = decoded[row, 2:4] / 2
    boxes = torch.cat((decoded[row, :2] - half, decoded[row, :2] + half), dim=1)
    keep = torchvision.ops.nms(boxes + label[:, None] * 7680.0, score, iou)[:max_det]
    return torch.cat((boxes, score[:, None], label[:, None].float()), dim=1)[keep]


def test_decode_golden_raw_maps_equal_reference(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "model_forward.npz")
    raw = [torch.from_numpy(golden[f"eval_raw_{level}"])[None] for level in range(3)]
    decoded = decode(raw, ANCHORS, STRIDES)
    assert decoded.shape == (1, 2, 378, 8)
    np.testing.assert_allclose(decoded[0].numpy(), golden["eval_decoded"], rtol=0, atol=1e-4)


def test_decode_zero_logits_give_cell_centres_and_anchor_sizes() -> None:
    raw = [torch.zeros(1, 1, 3, 4 // s, 8 // s, 6) for s in (1, 2, 4)]
    decoded = decode(raw, ANCHORS, STRIDES)[0, 0]
    assert decoded.shape == (3 * (32 + 8 + 2), 6)
    assert decoded[0].tolist() == [4.0, 4.0, 10.0, 13.0, 0.5, 0.5]
    assert decoded[9].tolist() == [12.0, 12.0, 10.0, 13.0, 0.5, 0.5]  # second row, second column of the first anchor
    assert decoded[32].tolist() == [4.0, 4.0, 16.0, 30.0, 0.5, 0.5]
    assert decoded[-1].tolist() == [48.0, 16.0, 373.0, 326.0, 0.5, 0.5]


def test_decode_stack_equals_each_slot_alone() -> None:
    raw = random_maps()
    together = decode(raw, ANCHORS, STRIDES)
    for slot in range(2):
        alone = decode([level[slot : slot + 1] for level in raw], ANCHORS, STRIDES)
        assert torch.equal(together[slot], alone[0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_decode_any_precision_computes_in_at_least_float32(given: torch.dtype, expected: torch.dtype) -> None:
    raw = random_maps(given)
    decoded = decode(raw, ANCHORS, STRIDES)
    assert decoded.dtype == expected
    exact = decode([level.double() for level in raw], ANCHORS.double(), STRIDES.double())
    torch.testing.assert_close(decoded.double(), exact, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("case", NMS_CASES)
def test_nms_golden_case_equals_reference_in_order(small_golden_dir: Path, case: str) -> None:
    golden = np.load(small_golden_dir / "nms.npz")
    options = json.loads((small_golden_dir / "nms_cases.json").read_text())[case]
    found = nms(
        torch.from_numpy(golden[options["input"]]),
        conf=options["conf_thres"],
        iou=options["iou_thres"],
        max_det=options.get("max_det", 300),
        multi_label=options.get("multi_label", False),
        agnostic=options.get("agnostic", False),
        classes=options.get("classes"),
    )
    assert [len(rows) for rows in found] == options["counts"]
    for image, rows in enumerate(found):
        np.testing.assert_allclose(rows.numpy(), golden[f"{case}/img{image}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("spread", [2.0, 40.0, 1000.0])
def test_nms_many_candidates_equals_single_pass_over_all(spread: float) -> None:
    decoded = random_rows(3, 900, 4, spread)
    decoded[1, 20:, 4] = 0  # few candidates beside many
    found = nms(decoded, conf=0.001, iou=0.6, max_det=100, multi_label=True)
    for image in range(3):
        assert torch.equal(found[image], plain_nms(decoded[image], 0.001, 0.6, 100))


def test_nms_equal_scores_keep_row_order() -> None:
    decoded = torch.zeros(1, 2000, 6)
    decoded[..., 0] = torch.arange(2000) * 50.0
    decoded[..., 2:] = 1
    decoded[..., 4] = 0.5
    found = nms(decoded, conf=0.001, iou=0.6, max_det=300, multi_label=True)[0]
    assert torch.equal(found[:, 0], torch.arange(300) * 50.0 - 0.5)


def test_nms_image_beside_others_equals_image_alone() -> None:
    decoded = random_rows(4, 500, 3, 100.0)
    decoded[2, :, 4] *= 0.01
    together = nms(decoded, conf=0.001, iou=0.6, max_det=300, multi_label=True)
    for image in range(4):
        alone = nms(decoded[image : image + 1], conf=0.001, iou=0.6, max_det=300, multi_label=True)
        assert torch.equal(together[image], alone[0])


def test_nms_more_than_limit_drops_worst_candidates() -> None:
    decoded = torch.zeros(1, MAX_CANDIDATES + 1, 6)
    decoded[..., 2:4] = 10
    decoded[..., 4] = 0.5
    decoded[..., 5] = 1
    decoded[0, 5, 0] = 500  # apart from the heap, and the worst of all
    decoded[0, 5, 5] = 0.9
    assert len(nms(decoded, conf=0.001, iou=0.6)[0]) == 1
    assert len(nms(decoded[:, :-1], conf=0.001, iou=0.6)[0]) == 2


def test_nms_not_a_number_is_no_detection() -> None:
    decoded = random_rows(1, 50, 2, 1000.0)
    decoded[0, :25] = float("nan")
    found = nms(decoded, conf=0.001, iou=0.6, multi_label=True)[0]
    assert torch.equal(found, plain_nms(decoded[0, 25:], 0.001, 0.6, 300))


def test_nms_no_rows_gives_empty_images() -> None:
    assert [tuple(rows.shape) for rows in nms(torch.zeros(2, 0, 8), multi_label=True)] == [(0, 6), (0, 6)]
