"""Between search parameters and raw hyperparameters: exact where it claims to be."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.config import StudyConfig, parse_study
from search.data_facts import PREPARED_KEY, DataFacts
from search.errors import SearchError
from search.prepared import Prepared
from search.space import distributions, settled
from search.transforms import (
    NotInSpaceError,
    at_bounds,
    base_params,
    class_weights,
    excess_gain,
    hyperparameters,
    largest_gamma,
    moved_keys,
    raw_values,
    search_params,
    shown_params,
)
from yolocore.errors import HyperparameterError
from yolocore.hyperparameters import Hyperparameters
from yolocore.initial import InitialLevel, class_factor, objectness_factor

FACTS = DataFacts(
    class_counts=(120, 30, 7),
    levels=(
        InitialLevel(-6.7, 768, ((4.5, 0.31), (1.25, 0.62))),
        InitialLevel(-5.3, 192, ((3.0, 0.4),)),
        InitialLevel(-3.9, 48, ()),
    ),
)
FOCAL = {"low": 0.3, "high": 2.0, "off": 0.5}
SPACES: dict[str, dict[str, Any]] = {
    "raw": {"space": ["box", "cls", "obj", "lr0"]},
    "off": {"space": {"fl_gamma": FOCAL, "obj": "default", "mixup": {"low": 0.05, "high": 0.5, "off": 0.3}}},
    "compensate": {"space": dict.fromkeys(["obj_pw", "obj", "cls"]) | {"fl_gamma": {**FOCAL, "compensate": True}}},
    "ratios": {"space": ["box", "cls", "obj", "obj_pw"], "parametrisation": "ratios"},
    "two": {"space": ["obj", "box"], "parametrisation": "ratios"},
    "shares alone": {"space": {"box_to_obj": "default", "cls_to_obj": "default"}, "parametrisation": "ratios"},
    "scale alone": {"space": {"gain_scale": "default"}, "parametrisation": "ratios"},
    "power": {"space": {"cls_pw": "per_class", "box": "default"}},
    "all": {
        "space": {
            "box": "default",
            "cls": "default",
            "obj": "default",
            "cls_pw": "per_class",
            "obj_pw": "default",
            "fl_gamma": {**FOCAL, "compensate": True},
        },
        "parametrisation": "ratios",
    },
}
AWKWARD = {"box": 0.1 + 0.2, "cls": 1 / 3, "obj": math.pi / 4, "obj_pw": math.sqrt(2)}


def study(name: str, **changes: Any) -> StudyConfig:
    data = {"name": "s", "data": "builtin:digits", "trials": 2, **SPACES[name], **changes}
    frozen = Prepared(facts=FACTS).added_to(parse_study(data, source="study.yaml").to_json())
    return StudyConfig.from_json(frozen)


def drawn(config: StudyConfig) -> st.SearchStrategy[dict[str, float]]:
    """Search parameters as a sampler may propose them."""
    floats = {key: st.floats(entry.low, entry.high) for key, entry in distributions(config).items()}  # type: ignore[attr-defined]
    return st.fixed_dictionaries(floats).map(lambda params: settled(config, params))


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("base", [{}, AWKWARD])
def test_hyperparameters_of_the_bases_parameters_is_the_base_bit_by_bit(name: str, base: dict[str, float]) -> None:
    config = study(name, base_hyp=base)

    assert hyperparameters(config, base_params(config)) == config.base_hyperparameters()
    assert hyperparameters(config, {}) == config.base_hyperparameters()


@pytest.mark.parametrize("name", SPACES)
def test_search_params_is_the_inverse_of_hyperparameters(name: str) -> None:
    config = study(name)

    @settings(max_examples=60, deadline=None)
    @given(drawn(config))
    def check(params: dict[str, float]) -> None:
        again = search_params(config, hyperparameters(config, params))
        assert again.keys() == params.keys()
        # A power is found again from weights of 12 digits, whose logarithms are small where it is.
        assert again == pytest.approx(params, rel=1e-10, abs=1e-9 if name in ("power", "all") else 0)

    check()


@pytest.mark.parametrize("name", ["raw", "off", "compensate", "ratios"])
def test_hyperparameters_of_search_params_gives_written_values_back_bit_by_bit(name: str) -> None:
    config = study(name)
    written = st.integers(1, 10**10 - 1).map(lambda digits: float(f"{digits}e-9"))
    keys = st.fixed_dictionaries({key: written for key in moved_keys(config) if key not in ("fl_gamma", "mixup")})

    @settings(max_examples=60, deadline=None)
    @given(keys, st.sampled_from([0.0, 0.3, 1.2345678, 2.0]))
    def check(values: dict[str, float], gamma: float) -> None:
        focal = {"fl_gamma": gamma} if "fl_gamma" in config.space else {}
        mixup = {"mixup": gamma / 10} if "mixup" in config.space else {}
        usual = {key: max(value, 1e-3) for key, value in values.items() if key != "lr0"}
        hyp = config.base_hyperparameters().replace(**usual, **focal, **mixup)
        assert hyperparameters(config, search_params(config, hyp)) == hyp

    check()


def test_hyperparameters_switched_off_is_zero_and_on_is_the_value() -> None:
    config = study("off")

    off = hyperparameters(config, {"fl_gamma.switch": 0.25, "obj": 2.0, "mixup.switch": 0.65, "mixup": 0.2})

    assert (off.fl_gamma, off.obj, off.mixup) == (0.0, 2.0, 0.2)
    assert hyperparameters(config, {"fl_gamma.switch": 0.75, "fl_gamma": 1.5, "obj": 2.0}).fl_gamma == 1.5


def test_hyperparameters_compensates_with_the_factors_of_the_initial_loss() -> None:
    space = {key: entry for key, entry in SPACES["compensate"]["space"].items() if key != "cls"}
    config = study("compensate", space=space, train={"label_smoothing": 0.1}, base_hyp={"cls": 0.4, "cls_pw": 2.0})

    hyp = hyperparameters(config, {"fl_gamma.switch": 0.75, "fl_gamma": 1.5, "obj_pw": 3.0, "obj": 0.5})

    assert hyp.obj == pytest.approx(0.5 * objectness_factor(FACTS.levels, 1.5, 3.0), rel=1e-11)
    assert hyp.cls == pytest.approx(0.4 * class_factor(3, 1.5, 2.0, 0.1), rel=1e-11)
    assert moved_keys(config) == ("obj_pw", "obj", "fl_gamma", "cls")


def test_hyperparameters_of_ratios_keeps_the_sum_and_shares_it() -> None:
    config = study("ratios", base_hyp={"box": 0.05, "cls": 0.3, "obj": 0.7})

    hyp = hyperparameters(config, {"gain_scale": 2.0, "box_to_obj": 3.0, "cls_to_obj": 0.5, "obj_pw": 1.0})

    relative = (hyp.box / 0.05, hyp.obj / 0.7, hyp.cls / 0.3)
    assert sum(relative) == pytest.approx(3 * 2.0)
    assert relative[0] == pytest.approx(3 * relative[1])
    assert relative[2] == pytest.approx(0.5 * relative[1])
    assert moved_keys(config) == ("box", "obj", "cls", "obj_pw")


def test_hyperparameters_of_a_scale_moves_all_three_gains_alike() -> None:
    hyp = hyperparameters(study("scale alone"), {"gain_scale": 0.5})

    assert (hyp.box, hyp.cls, hyp.obj, hyp.obj_pw) == (0.025, 0.25, 0.5, 1.0)
    two = hyperparameters(study("two"), {"gain_scale": 0.5, "box_to_obj": 1.0})
    assert (two.box, two.cls, two.obj) == (0.025, 0.25, 0.5)


@given(st.lists(st.integers(50, 5000), min_size=2, max_size=20), st.floats(0, 1), st.floats(0.25, 5))
def test_class_weights_have_the_mean_and_the_power(counts: list[int], power: float, mean: float) -> None:
    weights = class_weights(tuple(counts), power, mean) or (mean,) * len(counts)

    assert sum(n * w for n, w in zip(counts, weights, strict=True)) / sum(counts) == pytest.approx(mean)
    for count, weight in zip(counts, weights, strict=True):
        assert weight / weights[0] == pytest.approx((counts[0] / count) ** power)


def test_class_weights_that_are_all_alike_are_the_scalar() -> None:
    config = study("power")

    assert class_weights((5, 70), 0.0, 1.5) is None
    assert class_weights((8, 8, 8), 0.7, 1.5) is None
    assert class_weights((0, 40), 1.0, 1.0) == class_weights((1, 40), 1.0, 1.0) == (20.5, 0.5125)
    assert class_weights((1, 100_000), 1.0, 1.0) == (1000.0, 0.500005)
    assert hyperparameters(config, {"cls_pw_power": 0.0, "box": 0.1}).cls_pw_per_class is None
    weighed = hyperparameters(config, {"cls_pw_power": 1.0, "box": 0.1})
    assert weighed.cls_pw_per_class == pytest.approx([157 / 3 / 120, 157 / 3 / 30, 157 / 3 / 7])
    assert weighed.cls_pw == 1.0


def test_search_params_of_foreign_class_weights_are_refused() -> None:
    config = study("power")

    with pytest.raises(NotInSpaceError, match="cls_pw_per_class has 2 numbers, the data 3 classes"):
        search_params(config, Hyperparameters(cls_pw_per_class=(1.0, 2.0)))
    with pytest.raises(NotInSpaceError, match="is no power of the class frequencies"):
        search_params(config, Hyperparameters(cls_pw_per_class=(1.0, 3.0, 2.0)))


def test_hyperparameters_without_the_facts_of_the_data_says_where_they_are() -> None:
    config = StudyConfig.from_json({**study("compensate").to_json(), PREPARED_KEY: {}})

    assert hyperparameters(config, base_params(config)) == Hyperparameters()
    with pytest.raises(SearchError, match="needs facts of the data, which are in its database"):
        hyperparameters(config, {"fl_gamma.switch": 0.75, "fl_gamma": 1.0})


def test_shown_params_are_raw_values() -> None:
    config = study("all")
    params = {**base_params(config), "gain_scale": 2.0, "cls_pw_power": 0.5}

    shown = shown_params(config, params)

    assert shown["box"] == pytest.approx(0.1)
    assert (shown["fl_gamma"], shown["cls_pw_power"]) == (0.0, 0.5)
    assert set(shown) == {"box", "cls", "obj", "obj_pw", "fl_gamma", "cls_pw_power"}
    assert shown_params(study("raw"), {"box": 0.07}) == {"box": 0.07}
    assert shown_params(config, {}) == {}


def test_at_bounds_names_ends_that_could_be_moved() -> None:
    config = study("raw", space={"box": {"low": 0.02, "high": 0.2, "log": True}, "mosaic": [0, 1], "fliplr": "default"})

    assert at_bounds(config, {"box": 0.0204, "mosaic": 1.0, "fliplr": 1.0}) == (
        "box 0.0204 is at the lower end of its range, 0.02 to 0.2, logarithmic",
    )
    assert at_bounds(config, {"box": 0.199, "mosaic": 0.0, "fliplr": 0.0})[0].startswith(
        "box 0.199 is at the upper end"
    )
    assert at_bounds(config, {"box": 0.05, "mosaic": 0.0, "fliplr": 0.5}) == ()
    assert at_bounds(study("power"), {"cls_pw_power": 0.0, "box": 0.05}) == ()


def test_data_facts_survive_the_database() -> None:
    assert study("all").facts == FACTS
    assert StudyConfig.from_json(study("all").to_json()).facts is None


SPARSE = DataFacts(
    class_counts=(3, 2),
    levels=(InitialLevel(-6.7, 19200, ((0.05, 0.3),)), InitialLevel(-5.3, 4800, ()), InitialLevel(-3.9, 1200, ())),
)
"""Of images that show nearly nothing but background."""


def sparse_study(name: str = "compensate", **changes: Any) -> StudyConfig:
    data = {"name": "s", "data": "builtin:digits", "trials": 2, **SPACES[name], **changes}
    return StudyConfig.from_json(Prepared(facts=SPARSE).added_to(parse_study(data, source="study.yaml").to_json()))


def test_excess_gain_on_much_background_is_where_default_ranges_leave_the_limits() -> None:
    config = sparse_study()

    found = excess_gain(config)

    assert found is not None
    assert (found.gain, found.at) == ("obj", {"obj": 5.0, "fl_gamma": 2.0, "obj_pw": 0.25})
    with pytest.raises(HyperparameterError, match=r"obj is .* allowed is a number from 1e-06 to 1000"):
        hyperparameters(config, {**found.at, "fl_gamma.switch": 0.75})
    assert found.value == pytest.approx(5.0 * objectness_factor(SPARSE.levels, 2.0, 0.25))
    assert excess_gain(study("compensate")) is None
    assert excess_gain(study("raw")) is None


@pytest.mark.parametrize("name", ["compensate", "all"])
def test_excess_gain_below_the_largest_gamma_no_draw_leaves_the_limits(name: str) -> None:
    gamma = largest_gamma(sparse_study(name))
    assert gamma is not None
    space = {**SPACES[name]["space"], "fl_gamma": {**FOCAL, "high": gamma, "compensate": True}}
    config = sparse_study(name, space=space)

    @settings(max_examples=200, deadline=None)
    @given(drawn(config))
    def check(params: dict[str, float]) -> None:
        hyperparameters(config, params)

    assert excess_gain(config) is None
    check()


def test_largest_gamma_of_choices_is_one_of_them_and_none_where_no_value_helps() -> None:
    choices = {"choices": [0, 1, 2, 3], "compensate": True}
    assert largest_gamma(sparse_study(space={"obj": "default", "fl_gamma": choices})) == 1
    always = {"obj": {"low": 0.5, "high": 990}, "fl_gamma": {**FOCAL, "compensate": True}}
    assert largest_gamma(sparse_study(space=always)) is None


def test_excess_gain_of_ratios_alone_is_found_too() -> None:
    config = study("two", space={"gain_scale": {"low": 0.5, "high": 900}, "box_to_obj": "default"})

    found = excess_gain(config)

    assert found is not None
    assert (found.gain, found.at) == ("obj", {"gain_scale": 900, "box_to_obj": 0.125})


def test_raw_values_are_those_of_hyperparameters_and_there_where_these_are_refused() -> None:
    config = sparse_study()
    far = {"fl_gamma.switch": 0.75, "fl_gamma": 2.0, "obj": 5.0, "obj_pw": 0.25, "cls": 0.5}
    near = {**far, "fl_gamma": 0.4}

    assert raw_values(config, near) == hyperparameters(config, near).to_mapping()
    assert raw_values(config, {}) == Hyperparameters().to_mapping()
    assert raw_values(config, far)["obj"] > 1000
    assert shown_params(config, far)["obj"] == raw_values(config, far)["obj"]
