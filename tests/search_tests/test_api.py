"""The package as notebooks use it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from ledger_rows import NAME, claim, complete, make_ledger, report, study_config
from made_up import made_up_study
from tiny import make_study

from search import Study
from search.errors import SearchError, UnknownStudyError, UserInputError
from search.ledger import TicketState
from yolocore.hyperparameters import Hyperparameters

CONFIG = study_config(trials=6)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two complete trials, a pruned one, one that trains, two that wait."""
    ledger = make_ledger(tmp_path, CONFIG)
    tickets = claim(ledger, "w", 4)
    complete(ledger, tickets[0], [0.1, 0.2])
    complete(ledger, tickets[1], [0.3, 0.5, 0.4])
    report(ledger, tickets[2], [0.05])
    ledger.finish(tickets[2], TicketState.PRUNED, 0.05, None)
    report(ledger, tickets[3], [0.15, 0.25])
    return Study.open(NAME, runs_dir=tmp_path / "runs")


def test_import_search_is_light() -> None:
    script = (
        "import sys, search; assert not {'search.api', 'yaml', 'sqlalchemy', 'torch'} & {*sys.modules}; search.Study"
    )

    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_search_has_no_other_attribute() -> None:
    import search

    with pytest.raises(AttributeError, match="has no attribute 'Studies'"):
        search.Studies  # noqa: B018


def test_open_study_that_does_not_exist_names_what_is_allowed(study: Study) -> None:
    with pytest.raises(UnknownStudyError, match="no database"):
        Study.open("other", runs_dir=study.runs_dir)


def test_trials_has_a_row_for_each_with_parameters_and_metrics(study: Study) -> None:
    trials = study.trials()

    assert list(trials.index) == [0, 1, 2, 3, 4, 5]
    assert list(trials["state"]) == ["COMPLETE", "COMPLETE", "PRUNED", "RUNNING", "WAITING", "WAITING"]
    assert list(trials["epochs"]) == [2, 3, 1, 2, 0, 0]
    assert trials["value"].tolist()[:4] == [0.2, 0.4, 0.05, 0.25]
    assert trials["box"].isna().tolist() == [False] * 4 + [True] * 2
    assert trials["fitness"].tolist()[:4] == [0.2, 0.4, 0.05, 0.25]
    assert trials["seconds"].ge(0).tolist()[:4] == [True] * 4
    assert trials["value"].idxmax() == 1


def test_trials_metrics_are_those_of_the_epoch_that_counts(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path, CONFIG)
    (ticket,) = claim(ledger, "w", 1)
    report(ledger, ticket, [0.3, 0.5, 0.4])
    ledger.finish(ticket, TicketState.COMPLETE, 0.5, None, best_epoch=1)

    trials = Study.open(NAME, runs_dir=tmp_path / "runs").trials()

    assert (trials.loc[0, "value"], trials.loc[0, "fitness"]) == (0.5, 0.5)


def test_trials_and_curves_of_a_study_that_nobody_began_are_empty_tables(tmp_path: Path) -> None:
    make_ledger(tmp_path, CONFIG)
    study = Study.open(NAME, runs_dir=tmp_path / "runs")

    assert study.trials()["state"].tolist() == ["WAITING"] * 6
    assert list(study.curves().columns) == ["trial", "epoch", "value"]
    assert study.curves().empty


def test_curves_has_a_row_for_each_evaluated_epoch(study: Study) -> None:
    curves = study.curves()

    assert curves.groupby("trial").size().to_dict() == {0: 2, 1: 3, 2: 1, 3: 2}
    assert curves[curves["trial"] == 1]["epoch"].tolist() == [1, 2, 3]
    assert curves[curves["trial"] == 1]["value"].tolist() == [0.3, 0.5, 0.4]


def test_best_and_export_are_of_the_same_trial(study: Study, tmp_path: Path) -> None:
    path = study.export(tmp_path / "hyp.yaml")

    assert (study.best.trial_number, study.best.value) == (1, 0.4)
    assert Hyperparameters.from_yaml(path) == study.best.hyperparameters
    assert study.export() == study.runs_dir / NAME / "hyp.best.yaml"


def test_export_takes_what_the_command_takes(study: Study, tmp_path: Path) -> None:
    assert study.export(trial=0) == study.runs_dir / NAME / "hyp.best.yaml"
    assert "chosen by hand" in (study.runs_dir / NAME / "hyp.best.yaml").read_text()
    path = study.export(tmp_path / "best.json", format="json")
    assert json.loads(path.read_text())["trial"] == 1
    with pytest.raises(UserInputError, match=r"format: got 'yolov8'; allowed: yolov5, ultralytics, json"):
        study.export(format="yolov8")
    with pytest.raises(UserInputError, match=r"--pareto: it has one objective \(fitness\)"):
        study.export(pareto=1)
    with pytest.raises(UserInputError, match="no weights of trial 1 are in"):
        study.export(weights=tmp_path / "best.safetensors")


