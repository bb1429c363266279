"""Every key of a YOLOv5 hyp file, in raw units, as a person writes them: read, checked, frozen, written back."""

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from yolocore.errors import HyperparameterError

LOSS_WEIGHT_KEYS = ("box", "cls", "obj", "cls_pw", "obj_pw", "fl_gamma")
"""The keys that act in the loss alone: they may differ between the slots of a pack."""

SHARED_KEYS = frozenset(
    {
        "anchor_t",
        "hsv_h",
        "hsv_s",
        "hsv_v",
        "degrees",
        "translate",
        "scale",
        "shear",
        "perspective",
        "flipud",
        "fliplr",
        "mosaic",
        "mixup",
        "copy_paste",
    }
)
"""The keys that shape the images or the assignment, which all slots of a pack share."""

IGNORED_KEYS = frozenset({"iou_t"})
"""Keys kept because hyp files have them; nothing reads their value."""

PER_CLASS_KEY = "cls_pw_per_class"
"""A key of our own, which plain YOLOv5 ignores: a `cls_pw` for each class, in the order of the class indices."""

RANGES: Mapping[str, tuple[float, float]] = {
    "lr0": (1e-9, 10.0),
    "lrf": (0.0, 1.0),
    "momentum": (0.0, 0.9999),
    "weight_decay": (0.0, 1.0),
    "warmup_epochs": (0.0, 1000.0),
    "warmup_momentum": (0.0, 0.9999),
    "warmup_bias_lr": (0.0, 10.0),
    "box": (1e-6, 1000.0),
    "cls": (1e-6, 1000.0),
    "cls_pw": (1e-6, 1000.0),
    "obj": (1e-6, 1000.0),
    "obj_pw": (1e-6, 1000.0),
    "iou_t": (0.0, 1.0),
    "anchor_t": (1.01, 1000.0),
    "fl_gamma": (0.0, 10.0),
    "hsv_h": (0.0, 1.0),
    "hsv_s": (0.0, 1.0),
    "hsv_v": (0.0, 1.0),
    "degrees": (0.0, 180.0),
    "translate": (0.0, 1.0),
    "scale": (0.0, 0.99),
    "shear": (0.0, 89.0),
    "perspective": (0.0, 0.01),
    "flipud": (0.0, 1.0),
    "fliplr": (0.0, 1.0),
    "mosaic": (0.0, 1.0),
    "mixup": (0.0, 1.0),
    "copy_paste": (0.0, 1.0),
}
"""Inclusive limits of what means anything at all; a search space is usually much narrower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """The 28 hyp keys of YOLOv5 in raw units; the defaults are the preset for training from scratch ("low").

    Nothing here is ever rescaled: the gains that the loss multiplies with come from
    `yolocore.loss.LossWeights.from_hyperparameters`. Integers are stored as floats.

    Raises:
        HyperparameterError: a value that is no finite number or lies outside `RANGES`.
    """

    lr0: float = 0.01
    """Base learning rate."""
    lrf: float = 0.01
    """Last learning rate as a fraction of `lr0`."""
    momentum: float = 0.937
    """SGD momentum, or the first beta of Adam and AdamW."""
    weight_decay: float = 0.0005
    """Decay of the convolution weights, for a nominal batch of 64."""
    warmup_epochs: float = 3.0
    """Length of the warm-up; never shorter than 100 iterations."""
    warmup_momentum: float = 0.8
    """Momentum at iteration 0."""
    warmup_bias_lr: float = 0.1
    """Learning rate of the biases at iteration 0."""
    box: float = 0.05
    """Gain of the box loss."""
    cls: float = 0.5
    """Gain of the class loss, for 80 classes."""
    cls_pw: float = 1.0
    """Weight of the positives in the class loss."""
    obj: float = 1.0
    """Gain of the objectness loss, for 640-pixel images."""
    obj_pw: float = 1.0
    """Weight of the positives in the objectness loss."""
    iou_t: float = 0.2
    """Read by nothing; hyp files have it."""
    anchor_t: float = 4.0
    """Largest side ratio between an object and an anchor that matches it."""
    fl_gamma: float = 0.0
    """Exponent of the focal loss; 0 is off."""
    hsv_h: float = 0.015
    """Hue shift, fraction."""
    hsv_s: float = 0.7
    """Saturation change, fraction."""
    hsv_v: float = 0.4
    """Brightness change, fraction."""
    degrees: float = 0.0
    """Largest rotation, degrees."""
    translate: float = 0.1
    """Largest shift, fraction of the image."""
    scale: float = 0.5
    """Largest change of size, fraction."""
    shear: float = 0.0
    """Largest shear, degrees."""
    perspective: float = 0.0
    """Largest perspective coefficient, per pixel."""
    flipud: float = 0.0
    """Probability of an up-down flip."""
    fliplr: float = 0.5
    """Probability of a left-right flip."""
    mosaic: float = 1.0
    """Probability of a mosaic of four images."""
    mixup: float = 0.0
    """Probability of mixing two mosaics."""
    copy_paste: float = 0.0
    """Fraction of the polygon objects that are pasted mirrored."""
    cls_pw_per_class: tuple[float, ...] | None = None
    """Where set, takes the place of `cls_pw`: one weight for each class. No key of YOLOv5's."""

    def __post_init__(self) -> None:
        for key in HYPERPARAMETER_KEYS:
            object.__setattr__(self, key, _checked("hyperparameters", key, getattr(self, key)))
        object.__setattr__(self, PER_CLASS_KEY, _checked_classes("hyperparameters", self.cls_pw_per_class))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str) -> "Hyperparameters":
        """Check and freeze a mapping of hyp keys.

        Args:
            mapping: hyp key to number. Missing keys take the defaults; `anchors` is dropped, because with it training
                would throw the model's anchors away. `cls_pw_per_class` holds a list of numbers.
            source: what to call the mapping in an error, usually the file's path.

        Raises:
            HyperparameterError: an unknown key (names the closest one), or a value that is no number or out of range.
        """
        values = {key: value for key, value in mapping.items() if key not in ("anchors", PER_CLASS_KEY)}
        for key in values:
            if key not in HYPERPARAMETER_KEYS:
                raise HyperparameterError(f"{source}: {key!r} is not a hyp key; {_hint(key)}")
        per_class = _checked_classes(source, mapping.get(PER_CLASS_KEY))
        return cls(**{key: _checked(source, key, value) for key, value in values.items()}, cls_pw_per_class=per_class)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Hyperparameters":
        """Read a hyp file.

        Raises:
            HyperparameterError: the file is missing or is no YAML mapping of hyp keys to numbers; names file and key.
        """
        return cls.from_mapping(_read_yaml(Path(path)), str(path))

    def to_mapping(self) -> dict[str, float]:
        """Every key of YOLOv5 and its value, in the order of a hyp file."""
        return {key: getattr(self, key) for key in HYPERPARAMETER_KEYS}

    def to_document(self) -> dict[str, Any]:
        """What a hyp file holds: `to_mapping`, and our own key where it is set. The inverse of `from_mapping`."""
        own = {} if self.cls_pw_per_class is None else {PER_CLASS_KEY: list(self.cls_pw_per_class)}
        return {**self.to_mapping(), **own}

    def to_yaml(self, header_lines: Sequence[str] = ()) -> str:
        """The text of a hyp file with every key; reading it gives exactly these values.

        Args:
            header_lines: comment lines to put first, without the `#`.
        """
        comments = [f"# {line}".rstrip() for text in header_lines for line in (text.splitlines() or [""])]
        body = yaml.safe_dump(self.to_mapping(), sort_keys=False, default_flow_style=False)
        if self.cls_pw_per_class is not None:
            body += yaml.safe_dump({PER_CLASS_KEY: list(self.cls_pw_per_class)}, default_flow_style=None, width=10**6)
        return "".join(f"{line}\n" for line in comments) + body

    def replace(self, **changes: Any) -> "Hyperparameters":
        """A copy with some keys changed.

        Raises:
            HyperparameterError: an unknown key or an impossible value.
        """
        return Hyperparameters.from_mapping({**self.to_document(), **changes}, "hyperparameters")


