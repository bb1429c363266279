"""The first fidelity: who goes on, what is recorded of it, and what survives a worker."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from tiny import NAME, SignalWhen, TinyStudy, make_study, wait_for

from search.database import make_engine
from search.errors import LeaseLostError, StudyConfigError
from search.fidelity import FidelityStatus, fidelity_train_config, is_promoted, spearman
from search.launch.prepare import plan_study
from search.ledger import Ledger, StudyRecord, TicketState
from search.report import study_status
from search.settings import FidelityConfig
from search.study import load_study, open_storage
from search.worker.linking import link_trial
from yolocore.checkpoint import save_weights
from yolocore.model import initial_state

COMPLETE, PRUNED, RUNNING, WAITING = (TicketState[name] for name in ("COMPLETE", "PRUNED", "RUNNING", "WAITING"))
FIDELITY = {"freeze": 10, "epochs": 1, "reduction_factor": 3}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("YOLOSEARCH_STORAGE_URL", raising=False)
    torch.set_num_threads(1)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    """Makes tiny studies that start from weights and have a first fidelity."""
    weights = tmp_path / "start.safetensors"
    save_weights(weights, initial_state("n", 2, 0))

    def study(**changes: object) -> TinyStudy:
        train = {"weights": str(weights), **changes.pop("train", {})}  # type: ignore[dict-item]
        shared = tmp_path_factory.getbasetemp()
        return make_study(tmp_path / "study", shared, **{"fidelity": FIDELITY, **changes, "train": train})

    return study


# ---- who goes on, and how well it foretells --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "values", "expected"),
    [
        (0.1, [0.1], True),  # the first has nobody to lose against
        (0.1, [0.1, 0.2], False),
        (0.2, [0.1, 0.2], True),
        (0.4, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], False),
        (0.5, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], True),
        (0.5, [0.5] * 6, True),
        (None, [0.1, 0.2], False),
        (None, [], False),
    ],
)
def test_is_promoted_only_the_best_third_goes_on(value: float | None, values: list[float], expected: bool) -> None:
    assert is_promoted(value, values, 3) is expected


@pytest.mark.parametrize(
    "pairs",
    [
        [(0.1, 0.3), (0.2, 0.2), (0.3, 0.4)],
        [(0.1, 0.9), (0.2, 0.5), (0.3, 0.1), (0.4, 0.0)],
        [(0.1, 0.2), (0.1, 0.3), (0.4, 0.3), (0.2, 0.3), (0.9, 0.8)],
    ],
)
def test_spearman_equals_scipy_ties_included(pairs: list[tuple[float, float]]) -> None:
    expected = spearmanr(*zip(*pairs, strict=True)).statistic
    assert spearman(pairs) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pairs", [[], [(0.1, 0.2), (0.3, 0.4)], [(0.5, 0.1), (0.5, 0.2), (0.5, 0.3)]])
def test_spearman_without_anything_to_rank_is_none(pairs: list[tuple[float, float]]) -> None:
    assert spearman(pairs) is None


# ---- the study file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fidelity": {"freeze": 10}}, r"fidelity\.epochs: missing; allowed: a whole number >= 1"),
        (
            {"fidelity": {"epochs": 1, "freeze": 25}},
            r"fidelity\.freeze: got 25; allowed: a whole number >= 1 and <= 24",
        ),
        ({"fidelity": {"epochs": 1, "reduction": 3}}, r"fidelity\.reduction: unknown key .*did you mean reduction_f"),
        ({"train": {"freeze": 12}}, r"fidelity\.freeze: got 10; allowed: at least train\.freeze \(12\)"),
        ({"train": {"weights": None}}, "without train.weights the frozen layers would keep random weights"),
    ],
)
def test_study_file_impossible_fidelity_is_named(
    make: Callable[..., TinyStudy], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(StudyConfigError, match=message):
        _ = make(**changes).config


def test_fidelity_train_config_differs_in_what_it_should(make: Callable[..., TinyStudy]) -> None:
    config = make(train={"epochs": 30, "eval_every": 3}).config
    full = config.train_config(Path("data.yaml"))
    cheap = fidelity_train_config(config, full)
    assert cheap is not None
    assert (cheap.freeze, cheap.freeze_bn, cheap.epochs, cheap.eval_every) == (10, True, 1, 1)
    assert (cheap.weights, cheap.batch_size, cheap.seed) == (full.weights, full.batch_size, full.seed)


def test_plan_study_with_fidelity_says_how_many_will_go_on(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=10)
    notices = plan_study(study.config, study.storage_url, study.runs).notices
    assert any("about 4 of 10 go on to the full training" in notice for notice in notices)


# ---- the ledger ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(storage_url: str) -> Ledger:
    ledger = Ledger(make_engine(storage_url))
    ledger.initialise()
    record = StudyRecord(name="s", config={}, fingerprint="f", versions={}, created=0.0)
    ledger.create_study(record, [None] * 4)
    return ledger


def test_settle_fidelity_promoted_goes_back_uncharged_and_is_decided_once(ledger: Ledger) -> None:
    first, second = ledger.claim("s", "w", 2, 60)
    for ticket, value in ((first, 0.3), (second, 0.1)):
        stored = ledger.record_fidelity(ticket, 0, value, {"fitness": value}, is_last=True)
        again = ledger.record_fidelity(ticket, 0, 0.9, {"fitness": 0.9}, is_last=True)
        assert (stored.value, again.value, again.metrics) == (value, value, {"fitness": value})
    seen: list[list[float]] = []

    def best(value: float | None, values: list[float]) -> bool:
        seen.append(sorted(values))
        return value == max(values)

    promoted, beaten = (ledger.settle_fidelity(ticket, best) for ticket in (first, second))

    assert seen == [[0.1, 0.3], [0.1, 0.3]]
    assert (promoted.state, promoted.promoted, promoted.worker, promoted.stalled_attempts) == (WAITING, True, None, 0)
    assert (beaten.state, beaten.promoted, beaten.fidelity_value) == (RUNNING, False, 0.1)
    assert ledger.settle_fidelity(second, lambda *_: True).promoted is False  # what was decided holds
    assert ledger.settle_fidelity(first, lambda *_: False).promoted is True
    assert ledger.waiting_promoted("s") == 1
    assert ledger.parked("s") == 0
    (back,) = ledger.claim("s", "other", 1, 60)
    assert (back.number, back.attempt, back.epochs_done, back.promoted) == (0, 2, 0, True)
    with pytest.raises(LeaseLostError):
        ledger.settle_fidelity(first, lambda *_: True)
    with pytest.raises(LeaseLostError):
        ledger.record_fidelity(first, 1, 0.5, {}, is_last=True)
    assert [row.value for row in ledger.fidelity_reports(first.id)] == [0.3]
    assert ledger.reports(first.id) == ()
    ledger.delete_study("s", force=True)


# ---- a study to its end ----------------------------------------------------------------------------------------------


def other_worker_promotes(study: TinyStudy, numbers: tuple[int, ...], value: float) -> None:
    """What another worker leaves whose trials did better than a tiny training ever will."""
    optuna_study = load_study(study.config, open_storage(study.storage_url))
    claimed = study.ledger.claim(NAME, "other", len(study.tickets()), 60)
    study.ledger.hand_back([ticket for ticket in claimed if ticket.number not in numbers])
    for ticket in claimed:
        if ticket.number in numbers:
            linked = link_trial(study.ledger, optuna_study, study.config, ticket)
            study.ledger.record_fidelity(linked, 0, value, {"fitness": value}, is_last=True)
            assert study.ledger.settle_fidelity(linked, lambda *_: True).promoted


def test_run_worker_fidelity_only_the_best_and_the_base_train_to_the_end(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=4)
    study.create()
    other_worker_promotes(study, (2, 3), 0.9)

    assert study.work() == 4

    tickets = study.tickets()
    assert study.states() == [COMPLETE, PRUNED, COMPLETE, COMPLETE]
    assert [ticket.promoted for ticket in tickets] == [True, False, True, True]
    assert [ticket.stalled_attempts for ticket in tickets] == [0] * 4
    assert [ticket.value is None for ticket in tickets] == [False, True, False, False]
    assert "after 1 epochs with 10 layers frozen, not among the best 1/3 so far" in (tickets[1].reason or "")
    # Its records are of their own: no epoch of the full training, no step in Optuna.
    assert [len(study.ledger.fidelity_reports(ticket.id)) for ticket in tickets] == [1] * 4
    assert [len(study.ledger.reports(ticket.id)) for ticket in tickets] == [2, 0, 2, 2]
    trials = study.optuna_trials()
    for ticket in tickets:
        trial = trials[ticket.trial_number or 0]
        assert (trial.state.name, sorted(trial.intermediate_values)) == (
            ticket.state,
            [1, 2] if ticket.promoted else [],
        )
    runs = study.mlflow_runs()
    for ticket in tickets[:2]:
        run = runs[f"trial-{ticket.trial_number:05d}"]
        assert [step for step, _ in study.metric_history(run, "fidelity/metrics/fitness")] == [0]
        assert [step for step, _ in study.metric_history(run, "metrics/fitness")] == ([0, 1] if ticket.promoted else [])
        assert float(run.data.tags["yolosearch.fidelity_value"]) == pytest.approx(ticket.fidelity_value, rel=1e-5)
    assert study.weights(1) == []


def test_run_worker_fidelity_status_counts_trials_and_pairs(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=3)
    study.create()
    other_worker_promotes(study, (1, 2), 0.9)
    study.work()
    tickets = study.tickets()
    found = study_status(study.ledger, study.config)
    assert found.fidelity == FidelityStatus.of(tickets, FidelityConfig.model_validate(FIDELITY))
    assert found.fidelity is not None
    assert (found.fidelity.valued, found.fidelity.promoted, found.fidelity.pairs) == (3, 3, 3)
    assert found.fidelity.line().startswith("fidelity: 3 trials (3 epochs), 3 promoted")
    assert json.loads(json.dumps(found.to_json()))["fidelity"]["pairs"] == 3


def test_run_worker_stopped_between_the_fidelities_goes_on_where_it_was(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=3, train={"epochs": 3})
    study.create()
    with SignalWhen(lambda: any(ticket.promoted for ticket in study.tickets())) as sender:
        study.work("first")
    assert sender.sent
    before = {ticket.number: ticket for ticket in study.tickets()}
    assert before[0].promoted is not None or before[1].promoted is not None

    study.work("second")

    tickets = study.tickets()
    assert {ticket.state for ticket in tickets} <= {COMPLETE, PRUNED}
    assert tickets[0].state is COMPLETE
    assert len(study.optuna_trials()) == 3
    for ticket in tickets:
        assert len(study.ledger.fidelity_reports(ticket.id)) == 1
        assert len(study.ledger.reports(ticket.id)) == (3 if ticket.state is COMPLETE else 0)
        known = before[ticket.number]
        assert known.promoted is None or known.promoted == ticket.promoted
        assert known.fidelity_value is None or known.fidelity_value == ticket.fidelity_value


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["valued", "promoted", "full"])
def test_worker_killed_in_any_phase_loses_no_trial(make: Callable[..., TinyStudy], moment: str) -> None:
    """SIGKILL to the worker and its trainer; the next one finishes exactly the asked number of trials."""
    study = make(tracked=True, trials=5, train={"epochs": 4})
    study.create()
    reached = {
        "valued": lambda: any(study.ledger.fidelity_reports(ticket.id) for ticket in study.tickets()),
        "promoted": lambda: any(ticket.promoted for ticket in study.tickets()),
        "full": lambda: any(ticket.promoted and ticket.epochs_done >= 1 for ticket in study.tickets()),
    }[moment]
    process = study.start("worker")
    wait_for(reached, process)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    decided = {ticket.number: ticket.promoted for ticket in study.tickets() if ticket.promoted is not None}

    study.work("second")

    tickets = study.tickets()
    assert all(ticket.state in (COMPLETE, PRUNED) for ticket in tickets)
    assert tickets[0].state is COMPLETE
    assert {number: tickets[number].promoted for number in decided} == decided
    assert len(study.optuna_trials()) == 5
    assert all(len(study.ledger.reports(t.id)) == (4 if t.state is COMPLETE else 0) for t in tickets)
    assert len(study.mlflow_runs()) == 6
