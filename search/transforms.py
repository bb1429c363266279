"""Between what a sampler proposes and what a hyp file says.

Optuna and the tickets hold *search parameters*: hyp keys as they are, and those of the search alone (a switch, a scale,
ratios, a power). Everything that trains, shows or exports takes raw `Hyperparameters`. `hyperparameters` and
`search_params` are the only two ways between them, and inverses of each other. Formulas: docs/space.md.

- The base's parameters give the base back, bit by bit.
- Raw values of up to 12 significant digits, as people write them, come back bit by bit.
- Search parameters come back with a relative error of at most 1e-11.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.config import StudyConfig, conditional_keys
from search.data_facts import DataFacts
from search.errors import SearchError, StudyConfigError
from search.ranges import BOX_TO_OBJ, CLS_TO_OBJ, GAIN_SCALE, OWN_BASE, POWER_KEY, RATIO_KEYS
from search.settings import SpaceEntry
from yolocore.hyperparameters import HYPERPARAMETER_KEYS, PER_CLASS_KEY, RANGES, Hyperparameters
from yolocore.initial import class_factor, objectness_factor

DIGITS = 12
"""Significant digits of a raw value that was computed."""

AT_BOUND = 0.01
"""Share of a range, at either end, in which a value counts as being on the bound."""

SWITCH = ".switch"


class NotInSpaceError(SearchError):
    """Hyperparameters that no search parameters of a study give; the message says which key."""


def switch_name(key: str) -> str:
    """The search parameter that says whether `key` is on: below its entry's `off` it is not."""
    return f"{key}{SWITCH}"


def switch_value(entry: SpaceEntry, *, on: bool) -> float:
    """The one value in use of each side: its middle."""
    assert entry.off is not None
    return (1 + entry.off) / 2 if on else entry.off / 2


def is_off(config: StudyConfig, key: str, params: Mapping[str, float]) -> bool:
    """Whether a trial's switch says that `key` takes no part."""
    off = config.space[key].off
    return off is not None and params.get(switch_name(key), 1.0) < off


def active_keys(config: StudyConfig, params: Mapping[str, float]) -> tuple[str, ...]:
    """The search parameters that a trial has, given its switches, in the order of the study file."""
    keys: list[str] = []
    for key, entry in config.space.items():
        keys += [switch_name(key)] if entry.off is not None else []
        keys += [] if is_off(config, key, params) else [key]
    return tuple(keys)


# ---- search parameters to raw values ---------------------------------------------------------------------------------


def hyperparameters(config: StudyConfig, params: Mapping[str, float]) -> Hyperparameters:
    """The raw hyperparameters of a trial: the base with what its search parameters say in place.

    Args:
        config: the study, as its database has it where the space compensates or weighs classes.
        params: of the trial; keys that are missing are as in the base.

    Raises:
        HyperparameterError: a computed gain lies outside of what means anything.
    """
    base = config.base_hyperparameters()
    if not params or dict(params) == search_params(config, base):
        return base
    return base.replace(**_changes(config, base, params))


def raw_values(config: StudyConfig, params: Mapping[str, float]) -> dict[str, float]:
    """The values of `hyperparameters` as numbers, also those that no training accepts: for records of such a trial."""
    base = config.base_hyperparameters()
    if not params or dict(params) == search_params(config, base):
        return base.to_mapping()
    changes = _changes(config, base, params)
    return {**base.to_mapping(), **{key: changes[key] for key in changes if key in HYPERPARAMETER_KEYS}}


def _changes(config: StudyConfig, base: Hyperparameters, params: Mapping[str, float]) -> dict[str, Any]:
    """What a trial has otherwise than the base."""
    changes: dict[str, Any] = {key: float(value) for key, value in params.items() if key in HYPERPARAMETER_KEYS}
    changes.update({key: 0.0 for key in config.space if is_off(config, key, params)})
    changes.update(_gains(base, params))
    changes.update(_compensated(config, {**base.to_mapping(), **changes}))
    changes.update({key: _rounded(changes[key]) for key in _computed(config) if key in changes})
    if POWER_KEY in params:
        counts, mean = _facts(config).class_counts, changes.get("cls_pw", base.cls_pw)
        changes[PER_CLASS_KEY] = class_weights(counts, params[POWER_KEY], mean)
    return changes


