"""What the short forms of `space` stand for."""

from typing import Any

import pytest

from search.config import StudyConfig, parse_study, require_resumable
from search.errors import StudyConfigError
from search.ranges import DEFAULT_RANGES, expanded_space
from search.settings import SpaceEntry
from yolocore.hyperparameters import HYPERPARAMETER_KEYS, IGNORED_KEYS, LOSS_WEIGHT_KEYS, Hyperparameters


def study(**changes: Any) -> StudyConfig:
    return parse_study({"name": "s", "data": "builtin:digits", "trials": 2, **changes}, source="study.yaml")


def test_space_left_out_is_the_six_loss_weights() -> None:
    config = study()

    assert tuple(config.space) == LOSS_WEIGHT_KEYS
    assert config.space["fl_gamma"] == SpaceEntry(low=0.3, high=2.0, off=0.5)
    assert study(space=None) == config
    assert study(space=list(LOSS_WEIGHT_KEYS)).space == config.space
    assert StudyConfig.from_json(config.to_json()) == config.model_copy(
        update={"base_hyp": config.to_json()["base_hyp"]}
    )


def test_space_keys_without_a_range_get_the_default_and_keep_their_order() -> None:
    config = study(space={"obj": "default", "lr0": None, "box": {"low": 0.02, "high": 0.2}})

    assert list(config.space) == ["obj", "lr0", "box"]
    assert config.space["obj"] == SpaceEntry(**DEFAULT_RANGES["obj"])
    assert config.space["lr0"] == SpaceEntry(low=0.0005, high=0.05, log=True)
    assert config.space["box"] == SpaceEntry(low=0.02, high=0.2)


def test_default_ranges_cover_every_key_and_the_presets() -> None:
    keys = [key for key in HYPERPARAMETER_KEYS if key not in IGNORED_KEYS]
    config = study(space=keys)
    fine_tuning = Hyperparameters(box=0.02, cls=0.21638, cls_pw=0.5, obj=0.51728, obj_pw=0.67198)

    assert set(config.space) == set(keys)
    for key in ("box", "cls", "cls_pw", "obj", "obj_pw"):
        entry = config.space[key]
        assert entry.low is not None
        assert entry.high is not None
        assert 1.9 * entry.low < getattr(fine_tuning, key) < entry.high / 1.9


def test_default_range_is_stretched_to_have_the_base_inside() -> None:
    base = {"box": 0.4, "obj": 0.06, "degrees": 60.0, "fl_gamma": 0.1}
    config = study(space=["box", "obj", "degrees", "fl_gamma"], base_hyp=base)

    ends = {key: (entry.low, entry.high) for key, entry in config.space.items()}

    assert ends == {"box": (0.01, 0.8), "obj": (0.03, 5.0), "degrees": (0.0, 60.0), "fl_gamma": (0.1, 2.0)}
    with pytest.raises(StudyConfigError, match=r"space\.box: the base value 0\.4 is not in 0\.01 to 0\.3"):
        study(space={"box": dict(DEFAULT_RANGES["box"])}, base_hyp=base)


def test_space_with_ratios_has_a_scale_and_ratios() -> None:
    config = study(space=["cls_pw", "box", "obj", "cls"], parametrisation="ratios")

    assert list(config.space) == ["cls_pw", "box_to_obj", "gain_scale", "cls_to_obj"]
    assert config.space["gain_scale"] == SpaceEntry(low=0.25, high=4.0, log=True)
    assert set(study(parametrisation="ratios").space) == {
        *("gain_scale", "box_to_obj", "cls_to_obj", "cls_pw", "obj_pw", "fl_gamma")
    }


def test_cls_pw_per_class_is_a_power() -> None:
    config = study(space={"cls_pw": "per_class", "box": "default"})

    assert config.space["cls_pw_power"] == SpaceEntry(low=0.0, high=1.0)
    assert list(config.space) == ["cls_pw_power", "box"]


