"""What the records of a study in MLflow are called, and what its table of runs shows."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from made_up import made_up_study

from search.config import StudyConfig, parse_study
from search.data_facts import DataFacts
from search.prepared import Prepared
from search.tracking import VIEW_TAG, open_tracker
from search.transforms import search_params
from search.worker.records import run_params, table_columns
from yolocore.initial import InitialLevel


def config_of(**changes: Any) -> StudyConfig:
    document = {"name": "s", "data": "builtin:digits", "trials": 4, "space": ["obj_pw", "box", "cls"], **changes}
    facts = DataFacts(class_counts=(40, 5), levels=(InitialLevel(-6.7, 768, ((4.5, 0.31),)),))
    return StudyConfig.from_json(Prepared(facts=facts).added_to(parse_study(document, source="study.yaml").to_json()))


def searched(config: StudyConfig) -> list[str]:
    return [column.removeprefix("params.") for column in table_columns(config) if column.startswith("params.")]


def test_table_columns_first_what_was_found_then_what_was_tried_then_how_it_went() -> None:
    columns = table_columns(config_of())

    assert columns[:2] == ("objective", "metrics/mAP50")
    assert columns[-1] == "tags.yolosearch.state"
    assert searched(config_of()) == ["obj_pw", "box", "cls"]
    assert len(columns) == 6


def test_table_columns_several_objectives_each_has_its_own_and_the_first_sorts() -> None:
    config = config_of(objectives=["recall", "class_ap:digit 4"])

    assert table_columns(config)[:3] == ("objective/recall", "objective/class_ap_digit 4", "metrics/mAP50")


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"space": ["box", "cls", "obj", "obj_pw"], "parametrisation": "ratios"}, {"box", "cls", "obj", "obj_pw"}),
        (
            {"space": {"fl_gamma": {"low": 0.3, "high": 2.0, "off": 0.5, "compensate": True}}},
            {"fl_gamma", "obj", "cls"},
        ),
        ({"space": {"cls_pw": "per_class", "box": "default"}}, {"cls_pw_power", "box"}),
    ],
    ids=["ratios", "switch", "per class"],
)
def test_table_columns_are_the_raw_keys_that_move_and_every_run_has_them(
    space: dict[str, Any], expected: set[str]
) -> None:
    config = config_of(**space)

    columns = searched(config)

    assert set(columns) == expected
    assert len(columns) == len(expected)
    assert set(columns) <= set(run_params(config, search_params(config, config.base_hyperparameters())))


def test_set_table_keeps_the_columns_in_the_view_that_the_link_opens(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), [], tracked=True)
    tracker = open_tracker(enabled=True, uri=None, runs_dir=study.runs)

    tracker.ensure_experiment(study.config.name)
    tracker.set_table(study.config.name, table_columns(study.config), ("noise", "confirm"))

    with sqlite3.connect(study.runs / "mlflow.db") as store:
        ((text,),) = store.execute("SELECT value FROM experiment_tags WHERE key = ?", (VIEW_TAG,)).fetchall()
    view = json.loads(text)
    assert view["selectedColumns"] == [
        "metrics.`objective`",
        "metrics.`metrics/mAP50`",
        "params.`box`",
        "params.`cls`",
        "tags.`yolosearch.state`",
    ]
    assert view["searchFilter"] == "tags.`yolosearch.kind` != 'noise' AND tags.`yolosearch.kind` != 'confirm'"
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`objective`", False)
    link = tracker.experiment_url(study.config.name, "http://localhost:5000")
    assert link is not None
    assert VIEW_TAG.removeprefix("mlflow.sharedViewState.") in link
