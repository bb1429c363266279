import dataclasses
import json
import math
import random
from pathlib import Path

import pytest
import yaml

from yolocore.errors import HyperparameterError
from yolocore.hyperparameters import (
    HYPERPARAMETER_KEYS,
    IGNORED_KEYS,
    LOSS_WEIGHT_KEYS,
    RANGES,
    SHARED_KEYS,
    Hyperparameters,
)


@pytest.fixture(scope="module")
def presets(small_golden_dir: Path) -> dict[str, dict[str, float]]:
    return json.loads((small_golden_dir / "hyp_presets.json").read_text())


def random_hyperparameters(generator: random.Random) -> Hyperparameters:
    return Hyperparameters(**{key: generator.uniform(low, min(high, low + 1)) for key, (low, high) in RANGES.items()})


def message_of(mapping: dict[object, object]) -> str:
    with pytest.raises(HyperparameterError) as caught:
        Hyperparameters.from_mapping(mapping, "my.yaml")  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_hyperparameters_defaults_are_the_low_preset(presets: dict[str, dict[str, float]]) -> None:
    assert Hyperparameters().to_mapping() == presets["scratch-low"]
    assert list(Hyperparameters().to_mapping()) == list(presets["scratch-low"])


@pytest.mark.parametrize("name", ["scratch-low", "scratch-med", "scratch-high", "VOC", "Objects365", "no-augmentation"])
def test_from_mapping_preset_keeps_every_value_but_anchors(presets: dict[str, dict[str, float]], name: str) -> None:
    expected = {key: value for key, value in presets[name].items() if key != "anchors"}
    assert Hyperparameters.from_mapping(presets[name], name).to_mapping() == expected


def test_keys_are_twenty_eight_and_every_group_names_real_ones() -> None:
    assert len(HYPERPARAMETER_KEYS) == 28
    assert HYPERPARAMETER_KEYS[0] == "lr0"
    assert HYPERPARAMETER_KEYS[-1] == "copy_paste"
    assert tuple(RANGES) == HYPERPARAMETER_KEYS
    assert set(LOSS_WEIGHT_KEYS) | SHARED_KEYS | IGNORED_KEYS < set(HYPERPARAMETER_KEYS)
    assert not SHARED_KEYS & set(LOSS_WEIGHT_KEYS)


def test_from_yaml_official_layout_with_comments_reads(tmp_path: Path) -> None:
    path = tmp_path / "hyp.yaml"
    path.write_text("# a comment\nlr0: 0.02  # base rate\nbox: 0.1\nanchors: 3\n", encoding="utf-8")
    hyp = Hyperparameters.from_yaml(path)
    assert (hyp.lr0, hyp.box, hyp.cls) == (0.02, 0.1, 0.5)


def test_to_yaml_default_starts_with_header_then_keys_in_order() -> None:
    lines = Hyperparameters().to_yaml(["study: digits", "", "two\nlines"]).splitlines()
    assert lines[:6] == ["# study: digits", "#", "# two", "# lines", "lr0: 0.01", "lrf: 0.01"]
    assert lines[-1] == "copy_paste: 0.0"
    assert len(lines) == 4 + 28


def test_yaml_round_trip_random_values_is_exact(tmp_path: Path) -> None:
    generator = random.Random(7)
    path = tmp_path / "hyp.yaml"
    for _ in range(50):
        hyp = random_hyperparameters(generator)
        path.write_text(hyp.to_yaml(["header"]), encoding="utf-8")
        assert Hyperparameters.from_yaml(path) == hyp


def test_yaml_round_trip_small_exponents_stay_numbers() -> None:
    hyp = Hyperparameters(lr0=1e-5, weight_decay=5e-324, box=1e-6)
    loaded = yaml.safe_load(hyp.to_yaml())
    assert (loaded["lr0"], loaded["weight_decay"], loaded["box"]) == (1e-5, 5e-324, 1e-6)


def test_range_limits_are_accepted_and_the_next_float_is_not() -> None:
    for key, (low, high) in RANGES.items():
        assert getattr(Hyperparameters(**{key: low}), key) == low
        assert getattr(Hyperparameters(**{key: high}), key) == high
        for outside in (math.nextafter(low, -math.inf), math.nextafter(high, math.inf)):
            with pytest.raises(HyperparameterError, match=f"{key} is "):
                Hyperparameters(**{key: outside})


def test_from_mapping_integer_becomes_float() -> None:
    value = Hyperparameters.from_mapping({"warmup_epochs": 3}, "x").warmup_epochs
    assert isinstance(value, float)
    assert value == 3.0


def test_hyperparameters_assignment_is_refused() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hyperparameters().box = 1.0  # type: ignore[misc]


