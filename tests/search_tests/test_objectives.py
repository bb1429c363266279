"""Several objectives at once, with real processes: the ledger, Optuna, MLflow and the exported files agree."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from tiny import NAME, TinyStudy, make_study, wait_for

from search.config import StudyConfig, parse_study
from search.errors import UserInputError
from search.export import best_trial, front_trials
from search.ledger import TicketState, front
from search.report import study_status
from search.study import ask, create_study, load_study, open_storage, tell
from search.weights import kept_numbers
from yolocore.hyperparameters import Hyperparameters

OBJECTIVES = ["fitness", "class_ap:digit 4", "recall"]
SPACE = {"box": {"low": 0.02, "high": 0.2, "log": True}, "obj": {"low": 0.3, "high": 2.1}}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("YOLOSEARCH_STORAGE_URL", raising=False)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda **options: make_study(tmp_path / "study", shared, objectives=OBJECTIVES, pruner=None, **options)


def config_of(**changes: object) -> StudyConfig:
    document = {"name": "s", "data": "builtin:digits", "space": SPACE, "trials": 30, "objectives": ["fitness", "map50"]}
    return parse_study({**document, **changes}, source="study.yaml")


@pytest.mark.parametrize("sampler", [{"name": "tpe", "n_startup_trials": 4}, {"name": "nsga2", "population_size": 4}])
def test_ask_and_tell_several_objectives_learns_towards_the_front(storage_url: str, sampler: dict[str, object]) -> None:
    config = config_of(sampler=sampler)
    storage = open_storage(storage_url)
    asked = create_study(config, storage)
    study = load_study(config, storage)

    for ticket in range(1, 25):
        # Both want a small box; obj trades one for the other.
        box, obj = asked.params["box"], asked.params["obj"]
        tell(study, asked.trial_id, "COMPLETE", (obj - 10 * box, -obj - 10 * box))
        asked = ask(study, config, ticket, linked=())

    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE] * 2
    complete = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
    boxes = [trial.params["box"] for trial in complete]
    assert len(complete) == 24
    assert sum(boxes[-10:]) / 10 < sum(boxes[1:9]) / 8


def test_tell_one_of_several_values_not_finite_is_a_failure(sqlite_url: str) -> None:
    config = config_of()
    storage = open_storage(sqlite_url)
    asked = create_study(config, storage)
    study = load_study(config, storage)

    tell(study, asked.trial_id, "COMPLETE", (0.5, float("nan")))

    assert study.trials[0].state is TrialState.FAIL


def test_run_killed_and_taken_up_again_every_record_has_all_values(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=5, train={"epochs": 3}, sampler={"name": "tpe", "n_startup_trials": 2})
    first = study.start("run")
    wait_for(lambda: any(ticket.epochs_done >= 1 for ticket in study.tickets()), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    second = study.start("run")
    output, _ = second.communicate(timeout=300)

    assert second.returncode == 0, output
    tickets = study.tickets()
    assert [ticket.state for ticket in tickets] == [TicketState.COMPLETE] * 5
    assert max(ticket.attempt for ticket in tickets) >= 2
    assert sorted(ticket.trial_number for ticket in tickets if ticket.trial_number is not None) == list(range(5))
    trials = {trial.number: trial for trial in study.optuna_trials()}
    runs = study.mlflow_runs()
    for ticket in tickets:
        row = study.ledger.reports(ticket.id)[-1].metrics
        assert ticket.objective_values == (row["fitness"], row["class_ap/1"], row["recall"])
        assert ticket.value == row["fitness"]
        trial = trials[ticket.trial_number]
        assert (trial.state, trial.values) == (TrialState.COMPLETE, list(ticket.objective_values))
        run = runs[f"trial-{ticket.trial_number:05d}"]
        assert run.info.status == "FINISHED"
        assert study.metric_history(run, "objective/class_ap_digit 4")[-1] == (2, ticket.objective_values[1])
    best = front(tickets)
    files = sorted(path.name for path in (study.runs / NAME).glob("hyp.*"))
    assert files == sorted(f"hyp.pareto-{ticket.trial_number}.yaml" for ticket in best)
    for ticket in best:
        path = study.runs / NAME / f"hyp.pareto-{ticket.trial_number}.yaml"
        assert Hyperparameters.from_yaml(path).box == ticket.params["box"]
    assert "Pareto front of tiny" in output
    summary = runs["summary"]
    assert summary.data.tags["yolosearch.front"] == ", ".join(str(ticket.trial_number) for ticket in best)
    assert summary.data.metrics["study/best/recall"] == max(ticket.objective_values[2] for ticket in tickets)
    # The weights of the front and of the base, nobody else's.
    kept = kept_numbers(tickets, "best")
    assert kept == {0, *(ticket.number for ticket in best)}
    assert [bool(study.weights(number)) for number in range(5)] == [number in kept for number in range(5)]


@pytest.fixture
def ended(make: Callable[..., TinyStudy]) -> TinyStudy:
    """Three trials that have ended: the base, one better in one thing, one worse in all."""
    study = make(trials=3, train={"epochs": 2})
    study.create()
    tickets = study.ledger.claim(NAME, "here", 3, 60.0)
    values = [(0.5, 0.2, 0.3), (0.4, 0.9, 0.3), (0.4, 0.1, 0.2)]
    for number, (ticket, three) in enumerate(zip(tickets, values, strict=True)):
        if number:
            ticket = study.ledger.link_trial(ticket, 100 + number, number, {"box": 0.1 * number, "cls": 0.7})
        row = {"fitness": three[0], "class_ap/1": three[1], "recall": three[2]}
        study.ledger.record_epoch(ticket, 1, three[0], row)
        study.ledger.finish(ticket, TicketState.COMPLETE, three[0], None, 1, three)
    return study


def test_finish_values_are_kept_and_none_may_be_missing(ended: TinyStudy) -> None:
    assert [ticket.objective_values for ticket in ended.tickets()][1] == (0.4, 0.9, 0.3)
    ended.ledger.add_tickets(NAME, 1)
    (ticket,) = ended.ledger.claim(NAME, "here", 1, 60.0)
    with pytest.raises(ValueError, match="finite"):
        ended.ledger.finish(ticket, TicketState.COMPLETE, 0.4, None, 1, (0.4, float("inf"), 0.1))


def test_study_status_shows_a_front_and_no_best(ended: TinyStudy) -> None:
    status = study_status(ended.ledger, ended.config)

    assert status.best is None
    assert status.objectives == ("fitness", "class_ap:digit 4", "recall")
    assert [(trial.number, trial.values) for trial in status.front] == [(0, (0.5, 0.2, 0.3)), (1, (0.4, 0.9, 0.3))]


def test_export_without_pareto_explains_itself_and_with_it_writes_the_front(ended: TinyStudy) -> None:
    with pytest.raises(UserInputError, match=r"maximises fitness and class_ap:digit 4 and recall, so no trial is the"):
        best_trial(ended.ledger, ended.config)
    with pytest.raises(UserInputError, match=r"--pareto: got 2; allowed: all, or one of 0, 1"):
        front_trials(ended.ledger, ended.config, 2)

    base, other = front_trials(ended.ledger, ended.config)

    assert (base.trial_number, base.is_base, other.trial_number) == (0, True, 1)
    assert other.values["class_ap:digit 4"] == (0.9, 0.2)
    assert front_trials(ended.ledger, ended.config, 1) == (other,)


def test_export_pareto_command_writes_files_that_name_all_values(ended: TinyStudy) -> None:
    plain = ended.start("export")
    text, _ = plain.communicate(timeout=300)
    everything = ended.start("export", "--pareto", "all")
    told, _ = everything.communicate(timeout=300)

    assert (plain.returncode, text.count("\n")) == (2, 1)
    assert everything.returncode == 0, told
    path = ended.runs / NAME / "hyp.pareto-1.yaml"
    assert f"hyp of trial 1: {path}" in told
    header = path.read_text()
    assert "trial 1, one of those that none of the 3 complete trials beats in all objectives" in header
    assert "objective:  fitness = 0.40000, base 0.50000 (-0.10000)" in header
    assert "objective:  class_ap:digit 4 = 0.90000, base 0.20000 (+0.70000)" in header
    assert Hyperparameters.from_yaml(path).box == 0.1


def test_export_pareto_as_json_has_every_value(ended: TinyStudy) -> None:
    process = ended.start("export", "--pareto", "all", "--format", "json", "--json")
    told, _ = process.communicate(timeout=300)

    assert process.returncode == 0, told
    paths = json.loads(told)["paths"]
    assert paths == {str(number): str(ended.runs / NAME / f"hyp.pareto-{number}.json") for number in (0, 1)}
    document = json.loads(Path(paths["1"]).read_text())
    assert document["objectives"] == [
        {"name": "fitness", "value": 0.4, "base_value": 0.5},
        {"name": "class_ap:digit 4", "value": 0.9, "base_value": 0.2},
        {"name": "recall", "value": 0.3, "base_value": 0.3},
    ]
