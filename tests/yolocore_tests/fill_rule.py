"""The golden fill rule: weights and images as a closed formula of a text key and a flat index (golden/README.md)."""

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

STRIDES = (8, 16, 32)
DEFAULT_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)


def hash32(key: str, count: int) -> np.ndarray:
    """uint64 [count] of 32-bit hashes."""
    mask = np.uint64(0xFFFFFFFF)
    h = (np.uint64(2654435761) * np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(key.encode("ascii")))) & mask
    h ^= h >> np.uint64(16)
    h = (h * np.uint64(0x85EBCA6B)) & mask
    h ^= h >> np.uint64(13)
    h = (h * np.uint64(0xC2B2AE35)) & mask
    h ^= h >> np.uint64(16)
    return h


def fill_signed(key: str, shape: Sequence[int]) -> np.ndarray:
    """float64 values in (-1, 1)."""
    unit = (hash32(key, math.prod(shape)) + 0.5) / 2.0**32
    return (2 * unit - 1).reshape(shape)


def fill_image(key: str, shape: Sequence[int]) -> np.ndarray:
    """uint8 image bytes."""
    return (hash32(key, math.prod(shape)) >> np.uint64(24)).astype(np.uint8).reshape(shape)


def _detect_bias(key: str, shape: Sequence[int]) -> np.ndarray:
    stride = STRIDES[int(key.split(".")[3])]
    values = (0.3 * fill_signed(key, shape)).reshape(3, -1)
    num_classes = values.shape[1] - 5
    values[:, 4] += math.log(8 / (640 / stride) ** 2)
    values[:, 5:] += math.log(0.6 / (num_classes - 0.99999))
    return values.reshape(shape)


def fill_tensor(key: str, shape: Sequence[int]) -> torch.Tensor:
    """One tensor of the state dict, float32 (int64 for counters)."""
    shape = tuple(shape)
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if leaf == "anchors":
        values = np.array(DEFAULT_ANCHORS, dtype=np.float64) / np.array(STRIDES, dtype=np.float64).reshape(3, 1, 1)
    elif len(shape) == 4:
        values = fill_signed(key, shape) * math.sqrt(3 / math.prod(shape[1:]))
    elif key.startswith("model.24.m."):
        values = _detect_bias(key, shape)
    else:
        scale, shift = {"weight": (0.25, 1), "bias": (0.2, 0), "running_mean": (0.1, 0), "running_var": (0.4, 0.6)}[
            leaf
        ]
        values = shift + scale * fill_signed(key, shape)
    return torch.from_numpy(values.astype(np.float32))


def fill_state(shapes: Mapping[str, Sequence[int]] | Iterable[tuple[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """The filled state dict of the given official names and shapes, in their order."""
    items = shapes.items() if isinstance(shapes, Mapping) else shapes
    return {name: fill_tensor(name, shape) for name, shape in items}


def official_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state_dict_*.json golden."""
    return {name: tuple(shape) for name, shape, _ in json.loads(path.read_text())["keys"]}


def nano_state() -> dict[str, torch.Tensor]:
    """The filled state dict of yolov5n with 3 classes."""
    golden = Path(__file__).parents[1] / "golden" / "state_dict_yolov5n_nc3.json"
    return fill_state(official_shapes(golden))