def class_weights(counts: tuple[int, ...], power: float, mean: float) -> tuple[float, ...] | None:
    """A positive weight for each class, proportional to a power of its inverse frequency.

    Args:
        counts: labels of each class; a class without any counts as having one.
        power: 0 weighs all labels alike, 1 all classes.
        mean: of the weights, over the labels.

    Returns:
        None where they all are `mean`, which the scalar `cls_pw` says as well.
    """
    seen = [max(count, 1) for count in counts]
    raised = [(count / max(seen)) ** -power for count in seen]
    norm = mean * sum(seen) / sum(count * weight for count, weight in zip(seen, raised, strict=True))
    low, high = RANGES["cls_pw"]
    weights = tuple(min(max(_rounded(norm * weight), low), high) for weight in raised)
    return None if set(weights) == {weights[0]} else weights


def _gains(base: Hyperparameters, params: Mapping[str, float]) -> dict[str, float]:
    """box, obj and cls of a scale and ratios to `obj`, relative to the base."""
    if not set(params) & set(RATIO_KEYS):
        return {}
    scale = params.get(GAIN_SCALE, 1.0)
    ratios = {"obj": 1.0, **{RATIO_KEYS[key]: params[key] for key in (BOX_TO_OBJ, CLS_TO_OBJ) if key in params}}
    share = len(ratios) / sum(ratios.values())
    moved = RATIO_KEYS.values() if GAIN_SCALE in params else ratios
    return {gain: getattr(base, gain) * scale * (ratios[gain] * share if gain in ratios else 1.0) for gain in moved}


def _compensated(config: StudyConfig, values: Mapping[str, float]) -> dict[str, float]:
    """Obj and cls such that the initial losses are as large as they would be without the focal loss."""
    if not compensates(config):
        return {}
    obj, cls = _factors(config, values)
    return {"obj": values["obj"] * obj, "cls": values["cls"] * cls}


def _factors(config: StudyConfig, values: Mapping[str, float]) -> tuple[float, float]:
    gamma = values["fl_gamma"]
    if gamma == 0:
        return 1.0, 1.0
    facts = _facts(config)
    smoothing = config.train.label_smoothing
    return (
        objectness_factor(facts.levels, gamma, values["obj_pw"]),
        class_factor(len(facts.class_counts), gamma, values["cls_pw"], smoothing),
    )


def compensates(config: StudyConfig) -> bool:
    """Whether the space rescales gains with `fl_gamma`."""
    entry = config.space.get("fl_gamma")
    return entry is not None and entry.compensate


def _facts(config: StudyConfig) -> DataFacts:
    if config.facts is None:
        raise SearchError(f"study {config.name}: its space needs facts of the data, which are in its database only")
    return config.facts


def _computed(config: StudyConfig) -> tuple[str, ...]:
    """The gains that are not what a search parameter says, but computed."""
    computed = set(RATIO_KEYS.values()) if set(config.space) & set(RATIO_KEYS) else set()
    return tuple(computed | ({"obj", "cls"} if compensates(config) else set()))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


# ---- how far the computed gains reach --------------------------------------------------------------------------------


COMPENSATED_BY: Mapping[str, tuple[str, ...]] = {"cls": ("fl_gamma", "cls_pw"), "obj": ("fl_gamma", "obj_pw")}
"""The search keys that the factor of each compensated gain depends on."""


@dataclass(frozen=True, slots=True)
class Excess:
    """A computed gain that some trials of a space could not be trained with."""

    gain: str
    value: float
    """The farthest that it gets."""
    at: Mapping[str, float]
    """The search parameters there."""