HYPERPARAMETER_KEYS: tuple[str, ...] = tuple(
    field.name for field in dataclasses.fields(Hyperparameters) if field.name != PER_CLASS_KEY
)
"""All keys of YOLOv5, in the order of a hyp file."""


def _checked_classes(source: str, value: object) -> tuple[float, ...] | None:
    """Weights per class as floats, or an error that names the first bad one."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value:
        raise HyperparameterError(f"{source}: {PER_CLASS_KEY} is {value!r}; allowed is a list of numbers, one a class")
    low, high = RANGES["cls_pw"]
    return tuple(_number_in(source, f"{PER_CLASS_KEY}[{index}]", item, low, high) for index, item in enumerate(value))


def _checked(source: str, key: str, value: object) -> float:
    """`value` as a float, or an error that names source, key, value and what is allowed."""
    return _number_in(source, key, value, *RANGES[key])


def _number_in(source: str, key: str, value: object, low: float, high: float) -> float:
    allowed = f"allowed is a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise HyperparameterError(f"{source}: {key} is {value!r}; {allowed}{_exponent_hint(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number <= high:  # also catches NaN
        raise HyperparameterError(f"{source}: {key} is {number!r}; {allowed}")
    return number


def _exponent_hint(value: object) -> str:
    """YAML 1.1 reads `1e-3` as text, which surprises everybody once."""
    if not isinstance(value, str) or "e" not in value.lower():
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    return f" (YAML reads {value} as text: write {yaml.safe_dump(number).split()[0]})" if math.isfinite(number) else ""


def _hint(key: object) -> str:
    if key == "label_smoothing":
        return "label smoothing is a training option, not a key of a hyp file"
    close = difflib.get_close_matches(str(key), HYPERPARAMETER_KEYS, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(HYPERPARAMETER_KEYS)}"


def _read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; a key that stands twice is an error, because only one of its values could count."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        mapping = yaml.safe_load(text)
    except OSError as error:
        raise HyperparameterError(f"{path}: cannot read this hyp file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HyperparameterError(f"{path}: not a text file in UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        raise HyperparameterError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(mapping, dict) or not isinstance(node, yaml.MappingNode):
        raise HyperparameterError(f"{path}: holds {_kind(mapping)}; allowed is a mapping such as 'box: 0.05'")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        first = lines.setdefault(str(key.value), line)
        if first != line:
            raise HyperparameterError(f"{path}: key {key.value!r} stands twice, in lines {first} and {line}")
    return mapping


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
