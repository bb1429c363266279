"""The trainer on a tiny data set written to disk."""

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from yolocore.checkpoint import load, save_atomic, save_weights
from yolocore.errors import InputError, TrainingError, WeightsError
from yolocore.hyperparameters import Hyperparameters
from yolocore.model import ANCHORS_KEY, initial_state
from yolocore.training import EpochReport, PackTrainer, SlotStart, TrainConfig, TrainingData
from yolocore.training.pack import fresh_state
from yolocore.training.start import start_weights

HYPS = (Hyperparameters(mosaic=0.0), Hyperparameters(mosaic=0.0, box=0.1, obj=2.0, lr0=0.03))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images to train on, six to validate: bright squares of two classes on noise."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
            x, y = rng.integers(2, 38, 2).tolist()
            label = index % 2
            image[y : y + 24, x : x + 24, label * 2] = 255
            cv2.imwrite(str(folder / "images" / split / f"{index:02}.png"), image)
            line = f"{label} {(x + 12) / 64} {(y + 12) / 64} {24 / 64} {24 / 64}\n"
            (folder / "labels" / split / f"{index:02}.txt").write_text(line)
    source = folder / "squares.yaml"
    source.write_text("train: images/train\nval: images/val\nnames: [blue, red]\n")
    return source


@pytest.fixture(scope="module")
def config(dataset: Path) -> TrainConfig:
    return TrainConfig(
        model="n", data=dataset, image_size=64, batch_size=4, epochs=3, seed=7, device="cpu", precision="fp32"
    )


@pytest.fixture(scope="module")
def data(config: TrainConfig) -> TrainingData:
    return TrainingData.load(config, HYPS[0])


def starts(count: int = 2) -> list[SlotStart]:
    return [SlotStart(f"t{i}", HYPS[i]) for i in range(count)]


def curve(report: EpochReport) -> EpochReport:
    """Everything but the wall time."""
    return replace(report, seconds=0.0, evaluation_seconds=0.0)


def test_run_epoch_two_slots_reports_both_and_evaluates_on_the_grid_and_at_the_end(config, data) -> None:
    calls: list[tuple[int, int]] = []
    trainer = PackTrainer(
        replace(config, eval_every=2), starts(), data=data, on_batch=lambda done, count: calls.append((done, count))
    )
    epochs = []
    while not trainer.finished:
        epochs.append(trainer.run_epoch())
    assert [[r.key for r in reports] for reports in epochs] == [["t0", "t1"]] * 3
    assert [[r.epoch for r in reports] for reports in epochs] == [[0, 0], [1, 1], [2, 2]]
    assert [reports[0].metrics is not None for reports in epochs] == [False, True, True]
    assert calls == [(1, 3), (2, 3), (3, 3)] * 3
    assert trainer.active == ("t0", "t1")
    last = epochs[-1]
    assert all(r.failure is None and r.train_box > 0 and r.train_obj > 0 and r.train_cls > 0 for r in last)
    assert last[1].train_obj > 1.5 * last[0].train_obj  # twice the gain
    assert last[0].metrics is not None
    assert last[0].metrics.images == 6
    # The ninth of 101 warm-up iterations: biases fall from 0.1, the others rise from 0, towards lr0 * f(2).
    target = 0.01 * (1 / 3 * 0.99 + 0.01)
    assert last[0].lr == pytest.approx((0.1 + 0.08 * (target - 0.1), 0.08 * target, 0.08 * target))
    with pytest.raises(TrainingError, match="every slot has left or has its 3 epochs"):
        trainer.run_epoch()


def test_run_epoch_slots_of_one_seed_start_from_the_same_weights(config, data) -> None:
    trainer = PackTrainer(config, starts(), data=data)
    expected = initial_state("n", 2, seed=7)
    for key in trainer.active:
        weights = trainer.slot_weights(key)
        assert list(weights) == list(expected)
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_run_epoch_failed_slot_reports_once_and_leaves(config, data) -> None:
    first = PackTrainer(config, starts(), data=data)
    first.run_epoch()
    state, sick = first.slot_state("t0"), first.slot_state("t1")
    sick["model"]["model.3.conv.weight"][0] = float("nan")
    trainer = PackTrainer(config, [SlotStart("t0", HYPS[0], state), SlotStart("t1", HYPS[1], sick)], data=data)
    well, ill = trainer.run_epoch()
    assert (well.failure, ill.failure) == (None, "the loss is not finite (epoch 1, batch 0)")
    assert well.metrics is not None
    assert ill.metrics is None
    assert trainer.active == ("t0",)
    assert [report.key for report in trainer.run_epoch()] == ["t0"]


