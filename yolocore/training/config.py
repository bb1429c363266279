"""What one training run is, apart from the hyperparameters of its slots."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yolocore.errors import InputError
from yolocore.model import ModelSize

OptimizerName = Literal["SGD", "Adam", "AdamW"]
CacheName = Literal["ram", "disk", "none"]

LARGEST_STRIDE = 32
"""Images must divide into the cells of the coarsest level."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that all slots of a pack share.

    Raises:
        InputError: A value outside what is allowed; the message names the field.
    """

    model: ModelSize
    """Size of the network: n, s, m, l or x."""
    data: Path
    """The data set's YAML file."""
    image_size: int = 640
    """Side of the square training images, pixels; a multiple of 32."""
    batch_size: int = 16
    """Images per batch; gradients accumulate to about 64 images per optimiser step after warm-up."""
    epochs: int = 100
    """Length of the schedule and of the training."""
    seed: int = 0
    """Seeds the initial weights and the stream of training images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """auto, fp32, bf16 or fp16."""
    weights: Path | None = None
    """A weights file to start from; None starts from `seed`."""
    optimizer: OptimizerName = "SGD"
    """SGD with Nesterov momentum, Adam, or AdamW (both take `momentum` as their first beta)."""
    cos_lr: bool = False
    """Cosine instead of linear decay of the learning rate."""
    label_smoothing: float = 0.0
    """Epsilon of the class targets, 0 to below 1."""
    autobalance: bool = False
    """Adapt the objectness balance of the levels while training."""
    eval_every: int = 1
    """Evaluate after every so many epochs, counted from the start of the slot, and after the last."""
    cache: CacheName = "ram"
    """Where decoded training images are kept."""
    workers: int = 0
    """Processes that read images; 0 reads in the training process."""

    def __post_init__(self) -> None:
        """Check the numbers, so that a mistake is named before anything is loaded."""
        for name in ("batch_size", "epochs", "eval_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small: 1 or more is allowed")
        if self.image_size < LARGEST_STRIDE or self.image_size % LARGEST_STRIDE:
            raise InputError(f"image_size: {self.image_size} is not allowed: a multiple of {LARGEST_STRIDE} is")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing: {self.label_smoothing} is not allowed: 0 to below 1 is")
        if self.workers < 0:
            raise InputError(f"workers: {self.workers} is not allowed: 0 or more is")
        for name, allowed in (("optimizer", ("SGD", "Adam", "AdamW")), ("cache", ("ram", "disk", "none"))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: {getattr(self, name)!r} is not allowed: one of {', '.join(allowed)} is")
