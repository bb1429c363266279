"""Study files: what is read, what is refused, and in which words."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from search.config import (
    STUDY_WIDE_KEYS,
    StudyConfig,
    check_objective,
    load_study_config,
    objective_value,
    objective_values,
    parse_study,
    require_resumable,
    shared_keys,
)
from search.errors import StudyConfigError, StudyConflictError
from yolocore.hyperparameters import HYPERPARAMETER_KEYS

STUDIES = Path(__file__).parents[2] / "studies"

GOOD = """\
name: blood
data: data.yaml
train:
  epochs: 30
space:
  box: {low: 0.02, high: 0.2, log: true}
  cls: [0.3, 0.5]
trials: 12
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a data set YAML and a hyp YAML."""
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    (tmp_path / "hyp.yaml").write_text("box: 0.1\n")
    (tmp_path / "bad.yaml").write_text("box: much\n")
    return tmp_path


def load(folder: Path, text: str) -> StudyConfig:
    path = folder / "study.yaml"
    path.write_text(text)
    return load_study_config(path)


def study(**changes: Any) -> StudyConfig:
    return parse_study({**yaml.safe_load(GOOD), **changes}, source="study")


def test_load_study_config_minimal_file_gives_the_documented_defaults(folder: Path) -> None:
    config = load(folder, GOOD)

    assert (config.name, config.trials, config.timeout, config.max_failures_in_a_row) == ("blood", 12, None, 5)
    assert (config.train.model, config.train.pack, config.train.image_size, config.train.seed) == ("n", "auto", 640, 0)
    assert config.sampler.model_dump() == {
        "name": "tpe",
        "seed": 0,
        "n_startup_trials": 10,
        "n_ei_candidates": 24,
        "multivariate": True,
        "constant_liar": True,
    }
    assert config.pruner.model_dump() == {
        "name": "median",
        "min_epochs": 6,
        "n_startup_trials": 4,
        "n_min_trials": 1,
    }
    assert config.objective.describe() == "fitness at the last epoch"
    assert config.tracking.enabled


def test_load_study_config_relative_paths_start_at_the_files_folder(folder: Path) -> None:
    (folder / "yolov5n.pt").write_bytes(b"")
    text = GOOD.replace("train:\n", "base_hyp: hyp.yaml\ntrain:\n  weights: ./yolov5n.pt\n")

    config = load(folder, text)

    assert config.data_path(Path("runs")) == folder.resolve() / "data.yaml"
    assert config.train.weights == folder.resolve() / "yolov5n.pt"
    assert config.base_hyperparameters().box == 0.1


def test_load_study_config_exponent_without_a_dot_is_a_number(folder: Path) -> None:
    config = load(folder, GOOD.replace("low: 0.02", "low: 2e-2").replace("train:", "base_hyp: {lr0: 1e-3}\ntrain:"))

    assert config.space["box"].low == 0.02
    assert config.base_hyperparameters().lr0 == 0.001


BROKEN = [
    # what to replace, by what, line in the file, key, value, allowed
    ("epochs: 30", "epoch: 30", 4, "train.epoch", "unknown key (value 30), did you mean epochs?", "model, weights, "),
    ("epochs: 30", "epochs: 0", 4, "train.epochs", "got 0", "a whole number >= 1"),
    ("epochs: 30", "epochs: yes", 4, "train.epochs", "got true", "a whole number >= 1"),
    ("epochs: 30", "image_size: 100", 4, "train.image_size", "got 100", "a multiple of 32"),
    ("epochs: 30", "model: yolov5n", 4, "train.model", 'got "yolov5n"', "one of n, s, m, l, x"),
    ("epochs: 30", "device: gpu", 4, "train.device", 'got "gpu"', "auto, cpu, cuda, cuda:N"),
    ("epochs: 30", "freeze: 25", 4, "train.freeze", "got 25", ">= 0 and <= 24"),
    ("epochs: 30", "workers: -1", 4, "train.workers", "got -1", "auto, or a whole number >= 0"),
    ("epochs: 30", "workers: many", 4, "train.workers", 'got "many"', "auto, or a whole number >= 0"),
    ("epochs: 30", "compile: yes", 4, "train.compile", "got true", "one of none, inductor, cudagraphs"),
    ("epochs: 30", "compile: inductor\n  multi_scale: true", 4, "train.compile", "got inductor", "one of the two"),
    ("epochs: 30", "rect: 1", 4, "train.rect", "got 1", "true or false"),
    ("epochs: 30", "weights: no.pt", 4, "train.weights", "no.pt", "an existing .pt or .safetensors file"),
    ("epochs: 30", "eval_every: 101", 4, "train.eval_every", "got 101", "1 to train.epochs (100)"),
    ("name: blood", "name: ../up", 1, "name", 'got "../up"', "1 to 100 letters, digits"),
    ("data: data.yaml", "data: no.yaml", 2, "data", "no.yaml", "a data set YAML, or builtin:digits"),
    ("data: data.yaml", "data: builtin:cats", 2, "data", "builtin:cats", "builtin:digits"),
    ("data: data.yaml", "dat: data.yaml", 2, "dat", "did you mean data?", "name, data, train"),
    (
        "{low: 0.02, high: 0.2, log: true}",
        "{low: 0.06, high: 0.2}",
        6,
        "space.box",
        "base value 0.05",
        "widen space.box",
    ),
    ("{low: 0.02, high: 0.2, log: true}", "{low: 0.2, high: 0.02}", 6, "space.box", "low 0.2, high 0.02", "low < high"),
    ("{low: 0.02, high: 0.2, log: true}", "{low: 0.02}", 6, "space.box", "high missing", "low and high, or choices"),
    (
        "{low: 0.02, high: 0.2, log: true}",
        "{low: 0.01, high: 0.1, step: 0.04}",
        6,
        "space.box.step",
        "got 0.04",
        "0.09",
    ),
    ("low: 0.02", "low: few", 6, "space.box.low", 'got "few"', "a number"),
    ("low: 0.02", "low: .nan", 6, "space.box.low", "got NaN", "a number"),
    ("low: 0.02", "low: -1", 6, "space.box.low", "got -1", "1e-06 to 1000"),
    ("box:", "bxo:", 6, "space.bxo", "unknown hyp key, did you mean box?", "lr0, lrf"),
    ("box:", "cls:", 7, "space.cls", "stands twice, in lines 6 and 7", "each key once"),
    ("cls: [0.3, 0.5]", "iou_t: [0.1, 0.2]", 7, "space.iou_t", "does nothing", "a hyp key that has an effect"),
    ("cls: [0.3, 0.5]", "cls: [0.3, high]", 7, "space.cls.choices[1]", 'got "high"', "a number"),
    ("cls: [0.3, 0.5]", "cls: [0.3, 0.4]", 7, "space.cls", "base value 0.5 is not in one of 0.3, 0.4", "base_hyp.cls"),
    ("cls: [0.3, 0.5]", "cls: {choices: [0.3, 0.5], low: 0.1}", 7, "space.cls", "choices and low", "either choices"),
    ("cls: [0.3, 0.5]", "fl_gamma: {low: 0, high: 2, log: true}", 7, "space.fl_gamma.low", "got 0", "low > 0"),
    ("trials: 12", "trials: 0", 8, "trials", "got 0", "a whole number >= 1"),
    ("trials: 12", "trials: twelve", 8, "trials", 'got "twelve"', "a whole number >= 1"),
    ("trials: 12", "trials: 12\ntimeout: 2h", 9, "timeout", 'got "2h"', "a number > 0"),
    ("trials: 12", "trials: 12\nsampler: tpee", 9, "sampler.name", 'got "tpee", did you mean tpe?', "one of tpe, gp,"),
    ("trials: 12", "trials: 12\nsampler: {name: gp, popsize: 3}", 9, "sampler.popsize", "value 3", "name, seed"),
    (
        "trials: 12",
        "trials: 12\nsampler: grid",
        6,
        "space.box",
        "logarithmic has no end",
        "choices, or low, high and step",
    ),
    ("trials: 12", "trials: 12\nsampler: cmaes", 7, "space.cls", "choices", "another sampler"),
    ("trials: 12", "trials: 12\npruner: {name: asha, min_epochs: 30}", 9, "pruner.min_epochs", "got 30", "less than"),
    ("trials: 12", "trials: 12\npruner: {name: patient}", 9, "pruner.patience", "missing", "a whole number >= 1"),
    ("trials: 12", "trials: 12\npruner: threshold", 9, "pruner", "threshold without limits", "lower, upper or both"),
    ("trials: 12", "trials: 12\nobjective: fitnes", 9, "objective", "did you mean fitness?", "map50, map"),
    ("trials: 12", "trials: 12\nobjective: {map: -1}", 9, "objective.map", "got -1", "a number > 0"),
    ("trials: 12", "trials: 12\nbase_hyp: no.yaml", 9, "base_hyp", "no.yaml", "a hyp YAML, or a mapping"),
    ("trials: 12", "trials: 12\nbase_hyp: bad.yaml", 9, "base_hyp", "box is 'much'", "a number from 1e-06 to 1000"),
    ("trials: 12", "trials: 12\nbase_hyp: {obj: 2000}", 9, "base_hyp.obj", "got 2000", "a number from 1e-06 to 1000"),
    ("trials: 12", "trials: 12\nbase_hyp: {bx: 1}", 9, "base_hyp.bx", "did you mean box?", "lr0, lrf"),
    ("trials: 12", "trials: 12\ntracking: {experiment: ../../evil}", 9, "tracking.experiment", "evil", "between parts"),
    ("trials: 12", "trials: 12\ntracking: {experiment: a/../b}", 9, "tracking.experiment", "a/../b", "between parts"),
    ("trials: 12", "trials: 12\n7: 8", 9, "7", "YAML reads this key as int", "text"),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "found", "allowed"), BROKEN, ids=[row[1] for row in BROKEN])
def test_load_study_config_one_mistake_gives_one_line_with_file_key_value_and_allowed(
    folder: Path, old: str, new: str, line: int, key: str, found: str, allowed: str
) -> None:
    assert GOOD.count(old) == 1

    with pytest.raises(StudyConfigError) as caught:
        load(folder, GOOD.replace(old, new))

    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{folder / 'study.yaml'}:{line}: {key}: ")
    before, _, after = message.partition("; allowed: ")
    assert found in before
    assert allowed in after


@pytest.mark.parametrize("name", ["loss-weights", "Blutkörperchen 2", "/Users/ann@lab/cells", "a..b/.c", "x" * 250])
def test_load_study_config_experiment_of_any_harmless_name_is_taken(folder: Path, name: str) -> None:
    config = load(folder, GOOD + f"\ntracking: {{experiment: '{name}'}}\n")

    assert config.tracking.experiment == name


@pytest.mark.parametrize("name", ["", "..", "a//b", "a/", "..\\\\evil", "a\\nb", "x" * 251])
def test_load_study_config_experiment_that_is_no_folders_name_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(StudyConfigError, match="between parts that are neither empty nor all dots") as caught:
        load(folder, GOOD + f'\ntracking: {{experiment: "{name}"}}\n')

    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: blood\n\tdata: x\n", "study.yaml:2: not valid YAML: found character '\\t'"),
        ("name: [blood\n", "study.yaml:2: not valid YAML: "),
        ("name: a\nname: b\n", "study.yaml:2: name: stands twice, in lines 1 and 2; allowed: each key once"),
        ("- name: blood\n", "study.yaml: holds a list; allowed: a mapping"),
        ("", "study.yaml: holds nothing; allowed: a mapping"),
    ],
)
def test_load_study_config_not_a_mapping_names_file_and_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(StudyConfigError, match=re.escape(message)) as caught:
        load(folder, text)

    assert len(str(caught.value).splitlines()) == 1


def test_load_study_config_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(StudyConfigError, match=r"none\.yaml: no such study file; allowed: "):
        load_study_config(tmp_path / "none.yaml")


def test_load_study_config_several_mistakes_give_a_line_each(folder: Path) -> None:
    with pytest.raises(StudyConfigError) as caught:
        load(folder, GOOD.replace("trials: 12", "trials: -1").replace("epochs: 30", "epochs: soon"))

    assert [text.split(": ")[1] for text in str(caught.value).splitlines()] == ["train.epochs", "trials"]


@pytest.mark.parametrize(
    "extra",
    ["tracking: {uri: 'http://user:secret@host:5000'}", "storage: postgresql://user:secret@host/db"],
)
def test_load_study_config_password_is_refused_and_not_repeated(folder: Path, extra: str) -> None:
    with pytest.raises(StudyConfigError) as caught:
        load(folder, f"{GOOD}{extra}\n")

    assert "secret" not in str(caught.value)
    assert "host" in str(caught.value)


@pytest.mark.parametrize("name", ["quickstart.yaml", "loss-weights.yaml"])
def test_shipped_study_file_is_accepted(name: str) -> None:
    config = parse_study(yaml.safe_load((STUDIES / name).read_text()), source=name)

    assert config.trials >= 12
    assert {"box", "cls", "obj", "cls_pw", "obj_pw"} <= set(config.space)


def test_template_names_every_key_of_the_schema() -> None:
    text = (STUDIES / "loss-weights.yaml").read_text()
    fields = [*StudyConfig.model_fields, *type(study().train).model_fields, *type(study().tracking).model_fields]

    assert [name for name in fields if not re.search(rf"\b{name}\b", text)] == []


def test_study_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        study().trials = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("epochs", "every", "first"), [(100, 1, 20), (30, 1, 6), (12, 1, 3), (10, 1, 2), (30, 5, 10), (2, 1, 1)]
)
def test_pruner_without_min_epochs_starts_at_a_fifth_on_the_evaluated_grid(epochs: int, every: int, first: int) -> None:
    config = study(train={"epochs": epochs, "eval_every": every}, pruner="asha")

    assert config.pruner.model_dump()["min_epochs"] == first
    assert first in config.evaluated_epochs()


def test_pruner_left_out_of_a_study_too_short_is_none() -> None:
    assert study(train={"epochs": 5, "eval_every": 5}).pruner.name == "none"

    with pytest.raises(StudyConfigError, match="got 5; allowed: less than "):
        study(train={"epochs": 5, "eval_every": 5}, pruner="median")


def test_pruner_first_rung_off_the_evaluated_grid_is_refused() -> None:
    with pytest.raises(StudyConfigError, match=r"got 4; allowed: a multiple of train\.eval_every \(3\)"):
        study(train={"epochs": 30, "eval_every": 3}, pruner={"name": "asha", "min_epochs": 4})


def test_pruner_patient_hands_its_first_rung_to_the_wrapped_one() -> None:
    config = study(pruner={"name": "patient", "patience": 2, "min_epochs": 8, "wrapped": "asha"})

    assert config.pruner.model_dump()["wrapped"] == {"name": "asha", "min_epochs": 8, "reduction_factor": 3}


def test_evaluated_epochs_end_with_the_last() -> None:
    assert study(train={"epochs": 7, "eval_every": 3}).evaluated_epochs() == (3, 6, 7)
    assert study(train={"epochs": 6, "eval_every": 3}).evaluated_epochs() == (3, 6)


def test_grid_with_more_trials_than_combinations_is_refused() -> None:
    space = {"box": [0.05, 0.1], "obj": {"low": 0.5, "high": 1.5, "step": 0.5}}
    assert study(space=space, sampler="grid", trials=6).trials == 6

    with pytest.raises(StudyConfigError, match="trials: got 7; allowed: 1 to 6"):
        study(space=space, sampler="grid", trials=7)


@pytest.mark.parametrize(
    ("objective", "weights", "at"),
    [
        ("map50", {"map50": 1.0}, "last"),
        ({"metric": "recall", "at": "best"}, {"recall": 1.0}, "best"),
        ({"fitness": 0.7, "class_ap:Platelets": 0.3}, {"fitness": 0.7, "class_ap:Platelets": 0.3}, "last"),
        ({"fitness": 2, "at": "best"}, {"fitness": 2.0}, "best"),
    ],
)
def test_objective_short_forms(objective: Any, weights: dict[str, float], at: str) -> None:
    config = study(objective=objective)

    assert config.objective.weights == weights
    assert config.objective.at == at


def test_objective_value_is_the_weighted_sum() -> None:
    config = study(objective={"fitness": 0.7, "class_ap:Platelets": 0.3})
    metrics = {"fitness": 0.5, "map": 0.9, "class_ap/0": 0.1, "class_ap/2": 0.4}

    assert objective_value(config.objective, metrics, ["RBC", "WBC", "Platelets"]) == pytest.approx(0.47, abs=1e-12)
    assert objective_value(config.objective, {"fitness": 0.5}, ["Platelets"]) == pytest.approx(0.35, abs=1e-12)


def test_check_objective_class_with_single_cls_refused() -> None:
    with pytest.raises(
        StudyConfigError, match=r'objective: got "class_ap:RBC" with train\.single_cls; allowed: fitness'
    ):
        study(objective={"map": 0.5, "class_ap:RBC": 0.5}, train={"single_cls": True})


def test_check_objective_class_of_another_data_set_names_the_closest() -> None:
    config = study(objective="class_ap:Platelet")

    with pytest.raises(StudyConfigError, match=r"Platelet: no class of the data set, did you mean Platelets\?"):
        check_objective(config, ["RBC", "Platelets"])


def test_check_objective_class_without_validation_labels_is_refused() -> None:
    config = study(objective="class_ap:RBC")

    check_objective(config, ["RBC", "WBC"], labelled=[0])
    with pytest.raises(StudyConfigError, match=r"RBC: no labels in the validation split; allowed: .*\(WBC\)"):
        check_objective(config, ["RBC", "WBC"], labelled=[1])


def test_to_json_holds_the_whole_base_and_reads_back_without_files(folder: Path) -> None:
    config = load(folder, GOOD.replace("train:", "base_hyp: hyp.yaml\ntrain:"))
    frozen = config.to_json()
    (folder / "hyp.yaml").unlink()
    (folder / "data.yaml").unlink()

    again = StudyConfig.from_json(frozen)

    assert list(frozen["base_hyp"]) == list(HYPERPARAMETER_KEYS)
    assert again.base_hyperparameters().box == 0.1
    assert again.to_json() == frozen


def test_differing_keys_names_them_dotted() -> None:
    changed = study(trials=20, train={"epochs": 31}, space={"box": {"low": 0.03, "high": 0.2, "log": True}})

    keys = study().differing_keys(changed)

    assert set(keys) == {
        "trials",
        "train.epochs",
        "space.box.low",
        "pruner.min_epochs",
        *(f"space.cls.{part}" for part in ("choices", "log", "compensate")),
    }


def test_require_resumable_accepts_another_budget_only() -> None:
    require_resumable(study(), study(trials=40, timeout=60))

    with pytest.raises(StudyConflictError) as caught:
        require_resumable(study(), study(trials=40, objective="map"))

    budget = "noise.seeds, stop.below_noise, stop.hours, timeout, trials"
    only = f"allowed: changes of {budget} only, anything else is a study with another name"
    assert str(caught.value).splitlines() == [
        f"study blood: objective.weights.fitness: got null, the database has 1.0; {only}",
        f"study blood: objective.weights.map: got 1.0, the database has null; {only}",
    ]


def test_require_resumable_study_of_an_earlier_version_keeps_its_defaults_where_the_file_names_none() -> None:
    frozen = study(train={"epochs": 300, "pack": 4, "workers": 0}).to_json()
    for key in ("patience", "keep_weights", "autoanchor", "rect", "single_cls", "image_weights", "freeze", "freeze_bn"):
        del frozen["train"][key]

    stored = StudyConfig.from_json(frozen)

    assert (stored.train.pack, stored.train.workers, stored.train.patience) == (4, 0, 0)
    require_resumable(stored, study(train={"epochs": 300}))
    with pytest.raises(StudyConflictError, match=r"train\.pack: got 2, the database has 4"):
        require_resumable(stored, study(train={"epochs": 300, "pack": 2}))
    with pytest.raises(StudyConflictError, match=r'train\.pack: got "auto", the database has 2'):
        require_resumable(study(train={"pack": 2}), study())


def test_shared_keys_names_what_a_pack_cannot_vary() -> None:
    assert shared_keys(study()) == ()
    assert shared_keys(study(space={"box": [0.05, 0.1], "hsv_h": {"low": 0, "high": 0.1}})) == ("hsv_h",)


def test_train_config_carries_every_training_key(folder: Path) -> None:
    config = load(folder, GOOD.replace("epochs: 30", "epochs: 30\n  optimizer: AdamW\n  eval_every: 2\n  device: cpu"))

    train = config.train_config(folder / "data.yaml")

    expected = {**config.train.model_dump(exclude=set(STUDY_WIDE_KEYS)), "data": folder / "data.yaml"}
    assert {key: value for key, value in dataclasses.asdict(train).items() if key in expected} == expected


# ---- several objectives ----------------------------------------------------------------------------------------------

RANGES = {"box": {"low": 0.02, "high": 0.2}, "obj": {"low": 0.5, "high": 2.0}}


def test_parse_study_several_objectives_prune_nothing_and_the_first_leads() -> None:
    config = study(objectives=["map50", {"fitness": 0.7, "class_ap:a": 0.3}])

    assert [objective.name for objective in config.all_objectives] == ["map50", "0.7 fitness + 0.3 class_ap:a"]
    assert config.objective.name == "map50"
    assert config.pruner.name == "none"
    assert config.objective_text() == "map50 and 0.7 fitness + 0.3 class_ap:a at the last epoch"
    assert StudyConfig.from_json(config.to_json()).to_json() == config.to_json()
    assert study().objective_text() == "fitness at the last epoch"


def test_objective_values_are_those_of_each_objective() -> None:
    config = study(objectives=["map50", {"fitness": 0.5, "class_ap:a": 0.5}])

    assert objective_values(config, {"map50": 0.4, "fitness": 0.2, "class_ap/0": 0.6}, ["a"]) == (0.4, 0.4)
    assert objective_values(study(), {"map50": 0.4, "fitness": 0.2}, ["a"]) == ()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"pruner": "median", "objectives": ["fitness", "map50"]}, 'study: pruner.name: got "median" with several '),
        (
            {"sampler": "cmaes", "space": RANGES, "objectives": ["fitness", "map"]},
            'study: sampler.name: got "cmaes", which follows',
        ),
        ({"objectives": ["fitness"]}, "study: objectives: names one objective; allowed: two or more"),
        ({"objectives": ["fitness", "fitness"]}, "study: objectives: names one objective twice"),
        ({"objectives": ["fitness", "map5"]}, 'study: objectives[1]: unknown metric "map5", did you mean map50?'),
        ({"objectives": ["fitness", {"map": -1}]}, "study: objectives[1].map: got -1; allowed: a list of two or more"),
        ({"objectives": "fitness"}, 'study: objectives: got "fitness"; allowed: a list of two or more of fitness'),
        ({"objectives": ["fitness", {"metric": "map", "at": "best"}]}, "study: objectives[1]: got at: best"),
        ({"stop": {"below_noise": True}, "objectives": ["fitness", "map"]}, "study: stop.below_noise: got true with"),
        ({"objective": "map", "objectives": ["fitness", "map50"]}, "study: objective: stands beside objectives"),
    ],
)
def test_parse_study_objectives_that_do_not_go_are_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(StudyConfigError) as error:
        study(**changes)

    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_check_objective_looks_at_the_classes_of_all_objectives() -> None:
    config = study(objectives=["fitness", "class_ap:cat"])

    with pytest.raises(StudyConfigError, match="objectives: class_ap:cat: no class of the data set"):
        check_objective(config, ["dog"])


@pytest.mark.parametrize(
    ("base", "name"),
    [(None, "the defaults"), ({}, "the defaults"), ({"box": 0.05}, "the defaults"), ({"box": 0.06}, "the base")],
)
def test_base_name_is_the_defaults_where_the_base_is_the_preset_also_once_stored(base: Any, name: str) -> None:
    config = study(base_hyp=base)

    assert config.base_name == name
    assert StudyConfig.from_json(config.to_json()).base_name == name
