"""The cheap training before the full one: records, and who goes on. All functions run in the caller's transaction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from search.ledger.records import EpochRow, Ticket, TicketState
from search.ledger.rows import clock, finite_or_none, lock_held, read_ticket, update_held
from search.ledger.tables import fidelity_table, from_json_metrics, ticket_table

_columns = ticket_table.c

Promote = Callable[[float | None, Sequence[float]], bool]
"""Whether a trial with this value goes on, given the values of all that have one, its own included."""

_BACK_IN_THE_QUEUE: Mapping[str, Any] = {
    "promoted": True,
    "state": TicketState.WAITING,
    "worker": None,
    "lease_expires": None,
    "epochs_done": 0,
    "epochs_at_claim": 0,
    "checkpoint": None,
    "stalled_attempts": 0,
}


def record(
    connection: Connection,
    ticket: Ticket,
    epoch: int,
    value: float | None,
    metrics: Mapping[str, float],
    stored_at: float | None,
    *,
    is_last: bool,
) -> EpochRow:
    """Stores an evaluated epoch unless an earlier attempt did; the last one's value is the trial's.

    Raises:
        LeaseLostError: the ticket is no longer held.
    """
    lock_held(connection, ticket)
    stored = next((row for row in read(connection, ticket.id) if row.epoch == epoch), None)
    if stored is None:
        row = {
            "ticket_id": ticket.id,
            "epoch": epoch,
            "attempt": ticket.attempt,
            "value": finite_or_none(value),
            "metrics": {key: float(number) for key, number in metrics.items()},
            "stored_at": clock(connection) if stored_at is None else stored_at,
        }
        connection.execute(sa.insert(fidelity_table).values(**row))
        stored = next(row for row in read(connection, ticket.id) if row.epoch == epoch)
    if is_last:
        update_held(connection, ticket, fidelity_value=stored.value)
    return stored


def read(connection: Connection, ticket_id: int) -> tuple[EpochRow, ...]:
    """The epochs of a ticket's cheap training, in order."""
    query = sa.select(fidelity_table).where(fidelity_table.c.ticket_id == ticket_id).order_by(fidelity_table.c.epoch)
    rows = [dict(row._mapping) for row in connection.execute(query)]
    return tuple(EpochRow(**{**row, "metrics": from_json_metrics(row["metrics"])}, prune=None) for row in rows)


def settle(connection: Connection, ticket: Ticket, promote: Promote) -> Ticket:
    """Decides once whether a trial goes on to the full training; one that does is back in the queue, uncharged.

    Returns:
        The ticket as it is now: WAITING and promoted, or still held and not promoted.

    Raises:
        LeaseLostError: the ticket is no longer held.
    """
    stored = read_ticket(connection, ticket.id, lock=True)
    if stored.promoted and stored.attempt == ticket.attempt and stored.state is TicketState.WAITING:
        return stored  # an earlier try, whose answer was lost
    lock_held(connection, ticket)
    if stored.promoted is None and promote(stored.fidelity_value, _values(connection, ticket)):
        connection.execute(sa.update(ticket_table).where(_columns.id == ticket.id).values(**_BACK_IN_THE_QUEUE))
        return read_ticket(connection, ticket.id)
    return update_held(connection, ticket, promoted=False)


def _values(connection: Connection, ticket: Ticket) -> list[float]:
    valued = (_columns.study == ticket.study) & (_columns.kind == ticket.kind) & _columns.fidelity_value.is_not(None)
    return list(connection.execute(sa.select(_columns.fidelity_value).where(valued)).scalars())
