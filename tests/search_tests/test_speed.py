"""How fast a study will train, from a measurement and from earlier studies."""

from pathlib import Path

import pytest
from tiny import TinyStudy, make_study

from search.launch.prepare import plan_study, with_measured_speed
from search.launch.speed import earlier_speed, speed_of
from search.ledger import EpochRow


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    """A study of three trials, trained."""
    study = make_study(tmp_path_factory.mktemp("worked") / "study", tmp_path_factory.getbasetemp())
    study.create()
    assert study.work() == 3
    return study


def row(seconds: float, slots: float, evaluation: float) -> EpochRow:
    metrics = {"seconds": seconds, "slots": slots, "eval_seconds": evaluation}
    return EpochRow(ticket_id=1, epoch=0, attempt=1, value=0.1, metrics=metrics, stored_at=0.0, prune=None)


def test_speed_of_rows_is_the_median_and_counts_rare_evaluations_rarely() -> None:
    rows = [row(8.0, 4.0, 2.0), row(10.0, 4.0, 2.0), row(100.0, 1.0, 2.0)]

    every, fifth = (speed_of(rows, eval_every, "there") for eval_every in (1, 5))

    assert (every.seconds, every.slots, every.source) == (2.5, 4, "there")
    assert fifth.seconds == pytest.approx((8 + 0.4) / 4)


def test_plan_study_knows_the_speed_of_an_earlier_study_alike(worked: TinyStudy) -> None:
    same = plan_study(worked.config, worked.storage_url, worked.runs)
    wider = worked.config.model_copy(update={"train": worked.config.train.model_copy(update={"image_size": 96})})

    assert same.forecast.speed is not None
    assert same.forecast.speed.source == "as study tiny"
    assert (same.forecast.cost.expected, same.to_json()["forecast"]["trainings"]) == (6, 3.0)
    assert plan_study(wider, worked.storage_url, worked.runs).forecast.speed is None


def test_earlier_speed_other_data_or_device_says_nothing(worked: TinyStudy) -> None:
    found = worked.ledger.study("tiny").fingerprint

    assert earlier_speed(worked.config, found, "cpu fp32", worked.storage_url, worked.runs) is not None
    assert earlier_speed(worked.config, found, "cuda:0 bf16", worked.storage_url, worked.runs) is None
    assert earlier_speed(worked.config, "0" * 16, "cpu fp32", worked.storage_url, worked.runs) is None


def test_earlier_speed_without_a_database_writes_none(worked: TinyStudy, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'none.db'}"

    assert earlier_speed(worked.config, "0" * 16, "cpu fp32", url, tmp_path / "runs") is None
    assert list(tmp_path.iterdir()) == []


def test_with_measured_speed_trains_here(worked: TinyStudy) -> None:
    plan = with_measured_speed(plan_study(worked.config, worked.storage_url, worked.runs))

    speed = plan.forecast.speed
    assert speed is not None
    assert speed.source == "measured here on cpu fp32"
    assert speed.slots == 2
    assert plan.forecast.seconds == pytest.approx(6 * speed.seconds)
    assert speed.seconds > 0