def excess_gain(config: StudyConfig) -> Excess | None:
    """The computed gain that leaves its limits by the largest factor anywhere in the space; None where none does.

    Gains rise or fall with each search parameter whatever the others are, so that their extremes lie at the ends of the
    ranges: the larger gamma, the smaller the loss with it; and a ratio of losses is one of two linear functions of the
    positive weight.
    """
    base = config.base_hyperparameters()
    found, largest = None, 1.0
    for gain in sorted(_computed(config)):
        low, high = RANGES[gain]
        parts = (*RATIO_KEYS, gain, *(COMPENSATED_BY.get(gain, ()) if compensates(config) else ()))
        for at in _corners(config, parts):
            value = float(_changes(config, base, at).get(gain, getattr(base, gain)))
            factor = max(value / high, low / value)
            if factor > largest:
                found, largest = Excess(gain, value, at), factor
    return found


def _corners(config: StudyConfig, parts: Sequence[str]) -> Iterator[dict[str, float]]:
    """Every combination of the ends of these keys, as far as they are searched."""
    keys = [key for key in parts if key in config.space]
    for corner in itertools.product(*(_ends(config.space[key]) for key in keys)):
        yield dict(zip(keys, corner, strict=True))


GAMMA_STEP = 0.01
"""How finely `largest_gamma` looks."""


def largest_gamma(config: StudyConfig) -> float | None:
    """The highest end of `fl_gamma` with which no computed gain leaves its limits; None where none would do."""
    entry = config.space["fl_gamma"]
    if entry.low is None or entry.high is None:
        return max((one for one in entry.choices or () if _fits(config, entry, choices=(one,))), default=None)
    low, high = math.ceil(entry.low / GAMMA_STEP), math.floor(entry.high / GAMMA_STEP)
    if not _fits(config, entry, high=low * GAMMA_STEP):
        return None
    while low < high:  # gains grow with gamma
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _fits(config, entry, high=middle * GAMMA_STEP) else (low, middle - 1)
    return low * GAMMA_STEP


def _fits(config: StudyConfig, entry: SpaceEntry, **changes: Any) -> bool:
    space = {**config.space, "fl_gamma": entry.model_copy(update=changes)}
    return excess_gain(config.model_copy(update={"space": space})) is None


def _ends(entry: SpaceEntry) -> tuple[float, ...]:
    """The smallest and the largest value."""
    if entry.choices is not None:
        return (min(entry.choices), max(entry.choices))
    assert entry.low is not None
    assert entry.high is not None
    return (entry.low, entry.high)


# ---- raw values to search parameters ---------------------------------------------------------------------------------


def search_params(config: StudyConfig, hyp: Hyperparameters) -> dict[str, float]:
    """The search parameters that give `hyp`, as far as the study searches its keys; any may lie outside its range.

    Raises:
        NotInSpaceError: weights per class that are no power of the class frequencies.
    """
    values = hyp.to_mapping()
    if compensates(config):
        obj, cls = _factors(config, values)
        values.update(obj=values["obj"] / obj, cls=values["cls"] / cls)
    values.update(_ratios(config, values))
    if POWER_KEY in config.space:
        values[POWER_KEY] = _power(config, hyp)
    found: dict[str, float] = {}
    for key, entry in config.space.items():
        if entry.off is not None:
            found[switch_name(key)] = switch_value(entry, on=values[key] > 0)
        if entry.off is None or values[key] > 0:
            found[key] = values[key]
    return found


def _ratios(config: StudyConfig, values: Mapping[str, float]) -> dict[str, float]:
    searched = [key for key in RATIO_KEYS if key in config.space]
    if not searched:
        return {}
    base = config.base_hyperparameters()
    relative = {gain: values[gain] / getattr(base, gain) for gain in RATIO_KEYS.values()}
    part = [gain for key, gain in RATIO_KEYS.items() if gain == "obj" or key in searched]
    scale = sum(relative[gain] for gain in part) / len(part)
    ratios = {key: relative[gain] / relative["obj"] for key, gain in RATIO_KEYS.items()}
    return {**ratios, GAIN_SCALE: scale}