def test_run_epoch_last_slot_fails_finishes_the_pack(config, data) -> None:
    first = PackTrainer(config, starts(1), data=data)
    state = first.slot_state("t0")
    state["model"]["model.3.conv.weight"][0] = float("nan")
    trainer = PackTrainer(config, [SlotStart("t0", HYPS[0], state)], data=data)
    (report,) = trainer.run_epoch()
    assert report.failure == "the loss is not finite (epoch 0, batch 0)"
    assert (trainer.active, trainer.finished) == ((), True)


@pytest.mark.parametrize("slots", [1, 2])
def test_resume_from_a_checkpoint_gives_the_identical_curve(config, data, tmp_path, slots) -> None:
    through = PackTrainer(config, starts(slots), data=data)
    through.run_epoch()
    save_atomic(tmp_path / "pack.pt", {key: through.slot_state(key) for key in through.active})
    states = load(tmp_path / "pack.pt")
    # Another seed's initial weights would not matter any more, but the stream of images does.
    again = PackTrainer(config, [SlotStart(s.key, s.hyperparameters, states[s.key]) for s in starts(slots)], data=data)
    assert again.stream_epoch == 1
    while not through.finished:
        expected, got = through.run_epoch(), again.run_epoch()
        assert [curve(r) for r in got] == [curve(r) for r in expected]
    for key in through.active:
        ours, theirs = again.slot_weights(key), through.slot_weights(key)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_drop_leaves_the_other_slot_close_to_its_lone_run(config, data) -> None:
    pack, lone = PackTrainer(config, starts(), data=data), PackTrainer(config, starts()[1:], data=data)
    pack.run_epoch()
    lone.run_epoch()
    pack.drop(["t0"])
    (ours,), (alone,) = pack.run_epoch(), lone.run_epoch()
    assert (ours.train_box, ours.train_obj, ours.train_cls) == pytest.approx(
        (alone.train_box, alone.train_obj, alone.train_cls), abs=3e-4
    )
    with pytest.raises(TrainingError, match="slot t0 is not in the pack; it holds t1"):
        pack.slot_state("t0")


def test_data_reused_by_a_second_pack_gives_the_same_reports(config, data) -> None:
    first = PackTrainer(config, starts(), data=data).run_epoch()
    other_seed = PackTrainer(replace(config, seed=8), starts(), data=data).run_epoch()
    again = PackTrainer(config, starts(), data=data).run_epoch()
    alone = PackTrainer(config, starts()).run_epoch()
    assert [curve(r) for r in again] == [curve(r) for r in first] == [curve(r) for r in alone]
    assert other_seed[0].train_box != first[0].train_box


def test_data_of_another_image_size_raises(config, data) -> None:
    with pytest.raises(TrainingError, match="image_size: the data was loaded for 64, the training wants 96"):
        PackTrainer(replace(config, image_size=96), starts(), data=data)


REFILLED = {
    "a": HYPS[0],
    "b": HYPS[1],
    "c": Hyperparameters(mosaic=0.0, cls_pw=2.0, obj_pw=0.7, warmup_bias_lr=0.05, warmup_momentum=0.3),
    "d": Hyperparameters(mosaic=0.0, fl_gamma=1.5, lrf=0.2, momentum=0.8, weight_decay=1e-3),
}


def float64_start(key: str, stream_epoch: int) -> SlotStart:
    """A fresh trial in float64, as if its pack stood at this epoch of the stream."""
    weights = initial_state("n", 2, seed=7)
    state = fresh_state({name: t.double() if t.is_floating_point() else t for name, t in weights.items()})
    return SlotStart(key, REFILLED[key], {**state, "stream_epoch": stream_epoch})


