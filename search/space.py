"""The search space: from the study file to Optuna's distributions, and what a pack's trials must share."""

import itertools
import random
from collections.abc import Mapping

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from search.config import StudyConfig, shared_keys
from search.errors import StudyConfigError
from search.settings import LARGEST_PACK, SpaceEntry
from search.transforms import active_keys, base_params, hyperparameters, is_off, switch_name, switch_value

__all__ = ["base_params", "hyperparameters"]  # from search.transforms, for those who have Optuna at hand anyway


def distributions(config: StudyConfig) -> dict[str, BaseDistribution]:
    """The distribution of every search parameter, in the order of the study file; a switch stands before its key."""
    found: dict[str, BaseDistribution] = {}
    for key, entry in config.space.items():
        if entry.off is not None:
            found[switch_name(key)] = FloatDistribution(0.0, 1.0)
        found[key] = _distribution(entry)
    return found


def _distribution(entry: SpaceEntry) -> BaseDistribution:
    if entry.choices is not None:
        return CategoricalDistribution(entry.choices)
    assert entry.low is not None
    assert entry.high is not None
    return FloatDistribution(entry.low, entry.high, log=entry.log, step=entry.step)


def settled(config: StudyConfig, params: Mapping[str, float]) -> dict[str, float]:
    """Parameters as they are stored: each switch at the middle of its side, and no key that is switched off.

    A switch is drawn evenly from 0 to 1, so that it is off with the probability that the study gives. That all trials
    of a side share one value lets a sampler see two groups, and no slope between them.
    """
    found = {key: float(params[key]) for key in active_keys(config, params) if key in params}
    for key, entry in config.space.items():
        if switch_name(key) in found:
            found[switch_name(key)] = switch_value(entry, on=not is_off(config, key, params))
    return found


def complete_params(config: StudyConfig, fixed: Mapping[str, float]) -> dict[str, float]:
    """Fixed parameters of a ticket, completed by the base's values.

    Raises:
        StudyConfigError: a key that is not searched or a value outside its range.
    """
    allowed = distributions(config)
    for key, value in fixed.items():
        if key not in allowed:
            names = ", ".join(allowed)
            raise StudyConfigError(f"study {config.name}: fixed parameter {key}: not in the space; allowed: {names}")
        is_switch = key not in config.space
        if not (0 <= value <= 1 if is_switch else config.space[key].contains(value)):
            described = "0 to 1" if is_switch else config.space[key].describe()
            raise StudyConfigError(f"study {config.name}: fixed parameter {key}: got {value:g}; allowed: {described}")
    switches = {switch_name(key): float(value > 0) for key, value in fixed.items() if switch_name(key) in allowed}
    completed = settled(config, {**base_params(config), **switches, **fixed})
    for key in active_keys(config, completed):
        if key not in completed:
            found = "missing, although it is switched on"
            raise StudyConfigError(f"study {config.name}: fixed parameter {key}: {found}; allowed: {key} as well")
    return completed


def grid_points(config: StudyConfig) -> tuple[dict[str, float], ...]:
    """All combinations of a finite space: the base first, the others in an order that the sampler's seed shuffles.

    Ticket n of a grid study takes point n, so that no two workers need to agree on anything.
    """
    base = base_params(config)
    axes = [entry.grid() or () for entry in config.space.values()]
    points = [dict(zip(config.space, values, strict=True)) for values in itertools.product(*axes)]
    others = [point for point in points if any(abs(point[key] - base[key]) > 1e-9 for key in point)]
    random.Random(config.sampler.seed).shuffle(others)
    return (base, *others)


PackKey = tuple[float, ...]
"""Values of the searched keys that all slots of a pack share."""


def pack_key(config: StudyConfig, params: Mapping[str, float]) -> PackKey:
    """What must be equal in two trials for them to train in one pack; () in most studies, where everything may."""
    return tuple(0.0 if is_off(config, key, params) else float(params[key]) for key in shared_keys(config))


def packs_by_value(config: StudyConfig) -> bool:
    """Whether only trials that agree in some searched keys may share a pack."""
    return bool(shared_keys(config))


def pack_limit(config: StudyConfig) -> int:
    """How many trials may share a pack: one if no two trials will ever agree in the keys that a pack shares.

    With `pack: auto` each worker measures how many of these it takes.
    """
    endless = [key for key in shared_keys(config) if config.space[key].grid() is None]
    largest = LARGEST_PACK if config.train.pack == "auto" else config.train.pack
    return 1 if endless or config.train.image_weights else largest
