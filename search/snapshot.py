"""A study at one moment with its workers and the curves of what trains: what `watch` shows, read from the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Literal

from search.config import StudyConfig
from search.ledger import EpochRow, Ticket, TicketState, WorkerRow, WorkerState
from search.report import StudyRows, StudyStatus, TrialStatus, sum_up
from search.transforms import shown_params
from search.worker.lease import HEARTBEAT_SECONDS, SILENT_BEATS

PACE_SECONDS = 600.0
"""Reports of so many last seconds say how fast the study goes."""
GONE_SECONDS = 3600.0
"""A worker that holds nothing and was not heard of for so long is shown no more."""

WorkerCondition = Literal["trains", "idle", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotView:
    """A trial that trains now."""

    name: str
    """Its number; before it a word for what it is for, where that is not the search."""
    epoch: int
    epochs: int
    value: float | None
    """At the last evaluated epoch."""
    curve: tuple[float | None, ...]
    """The objective at each evaluated epoch."""
    attempt: int
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """A worker and the slots of its pack."""

    id: str
    host: str
    pid: int
    device: str
    condition: WorkerCondition
    """`idle`: alive, and waits for trials that others hold. `silent`: it has missed its beats, and may be dead."""
    pack: int | None
    """Slots that its packs have at most; None as long as it has not found out."""
    heard_seconds: float
    """Since its last beat or report."""
    slots: tuple[SlotView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A trial that failed."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A study at one moment. Times are seconds, values the study's objective."""

    study: str
    at: float
    """UTC epoch seconds on the database's clock."""
    counts: Mapping[str, int]
    waiting: int
    """Trials of the budget that nobody trains."""
    workers: tuple[WorkerSnapshot, ...]
    workers_died: int
    """Ever, as far as their launchers saw it."""
    best: TrialStatus | None
    base: TrialStatus | None
    best_so_far: tuple[float, ...]
    """The best value after each complete trial, in the order in which they ended."""
    value_range: tuple[float, float] | None
    """Smallest and largest value that any trial reported; None before the first."""
    epochs_per_minute: float | None
    eta_seconds: float | None
    failures: tuple[Failure, ...]
    """The latest last."""
    stop_reason: str | None
    unsent: int
    finished: bool

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


def take_snapshot(rows: StudyRows, config: StudyConfig) -> Snapshot:
    """Joins a study's rows into what people watch."""
    status = sum_up(rows, config)
    failed = [ticket for ticket in rows.tickets if ticket.state is TicketState.FAIL]
    return Snapshot(
        study=config.name,
        at=rows.now,
        counts=status.counts,
        waiting=status.counts[TicketState.WAITING],
        workers=_workers(rows, config),
        workers_died=sum(worker.state is WorkerState.DEAD for worker in rows.workers),
        best=status.best,
        base=status.base,
        best_so_far=_best_so_far(rows.tickets),
        value_range=_value_range(rows.reports),
        epochs_per_minute=_pace(rows, status),
        eta_seconds=None if status.over else status.eta_seconds,
        failures=tuple(
            Failure(name=trial_name(ticket), reason=ticket.reason or "no reason was stored")
            for ticket in sorted(failed, key=lambda ticket: ticket.finished or 0.0)
        ),
        stop_reason=status.stop_reason,
        unsent=status.unsent,
        finished=status.over,
    )


def trial_name(ticket: Ticket) -> str:
    """`7`, or `noise 3` of a ticket that is not the search's."""
    number = ticket.number if ticket.trial_number is None else ticket.trial_number
    return str(number) if ticket.kind == "search" else f"{ticket.kind} {number}"


def _workers(rows: StudyRows, config: StudyConfig) -> tuple[WorkerSnapshot, ...]:
    """Those that live or hold trials, in the order in which they came."""
    held: dict[str | None, list[Ticket]] = {}
    for ticket in (*rows.tickets, *rows.reruns):
        if ticket.state is TicketState.RUNNING:
            held.setdefault(ticket.worker, []).append(ticket)
    running = [worker for worker in rows.workers if worker.state is WorkerState.RUNNING]
    views = [_worker(worker, held.get(worker.id, ()), rows, config) for worker in running]
    return tuple(view for view in views if view.slots or view.heard_seconds < GONE_SECONDS)


def _worker(worker: WorkerRow, tickets: Sequence[Ticket], rows: StudyRows, config: StudyConfig) -> WorkerSnapshot:
    own = [
        report.stored_at
        for ticket in tickets
        for report in rows.reports.get(ticket.id, ())[-1:]
        if report.attempt == ticket.attempt
    ]
    heard = max(0.0, rows.now - max([worker.heartbeat, *own]))
    is_silent = heard >= SILENT_BEATS * HEARTBEAT_SECONDS
    return WorkerSnapshot(
        id=worker.id,
        host=worker.host,
        pid=worker.pid,
        device=worker.device,
        condition="silent" if is_silent else "trains" if tickets else "idle",
        pack=worker.pack,
        heard_seconds=heard,
        slots=tuple(_slot(ticket, rows.reports.get(ticket.id, ()), config) for ticket in tickets),
    )


def _slot(ticket: Ticket, reports: Sequence[EpochRow], config: StudyConfig) -> SlotView:
    curve = tuple(report.value for report in reports)
    return SlotView(
        name=trial_name(ticket),
        epoch=max([ticket.epochs_done, *(report.epoch + 1 for report in reports)]),
        epochs=ticket.epochs or config.train.epochs,
        value=next((value for value in reversed(curve) if value is not None), None),
        curve=curve,
        attempt=ticket.attempt,
        params=shown_params(config, ticket.params or {}),
    )


def _best_so_far(tickets: Sequence[Ticket]) -> tuple[float, ...]:
    ended = [ticket for ticket in tickets if ticket.state is TicketState.COMPLETE and ticket.kind == "search"]
    ended.sort(key=lambda ticket: ticket.finished or 0.0)
    return tuple(accumulate((ticket.value for ticket in ended if ticket.value is not None), max))


def _value_range(reports: Mapping[int, Sequence[EpochRow]]) -> tuple[float, float] | None:
    values = [report.value for rows in reports.values() for report in rows if report.value is not None]
    return (min(values), max(values)) if values else None


def _pace(rows: StudyRows, status: StudyStatus) -> float | None:
    """Epochs of trials per minute lately; None where nothing was reported lately."""
    started = [ticket.started for ticket in rows.tickets if ticket.started is not None]
    if status.finished or not started:
        return None
    window = min(PACE_SECONDS, max(1.0, rows.now - min(started)))
    recent = sum(
        report.stored_at >= rows.now - window for reports in rows.reports.values() for report in reversed(reports)
    )
    return 60.0 * recent / window if recent else None