def test_refilled_pack_every_slot_has_the_curve_of_its_lone_run(config, data) -> None:
    """Slots are dropped, end at their own last epoch, and join; float64, each evaluated on its own grid of epochs."""
    config = replace(config, eval_every=2)
    changes = {1: (["b"], ["c"]), 2: ([], ["d"])}
    joined = {"a": 0, "b": 0, "c": 1, "d": 2}
    trainer = PackTrainer(config, [float64_start("a", 0), float64_start("b", 0)], data=data)
    reports: dict[str, list[EpochReport]] = {key: [] for key in REFILLED}
    seen = []
    while not trainer.finished:
        drop, add = changes.get(trainer.stream_epoch, ([], []))
        trainer.reshape(drop=drop, add=[float64_start(key, 0) for key in add])
        for report in trainer.run_epoch():
            reports[report.key].append(report)
        seen.append(trainer.active)
    assert seen == [("a", "b"), ("a", "c"), ("a", "c", "d"), ("c", "d"), ("d",)]
    assert [len(reports[key]) for key in REFILLED] == [3, 1, 3, 3]
    for key, together in reports.items():
        lone = PackTrainer(config, [float64_start(key, joined[key])], data=data)
        for report in together:
            (alone,) = lone.run_epoch()
            assert (report.epoch, report.stream_epoch, report.lr) == (alone.epoch, alone.stream_epoch, alone.lr)
            assert report.stream_epoch == joined[key] + report.epoch
            losses = [(r.train_box, r.train_obj, r.train_cls) for r in (report, alone)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-9)
            assert (report.metrics is None) == (alone.metrics is None) == (report.epoch == 0)
            if report.metrics is not None and alone.metrics is not None:
                assert report.metrics.to_mapping() == pytest.approx(alone.metrics.to_mapping(), abs=1e-9)
                assert report.metrics.obj_loss > 0


def test_stream_goes_on_for_those_who_stay_and_begins_anew_for_a_new_pack(config, data) -> None:
    trainer = PackTrainer(config, starts(1), data=data)
    first = trainer.run_epoch()
    trainer.add(starts(2)[1:])
    assert [(r.key, r.epoch, r.stream_epoch, r.slots) for r in trainer.run_epoch()] == [
        ("t0", 1, 1, 2),
        ("t1", 0, 1, 2),
    ]
    state = trainer.slot_state("t0")
    trainer.reshape(drop=["t0", "t1"], add=starts(1))
    assert [curve(r) for r in trainer.run_epoch()] == [curve(r) for r in first]
    # A trial that comes from a pack that was further on takes this one along: it has seen the epochs before.
    trainer.add([SlotStart("far", HYPS[1], state)])
    assert trainer.stream_epoch == 2
    assert [(r.key, r.epoch, r.stream_epoch) for r in trainer.run_epoch()] == [("t0", 1, 2), ("far", 2, 2)]


def test_reshape_that_is_refused_leaves_the_pack_as_it_was(config, data) -> None:
    trainer = PackTrainer(config, starts(), data=data)
    trainer.run_epoch()
    with pytest.raises(TrainingError, match="slot bad: its state has format 99"):
        trainer.reshape(drop=["t0"], add=[SlotStart("bad", HYPS[0], {"format": 99, "clock": {"iteration": 0}})])
    assert trainer.epochs == {"t0": 1, "t1": 1}
    assert [report.epoch for report in trainer.run_epoch()] == [1, 1]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([], "at least one slot"),
        ([SlotStart("a", HYPS[0]), SlotStart("a", HYPS[1])], "slot a is in the pack twice"),
        (
            [SlotStart("a", HYPS[0]), SlotStart("b", Hyperparameters(mosaic=0.0, hsv_h=0.5))],
            "hsv_h cannot differ inside a pack: 0.015 in a, 0.5 in b",
        ),
        ([SlotStart("a", HYPS[0], {"format": 99})], "slot a: its state has format 99, this version reads 1"),
    ],
)
def test_starts_that_do_not_go_together_raise(config, data, slots, message) -> None:
    with pytest.raises(TrainingError, match=message):
        PackTrainer(config, slots, data=data)


def test_multi_scale_trains_at_other_sizes_and_resumes_identically(config, data) -> None:
    plain = PackTrainer(config, starts(1), data=data).run_epoch()
    through = PackTrainer(replace(config, multi_scale=True), starts(1), data=data)
    first = through.run_epoch()
    state = through.slot_state("t0")
    again = PackTrainer(replace(config, multi_scale=True), [SlotStart("t0", HYPS[0], state)], data=data)
    assert first[0].train_obj != plain[0].train_obj
    assert [curve(r) for r in again.run_epoch()] == [curve(r) for r in through.run_epoch()]


def test_image_weights_follow_the_class_map_and_resume_identically(config, data) -> None:
    weighted = replace(config, image_weights=True)
    through = PackTrainer(weighted, starts(1), data=data)
    first = through.run_epoch()
    state = through.slot_state("t0")
    assert first[0].metrics is not None
    assert state["class_map"] == [first[0].metrics.class_ap.get(index, first[0].metrics.map) for index in range(2)]
    assert first[0].train_box != PackTrainer(config, starts(1), data=data).run_epoch()[0].train_box
    again = PackTrainer(weighted, [SlotStart("t0", HYPS[0], state)], data=data)
    forgetful = PackTrainer(weighted, [SlotStart("t0", HYPS[0], {**state, "class_map": [0.0, 0.99]})], data=data)
    expected = [curve(report) for report in through.run_epoch()]
    assert [curve(report) for report in again.run_epoch()] == expected
    assert [curve(report) for report in forgetful.run_epoch()] != expected


