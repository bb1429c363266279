"""Sizes of multi-scale batches."""

from pathlib import Path

import pytest
import torch

from yolocore.training.config import TrainConfig
from yolocore.training.multiscale import batch_sizes, resized


def config(**changes: object) -> TrainConfig:
    return TrainConfig(**({"model": "n", "data": Path("none"), "image_size": 160, "multi_scale": True} | changes))


def test_batch_sizes_are_a_function_of_seed_and_epoch() -> None:
    sizes = batch_sizes(config(), 3, 400)

    # 80 to 271 pixels, each as likely as the others, rounded down to a multiple of 32.
    assert set(sizes) == {64, 96, 128, 160, 192, 224, 256}
    assert sizes.count(64) < sizes.count(128)  # 16 of 192 sizes against 32
    assert batch_sizes(config(), 3, 40) == sizes[:40]
    assert batch_sizes(config(), 4, 400) != sizes
    assert batch_sizes(config(seed=1), 3, 400) != sizes


def test_batch_sizes_smallest_image_is_never_zero() -> None:
    assert set(batch_sizes(config(image_size=32), 0, 100)) == {32, 64}


def test_batch_sizes_without_multi_scale_leave_every_batch() -> None:
    assert batch_sizes(config(multi_scale=False), 0, 3) == (None, None, None)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((64, 96), 96, (64, 96)), ((64, 96), None, (64, 96)), ((64, 96), 160, (128, 160)), ((96, 64), 32, (32, 32))],
)
def test_resized_rounds_both_sides_up_to_cells(shape, size, expected) -> None:
    assert resized(torch.rand(2, 3, *shape), size).shape == (2, 3, *expected)


def test_resized_keeps_what_is_constant_and_half_of_a_ramp() -> None:
    ramp = torch.arange(64.0).expand(1, 3, 64, 64)

    half = resized(ramp, 32)

    # Corners not aligned: each new pixel lies between two old ones.
    torch.testing.assert_close(half[0, 0, 5], torch.arange(32.0) * 2 + 0.5)
