"""Where a training starts: fresh weights by seed, or what fits of a weights file, and the anchors."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from yolocore.autoanchor import AnchorTuple
from yolocore.checkpoint import load_weights, transfer
from yolocore.errors import WeightsError
from yolocore.model import ANCHORS_KEY, initial_state
from yolocore.model.anchors import STRIDES
from yolocore.training.config import TrainConfig

_log = logging.getLogger(__name__)
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True)
class StartWeights:
    """The weights that every fresh slot starts from."""

    state: dict[str, Tensor]
    """An official state dict, float32."""
    transferred: int
    """Tensors that came from the weights file; 0 without one."""

    @property
    def total(self) -> int:
        """Tensors of the model."""
        return len(self.state)

    @property
    def anchors(self) -> AnchorTuple:
        """In pixels: those of the weights file, where it has any that fit, or YOLOv5's."""
        pixels = self.state[ANCHORS_KEY] * torch.tensor(STRIDES).view(-1, 1, 1)
        return tuple(tuple((w, h) for w, h in level) for level in pixels.tolist())


def start_weights(config: TrainConfig, num_classes: int) -> StartWeights:
    """The weights that a training starts from.

    As in a fine-tune of YOLOv5 what fits by name and shape is taken from the file, its anchors too, unless
    `config.anchors` names others.

    Raises:
        WeightsError: The file cannot be read, nothing of it fits, or what fits holds numbers from which none can train.
    """
    anchors = None if config.anchors is None else torch.tensor(config.anchors)
    fresh = initial_state(config.model, num_classes, config.seed, anchors)
    if config.weights is None:
        return StartWeights(fresh, 0)
    merged, taken, total = transfer(load_weights(config.weights), fresh, keep_anchors=anchors is not None)
    if taken == 0:
        raise WeightsError(
            f"{config.weights}: none of the {total} tensors of yolov5{config.model} fits in name and shape"
        )
    _check(config.weights, merged)
    _log.info("%s: %d/%d tensors transferred", config.weights, taken, total)
    return StartWeights(merged, taken)


def _check(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse numbers that make every output NaN, or that no training could mend."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        # A training starts from weights that are rounded to half precision.
        _refuse(path, name, tensor, tensor.half().isfinite(), f"finite numbers up to {_LARGEST:g}")
        if name == ANCHORS_KEY:
            _refuse(path, name, tensor, tensor.half() > 0, "widths and heights above 0")
        if name.endswith(".running_var"):
            _refuse(path, name, tensor, tensor >= 0, "variances, 0 or more")


def _refuse(path: Path, name: str, tensor: Tensor, good: Tensor, allowed: str) -> None:
    if not good.all():
        raise WeightsError(f"{path}: tensor {name!r} holds {float(tensor[~good][0]):g}; allowed: {allowed}")
