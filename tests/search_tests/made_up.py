"""A study whose trials nobody trained: rows in a real ledger, as many and as good as a test wants."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import NAME, TinyStudy, make_study

from search.config import objective_values
from search.confirm import add_confirmation, add_noise
from search.ledger import CONFIRM, NOISE, StudyRecord, Ticket, TicketState
from search.review import StudyData, read_study_data

START = 1_700_000_000.0
CLASSES = ("cat", "dog")
DIGITS = ("digit 0", "digit 4")
"""What the data set itself calls them, as objectives do."""
BASE = {"box": 0.05, "cls": 0.5}
SPACE = {"box": {"low": 0.02, "high": 0.2, "log": True}, "cls": {"low": 0.1, "high": 2.0, "log": True}}
EPOCHS = 4

Fate = tuple[TicketState, float]
"""How a trial ended, and the value of its last epoch."""


def made_up_study(
    folder: Path,
    shared: Path,
    fates: Sequence[Fate],
    waiting: int = 0,
    figures: Mapping[int, Mapping[str, float]] | None = None,
    **changes: Any,
) -> TinyStudy:
    """Trial n ends as `fates[n]`, with the metrics `figures[n]` where they are to differ; trial 0 is the base."""
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
        _end(study, ticket, number, fate, draw.uniform, (figures or {}).get(number, {}))
    return study


def rerun_base(study: TinyStudy, runs: Sequence[Mapping[str, float]]) -> None:
    """The base has been trained again on as many other seeds; metrics of each, among them `fitness`."""
    add_noise(study.ledger, study.config, len(runs))
    tickets = study.ledger.claim(NAME, "here", len(runs), 60.0, kind=NOISE)
    for ticket, own in zip(tickets, runs, strict=True):
        value, figures = own["fitness"], _figures(own["fitness"], own)
        study.ledger.record_epoch(ticket, EPOCHS - 1, value, figures, START)
        values = objective_values(study.config, figures, DIGITS) or None
        study.ledger.finish(ticket, TicketState.COMPLETE, value, None, EPOCHS - 1, values)


def _figures(value: float, own: Mapping[str, float]) -> dict[str, float]:
    found = {"fitness": value, "map50": value, "map": value, "precision": 0.9 - value, "recall": value}
    return {**found, "seconds": 4.0, "slots": 2.0, "class_ap/0": value, "class_ap/1": value / 2, **own}


def _end(
    study: TinyStudy,
    ticket: Ticket,
    number: int,
    fate: Fate,
    uniform: Callable[[float, float], float],
    own: Mapping[str, float],
) -> None:
    ledger, (state, value) = study.ledger, fate
    if number:
        params = {key: math.exp(uniform(math.log(e["low"]), math.log(e["high"]))) for key, e in SPACE.items()}
        ticket = ledger.link_trial(ticket, number + 1, number, params)
    epochs = {TicketState.COMPLETE: EPOCHS, TicketState.PRUNED: 2, TicketState.FAIL: 1}[state]
    for epoch in range(epochs):
        now = value * (epoch + 1) / epochs
        figures = _figures(now, own)
        ledger.record_epoch(ticket, epoch, now, figures, START + epoch)
    if state is TicketState.FAIL:
        ledger.finish(ticket, state, None, "the loss is not finite (epoch 1, batch 3)", None)
    else:
        values = objective_values(study.config, figures, DIGITS) if state is TicketState.COMPLETE else None
        ledger.finish(ticket, state, value, None, epochs - 1, values or None)


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
