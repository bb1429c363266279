"""What a difference between hyperparameters is worth: paired seeds, pooled variance, many candidates against one base.

Base and candidates train together on each seed's image stream, so a seed that is easy for one is easy for all. The
model is a randomised block design: value = treatment + seed + noise, with the same noise variance everywhere.
Candidates are compared with the base by Dunnett's test, one-sided, at a level that holds for all of them together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

ALPHA = 0.04
"""Chance that at least one of the candidates is called better where none is.

What is promised is 5 %; the rest is room for what the model leaves out, since trainings' noise is not quite normal.
"""

POWER = 0.8
"""Chance of finding a real gain that `detectable_gain` and `seeds_needed` speak of."""

ROUNDING = 1e-12
"""Noise below this share of the values is rounding."""

MAX_SEEDS = 1000
"""More seeds than this are not worth computing."""

Verdict = Literal["better", "no difference shown", "worse"]


@dataclass(frozen=True, slots=True)
class Spread:
    """What reruns of the same hyperparameters gave."""

    values: tuple[float, ...]
    mean: float
    sd: float
    """Standard deviation of one run (n - 1 in the denominator)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One candidate against the base."""

    candidate: str
    gain: float
    """Mean of the paired differences, candidate minus base."""
    low: float
    """Lower end of the interval: with probability 1 - alpha all candidates' gains lie above theirs."""
    high: float
    """Upper end, likewise for below."""
    p_value: float
    """Of the hypothesis that the candidate is not better, corrected for the number of candidates."""
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Confirmation:
    """All candidates against the base on one metric."""

    seeds: int
    """Seeds on which base and all candidates have a value."""
    base: Spread
    noise: float
    """Standard deviation of one run with the seed's own effect taken out, pooled over base and candidates."""
    comparisons: tuple[Comparison, ...]
    confidence: float = 1 - ALPHA
    """With which each end of the intervals holds, for all candidates together."""

    @property
    def winner(self) -> Comparison | None:
        """The candidate with the largest gain among those called better."""
        better = [comparison for comparison in self.comparisons if comparison.verdict == "better"]
        return max(better, key=lambda comparison: comparison.gain, default=None)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of reruns.

    Raises:
        ValueError: Fewer than two values: they show no spread.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} run shows no spread, at least 2 are needed")
    return Spread(tuple(values), float(np.mean(values)), float(np.std(values, ddof=1)))


def sd_interval(found: Spread, confidence: float = 0.95) -> tuple[float, float]:
    """Between which values the true standard deviation lies; wide for few reruns (chi-squared interval)."""
    freedom = len(found.values) - 1
    tails = (1 + confidence) / 2, (1 - confidence) / 2
    low, high = (found.sd * float(np.sqrt(freedom / stats.chi2.ppf(tail, freedom))) for tail in tails)
    return low, high


def compare(base: Sequence[float], candidates: Mapping[str, Sequence[float]], alpha: float = ALPHA) -> Confirmation:
    """Compares candidates with the base over the same seeds (Dunnett 1955, in blocks).

    Args:
        base: The base's value on each seed.
        candidates: Values of each candidate on the same seeds, in the same order.
        alpha: Chance that any candidate is called better where none is; likewise for worse.

    Raises:
        ValueError: No candidate, fewer than two seeds, or lengths that differ.
    """
    if not candidates:
        raise ValueError("there is no candidate to compare")
    values = np.array([base, *candidates.values()], dtype=np.float64)  # [1 + k, n]; ragged rows raise ValueError
    groups, seeds = values.shape
    base_spread = spread(list(base))
    count, freedom = groups - 1, (groups - 1) * (seeds - 1)
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    noise = float(np.sqrt((residuals**2).sum() / freedom))
    if noise < ROUNDING * np.abs(values).max():
        noise = 0.0
    error = standard_error(noise, seeds)
    margin = critical_value(count, freedom, alpha) * error
    gains = values[1:].mean(axis=1) - values[0].mean()
    comparisons = tuple(
        _comparison(name, float(gain), margin, _p_value(float(gain), error, count, freedom))
        for name, gain in zip(candidates, gains, strict=True)
    )
    return Confirmation(seeds, base_spread, noise, comparisons, 1 - alpha)


