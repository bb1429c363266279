import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from device_guard import DeviceGuardError, backward, run_guarded
from loss_goldens import CASES, load_case
from torch import Tensor

from yolocore.assign import assign_targets
from yolocore.errors import HyperparameterError
from yolocore.hyperparameters import Hyperparameters
from yolocore.loss import (
    DEFAULT_BALANCE,
    LossComponents,
    LossWeights,
    binary_cross_entropy,
    detection_loss,
    focal_factor,
    update_balance,
)

FOUR_SLOTS = (
    Hyperparameters(),
    Hyperparameters(box=0.1, cls=0.3, obj=0.7, cls_pw=1.6, obj_pw=0.6),
    Hyperparameters(fl_gamma=1.5, obj_pw=1.3),
    Hyperparameters(fl_gamma=0.5, cls=1.2, box=0.02),
)


def weights_of(slots: tuple[Hyperparameters, ...], smoothing: tuple[float, ...] = (0.0, 0.1, 0.05, 0.0)) -> LossWeights:
    pairs = zip(slots, smoothing, strict=True)
    return LossWeights.stack(
        [LossWeights.from_hyperparameters(hyp, 3, 64, label_smoothing=share) for hyp, share in pairs]
    )


def different_slots(case_name: str, count: int, dtype: torch.dtype) -> list[Tensor]:
    """The case's predictions in `count` slots, each with noise of its own."""
    generator = torch.Generator().manual_seed(11)
    base = [prediction.detach().to(dtype) for prediction in load_case(case_name).predictions]
    return [p + 0.3 * torch.randn(count, *p.shape[1:], generator=generator, dtype=dtype) for p in base]


def run(predictions: list[Tensor], case_name: str, weights: LossWeights) -> tuple[LossComponents, list[Tensor]]:
    """Loss and gradients of the summed totals."""
    leaves = [prediction.detach().clone().requires_grad_() for prediction in predictions]
    loss = detection_loss(leaves, load_case(case_name).assignment(), weights)
    loss.total.sum().backward()
    return loss, [leaf.grad for leaf in leaves if leaf.grad is not None]


# Goldens


