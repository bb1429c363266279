"""YOLOv5 (v6/v7 architecture): K models of one size in one network.

The parameters carry the official names (`model.<layer>...`) and hold the K slots stacked along their first dimension;
`official_tensors` shows them as [K, ...], `unstack` gives one slot as an ordinary YOLOv5 state dict.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yolocore.errors import WeightsError
from yolocore.initial import class_prior, objectness_prior
from yolocore.model.anchors import STRIDES, grid_anchors
from yolocore.model.blocks import C3, FRESH_RUNNING_VAR, SPPF, Concat, Conv, Detect, Upsample, spread_slots
from yolocore.model.trunk import Trunk

ModelSize = Literal["n", "s", "m", "l", "x"]


@dataclass(frozen=True, slots=True)
class Scaling:
    """How one size differs from the base table: factors of C3 repeats and of channels."""

    depth: float
    width: float

    def channels(self, base: int) -> int:
        """Scaled channels, rounded up to a multiple of 8."""
        return math.ceil(base * self.width / 8) * 8

    def repeats(self, base: int) -> int:
        """Scaled number of bottlenecks, at least 1 (half rounds to even)."""
        return max(round(base * self.depth), 1) if base > 1 else base


SCALINGS: Mapping[ModelSize, Scaling] = {
    "n": Scaling(depth=0.33, width=0.25),
    "s": Scaling(depth=0.33, width=0.50),
    "m": Scaling(depth=0.67, width=0.75),
    "l": Scaling(depth=1.00, width=1.00),
    "x": Scaling(depth=1.33, width=1.25),
}


_FRESH_NORM = {
    "weight": 1.0,
    "bias": 0.0,
    "running_mean": 0.0,
    "running_var": FRESH_RUNNING_VAR,
    "num_batches_tracked": 1,
}


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One row of the architecture table; channels and repeats before scaling, -1 is the layer before."""

    kind: Literal["conv", "c3", "sppf", "upsample", "concat"]
    channels: int = 0
    kernel: int = 1
    stride: int = 1
    padding: int | None = None
    repeats: int = 1
    shortcut: bool = False
    sources: tuple[int, ...] = (-1,)


ARCHITECTURE: tuple[LayerSpec, ...] = (
    LayerSpec("conv", 64, kernel=6, stride=2, padding=2),
    LayerSpec("conv", 128, kernel=3, stride=2),
    LayerSpec("c3", 128, repeats=3, shortcut=True),
    LayerSpec("conv", 256, kernel=3, stride=2),
    LayerSpec("c3", 256, repeats=6, shortcut=True),
    LayerSpec("conv", 512, kernel=3, stride=2),
    LayerSpec("c3", 512, repeats=9, shortcut=True),
    LayerSpec("conv", 1024, kernel=3, stride=2),
    LayerSpec("c3", 1024, repeats=3, shortcut=True),
    LayerSpec("sppf", 1024, kernel=5),
    LayerSpec("conv", 512),
    LayerSpec("upsample"),
    LayerSpec("concat", sources=(-1, 6)),
    LayerSpec("c3", 512, repeats=3),
    LayerSpec("conv", 256),
    LayerSpec("upsample"),
    LayerSpec("concat", sources=(-1, 4)),
    LayerSpec("c3", 256, repeats=3),
    LayerSpec("conv", 256, kernel=3, stride=2),
    LayerSpec("concat", sources=(-1, 14)),
    LayerSpec("c3", 512, repeats=3),
    LayerSpec("conv", 512, kernel=3, stride=2),
    LayerSpec("concat", sources=(-1, 10)),
    LayerSpec("c3", 1024, repeats=3),
)
"""Backbone and neck; the detection head follows as the last layer."""

DETECT_SOURCES: tuple[int, ...] = (17, 20, 23)
ANCHORS_KEY = f"model.{len(ARCHITECTURE)}.anchors"
_KEPT = frozenset(DETECT_SOURCES).union(*(spec.sources for spec in ARCHITECTURE)) - {-1}


def _build_layer(
    spec: LayerSpec, scaling: Scaling, c_in: Sequence[int], num_slots: int, shared_input: bool
) -> tuple[nn.Module, int]:
    """The module of one table row and the channels per slot that it gives; `c_in` per source."""
    c_out = scaling.channels(spec.channels)
    if spec.kind == "conv":
        geometry = (spec.kernel, spec.stride, spec.padding)
        return Conv(c_in[0], c_out, *geometry, num_slots=num_slots, shared_input=shared_input), c_out
    if spec.kind == "c3":
        repeats, shortcut = scaling.repeats(spec.repeats), spec.shortcut
        return C3(c_in[0], c_out, repeats, shortcut=shortcut, num_slots=num_slots, shared_input=shared_input), c_out
    if spec.kind == "sppf":
        return SPPF(c_in[0], c_out, spec.kernel, num_slots=num_slots, shared_input=shared_input), c_out
    return (Upsample(), c_in[0]) if spec.kind == "upsample" else (Concat(num_slots), sum(c_in))


