"""What MLflow shows of a study as a whole: drawn by another process, sent while the study runs and at its end."""

import json
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from made_up import CLASSES, confirm_made_up, made_up_study
from tiny import NAME, TinyStudy, make_study

from search.ledger import StopKind, TicketState
from search.paths import StudyFolder
from search.space import distributions
from search.study import load_study, open_storage
from search.tracking import Tracker, open_tracker
from search.weights import WeightsStore
from search.worker import gallery
from search.worker.mirror import Mirror
from search.worker.records import MirrorContext
from yolocore.hyperparameters import Hyperparameters

COMPLETE, PRUNED = TicketState.COMPLETE, TicketState.PRUNED
FATES = [(COMPLETE, 0.4), (COMPLETE, 0.45), (PRUNED, 0.1)]
REVIEW = {"tracking": {"review": True}}


def mirror_of(study: TinyStudy, **options: Any) -> Mirror:
    from search.study import create_study

    storage = open_storage(study.storage_url)
    create_study(study.config, storage)
    for ticket in study.tickets():
        if ticket.trial_number and len(study.optuna_trials()) <= ticket.trial_number:
            _run_in_optuna(study, storage, ticket.params or {})
    return Mirror(study.ledger, load_study(study.config, storage), tracker_of(study), context_of(study, **options))


def context_of(study: TinyStudy, **options: Any) -> MirrorContext:
    return MirrorContext(
        config=study.config,
        record=study.ledger.study(NAME),
        folder=StudyFolder(study.runs, NAME),
        class_names=CLASSES,
        storage_url=study.storage_url,
        **options,
    )


def tracker_of(study: TinyStudy) -> Tracker:
    return open_tracker(enabled=True, uri=None, runs_dir=study.runs)


def _run_in_optuna(study: TinyStudy, storage: Any, params: dict[str, float]) -> None:
    space = distributions(study.config)
    trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, params=params, distributions=space)
    optuna.load_study(study_name=NAME, storage=storage).add_trial(trial)


def summary_of(study: TinyStudy) -> Any:
    return study.mlflow_runs()["summary"]


def artifact(run: Any, name: str) -> Path:
    return Path(run.info.artifact_uri.removeprefix("file://")) / name


