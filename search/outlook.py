"""A study's forecast as its rows stand: what it costs, when it is done, whether shorter trainings would do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

from search.config import StudyConfig
from search.forecast import (
    Cost,
    Forecast,
    ShortAgainstFull,
    Span,
    Speed,
    hours,
    seconds_left,
    short_against_full,
    study_cost,
)
from search.ledger import SEARCH, EpochRow, StudyRecord, Ticket, TicketState

LEAST_EPOCHS = 3
"""Fewer say nothing about speed."""

Reports = Mapping[int, Sequence[EpochRow]]
"""Evaluated epochs of each ticket that has some, by its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What `check` said before the launch, with what the study's own trials say since."""

    cost: Cost
    speed: Speed | None
    """Of its own epochs; None as long as there are hardly any."""
    seconds_left: float | None
    """At the pace of now; 0 where nothing is left to train, None where the pace is not known."""
    curves: ShortAgainstFull
    now: float
    """UTC epoch seconds."""

    def line(self) -> str:
        """All of it in one line."""
        parts = [self.cost.text()]
        if self.seconds_left is not None and self.seconds_left > 0:
            done = datetime.fromtimestamp(self.now + self.seconds_left, UTC)
            parts.append(f"about {hours(self.seconds_left)} left at this pace, done {done:%a %Y-%m-%d %H:%M} UTC")
        elif self.seconds_left is not None:
            parts.append("nothing is left to train")
        if self.curves.trials:
            parts.append(self.curves.line())
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "at": datetime.fromtimestamp(self.now, UTC).isoformat(timespec="seconds"),
            **Forecast(cost=self.cost, speed=self.speed).to_json(),
            "seconds_left": self.seconds_left,
            "short_against_full": self.curves.to_json(),
        }


def study_outlook(
    config: StudyConfig,
    record: StudyRecord,
    tickets: Sequence[Ticket],
    reports: Reports,
    live: Collection[str],
    now: float,
) -> Outlook:
    """The forecast of a study.

    Args:
        config: The study.
        record: Says whether it was stopped.
        tickets: Of its search.
        reports: Of these tickets.
        live: Names of the workers that were heard of lately.
        now: UTC epoch seconds.
    """
    states = {ticket.state for ticket in tickets}
    is_stopped = record.stop_kind is not None and TicketState.RUNNING not in states
    is_over = is_stopped or not states & {TicketState.WAITING, TicketState.RUNNING}
    rows = [row for ticket in tickets for row in reports.get(ticket.id, ()) if row.metrics.get("seconds", 0.0) > 0]
    return Outlook(
        cost=study_cost(config),
        speed=speed_of(rows, config.train.eval_every, "as this study") if len(rows) >= LEAST_EPOCHS else None,
        seconds_left=0.0 if is_over else pace_left(config, tickets, reports, live),
        curves=curves_of(config, tickets, reports),
        now=now,
    )


def pace_left(config: StudyConfig, tickets: Sequence[Ticket], reports: Reports, live: Collection[str]) -> float | None:
    """Seconds until the budget is spent; pruning is in what ended trials took, and in a guess as long as none has."""
    spans = [_span(ticket, reports.get(ticket.id, ())) for ticket in tickets]
    evaluated = len(config.evaluated_epochs())
    typical = None
    if not any(ticket.state.is_final for ticket in tickets):
        cost = study_cost(config)
        typical = evaluated * cost.expected / (cost.epochs * config.trials)
    return seconds_left(spans, live, evaluated, typical)


def _span(ticket: Ticket, rows: Sequence[EpochRow]) -> Span:
    return Span(
        state=ticket.state.value,
        worker=ticket.worker,
        started=ticket.started,
        done=len(rows),
        moments=tuple((row.attempt, row.stored_at) for row in rows),
    )


def curves_of(config: StudyConfig, tickets: Sequence[Ticket], reports: Reports) -> ShortAgainstFull:
    """Whether the study's own curves say that fewer epochs per trial would do."""
    curves = [
        {row.epoch + 1: row.value for row in reports.get(ticket.id, ())}
        for ticket in tickets
        if ticket.kind == SEARCH and ticket.state is TicketState.COMPLETE
    ]
    return short_against_full(curves, config.train.epochs, best=config.objective.at == "best")


def speed_of(rows: Iterable[EpochRow], eval_every: int, source: str) -> Speed:
    """The typical speed of some epochs. Only evaluated epochs have rows, so their validation counts for several."""
    rows = list(rows)
    slots = [max(1.0, row.metrics.get("slots", 1.0)) for row in rows]
    validation = [row.metrics.get("eval_seconds", 0.0) for row in rows]
    seconds = [
        (row.metrics["seconds"] - spent + spent / eval_every) / count
        for row, spent, count in zip(rows, validation, slots, strict=True)
    ]
    return Speed(seconds=median(seconds), slots=round(median(slots)), source=source)
