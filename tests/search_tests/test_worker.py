"""A worker: real trainer, real databases, real MLflow store, real signals."""

import logging
import math
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sabotage
import torch
from optuna.trial import TrialState
from tiny import NAME, SignalWhen, TinyStudy, make_study, wait_for

from search.checkpoints import CheckpointStore
from search.config import StudyConfig
from search.database import make_engine
from search.errors import LeaseLostError, StudyConflictError, StudyStoppedError, UnknownStudyError, UserInputError
from search.ledger import CONFIRM, Ledger, Rerun, Ticket, TicketState, WorkerState
from search.report import study_status
from search.tracking import EpochMetrics, TrackingConfigError, open_tracker
from search.transforms import hyperparameters
from search.worker import session, supply, trainer_process
from search.worker.capacity import workers_here
from search.worker.context import WorkerContext
from search.worker.host import host_identity, is_alive, process_identity, release_dead_neighbours
from search.worker.lease import LeaseKeeper
from search.worker.linking import link_trial
from search.worker.mirror import Mirror
from search.worker.records import MirrorContext
from search.worker.session import WorkerOptions, run_worker
from search.worker.stop import StopFlag
from yolocore.checkpoint import load_weights
from yolocore.hyperparameters import Hyperparameters
from yolocore.model import initial_state

COMPLETE, FAIL, WAITING = TicketState.COMPLETE, TicketState.FAIL, TicketState.WAITING


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors gain nothing from threads, and equal thread counts give equal sums."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("YOLOSEARCH_STORAGE_URL", raising=False)
    torch.set_num_threads(1)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    """Makes tiny studies, each in a folder of its own."""
    shared = tmp_path_factory.getbasetemp()
    return lambda folder="study", **options: make_study(tmp_path / folder, shared, **options)


def interrupted(study: TinyStudy) -> None:
    """Creates the study and stops its worker by SIGTERM once both trials of the pack have a checkpoint."""
    study.create()
    with SignalWhen(lambda: all(ticket.epochs_done >= 1 for ticket in study.tickets()[:2])) as sender:
        study.work("first")
    assert sender.sent


def values(study: TinyStudy) -> list[float | None]:
    return [ticket.value for ticket in study.tickets()]


def last_losses(study: TinyStudy) -> list[float]:
    """The box loss of each trial's last training epoch."""
    return [rows[-1].metrics["train_box"] for rows in study.ledger.all_reports(NAME).values()]


# ---- a study to its end ----------------------------------------------------------------------------------------------


def test_run_worker_study_ledger_optuna_and_mlflow_tell_the_same(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=3, train={"epochs": 3})
    study.create()

    assert study.work() == 3

    tickets = study.tickets()
    assert [ticket.state for ticket in tickets] == [COMPLETE] * 3
    assert [ticket.attempt for ticket in tickets] == [1] * 3
    assert tickets[0].params == {"box": 0.05, "cls": 0.5}
    assert all(ticket.mirrored for ticket in tickets)
    reports = study.ledger.all_reports(NAME)
    trials = study.optuna_trials()
    assert [trial.number for trial in trials] == [0, 1, 2]
    runs = study.mlflow_runs()
    assert sorted(runs) == ["summary", "trial-00000", "trial-00001", "trial-00002"]
    for ticket, trial in zip(tickets, trials, strict=True):
        rows = reports[ticket.id]
        curve = {row.epoch: row.value for row in rows}
        assert sorted(curve) == [0, 1, 2]
        assert ticket.value == curve[2]
        assert (trial.state, trial.value, trial.params) == (TrialState.COMPLETE, ticket.value, ticket.params)
        assert trial.intermediate_values == {epoch + 1: value for epoch, value in curve.items()}
        run = runs[f"trial-{ticket.trial_number:05d}"]
        assert run.info.status == "FINISHED"
        assert study.metric_history(run, "metrics/fitness") == sorted(curve.items())
        assert study.metric_history(run, "objective") == sorted(curve.items())
        assert float(run.data.params["box"]) == ticket.params["box"]
        assert len(run.data.params) == 28
    assert runs["summary"].info.status == "FINISHED"
    best = max(tickets, key=lambda ticket: ticket.value)
    assert runs["summary"].data.tags["yolosearch.best_trial"] == str(best.trial_number)
    assert runs["summary"].data.tags["yolosearch.trials.complete"] == "3"


def test_run_worker_complete_trial_leaves_weights_and_no_checkpoint(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=1)
    study.create()

    study.work()

    files = sorted(path.name for path in (study.runs / NAME / "trials" / "00000").iterdir())
    (file,) = study.weights(0)
    assert files == [file.name]
    weights = load_weights(file)
    assert list(weights) == list(load_like(weights))
    assert len(weights) == 349


def load_like(weights: dict[str, Any]) -> dict[str, Any]:
    """The fresh weights of the same model, restricted to names that both have."""
    fresh = initial_state("n", 2, 0)
    return {name: fresh[name] for name in weights if weights[name].shape == fresh[name].shape}


