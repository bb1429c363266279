"""The JSON Schema of study files agrees with what the program reads."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from test_config import BROKEN, GOOD

from search.schema import hyp_descriptions, study_schema
from yolocore.hyperparameters import HYPERPARAMETER_KEYS

STUDIES = Path(__file__).parents[2] / "studies"
SCHEMA = study_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
TYPES = {"type", "anyOf", "oneOf", "$ref", "enum", "const"}


def problems(document: object) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(document)]


def changed(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(GOOD), **changes}


def test_study_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.name)
def test_study_schema_accepts_the_studies_of_the_project(path: Path) -> None:
    assert problems(yaml.safe_load(path.read_text())) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "random"},
        {"sampler": {"name": "gp", "seed": 3}},
        {"pruner": None},
        {"pruner": "none"},
        {"pruner": {"name": "patient", "patience": 3, "wrapped": "asha"}},
        {"objective": "map50"},
        {"objective": "class_ap:cat"},
        {"objective": {"metric": "fitness", "at": "best"}},
        {"objective": {"fitness": 0.7, "class_ap:cat": 0.3, "at": "last"}},
        {"base_hyp": "hyp.yaml"},
        {"base_hyp": {"box": 0.1}},
        {"space": {"fl_gamma": [0.0, 1.5], "lr0": {"low": 0.001, "high": 0.1, "log": True}}},
        {"space": {"fl_gamma": {"low": 0.3, "high": 2, "off": 0.5, "compensate": True}, "cls_pw": "per_class"}},
        {"space": ["box", "cls", "obj"], "parametrisation": "ratios"},
        {"space": {"gain_scale": "default", "box_to_obj": None}, "parametrisation": "ratios"},
        {"space": None},
        {"train": {"pack": 4, "workers": 0, "weights": "yolov5n.pt"}},
        {"train": {"pack": "auto", "workers": "auto"}, "timeout": 3600},
    ],
    ids=str,
)
def test_study_schema_accepts_every_short_form(changes: dict[str, Any]) -> None:
    assert problems(changed(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"trails": 12}, "$"),
        ({"trials": 0}, "$.trials"),
        ({"trials": "12"}, "$.trials"),
        ({"name": "a b"}, "$.name"),
        ({"space": {"boks": {"low": 0.1, "high": 0.2}}}, "$.space"),
        ({"space": {"box": {"lo": 0.1, "high": 0.2}}}, "$.space.box"),
        ({"space": {}}, "$.space"),
        ({"space": ["boks"]}, "$.space[0]"),
        ({"space": {"box": "per_class"}}, "$.space.box"),
        ({"sampler": "tpee"}, "$.sampler"),
        ({"sampler": {"name": "tpe", "population_size": 3}}, "$.sampler"),
        ({"pruner": "patient"}, "$.pruner"),
        ({"objective": "fitnes"}, "$.objective"),
        ({"objective": {"fitness": 0}}, "$.objective"),
        ({"base_hyp": {"boks": 1}}, "$.base_hyp"),
        ({"train": {"image_size": 100}}, "$.train.image_size"),
        ({"train": {"pack": 65}}, "$.train.pack"),
        ({"train": {"workers": -1}}, "$.train.workers"),
        ({"train": {"device": "gpu"}}, "$.train.device"),
        ({"train": {"model": "z"}}, "$.train.model"),
    ],
    ids=str,
)
def test_study_schema_refuses_what_the_program_refuses(changes: dict[str, Any], place: str) -> None:
    assert [problem.partition(": ")[0] for problem in problems(changed(**changes))] == [place]


def test_study_schema_refuses_most_of_the_broken_studies() -> None:
    refused = [row[1] for row in BROKEN if problems(yaml.safe_load(GOOD.replace(row[0], row[1])))]

    # The others are wrong in what a combination of keys means, or name files that are not there.
    assert len(refused) > len(BROKEN) / 2


def test_study_schema_says_of_every_key_what_it_takes_and_means() -> None:
    """A key whose validator replaces its type would be taken for anything: say in `search.schema` what it takes."""
    sections = [SCHEMA, *SCHEMA["$defs"].values()]
    keys = [(key, node) for section in sections for key, node in section.get("properties", {}).items()]

    assert [key for key, node in keys if not TYPES & node.keys()] == []
    undescribed = [key for key, node in keys if "description" not in node and key not in ("name", "seed", "train")]
    assert [key for key in undescribed if key != "tracking"] == []


def test_hyp_descriptions_name_every_key() -> None:
    texts = hyp_descriptions()

    assert tuple(texts) == HYPERPARAMETER_KEYS
    assert texts["box"] == "Gain of the box loss."