def _power(config: StudyConfig, hyp: Hyperparameters) -> float:
    weights = hyp.cls_pw_per_class
    if weights is None:
        return 0.0
    counts = _facts(config).class_counts
    if len(weights) != len(counts):
        raise NotInSpaceError(f"{PER_CLASS_KEY} has {len(weights)} numbers, the data {len(counts)} classes")
    seen = [max(count, 1) for count in counts]
    rare, common = seen.index(min(seen)), seen.index(max(seen))
    spread = math.log(seen[common] / seen[rare])
    power = math.log(weights[rare] / weights[common]) / spread if spread else 0.0
    again = class_weights(counts, power, hyp.cls_pw) or (hyp.cls_pw,) * len(counts)
    if any(not math.isclose(one, other, rel_tol=1e-3) for one, other in zip(weights, again, strict=True)):
        raise NotInSpaceError(f"{PER_CLASS_KEY} is no power of the class frequencies of this data with mean cls_pw")
    return power


def base_params(config: StudyConfig) -> dict[str, float]:
    """The search parameters of the base hyp: those of trial 0.

    Raises:
        StudyConfigError: a base value that the search could never propose; names value and range.
    """
    params = search_params(config, config.base_hyperparameters())
    for key, entry in config.space.items():
        if key in params and not entry.contains(params[key]):
            raise StudyConfigError(
                f"study {config.name}: space.{key}: the base value {params[key]:g} is not in {entry.describe()}; "
                "allowed: values that include the base, which is trial 0"
            )
    return params


# ---- what people read ------------------------------------------------------------------------------------------------


def moved_keys(config: StudyConfig) -> tuple[str, ...]:
    """The keys of a hyp file that the search moves."""
    moved: dict[str, None] = {}
    for key in config.space:
        if key == GAIN_SCALE:
            moved.update(dict.fromkeys(("box", "cls", "obj")))
        elif key in RATIO_KEYS:
            moved.update(dict.fromkeys((RATIO_KEYS[key], "obj")))
        else:
            moved[PER_CLASS_KEY if key == POWER_KEY else key] = None
    if compensates(config):
        moved.update(dict.fromkeys(("obj", "cls")))
    return tuple(moved)


def shown_params(config: StudyConfig, params: Mapping[str, float]) -> dict[str, float]:
    """Raw values of what a trial searched, for tables; weights per class as the power that they are made with."""
    is_plain = not conditional_keys(config) and not compensates(config) and not set(config.space) & set(OWN_BASE)
    if not params or is_plain:
        return dict(params)
    values = raw_values(config, params)
    raw = {key: float(values[key]) for key in moved_keys(config) if key in HYPERPARAMETER_KEYS}
    return raw | ({POWER_KEY: params[POWER_KEY]} if POWER_KEY in params else {})


def base_text(config: StudyConfig, key: str) -> str:
    """The base's value of a search key, as the plan shows it."""
    own = OWN_BASE.get(key)
    return f"{getattr(config.base_hyperparameters(), key) if own is None else own:g}"


def at_bounds(config: StudyConfig, params: Mapping[str, float]) -> tuple[str, ...]:
    """A line for every search parameter that lies at an end of its range beyond which better ones may be."""
    lines = []
    for key, entry in config.space.items():
        end = None if key not in params else _end(key, entry, params[key])
        if end is not None:
            lines.append(f"{key} {params[key]:.4g} is at the {end} end of its range, {entry.describe()}")
    return tuple(lines)


def _end(key: str, entry: SpaceEntry, value: float) -> str | None:
    if entry.low is None or entry.high is None:
        return None
    smallest, largest = RANGES.get(key, (0.0, math.inf))
    scale = math.log if entry.log else float
    low, high = scale(entry.low), scale(entry.high)
    place = (scale(value) - low) / (high - low)
    if place <= AT_BOUND and entry.low > smallest:
        return "lower"
    return "upper" if place >= 1 - AT_BOUND and entry.high < largest else None
