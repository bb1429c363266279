"""The model against the reference's outputs, and a stack of K models against K lone ones."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_guard import DeviceGuardError, backward, run_guarded
from fill_rule import DEFAULT_ANCHORS, fill_image, nano_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from yolocore.assign import assign_targets
from yolocore.errors import WeightsError
from yolocore.loss import LossWeights, detection_loss
from yolocore.model import ANCHORS_KEY, STRIDES, YOLOv5, initial_state
from yolocore.model.anchors import grid_anchors, order_anchors
from yolocore.model.blocks import _FUSED_INFERENCE, concat_slots
from yolocore.model.yolov5 import SCALINGS, Scaling, detect_prior
from yolocore.postprocess import decode
from yolocore.training.pack import fresh_state


def golden_images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(fill_image("input", (2, 3, 64, 96))).to(dtype) / 255


def golden_model(dtype: torch.dtype = torch.float32) -> YOLOv5:
    return YOLOv5.stack("n", 3, [nano_state()]).to(dtype)


def states_of(seeds: list[int], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Plain states that differ in every tensor, running statistics included."""
    states = []
    for seed in seeds:
        state = initial_state("n", 3, seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        for name, tensor in state.items():
            if tensor.ndim == 1 and name != ANCHORS_KEY:
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.3)
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor + seed
        states.append(state)
    return states


def max_gap(ours: Tensor, golden: np.ndarray) -> float:
    return float((ours.detach().double() - torch.from_numpy(golden).double()).abs().max())


# Structure


def check_structure(golden: dict, size: str, num_classes: int) -> None:
    with torch.device("meta"):
        model = YOLOv5(size, num_classes)
    keys = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in model.state_dict().items()]
    # A lone model keeps a counter of shape [1] per BatchNorm, one per slot; `unstack` gives the official [].
    keys = [[name, [] if name.endswith("num_batches_tracked") else shape, dtype] for name, shape, dtype in keys]
    assert keys == golden["keys"]
    assert len(keys) == golden["n_tensors"]
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if p.ndim == 4]
    norms = [p for n, p in model.named_parameters() if n.endswith("bn.weight")]
    groups = [(g["n_tensors"], g["n_values"]) for g in golden["param_groups"]]
    assert [(len(g), sum(p.numel() for p in g)) for g in (biases, weights, norms)] == groups
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in model.model]
    assert per_layer == [count for *_, count in golden["layers"]]
    assert list(STRIDES) == golden["stride"]


@pytest.mark.parametrize("size", ["n", "s", "m", "l", "x"])
def test_model_every_size_has_the_official_names_shapes_and_order(golden_dir: Path, size: str) -> None:
    golden = json.loads((golden_dir / f"state_dict_yolov5{size}_nc80.json").read_text())
    check_structure(golden, size, 80)
    with torch.device("meta"):
        assert sum(p.numel() for p in YOLOv5(size, 3).parameters()) == golden["params_nc3"]


def test_model_nano_with_3_classes_has_the_official_names_shapes_and_order(small_golden_dir: Path) -> None:
    check_structure(json.loads((small_golden_dir / "state_dict_yolov5n_nc3.json").read_text()), "n", 3)


def test_scaling_repeats_and_channels_follow_the_size() -> None:
    repeats = {size: [scaling.repeats(n) for n in (1, 3, 6, 9)] for size, scaling in SCALINGS.items()}
    assert repeats == {
        "n": [1, 1, 2, 3], "s": [1, 1, 2, 3], "m": [1, 2, 4, 6], "l": [1, 3, 6, 9], "x": [1, 4, 8, 12],
    }  # fmt: skip
    assert [SCALINGS[s].channels(64) for s in "nsmlx"] == [16, 32, 48, 64, 80]


def test_scaling_channels_round_up_as_the_golden_divisible_by_8(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "geometry.npz")
    rounded = [Scaling(depth=1.0, width=width).channels(1) for width in golden["make_divisible8_in"].tolist()]
    assert rounded == golden["make_divisible8_out"].tolist()


def test_fill_rule_reproduces_the_golden_checksums(small_golden_dir: Path) -> None:
    golden = json.loads((small_golden_dir / "model_fill_checksums.json").read_text())["checks"]
    state = golden_model().unstack(0)
    assert list(golden) == [name for name in state if not name.endswith("num_batches_tracked")]
    for name, expected in golden.items():
        values = state[name].double().flatten()
        actual = [float(values.sum()), float(values.abs().sum()), float(values[0]), float(values[-1])]
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9, err_msg=name)


