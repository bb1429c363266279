import math

import pytest
import torch
from torchvision.ops import complete_box_iou_loss

from yolocore.boxes import MINIMUM_HEIGHT, box_iou, ciou, xywh_to_xyxy, xyxy_to_xywh


def test_xywh_to_xyxy_literal_box_gives_corners() -> None:
    assert xywh_to_xyxy(torch.tensor([10.0, 20.0, 4.0, 6.0])).tolist() == [8.0, 17.0, 12.0, 23.0]


def test_xyxy_to_xywh_inverts_the_other_direction() -> None:
    boxes = torch.tensor([[[8.0, 17.0, 12.0, 23.0]], [[0.0, 0.0, 0.0, 0.0]]])
    assert xyxy_to_xywh(boxes).tolist() == [[[10.0, 20.0, 4.0, 6.0]], [[0.0, 0.0, 0.0, 0.0]]]
    assert torch.equal(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)


def test_box_iou_literal_boxes_gives_matrix() -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    others = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    expected = torch.tensor([[1 / 7, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(box_iou(boxes, others), expected, atol=1e-6, rtol=0)


def test_ciou_equal_boxes_is_one() -> None:
    box = torch.tensor([3.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    assert float(ciou(box, box)) == pytest.approx(1.0, abs=1e-6)


def test_ciou_disjoint_equal_shapes_is_minus_distance_over_diagonal() -> None:
    predicted, target = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([3.0, 0.0, 1.0, 1.0])
    assert float(ciou(predicted, target)) == pytest.approx(-9 / 17, abs=1e-6)


def test_ciou_random_boxes_agree_with_torchvision_in_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    predicted = (torch.rand(200, 4, generator=generator, dtype=torch.float64) + 0.1).requires_grad_()
    target = torch.rand(200, 4, generator=generator, dtype=torch.float64) + 0.1
    other = predicted.detach().clone().requires_grad_()
    ours = 1 - ciou(predicted, target)
    theirs = complete_box_iou_loss(xywh_to_xyxy(other), xywh_to_xyxy(target))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(predicted.grad, other.grad, atol=2e-5, rtol=0)


def test_ciou_slot_axis_broadcasts_against_shared_targets() -> None:
    generator = torch.Generator().manual_seed(4)
    predicted, target = torch.rand(3, 7, 4, generator=generator) + 0.1, torch.rand(7, 4, generator=generator) + 0.1
    together = ciou(predicted, target)
    assert together.shape == (3, 7)
    assert torch.equal(together[1], ciou(predicted[1], target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("width", "height"), [(-60.0, -60.0), (2.0, -60.0), (-60.0, 2.0), (0.0, -25.0), (-200.0, -200.0)]
)
def test_ciou_vanishing_size_has_finite_value_and_gradient(dtype: torch.dtype, width: float, height: float) -> None:
    logits = torch.tensor([width, height], dtype=dtype, requires_grad=True)
    size = (logits.sigmoid() * 2).square() * 3
    centre = torch.full((2,), 0.5, dtype=dtype)
    value = ciou(torch.cat((centre, size)), torch.tensor([0.5, 0.5, 2.0, 3.0], dtype=dtype))
    value.backward()
    assert math.isfinite(float(value.detach()))
    assert torch.isfinite(logits.grad).all()


def test_ciou_height_above_the_floor_is_the_unguarded_formula() -> None:
    height = torch.tensor(MINIMUM_HEIGHT * 2, dtype=torch.float64, requires_grad=True)
    predicted = torch.stack((torch.tensor(0.0, dtype=torch.float64),) * 2 + (torch.tensor(1e-12).double(), height))
    target = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    aspect = 4 / math.pi**2 * (math.atan(1) - math.atan(0.5)) ** 2
    expected = 0 - aspect**2 / (1 + aspect + 1e-7)
    assert float(ciou(predicted, target).detach()) == pytest.approx(expected, abs=1e-7)
