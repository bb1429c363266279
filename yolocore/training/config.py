"""What one training run is, apart from the hyperparameters of its slots."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from yolocore.autoanchor import AnchorTuple
from yolocore.errors import InputError
from yolocore.host import LoaderCount
from yolocore.model import ModelSize

OptimizerName = Literal["SGD", "Adam", "AdamW"]
CacheName = Literal["ram", "disk", "none"]
CompilerName = Literal["none", "inductor", "cudagraphs"]

LARGEST_STRIDE = 32
"""Images must divide into the cells of the coarsest level."""

MAX_FREEZE = 24
"""All layers but the detection head; with that frozen as well there would be nothing to train."""

DEFAULT_PATIENCE = 100
"""As in YOLOv5: without effect on trainings of up to 100 epochs."""


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
    compile: CompilerName = "none"
    """How the network is compiled for training: not, by torch.compile, or by it into CUDA graphs."""
    weights: Path | None = None
    """A weights file to start from; None starts from `seed`."""
    anchors: AnchorTuple | None = None
    """[L][A] (width, height) in pixels; None takes those of `weights`, or YOLOv5's."""
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
    workers: LoaderCount = "auto"
    """Processes that make batches; 0 makes them in the training process; auto: 0 on the CPU, else this trainer's share
    of the host's cores, at most 8."""
    freeze: int = 0
    """Layers 0 to `freeze` - 1 keep their weights: no gradient, no optimiser work; 10 is the backbone."""
    freeze_bn: bool = False
    """Frozen layers also keep their BatchNorm statistics and normalise by them; YOLOv5 lets the statistics move."""
    patience: int = DEFAULT_PATIENCE
    """A training ends early when its fitness has not improved for so many epochs; 0 never."""
    multi_scale: bool = False
    """Every batch at another size, half to one and a half times `image_size`, the same for all slots."""
    rect: bool = False
    """Batches of images of like shape, letterboxed as little as possible; no mosaic and no shuffling."""
    image_weights: bool = False
    """Images are drawn by how badly the model does on their classes; for packs of one slot only."""
    single_cls: bool = False
    """Train as if all labels were of one class."""

    def __post_init__(self) -> None:
        """Check the numbers, so that a mistake is named before anything is loaded."""
        for name in ("batch_size", "epochs", "eval_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is too small: 1 or more is allowed")
        if self.image_size < LARGEST_STRIDE or self.image_size % LARGEST_STRIDE:
            raise InputError(f"image_size: {self.image_size} is not allowed: a multiple of {LARGEST_STRIDE} is")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing: {self.label_smoothing} is not allowed: 0 to below 1 is")
        for name in ("workers", "patience"):
            if getattr(self, name) != "auto" and getattr(self, name) < 0:
                raise InputError(f"{name}: {getattr(self, name)} is not allowed: 0 or more is")
        if not 0 <= self.freeze <= MAX_FREEZE:
            raise InputError(f"freeze: {self.freeze} is not allowed: 0 to {MAX_FREEZE} is (layers, from the first)")
        if self.rect and self.image_weights:
            raise InputError("rect: not possible with image_weights, which draws the images of every epoch anew")
        if (self.multi_scale or self.rect) and self.compile != "none":
            raise InputError("compile: not possible with multi_scale or rect: every size of batch would be compiled")
        for name, kind in (("optimizer", OptimizerName), ("cache", CacheName), ("compile", CompilerName)):
            allowed = get_args(kind)
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: {getattr(self, name)!r} is not allowed: one of {', '.join(allowed)} is")