# Outputs


@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_float32_equals_golden_in_both_modes_and_statistics(golden_dir: Path, channels_last: bool) -> None:
    golden = np.load(golden_dir / "model_forward.npz")
    model, images = golden_model(), golden_images()
    np.testing.assert_array_equal(fill_image("input", (2, 3, 64, 96)), golden["image_u8"])
    if channels_last:
        model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        evaluated = model.eval()(images)
    trained = model.train()(images)
    for level in range(3):
        assert max_gap(evaluated[level][0], golden[f"eval_raw_{level}"]) < 2e-5
        assert max_gap(trained[level][0], golden[f"train_raw_{level}"]) < 1e-4
    tensors = model.official_tensors()
    order = [name.removesuffix(".running_mean") for name in tensors if name.endswith("running_mean")]
    mean = torch.cat([tensors[f"{name}.running_mean"][0] for name in order])
    var = torch.cat([tensors[f"{name}.running_var"][0] for name in order])
    assert [len(tensors[f"{name}.running_var"][0]) for name in order] == golden["bn_sizes"].tolist()
    assert max_gap(mean, golden["bn_running_mean_after"]) < 1e-6
    assert max_gap(var, golden["bn_running_var_after"]) < 1e-6
    assert {int(t) for n, t in tensors.items() if n.endswith("num_batches_tracked")} == {1}


def test_forward_equals_the_small_golden_in_the_repository(small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "model_forward_small.npz")
    with torch.no_grad():
        evaluated = golden_model().eval()(golden_images())
    assert max(max_gap(evaluated[level][0], golden[f"eval_raw_{level}"]) for level in range(3)) < 2e-5
    model = golden_model(torch.float64).train()
    trained = model(golden_images(torch.float64))
    assert max(max_gap(trained[level][0], golden[f"train_raw_f64_{level}"]) for level in (1, 2)) < 1e-10
    tensors = model.official_tensors().items()
    sums = [sum(float(t.sum()) for n, t in tensors if n.endswith(kind)) for kind in ("running_var", "running_mean")]
    np.testing.assert_allclose(sums, golden["bn_running_var_mean_sums"], rtol=1e-6)


def test_forward_float64_train_equals_golden(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "model_forward.npz")
    raw = golden_model(torch.float64).train()(golden_images(torch.float64))
    for level in range(3):
        assert max_gap(raw[level][0], golden[f"train_raw_f64_{level}"]) < 1e-10


def test_forward_float64_eval_decodes_to_golden(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "model_forward.npz")["eval_decoded_f64"]
    model = golden_model(torch.float64).eval()
    with torch.no_grad():
        raw = model(golden_images(torch.float64))
    rows = []
    for level, output in enumerate(raw):
        y = output[0].sigmoid()
        height, width = y.shape[2:4]
        rows_i, columns_i = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cell = torch.stack((columns_i, rows_i), -1)
        xy = (2 * y[..., :2] - 0.5 + cell) * model.strides[level]
        size = (2 * y[..., 2:4]) ** 2 * model.anchors[level].view(1, 3, 1, 1, 2) * model.strides[level]
        rows.append(torch.cat((xy, size, y[..., 4:]), -1).reshape(2, -1, 8))
    assert max_gap(torch.cat(rows, 1), golden) < 1e-8


