"""A study whose trials nobody trained: rows in a real ledger, as many and as good as a test wants."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import NAME, TinyStudy, make_study

from search.confirm import add_confirmation
from search.ledger import CONFIRM, StudyRecord, Ticket, TicketState
from search.review import StudyData, read_study_data

START = 1_700_000_000.0
CLASSES = ("cat", "dog")
BASE = {"box": 0.05, "cls": 0.5}
SPACE = {"box": {"low": 0.02, "high": 0.2, "log": True}, "cls": {"low": 0.1, "high": 2.0, "log": True}}
EPOCHS = 4

Fate = tuple[TicketState, float]
"""How a trial ended, and the value of its last epoch."""


def made_up_study(folder: Path, shared: Path, fates: Sequence[Fate], waiting: int = 0, **changes: Any) -> TinyStudy:
    """Trial n ends as `fates[n]`; trial 0 is the base."""
    count = len(fates) + waiting
    study = make_study(folder, shared, trials=max(1, count), train={"epochs": EPOCHS}, space=SPACE, **changes)
    study.runs.mkdir(exist_ok=True)
    ledger = study.ledger
    ledger.initialise()
    config = study.config
    record = StudyRecord(name=NAME, config=config.to_json(), fingerprint="0123456789abcdef", versions={}, created=START)
    ledger.create_study(record, [BASE, *[None] * (count - 1)], (1, 0, BASE))
    tickets = ledger.claim(NAME, "here", len(fates), 60.0) if fates else ()
    draw = random.Random(7)
    for number, (ticket, fate) in enumerate(zip(tickets, fates, strict=True)):
        _end(study, ticket, number, fate, draw.uniform)
    return study


def _end(study: TinyStudy, ticket: Ticket, number: int, fate: Fate, uniform: Callable[[float, float], float]) -> None:
    ledger, (state, value) = study.ledger, fate
    if number:
        params = {key: math.exp(uniform(math.log(e["low"]), math.log(e["high"]))) for key, e in SPACE.items()}
        ticket = ledger.link_trial(ticket, number + 1, number, params)
    epochs = {TicketState.COMPLETE: EPOCHS, TicketState.PRUNED: 2, TicketState.FAIL: 1}[state]
    for epoch in range(epochs):
        now = value * (epoch + 1) / epochs
        figures = {"fitness": now, "map50": now, "map": now, "precision": 0.9 - now, "recall": now}
        figures |= {"seconds": 4.0, "slots": 2.0}
        ledger.record_epoch(ticket, epoch, now, {**figures, "class_ap/0": now, "class_ap/1": now / 2}, START + epoch)
    if state is TicketState.FAIL:
        ledger.finish(ticket, state, None, "the loss is not finite (epoch 1, batch 3)", None)
    else:
        ledger.finish(ticket, state, value, None, epochs - 1)


def confirm_made_up(study: TinyStudy, gains: Mapping[int, float], seeds: int = 4) -> None:
    """A finished confirmation of the best three trials: the base at 0.4, candidates (by ticket) so much above it."""
    epochs = study.config.train.epochs
    add_confirmation(study.ledger, study.config, top=3, seeds=seeds, epochs=epochs)
    for ticket in study.ledger.claim(NAME, "here", 100, 60.0, kind=CONFIRM):
        noise = 0.001 * ((ticket.number * 7919) % 5)
        value = 0.4 + 0.02 * ((ticket.seed or 0) % 3) + gains.get(ticket.candidate or 0, 0.0) + noise
        study.ledger.record_epoch(ticket, epochs - 1, value, {"fitness": value}, START + 100)
        study.ledger.finish(ticket, TicketState.COMPLETE, value, None, epochs - 1)


def data_of(study: TinyStudy, **changes: Any) -> StudyData:
    """The study's rows."""
    found = read_study_data(study.ledger, study.config, CLASSES)
    own = {name: getattr(found, name) for name in StudyData.__dataclass_fields__}
    return StudyData(**{**own, **changes})