def test_expanded_space_leaves_the_rest_to_the_checks() -> None:
    assert expanded_space("box", "raw") == ("box", frozenset())
    assert expanded_space([1, "box"], "raw") == ([1, "box"], frozenset())
    assert expanded_space({"bxo": "default", "box": "wide"}, "raw")[0] == {"bxo": "default", "box": "wide"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"box": "wide"}}, r'space\.box: got "wide"; allowed: '),
        ({"space": ["bxo"]}, r"space\.bxo: "),
        ({"space": []}, r"space: is empty"),
        ({"space": {"gain_scale": None}}, r"space\.gain_scale: is a key of parametrisation ratios; allowed: "),
        (
            {"space": {"box": {"low": 0.02, "high": 0.2}}, "parametrisation": "ratios"},
            r"space\.box: has a range of its own with parametrisation ratios; allowed: default, with obj among them",
        ),
        ({"space": ["box", "cls"], "parametrisation": "ratios"}, r"space\.box: .*; allowed: default, with obj"),
        ({"space": ["lr0"], "parametrisation": "ratios"}, r'parametrisation: got "ratios" with no gain in the space'),
        ({"parametrisation": "shares"}, r'parametrisation: got "shares"; allowed: one of raw, ratios'),
        ({"space": {"box": {"low": 0.02, "high": 0.2, "off": 0.5}}}, r"space\.box\.off: got 0\.5, and box has no off"),
        (
            {"space": {"fl_gamma": {"low": 0, "high": 2, "off": 0.5}}},
            r"space\.fl_gamma\.low: got 0 with off; allowed: low",
        ),
        (
            {"space": {"fl_gamma": {"low": 1, "high": 2, "off": 1.5}}},
            r"space\.fl_gamma\.off: got 1\.5; allowed: a number",
        ),
        ({"space": {"fl_gamma": {"choices": [0, 1], "off": 0.5}}}, r"space\.fl_gamma: has choices and off; allowed: "),
        ({"space": {"mixup": {"low": 0, "high": 1, "compensate": True}}}, r"space\.mixup\.compensate: got true"),
        (
            {"space": {"fl_gamma": {"choices": [0, 1], "compensate": True}}, "base_hyp": {"fl_gamma": 1}},
            r"space\.fl_gamma\.compensate: with 1 in base_hyp; allowed: a base with fl_gamma 0",
        ),
        (
            {"space": {"cls_pw": "per_class"}, "base_hyp": {"cls_pw_per_class": [1, 2]}},
            r"space\.cls_pw_power: with cls_pw_per_class in base_hyp; allowed: a base without",
        ),
        ({"space": ["box"], "base_hyp": {"cls_pw_per_class": [1, 0]}}, r"base_hyp\.cls_pw_per_class: got \[1, 0\]"),
    ],
)
def test_space_that_cannot_be_searched_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyConfigError, match=message) as caught:
        study(**changes)
    lines = str(caught.value).splitlines()
    assert len(lines) == (2 if changes.get("space") == ["box", "cls"] else 1)


@pytest.mark.parametrize("sampler", ["gp", "cmaes", "nsga2", "grid"])
def test_space_with_off_is_refused_with_samplers_that_need_every_key(sampler: str) -> None:
    with pytest.raises(StudyConfigError) as caught:
        study(space=["fl_gamma", "box"], sampler=sampler)

    assert str(caught.value) == (
        f"study.yaml: space.fl_gamma: has off, and sampler {sampler} cannot search a key that is not always there; "
        "allowed: sampler tpe, random or qmc, or choices with 0 among them"
    )
    study(space={"fl_gamma": [0, 1], "box": [0.05, 0.1]}, sampler="nsga2")


def test_stored_configuration_of_an_earlier_version_loads_and_resumes() -> None:
    space = {"box": {"low": 0.02, "high": 0.2, "log": True}, "cls": [0.3, 0.5]}
    asked = study(space=space)
    stored = asked.to_json()
    del stored["parametrisation"]
    for entry in stored["space"].values():
        del entry["off"], entry["compensate"]

    config = StudyConfig.from_json(stored)

    assert config.space == asked.space
    assert config.facts is None
    require_resumable(config, asked)