def test_forward_nano_layer_outputs_equal_golden_sums(golden_dir: Path, small_golden_dir: Path) -> None:
    golden = np.load(golden_dir / "model_forward.npz")["eval_layer_sum_abssum"]
    shapes = json.loads((small_golden_dir / "model_fill_checksums.json").read_text())["layer_shapes"]
    model = golden_model().eval()
    sums: list[list[float]] = []
    seen: list[list[int]] = []

    def record(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        sums.append([float(output.double().sum()), float(output.double().abs().sum())])
        seen.append(list(output.shape))

    for layer in model.model[:-1]:
        layer.register_forward_hook(record)
    with torch.no_grad():
        model(golden_images())
    assert seen == shapes
    np.testing.assert_allclose(sums, golden, rtol=1e-5, atol=1e-2)


# Not here: `eval_tta_decoded`. Test-time augmentation is no part of training or validation, and the product has none.


def test_forward_weights_rounded_as_training_starts_decode_to_golden(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "model_forward.npz")
    model = YOLOv5.stack("n", 3, [fresh_state(nano_state())["model"]]).eval()
    with torch.no_grad():
        decoded = decode(model(golden_images()), model.anchors, model.strides)[0]
    assert max_gap(decoded, golden["eval_decoded_half_rounded_weights"]) < 3e-4
    assert max_gap(decoded, golden["eval_decoded"]) > 1e-2  # rounding shows


class Convolutions(TorchDispatchMode):
    """Records weight and bias of every convolution as they reach the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in str(func):
            self.seen.append((args[1], args[2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not _FUSED_INFERENCE, reason="torch without oneDNN evaluates layer by layer")
def test_forward_evaluation_folds_the_statistics_into_the_golden_weights(
    golden_dir: Path, small_golden_dir: Path
) -> None:
    golden = np.load(golden_dir / "model_forward.npz")
    parameters = json.loads((small_golden_dir / "model_fill_checksums.json").read_text())["fused_params"]
    model = golden_model().eval()
    with torch.no_grad(), Convolutions() as convolutions:
        decoded = decode(model(golden_images()), model.anchors, model.strides)[0]
    weight, bias = convolutions.seen[0]
    assert bias is not None
    assert max_gap(bias, golden["fused_model.0.conv.bias"]) < 1e-6
    assert max_gap(weight.double().sum((1, 2, 3)), golden["fused_model.0.conv.weight_sum"]) < 1e-5
    assert sum(t.numel() for pair in convolutions.seen for t in pair if t is not None) == parameters
    assert max_gap(decoded, golden["eval_decoded"]) < 3e-4


# Stacking


@pytest.mark.parametrize("channels_last", [False, True])
def test_forward_stack_of_three_gives_each_ones_own_output_gradient_and_statistics(channels_last: bool) -> None:
    states = states_of([3, 4, 5])
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stack = YOLOv5.stack("n", 3, states).train()
    if channels_last:
        stack.to(memory_format=torch.channels_last)
    raw = stack(images)
    probes = [torch.linspace(-1, 1, o[0].numel(), dtype=o.dtype).view_as(o[0]) for o in raw]
    sum((o * p).sum() for o, p in zip(raw, probes, strict=True)).backward()
    gradients = {name: stack.per_slot(p.grad) for name, p in stack.named_parameters()}
    for slot, state in enumerate(states):
        lone = YOLOv5.stack("n", 3, [state]).train()
        own = lone(images)
        sum((o[0] * p).sum() for o, p in zip(own, probes, strict=True)).backward()
        for level in range(3):
            torch.testing.assert_close(raw[level][slot], own[level][0], rtol=0, atol=1e-10)
        for name, parameter in lone.named_parameters():
            torch.testing.assert_close(gradients[name][slot], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)
        after, lone_after = stack.unstack(slot), lone.unstack(0)
        for name, tensor in lone_after.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-12, atol=1e-12, msg=name)
        assert int(after["model.9.cv1.bn.num_batches_tracked"]) == int(state["model.9.cv1.bn.num_batches_tracked"]) + 1


def test_forward_slot_with_nan_weights_leaves_the_others_alone() -> None:
    states = states_of([1, 2, 3])
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = YOLOv5.stack("n", 3, states).train()(images)
    states[1]["model.0.conv.weight"] = torch.full_like(states[1]["model.0.conv.weight"], math.nan)
    raw = YOLOv5.stack("n", 3, states).train()(images)
    for level in range(3):
        assert bool(raw[level][1].isnan().all())
        assert torch.equal(raw[level][[0, 2]], expected[level][[0, 2]])


def test_concat_slots_interleaves_per_slot_in_both_memory_formats() -> None:
    x = torch.tensor([10.0, 11, 20, 21]).view(1, 4, 1, 1).expand(2, 4, 3, 2)
    y = torch.tensor([12.0, 22]).view(1, 2, 1, 1).expand(2, 2, 3, 2)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = concat_slots([x.contiguous(memory_format=layout), y.contiguous(memory_format=layout)], 2)
        assert out[1, :, 2, 1].tolist() == [10, 11, 12, 20, 21, 22]
        assert out.is_contiguous(memory_format=layout)


def test_unstack_after_stack_gives_the_states_back() -> None:
    states = states_of([7, 8])
    model = YOLOv5.stack("n", 3, states)
    for slot, state in enumerate(states):
        back = model.unstack(slot)
        assert list(back) == list(state)
        for name, tensor in state.items():
            assert back[name].dtype == tensor.dtype
            assert torch.equal(back[name], tensor), name


def test_select_keeps_the_named_slots_in_order_mode_and_layout() -> None:
    states = states_of([1, 2, 3, 4])
    model = YOLOv5.stack("n", 3, states).eval().to(memory_format=torch.channels_last)
    chosen = model.select([3, 1])
    assert chosen.num_slots == 2
    assert not chosen.training
    assert chosen.model[1].conv.weight.is_contiguous(memory_format=torch.channels_last)
    for slot, source in enumerate((3, 1)):
        back = chosen.unstack(slot)
        assert all(torch.equal(back[name], tensor) for name, tensor in states[source].items())
    chosen.official_tensors()["model.0.conv.weight"].zero_()
    assert torch.equal(model.unstack(3)["model.0.conv.weight"], states[3]["model.0.conv.weight"])


def test_official_tensors_write_reaches_the_model() -> None:
    model = YOLOv5.stack("n", 3, states_of([1, 2])).to(memory_format=torch.channels_last)
    tensors = model.official_tensors()
    assert list(tensors) == [name for name in nano_state() if name != ANCHORS_KEY]
    assert tensors["model.1.conv.weight"].shape == (2, 32, 16, 3, 3)
    assert tensors["model.1.bn.num_batches_tracked"].shape == (2,)
    for tensor in tensors.values():
        tensor[1].fill_(5)
    written = model.unstack(1)
    assert all(bool((written[name] == 5).all()) for name in tensors)
    assert bool((model.unstack(0)["model.1.conv.weight"] != 5).all())


def test_load_slot_changes_only_that_slot() -> None:
    states = states_of([1, 2, 3])
    model = YOLOv5.stack("n", 3, states[:2])
    model.load_slot(1, states[2])
    for slot, source in ((0, 0), (1, 2)):
        back = model.unstack(slot)
        assert all(torch.equal(back[name], tensor) for name, tensor in states[source].items())


def test_load_slot_with_a_state_that_does_not_fit_names_the_tensor() -> None:
    model = YOLOv5.stack("n", 3, states_of([1, 2]))
    good = nano_state()
    with pytest.raises(WeightsError, match=r"yolov5n with 3 classes: tensor 'model.24.m.0.weight' has shape \[255"):
        model.load_slot(0, initial_state("n", 80, 0))
    with pytest.raises(WeightsError, match=r"'model.2.cv1.bn.bias' is missing \(1 missing, 0 unknown; 348 expected"):
        model.load_slot(0, {k: v for k, v in good.items() if k != "model.2.cv1.bn.bias"})
    with pytest.raises(WeightsError, match="'extra' is unknown"):
        model.load_slot(0, {**good, "extra": torch.zeros(1)})
    with pytest.raises(WeightsError, match="anchors"):
        model.load_slot(1, {**good, ANCHORS_KEY: good[ANCHORS_KEY] * 2})


def test_stack_takes_the_anchors_of_its_states() -> None:
    states = states_of([1, 2])
    for state in states:
        state[ANCHORS_KEY] = state[ANCHORS_KEY] * 1.25
    model = YOLOv5.stack("n", 3, states)
    torch.testing.assert_close(model.anchors, states[0][ANCHORS_KEY])
    torch.testing.assert_close(model.select([1]).anchors, states[0][ANCHORS_KEY])


# Anchors and initialisation


def test_anchors_in_grid_units_are_pixels_over_strides_and_ordered() -> None:
    pixels = torch.tensor(DEFAULT_ANCHORS, dtype=torch.float32)
    strides = torch.tensor([8.0, 16.0, 32.0])
    expected = [
        [[1.25, 1.625], [2.0, 3.75], [4.125, 2.875]],
        [[1.875, 3.8125], [3.875, 2.8125], [3.6875, 7.4375]],
        [[3.625, 2.8125], [4.875, 6.1875], [11.65625, 10.1875]],
    ]
    assert YOLOv5("n", 3).anchors.tolist() == expected
    assert YOLOv5("n", 3, anchors=pixels.flip(0)).anchors.tolist() == expected
    assert torch.equal(order_anchors(pixels.flip(0), strides), pixels)


def test_anchors_of_another_shape_or_sign_are_refused() -> None:
    strides = torch.tensor([8.0, 16.0, 32.0])
    with pytest.raises(WeightsError, match=r"shape \[2, 3, 2\], must be \[3"):
        grid_anchors(torch.ones(2, 3, 2), strides)
    with pytest.raises(WeightsError, match="greater than 0"):
        grid_anchors(torch.zeros(3, 3, 2), strides)


def test_anchors_two_per_level_give_two_per_cell() -> None:
    model = YOLOv5("n", 3, 2, torch.tensor(DEFAULT_ANCHORS)[:, :2])
    assert [tuple(o.shape) for o in model(torch.zeros(2, 3, 64, 32))] == [
        (2, 2, 2, 8, 4, 8), (2, 2, 2, 4, 2, 8), (2, 2, 2, 2, 1, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("num_classes", [1, 2, 3, 80])
def test_detect_prior_equals_golden(golden_dir: Path, num_classes: int) -> None:
    golden = np.load(golden_dir / "detect_bias_init.npz")
    for level, stride in enumerate(STRIDES):
        assert max_gap(detect_prior(num_classes, stride), golden[f"nc{num_classes}_level{level}"]) < 1e-6


def test_initial_state_is_a_function_of_the_seed_alone() -> None:
    first = initial_state("n", 3, 11)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = initial_state("n", 3, 11)
    assert torch.equal(torch.get_rng_state(), before)
    other = initial_state("n", 3, 12)
    assert list(first) == list(nano_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.9.cv2.conv.weight"], other["model.9.cv2.conv.weight"])


def test_initial_state_trunk_does_not_depend_on_the_classes() -> None:
    few, many = initial_state("n", 3, 0), initial_state("n", 80, 0)
    assert all(torch.equal(few[name], many[name]) for name in few if not name.startswith("model.24.m."))


def test_initial_state_has_the_statistics_that_a_zero_image_probe_leaves() -> None:
    model = YOLOv5("n", 3)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = 0.1
    model.train()(torch.zeros(1, 3, 256, 256))
    probed, fresh = model.unstack(0), initial_state("n", 3, 0)
    statistics = [n for n in fresh if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(statistics) == 3 * 57
    for name in statistics:
        torch.testing.assert_close(fresh[name], probed[name], rtol=1e-7, atol=0, msg=name)


def test_initial_state_weights_are_uniform_within_the_fan_in_bound() -> None:
    state = initial_state("n", 3, 5)
    weight = state["model.7.conv.weight"]
    bound = 1 / math.sqrt(128 * 9)
    assert float(weight.abs().max()) <= bound
    assert abs(float(weight.std()) - bound / math.sqrt(3)) < 0.01 * bound
    bias = state["model.24.m.2.bias"].view(3, 8) - detect_prior(3, 32)
    assert 0.5 / 16 < float(bias.abs().max()) <= 1 / 16 + 1e-6
    assert set(state["model.3.bn.weight"].tolist()) == {1.0}


# Devices that are not here


def step(made: tuple[YOLOv5, Tensor, Tensor, LossWeights]) -> None:
    """Image bytes to gradients, as a training step does it."""
    model, images, targets, weights = made
    raw = model(images.float() / 255)
    grids = [(o.shape[3], o.shape[4]) for o in raw]
    assert grids == [(8, 12), (4, 6), (2, 3)]
    assignment = assign_targets(targets, grids, model.anchors, images.shape[0], 4.0)
    components = detection_loss(raw, assignment, weights)
    assert components.total.shape == (4,)
    backward(components.total.sum())
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert model.per_slot(parameter.grad).shape[0] == 4
        assert parameter.grad.device.type == "cuda"
    for tensor in model.official_tensors().values():
        tensor.mul_(2)


def test_forward_loss_and_backward_of_four_slots_on_fake_cuda_never_wait_or_copy() -> None:
    def build() -> tuple[YOLOv5, Tensor, Tensor, LossWeights]:
        with torch.device("cuda"):
            model = YOLOv5("n", 3, 4).train()
            images = torch.empty(2, 3, 64, 96, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
            targets, ones = torch.empty(32, 6), torch.ones(4)
        names = ("box", "obj", "cls", "cls_pw", "obj_pw", "fl_gamma", "label_smoothing")
        return model, images, targets, LossWeights(**dict.fromkeys(names, ones), uses_focal=True)

    assert run_guarded(build, step).calls > 1000


def test_device_guard_stops_a_model_that_leaves_the_device() -> None:
    def leave(model: YOLOv5) -> None:
        model.head.register_forward_hook(lambda _module, _inputs, raw: [o.cpu() for o in raw])
        model(torch.empty(1, 3, 64, 64, device="cuda"))

    def build() -> YOLOv5:
        with torch.device("cuda"):
            return YOLOv5("n", 3, 2)

    with pytest.raises(DeviceGuardError, match="crosses devices"):
        run_guarded(build, leave)