def test_plots_of_one_objective_have_no_front(study: Study) -> None:
    with pytest.raises(UserInputError, match=r"plot: got 'front' for a study of one objective; allowed: history"):
        study.plot_front()
    with pytest.raises(SearchError, match="nothing was confirmed yet"):
        study.plot_confirmation()


def test_study_of_several_objectives_has_a_front_a_report_and_exports(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recalls = {number: {"recall": recall} for number, recall in enumerate((0.4, 0.35, 0.45))}
    fates = [(TicketState.COMPLETE, value) for value in (0.40, 0.50, 0.41)]
    options = {"objectives": ["fitness", "recall"], "pruner": None, "figures": recalls}
    made = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates, **options)
    study = Study.open(made.config.name, runs_dir=made.runs)

    assert [trial.trial_number for trial in study.front] == [1, 2]
    assert [trace.name for trace in study.plot_front().data][-1] == "front"
    assert "2 of 3 complete trials are on the front" in study.report().read_text()
    paths = study.export(pareto="all")
    assert paths == {number: study.folder.pareto_hyp(number) for number in (1, 2)}
    assert study.export(tmp_path / "two.yaml", pareto=2) == tmp_path / "two.yaml"
    assert Hyperparameters.from_yaml(paths[2]) == Hyperparameters.from_yaml(tmp_path / "two.yaml")
    with pytest.raises(UserInputError, match="so no trial is the best"):
        study.export()
    with pytest.raises(UserInputError, match=r"allowed: front, classes, history, importance, parallel"):
        study.plot_curves()


def test_best_without_a_complete_trial_says_so(tmp_path: Path) -> None:
    make_ledger(tmp_path, CONFIG)

    with pytest.raises(UserInputError, match="none of 6 trials is complete"):
        _ = Study.open(NAME, runs_dir=tmp_path / "runs").best


def test_repr_and_snapshot_say_where_the_study_stands(study: Study) -> None:
    assert "2 waiting, 1 running, 2 complete, 1 pruned | best 0.4000 (trial 1)" in repr(study)
    assert [slot.name for slot in study.snapshot().workers[0].slots] == ["3"]


def test_report_writes_the_page_and_plots_are_figures(study: Study, tmp_path: Path) -> None:
    path = study.report(tmp_path / "out" / "report.html")

    assert "<html" in path.read_text()
    assert len(study.plot_history().data) > 0
    with pytest.raises(SearchError, match="What mattered: "):
        study.plot_importance()
    with pytest.raises(UserInputError, match="allowed: history, importance"):
        study.plot("histroy")


def test_create_mapping_with_mistakes_names_all_of_them(tmp_path: Path) -> None:
    with pytest.raises(UserInputError) as caught:
        Study.create({"name": "x", "data": "no.yaml", "space": {}, "trials": 2}, runs_dir=tmp_path)

    assert str(caught.value).count("\n") == 1
    assert f'the study: data: got "{Path.cwd() / "no.yaml"}", no such file' in str(caught.value)


def test_create_and_run_train_the_budget_and_run_again_has_nothing_to_do(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("YOLOSEARCH_STORAGE_URL", raising=False)
    tiny = make_study(tmp_path / "tiny", tmp_path_factory.getbasetemp(), train={"epochs": 1}, trials=2)
    lines: list[str] = []

    study = Study.create(yaml.safe_load(tiny.file.read_text()), runs_dir=tiny.runs)
    assert study.plan(tiny.file, runs_dir=tiny.runs).images == {"train": 16, "val": 8}
    status = study.run(progress=lines.append)

    assert status.finished
    assert study.trials()["state"].tolist() == ["COMPLETE"] * 2
    assert lines[0].startswith("2 waiting")
    assert study.class_names() == ("digit 0", "digit 4")
    assert replace(status, trials=()) == replace(study.run(progress=lines.append), trials=())
    more = Study.create(tiny.file, runs_dir=tiny.runs, more_trials=1)
    assert more.trials()["state"].tolist() == ["COMPLETE"] * 2 + ["WAITING"]


def test_noise_without_training_asks_for_the_seeds_and_says_what_is_known(study: Study) -> None:
    first = study.noise(3, train=False)
    again = study.noise(train=False)

    assert (first.asked, first.done, first.spread) == (3, 0, None)
    assert again == first
    assert study.has_work(("noise",))
    assert len(study.trials()) == 6


def test_confirm_goes_on_with_what_was_asked_for_last(study: Study) -> None:
    first = study.confirm(top=1, seeds=2, train=False)
    again = study.confirm(train=False)

    assert [candidate.trial for candidate in first.candidates] == [1]
    assert first.asked == 4
    assert first.verdict() == "nothing to compare yet: 0 of 4 reruns are complete"
    assert again == first
