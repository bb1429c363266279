"""Packs of growing size, measured with real steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from yolocore.hyperparameters import Hyperparameters
from yolocore.training import TrainConfig, TrainingData
from yolocore.training.capacity import Capacity, best_size, epoch_seconds, measure_capacity


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    import cv2

    folder = tmp_path_factory.mktemp("boxes")
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(4):
            image = np.full((64, 64, 3), 40 * index, dtype=np.uint8)
            cv2.imwrite(str(folder / "images" / split / f"{index}.png"), image)
            (folder / "labels" / split / f"{index}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (folder / "boxes.yaml").write_text("train: images/train\nval: images/val\nnames: [box]\n")
    return TrainConfig(
        model="n", data=folder / "boxes.yaml", image_size=64, batch_size=2, epochs=2, device="cpu", precision="fp32"
    )


def test_measure_capacity_goes_up_to_the_largest(config: TrainConfig) -> None:
    hyp = Hyperparameters(mosaic=0.0)
    data = TrainingData.load(config, hyp)
    seen = torch.get_rng_state()
    found = list(measure_capacity(config, data, hyp, 3))
    sizes = [one.slots for one in found]
    assert sizes == [1, 2, 3]
    assert all(one.steps_per_second > 0 and one.memory > 0 and not one.note for one in found)
    assert best_size(found) in sizes
    # It leaves no trace: not in torch's random state, not in the stream of images.
    assert torch.equal(torch.get_rng_state(), seen)


def test_measure_capacity_memory_of_many_sharers_stops_it(config: TrainConfig) -> None:
    hyp = Hyperparameters(mosaic=0.0)
    wide = replace(config, image_size=320)
    found = list(measure_capacity(wide, TrainingData.load(wide, hyp), hyp, 64, share=10**9))
    assert found[-1].note.startswith("not tried")
    assert found[-1].steps_per_second == 0
    assert best_size(found) < found[-1].slots


def test_best_size_is_the_smallest_that_is_as_fast_as_the_best() -> None:
    rates = {1: 10.0, 2: 19.8, 4: 20.0, 8: 15.0}
    found = [Capacity(slots, rate, 1) for slots, rate in rates.items()]
    assert best_size(found) == 2
    assert best_size([*found, Capacity(16, 0.0, 1, "out of memory")]) == 2
    assert best_size([Capacity(1, 0.0, 1, "out of memory")]) == 1
    assert best_size([]) == 1


def test_epoch_seconds_are_the_steps_of_an_epoch_and_an_evaluation(config: TrainConfig) -> None:
    hyp = Hyperparameters(mosaic=0.0)
    data = TrainingData.load(config, hyp)
    # Four images in batches of two: two steps, which take 2 * 2 / 0.001 s at this made-up rate.
    slow = Capacity(2, 0.001, 1)

    seconds = epoch_seconds(config, data, hyp, slow)
    rarely = epoch_seconds(replace(config, eval_every=1000), data, hyp, slow)

    assert 4000 < rarely < seconds < 4600
    assert rarely == pytest.approx(4000, abs=0.6)
