"""One trial of a pack is fatal to its trainer, again and again: it alone fails, with its reason, and the rest goes on.

The tests print how long it took until something was trained again (`-s` shows it).
"""

from functools import partial
from pathlib import Path

import pytest
import sabotage
import torch
from optuna.trial import TrialState
from sabotage import Sabotage
from tiny import ENVIRONMENT, NAME, TinyStudy, make_study

from search.ledger import MAX_STALLED, TicketState
from search.worker import trainer_process

pytestmark = [pytest.mark.slow, pytest.mark.faults]

COMPLETE, FAIL = TicketState.COMPLETE, TicketState.FAIL
GUILTY = 1
HANG_SECONDS = 20.0


@pytest.fixture
def study(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> TinyStudy:
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    torch.set_num_threads(1)
    shared = tmp_path_factory.getbasetemp()
    study = make_study(tmp_path / "study", shared, tracked=True, trials=4, train={"epochs": 3})
    study.create()
    return study


@pytest.mark.parametrize(
    ("how", "attempts", "reason"),
    [
        ("exit-139", MAX_STALLED, "the trainer process ended with exit code 139"),
        ("segfault", MAX_STALLED, "the trainer process was ended by SIGSEGV"),
        # Of a pack that is too large half goes on and half is handed back, uncharged.
        ("cuda-memory", 2, "OutOfMemoryError: CUDA out of memory"),
        ("host-memory", 2, "can't allocate memory"),
        ("nan", 1, "not finite"),
        ("hang", MAX_STALLED, f"the trainer made no progress for {HANG_SECONDS:g} s and was killed"),
    ],
)
def test_trial_fatal_to_its_trainer_fails_alone_and_the_others_go_on(
    study: TinyStudy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, attempts: int, reason: str
) -> None:
    plan = Sabotage(str(study.tickets()[GUILTY].id), how, tmp_path / "strikes")
    monkeypatch.setattr(trainer_process, "main", partial(sabotage.main, plan))

    study.work(hang_seconds=HANG_SECONDS)

    print(f"{how}: {describe(study, plan)}")
    tickets = study.tickets()
    assert [ticket.state for ticket in tickets] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    guilty = tickets[GUILTY]
    assert reason in (guilty.reason or "")
    assert guilty.attempt == attempts
    others = [ticket for ticket in tickets if ticket.number != GUILTY]
    assert [(t.attempt, t.stalled_attempts, t.history) for t in others] == [(1, 0, ())] * 3
    reports = study.ledger.all_reports(NAME)
    assert [[row.epoch for row in reports[ticket.id]] for ticket in others] == [[0, 1, 2]] * 3
    expected = [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert [trial.state for trial in study.optuna_trials()] == expected
    run = study.mlflow_runs()[f"trial-{guilty.trial_number:05d}"]
    assert (run.info.status, run.data.tags["yolosearch.reason"]) == ("FAILED", guilty.reason)


def describe(study: TinyStudy, plan: Sabotage) -> str:
    """Seconds from each strike to the next sign of training, and from the failure to the first epoch after it."""
    rows = sorted(row.stored_at for rows in study.ledger.all_reports(NAME).values() for row in rows)
    strikes = plan.moments()
    signs = sorted([*rows, *strikes])
    again = [next((sign - strike for sign in signs if sign > strike), 0.0) for strike in strikes]
    failed = study.tickets()[GUILTY].finished or 0.0
    after = [row - failed for row in rows if row > failed]
    started = [(ticket.started or 0.0) - failed for ticket in study.tickets()[GUILTY + 1 :]]
    return (
        f"{len(strikes)} strikes; trained again after {[round(seconds, 1) for seconds in again]} s; from the failure "
        f"to the next epoch's end {after[0] if after else 0.0:.1f} s, to the claims {[round(s, 1) for s in started]} s"
    )
