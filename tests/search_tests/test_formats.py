"""The forms of an export: what is in each, and what is refused because it would mislead."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_export import BEST

from search.errors import UserInputError
from search.export import RerunGain
from search.formats import ExportRequest, export_as, to_document
from search.importers import NOT_ULTRALYTICS, ULTRALYTICS_KEYS, read_candidates
from search.paths import ExportFormat
from yolocore.hyperparameters import HYPERPARAMETER_KEYS, PER_CLASS_KEY, Hyperparameters

MIXED = dataclasses.replace(
    BEST, hyperparameters=Hyperparameters(box=0.1 + 0.2, lr0=0.02, hsv_h=1e-05), searched=("box", "lr0", "hsv_h")
)
GAIN = RerunGain(
    split="val",
    verdict="better",
    gain=0.02,
    low=0.01,
    high=0.03,
    p_value=0.004,
    candidates=3,
    seeds=5,
    epochs=30,
    is_final=True,
)


def test_export_as_json_has_raw_values_and_where_they_come_from(tmp_path: Path) -> None:
    best = dataclasses.replace(BEST, study_id="blood@2026-01-01", reruns=(GAIN,), verdict="trial 7 is better")

    found = json.loads(export_as(best, tmp_path / "deep" / "best.json", ExportFormat.JSON).read_text())

    assert Hyperparameters.from_mapping(found["hyp"], "json") == best.hyperparameters
    assert set(found["hyp"]) == set(HYPERPARAMETER_KEYS)
    assert (found["study"], found["data"]) == (
        {"name": "blood", "id": "blood@2026-01-01"},
        {"fingerprint": "0123456789abcdef"},
    )
    assert found["objective"] == {"name": "fitness at the last epoch", "value": 0.41234, "base_value": 0.4}
    assert (found["trial"], found["confirmed"], found["verdict"]) == (7, True, "trial 7 is better")
    gain = found["reruns"][0]
    assert (gain["gain"], gain["low"], gain["high"], gain["p_value"], gain["seeds"]) == (0.02, 0.01, 0.03, 0.004, 5)


@pytest.mark.parametrize(
    "gain",
    [
        dataclasses.replace(GAIN, verdict="no difference shown"),
        dataclasses.replace(GAIN, is_final=False),
        dataclasses.replace(GAIN, split="test"),
    ],
)
def test_to_document_is_confirmed_only_by_the_final_verdict_on_validation(gain: RerunGain) -> None:
    assert to_document(BEST)["confirmed"] is False
    assert to_document(dataclasses.replace(BEST, reruns=(gain,)))["confirmed"] is False


def test_export_as_json_metric_that_is_not_finite_is_null(tmp_path: Path) -> None:
    best = dataclasses.replace(BEST, metrics={"fitness": 0.4, "val_box": float("nan")})

    text = export_as(best, tmp_path / "best.json", ExportFormat.JSON).read_text()

    assert json.loads(text)["metrics"] == {"fitness": 0.4, "val_box": None}


def test_export_as_ultralytics_has_what_means_the_same_and_names_the_rest(tmp_path: Path) -> None:
    path = export_as(MIXED, tmp_path / "hyp.yaml", ExportFormat.ULTRALYTICS)

    text = path.read_text()
    values = yaml.safe_load(text)
    assert set(values) == ULTRALYTICS_KEYS
    assert (values["lr0"], values["hsv_h"]) == (0.02, 1e-05)
    assert "# searched and carried over: lr0, hsv_h\n" in text
    assert "# searched, NOT carried over: box: a gain of another box loss" in text
    assert "what they do to another model was not measured" in text
    assert "lr0 and momentum are ignored" in text
    assert "unconfirmed" in text
    assert "train.py" not in text
    back = read_candidates(path).candidates[0].values
    assert back == values


def test_export_as_ultralytics_without_a_common_key_is_refused_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(UserInputError) as caught:
        export_as(BEST, tmp_path / "hyp.yaml", ExportFormat.ULTRALYTICS)

    assert str(caught.value) == (
        "study blood: --format ultralytics: nothing that it searched carries over "
        "(box: a gain of another box loss (task-aligned assignment, 7.5 where YOLOv5 has 0.05); "
        "cls_pw: another meaning there; fl_gamma: Ultralytics models have no focal loss); allowed: yolov5, json"
    )
    assert list(tmp_path.iterdir()) == []


def test_every_key_carries_over_or_has_a_reason() -> None:
    assert {*HYPERPARAMETER_KEYS, PER_CLASS_KEY} <= ULTRALYTICS_KEYS | set(NOT_ULTRALYTICS)
    assert set() == ULTRALYTICS_KEYS & set(NOT_ULTRALYTICS)


def test_to_document_of_several_objectives_has_all_their_values() -> None:
    values = {"fitness": (0.4, 0.3), "map50": (0.7, None)}
    best = dataclasses.replace(BEST, objective="fitness and map50 at the last epoch", values=values)

    found = to_document(best)

    assert found["objectives"] == [
        {"name": "fitness", "value": 0.4, "base_value": 0.3},
        {"name": "map50", "value": 0.7, "base_value": None},
    ]
    assert found["objective"] == found["objectives"][0]
    assert found["chosen"] == "one of those that none of the 9 complete trials beats in all objectives"
    assert to_document(BEST)["objectives"] == [to_document(BEST)["objective"]]


def test_export_as_json_names_the_level_of_the_intervals_and_the_looks() -> None:
    best = dataclasses.replace(BEST, reruns=(GAIN,), verdict="keep", looks="seeds were added once after a look")

    found = to_document(best)

    assert (found["reruns"][0]["confidence"], found["reruns"][0]["looks"]) == (0.96, 0)
    assert found["looks"] == "seeds were added once after a look"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pareto": "first"}, "--pareto: got 'first'; allowed: all, or the number of a trial of the front"),
        ({"pareto": "3", "trial": 2}, "--trial: got 2 with --pareto; allowed: one of the two"),
        (
            {"pareto": "all", "weights": Path("w.pt")},
            "--weights: got a file with --pareto all; allowed: with --pareto N",
        ),
    ],
    ids=["word", "trial", "weights"],
)
def test_export_request_what_cannot_be_had_together_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError) as caught:
        ExportRequest(**asked).check()

    assert str(caught.value) == message
