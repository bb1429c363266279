"""Reruns beside the search: real trainer, real databases, real MLflow store, real signals."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faulty import children, signal_all, trainers
from tiny import NAME, SignalWhen, TinyStudy, make_study, wait_for

from search.cli import main
from search.confirm import add_confirmation, confirm_report, noise_report
from search.ledger import CONFIRM, NOISE, SEARCH, EpochRow, Ticket, TicketState

COMPLETE = TicketState.COMPLETE


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL", "YOLOSEARCH_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    """Makes tiny studies whose data set has a test split."""

    def make(folder: str = "study", **options: object) -> TinyStudy:
        study = make_study(tmp_path / folder, tmp_path_factory.getbasetemp(), **options)
        study.data.write_text(study.data.read_text() + "test: images/val\n")
        return study

    return make


def reruns(study: TinyStudy, kind: str) -> tuple[Ticket, ...]:
    return study.ledger.tickets(NAME, (kind,))


def rows(study: TinyStudy, ticket: Ticket) -> tuple[EpochRow, ...]:
    return study.ledger.reports(ticket.id)


def command(monkeypatch: pytest.MonkeyPatch, study: TinyStudy, *words: str) -> int:
    """The program in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["yolosearch", *words, "--runs-dir", str(study.runs)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_reruns_train_beside_the_search_on_the_same_images_of_each_seed(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=2, noise={"seeds": 2}, train={"pack": 3})
    study.create()
    assert study.work("first") == 4
    assert len(add_confirmation(study.ledger, study.config, top=1, seeds=2, epochs=2)) == 4
    assert study.work("second") == 4

    noise, confirm, search = (reruns(study, kind) for kind in (NOISE, CONFIRM, SEARCH))
    assert {ticket.state for ticket in (*noise, *confirm, *search)} == {COMPLETE}
    assert max(ticket.finished or 0 for ticket in noise) < min(ticket.started or 0 for ticket in search[1:])
    assert [trial.number for trial in study.optuna_trials()] == [0, 1]
    assert [(ticket.seed, ticket.candidate) for ticket in confirm] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for ticket, slots in [*[(ticket, 1) for ticket in noise], *[(ticket, 2) for ticket in confirm]]:
        found = rows(study, ticket)
        assert [(row.epoch, row.metrics["stream_epoch"], row.metrics["slots"]) for row in found] == [
            (0, 0, slots),
            (1, 1, slots),
        ]
        assert ["test/fitness" in row.metrics for row in found] == [False, True]
        # The test split is the validation split here, so both say the same of the last epoch.
        assert found[-1].metrics["test/fitness"] == pytest.approx(found[-1].metrics["fitness"])
    # Alone or beside a candidate: the base of one seed is the same training, and that of another seed is not.
    first, second = (rows(study, ticket)[-1].metrics["train_box"] for ticket in noise)
    paired, other = (rows(study, ticket)[-1].metrics["train_box"] for ticket in (confirm[0], confirm[2]))
    assert (paired, other) == (pytest.approx(first, rel=1e-3), pytest.approx(second, rel=1e-3))
    assert abs(first - second) > 0.01 * first
    assert not [*(study.runs / NAME / "confirm").rglob("*.pt"), *(study.runs / NAME / "confirm").rglob("*.safetensors")]
    check_records(study)


def check_records(study: TinyStudy) -> None:
    """MLflow has a run for each ticket, and what they say together on the summary."""
    runs = study.mlflow_runs()
    assert [name for name in sorted(runs) if name.startswith("noise")] == [
        "noise-00000-base-seed-1",
        "noise-00001-base-seed-2",
    ]
    run = runs["confirm-00003-trial-00001-seed-2"]
    tags = {key: run.data.tags[f"yolosearch.{key}"] for key in ("kind", "seed", "candidate")}
    assert tags == {"kind": "confirm", "seed": "2", "candidate": "1"}
    assert run.info.status == "FINISHED"
    assert {"test/fitness", "test/class_ap/digit 0"} <= set(run.data.metrics)
    report, noise = confirm_report(study.ledger, study.config, 2), noise_report(study.ledger, study.config)
    assert noise.spread is not None
    summary = runs["summary"].data
    assert summary.metrics["noise/sd"] == pytest.approx(noise.spread.sd)
    gain = report.comparison(1)
    assert gain is not None
    assert summary.metrics["confirm/val/trial_1/gain"] == pytest.approx(gain.gain)
    assert summary.tags["yolosearch.confirmation"] == report.verdict()


def test_reruns_interrupted_go_on_and_one_that_lost_its_checkpoint_sees_its_own_images(
    make: Callable[..., TinyStudy], caplog: pytest.LogCaptureFixture
) -> None:
    study = make(trials=2, noise={"seeds": 2}, train={"pack": 2, "epochs": 4})
    study.create()
    study.work("search", kinds=(SEARCH, NOISE))
    add_confirmation(study.ledger, study.config, top=1, seeds=2, epochs=4)
    with SignalWhen(lambda: all(ticket.epochs_done >= 1 for ticket in reruns(study, CONFIRM)[:2])) as sender:
        study.work("first", kinds=(CONFIRM,))
    assert sender.sent
    base, candidate = reruns(study, CONFIRM)[:2]
    assert (base.state, base.history, base.worker) == (TicketState.WAITING, (), None)
    for path in (study.runs / NAME / "confirm" / "00000").glob("checkpoint-*.pt"):
        path.unlink()

    assert study.work("second", kinds=(CONFIRM,)) == 4

    assert "starts over with its seed" in caplog.text
    confirm = reruns(study, CONFIRM)
    assert [ticket.state for ticket in confirm] == [COMPLETE] * 4
    for ticket in confirm:
        assert [(row.epoch, row.metrics["stream_epoch"]) for row in rows(study, ticket)] == [(e, e) for e in range(4)]
    # From the loss of the checkpoint on they trained apart, and the base is still the training of its seed.
    again, undisturbed = (rows(study, ticket)[-1].metrics for ticket in (confirm[0], reruns(study, NOISE)[0]))
    assert again["slots"] == 1
    assert again["train_box"] == pytest.approx(undisturbed["train_box"], rel=1e-3)
    assert rows(study, candidate)[-1].metrics["slots"] == 1


def test_noise_and_confirm_without_training_only_add_tickets(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make(trials=2)

    assert command(monkeypatch, study, "noise", str(study.file), "--seeds", "3", "--no-train", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["asked"], report["done"]) == (3, 0)
    assert command(monkeypatch, study, "noise", NAME, "--no-train") == 0
    assert "0 of 3 reruns of the base are complete" in capsys.readouterr().out
    assert command(monkeypatch, study, "confirm", NAME, "--no-train") == 2
    assert "none of 2 trials but the base is complete; allowed: " in capsys.readouterr().err
    assert study.states() == [TicketState.WAITING] * 2


def test_noise_of_a_new_study_that_is_to_stop_below_it_creates_it(
    make: Callable[..., TinyStudy], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make(trials=2, stop={"below_noise": True})

    assert command(monkeypatch, study, "check", str(study.file)) == 2
    assert "`yolosearch noise STUDY.yaml --seeds 3`, which creates the study" in capsys.readouterr().err
    assert command(monkeypatch, study, "noise", str(study.file), "--seeds", "3", "--no-train", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["asked"], report["confidence"]) == (3, 0.95)
    assert command(monkeypatch, study, "check", str(study.file)) == 0
    assert command(monkeypatch, study, "create", str(study.file)) == 0


@pytest.mark.slow
@pytest.mark.faults
def test_confirm_whose_trainer_is_killed_has_exactly_what_was_asked(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"pack": 2, "epochs": 6})
    study.create()
    study.work("search")
    process = study.start("confirm", "--top", "1", "--seeds", "3", "--json")
    wait_for(lambda: reruns(study, CONFIRM)[1].epochs_done >= 2, process)
    (worker,) = children(process.pid)
    signal_all(trainers(worker), signal.SIGKILL)
    output = process.communicate(timeout=300)[0]

    assert process.returncode == 0, output
    confirm = reruns(study, CONFIRM)
    assert [ticket.state for ticket in confirm] == [COMPLETE] * 6
    for ticket in confirm:
        assert [(row.epoch, row.metrics["stream_epoch"]) for row in rows(study, ticket)] == [(e, e) for e in range(6)]
    assert len(study.optuna_trials()) == 2
    assert confirm_report(study.ledger, study.config, 6).is_over