@pytest.mark.parametrize("name", CASES)
def test_detection_loss_golden_case_matches_values_and_gradients(name: str) -> None:
    case = load_case(name)
    weights, assignment = case.weights, case.assignment()
    balance = torch.tensor([DEFAULT_BALANCE], dtype=torch.float64)
    for call in range(case.info["calls"]):
        predictions = case.predictions
        loss = detection_loss(predictions, assignment, weights, balance if case.info["autobalance"] else None)
        loss.total.sum().backward()
        unweighted = torch.cat((loss.box, loss.obj, loss.cls)).detach().numpy()
        np.testing.assert_allclose(unweighted, case.arrays["unweighted_box_obj_cls"][call], rtol=1e-5)
        np.testing.assert_allclose(loss.weighted[0].detach(), case.arrays["weighted_box_obj_cls"][call], rtol=1e-5)
        np.testing.assert_allclose(loss.total.detach(), case.arrays["total"][call : call + 1], rtol=1e-5)
        if case.info["autobalance"]:
            balance = update_balance(balance, loss.obj_levels)
        np.testing.assert_allclose(balance[0], case.arrays["balance_after_call"][call], rtol=1e-8)
    for i, prediction in enumerate(predictions):
        np.testing.assert_allclose(prediction.grad[0], case.arrays[f"grad_{i}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_from_hyperparameters_golden_case_gives_effective_gains(name: str) -> None:
    case = load_case(name)
    gains = {key: float(getattr(case.weights, key)) for key in ("box", "cls", "obj")}
    assert gains == pytest.approx(case.info["effective_gains"], rel=1e-15)


# Slots


def test_detection_loss_four_slots_equal_four_lone_runs() -> None:
    name = "crowded_duplicates"
    predictions, weights = different_slots(name, 4, torch.float64), weights_of(FOUR_SLOTS)
    together, gradients = run(predictions, name, weights)
    for slot in range(4):
        lone, lone_gradients = run([p[slot : slot + 1] for p in predictions], name, weights.select([slot]))
        for key in ("box", "obj", "cls", "weighted", "total"):
            torch.testing.assert_close(getattr(together, key)[slot], getattr(lone, key)[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(together.obj_levels[:, slot], lone.obj_levels[:, 0], rtol=1e-12, atol=0)
        for gradient, lone_gradient in zip(gradients, lone_gradients, strict=True):
            torch.testing.assert_close(gradient[slot], lone_gradient[0], rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_detection_loss_non_finite_slot_leaves_the_others_bit_identical(value: float) -> None:
    name = "crowded_duplicates"
    predictions, weights = different_slots(name, 4, torch.float32), weights_of(FOUR_SLOTS)
    healthy, healthy_gradients = run(predictions, name, weights)
    broken_predictions = [p.clone() for p in predictions]
    for prediction in broken_predictions:
        prediction[2] = value
    broken, gradients = run(broken_predictions, name, weights)
    others = [0, 1, 3]
    assert not torch.isfinite(broken.total[2])
    assert torch.equal(broken.weighted[others], healthy.weighted[others])
    assert torch.equal(broken.total[others], healthy.total[others])
    for gradient, healthy_gradient in zip(gradients, healthy_gradients, strict=True):
        assert torch.equal(gradient[others], healthy_gradient[others])


def test_detection_loss_nan_box_in_unmatched_cell_reaches_nothing() -> None:
    name = "borders"
    predictions, weights = load_case(name).predictions, load_case(name).weights
    clean, clean_gradients = run(predictions, name, weights)
    poisoned = []
    for prediction, level in zip(predictions, load_case(name).assignment().levels, strict=True):
        flat = prediction.detach().clone().flatten(1, 4)
        flat[:, level.winner < 0, :4] = math.nan
        poisoned.append(flat.view(prediction.shape))
    loss, gradients = run(poisoned, name, weights)
    assert torch.equal(loss.total, clean.total)
    for gradient, clean_gradient in zip(gradients, clean_gradients, strict=True):
        assert torch.equal(gradient, clean_gradient)


def test_detection_loss_permuted_predictions_give_the_same_and_a_gradient_in_their_layout() -> None:
    name = "borders"
    predictions, weights = different_slots(name, 2, torch.float32), weights_of(FOUR_SLOTS[:2], (0.0, 0.1))
    expected, gradients = run(predictions, name, weights)
    leaves = [p.permute(1, 0, 2, 5, 3, 4).contiguous().requires_grad_() for p in predictions]
    views = [leaf.permute(1, 0, 2, 4, 5, 3) for leaf in leaves]
    loss = detection_loss(views, load_case(name).assignment(), weights)
    loss.total.sum().backward()
    assert torch.equal(loss.total, expected.total)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(leaf.grad.permute(1, 0, 2, 4, 5, 3), gradient)
        assert leaf.grad.is_contiguous()


def test_detection_loss_more_padding_changes_nothing() -> None:
    case = load_case("focal_pw_smooth")
    losses = [detection_loss(case.predictions, case.assignment(rows), case.weights) for rows in (10, 32, 320)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss.weighted, losses[0].weighted, rtol=1e-6, atol=0)


def test_detection_loss_batch_without_target_rows_is_differentiable() -> None:
    predictions = [p.detach().requires_grad_() for p in load_case("zero_targets").predictions]
    anchors = torch.ones(3, 3, 2)
    assignment = assign_targets(torch.zeros(0, 6), [p.shape[3:5] for p in predictions], anchors, 2, 4.0)
    loss = detection_loss(predictions, assignment, load_case("zero_targets").weights)
    loss.total.sum().backward()
    assert loss.box.tolist() == [0.0]
    assert loss.cls.tolist() == [0.0]
    np.testing.assert_allclose(loss.total.detach(), load_case("zero_targets").arrays["total"], rtol=1e-5)
    for i, prediction in enumerate(predictions):
        expected = load_case("zero_targets").arrays[f"grad_{i}"]
        np.testing.assert_allclose(prediction.grad[0], expected, rtol=0, atol=1e-6)


def test_detection_loss_autocast_bfloat16_predictions_compute_in_float32() -> None:
    case = load_case("borders")
    rounded = [p.detach().bfloat16() for p in case.predictions]
    leaves = [p.clone().requires_grad_() for p in rounded]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = detection_loss(leaves, case.assignment(), case.weights)
    expected = detection_loss([p.float() for p in rounded], case.assignment(), case.weights)
    assert loss.total.dtype == torch.float32
    assert torch.equal(loss.total, expected.total)
    loss.total.sum().backward()
    assert all(leaf.grad.dtype == torch.bfloat16 and torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_detection_loss_objectness_and_class_gradients_agree_with_finite_differences() -> None:
    name, weights = "focal_pw_smooth", weights_of(FOUR_SLOTS[1:3], (0.1, 0.05))
    predictions = different_slots(name, 2, torch.float64)
    assignment = load_case(name).assignment()

    def shifted(amount: Tensor) -> Tensor:
        moved = [torch.cat((p[..., :4], p[..., 4:] + amount), dim=-1) for p in predictions]
        return detection_loss(moved, assignment, weights).total

    point = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shifted, (point,), eps=1e-6, atol=1e-8)


# Weights


def test_cls_pw_per_class_constant_equals_one_number() -> None:
    case = load_case("pos_weights")
    per_class = dataclasses.replace(case.weights, cls_pw=case.weights.cls_pw[:, None].expand(1, 3))
    one = detection_loss(case.predictions, case.assignment(), case.weights)
    other = detection_loss(case.predictions, case.assignment(), per_class)
    torch.testing.assert_close(other.weighted, one.weighted, rtol=1e-6, atol=0)


def test_cls_pw_per_class_acts_on_the_positives_of_its_class_only() -> None:
    case = load_case("crowded_duplicates")
    assignment = case.assignment()
    plain = dataclasses.replace(case.weights, cls_pw=torch.tensor([[1.0, 1.0, 1.0]]))
    heavy = dataclasses.replace(case.weights, cls_pw=torch.tensor([[1.0, 3.0, 1.0]]))
    gain = (
        detection_loss(case.predictions, assignment, heavy).cls
        - detection_loss(case.predictions, assignment, plain).cls
    )
    expected = 0.0
    for prediction, level in zip(case.predictions, assignment.levels, strict=True):
        picked = level.valid & (level.cls == 1)
        logits = prediction.detach()[0, level.image, level.anchor, level.row, level.column, 6][picked]
        expected += float(2 * F.softplus(-logits).sum() / (3 * level.count.clamp(min=1)))
    assert expected > 0.1
    assert float(gain.detach()) == pytest.approx(expected, rel=1e-4)


def test_from_hyperparameters_scales_by_classes_size_and_levels() -> None:
    hyp = Hyperparameters(box=0.1, obj=2.0, cls=0.4, cls_pw=1.5, obj_pw=0.5, fl_gamma=2.0)
    weights = LossWeights.from_hyperparameters(hyp, num_classes=20, image_size=320, num_levels=4, label_smoothing=0.1)
    values = {field.name: float(getattr(weights, field.name)) for field in dataclasses.fields(weights)}
    assert values == pytest.approx(
        {
            "box": 0.1 * 0.75,
            "obj": 2.0 * 0.25 * 0.75,
            "cls": 0.4 * 0.25 * 0.75,
            "cls_pw": 1.5,
            "obj_pw": 0.5,
            "fl_gamma": 2.0,
            "label_smoothing": 0.1,
            "uses_focal": 1.0,
        }
    )
    assert weights.box.dtype == torch.float64


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_from_hyperparameters_label_smoothing_outside_is_refused(value: float) -> None:
    with pytest.raises(HyperparameterError, match=r"label smoothing is .*allowed is a number from 0 to below 1"):
        LossWeights.from_hyperparameters(Hyperparameters(), 3, 64, label_smoothing=value)


def test_stack_and_select_keep_the_slots_and_know_whether_focal_is_used() -> None:
    weights = weights_of(FOUR_SLOTS)
    assert weights.uses_focal
    assert weights.fl_gamma.tolist() == [0.0, 0.0, 1.5, 0.5]
    picked = weights.select([3, 1])
    assert picked.fl_gamma.tolist() == [0.5, 0.0]
    assert picked.box.tolist() == pytest.approx([0.02, 0.1])
    assert picked.uses_focal
    assert not weights.select([1, 0]).uses_focal


def test_stack_per_class_beside_single_widens_the_single() -> None:
    single = LossWeights.from_hyperparameters(Hyperparameters(cls_pw=2.0), 3, 64)
    per_class = dataclasses.replace(single, cls_pw=torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    assert LossWeights.stack([single, per_class]).cls_pw.tolist() == [[2.0, 2.0, 2.0], [1.0, 2.0, 3.0]]


def test_to_float32_converts_every_vector() -> None:
    weights = weights_of(FOUR_SLOTS).to("cpu", torch.float32)
    vectors = [value for name in weights.__slots__ if isinstance(value := getattr(weights, name), Tensor)]
    assert len(vectors) == 7
    assert {vector.dtype for vector in vectors} == {torch.float32}


def test_focal_slot_without_gamma_is_the_plain_loss_bit_for_bit() -> None:
    name = "crowded_duplicates"
    predictions = different_slots(name, 2, torch.float32)
    plain, plain_gradients = run(predictions, name, weights_of((FOUR_SLOTS[0], FOUR_SLOTS[1]), (0.0, 0.0)))
    mixed, gradients = run(predictions, name, weights_of((FOUR_SLOTS[0], FOUR_SLOTS[2]), (0.0, 0.0)))
    assert torch.equal(mixed.weighted[0], plain.weighted[0])
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        assert torch.equal(gradient[0], plain_gradient[0])


def test_update_balance_literal_step_divides_by_stride_sixteen() -> None:
    balance = torch.tensor([[4.0, 1.0, 0.4], [4.0, 1.0, 0.4]], dtype=torch.float64)
    levels = torch.tensor([[0.1, 0.2], [0.2, 0.2], [0.5, 0.2]], dtype=torch.float64)
    first = [(0.9999 * 4 + 0.001) / (0.9999 + 0.0005), 1.0, (0.9999 * 0.4 + 0.0002) / (0.9999 + 0.0005)]
    moved = update_balance(balance, levels)
    assert moved[0].tolist() == pytest.approx(first, rel=1e-12)
    assert moved[1, 1] == 1.0


def test_detection_loss_balance_per_slot_weighs_the_levels() -> None:
    case = load_case("borders")
    predictions = [p.detach().expand(2, *p.shape[1:]) for p in case.predictions]
    balance = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    weights = LossWeights.stack([case.weights, case.weights])
    loss = detection_loss(predictions, case.assignment(), weights, balance)
    assert loss.obj.tolist() == pytest.approx([float(loss.obj_levels[0, 0]), 2 * float(loss.obj_levels[2, 1])])


# Binary cross entropy and the focal factor


def test_binary_cross_entropy_textbook_logit_is_a_fifth() -> None:
    value = binary_cross_entropy(torch.tensor(1.5), torch.tensor(1.0))
    assert float(value) == pytest.approx(0.2014, abs=5e-5)


def test_binary_cross_entropy_textbook_three_logits_mean() -> None:
    value = binary_cross_entropy(torch.tensor([0.7, 0.2, 0.1]), torch.tensor([1.0, 0.0, 0.0])).mean()
    assert float(value) == pytest.approx(0.6486, abs=5e-5)


def test_binary_cross_entropy_equals_sigmoid_then_bce() -> None:
    logits = torch.linspace(-8, 8, 101, dtype=torch.float64)
    target = torch.linspace(0, 1, 101, dtype=torch.float64).flip(0)
    expected = F.binary_cross_entropy(logits.sigmoid(), target, reduction="none")
    torch.testing.assert_close(binary_cross_entropy(logits, target), expected, rtol=1e-12, atol=1e-12)


def test_binary_cross_entropy_pos_weight_agrees_with_torch_in_value_and_gradient() -> None:
    logits = torch.linspace(-30, 30, 201, dtype=torch.float64, requires_grad=True)
    other = logits.detach().clone().requires_grad_()
    target, pos_weight = (
        torch.rand(201, generator=torch.Generator().manual_seed(1)).double(),
        torch.tensor(1.7).double(),
    )
    ours = binary_cross_entropy(logits, target, pos_weight)
    theirs = F.binary_cross_entropy_with_logits(other, target, pos_weight=pos_weight, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_binary_cross_entropy_huge_logits_stay_finite_with_exact_gradient() -> None:
    logits = torch.tensor([1000.0, 1000.0, -1000.0, -1000.0], requires_grad=True)
    value = binary_cross_entropy(logits, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    value.sum().backward()
    assert value.tolist() == [0.0, 1000.0, 1000.0, 0.0]
    assert logits.grad.tolist() == [0.0, 1.0, -1.0, 0.0]


def test_binary_cross_entropy_float32_tails_keep_their_digits() -> None:
    value = binary_cross_entropy(torch.tensor([-20.0, 20.0]), torch.tensor([0.0, 1.0]))
    assert value.tolist() == pytest.approx([math.log1p(math.exp(-20))] * 2, rel=1e-6)


@pytest.mark.parametrize("logit", [19.0, 21.0, 34.0, 36.0])
def test_binary_cross_entropy_float64_large_logits_keep_every_digit(logit: float) -> None:
    logits = torch.tensor([logit, -logit], dtype=torch.float64, requires_grad=True)
    value = binary_cross_entropy(logits, torch.tensor([0.0, 1.0], dtype=torch.float64))
    value.sum().backward()
    assert value.tolist() == pytest.approx([logit + math.log1p(math.exp(-logit))] * 2, rel=1e-15)
    assert logits.grad.tolist() == pytest.approx([1 / (1 + math.exp(-logit)), -1 / (1 + math.exp(-logit))], rel=1e-15)


def test_focal_factor_literal_values() -> None:
    logits, target = torch.tensor([0.0, 0.0, math.log(3)]), torch.tensor([1.0, 0.0, 0.0])
    values = focal_factor(logits, target, torch.tensor(2.0))
    assert values.tolist() == pytest.approx([0.25 * 0.25, 0.75 * 0.25, 0.75 * 0.5625])


@pytest.mark.parametrize("gamma", [1e-6, 0.5, 1.5])
def test_focal_factor_saturated_logits_have_finite_gradient(gamma: float) -> None:
    logits = torch.tensor([-1000.0, -104.0, -90.0, 90.0, 1000.0], requires_grad=True)
    for target in (0.0, 0.3, 1.0):
        y = torch.full((5,), target)
        (binary_cross_entropy(logits, y) * focal_factor(logits, y, torch.tensor(gamma))).sum().backward()
    assert torch.isfinite(logits.grad).all()


# No wait for the device


def fake_batch() -> tuple[Tensor, list[Tensor], Tensor, LossWeights, Tensor]:
    device = torch.device("cuda")
    predictions = [torch.zeros(4, 2, 3, side, side, 8, device=device, requires_grad=True) for side in (8, 4, 2)]
    vector = torch.ones(4, device=device)
    weights = LossWeights(
        box=vector,
        obj=vector,
        cls=vector,
        cls_pw=torch.ones(4, 3, device=device),
        obj_pw=vector,
        fl_gamma=vector,
        label_smoothing=vector,
        uses_focal=True,
    )
    targets, anchors = torch.zeros(32, 6, device=device), torch.ones(3, 3, 2, device=device)
    return targets, predictions, anchors, weights, torch.ones(4, 3, device=device)


def guarded_step(batch: tuple[Tensor, list[Tensor], Tensor, LossWeights, Tensor]) -> None:
    targets, predictions, anchors, weights, balance = batch
    assignment = assign_targets(targets, [(8, 8), (4, 4), (2, 2)], anchors, 2, 4.0)
    for given in (None, balance):
        loss = detection_loss(predictions, assignment, weights, given)
        backward(loss.total.sum())
    update_balance(balance, loss.obj_levels)
    assert loss.total.device.type == "cuda"
    assert all(prediction.grad.device.type == "cuda" for prediction in predictions if prediction.grad is not None)
    assert all(prediction.grad is not None for prediction in predictions)


def test_assign_and_loss_on_fake_cuda_never_copy_or_wait() -> None:
    assert run_guarded(fake_batch, guarded_step).calls > 200


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: x.cpu(), "crosses devices"),
        (lambda x: x.to("cpu"), "crosses devices"),
        (lambda x: torch.zeros(3, 4).copy_(x), "crosses devices"),
        (lambda x: torch.ones(3, 4).to("cuda"), "crosses devices"),
        (lambda x: x[torch.zeros(2, dtype=torch.long)], "crosses devices"),
        (lambda x: x.sum().item(), "waits for the device"),
        (lambda x: bool(x.sum() > 0), "waits for the device"),
        (lambda x: x.nonzero(), "waits for the device"),
        (lambda x: torch.where(x > 0), "waits for the device"),
        (lambda x: x[x > 0], "data-dependent shape"),
        (lambda x: x.masked_select(x > 0), "waits for the device"),
    ],
)
def test_device_guard_forbidden_operation_raises(step: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(DeviceGuardError, match=message):
        run_guarded(lambda: torch.zeros(3, 4, device="cuda"), step)


def test_device_guard_copy_inside_the_backward_pass_raises() -> None:
    class CopyingGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return (gradient.cpu() * 2).to(gradient.device)

    with pytest.raises(DeviceGuardError, match="crosses devices"):
        run_guarded(
            lambda: torch.zeros(3, device="cuda", requires_grad=True),
            lambda x: backward(CopyingGradient.apply(x).sum()),
        )


def test_backward_of_the_guard_gives_the_engine_gradients() -> None:
    case = load_case("focal_pw_smooth")
    predictions, others = case.predictions, case.predictions
    backward(detection_loss(predictions, case.assignment(), case.weights).total.sum())
    detection_loss(others, case.assignment(), case.weights).total.sum().backward()
    for prediction, other in zip(predictions, others, strict=True):
        torch.testing.assert_close(prediction.grad, other.grad, rtol=1e-4, atol=1e-10)


# What docs/loss.md prints


@pytest.mark.parametrize(
    ("logit", "target", "costs"),
    [
        (-4.0, 0.0, [0.0181, 0.0136, 0.0018, 0.0000]),
        (0.0, 0.0, [0.6931, 0.5199, 0.3676, 0.1838]),
        (-2.0, 1.0, [2.1269, 0.5317, 0.4990, 0.4395]),
        (2.0, 1.0, [0.1269, 0.0317, 0.0110, 0.0013]),
    ],
)
def test_focal_table_of_the_documentation_holds(logit: float, target: float, costs: list[float]) -> None:
    x, y = torch.tensor(logit), torch.tensor(target)
    plain = binary_cross_entropy(x, y)
    focal = [plain * focal_factor(x, y, torch.tensor(gamma)) for gamma in (1e-6, 0.5, 1.5)]
    assert [float(value) for value in (plain, *focal)] == pytest.approx(costs, abs=5e-5)


def test_obj_pw_optimum_of_the_documentation_is_two_thirds() -> None:
    x = torch.tensor(math.log(2.0), dtype=torch.float64, requires_grad=True)
    binary_cross_entropy(x, torch.tensor(0.5, dtype=torch.float64), 2.0).backward()
    assert float(x.detach().sigmoid()) == pytest.approx(2 / 3)
    assert float(x.grad) == pytest.approx(0.0, abs=1e-12)


def test_from_hyperparameters_weights_per_class_take_the_place_of_cls_pw() -> None:
    hyp = Hyperparameters(cls_pw=9.0, cls_pw_per_class=(0.5, 2.0))

    assert LossWeights.from_hyperparameters(hyp, 2, 640).cls_pw.tolist() == [[0.5, 2.0]]
    with pytest.raises(HyperparameterError, match="cls_pw_per_class has 2 numbers; allowed is one for each of the 3"):
        LossWeights.from_hyperparameters(hyp, 3, 640)