def registry(study: TinyStudy) -> Any:
    """MLflow's client, which knows the registered model."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{study.runs / 'mlflow.db'}")


def aliases(study: TinyStudy) -> dict[str, str]:
    """The trial of each alias of the registered model."""
    client = registry(study)
    found = client.get_registered_model(NAME).aliases
    return {name: client.get_model_version(NAME, version).tags["yolosearch.trial"] for name, version in found.items()}


def artifacts_of(study: TinyStudy, run: Any) -> set[str]:
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_mirror_study_over_shows_plots_report_numbers_and_note(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), FATES, tracked=True, **REVIEW)

    with mirror_of(study) as mirror:
        mirror.reconcile()

    summary = summary_of(study)
    files = artifacts_of(study, summary)
    assert {"report.html", "hyp.best.yaml", "study.yaml", "plots/01-history.html", "plots/03-classes.html"} <= files
    metrics = summary.data.metrics
    assert (metrics["study/trials_complete"], metrics["study/trials_pruned"]) == (2, 1)
    assert (metrics["study/base_fitness"], metrics["study/best_fitness"]) == (0.4, 0.45)
    assert metrics["study/best_class_ap_cat"] == pytest.approx(0.45)
    assert study.metric_history(summary, "study/trials_complete") == [(3, 2.0)]
    note = summary.data.tags["mlflow.note.content"]
    assert note.startswith("## Unconfirmed: ")
    assert "| cat | 0.400 | 0.450 | +0.050 |" in note
    assert summary.info.status == "FINISHED"

    before = (Path(summary.info.artifact_uri.removeprefix("file://")) / "report.html").stat().st_mtime_ns
    with mirror_of(study) as mirror:
        mirror.reconcile()
    after = (Path(summary.info.artifact_uri.removeprefix("file://")) / "report.html").stat().st_mtime_ns
    assert after == before


def test_mirror_study_of_several_objectives_shows_its_front_and_registers_no_champion(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recalls = {number: {"recall": recall} for number, recall in enumerate((0.4, 0.35, 0.45))}
    options = {"objectives": ["fitness", "recall"], "pruner": None, "figures": recalls, **REVIEW}
    fates = [(COMPLETE, value) for value in (0.40, 0.50, 0.41)]
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates, tracked=True, **options)

    with mirror_of(study) as mirror:
        mirror.reconcile()

    summary = summary_of(study)
    files = artifacts_of(study, summary)
    assert {"report.html", "study.yaml", "plots/01-front.html", "hyp.pareto-1.yaml", "hyp.pareto-2.yaml"} <= files
    assert "hyp.best.yaml" not in files
    note = summary.data.tags["mlflow.note.content"]
    assert note.startswith("## 2 of 3 complete trials are on the front of fitness and recall; in one run trial 2 beats")
    assert "| 1 | 0.5000 (+0.1000) | 0.3500 (-0.0500) |" in note
    assert "`yolosearch export tiny --pareto N`" in note
    assert summary.data.tags["yolosearch.front"] == "1, 2"
    assert "yolosearch.best_trial" not in summary.data.tags
    assert "study/gain" not in summary.data.metrics
    assert summary.data.metrics["study/base_fitness"] == 0.4
    from mlflow.tracking import MlflowClient

    assert not MlflowClient(f"sqlite:///{study.runs / 'mlflow.db'}").search_registered_models()


def test_mirror_study_that_runs_is_drawn_meanwhile_and_its_thread_waits_for_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "EVERY_SECONDS", 0.0)
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), FATES, waiting=1, tracked=True, **REVIEW)

    with mirror_of(study) as mirror:
        mirror.reconcile()
        deadline = time.monotonic() + 120
        while "report.html" not in (artifacts_of(study, summary_of(study)) if _has_runs(study) else ()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        began = time.monotonic()
        mirror.close()
        took = time.monotonic() - began

    # A trial is still open: whoever ends it draws the rest, and nobody waits for that here.
    assert took < 20
    assert "yolosearch.state" in summary_of(study).data.tags


def _has_runs(study: TinyStudy) -> bool:
    try:
        return "summary" in study.mlflow_runs()
    except AssertionError:
        return False


def test_run_worker_best_weights_become_the_candidate(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    shared = tmp_path_factory.getbasetemp()
    study = make_study(tmp_path / "study", shared, tracked=True, trials=2, **REVIEW)
    study.create()

    study.work()

    client = registry(study)
    best = max(study.tickets(), key=lambda ticket: (ticket.value or 0.0, -ticket.number))
    assert aliases(study) == {"candidate": str(best.trial_number)}  # nothing is confirmed
    candidate = client.get_model_version_by_alias(NAME, "candidate")
    assert candidate.run_id == best.run_id
    assert candidate.tags["yolosearch.study"] == NAME
    assert candidate.tags["yolosearch.standing"] in {"unconfirmed", "keep"}
    assert "weights/best.safetensors" in artifacts_of(study, client.get_run(candidate.run_id))
    for run in (client.get_run(ticket.run_id or "") for ticket in study.tickets()):
        names = {name for name in artifacts_of(study, run) if name.startswith("pictures/")}
        assert {"pictures/1-validation.jpg", "pictures/2-precision-recall.png", "pictures/class_ap.csv"} <= names
    assert not list(study.runs.rglob("details.npz"))
    assert json.loads(json.dumps(summary_of(study).data.metrics))["study/trials_complete"] == 2


def test_gallery_drawing_of_a_study_just_over_registers_the_weights_too(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), tracked=True, trials=1, **REVIEW)
    study.create()
    study.work()

    client = registry(study)
    run_id = summary_of(study).info.run_id
    # As if the last trial had ended while this worker still polled: the drawing that is due shows all of them.
    client.delete_registered_model(NAME)
    client.set_tag(run_id, gallery.REVIEWED_TAG, "0")
    weights = WeightsStore.open(study.runs, NAME)
    drawn = gallery.Gallery(study.ledger, tracker_of(study), context_of(study, weights=weights))
    drawn._next = 0.0
    while client.get_run(run_id).data.tags[gallery.REVIEWED_TAG] == "0":
        drawn.poll(lambda: run_id)
        time.sleep(0.1)
    drawn.finish(lambda: run_id)

    assert client.get_model_version_by_alias(NAME, "candidate").run_id == study.tickets()[0].run_id


# ---- what is recommended ---------------------------------------------------------------------------------------------

SEVERAL = [(COMPLETE, 0.4), (COMPLETE, 0.45), (COMPLETE, 0.6), (COMPLETE, 0.5)]
"""The base and three trials; the best single run is trial 2."""


@pytest.mark.parametrize("review", [True, False])
@pytest.mark.parametrize(("gains", "trial", "header"), [({1: 0.1}, 1, "the winner of"), ({}, 0, "found no winner")])
def test_mirror_confirmation_of_a_stopped_study_stays_what_the_summary_recommends(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    review: bool,
    gains: dict[int, float],
    trial: int,
    header: str,
) -> None:
    tracking = {"tracking": {"review": review}}
    study = made_up_study(
        tmp_path / "study", tmp_path_factory.getbasetemp(), SEVERAL, waiting=1, tracked=True, **tracking
    )
    study.ledger.stop(NAME, "asked", StopKind.ASKED)
    with mirror_of(study) as mirror:
        mirror.reconcile()
    assert summary_of(study).data.tags["yolosearch.best_trial"] == "2"
    confirm_made_up(study, gains)

    with mirror_of(study) as mirror:
        mirror.reconcile()

    summary = summary_of(study)
    assert summary.data.tags["yolosearch.best_trial"] == str(trial)
    file = artifact(summary, "hyp.best.yaml")
    assert header in file.read_text()
    assert "unconfirmed" not in file.read_text()
    params = study.tickets()[trial].params or {}
    assert Hyperparameters.from_yaml(file).box == pytest.approx(params["box"])
    assert summary.info.status == "FINISHED"
    forecast = json.loads(artifact(summary, "forecast.json").read_text())
    assert (forecast["seconds_left"], forecast["slot_epochs"]) == (0.0, 20)
    assert forecast["short_against_full"]["trials"] == 4
    if review:
        assert (
            "\n\nForecast: 5 trainings (20 slot-epochs); nothing is left to train; 4 trials ran to the end"
            in (summary.data.tags["mlflow.note.content"])
        )
        report = artifact(summary, "report.html").read_text()
        assert header in report
        assert (summary.data.metrics["study/best_fitness"], trial) in {(0.45, 1), (0.4, 0)}


def test_run_worker_confirmed_winner_that_is_not_the_best_becomes_the_champion(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = make_study(tmp_path / "study", tmp_path_factory.getbasetemp(), tracked=True, trials=3, **REVIEW)
    study.create()
    study.work("search")
    ranked = sorted(study.tickets(), key=lambda ticket: (-(ticket.value or 0.0), ticket.number))
    winner = [ticket for ticket in ranked if ticket.number != 0][-1]
    confirm_made_up(study, {winner.number: 0.1})  # trainings of seconds find no winner

    study.work("confirm")

    client = registry(study)
    assert aliases(study) == {"champion": str(winner.trial_number)}
    champion = client.get_model_version_by_alias(NAME, "champion")
    assert (champion.run_id, champion.tags["yolosearch.standing"]) == (winner.run_id, "confirmed")
    assert champion.tags["yolosearch.study"] == NAME
    (kept,) = study.weights(winner.number)
    run = client.get_run(winner.run_id or "")
    assert artifact(run, "weights/best.safetensors").read_bytes() == kept.read_bytes()
    assert "pictures/2-precision-recall.png" in artifacts_of(study, run)
    summary = summary_of(study)
    assert summary.data.tags["yolosearch.best_trial"] == str(winner.trial_number)
    assert "the winner of the confirmation" in artifact(summary, "hyp.best.yaml").read_text()


def test_mirror_review_says_keep_and_the_base_is_the_champion_not_the_refuted_trial(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    study = made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), SEVERAL, tracked=True, **REVIEW)
    weights = WeightsStore.open(study.runs, NAME)
    for number in range(3):  # trial 3 has none, as after a confirmation of more trials than are kept
        weights.save(number, 1, 4, {"model.0.conv.weight": torch.full((4,), float(number))})

    def review() -> Any:
        with mirror_of(study, weights=weights) as mirror:
            mirror.reconcile()
        return summary_of(study).data

    review()
    assert aliases(study) == {"candidate": "2"}

    confirm_made_up(study, {})
    tags = review().tags
    assert aliases(study) == {"champion": "0"}
    champion = registry(study).get_model_version_by_alias(NAME, "champion")
    assert champion.run_id == study.tickets()[0].run_id
    assert champion.tags["yolosearch.standing"] == "keep"
    assert champion.tags["yolosearch.verdict"].startswith("Keep the base: over 4 paired seeds")
    assert "alias `champion`" in tags["mlflow.note.content"]
    (refuted,) = [v for v in registry(study).search_model_versions(f"name='{NAME}'") if v.version != champion.version]
    assert (refuted.tags["yolosearch.trial"], refuted.tags["yolosearch.standing"]) == ("2", "superseded")

    # Another confirmation, over more seeds, has a winner whose weights nobody kept.
    confirm_made_up(study, {3: 0.2}, seeds=12)
    tags = review().tags
    assert tags["yolosearch.best_trial"] == "3"
    assert aliases(study) == {}
    assert "no weights of trial 3 (the winner of the confirmation)" in caplog.text
    assert "No weights of trial 3 are kept" in tags["mlflow.note.content"]
