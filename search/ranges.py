"""What the short forms of a study's `space` stand for: default ranges, and the keys of the two parametrisations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search.settings import SpaceEntry
from yolocore.hyperparameters import LOSS_WEIGHT_KEYS, RANGES, Hyperparameters

GAIN_SCALE, BOX_TO_OBJ, CLS_TO_OBJ = "gain_scale", "box_to_obj", "cls_to_obj"
RATIO_KEYS: Mapping[str, str] = {GAIN_SCALE: "obj", BOX_TO_OBJ: "box", CLS_TO_OBJ: "cls"}
"""The search keys of `parametrisation: ratios`, and the gain that each stands in for."""

POWER_KEY = "cls_pw_power"
"""Search key: the power of the inverse class frequency in `cls_pw_per_class`."""

OWN_KEYS: Mapping[str, str] = {
    POWER_KEY: "Weights per class: the power of the inverse class frequency; 0 weighs all labels alike, 1 all classes.",
    GAIN_SCALE: "With parametrisation ratios: factor of all three gains.",
    BOX_TO_OBJ: "With parametrisation ratios: the box gain against the objectness gain, relative to the base.",
    CLS_TO_OBJ: "With parametrisation ratios: the class gain against the objectness gain, relative to the base.",
}
"""The search keys that are no hyp keys, and what each means."""

OWN_BASE: Mapping[str, float] = {GAIN_SCALE: 1.0, BOX_TO_OBJ: 1.0, CLS_TO_OBJ: 1.0, POWER_KEY: 0.0}
"""What the base hyp is in the search keys that are no hyp keys, whatever its values."""

DEFAULT, PER_CLASS = "default", "per_class"


def _log(low: float, high: float) -> dict[str, Any]:
    return {"low": low, "high": high, "log": True}


def _linear(low: float, high: float) -> dict[str, Any]:
    return {"low": low, "high": high}


DEFAULT_RANGES: Mapping[str, Mapping[str, Any]] = {
    "box": _log(0.01, 0.3),
    "cls": _log(0.05, 5.0),
    "obj": _log(0.1, 5.0),
    "cls_pw": _log(0.25, 5.0),
    "obj_pw": _log(0.25, 5.0),
    "fl_gamma": {"low": 0.3, "high": 2.0, "off": 0.5},
    POWER_KEY: _linear(0.0, 1.0),
    GAIN_SCALE: _log(0.25, 4.0),
    BOX_TO_OBJ: _log(0.125, 8.0),
    CLS_TO_OBJ: _log(0.125, 8.0),
    "lr0": _log(0.0005, 0.05),
    "lrf": _log(0.005, 1.0),
    "momentum": _linear(0.6, 0.98),
    "weight_decay": _linear(0.0, 0.001),
    "warmup_epochs": _linear(0.0, 5.0),
    "warmup_momentum": _linear(0.0, 0.95),
    "warmup_bias_lr": _linear(0.0, 0.2),
    "anchor_t": _linear(2.0, 8.0),
    "hsv_h": _linear(0.0, 0.1),
    "hsv_s": _linear(0.0, 0.9),
    "hsv_v": _linear(0.0, 0.9),
    "degrees": _linear(0.0, 45.0),
    "translate": _linear(0.0, 0.9),
    "scale": _linear(0.0, 0.9),
    "shear": _linear(0.0, 10.0),
    "perspective": _linear(0.0, 0.001),
    "flipud": _linear(0.0, 1.0),
    "fliplr": _linear(0.0, 1.0),
    "mosaic": _linear(0.0, 1.0),
    "mixup": _linear(0.0, 1.0),
    "copy_paste": _linear(0.0, 1.0),
}
"""Ranges of the keys that a study names without one: the presets of YOLOv5, fine-tuning ones too, lie well inside."""


def default_space() -> dict[str, SpaceEntry]:
    """The six loss weights with their default ranges."""
    return {key: SpaceEntry(**DEFAULT_RANGES[key]) for key in LOSS_WEIGHT_KEYS}


def expanded_space(space: object, parametrisation: object) -> tuple[object, frozenset[str]]:
    """The `space` section with its short forms written out.

    Args:
        space: what the study file holds: nothing (all six loss weights), a list of keys, or a mapping in which
            `default` (or nothing) stands for the default range, and `per_class` at `cls_pw` for a power.
        parametrisation: with `ratios`, gains without a range of their own become a scale and ratios.

    Returns:
        The long form, and the keys whose range nobody chose. What has none of these forms is left for the checks.
    """
    entries = _entries(space)
    if entries is None:
        return space, frozenset()
    if entries.get("cls_pw") == PER_CLASS:
        entries = _renamed(entries, {"cls_pw": POWER_KEY})
    if parametrisation == "ratios":
        entries = _renamed(entries, _ratios(entries))
    left_open = frozenset(key for key, value in entries.items() if value == DEFAULT and key in DEFAULT_RANGES)
    return {key: dict(DEFAULT_RANGES[key]) if key in left_open else value for key, value in entries.items()}, left_open


def _entries(space: object) -> dict[str, Any] | None:
    if space is None:
        return dict.fromkeys(LOSS_WEIGHT_KEYS, DEFAULT)
    if isinstance(space, list) and all(isinstance(key, str) for key in space):
        return dict.fromkeys(space, DEFAULT)
    if not isinstance(space, dict):
        return None
    return {key: DEFAULT if value is None else value for key, value in space.items()}


def _ratios(entries: Mapping[str, Any]) -> dict[str, str]:
    """New names of the gains that were named without a range; nothing where `obj`, to which they relate, is missing."""
    named = {gain: key for key, gain in RATIO_KEYS.items() if entries.get(gain) == DEFAULT}
    return named if "obj" in named else {}


def _renamed(entries: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same entries in the same order; those that get another name get its default range."""
    return {names.get(key, key): DEFAULT if key in names else value for key, value in entries.items()}


def widened(space: Mapping[str, SpaceEntry], left_open: frozenset[str], base: Hyperparameters) -> dict[str, SpaceEntry]:
    """Default ranges stretched to have the base inside, since it is trial 0; those that somebody chose stay."""
    values = base.to_mapping()
    return {
        key: _stretched(key, entry, values[key]) if key in left_open and key in values else entry
        for key, entry in space.items()
    }


def _stretched(key: str, entry: SpaceEntry, value: float) -> SpaceEntry:
    if entry.contains(value) or entry.low is None or entry.high is None:
        return entry
    smallest, largest = RANGES[key]
    room = 2.0 if entry.log else 1.0
    low, high = min(entry.low, value / room), max(entry.high, value * room)
    if entry.log and low <= 0:
        return entry
    return entry.model_copy(update={"low": max(low, smallest), "high": min(high, largest)})
