"""From a study file to a study in the database."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from optuna.trial import TrialState
from tiny import NAME, TinyStudy, make_study

from search.config import StudyConfig
from search.errors import StudyConfigError, StudyConflictError, UserInputError
from search.export import best_trial
from search.launch.prepare import create_or_resume, plan_study
from search.ledger import TicketState
from search.prepared import Prepared
from search.report import study_status
from yolocore.checkpoint import load_weights, save_weights
from yolocore.model import ANCHORS_KEY, initial_state


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


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"train": {"freeze": 10}}, "train.freeze: without train.weights the frozen layers keep random weights"),
        (
            {"train": {"compile": "cudagraphs", "device": "auto"}},
            "train.compile 'cudagraphs' on cpu: allowed: none, inductor",
        ),
        (
            {"train": {"epochs": 9, "patience": 8}},
            "train.patience: a trial that ends early counts with its last epoch, 8",
        ),
        (
            {"train": {"epochs": 400}, "pruner": {"name": "median", "min_epochs": 2}},
            "pruner: its first decision is after 2 epochs, inside the warm-up, which takes",
        ),
    ],
)
def test_plan_study_settings_that_surprise_are_told(
    make: Callable[..., TinyStudy], changes: dict[str, Any], start: str
) -> None:
    study = make(**changes)
    usual = make("usual", train={"epochs": 9}, objective={"metric": "fitness", "at": "best"})

    notices = plan_study(study.config, study.storage_url, study.runs).notices

    assert any(notice.startswith(start) for notice in notices)
    assert not any(
        notice.startswith(start) for notice in plan_study(usual.config, usual.storage_url, usual.runs).notices
    )


@pytest.mark.parametrize(("epochs", "surer"), [(300, 100), (80, 40), (10, 5)])
def test_plan_study_pruner_inside_the_warm_up_says_what_is_surer(
    make: Callable[..., TinyStudy], epochs: int, surer: int
) -> None:
    study = make(train={"epochs": epochs, "batch_size": 8}, pruner={"name": "median", "min_epochs": 2})

    notices = plan_study(study.config, study.storage_url, study.runs).notices

    (line,) = [notice for notice in notices if notice.startswith("pruner: ")]
    assert "which takes 50 here" in line
    assert line.endswith(f"`min_epochs: {surer}` is surer")


def test_plan_study_image_weights_train_one_trial_at_a_time(make: Callable[..., TinyStudy]) -> None:
    study = make(train={"image_weights": True})

    plan = plan_study(study.config, study.storage_url, study.runs)

    assert plan.pack == 1
    assert any(notice.startswith("train.image_weights: which images") for notice in plan.notices)


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


def misfit(make: Callable[..., TinyStudy], folder: str = "study", **train: Any) -> TinyStudy:
    """A study whose `anchor_t` is so strict that no usual anchor fits its labels."""
    settings = {"epochs": 1, "image_size": 64, **train}
    return make(folder, trials=1, train=settings, base_hyp={"mosaic": 0, "anchor_t": 1.3}, tracked=True)


def test_create_or_resume_anchors_that_do_not_fit_are_replaced_once_for_all_trials(
    make: Callable[..., TinyStudy], caplog: pytest.LogCaptureFixture
) -> None:
    study = misfit(make)
    study.create()
    stored = study.ledger.study(NAME).config
    found = Prepared.of(stored).autoanchor
    assert found is not None
    assert (found.outcome, found.after.bpr > found.before.bpr) == ("replaced", True)
    assert f"study {NAME}: anchors replaced: best possible recall {found.before.bpr:.4f}" in caplog.text

    assert study.create() is False
    assert study.ledger.study(NAME).config == stored
    study.work()

    weights = load_weights(study.weights(0)[0])
    pixels = weights[ANCHORS_KEY] * torch.tensor([8.0, 16.0, 32.0]).view(3, 1, 1)
    torch.testing.assert_close(pixels, torch.tensor(found.anchors), rtol=0, atol=1e-4)
    assert study.mlflow_runs()["summary"].data.params["prepared.autoanchor.outcome"] == "replaced"
    assert best_trial(study.ledger, study.config).anchors == found.describe()
    status = study_status(study.ledger, study.config)
    assert status.prepared.rows() == [("anchors", found.describe())]
    assert status.to_json()["prepared"]["autoanchor"]["labels"] == found.labels


def test_create_or_resume_autoanchor_is_a_function_of_the_seed_and_can_be_switched_off(
    make: Callable[..., TinyStudy],
) -> None:
    found = []
    for folder, train in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("off", {"autoanchor": False})):
        study = misfit(make, folder, **train)
        study.create()
        found.append(Prepared.of(study.ledger.study(NAME).config).autoanchor)
    assert found[0] == found[1] != found[2]
    assert found[3] is None


def test_plan_study_with_weights_counts_what_fits_and_takes_their_anchors(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=1)
    file = study.folder / "start.safetensors"
    own = torch.full((3, 3, 2), 20.0) * torch.arange(1, 4).view(3, 1, 1)
    save_weights(file, initial_state("n", 80, 0, own))
    study.write(train={"weights": str(file)})

    plan = plan_study(study.config, study.storage_url, study.runs)

    assert plan.transferred == "343/349"
    assert ("model", f"yolov5n, 64 px, batch 8, 2 epochs, from {file} (343/349 tensors transferred)") in plan.rows()
    assert torch.equal(torch.tensor(plan.anchors), own)


def test_plan_study_with_one_class_does_not_search_what_does_nothing(make: Callable[..., TinyStudy]) -> None:
    space = {"box": "default", "cls": "default", "cls_pw": "per_class", "obj": "default"}
    study = make(space=space, train={"single_cls": True})

    plan = plan_study(study.config, study.storage_url, study.runs)

    assert list(plan.config.space) == ["box", "obj"]
    assert "space: cls, cls_pw_power would do nothing with one class, so not searched" in plan.notices
    assert create_or_resume(plan) is True
    assert study.tickets()[0].fixed_params == {"box": 0.05, "obj": 1.0}
    assert create_or_resume(plan_study(study.config, study.storage_url, study.runs)) is False


def test_plan_study_with_one_class_and_nothing_else_to_search_is_refused(make: Callable[..., TinyStudy]) -> None:
    study = make(space=["cls", "cls_pw"], train={"single_cls": True})

    with pytest.raises(StudyConfigError, match="space: cls, cls_pw: nothing in it has an effect on this data; "):
        plan_study(study.config, study.storage_url, study.runs)


def test_create_or_resume_study_of_a_version_that_searched_idle_keys(make: Callable[..., TinyStudy]) -> None:
    study = make(train={"single_cls": True})
    plan = plan_study(study.config, study.storage_url, study.runs)
    assert list(plan.config.space) == ["box"]
    create_or_resume(dataclasses.replace(plan, config=plan.given))

    assert create_or_resume(plan) is False


def test_create_or_resume_stores_what_the_space_needs_of_the_data(make: Callable[..., TinyStudy]) -> None:
    focal = {"low": 0.3, "high": 2.0, "off": 0.5, "compensate": True}
    study = make(space={"fl_gamma": focal, "cls_pw": "per_class"})
    labels = [line.split()[0] for path in (study.data.parent / "labels" / "train").iterdir() for line in path.open()]
    study.create()

    facts = StudyConfig.from_json(study.ledger.study(NAME).config).facts

    assert facts is not None
    assert facts.class_counts == (labels.count("0"), labels.count("1"))
    assert [level.cells for level in facts.levels] == [192, 48, 12]
    assert sum(count for level in facts.levels for count, _ in level.matched) > 3 * len(labels) / 16
    assert Prepared.of(study.ledger.study(NAME).config).facts == facts
    plain = make("plain")
    plain.create()
    assert Prepared.of(plain.ledger.study(NAME).config).facts is None


def sparse(make: Callable[..., TinyStudy], high: float, **options: Any) -> TinyStudy:
    """A study whose images show little but background, with default ranges and compensated gains."""
    focal = {"low": 0.3, "high": high, "off": 0.5, "compensate": True}
    study = make(space={"obj": "default", "cls": "default", "obj_pw": "default", "fl_gamma": focal}, **options)
    for number, path in enumerate(sorted((study.data.parent / "labels" / "train").iterdir())):
        path.write_text("0 0.5 0.5 0.2 0.2\n" if number == 0 else "")
    return study


def test_plan_study_compensated_gain_beyond_its_limits_is_refused_with_what_helps(
    make: Callable[..., TinyStudy],
) -> None:
    study = sparse(make, 4.0)

    with pytest.raises(StudyConfigError) as caught:
        plan_study(study.config, study.storage_url, study.runs)

    message = str(caught.value)
    assert message.startswith(f"study {NAME}: space.fl_gamma.high: got 4, with which the compensated gain obj reaches ")
    found = re.search(r"beyond 1000; allowed: at most ([0-9.]+), or narrower ranges of obj, obj_pw, or no", message)
    assert found is not None
    assert sparse(make, float(found[1]), folder="helped").create() is True


def test_plan_study_compensated_gain_of_a_study_that_exists_is_a_notice(make: Callable[..., TinyStudy]) -> None:
    study = sparse(make, 1.0)
    study.create()
    assert not any("compensated" in line for line in plan_study(study.config, study.storage_url, study.runs).notices)
    wide = study.config.to_json()["space"]
    wide["fl_gamma"]["high"] = 4.0
    study.ledger.update_config(NAME, {"space": wide})  # as a version made it that did not look
    study.write(space=yaml.safe_load(study.file.read_text())["space"] | {"fl_gamma": strip(wide["fl_gamma"])})

    plan = plan_study(study.config, study.storage_url, study.runs)

    assert any("compensated gain obj reaches" in line and "beyond that fail" in line for line in plan.notices)
    assert create_or_resume(plan) is False


def strip(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value not in (None, False)}


@pytest.mark.parametrize(
    ("space", "sampler", "told"),
    [
        ({"low": 0, "high": 2}, "random", "`fl_gamma: {low: 0.3, high: 2, off: 0.5}` searches off and on apart"),
        ({"low": 0, "high": 0.4}, "gp", "{low: 0.2, high: 0.4, off: 0.5}` with sampler tpe searches off and on apart"),
        ({"low": 0.3, "high": 2, "off": 0.5}, "random", None),
        ([0, 1, 2], "random", None),
    ],
)
def test_plan_study_focal_range_that_touches_0_is_told(
    make: Callable[..., TinyStudy], space: object, sampler: str, told: str | None
) -> None:
    study = make(space={"fl_gamma": space}, sampler=sampler)

    notices = plan_study(study.config, study.storage_url, study.runs).notices

    about = [line for line in notices if line.startswith("space.fl_gamma: its range touches 0, where the loss jumps")]
    assert len(about) == (told is not None)
    assert told is None or told in about[0]


def test_plan_study_stop_below_noise_without_noise_is_refused_as_creating_it_is(
    make: Callable[..., TinyStudy],
) -> None:
    study = make(stop={"below_noise": True})

    with pytest.raises(UserInputError) as caught:
        plan_study(study.config, study.storage_url, study.runs)

    message = str(caught.value)
    assert (
        "with noise: {seeds: 3 or more} in the study file, or after `yolosearch noise STUDY.yaml --seeds 3`" in message
    )
    plan = plan_study(study.config, study.storage_url, study.runs, noise_seeds=3)
    assert create_or_resume(plan) is True
    # It exists now, and its noise is still to be measured.
    with pytest.raises(UserInputError, match=f"or after `yolosearch noise {NAME} --seeds 3`$"):
        plan_study(study.config, study.storage_url, study.runs)


def test_plan_study_of_one_objective_forecasts_a_confirmation_too(make: Callable[..., TinyStudy]) -> None:
    rows = {}
    for folder, changes in (("one", {"trials": 9}), ("two", {"trials": 9, "objectives": ["fitness", "map50"]})):
        study = make(folder, **changes, **({"pruner": None} if folder == "two" else {}))
        rows[folder] = dict(plan_study(study.config, study.storage_url, study.runs).rows())

    assert rows["one"]["then confirm"] == "20 more trainings for `yolosearch confirm STUDY --top 3 --seeds 5`"
    assert "then confirm" not in rows["two"]
