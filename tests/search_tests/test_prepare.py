"""From a study file to a study in the database."""

from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState
from tiny import NAME, TinyStudy, make_study

from search.errors import StudyConfigError, StudyConflictError
from search.launch.prepare import create_or_resume, plan_study
from search.ledger import TicketState


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("YOLOSEARCH_STORAGE_URL", raising=False)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda folder="study", **options: make_study(tmp_path / folder, shared, **options)


def test_plan_study_counts_images_and_labels_and_writes_nothing(make: Callable[..., TinyStudy]) -> None:
    study = make()
    labels = [line.split()[0] for path in (study.data.parent / "labels" / "train").iterdir() for line in path.open()]

    plan = plan_study(study.config, study.storage_url, study.runs)

    assert plan.images == {"train": 16, "val": 8}
    assert plan.labels_per_class == {"digit 0": labels.count("0"), "digit 4": labels.count("1")}
    assert (plan.device, plan.precision, plan.pack) == ("cpu", "fp32", 2)
    assert dict(plan.rows())["space.box"].endswith("(base 0.05)")
    assert not study.runs.exists()


def test_plan_study_key_that_a_pack_shares_is_told(make: Callable[..., TinyStudy]) -> None:
    study = make(space={"hsv_h": {"low": 0.0, "high": 0.1}})

    plan = plan_study(study.config, study.storage_url, study.runs)

    assert plan.pack == 1
    assert any("trials train one at a time" in notice for notice in plan.notices)


def test_plan_study_class_without_training_labels_is_told(make: Callable[..., TinyStudy]) -> None:
    study = make()
    for path in (study.data.parent / "labels" / "train").iterdir():
        path.write_text("".join(line for line in path.open() if line.startswith("0 ")))

    plan = plan_study(study.config, study.storage_url, study.runs)

    assert "data: no training labels of digit 4" in plan.notices


def test_create_or_resume_new_study_has_its_budget_and_the_base_first(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=3)

    assert study.create(more_trials=2) is True

    tickets = study.tickets()
    assert [ticket.number for ticket in tickets] == [0, 1, 2, 3, 4]
    assert [ticket.fixed_params for ticket in tickets] == [{"box": 0.05, "cls": 0.5}, None, None, None, None]
    assert [(trial.number, trial.state, trial.params) for trial in study.optuna_trials()] == [
        (0, TrialState.RUNNING, {"box": 0.05, "cls": 0.5})
    ]
    assert tickets[0].trial_number == 0


def test_create_or_resume_again_changes_nothing(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    before = study.tickets()

    assert study.create() is False

    assert study.tickets() == before
    assert len(study.optuna_trials()) == 1


@pytest.mark.parametrize(("trials", "more", "expected"), [(5, 0, 5), (2, 0, 3), (3, 2, 5), (5, 2, 7)])
def test_create_or_resume_budget_grows_and_never_shrinks(
    make: Callable[..., TinyStudy], trials: int, more: int, expected: int
) -> None:
    study = make(trials=3)
    study.create()
    study.write(trials=trials, timeout=3600)

    study.create(more)

    assert [ticket.number for ticket in study.tickets()] == list(range(expected))
    assert study.states() == [TicketState.WAITING] * expected


def test_create_or_resume_changed_settings_are_refused_by_name(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    study.write(train={"epochs": 3}, objective="map50", base_hyp={"mosaic": 0, "obj": 0.9})

    with pytest.raises(StudyConflictError) as caught:
        study.create()

    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert keys == ["train.epochs", "base_hyp.obj", "objective.weights.fitness", "objective.weights.map50"]
    assert len(study.tickets()) == 3


def test_create_or_resume_changed_data_is_refused_by_fingerprint(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    (study.data.parent / "labels" / "val" / "00001.txt").write_text("0 0.5 0.5 0.25 0.25\n")

    with pytest.raises(StudyConflictError, match=f"digits.yaml: fingerprint .* is not that of study {NAME}"):
        study.create()


def test_create_or_resume_stopped_study_goes_on(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    study.ledger.stop(NAME, "2 trials in a row failed")

    study.create()

    assert study.ledger.study(NAME).stop_reason is None


def test_create_or_resume_grid_is_not_exceeded(make: Callable[..., TinyStudy]) -> None:
    space = {"box": [0.05, 0.1], "cls": [0.5, 1.0]}
    study = make(space=space, sampler="grid", trials=3)

    with pytest.raises(StudyConfigError, match="trials: got 5; allowed: 1 to 4"):
        study.create(more_trials=2)
    study.create()
    study.create(more_trials=1)
    with pytest.raises(StudyConfigError, match="trials: got 5; allowed: 1 to 4"):
        study.create(more_trials=1)

    assert len(study.tickets()) == 4


def test_create_or_resume_two_studies_in_one_database_stay_apart(
    make: Callable[..., TinyStudy], tmp_path: Path
) -> None:
    first = make("first", storage_url=f"sqlite:///{tmp_path}/both.db")
    first.create()
    first.write(name="other", trials=2)

    create_or_resume(plan_study(first.config, first.storage_url, first.runs))

    assert [ticket.number for ticket in first.ledger.tickets("other")] == [0, 1]
    assert [ticket.number for ticket in first.tickets()] == [0, 1, 2]


def test_create_or_resume_on_postgresql(make: Callable[..., TinyStudy], postgres_url: str) -> None:
    study = make(storage_url=postgres_url)

    assert [study.create(), study.create(1)] == [True, False]

    assert len(study.tickets()) == 4
    assert len(study.optuna_trials()) == 1