def detect_prior(num_classes: int, stride: float) -> Tensor:
    """The prior that is added to the default bias of one anchor at initialisation.

    It expects 8 objects per 640-pixel image, and 0.6 of the classes' probability mass.

    Args:
        num_classes: C.
        stride: Pixels per cell of the level.

    Returns:
        [5+C] logits, float32: zeros for the box, then objectness, then the classes.
    """
    prior = torch.zeros(5 + num_classes)
    prior[4] = objectness_prior(stride)
    prior[5:] = class_prior(num_classes)
    return prior


class _SkipRandomDraws(TorchFunctionMode):
    """Leaves the weights of new layers as they lie in memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = kwargs or {}
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_):
            return arguments["tensor"] if "tensor" in arguments else args[0]
        return func(*args, **arguments)


class YOLOv5(nn.Module):
    """K YOLOv5 detectors of one size in one network (K=1 is the plain network).

    A new model has random weights from torch's global generator; `initial_state` gives weights from a seed, `stack`
    makes a model of given state dicts.

    Args:
        size: One of n, s, m, l, x.
        num_classes: C.
        num_slots: K.
        anchors: [L, A, 2] pixels, (width, height), shared by the slots; the defaults if None.
        trunk: First layers that exist once per cohort of slots and get no gradient; none if None.

    Attributes:
        size: As given.
        num_classes: C.
        num_slots: K.
        trunk: Which layers are shared, and who shares them.
        strides: [L] buffer, pixels per cell.
        anchors: [L, A, 2] buffer, grid units.
    """

    cohorts: Tensor

    def __init__(
        self,
        size: ModelSize,
        num_classes: int,
        num_slots: int = 1,
        anchors: Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or num_slots < 1:
            raise ValueError(f"num_classes={num_classes}, num_slots={num_slots}: both must be at least 1")
        self.size: ModelSize = size
        self.num_classes = num_classes
        self.num_slots = num_slots
        self.trunk = trunk or Trunk.none(num_slots)
        layers, channels = self._layers(SCALINGS[size])
        strides = torch.tensor(STRIDES, dtype=torch.float32)
        c_heads = [channels[source] for source in DETECT_SOURCES]
        grid = grid_anchors(anchors, strides)
        self.model = nn.ModuleList([*layers, Detect(c_heads, num_classes, grid, strides, num_slots=num_slots)])
        self.register_buffer("cohorts", torch.tensor(self.trunk.cohorts), persistent=False)
        self._add_prior()

    def _layers(self, scaling: Scaling) -> tuple[list[nn.Module], list[int]]:
        """Backbone and neck, and the channels per slot that each layer gives."""
        layers: list[nn.Module] = []
        channels: list[int] = []
        for index, spec in enumerate(ARCHITECTURE):
            copies = self.trunk.copies if index < self.trunk.layers else self.num_slots
            c_in = [channels[source] if channels else 3 for source in spec.sources]
            shared = index == 0 or (index == self.trunk.layers and self._takes_shared(index))
            layer, c_out = _build_layer(spec, scaling, c_in, copies, shared)
            layers.append(layer)
            channels.append(c_out)
        return layers, channels

    def _takes_shared(self, index: int) -> bool:
        """Whether the first layer behind the trunk reads its map as it is: one convolution for all slots."""
        return self.trunk.copies == 1 and ARCHITECTURE[index].kind in ("conv", "c3", "sppf")

    @property
    def head(self) -> Detect:
        """The last layer."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def anchors(self) -> Tensor:
        """[L, A, 2] grid units."""
        return self.head.anchors

    @property
    def strides(self) -> Tensor:
        """[L] pixels per cell."""
        return self.head.strides

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raw outputs of all slots for one batch of images.

        Args:
            images: [B, 3, H, W] floating point RGB in 0..1; H and W multiples of 32.

        Returns:
            Per level [K, B, A, H/stride, W/stride, 5+C] logits (tx, ty, tw, th, objectness, classes), the same in
            training and evaluation mode; views of the convolution's output, so of any strides.
        """
        kept: dict[int, Tensor] = {}
        x = images
        trained = torch.is_grad_enabled()
        for index, (spec, layer) in enumerate(zip(ARCHITECTURE, self.model, strict=False)):
            with torch.set_grad_enabled(trained and index >= self.trunk.layers):
                if spec.kind == "concat":
                    sources = [x if source == -1 else kept[source] for source in spec.sources]
                    origins = [index - 1 if source == -1 else source for source in spec.sources]
                    x = layer([self._spread(m, origin, index) for m, origin in zip(sources, origins, strict=True)])
                else:
                    x = layer(self._spread(x, index - 1, index))
            if index in _KEPT:
                kept[index] = x
        maps = [self._spread(kept[source], source, len(ARCHITECTURE)) for source in DETECT_SOURCES]
        raw: list[Tensor] = self.head(maps)
        return raw

    def _spread(self, x: Tensor, origin: int, index: int) -> Tensor:
        """What layer `index` reads of the map of layer `origin`: of the trunk each slot its cohort's."""
        trunk = self.trunk
        if not 0 <= origin < trunk.layers <= index or trunk.copies == self.num_slots:
            return x
        if index == trunk.layers and index < len(ARCHITECTURE) and self._takes_shared(index):
            return x
        return spread_slots(x, self.cohorts, trunk.copies)

    def per_slot(self, tensor: Tensor) -> Tensor:
        """View a stacked tensor behind the trunk (a parameter, its gradient, a statistic) as [K, ...shape of one slot].

        A counter, whose slot shape is [], becomes [K].
        """
        return _by_copy(tensor, self.num_slots)

    def copy_of(self, name: str, slot: int) -> int:
        """Which row of the official tensor with this name a slot uses: its cohort's in the trunk, else its own."""
        return self.trunk.cohorts[slot] if self.trunk.holds(name) else slot

    def official_tensors(self) -> dict[str, Tensor]:
        """Every tensor that belongs to a slot, under its official name and in official order.

        Parameters, running statistics and `num_batches_tracked`, each a detached [K, ...] view ([G, ...] in a trunk of
        G copies) that shares memory with the model: writing to it changes the model. The anchors, which the slots
        share, are not among them. Names equal those of `named_parameters()`, whose gradients `per_slot` views alike.
        The views are those of the tensors that the model holds now; `.to(...)` to another device or type replaces them.
        """
        trunk = self.trunk
        return {
            name: _by_copy(tensor.detach(), trunk.copies if trunk.holds(name) else self.num_slots)
            for name, tensor in self._stacked()
        }

    def unstack(self, slot: int) -> dict[str, Tensor]:
        """One slot as an official YOLOv5 state dict (names, order, shapes), cloned."""
        own = self.official_tensors()
        return {
            name: self._clone(tensor if name == ANCHORS_KEY else own[name][self.copy_of(name, slot)])
            for name, tensor in self.state_dict().items()
        }

    def load_slot(self, slot: int, state_dict: Mapping[str, Tensor]) -> None:
        """Write an official state dict into one slot, in place; into a trunk for all slots of its cohort.

        Args:
            slot: 0..K-1.
            state_dict: Every official name with its exact shape. The anchors may be left out; since the slots share
                them, they are taken over if K is 1 and must otherwise be the model's.

        Raises:
            WeightsError: if a name is missing or unknown, or a shape or the anchors differ.
        """
        own = self.official_tensors()
        self._check_fit(own, state_dict)
        self._load_anchors(state_dict)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor[self.copy_of(name, slot)].copy_(state_dict[name])

    @classmethod
    def stack(
        cls,
        size: ModelSize,
        num_classes: int,
        state_dicts: Sequence[Mapping[str, Tensor]],
        anchors: Tensor | None = None,
        trunk: Trunk | None = None,
    ) -> Self:
        """A model whose slots hold the given official state dicts.

        Args:
            size: Size of all of them.
            num_classes: C of all of them.
            state_dicts: One per slot; anchors, where they have any, must agree.
            anchors: [L, A, 2] pixels; those of the first state dict if None, else the defaults.
            trunk: First layers that exist once per cohort of slots, whose weights must agree; none if None.

        Returns:
            A model on the device of the first state dict, float64 if its weights are, else float32.

        Raises:
            WeightsError: if a state dict does not fit.
        """
        if not state_dicts:
            raise ValueError("stack needs at least one state dict")
        first = next(iter(state_dicts[0].values()), torch.empty(0))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        if anchors is None and ANCHORS_KEY in state_dicts[0]:
            anchors = state_dicts[0][ANCHORS_KEY].float().cpu() * torch.tensor(STRIDES).view(-1, 1, 1)
        model = cls._uninitialised(size, num_classes, len(state_dicts), anchors, trunk).to(first.device, dtype)
        for slot, state_dict in enumerate(state_dicts):
            model.load_slot(slot, state_dict)
        return model

    def select(self, slots: Sequence[int], trunk: Trunk | None = None) -> Self:
        """A new model that holds copies of these slots, in this order, on the same device and in the same mode.

        Args:
            slots: Which, at least one.
            trunk: Another division of the new slots into cohorts; that which they have if None.
        """
        if not slots:
            raise ValueError("select needs at least one slot")
        shared = trunk or self.trunk.select(slots)
        pixels = self.anchors * self.strides.view(-1, 1, 1)
        model = self._uninitialised(self.size, self.num_classes, len(slots), pixels, shared)
        model.to(self.anchors.device, self.anchors.dtype)
        weight = next(self.parameters())
        if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
            model.to(memory_format=torch.channels_last)
        model.anchors.copy_(self.anchors)
        own = self.official_tensors()
        with torch.no_grad():
            for name, tensor in model.official_tensors().items():
                users = [slots[slot] for slot in shared.first_slots] if shared.holds(name) else slots
                index = torch.tensor([self.copy_of(name, slot) for slot in users], device=weight.device)
                tensor.copy_(own[name].index_select(0, index))
        return model.train(self.training)

    @classmethod
    def _uninitialised(
        cls, size: ModelSize, num_classes: int, num_slots: int, anchors: Tensor | None, trunk: Trunk | None = None
    ) -> Self:
        """A float32 model on the CPU whose weights are about to be written: spares the random draws of a big stack."""
        with _SkipRandomDraws():
            return cls(size, num_classes, num_slots, anchors, trunk)

    @staticmethod
    def _clone(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    def _stacked(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that hold one part per slot, in official order."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            if name != ANCHORS_KEY:
                yield name, tensor

    @torch.no_grad()
    def _add_prior(self) -> None:
        """Add the detection prior to the head's default biases."""
        for conv, stride in zip(self.head.m, STRIDES, strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            prior = detect_prior(self.num_classes, stride).to(conv.bias)
            conv.bias.view(-1, len(prior)).add_(prior)

    def _check_fit(self, own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
        """Raise unless `state_dict` has exactly the names and shapes of one slot (the anchors apart)."""
        what = f"weights for yolov5{self.size} with {self.num_classes} classes"
        missing = [name for name in own if name not in state_dict]
        unknown = [name for name in state_dict if name not in own and name != ANCHORS_KEY]
        if missing or unknown:
            name, word = (missing[0], "is missing") if missing else (unknown[0], "is unknown")
            raise WeightsError(
                f"{what}: tensor '{name}' {word} ({len(missing)} missing, {len(unknown)} unknown; {len(own)} expected)"
            )
        for name, tensor in own.items():
            if state_dict[name].shape != tensor.shape[1:]:
                got, want = list(state_dict[name].shape), list(tensor.shape[1:])
                raise WeightsError(f"{what}: tensor '{name}' has shape {got}, must be {want}")

    def _load_anchors(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over the anchors of a state dict if this is a lone model, else insist that they are the shared ones."""
        if ANCHORS_KEY not in state_dict:
            return
        anchors = state_dict[ANCHORS_KEY].to(self.anchors)
        if anchors.shape != self.anchors.shape:
            got, want = list(anchors.shape), list(self.anchors.shape)
            raise WeightsError(f"tensor '{ANCHORS_KEY}' has shape {got}, must be {want}")
        if self.num_slots == 1:
            self.anchors.copy_(anchors)
        elif not torch.allclose(anchors, self.anchors, rtol=1e-3):  # half precision keeps 3 digits
            raise WeightsError(f"tensor '{ANCHORS_KEY}' differs from the anchors that the other slots use")


def _by_copy(tensor: Tensor, copies: int) -> Tensor:
    """View a stacked tensor as [copies, ...]."""
    counter = tensor.ndim == 1 and not tensor.is_floating_point()
    return tensor if counter else torch.unflatten(tensor, 0, (copies, -1))


def initial_state(size: ModelSize, num_classes: int, seed: int, anchors: Tensor | None = None) -> dict[str, Tensor]:
    """Fresh weights of one slot, a function of the arguments alone (torch's global generator is not used).

    Convolutions are uniform within +-1/sqrt(fan_in); the head's biases alike, plus `detect_prior`. BatchNorm is the
    identity with the running statistics that a probe with a zero image leaves: mean 0, variance 0.9, one batch.

    Args:
        size: Model size.
        num_classes: C. The weights before the head do not depend on it.
        seed: Any int that fits 64 bits.
        anchors: [L, A, 2] pixels; the defaults if None.

    Returns:
        An official state dict, float32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    model = YOLOv5._uninitialised(size, num_classes, 1, anchors)
    state = model.unstack(0)
    bound = 0.0
    for name, tensor in state.items():
        if tensor.ndim == 4:
            bound = 1 / math.sqrt(tensor[0].numel())
            tensor.uniform_(-bound, bound, generator=generator)
        elif name.startswith("model.24.m."):
            level = int(name.split(".")[3])
            tensor.uniform_(-bound, bound, generator=generator)  # the bound of its convolution, just before it
            tensor.view(-1, 5 + num_classes).add_(detect_prior(num_classes, STRIDES[level]))
        elif name != ANCHORS_KEY:
            tensor.fill_(_FRESH_NORM[name.rpartition(".")[2]])
    return state