def _comparison(name: str, gain: float, margin: float, p_value: float) -> Comparison:
    low, high = gain - margin, gain + margin
    verdict: Verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    return Comparison(name, gain, low, high, p_value, verdict)


def _p_value(gain: float, error: float, count: int, freedom: int) -> float:
    if error == 0:
        return 0.0 if gain > 0 else 1.0
    return min(1.0, max(0.0, 1.0 - max_t_cdf(gain / error, count, freedom)))


def standard_error(noise: float, seeds: int) -> float:
    """Standard error of a gain: the difference of two means of `seeds` runs each."""
    return float(noise * np.sqrt(2 / seeds))


def max_t_cdf(t: float, count: int, freedom: int) -> float:
    """Probability that the largest of Dunnett's statistics stays below `t` where no candidate differs.

    T_j = (X_j - X_0) / (sqrt(2) S): given X_0 = z and S = s the X_j are independent, so that the probability is the
    mean of Phi(z + sqrt(2) t s)^count over a normal z and s^2 ~ chi^2 / freedom. Both means are quadratures, which
    makes the result smooth and the same in every run, unlike a general multivariate t.
    """
    z, s, weight = _nodes(freedom)
    return float((special.ndtr(z[:, None] + np.sqrt(2) * t * s) ** count * weight).sum())


@lru_cache(maxsize=256)
def _nodes(freedom: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes z `[64]` and s `[96]`, and the weight of each pair `[64, 96]`."""
    z, z_weight = np.polynomial.hermite_e.hermegauss(64)
    quantile, s_weight = np.polynomial.legendre.leggauss(96)
    s = np.sqrt(stats.chi2.ppf((quantile + 1) / 2, freedom) / freedom)
    return z, s, np.outer(z_weight / z_weight.sum(), s_weight / 2)


@lru_cache(maxsize=4096)
def critical_value(count: int, freedom: int, alpha: float = ALPHA) -> float:
    """How many standard errors a gain must exceed among `count` candidates (one-sided Dunnett)."""
    return float(optimize.brentq(lambda t: max_t_cdf(t, count, freedom) - (1 - alpha), 0.0, 1000.0))


def power(gain: float, noise: float, seeds: int, candidates: int, alpha: float = ALPHA) -> float:
    """Chance that a candidate with this true gain is called better.

    Args:
        gain: True gain in the metric's unit.
        noise: Standard deviation of one run with the seed's effect taken out.
        seeds: Seeds per candidate, at least 2.
        candidates: How many are confirmed together.
        alpha: As in `compare`.
    """
    if noise == 0:
        return 1.0 if gain > 0 else 0.0
    freedom = candidates * (seeds - 1)
    shift = gain / standard_error(noise, seeds)
    return float(stats.nct.sf(critical_value(candidates, freedom, alpha), freedom, shift))


def detectable_gain(noise: float, seeds: int, candidates: int, chance: float = POWER) -> float:
    """The smallest true gain that is found with probability `chance`."""
    if noise == 0:
        return 0.0
    found = optimize.brentq(lambda shift: power(shift, 1.0, seeds, candidates) - chance, 0.0, 100.0)
    return float(found * noise)


def seeds_needed(gain: float, noise: float, candidates: int, chance: float = POWER) -> int | None:
    """The fewest seeds with which a true gain is found with probability `chance`; None if `MAX_SEEDS` do not do.

    Raises:
        ValueError: The gain is not positive: no number of seeds would find it.
    """
    if gain <= 0:
        raise ValueError(f"a gain of {gain:g} cannot be found, it must be positive")
    low, high = 2, MAX_SEEDS
    if power(gain, noise, high, candidates) < chance:
        return None
    while low < high:  # power grows with the seeds
        middle = (low + high) // 2
        low, high = (low, middle) if power(gain, noise, middle, candidates) >= chance else (middle + 1, high)
    return low
