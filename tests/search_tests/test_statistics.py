"""Tests of the comparison of candidates with the base."""

import numpy as np
import pytest
from scipy import stats

from search.statistics import (
    ALPHA,
    Confirmation,
    compare,
    critical_value,
    detectable_gain,
    max_t_cdf,
    power,
    seeds_needed,
    spread,
)

REPETITIONS = 200
SEED_SD, NOISE = 0.012, 0.01


def planted(generator: np.random.Generator, gains: list[float], seeds: int) -> Confirmation:
    """One confirmation of a simulated objective: candidates with these true gains, seed effects and noise known."""
    effect = generator.normal(0, SEED_SD, seeds)
    values = [0.37 + gain + effect + generator.normal(0, NOISE, seeds) for gain in [0.0, *gains]]
    return compare(values[0], {f"trial {i}": row for i, row in enumerate(values[1:], start=1)})


# Dunnett (1955), table 1a: one-sided 5 % points of t for k treatments against a control.
@pytest.mark.parametrize(
    ("count", "freedom", "expected"), [(1, 10, 1.81), (2, 10, 2.15), (3, 12, 2.29), (4, 20, 2.30), (9, 60, 2.47)]
)
def test_critical_value_matches_dunnetts_table(count: int, freedom: int, expected: float) -> None:
    assert critical_value(count, freedom, 0.05) == pytest.approx(expected, abs=0.006)


def test_max_t_cdf_matches_scipys_multivariate_t() -> None:
    shape = np.full((3, 3), 0.5) + 0.5 * np.eye(3)
    expected = stats.multivariate_t.cdf([1.7] * 3, shape=shape, df=12, random_state=0, maxpts=500_000)
    assert max_t_cdf(1.7, 3, 12) == pytest.approx(expected, abs=1e-4)


def test_compare_with_one_candidate_is_the_paired_t_test() -> None:
    base, other = [0.344, 0.371, 0.351, 0.383, 0.369], [0.356, 0.379, 0.366, 0.381, 0.380]
    expected = stats.ttest_rel(other, base, alternative="greater")
    interval = stats.ttest_rel(other, base).confidence_interval(0.90)
    result = compare(base, {"a": other}, alpha=0.05)
    (comparison,) = result.comparisons
    assert comparison.p_value == pytest.approx(expected.pvalue, abs=2e-4)
    assert comparison.low == pytest.approx(interval.low, abs=2e-5)
    assert comparison.high == pytest.approx(interval.high, abs=2e-5)
    assert comparison.verdict == "better"
    assert result.winner == comparison


def test_compare_takes_the_seeds_effect_out_of_the_noise() -> None:
    base = [0.30, 0.40, 0.50]
    result = compare(base, {"a": [0.31, 0.42, 0.51], "b": [0.29, 0.40, 0.49]})
    # The residuals of the two-way table, in 1/900: (2, -4, 2), (-1, 2, -1), (-1, 2, -1); 4 degrees of freedom.
    assert result.noise == pytest.approx(np.sqrt(36 / 900**2 / 4))
    assert result.base.sd == pytest.approx(0.1)


def test_compare_with_a_candidate_below_the_base_says_worse() -> None:
    result = compare([0.30, 0.31, 0.32, 0.33], {"a": [0.20, 0.21, 0.23, 0.22], "b": [0.31, 0.31, 0.32, 0.32]})
    assert [comparison.verdict for comparison in result.comparisons] == ["worse", "no difference shown"]
    assert result.winner is None


def test_compare_without_noise_decides_by_the_sign() -> None:
    result = compare([0.25, 0.5], {"a": [0.375, 0.625], "b": [0.25, 0.5]})
    assert [(c.p_value, c.verdict) for c in result.comparisons] == [(0.0, "better"), (1.0, "no difference shown")]


@pytest.mark.parametrize(
    ("base", "candidates"), [([0.3, 0.4], {}), ([0.3], {"a": [0.4]}), ([0.3, 0.4], {"a": [0.4, 0.5, 0.6]})]
)
def test_compare_without_enough_runs_raises(base: list[float], candidates: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match=r"no candidate|no spread|inhomogeneous"):
        compare(base, candidates)


def test_spread_of_yolov5s_eight_reruns_is_what_was_measured() -> None:
    found = spread([0.371, 0.351, 0.344, 0.383, 0.369, 0.385, 0.368, 0.369])
    assert (round(found.mean, 4), round(found.sd, 4)) == (0.3675, 0.0141)


def test_compare_where_no_candidate_is_better_keeps_the_defaults() -> None:
    generator = np.random.default_rng(0)
    kept = sum(planted(generator, [0.0, 0.0, 0.0], 5).winner is None for _ in range(REPETITIONS))
    assert kept >= 0.95 * REPETITIONS


def test_compare_over_many_repetitions_errs_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    wrong = sum(planted(generator, [0.0, 0.0, 0.0], 5).winner is not None for _ in range(2000))
    assert wrong / 2000 == pytest.approx(ALPHA, abs=0.015)


def test_compare_finds_a_gain_of_three_standard_errors() -> None:
    generator, seeds = np.random.default_rng(2), 12
    gain = 3 * NOISE * np.sqrt(2 / seeds)
    found = sum(planted(generator, [gain], seeds).winner is not None for _ in range(REPETITIONS))
    assert found >= 0.8 * REPETITIONS


@pytest.mark.parametrize(("seeds", "errors"), [(5, 2.0), (5, 3.0), (10, 3.0)])
def test_power_agrees_with_what_three_candidates_show(seeds: int, errors: float) -> None:
    generator = np.random.default_rng(3)
    gain = errors * NOISE * np.sqrt(2 / seeds)
    results = [planted(generator, [gain, 0.0, 0.0], seeds) for _ in range(1500)]
    found = sum(result.comparisons[0].verdict == "better" for result in results) / 1500
    assert found == pytest.approx(power(gain, NOISE, seeds, 3), abs=0.05)


def test_detectable_gain_and_seeds_needed_are_each_others_inverse() -> None:
    gain = detectable_gain(0.014, seeds=5, candidates=3)
    assert power(gain, 0.014, 5, 3) == pytest.approx(0.8)
    assert seeds_needed(gain * 1.0001, 0.014, 3) == 5
    assert seeds_needed(gain / 2, 0.014, 3) > 15


def test_seeds_needed_for_a_hopeless_gain_is_none() -> None:
    assert seeds_needed(1e-6, 0.014, 3) is None
    with pytest.raises(ValueError, match="must be positive"):
        seeds_needed(0.0, 0.014, 3)