def test_image_weights_in_a_pack_raise(config, data) -> None:
    weighted = replace(config, image_weights=True)
    with pytest.raises(TrainingError, match="image_weights: the images depend on the model, so a pack has one slot"):
        PackTrainer(weighted, starts(2), data=data)
    with pytest.raises(TrainingError, match="a pack has one slot, not 2"):
        PackTrainer(weighted, starts(1), data=data).add(starts(2)[1:])


def test_weights_file_is_where_every_slot_starts(config, data, tmp_path) -> None:
    file = tmp_path / "start.safetensors"
    given = initial_state("n", 5, seed=99)  # other classes: the head does not fit and stays fresh
    save_weights(file, given)
    weights = PackTrainer(replace(config, weights=file), starts(1), data=data).slot_weights("t0")
    assert torch.equal(weights["model.0.conv.weight"], given["model.0.conv.weight"])
    fresh = initial_state("n", 2, seed=7)
    assert torch.equal(weights["model.24.m.0.weight"], fresh["model.24.m.0.weight"])


def test_weights_file_of_which_nothing_fits_raises(config, data, tmp_path) -> None:
    file = tmp_path / "other.safetensors"
    save_weights(file, {"layer.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match=r"none of the 349 tensors of yolov5n fits"):
        PackTrainer(replace(config, weights=file), starts(1), data=data)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (ANCHORS_KEY, lambda t: t * 0, r"tensor 'model\.24\.anchors' holds 0; allowed: widths and heights above 0"),
        (ANCHORS_KEY, lambda t: -t, r"tensor 'model\.24\.anchors' holds -1\.25; allowed"),
        ("model.2.cv1.conv.weight", lambda t: t * math.nan, r"tensor 'model\.2\.cv1\.conv\.weight' holds nan; allowed"),
        (
            "model.2.cv1.bn.weight",
            lambda t: t + 1e5,
            r"tensor 'model\.2\.cv1\.bn\.weight' holds 100001; allowed: .* 65504",
        ),
        (
            "model.3.bn.running_var",
            lambda t: t - 9,
            r"tensor 'model\.3\.bn\.running_var' holds -8\.1; allowed: variances",
        ),
    ],
)
def test_start_weights_no_model_could_train_from_raises_naming_the_tensor(
    config, tmp_path, name, change, message
) -> None:
    file = tmp_path / "bad.safetensors"
    state = initial_state("n", 3, 0)
    save_weights(file, state | {name: change(state[name])})
    with pytest.raises(WeightsError, match=message) as caught:
        start_weights(replace(config, weights=file), 3)
    assert str(caught.value).startswith(f"{file}: ")


def test_start_weights_bad_tensor_that_does_not_fit_is_no_matter(config, tmp_path) -> None:
    file = tmp_path / "other-classes.safetensors"
    save_weights(file, initial_state("n", 80, 0) | {"model.24.m.0.bias": torch.full((255,), math.nan)})
    assert start_weights(replace(config, weights=file), 3).transferred == 343


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "image_size: 100 is not allowed: a multiple of 32 is"),
        ({"epochs": 0}, "epochs: 0 is too small: 1 or more is allowed"),
        ({"eval_every": 0}, "eval_every: 0 is too small"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0 is not allowed: 0 to below 1 is"),
        ({"optimizer": "LAMB"}, "optimizer: 'LAMB' is not allowed: one of SGD, Adam, AdamW is"),
        ({"workers": -1}, "workers: -1 is not allowed"),
    ],
)
def test_train_config_impossible_value_raises_naming_it(config, changes, message) -> None:
    with pytest.raises(InputError, match=message):
        replace(config, **changes)


def test_train_config_takes_the_golden_image_sizes_that_yolov5_keeps(config, small_golden_dir: Path) -> None:
    golden = np.load(small_golden_dir / "geometry.npz")
    for size, rounded in zip(
        *(golden[f"check_img_size_{x}"].tolist() for x in ("in", "out_stride32_floor64")), strict=True
    ):
        # YOLOv5 rounds the others up; here 32 stays what it is, and the rest is refused.
        if size in (rounded, 32):
            assert replace(config, image_size=size).image_size == size
        else:
            with pytest.raises(InputError, match=f"image_size: {size} is not allowed: a multiple of 32 is"):
                replace(config, image_size=size)
