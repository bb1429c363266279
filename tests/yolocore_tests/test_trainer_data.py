"""Trainings and their data: interruptions, rectangular batches, one class for all."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from yolocore.checkpoint import load, save_atomic
from yolocore.errors import InputError, TrainingError
from yolocore.hyperparameters import Hyperparameters
from yolocore.training import EpochReport, PackTrainer, SlotStart, TrainConfig, TrainingData

MIXED = Hyperparameters(mosaic=1.0, mixup=0.5)
SIZES = [(40, 80), (80, 40), (64, 64), (48, 80), (80, 64), (30, 80)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Twelve images of six shapes to train on, six to validate, with squares of two classes."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            height, width = SIZES[index % 6]
            image = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
            image[4:28, 6:30, index % 2 * 2] = 255
            cv2.imwrite(str(folder / "images" / split / f"{index:02}.png"), image)
            line = f"{index % 2} {18 / width} {16 / height} {24 / width} {24 / height}\n"
            (folder / "labels" / split / f"{index:02}.txt").write_text(line)
    source = folder / "squares.yaml"
    source.write_text("train: images/train\nval: images/val\nnames: [blue, red]\n")
    return TrainConfig(
        model="n", data=source, image_size=64, batch_size=4, epochs=3, seed=7, device="cpu", precision="fp32"
    )


def curve(trainer: PackTrainer) -> Iterator[EpochReport]:
    """The epochs that are left, without wall times."""
    while not trainer.finished:
        (report,) = trainer.run_epoch()
        yield replace(report, seconds=0.0, evaluation_seconds=0.0)


class CutOffError(Exception):
    """Stands for whatever ends a trainer in mid-epoch."""


def test_run_epoch_cut_off_and_resumed_with_mosaic_and_two_loader_processes_identical_curve(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, workers=0, eval_every=3)
    whole = list(curve(PackTrainer(config, [SlotStart("t", MIXED)])))
    config = replace(config, workers=2)

    def cut(done: int, _count: int) -> None:
        if trainer.stream_epoch == 1 and done == 2:
            raise CutOffError

    data = TrainingData.load(config, MIXED)
    trainer = PackTrainer(config, [SlotStart("t", MIXED)], data=data, on_batch=cut)
    (first,) = trainer.run_epoch()
    save_atomic(tmp_path / "state.pt", trainer.slot_state("t"))
    with pytest.raises(CutOffError):
        trainer.run_epoch()
    data.close()

    again = TrainingData.load(config, MIXED)
    try:
        resumed = PackTrainer(config, [SlotStart("t", MIXED, load(tmp_path / "state.pt"))], data=again)
        rest = list(curve(resumed))
    finally:
        again.close()
    assert [replace(first, seconds=0.0, evaluation_seconds=0.0), *rest] == whole
    assert [report.epoch for report in rest] == [1, 2]
    assert rest[-1].metrics is not None


def test_run_epoch_rect_pack_of_two_trains_each_slot_as_alone(config: TrainConfig) -> None:
    config = replace(config, rect=True, epochs=2)
    hyps = (Hyperparameters(), Hyperparameters(box=0.1, obj=2.0))
    data = TrainingData.load(config, hyps[0])
    shapes = {tuple(batch.images.shape[2:]) for batch in data.train.epoch(0)}
    assert shapes == {(32, 64), (64, 64)}
    together = PackTrainer(config, [SlotStart("a", hyps[0]), SlotStart("b", hyps[1])], data=data)
    pack = [together.run_epoch() for _ in range(2)]
    for slot, hyp in enumerate(hyps):
        alone = list(curve(PackTrainer(config, [SlotStart("x", hyp)], data=data)))
        for report, lone in zip((reports[slot] for reports in pack), alone, strict=True):
            assert report.failure is None
            assert (report.train_box, report.train_obj) == pytest.approx((lone.train_box, lone.train_obj), rel=1e-4)
            assert report.metrics is not None
            assert report.metrics.images == 6


def test_training_data_single_cls_one_class_in_labels_and_model(config: TrainConfig) -> None:
    data = TrainingData.load(replace(config, single_cls=True), MIXED)
    assert data.num_classes == 1
    for batches in (data.train.epoch(0), data.validation):
        targets = [row for batch in batches for row in batch.targets.tolist() if row[0] >= 0]
        assert {row[1] for row in targets} == {0.0}
    trainer = PackTrainer(replace(config, single_cls=True), [SlotStart("t", MIXED)], data=data)
    (report,) = trainer.run_epoch()
    assert report.metrics is not None
    assert list(report.metrics.class_ap) == [0]
    assert report.train_cls == 0
    assert trainer.slot_weights("t")["model.24.m.0.weight"].shape[0] == 18


@pytest.mark.parametrize("name", ["rect", "single_cls"])
def test_stream_data_loaded_otherwise_refused(name: str, config: TrainConfig) -> None:
    data = TrainingData.load(config, MIXED)
    with pytest.raises(TrainingError, match=rf"^{name}: the data was loaded for False, the training wants True"):
        PackTrainer(replace(config, **{name: True}), [SlotStart("t", MIXED)], data=data)


def test_train_config_rect_with_image_weights_refused(config: TrainConfig) -> None:
    with pytest.raises(InputError, match=r"^rect: not possible with image_weights"):
        replace(config, rect=True, image_weights=True)
