"""Who gets which ticket: claims, take-overs and the end of attempts. All functions run inside the caller's transaction.

A transaction that locks rows here has them to itself: PostgreSQL skips rows that another claim holds (SKIP LOCKED) and
looks again at those that changed meanwhile; on SQLite the whole transaction is exclusive (BEGIN IMMEDIATE).
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from search.errors import StudyStoppedError
from search.ledger.records import SEARCH, Ticket, TicketState
from search.ledger.rows import TICKET_COLUMNS, clock, read_study, read_ticket, study_of, ticket_of
from search.ledger.tables import ticket_table

MAX_STALLED = 3
"""After so many attempts in a row without a new checkpoint a trial is FAIL."""

MOST_ACCEPTED = 1000
"""A claim that chooses looks no further: far more than join at once, and no more than a statement may name."""

_columns = ticket_table.c
_ORDER = (sa.case((_columns.epochs_done > 0, 0), else_=1), _columns.number)
_is_running = _columns.state == TicketState.RUNNING
_stalled_if_taken = sa.case(
    (_is_running & (_columns.epochs_done <= _columns.epochs_at_claim), _columns.stalled_attempts + 1),
    else_=_columns.stalled_attempts,
)


def claim(
    connection: Connection,
    study: str,
    kind: str,
    worker: str,
    limit: int,
    lease_seconds: float,
    token: str,
    *,
    joining: bool = False,
    accept: Callable[[Ticket], bool] | None = None,
    alike: Callable[[Ticket, Ticket], bool] | None = None,
) -> tuple[Ticket, ...]:
    """Leases up to `limit` tickets.

    Started tickets go first, so that interrupted trials end before new ones begin; then by number. A ticket on its last
    chance is claimed alone and never to join others, so that a trial that kills its worker cannot spend the last chance
    of its neighbours. With `accept`, of those that join only the ones for which it holds; with `alike`, only those for
    which it holds of the first and them. A study that was stopped gives out no tickets of its search.

    Raises:
        UnknownStudyError, StudyStoppedError.
    """
    record = study_of(read_study(connection, study))
    if record.stop_kind is not None and kind == SEARCH:
        text = f"study {study!r} was stopped: {record.stop_reason}"
        raise StudyStoppedError(text, planned=record.stop_kind.is_planned)
    now = clock(connection)
    first = None if joining else _first_startable(connection, study, kind, now)
    if first is None and not joining:
        return ()
    chosen = [] if first is None else [first]
    if first is None or first.stalled_attempts < MAX_STALLED - 1:
        others = _stalled_if_taken < MAX_STALLED - 1
        if first is not None:
            others &= _columns.id != first.id
            accept = partial(alike, first) if alike is not None else accept
        if accept is not None:
            others &= _columns.id.in_(_accepted(connection, study, kind, now, accept))
        found = _lock_claimable(connection, study, kind, now, limit - len(chosen), others)
        chosen.extend(_end_expired(connection, ticket) for ticket in found)
    if chosen:
        _lease(connection, chosen, worker, now, lease_seconds, token)
    return claimed_with(connection, token)


def claimed_with(connection: Connection, token: str) -> tuple[Ticket, ...]:
    """What the claim with this token holds."""
    query = sa.select(*TICKET_COLUMNS).where((_columns.token == token) & _is_running).order_by(_columns.number)
    return tuple(ticket_of(row) for row in connection.execute(query))


def _first_startable(connection: Connection, study: str, kind: str, now: float) -> Ticket | None:
    """The next ticket in order, locked; those that have no attempt left become FAIL on the way."""
    while found := _lock_claimable(connection, study, kind, now, 1, sa.true()):
        ticket = _end_expired(connection, found[0])
        if ticket.state is TicketState.WAITING:
            return ticket
    return None


def _lock_claimable(
    connection: Connection, study: str, kind: str, now: float, limit: int, condition: sa.ColumnElement[bool]
) -> list[Ticket]:
    if limit < 1:
        return []
    query = (
        sa.select(*TICKET_COLUMNS)
        .where(_claimable(study, kind, now) & condition)
        .order_by(*_ORDER)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [ticket_of(row) for row in connection.execute(query)]


def _claimable(study: str, kind: str, now: float) -> sa.ColumnElement[bool]:
    free = (_columns.state == TicketState.WAITING) | (_is_running & (_columns.lease_expires < now))
    return (_columns.study == study) & (_columns.kind == kind) & free


def _accepted(connection: Connection, study: str, kind: str, now: float, accept: Callable[[Ticket], bool]) -> list[int]:
    """Looked for before any is locked: most will not be wanted, and others may claim them meanwhile."""
    rows = connection.execute(sa.select(*TICKET_COLUMNS).where(_claimable(study, kind, now)).order_by(*_ORDER))
    found = (ticket.id for ticket in map(ticket_of, rows) if accept(ticket))
    return list(itertools.islice(found, MOST_ACCEPTED))


def _end_expired(connection: Connection, ticket: Ticket) -> Ticket:
    if ticket.state is TicketState.WAITING:
        return ticket
    return end_attempt(connection, ticket, "its lease expired")


def end_attempt(connection: Connection, ticket: Ticket, why: str) -> Ticket:
    """Ends a locked RUNNING ticket's attempt as a crash: WAITING again, or FAIL after too many stalled attempts."""
    progressed = ticket.epochs_done > ticket.epochs_at_claim
    stalled = 0 if progressed else ticket.stalled_attempts + 1
    ending = f"attempt {ticket.attempt} on {ticket.worker}: {why} ({ticket.epochs_done} epochs done)"
    history = [*ticket.history, ending]
    values: dict[str, Any] = {"worker": None, "lease_expires": None, "stalled_attempts": stalled, "history": history}
    if stalled < MAX_STALLED:
        values["state"] = TicketState.WAITING
    else:
        values |= {
            "state": TicketState.FAIL,
            "reason": f"{stalled} attempts without progress: {'; '.join(history[-stalled:])}",
            "finished": clock(connection),
        }
    connection.execute(sa.update(ticket_table).where(_columns.id == ticket.id).values(**values))
    return read_ticket(connection, ticket.id)


def release(connection: Connection, worker: str, why: str) -> int:
    """Ends every attempt that `worker` is running; the number of them."""
    query = sa.select(*TICKET_COLUMNS).where((_columns.worker == worker) & _is_running).order_by(_columns.id)
    tickets = [ticket_of(row) for row in connection.execute(query.with_for_update())]
    for ticket in tickets:
        end_attempt(connection, ticket, why)
    return len(tickets)


def _lease(
    connection: Connection, tickets: Sequence[Ticket], worker: str, now: float, lease_seconds: float, token: str
) -> None:
    statement = sa.update(ticket_table).where(_columns.id.in_([ticket.id for ticket in tickets]))
    connection.execute(
        statement.values(
            state=TicketState.RUNNING,
            attempt=_columns.attempt + 1,
            worker=worker,
            lease_expires=now + lease_seconds,
            epochs_at_claim=_columns.epochs_done,
            started=sa.func.coalesce(_columns.started, now),
            token=token,
        )
    )