def test_replace_changes_one_key_and_checks_it() -> None:
    hyp = Hyperparameters()
    assert hyp.replace(obj=0.7).to_mapping() == {**hyp.to_mapping(), "obj": 0.7}
    assert hyp.obj == 1.0
    with pytest.raises(HyperparameterError, match="did you mean 'obj_pw'"):
        hyp.replace(obj_pv=1.0)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"cls_wp": 1.0}, "my.yaml: 'cls_wp' is not a hyp key; did you mean 'cls_pw'?"),
        ({3: 1.0}, "my.yaml: 3 is not a hyp key; allowed are lr0, lrf,"),
        ({"label_smoothing": 0.1}, "my.yaml: 'label_smoothing' is not a hyp key; label smoothing is a training option"),
        ({"box": True}, "my.yaml: box is True; allowed is a number from 1e-06 to 1000"),
        ({"box": None}, "my.yaml: box is None; allowed is a number"),
        ({"box": [0.05]}, "my.yaml: box is [0.05]; allowed is a number"),
        ({"lr0": "1e-3"}, "my.yaml: lr0 is '1e-3'; allowed is a number from 1e-09 to 10 (YAML reads 1e-3 as text: "
                          "write 0.001)"),
        ({"lr0": "1e-9"}, "write 1.0e-09)"),
        ({"lr0": "fast"}, "my.yaml: lr0 is 'fast'; allowed is a number from 1e-09 to 10"),
        ({"obj": math.nan}, "my.yaml: obj is nan; allowed is a number"),
        ({"obj": math.inf}, "my.yaml: obj is inf; allowed is a number"),
        ({"obj": 10**400}, "my.yaml: obj is inf; allowed is a number"),
        ({"momentum": 1.0}, "my.yaml: momentum is 1.0; allowed is a number from 0 to 0.9999"),
        ({"fliplr": -0.1}, "my.yaml: fliplr is -0.1; allowed is a number from 0 to 1"),
        ({"box": 0.0}, "my.yaml: box is 0.0; allowed is a number from 1e-06 to 1000"),
        ({"anchor_t": 1}, "my.yaml: anchor_t is 1.0; allowed is a number from 1.01 to 1000"),
    ],
)  # fmt: skip
def test_from_mapping_bad_entry_names_source_key_value_and_allowed(
    mapping: dict[object, object], expected: str
) -> None:
    assert expected in message_of(mapping)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds nothing; allowed is a mapping"),
        (b"- box\n", "holds a list; allowed is a mapping"),
        (b"box 0.05", "holds a str; allowed is a mapping"),
        (b"box: [0.05\n", "not YAML: "),
        (b"box: 0.05\nobj: 1.0\nbox: 0.1\n", "key 'box' stands twice, in lines 1 and 3"),
        (b"\xff\xfe\x00box", "not a text file in UTF-8"),
        (b"box: !!python/object/apply:os.getcwd []\n", "not YAML: "),
        (b"box: 0.05\nboks: 1.0\n", "'boks' is not a hyp key; did you mean 'box'?"),
    ],
)
def test_from_yaml_bad_file_names_file_in_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "hyp.yaml"
    path.write_bytes(content)
    with pytest.raises(HyperparameterError) as caught:
        Hyperparameters.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


def test_from_yaml_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(HyperparameterError, match=r"gone\.yaml: cannot read this hyp file: No such file"):
        Hyperparameters.from_yaml(tmp_path / "gone.yaml")


def test_per_class_weights_survive_the_file_and_stay_out_of_the_keys_of_yolov5(tmp_path: Path) -> None:
    hyp = Hyperparameters(cls_pw=1.5, cls_pw_per_class=[0.5, 1, 2.25])  # type: ignore[arg-type]
    path = tmp_path / "hyp.yaml"
    path.write_text(hyp.to_yaml(["mine"]))

    assert hyp.cls_pw_per_class == (0.5, 1.0, 2.25)
    assert Hyperparameters.from_yaml(path) == hyp
    assert path.read_text().splitlines()[-1] == "cls_pw_per_class: [0.5, 1.0, 2.25]"
    assert tuple(hyp.to_mapping()) == HYPERPARAMETER_KEYS
    assert hyp.replace(box=0.1).cls_pw_per_class == (0.5, 1.0, 2.25)
    assert hyp.replace(cls_pw_per_class=None).to_document() == Hyperparameters(cls_pw=1.5).to_mapping()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2.0, r"f\.yaml: cls_pw_per_class is 2\.0; allowed is a list of numbers, one a class"),
        ([], r"f\.yaml: cls_pw_per_class is \[\]; allowed is a list"),
        ([1, 0], r"f\.yaml: cls_pw_per_class\[1\] is 0\.0; allowed is a number from 1e-06 to 1000"),
        ([1, "2"], r"f\.yaml: cls_pw_per_class\[1\] is '2'; allowed is a number"),
    ],
)
def test_per_class_weights_that_are_none_name_the_bad_one(value: object, message: str) -> None:
    with pytest.raises(HyperparameterError, match=message):
        Hyperparameters.from_mapping({"cls_pw_per_class": value}, "f.yaml")
