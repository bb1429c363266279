"""Rows to records, the database's clock, and the conditional update that every holder's write goes through."""

import math
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from search.errors import LeaseLostError, UnknownStudyError
from search.ledger.records import EpochRow, StopKind, StudyRecord, Ticket, TicketState, WorkerRow, WorkerState
from search.ledger.tables import epoch_table, from_json_metrics, study_table, ticket_table

TICKET_COLUMNS = [ticket_table.c[name] for name in Ticket.__dataclass_fields__]


def clock(connection: Connection) -> float:
    """UTC epoch seconds on the clock that leases run on: the server's; with SQLite, which has none, this host's."""
    if connection.dialect.name == "sqlite":
        return time.time()
    seconds = sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double)
    return float(connection.execute(sa.select(seconds)).scalar_one())


def finite_or_none(value: float | None) -> float | None:
    """`value` if it is a finite number; SQLite has no NaN and PostgreSQL would sort it above all."""
    return float(value) if value is not None and math.isfinite(value) else None


def ticket_of(row: Row[Any]) -> Ticket:
    """A row of `TICKET_COLUMNS` as a record."""
    values = dict(row._mapping)
    values["state"] = TicketState(values["state"])
    values["history"] = tuple(values["history"])
    if values["objective_values"] is not None:
        values["objective_values"] = tuple(map(float, values["objective_values"]))
    return Ticket(**values)


def read_ticket(connection: Connection, ticket_id: int, *, lock: bool = False) -> Ticket:
    """One ticket, locked until the transaction ends if asked; raises LookupError for an id that does not exist."""
    query = sa.select(*TICKET_COLUMNS).where(ticket_table.c.id == ticket_id)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise LookupError(f"no ticket {ticket_id}")
    return ticket_of(row)


def epoch_of(row: Row[Any]) -> EpochRow:
    """A row of `epoch_table` as a record."""
    values = dict(row._mapping)
    values["metrics"] = from_json_metrics(values["metrics"])
    return EpochRow(**values)


def read_epoch(connection: Connection, ticket_id: int, epoch: int) -> EpochRow | None:
    """The row of one epoch, None if it was not reported."""
    key = (epoch_table.c.ticket_id == ticket_id) & (epoch_table.c.epoch == epoch)
    row = connection.execute(sa.select(epoch_table).where(key)).one_or_none()
    return None if row is None else epoch_of(row)


def study_of(row: Row[Any]) -> StudyRecord:
    """A row of `study_table` as a record."""
    values = {name: row._mapping[name] for name in StudyRecord.__dataclass_fields__}
    # A stop that an earlier version wrote has no kind: it knew only failures.
    kind = values["stop_kind"] or (None if values["stop_reason"] is None else StopKind.FAILED)
    return StudyRecord(**{**values, "stop_kind": None if kind is None else StopKind(kind)})


def read_study(connection: Connection, name: str, *, lock: bool = False) -> Row[Any]:
    """The row of a study, locked until the transaction ends if asked.

    Raises:
        UnknownStudyError: naming the studies that exist.
    """
    query = sa.select(study_table).where(study_table.c.name == name)
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        names = connection.execute(sa.select(study_table.c.name).order_by(study_table.c.name).limit(10)).scalars().all()
        raise UnknownStudyError(f"no study {name!r} in this database; it has: {', '.join(names) or 'none'}")
    return row


def worker_of(row: Row[Any]) -> WorkerRow:
    """A row of `worker_table` as a record."""
    return WorkerRow(**{**row._mapping, "state": WorkerState(row._mapping["state"])})


def held(ticket: Ticket) -> sa.ColumnElement[bool]:
    """The condition under which the holder of `ticket` may write."""
    return _latest(ticket) & (ticket_table.c.state == TicketState.RUNNING)


def _latest(ticket: Ticket) -> sa.ColumnElement[bool]:
    """Whether no later attempt than this one has begun."""
    return (ticket_table.c.id == ticket.id) & (ticket_table.c.attempt == ticket.attempt)


def lost(ticket: Ticket) -> LeaseLostError:
    """The error for a holder that is none any more."""
    return LeaseLostError(
        f"trial {ticket.number} of study {ticket.study!r}: attempt {ticket.attempt} is over, nothing was written"
    )


def update_held(connection: Connection, ticket: Ticket, **values: Any) -> Ticket:
    """Writes `values` if `ticket` is still held, and returns the new row; else raises LeaseLostError."""
    return _update(connection, ticket, held(ticket), values)


def update_attempt(connection: Connection, ticket: Ticket, **values: Any) -> Ticket:
    """As `update_held`, but the attempt may have ended: for what mirrors find out later than it happened."""
    return _update(connection, ticket, _latest(ticket), values)


def _update(
    connection: Connection, ticket: Ticket, condition: sa.ColumnElement[bool], values: Mapping[str, Any]
) -> Ticket:
    if connection.execute(sa.update(ticket_table).where(condition).values(**values)).rowcount != 1:
        raise lost(ticket)
    return read_ticket(connection, ticket.id)


def lock_held(connection: Connection, ticket: Ticket) -> None:
    """Keeps the lease from being taken over until the transaction ends; raises LeaseLostError if it already was."""
    query = sa.select(ticket_table.c.id).where(held(ticket)).with_for_update()
    if connection.execute(query).one_or_none() is None:
        raise lost(ticket)
