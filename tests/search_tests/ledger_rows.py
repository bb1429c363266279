"""A study in a ledger without any training: what workers would have written, written by hand."""

import time
from collections.abc import Sequence
from pathlib import Path

from search.config import StudyConfig, parse_study
from search.database import make_engine
from search.ledger import Ledger, StudyRecord, Ticket, TicketState

NAME = "rows"


def study_config(trials: int, epochs: int = 6) -> StudyConfig:
    """A study of the digits that nobody trains."""
    return parse_study(
        {
            "name": NAME,
            "data": "builtin:digits",
            "train": {"epochs": epochs, "image_size": 64, "device": "cpu"},
            "space": {"box": {"low": 0.02, "high": 0.2}},
            "trials": trials,
            "tracking": {"enabled": False},
        },
        source="the test",
    )


def make_ledger(folder: Path, config: StudyConfig) -> Ledger:
    """Its ledger in `folder/runs/rows/study.db`, where `yolosearch --runs-dir` finds it; all trials wait."""
    path = folder / "runs" / NAME / "study.db"
    path.parent.mkdir(parents=True)
    ledger = Ledger(make_engine(f"sqlite:///{path}"))
    ledger.initialise()
    record = StudyRecord(name=NAME, config=config.to_json(), fingerprint="f" * 16, versions={}, created=time.time())
    ledger.create_study(record, [None] * config.trials)
    return ledger


def claim(ledger: Ledger, worker: str, count: int, *, pack: int = 4) -> tuple[Ticket, ...]:
    """A registered worker holds the next trials, each linked to a trial of Optuna of its own number."""
    ledger.register_worker(worker, NAME, "a-host", 4_000_000, "cpu bf16")
    ledger.set_pack(worker, pack)
    tickets = ledger.claim(NAME, worker, count, 300.0)
    return tuple(ledger.link_trial(t, 100 + t.number, t.number, {"box": 0.05 + 0.01 * t.number}) for t in tickets)


def report(ledger: Ledger, ticket: Ticket, values: Sequence[float | None]) -> None:
    """Its epochs from the first on."""
    for epoch, value in enumerate(values):
        ledger.record_epoch(ticket, epoch, value, {"fitness": value or 0.0})


def complete(ledger: Ledger, ticket: Ticket, values: Sequence[float]) -> None:
    """Trains it to its end."""
    report(ledger, ticket, values)
    ledger.finish(ticket, TicketState.COMPLETE, values[-1], None, best_epoch=len(values) - 1)