def test_run_worker_tickets_added_continue_the_numbers_and_the_summary(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=2)
    study.create()
    study.work("first")

    assert study.create(more_trials=1) is False
    assert study.work("second") == 1

    assert [trial.number for trial in study.optuna_trials()] == [0, 1, 2]
    runs = study.mlflow_runs()
    assert sorted(runs) == ["summary", "trial-00000", "trial-00001", "trial-00002"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert [step for step, _ in study.metric_history(runs["summary"], "study/best_objective")] == [0, 1, 2]


def test_run_worker_pruned_trial_is_pruned_everywhere(make: Callable[..., TinyStudy]) -> None:
    # No fitness reaches 1, so everything that may be pruned is; the base never is.
    pruner = {"name": "threshold", "lower": 1.0, "min_epochs": 1}
    study = make(tracked=True, trials=2, train={"epochs": 3}, pruner=pruner)
    study.create()

    study.work()

    base, other = study.tickets()
    assert (base.state, other.state) == (COMPLETE, TicketState.PRUNED)
    assert [row.prune for row in study.ledger.reports(other.id)] == [True]
    assert [trial.state for trial in study.optuna_trials()] == [TrialState.COMPLETE, TrialState.PRUNED]
    run = study.mlflow_runs()["trial-00001"]
    assert (run.info.status, run.data.tags["yolosearch.state"]) == ("KILLED", "PRUNED")


def test_run_worker_freed_slot_takes_the_next_trial_at_once(make: Callable[..., TinyStudy]) -> None:
    pruner = {"name": "threshold", "lower": 1.0, "min_epochs": 1}
    study = make(tracked=True, trials=4, train={"epochs": 8}, pruner=pruner)
    study.create()

    study.work()

    assert study.states() == [COMPLETE, *[TicketState.PRUNED] * 3]
    assert [ticket.attempt for ticket in study.tickets()] == [1] * 4
    base, *others = [[row.metrics for row in rows] for rows in study.ledger.all_reports(NAME).values()]
    assert [row["stream_epoch"] for row in base] == list(range(8))
    # They took turns in the second slot: each started its own first epoch where the pack then stood.
    starts = [rows[0]["stream_epoch"] for rows in others]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert {row["slots"] for rows in others for row in rows} == {2}
    assert [row["slots"] for row in base][-1] == 1
    # Warm-up is each slot's own: the same learning rates in everybody's first epoch.
    assert {(rows[0]["lr_bias"], rows[0]["lr_decay"]) for rows in (base, *others)} == {
        (base[0]["lr_bias"], base[0]["lr_decay"])
    }


def test_run_worker_space_that_changes_the_images_packs_trials_of_equal_values(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=6, space={"mosaic": [0.0, 1.0], "box": {"low": 0.02, "high": 0.2}})
    study.create()

    study.work()

    # A pack of unequal values would have been refused by the trainer.
    assert study.states() == [COMPLETE] * 6
    slots = {ticket.number: study.ledger.reports(ticket.id)[0].metrics["slots"] for ticket in study.tickets()}
    values = [ticket.params["mosaic"] for ticket in study.tickets() if ticket.params]
    assert set(values) == {0.0, 1.0}
    assert max(slots.values()) == 2
    assert [ticket.stalled_attempts for ticket in study.tickets()] == [0] * 6


def test_run_worker_pack_auto_measures_its_packs_and_says_so(
    make: Callable[..., TinyStudy], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="search.worker")
    study = make(trials=3, train={"pack": "auto"})
    study.create()

    study.work()

    (worker,) = study.ledger.workers(NAME)
    assert worker.pack in (1, 2, 3)
    table = next(record.getMessage() for record in caplog.records if "trial-steps a second" in record.getMessage())
    assert table.startswith(f"packs of {worker.pack}: measured")
    assert sum(line.endswith(" *") for line in table.splitlines()) == 1
    assert study.states() == [COMPLETE] * 3
    slots = [row.metrics["slots"] for rows in study.ledger.all_reports(NAME).values() for row in rows]
    assert max(slots) == worker.pack


def test_workers_here_counts_those_of_this_host_on_the_same_device(
    created: TinyStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[WorkerContext] = []
    monkeypatch.setattr(session, "Worker", lambda context, *_: SimpleNamespace(run=lambda: contexts.append(context)))
    created.work("gone")
    for number, device in enumerate(("cpu fp32", "cpu bf16", "cuda:0 bf16")):
        created.ledger.register_worker(f"w{number}", NAME, process_identity(), os.getpid(), device)
    created.ledger.register_worker("far", NAME, "elsewhere@1", os.getpid(), "cpu fp32")

    assert workers_here(contexts[0]) == 2


def test_run_worker_measurement_that_spoils_the_device_is_no_trials_fault(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer_process, "main", sabotage.spoil_the_device)
    study = make(trials=4, train={"pack": "auto", "epochs": 1})
    study.create()

    study.work()

    assert "packs could not be measured any further" in caplog.text
    assert study.states() == [COMPLETE] * 4


def test_run_worker_tickets_added_meanwhile_join_the_running_pack(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=1, train={"epochs": 12})
    study.create()

    class Add(SignalWhen):
        def run(self) -> None:
            while not self._over.wait(0.02):
                if study.tickets()[0].epochs_done >= 1:
                    study.ledger.add_tickets(NAME, 1)
                    return

    with Add(lambda: True):
        study.work()

    first, second = study.ledger.all_reports(NAME).values()
    assert study.states() == [COMPLETE] * 2
    assert second[0].metrics["stream_epoch"] > 0
    assert second[0].metrics["slots"] == 2
    assert first[-1].metrics["slots"] == 2


def test_run_worker_space_of_switch_ratios_and_class_weights_trains_and_exports_raw_values(
    make: Callable[..., TinyStudy],
) -> None:
    focal = {"low": 0.3, "high": 2.0, "off": 0.5, "compensate": True}
    space = {"box": "default", "obj": "default", "cls_pw": "per_class", "fl_gamma": focal}
    study = make(space=space, parametrisation="ratios", trials=2, pruner="none", tracking={"enabled": False})
    study.create()
    on = {"fl_gamma.switch": 0.75, "fl_gamma": 1.0, "box_to_obj": 2.0, "gain_scale": 1.5, "cls_pw_power": 1.0}
    study.ledger.add_tickets(NAME, 1, fixed_params=[on])

    assert study.work() == 3

    assert study.states() == [TicketState.COMPLETE] * 3
    config = StudyConfig.from_json(study.ledger.study(NAME).config)
    fixed = study.tickets()[2]
    assert fixed.params == on
    hyp = hyperparameters(config, fixed.params)
    assert hyp.box == pytest.approx(0.05 * 1.5 * 2 * 2 / 3)
    assert hyp.obj > 2
    assert hyp.cls_pw_per_class is not None
    assert hyp.cls_pw_per_class[1] > hyp.cls_pw_per_class[0]
    shown = study_status(study.ledger, config).trials[2].params
    assert shown == {**{key: getattr(hyp, key) for key in ("box", "obj", "cls", "fl_gamma")}, "cls_pw_power": 1.0}


def test_run_worker_timeout_over_claims_nothing(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()

    assert study.work(timeout=0.0) == 0
    assert study.states() == [WAITING] * 3


# ---- interruption and resumption -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_worker_signal_hands_back_uncharged(make: Callable[..., TinyStudy], number: signal.Signals) -> None:
    study = make(tracked=True, trials=2, train={"epochs": 30})
    study.create()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    with SignalWhen(lambda: all(ticket.epochs_done >= 1 for ticket in study.tickets()), number):
        study.work("first")

    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    for ticket in study.tickets():
        assert (ticket.state, ticket.worker, ticket.stalled_attempts, ticket.history) == (WAITING, None, 0, ())
        assert (study.runs / (ticket.checkpoint or "none")).is_file()
    runs = study.mlflow_runs()
    assert {runs[name].info.status for name in ("trial-00000", "trial-00001")} == {"SCHEDULED"}
    assert [worker.state for worker in study.ledger.workers(NAME)] == [WorkerState.EXITED]


def test_run_worker_signal_between_two_proposals_claims_no_further(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(trials=6, train={"pack": 6, "epochs": 1})
    study.create()
    asked: list[int] = []

    def ask_and_signal(ledger: Ledger, optuna_study: Any, config: Any, ticket: Ticket) -> Ticket:
        asked.append(ticket.number)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return link_trial(ledger, optuna_study, config, ticket)

    monkeypatch.setattr(supply, "link_trial", ask_and_signal)

    assert study.work() == 0

    assert asked == [0, 1]
    assert [(ticket.state, ticket.stalled_attempts) for ticket in study.tickets()] == [(WAITING, 0)] * 6


def test_run_worker_resumed_study_has_the_numbers_of_an_undisturbed_one(make: Callable[..., TinyStudy]) -> None:
    undisturbed = make("undisturbed", train={"epochs": 4}, trials=2)
    undisturbed.create()
    undisturbed.work()
    study = make(tracked=True, train={"epochs": 4}, trials=2)

    interrupted(study)
    assert study.work("second") == 2

    assert values(study) == values(undisturbed)
    assert [ticket.attempt for ticket in study.tickets()] == [2, 2]
    assert [ticket.params for ticket in study.tickets()] == [ticket.params for ticket in undisturbed.tickets()]
    for trial, run in zip(study.optuna_trials(), sorted(study.mlflow_runs().items())[1:], strict=True):
        assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
        assert [step for step, _ in study.metric_history(run[1], "metrics/fitness")] == [0, 1, 2, 3]


def ended_by_patience(study: TinyStudy, number: int, patience: int) -> bool:
    """Whether a trial went on to the first epoch that is `patience` after its best, and no further."""
    fitness = [row.metrics["fitness"] for row in study.ledger.reports(study.tickets()[number].id)]
    stuck = [epoch for epoch in range(len(fitness)) if epoch - int(np.argmax(fitness[: epoch + 1])) >= patience]
    return stuck == [len(fitness) - 1]


def test_run_worker_patience_ends_a_trial_complete_also_after_an_interruption(make: Callable[..., TinyStudy]) -> None:
    # With these rates nothing is learnt: fitness soon stays where it is.
    hyp = {"mosaic": 0, "lr0": 1e-5, "warmup_bias_lr": 0.0}
    study = make(tracked=True, train={"epochs": 40, "patience": 5}, trials=2, base_hyp=hyp)

    interrupted(study)
    assert study.work("second") == 2

    for ticket in study.tickets():
        assert (ticket.state, ticket.attempt) == (COMPLETE, 2)
        assert ended_by_patience(study, ticket.number, 5)
        assert ticket.value == study.ledger.reports(ticket.id)[-1].value
        assert ticket.reason == "no better fitness for 5 epochs: ended by patience"
        if ticket.number == 0:
            (file,) = study.weights(0)
            last = study.ledger.reports(ticket.id)[-1]
            assert file.name.startswith(f"weights-{last.epoch + 1:04d}-{last.attempt:04d}-")
    assert [trial.state for trial in study.optuna_trials()] == [TrialState.COMPLETE] * 2
    run = study.mlflow_runs()["trial-00001"]
    assert (run.info.status, run.data.tags["yolosearch.state"]) == ("FINISHED", "COMPLETE")


def checkpoints(study: TinyStudy, number: int) -> list[Path]:
    return sorted((study.runs / NAME / "trials" / f"{number:05d}").glob("checkpoint-*.pt"))


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def replace_state(study: TinyStudy, ticket: Ticket, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Puts another state where the ledger looks for the ticket's checkpoint."""
    store = CheckpointStore(study.runs, NAME, owner=f"{study.ledger.study(NAME).created:.3f}")
    tree = store.load(ticket.number, ticket.epochs_done).tree
    reference = store.save(ticket.number, ticket.attempt, ticket.epochs_done, change(tree))
    with sqlite3.connect(study.runs / NAME / "study.db") as connection:
        connection.execute("UPDATE yolosearch_ticket SET checkpoint = ? WHERE id = ?", (reference, ticket.id))


def of_another_format(study: TinyStudy, ticket: Ticket) -> None:
    replace_state(study, ticket, lambda tree: {**tree, "format": 999})


def all_lost(study: TinyStudy, ticket: Ticket) -> None:
    for path in checkpoints(study, ticket.number):
        path.unlink()


def all_damaged(study: TinyStudy, ticket: Ticket) -> None:
    for path in checkpoints(study, ticket.number):
        damage(path)


@pytest.mark.parametrize("spoil", [all_lost, all_damaged, of_another_format])
def test_run_worker_unusable_checkpoints_start_over_beside_the_one_that_goes_on(
    make: Callable[..., TinyStudy], spoil: Callable[[TinyStudy, Ticket], None], caplog: pytest.LogCaptureFixture
) -> None:
    study = make(train={"epochs": 3}, trials=2)
    interrupted(study)
    first, second = study.tickets()
    early = [row.value for row in study.ledger.reports(first.id)]
    spoil(study, first)

    study.work("second")

    assert "trial 0 starts over with its seed" in caplog.text
    assert study.states() == [COMPLETE] * 2
    assert [row.value for row in study.ledger.reports(first.id)][: len(early)] == early
    # Both were in one pack, at different epochs of their own and on the images that the second had not met.
    last, other = (study.ledger.reports(ticket.id)[-1] for ticket in (first, second))
    assert last.metrics["stream_epoch"] == second.epochs_done + 2
    assert (other.metrics["slots"], other.metrics["stream_epoch"]) == (2, 2)


def test_run_worker_last_checkpoint_damaged_goes_on_from_the_one_before(
    make: Callable[..., TinyStudy], caplog: pytest.LogCaptureFixture
) -> None:
    study = make(train={"epochs": 4}, trials=1)
    study.create()
    with SignalWhen(lambda: study.tickets()[0].epochs_done >= 2):
        study.work("first")
    ticket = study.tickets()[0]
    assert ticket.checkpoint is not None
    damage(study.runs / ticket.checkpoint)  # a later one may lie there that nobody was told of any more

    study.work("second")

    assert f"no checkpoint of epoch {ticket.epochs_done}" in caplog.text or "damaged" in caplog.text
    assert "starts over" not in caplog.text
    assert study.states() == [COMPLETE]


def test_run_worker_lease_taken_away_continues_as_a_new_attempt(make: Callable[..., TinyStudy]) -> None:
    study = make(train={"epochs": 4}, trials=2)
    study.create()

    class Release(SignalWhen):
        def run(self) -> None:
            while not self._over.wait(0.02):
                if all(ticket.epochs_done >= 1 for ticket in study.tickets()):
                    self.sent = study.ledger.release_worker("here") == 2
                    return

    with Release(lambda: True) as thief:
        study.work()

    assert thief.sent
    assert study.states() == [COMPLETE] * 2
    assert [ticket.attempt for ticket in study.tickets()] == [2, 2]
    assert [len(rows) for rows in study.ledger.all_reports(NAME).values()] == [4, 4]
    assert [trial.state for trial in study.optuna_trials()] == [TrialState.COMPLETE] * 2


def test_run_worker_trial_asked_but_not_linked_is_adopted(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2)
    study.create()
    # What a worker leaves that dies between asking Optuna and linking the ticket.
    with sqlite3.connect(study.runs / NAME / "study.db") as connection:
        connection.execute(
            "UPDATE yolosearch_ticket SET trial_id = NULL, trial_number = NULL, params = NULL WHERE number = 0"
        )

    study.work()

    assert [trial.state for trial in study.optuna_trials()] == [TrialState.COMPLETE] * 2
    assert [ticket.trial_number for ticket in study.tickets()] == [0, 1]


# ---- failures --------------------------------------------------------------------------------------------------------


def with_nan(tree: dict[str, Any]) -> dict[str, Any]:
    next(iter(tree["model"].values())).fill_(math.nan)
    return tree


def test_run_worker_non_finite_slot_fails_alone_with_its_reason_everywhere(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, train={"epochs": 3}, trials=2)
    interrupted(study)
    second = study.tickets()[1]
    replace_state(study, second, with_nan)

    study.work("second")

    base, failed = study.tickets()
    assert (base.state, failed.state) == (COMPLETE, FAIL)
    assert failed.reason is not None
    assert failed.reason.startswith("the loss is not finite")
    assert [trial.state for trial in study.optuna_trials()] == [TrialState.COMPLETE, TrialState.FAIL]
    run = study.mlflow_runs()["trial-00001"]
    assert run.info.status == "FAILED"
    assert run.data.tags["yolosearch.reason"] == failed.reason


def test_run_worker_failures_in_a_row_stop_the_study_until_it_is_told_to_go_on(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=5)
    study.write(trials=5, max_failures_in_a_row=2)
    study.create()
    in_the_way = study.runs / NAME / "trials"
    in_the_way.write_text("a file where the trials' folder should be")

    with pytest.raises(StudyStoppedError, match=r"^study tiny stopped: 2 trials in a row failed: .*cannot be written"):
        study.work("first")
    with pytest.raises(StudyStoppedError, match="2 trials in a row failed"):
        study.work("second")
    assert study.states() == [FAIL, FAIL, WAITING, WAITING, WAITING]

    in_the_way.unlink()
    study.create()
    assert study.work("third") == 3
    assert study.states() == [FAIL, FAIL, COMPLETE, COMPLETE, COMPLETE]


def test_run_worker_image_deleted_meanwhile_ends_the_worker_and_charges_nobody(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 30, "cache": "none"})
    study.create()
    image = study.data.parent / "images" / "train" / "00003.png"

    class Delete(SignalWhen):
        def run(self) -> None:
            while not self._over.wait(0.02):
                if all(ticket.epochs_done >= 1 for ticket in study.tickets()):
                    image.unlink()
                    return

    with Delete(lambda: True), pytest.raises(UserInputError, match=r"00003\.png"):
        study.work("first")

    assert study.states() == [WAITING] * 2
    assert [ticket.stalled_attempts for ticket in study.tickets()] == [0, 0]


def test_run_worker_checkpoint_that_cannot_be_written_fails_its_trial_alone(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2)
    study.create()
    blocked = study.runs / NAME / "trials" / "00001"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder should be")

    study.work()

    assert study.states() == [COMPLETE, FAIL]
    assert "00001" in (study.tickets()[1].reason or "")


def descendants(pid: int) -> list[int]:
    """Processes below `pid`."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(word) for text in lists for word in text.split()]
    return [*children, *(pid for child in children for pid in descendants(child))]


def loader_processes() -> list[int]:
    """Processes below this one that load images: children of the trainer."""
    trainers = {pid for server in descendants(os.getpid()) for pid in descendants(server)}
    return [pid for trainer in trainers for pid in descendants(trainer)]


@pytest.mark.slow
def test_run_worker_pack_that_crashes_is_retried_trial_by_trial(
    make: Callable[..., TinyStudy], caplog: pytest.LogCaptureFixture
) -> None:
    study = make(trials=2, train={"epochs": 4, "workers": 1, "eval_every": 4})
    study.create()

    class KillLoader(SignalWhen):
        def run(self) -> None:
            while not self._over.wait(0.02):
                if all(ticket.epochs_done >= 1 for ticket in study.tickets()):
                    for pid in loader_processes():
                        os.kill(pid, signal.SIGKILL)
                    return

    with KillLoader(lambda: True):
        study.work()

    assert "a pack of 2 trials crashed" in caplog.text
    assert study.states() == [COMPLETE] * 2
    assert [ticket.attempt for ticket in study.tickets()] == [1, 1]


class Once(SignalWhen):
    """Does something once, as soon as every ticket of the first pack has a checkpoint."""

    def __init__(self, study: TinyStudy, act: Callable[[], object]) -> None:
        super().__init__(lambda: True)
        self._study = study
        self._act = act

    def run(self) -> None:
        while not self._over.wait(0.02):
            if all(ticket.epochs_done >= 1 for ticket in self._study.tickets()[:2]):
                self._act()
                self.sent = True
                return


def trainers() -> list[int]:
    return [pid for server in descendants(os.getpid()) for pid in descendants(server)]


def signal_trainers(number: signal.Signals) -> None:
    for pid in trainers():
        os.kill(pid, number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_run_worker_trainer_that_dies_costs_no_trial(
    make: Callable[..., TinyStudy], number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    study = make(trials=3, train={"epochs": 4})
    study.create()

    with Once(study, lambda: signal_trainers(number)) as killer:
        assert study.work() == 3

    assert killer.sent
    assert number.name in caplog.text
    assert study.states() == [COMPLETE] * 3
    assert [ticket.stalled_attempts for ticket in study.tickets()] == [0, 0, 0]
    assert [len(rows) for rows in study.ledger.all_reports(NAME).values()] == [4, 4, 4]
    assert trainers() == []


def test_run_worker_trainer_that_hangs_is_killed_and_the_trials_go_on(
    make: Callable[..., TinyStudy], caplog: pytest.LogCaptureFixture
) -> None:
    study = make(trials=2, train={"epochs": 4})
    study.create()

    with Once(study, lambda: signal_trainers(signal.SIGSTOP)) as stopper:
        study.work(hang_seconds=15.0)

    assert stopper.sent
    assert "made no progress for 15 s and was killed" in caplog.text
    assert study.states() == [COMPLETE] * 2
    assert [len(rows) for rows in study.ledger.all_reports(NAME).values()] == [4, 4]


def test_run_worker_trial_that_always_kills_its_trainer_fails_with_all_reasons(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=1, train={"epochs": 4})
    study.create()

    class Murderer(SignalWhen):
        def run(self) -> None:
            while not self._over.wait(0.02):
                signal_trainers(signal.SIGKILL)

    with Murderer(lambda: True):
        study.work()

    (ticket,) = study.tickets()
    assert ticket.state is FAIL
    assert (ticket.reason or "").count("SIGKILL") == 3
    assert [trial.state for trial in study.optuna_trials()] == [TrialState.FAIL]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_worker_killed_takes_its_trainer_along(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 60})
    study.create()
    process = study.start("worker")
    wait_for(lambda: all(ticket.epochs_done >= 1 for ticket in study.tickets()), process)
    below = descendants(process.pid)

    process.kill()
    process.wait()

    deadline = time.monotonic() + 30
    while not all(is_gone(pid) for pid in below):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in below if not is_gone(pid)]}"
        time.sleep(0.1)


def resident_bytes(pid: int) -> int:
    """Memory of a process and of all below it."""
    pages = sum(int(Path(f"/proc/{member}/statm").read_text().split()[1]) for member in (pid, *descendants(pid)))
    return pages * resource.getpagesize()


@pytest.mark.slow
def test_worker_host_memory_after_200_trials_is_within_a_tenth_of_that_after_20(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=206, train={"epochs": 2, "pack": 4, "image_size": 32})
    study.create()
    process = study.start("worker")
    found = []
    for count in (20, 200):
        wait_for(lambda count=count: study.ledger.counts(NAME)[COMPLETE] >= count, process, seconds=1500)
        found.append(resident_bytes(process.pid))

    print(f"resident after 20 and 200 trials: {found[0] / 2**20:.0f} and {found[1] / 2**20:.0f} MiB")
    assert process.wait(300) == 0
    assert found[1] < 1.1 * found[0]


def test_worker_asked_to_end_exits_with_130_and_hands_back(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 60})
    study.create()
    process = study.start("worker")
    wait_for(lambda: all(ticket.epochs_done >= 1 for ticket in study.tickets()), process)

    # To the whole group, as a scheduler does: the trainer gets it too.
    os.killpg(process.pid, signal.SIGTERM)

    assert process.wait(60) == 130
    assert study.states() == [WAITING] * 2
    assert [(ticket.stalled_attempts, ticket.history) for ticket in study.tickets()] == [(0, ())] * 2


def test_worker_asked_to_end_with_loader_processes_leaves_no_image_file(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(trials=1, train={"workers": 1})
    study.create()
    # A short name: the sockets of Python's fork server lie in it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory() as scratch:
        monkeypatch.setenv("TMPDIR", scratch)
        process = study.start("worker")

        assert process.wait(180) == 0, process.communicate()[0]
        assert study.states() == [COMPLETE]
        assert list(Path(scratch).glob("yolosearch-images-*")) == []


# ---- what a worker refuses -------------------------------------------------------------------------------------------


def test_run_worker_changed_label_is_refused_naming_both_fingerprints(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    label = study.data.parent / "labels" / "train" / "00000.txt"
    label.write_text("0 0.5 0.5 0.3 0.3\n")

    with pytest.raises(StudyConflictError, match=f"fingerprint .* is not that of study {NAME}"):
        study.work()

    assert study.states() == [WAITING] * 3


def test_run_worker_unknown_study_creates_no_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/nowhere/study.db"

    with pytest.raises(UnknownStudyError, match="study other: no database"):
        run_worker(WorkerOptions(storage_url=url, study="other", runs_dir=tmp_path, worker_id="w"))

    assert list(tmp_path.iterdir()) == []


def test_run_worker_other_name_names_the_studies_that_exist(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    options = WorkerOptions(storage_url=study.storage_url, study="tinny", runs_dir=study.runs, worker_id="w")

    with pytest.raises(UnknownStudyError, match=NAME):
        run_worker(options)


# ---- who is alive ----------------------------------------------------------------------------------------------------

CLAIM_AND_DIE = """
import os, signal, sys
from search.database import make_engine
from search.ledger import Ledger
from search.worker.host import process_identity
ledger = Ledger(make_engine(sys.argv[1]))
ledger.register_worker("gone", "tiny", process_identity(), os.getpid(), "cpu")
ledger.claim("tiny", "gone", 2, 600.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_release_dead_neighbours_frees_what_a_killed_process_held(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    died = subprocess.run([sys.executable, "-c", CLAIM_AND_DIE, study.storage_url], check=False)
    assert died.returncode == -signal.SIGKILL
    assert study.states() == [TicketState.RUNNING, TicketState.RUNNING, WAITING]

    assert release_dead_neighbours(study.ledger, NAME) == 2

    assert study.states() == [WAITING] * 3
    assert [worker.state for worker in study.ledger.workers(NAME)] == [WorkerState.DEAD]


def test_release_dead_neighbours_leaves_the_living_and_other_hosts_alone(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    ledger = study.ledger
    # Neither worker id stands on this process's command line.
    ledger.register_worker("alive", NAME, process_identity(), os.getpid(), "cpu")
    ledger.register_worker("elsewhere", NAME, "another#12345678@99", 1, "cpu")
    ledger.claim(NAME, "alive", 1, 600.0)
    ledger.claim(NAME, "elsewhere", 1, 600.0)

    assert release_dead_neighbours(ledger, NAME) == 0
    assert study.states() == [TicketState.RUNNING, TicketState.RUNNING, WAITING]


def test_is_alive_process_id_used_again_or_not_waited_for_is_dead() -> None:
    assert is_alive(os.getpid(), process_identity())
    assert not is_alive(os.getpid(), f"{host_identity()}@1")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
        identity = f"{host_identity()}@{ticks}"
        assert is_alive(child.pid, identity)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(child.pid, identity)
    assert not is_alive(child.pid, identity)


def test_stop_flag_launcher_gone_is_noticed() -> None:
    assert not StopFlag(os.getppid()).is_set
    assert StopFlag(os.getpid()).is_set
    assert not StopFlag(None).is_set


# ---- leases ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def created(make: Callable[..., TinyStudy]) -> TinyStudy:
    study = make()
    study.create()
    return study


def test_lease_keeper_thread_renews_before_the_lease_ends(created: TinyStudy) -> None:
    ledger = created.ledger
    ticket = ledger.claim(NAME, "here", 1, 60.0)[0]
    with LeaseKeeper(ledger, NAME, "here", 60.0 / 100) as keeper:
        keeper.hold([ticket.id])
        deadline = time.monotonic() + 30
        while ledger.ticket(ticket.id).lease_expires == ticket.lease_expires and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ledger.ticket(ticket.id).lease_expires != ticket.lease_expires
    assert keeper.lost == frozenset()


def test_lease_keeper_ticket_taken_over_is_lost_and_a_finished_one_is_not(created: TinyStudy) -> None:
    ledger = created.ledger
    first, second = ledger.claim(NAME, "here", 2, 60.0)
    keeper = LeaseKeeper(ledger, NAME, "here", 60.0)
    keeper.hold([first.id, second.id])
    ledger.release_worker("here")
    ledger.claim(NAME, "there", 1, 60.0)

    keeper.release([second.id])
    keeper.renew()

    assert keeper.lost == {first.id}
    with pytest.raises(LeaseLostError):
        ledger.save_progress(first, 1, None)


def test_lease_keeper_ticket_that_was_lost_and_is_claimed_again_is_not_lost(created: TinyStudy) -> None:
    ledger = created.ledger
    first = ledger.claim(NAME, "here", 1, 60.0)[0]
    keeper = LeaseKeeper(ledger, NAME, "here", 60.0)
    keeper.hold([first.id])
    ledger.hand_back([first])
    keeper.renew()
    assert keeper.lost == {first.id}

    again = ledger.claim(NAME, "here", 1, 60.0)[0]
    keeper.hold([again.id])

    assert again.id == first.id
    assert (keeper.held, keeper.lost) == ({first.id}, frozenset())


# ---- the mirror ------------------------------------------------------------------------------------------------------


def mirror_of(study: TinyStudy, uri: str | None = None) -> Mirror:
    from search.paths import StudyFolder
    from search.study import load_study, open_storage

    context = MirrorContext(
        config=study.config,
        record=study.ledger.study(NAME),
        folder=StudyFolder(study.runs, NAME),
        class_names=("digit 0", "digit/4"),
        storage_url=study.storage_url,
    )
    tracker = open_tracker(enabled=True, uri=uri, runs_dir=study.runs)
    return Mirror(study.ledger, load_study(study.config, open_storage(study.storage_url)), tracker, context)


def finish_one(ledger: Ledger) -> int:
    """Ticket 0 with two epochs, COMPLETE, as a worker leaves it that dies before anything is mirrored."""
    ticket = ledger.claim(NAME, "here", 1, 60.0)[0]
    for epoch, value in enumerate((0.25, 0.5)):
        metrics = {"fitness": value, "val_box": math.nan, "class_ap/1": 0.125, "lr_bias": 0.1}
        ledger.record_epoch(ticket, epoch, value, metrics, 1_700_000_000.5 + epoch)
    ledger.finish(ticket, COMPLETE, 0.5, None, 1)
    return ticket.id


def test_mirror_reconcile_completes_what_a_dead_worker_left_and_repeats_nothing(
    make: Callable[..., TinyStudy],
) -> None:
    study = make(tracked=True, trials=1)
    study.create()
    ticket_id = finish_one(study.ledger)

    for _ in range(2):
        with mirror_of(study) as mirror:
            mirror.reconcile()
            mirror.notify(ticket_id)

    trial = study.optuna_trials()[0]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.5)
    runs = study.mlflow_runs()
    assert {name: run.info.status for name, run in runs.items()} == {"trial-00000": "FINISHED", "summary": "FINISHED"}
    run = runs["trial-00000"]
    assert study.metric_history(run, "metrics/fitness") == [(0, 0.25), (1, 0.5)]
    assert study.metric_history(run, "class_ap/digit_4") == [(0, 0.125), (1, 0.125)]
    assert study.metric_history(run, "val/box_loss") == []
    assert study.metric_history(runs["summary"], "study/best_objective") == [(0, 0.5)]
    artifacts = study.runs / "mlartifacts"
    hyps = [Hyperparameters.from_yaml(path) for path in artifacts.rglob("hyp*.yaml")]
    assert [hyp.box for hyp in hyps] == [0.05, 0.05]
    assert study.tickets()[0].mirrored


def test_mirror_overtaken_while_it_sends_shows_no_state_of_before(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(tracked=True, trials=1)
    study.create()
    ledger = study.ledger
    ticket = ledger.claim(NAME, "here", 1, 60.0)[0]
    ledger.record_epoch(ticket, 0, 0.25, {"fitness": 0.25}, 1_700_000_000.5)
    mirror = mirror_of(study)
    send = mirror._tracker.log_epochs

    def overtaken(run_id: str, rows: Sequence[EpochMetrics]) -> None:
        """Before it is done, the trial ends, and another worker shows that."""
        send(run_id, rows)
        monkeypatch.undo()
        ledger.finish(ticket, COMPLETE, 0.25, None, 0)
        mirror_of(study).sync(ticket.id)

    monkeypatch.setattr(mirror._tracker, "log_epochs", overtaken)
    mirror.sync(ticket.id)

    run = study.mlflow_runs()["trial-00000"]
    assert (run.info.status, run.data.tags["yolosearch.state"]) == ("FINISHED", "COMPLETE")


def test_mirror_store_away_loses_nothing(make: Callable[..., TinyStudy], caplog: pytest.LogCaptureFixture) -> None:
    study = make(tracked=True, trials=1)
    study.create()
    finish_one(study.ledger)

    # Port 9 (discard) refuses connections.
    away = mirror_of(study, "http://127.0.0.1:9")
    away.reconcile()
    away._thread.start()
    away.close(timeout=4)

    assert "could not be sent, trying again" in caplog.text
    assert "the next worker of this study sends them" in caplog.text
    assert not study.tickets()[0].mirrored
    assert study.optuna_trials()[0].state is TrialState.COMPLETE
    with mirror_of(study) as mirror:
        mirror.reconcile()
    assert study.tickets()[0].mirrored
    assert study.mlflow_runs()["trial-00000"].info.status == "FINISHED"


def test_mirror_unusable_store_is_refused_before_the_study_starts(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make(tracked=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://host")

    with pytest.raises(TrackingConfigError, match="htp://host"):
        study.create()

    assert not (study.runs / NAME).exists()


# ---- PostgreSQL ------------------------------------------------------------------------------------------------------


def test_run_worker_on_postgresql_resumes_a_study(make: Callable[..., TinyStudy], postgres_url: str) -> None:
    study = make(storage_url=postgres_url, train={"epochs": 3}, trials=2)

    interrupted(study)
    study.work("second")

    assert study.states() == [COMPLETE] * 2
    assert [ticket.attempt for ticket in study.tickets()] == [2, 2]
    assert [trial.state for trial in study.optuna_trials()] == [TrialState.COMPLETE] * 2
    engine = make_engine(postgres_url)
    assert len(Ledger(engine).all_reports(NAME)) == 2
    engine.dispose()


def test_run_worker_hyperparameters_that_mean_nothing_fail_their_trial_alone(make: Callable[..., TinyStudy]) -> None:
    focal = {"low": 0.3, "high": 1.0, "off": 0.5, "compensate": True}
    study = make(space={"obj": {"low": 0.5, "high": 20.0}, "fl_gamma": focal}, trials=4, tracked=True)
    study.create()
    wide = study.config.to_json()["space"]
    wide["obj"]["high"] = 900.0
    study.ledger.update_config(NAME, {"space": wide})  # as a version made it that did not look
    sound = {"obj": 2.0, "fl_gamma": 0.5}
    study.ledger.fix_params(NAME, [{"obj": 890.0, "fl_gamma": 1.0}, sound, {"obj": 880.0, "fl_gamma": 1.0}])

    assert study.work() == 4

    first, second = (ticket for ticket in study.tickets() if ticket.state is FAIL)
    assert study.states() == [COMPLETE, FAIL, COMPLETE, FAIL]
    assert re.match(
        r"cannot be trained: hyperparameters: obj is \d{4,}.*; allowed is a number from ", first.reason or ""
    )
    assert (first.attempt, second.attempt) == (1, 1)
    assert [trial.state for trial in study.optuna_trials()].count(TrialState.FAIL) == 2
    runs = study.mlflow_runs()
    run = runs[f"trial-{first.trial_number:05d}"]
    assert (run.info.status, float(run.data.params["obj"]) > 1000) == ("FAILED", True)
    assert runs["summary"].info.status == "FINISHED"
    assert not study.ledger.unmirrored(NAME)
    # Commands that show the trial do so.
    frozen = StudyConfig.from_json(study.ledger.study(NAME).config)
    shown = next(trial for trial in study_status(study.ledger, frozen).trials if trial.number == first.trial_number)
    assert shown.params["obj"] > 1000


def test_run_worker_of_reruns_that_mean_nothing_ends(make: Callable[..., TinyStudy]) -> None:
    focal = {"low": 0.3, "high": 1.0, "off": 0.5, "compensate": True}
    study = make(space={"obj": {"low": 0.5, "high": 20.0}, "fl_gamma": focal}, trials=1)
    study.create()
    params = {"obj": 890.0, "fl_gamma.switch": 0.75, "fl_gamma": 1.0}
    study.ledger.add_reruns(NAME, CONFIRM, [Rerun(candidate=0, seed=1, epochs=2, params=params)])

    assert study.work(kinds=(CONFIRM,)) == 1

    (ticket,) = study.ledger.tickets(NAME, (CONFIRM,))
    assert (ticket.state, (ticket.reason or "").startswith("cannot be trained: ")) == (FAIL, True)
