"""From the study file's space to Optuna's distributions and back to hyperparameters."""

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from search.config import StudyConfig, parse_study
from search.errors import StudyConfigError
from search.space import (
    base_params,
    complete_params,
    distributions,
    grid_points,
    hyperparameters,
    pack_key,
    pack_limit,
    packs_by_value,
)


def study(space: dict[str, Any], **changes: Any) -> StudyConfig:
    return parse_study(
        {"name": "s", "data": "builtin:digits", "space": space, "trials": 2, **changes}, source="study.yaml"
    )


def test_distributions_of_each_kind_keep_the_files_order() -> None:
    space = {
        "obj": {"low": 0.25, "high": 4, "log": True},
        "box": {"low": 0.02, "high": 0.2},
        "cls": {"low": 0.1, "high": 1.1, "step": 0.2},
        "fl_gamma": [0, 1.5],
    }

    found = distributions(study(space))

    assert list(found) == ["obj", "box", "cls", "fl_gamma"]
    assert found == {
        "obj": FloatDistribution(0.25, 4.0, log=True),
        "box": FloatDistribution(0.02, 0.2),
        "cls": FloatDistribution(0.1, 1.1, step=0.2),
        "fl_gamma": CategoricalDistribution((0.0, 1.5)),
    }


def test_base_params_are_the_base_hyps_values() -> None:
    config = study({"box": {"low": 0.02, "high": 0.2}, "fl_gamma": [0, 1.5]}, base_hyp={"box": 0.07})

    assert base_params(config) == {"box": 0.07, "fl_gamma": 0.0}


def test_base_params_outside_the_range_names_value_and_range() -> None:
    config = study({"box": {"low": 0.02, "high": 0.2}})
    moved = config.model_copy(update={"base_hyp": {"box": 0.5}})

    with pytest.raises(StudyConfigError, match=r"space\.box: the base value 0\.5 is not in 0\.02 to 0\.2; allowed: "):
        base_params(moved)


def test_base_value_off_the_step_grid_is_refused() -> None:
    with pytest.raises(StudyConfigError, match=r"the base value 0\.05 is not in 0\.02 to 0\.2 in steps of 0\.02"):
        study({"box": {"low": 0.02, "high": 0.2, "step": 0.02}})


def test_complete_params_fills_up_with_the_base() -> None:
    config = study({"box": {"low": 0.02, "high": 0.2}, "obj": [0.7, 1.0]})

    assert complete_params(config, {"box": 0.1}) == {"box": 0.1, "obj": 1.0}


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"cls": 0.5}, "fixed parameter cls: not in the space; allowed: box"),
        ({"box": 0.3}, "got 0.3; allowed: 0.02 to 0.2"),
    ],
)
def test_complete_params_outside_the_space_is_refused(fixed: dict[str, float], message: str) -> None:
    with pytest.raises(StudyConfigError, match=message):
        complete_params(study({"box": {"low": 0.02, "high": 0.2}}), fixed)


def test_grid_points_are_all_combinations_with_the_base_first() -> None:
    space = {"box": [0.02, 0.05, 0.1], "obj": {"low": 0.8, "high": 1.2, "step": 0.2}}

    points = grid_points(study(space, sampler="grid"))

    assert points[0] == {"box": 0.05, "obj": 1.0}
    combinations = {(point["box"], round(point["obj"], 9)) for point in points}
    assert len(points) == 9
    assert combinations == {(box, obj) for box in (0.02, 0.05, 0.1) for obj in (0.8, 1.0, 1.2)}


def test_grid_points_order_is_a_function_of_the_seed() -> None:
    space = {"box": [0.02, 0.05, 0.1], "obj": [0.5, 0.7, 1.0, 2.0]}
    first = grid_points(study(space, sampler={"name": "grid", "seed": 1}))

    assert grid_points(study(space, sampler={"name": "grid", "seed": 1})) == first
    assert grid_points(study(space, sampler={"name": "grid", "seed": 2})) != first


def test_hyperparameters_puts_the_parameters_into_the_base() -> None:
    config = study({"box": {"low": 0.02, "high": 0.2}, "fl_gamma": [0, 1]}, base_hyp={"lr0": 0.02})

    found = hyperparameters(config, {"box": 0.07, "fl_gamma": 1})

    assert (found.lr0, found.box, found.fl_gamma, found.cls) == (0.02, 0.07, 1.0, 0.5)


def test_pack_limit_is_one_when_no_two_trials_agree_in_what_a_pack_shares() -> None:
    assert pack_limit(study({"box": [0.05, 0.1], "lr0": [0.01, 0.02]}, train={"pack": 6})) == 6
    assert pack_limit(study({"box": [0.05, 0.1], "anchor_t": [3, 4]}, train={"pack": 6})) == 6
    assert pack_limit(study({"box": [0.05, 0.1], "anchor_t": {"low": 3, "high": 5}}, train={"pack": 6})) == 1


def test_pack_key_holds_the_searched_values_that_a_pack_shares() -> None:
    plain = study({"box": [0.05, 0.1], "lr0": [0.01, 0.02]})
    split = study({"mosaic": [0.0, 1.0], "box": [0.05, 0.1], "anchor_t": [3, 4]})
    params = {"box": 0.1, "mosaic": 1.0, "anchor_t": 4.0, "lr0": 0.01}
    assert (packs_by_value(plain), packs_by_value(split)) == (False, True)
    assert (pack_key(plain, params), pack_key(split, params)) == ((), (1.0, 4.0))
