"""Other tools' results and other studies, brought into a study: what is kept, changed and left out, and said so."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from tiny import NAME, TinyStudy, make_study

from search.config import StudyConfig, parse_study
from search.errors import UserInputError
from search.importers import (
    Candidate,
    Found,
    OtherStudy,
    differences,
    fit,
    import_candidates,
    import_study,
    read_candidates,
)
from search.ledger import TicketState
from search.study import add_prior, ask, load_study, open_storage, tell
from search.transforms import hyperparameters
from yolocore.hyperparameters import HYPERPARAMETER_KEYS, Hyperparameters

FIXTURES = os.environ.get("YOLOSEARCH_FIXTURES")
TUNE = """\
fitness,lr0,lrf,momentum,weight_decay,warmup_epochs,warmup_momentum,box,cls,dfl,hsv_h,scale,mosaic,bgr
0.41,0.01,0.01,0.937,0.0005,3.0,0.8,7.5,0.5,1.5,0.015,0.5,1.0,0.0
0.47,0.02,0.012,0.91,0.0004,2.5,0.7,6.9,0.6,1.7,0.02,0.6,0.9,0.0
0.47,0.03,0.012,0.91,0.0004,2.5,0.7,6.9,0.6,1.7,0.02,0.7,0.9,0.0
"""


@pytest.fixture
def golden() -> Path:
    if FIXTURES is None:
        pytest.skip("needs YOLOSEARCH_FIXTURES")
    return Path(FIXTURES) / "golden"


def study(space: Any = None, **changes: Any) -> StudyConfig:
    data = {"name": "s", "data": "builtin:digits", "trials": 2, **changes}
    return parse_study({**data, **({} if space is None else {"space": space})}, source="study.yaml")


def write(folder: Path, text: str) -> Path:
    path = folder / "some.file"
    path.write_text(text)
    return path


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["noautoanchor", "with_anchors"])
def test_read_candidates_evolve_csv_is_ordered_by_fitness_and_its_best_is_hyp_evolve(golden: Path, name: str) -> None:
    found = read_candidates(golden / f"sample_evolve_{name}.csv")
    best = read_candidates(golden / f"sample_evolve_{name}_hyp_evolve.yaml")

    assert (found.format, best.format) == ("evolve.csv", "hyp YAML")
    assert set(found.candidates[0].values) == set(HYPERPARAMETER_KEYS)
    fitness = [candidate.fitness or 0.0 for candidate in found.candidates]
    assert fitness == sorted(fitness, reverse=True)
    assert found.candidates[0].values == best.candidates[0].values
    left_out = "anchors left out: with this key YOLOv5 throws the model's anchors away"
    assert (left_out in found.notes) == (left_out in best.notes) == (name == "with_anchors")
    assert ("no hyp keys" in " ".join(found.notes)) is False


def test_read_candidates_hyp_yaml_is_one_candidate(golden: Path) -> None:
    found = read_candidates(golden / "sample_hyp.yaml")

    assert (found.format, len(found.candidates), found.notes) == ("hyp YAML", 1, ())
    assert Hyperparameters.from_mapping(found.candidates[0].values, "sample") == Hyperparameters()


def test_read_candidates_opt_yaml_names_or_holds_the_hyp(golden: Path, tmp_path: Path) -> None:
    sample = read_candidates(golden / "sample_opt.yaml").candidates[0]
    assert Hyperparameters.from_mapping(sample.values, "sample") == Hyperparameters()
    named = write(tmp_path, yaml.safe_dump({"weights": "a.pt", "hyp": "hyp.yaml"}))
    with pytest.raises(UserInputError, match=r"holds no hyp keys \(it names .hyp\.yaml.: import that\); allowed: "):
        read_candidates(named)
    nested = write(tmp_path, yaml.safe_dump({"weights": "a.pt", "hyp": {"box": 0.07, "lr0": 0.02}}))
    assert read_candidates(nested).candidates[0].values == {"box": 0.07, "lr0": 0.02}


@pytest.mark.parametrize("name", ["sample_results.csv", "sample_results_from_trace20.csv"])
def test_read_candidates_results_of_one_training_are_refused(golden: Path, name: str) -> None:
    with pytest.raises(UserInputError, match=rf"{name}:1: the results of one training, without hyperparameters"):
        read_candidates(golden / name)


def test_read_candidates_tune_results_carry_over_what_means_the_same(tmp_path: Path) -> None:
    found = read_candidates(write(tmp_path, TUNE))

    assert found.format == "tune_results.csv"
    assert [candidate.values["lr0"] for candidate in found.candidates] == [0.02, 0.03, 0.01]
    assert {"box", "cls", "dfl"} & set(found.candidates[0].values) == set()
    notes = "\n".join(found.notes)
    assert "not carried over: box: a gain of another box loss" in notes
    assert "dfl: YOLOv5 has no distribution focal loss" in notes
    assert "no hyp keys: bgr" in notes


def test_read_candidates_ultralytics_yaml_is_told_by_its_dfl(tmp_path: Path) -> None:
    found = read_candidates(write(tmp_path, "box: 7.5\ncls: 0.5\ndfl: 1.5\nlr0: 0.02\n"))

    assert (found.format, found.candidates[0].values) == ("Ultralytics YAML", {"lr0": 0.02})
    with pytest.raises(UserInputError, match="has lr0; allowed: keys that the study searches"):
        fit(study(["box", "obj"]), found.candidates[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no hyp keys; allowed: a hyp YAML"),
        ("box: [1\n", r":2: neither YAML nor a table; allowed"),
        ("- box\n", "holds no hyp keys"),
        ("box: much\n", "box: got 'much'; allowed: a number"),
        ("box: .nan\n", "box: got nan; allowed: a number"),
        ("a,b\n1,2\n", r":1: an unknown table \(columns a, b, ...\); allowed"),
        (TUNE + "0.5,0.1\n", r":5: 2 values; allowed: 14, as many as names in line 1"),
        (TUNE.replace("0.015", "x"), r":2: hsv_h: got 'x'; allowed: a number"),
        (TUNE.splitlines()[0], "no rows below the names"),
        (TUNE.replace("lrf", "lr0", 1), r":1: column 'lr0' stands twice"),
    ],
)
def test_read_candidates_broken_file_gives_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserInputError, match=message) as caught:
        read_candidates(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


def test_read_candidates_no_file_or_no_text_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match="cannot be read: No such file"):
        read_candidates(tmp_path / "none.yaml")
    (tmp_path / "image").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserInputError, match="not a text file"):
        read_candidates(tmp_path / "image")


# ---- fitting ---------------------------------------------------------------------------------------------------------


def test_fit_names_what_it_moves_and_what_it_leaves(golden: Path) -> None:
    best = read_candidates(golden / "sample_evolve_noautoanchor_hyp_evolve.yaml").candidates[0]
    config = study({"box": [0.05, 0.1], "cls_pw": {"low": 0.5, "high": 1.25}, "momentum": None, "fl_gamma": None})

    fitted = fit(config, best)

    assert fitted.params == {"box": 0.05, "cls_pw": 1.25, "momentum": 0.98, "fl_gamma.switch": 0.25}
    notes = "\n".join(fitted.notes)
    assert "momentum 1.1867 is outside what YOLOv5 can use: 0.9999" in notes
    assert "cls_pw 1.3519 is outside the study's range (0.5 to 1.25): 1.25" in notes
    assert "box 0.061578 is outside the study's range (one of 0.05, 0.1): 0.05" in notes
    assert "not searched here, so left as in the base: lr0 0.013175 (here 0.01)" in notes
    assert "iou_t" not in notes


def test_fit_into_ratios_and_a_switch_gives_the_raw_values_back() -> None:
    config = study(["box", "cls", "obj", "fl_gamma"], parametrisation="ratios")
    values = {"box": 0.061578, "cls": 0.33396, "obj": 0.79317, "fl_gamma": 1.5}

    fitted = fit(config, Candidate(source="hyp.yaml", values=values))

    hyp = hyperparameters(config, fitted.params)
    assert fitted.notes == ()
    assert {key: getattr(hyp, key) for key in values} == values


# ---- into a study ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda folder="study", **options: make_study(tmp_path / folder, shared, **options)


def candidates(*boxes: float) -> Found:
    found = [Candidate(source=f"row {index}", values={"box": box}) for index, box in enumerate(boxes)]
    return Found(format="hyp YAML", candidates=tuple(found))


def frozen(study: TinyStudy) -> StudyConfig:
    return StudyConfig.from_json(study.ledger.study(NAME).config)


def test_import_candidates_takes_untouched_trials_of_the_budget_and_keeps_its_size(
    make: Callable[..., TinyStudy],
) -> None:
    study = make(trials=4)
    study.create()
    claimed = study.ledger.claim(NAME, "w", 2, 60.0)
    study.ledger.hand_back(claimed[1:])

    done = import_candidates(study.ledger, frozen(study), "f", candidates(0.1, 0.05, 0.1, 0.15, 0.12), top=4)

    tickets = study.tickets()
    assert [ticket.number for ticket in tickets] == [0, 1, 2, 3]
    assert [ticket.fixed_params for ticket in tickets[1:]] == [
        None,
        {"box": 0.1, "cls": 0.5},
        {"box": 0.15, "cls": 0.5},
    ]
    assert done.queued == {2: "row 0", 3: "row 3"}
    assert "row 1: the study has this trial already" in done.notes  # the base
    assert "row 2: the study has this trial already" in done.notes  # row 0
    assert "1 left out: no trial of the budget is untouched; --trials +1 adds as many" in done.notes
    again = import_candidates(study.ledger, frozen(study), "f", candidates(0.1), top=4)
    assert again.queued == {}


def test_import_candidates_into_a_grid_is_refused(make: Callable[..., TinyStudy]) -> None:
    study = make(sampler="grid", space={"box": [0.05, 0.1], "cls": [0.5, 0.7]}, trials=2)
    study.create()

    with pytest.raises(UserInputError, match="sampler grid has its own points; allowed: another sampler"):
        import_candidates(study.ledger, frozen(study), "f", candidates(0.1), top=1)


def finish(study: TinyStudy, values: dict[float, float]) -> OtherStudy:
    """Trials of these box gains, complete with these values."""
    study.create()
    ledger = study.ledger
    ledger.add_tickets(NAME, len(values), fixed_params=[{"box": box, "cls": 0.7} for box in values])
    loaded = load_study(frozen(study), open_storage(study.storage_url))
    for ticket in ledger.claim(NAME, "w", 99, 600.0):
        if ticket.fixed_params is not None and ticket.number > 0:
            trial = ask(loaded, frozen(study), ticket.number, (), ticket.fixed_params)
            linked = ledger.link_trial(ticket, trial.trial_id, trial.number, trial.params)
            ledger.record_epoch(linked, 0, values[trial.params["box"]], {"fitness": 0.1}, time.time())
            ledger.finish(linked, TicketState.COMPLETE, values[trial.params["box"]], None, 0)
    return OtherStudy(record=ledger.study(NAME), config=frozen(study), tickets=ledger.tickets(NAME))


def test_import_study_comparable_trials_are_known_to_the_sampler_and_to_nobody_else(
    make: Callable[..., TinyStudy],
) -> None:
    other = finish(
        make("other"), {0.12: 0.5, 0.13: 0.6, 0.19: 0.1, 0.0205: 0.05} | {0.03 + i / 500: 0.1 for i in range(9)}
    )
    study = make(space={"box": {"low": 0.02, "high": 0.15, "log": True}, "cls": "default"}, sampler="tpe", trials=6)
    study.create()
    config, storage = frozen(study), open_storage(study.storage_url)
    optuna_study = load_study(config, storage)
    plain = ask(optuna_study, config, 3, linked=())

    other = replace(other, record=replace(other.record, fingerprint=study.ledger.study(NAME).fingerprint))
    done = import_study(study.ledger, config, other, 5, lambda trials: add_prior(optuna_study, config, trials))

    assert (done.known, done.queued) == (12, {})
    assert done.notes == (
        "study tiny trial 5 left out: box 0.19 is outside the study's range (0.02 to 0.15, logarithmic): 0.15",
    )
    assert [ticket.fixed_params is None for ticket in study.tickets()] == [False, *[True] * 5]
    assert len(optuna_study.get_trials()) == 2
    assert import_study(study.ledger, config, other, 5, lambda t: add_prior(optuna_study, config, t)).known == 0
    # Ten random trials come first; with the imported ones TPE proposes from its model at once.
    boxes = []
    for number in range(10, 20):
        asked = ask(optuna_study, config, number, linked=range(99))
        tell(optuna_study, asked.trial_id, "FAIL")  # TPE keeps away from those that run
        boxes.append(asked.params["box"])
    assert plain.params["box"] not in boxes
    assert sum(box > 0.1 for box in boxes) >= 6, boxes  # two of ten by chance
    assert [trial.number for trial in optuna_study.get_trials()] == list(range(12))


def test_add_prior_of_several_objectives_is_refused() -> None:
    several = optuna.create_study(directions=["maximize", "maximize"])

    with pytest.raises(UserInputError, match="study s: has several objectives; allowed here: a study of one"):
        add_prior(several, study(["box"]), [({"box": 0.1}, 0.5)])


def test_import_study_of_other_training_is_tried_again(make: Callable[..., TinyStudy]) -> None:
    other = finish(make("other", trials=1, train={"epochs": 7}), {0.12: 0.5, 0.13: 0.6, 0.14: 0.2})
    study = make(trials=6)
    study.create()

    def tell_sampler(trials: object) -> int:
        raise AssertionError(trials)

    done = import_study(study.ledger, frozen(study), other, 2, tell_sampler)

    assert differences(frozen(study), "other data", other) == ("data", "train.epochs")
    assert done.notes[0].startswith("its values do not count here, where ")
    assert [study.tickets()[number].fixed_params for number in done.queued] == [
        {"box": 0.13, "cls": 0.7},
        {"box": 0.12, "cls": 0.7},
    ]
