"""The search space: from the study file to Optuna's distributions, and from a trial's parameters to hyperparameters."""

import itertools
import random
from collections.abc import Mapping

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from search.config import StudyConfig, shared_keys
from search.errors import StudyConfigError
from search.settings import LARGEST_PACK, SpaceEntry
from yolocore.hyperparameters import Hyperparameters


def distributions(config: StudyConfig) -> dict[str, BaseDistribution]:
    """The distribution of every searched key, in the order of the study file."""
    return {key: _distribution(entry) for key, entry in config.space.items()}


def _distribution(entry: SpaceEntry) -> BaseDistribution:
    if entry.choices is not None:
        return CategoricalDistribution(entry.choices)
    assert entry.low is not None
    assert entry.high is not None
    return FloatDistribution(entry.low, entry.high, log=entry.log, step=entry.step)


def base_params(config: StudyConfig) -> dict[str, float]:
    """The base hyp's values of the searched keys: the parameters of trial 0.

    Raises:
        StudyConfigError: a base value that the search could never propose; names value and range.
    """
    base = config.base_hyperparameters().to_mapping()
    for key, entry in config.space.items():
        if not entry.contains(base[key]):
            raise StudyConfigError(
                f"study {config.name}: space.{key}: the base value {base[key]:g} is not in {entry.describe()}; "
                "allowed: values that include the base, which is trial 0"
            )
    return {key: base[key] for key in config.space}


def complete_params(config: StudyConfig, fixed: Mapping[str, float]) -> dict[str, float]:
    """Fixed parameters of a ticket, completed by the base's values.

    Raises:
        StudyConfigError: a key that is not searched or a value outside its range.
    """
    for key, value in fixed.items():
        entry = config.space.get(key)
        if entry is None:
            names = ", ".join(config.space)
            raise StudyConfigError(f"study {config.name}: fixed parameter {key}: not in the space; allowed: {names}")
        if not entry.contains(value):
            raise StudyConfigError(
                f"study {config.name}: fixed parameter {key}: got {value:g}; allowed: {entry.describe()}"
            )
    return {**base_params(config), **fixed}


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


def hyperparameters(config: StudyConfig, params: Mapping[str, float]) -> Hyperparameters:
    """The raw hyperparameters of a trial: the base with what its search parameters say in place."""
    return config.base_hyperparameters().replace(**{key: float(value) for key, value in params.items()})


PackKey = tuple[float, ...]
"""Values of the searched keys that all slots of a pack share."""


def pack_key(config: StudyConfig, params: Mapping[str, float]) -> PackKey:
    """What must be equal in two trials for them to train in one pack; () in most studies, where everything may."""
    return tuple(float(params[key]) for key in shared_keys(config))


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
