"""What people read of a study: status, tables, JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from search.config import StudyConfig
from search.fidelity import FidelityStatus
from search.forecast import ShortAgainstFull
from search.housekeeping import StudyRow
from search.ledger import (
    RERUN_KINDS,
    EpochRow,
    Ledger,
    StopKind,
    StudyRecord,
    Ticket,
    TicketState,
    WorkerRow,
    base_numbers,
    front,
)
from search.outlook import curves_of, pace_left
from search.prepared import Prepared
from search.transforms import at_bounds, shown_params
from search.worker.lease import is_fresh
from yolocore.hyperparameters import LOSS_WEIGHT_KEYS

STATE_STYLES = {
    TicketState.WAITING: "dim",
    TicketState.RUNNING: "cyan",
    TicketState.COMPLETE: "green",
    TicketState.PRUNED: "yellow",
    TicketState.FAIL: "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStatus:
    """One trial as the ledger knows it."""

    number: int | None
    ticket: int
    state: str
    epoch: int
    epochs: int
    value: float | None
    params: Mapping[str, Any]
    """Raw values of what it searched (`search.transforms.shown_params`)."""
    attempt: int
    worker: str | None
    reason: str | None
    seconds: float | None
    reported_at: float | None
    """UTC epoch seconds of its last report."""
    values: tuple[float, ...] | None = None
    """Of a complete trial under several objectives; `value` is the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """A study at one moment. Times are seconds, values the study's objective."""

    study: str
    counts: Mapping[str, int]
    trials: tuple[TrialStatus, ...]
    workers: int
    """Those that were heard of lately."""
    devices: Mapping[str, str]
    """What each worker that has opened the study trains on, by the worker's name."""
    packs: Mapping[str, int]
    """How many trials the packs of each live worker have at most, where that is known."""
    best: TrialStatus | None
    base: TrialStatus | None
    slot_epochs: int
    """Epochs that all trials have trained together, evaluated or not."""
    eta_seconds: float | None
    stop_reason: str | None
    unsent: int
    """Ended trials whose records MLflow (or Optuna) does not have yet; a worker sends them."""
    precisions: tuple[str, ...]
    """In which its workers have trained; more than one where `train.precision: auto` met different hosts."""
    prepared: Prepared
    """What was worked out when the study was created."""
    fidelity: FidelityStatus | None = None
    """Of studies that have a cheap training before the full one."""
    reruns: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """How many tickets beside the search are spent, and how many there are, by their kind."""
    at_bounds: tuple[str, ...] = ()
    """A line for each value of the best trial that lies at an end of its range: better ones may be beyond."""
    rerunning: tuple[str, ...] = ()
    """Workers that hold such tickets."""
    stop_kind: StopKind | None = None
    objectives: tuple[str, ...] = ()
    """What is maximised, where there are several; then there is a front, and no best."""
    front: tuple[TrialStatus, ...] = ()
    """The trials that no other one beats in all objectives, by the first objective."""

    @property
    def finished(self) -> bool:
        """Whether no trial waits or runs."""
        return not any(self.counts.get(state.value, 0) for state in (TicketState.WAITING, TicketState.RUNNING))

    @property
    def over(self) -> bool:
        """Whether nothing runs and nothing will: the budget is spent, or the study was stopped as somebody wanted."""
        is_stopped = self.stop_kind is not None and self.stop_kind.is_planned
        return self.finished or (is_stopped and not self.counts.get(TicketState.RUNNING.value, 0))

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**asdict(self), "finished": self.finished}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRows:
    """What the database holds of a study at one moment."""

    record: StudyRecord
    tickets: tuple[Ticket, ...]
    reports: Mapping[int, tuple[EpochRow, ...]]
    """Of each ticket that has some, by its id."""
    workers: tuple[WorkerRow, ...]
    now: float
    """On the database's clock."""
    reruns: tuple[Ticket, ...] = ()
    """Tickets beside the search."""

    @classmethod
    def read(cls, ledger: Ledger, study: str) -> StudyRows:
        """Reads them; reports first, so that none is of a ticket that is missing."""
        record, reports = ledger.study(study), ledger.all_reports(study)
        tickets, workers = ledger.tickets(study), ledger.workers(study)
        reruns = ledger.tickets(study, RERUN_KINDS)
        return cls(record=record, tickets=tickets, reports=reports, workers=workers, now=ledger.now(), reruns=reruns)


def study_status(ledger: Ledger, config: StudyConfig) -> StudyStatus:
    """Reads a study's rows and sums them up."""
    return sum_up(StudyRows.read(ledger, config.name), config)


def sum_up(rows: StudyRows, config: StudyConfig) -> StudyStatus:
    """What a study's rows say."""
    tickets, reports, workers = rows.tickets, rows.reports, rows.workers
    trials = tuple(_trial_status(ticket, reports.get(ticket.id, ()), config) for ticket in tickets)
    complete = [trial for trial in trials if trial.state == TicketState.COMPLETE and trial.value is not None]
    counts = {state.value: sum(ticket.state is state for ticket in tickets) for state in TicketState}
    best = None if config.objectives else max(complete, key=lambda trial: trial.value or 0.0, default=None)
    live = [worker.id for worker in workers if is_fresh(worker, rows.now)]
    return StudyStatus(
        study=config.name,
        counts=counts,
        trials=trials,
        workers=len(live),
        devices={worker.id: worker.device for worker in workers},
        packs={worker.id: worker.pack for worker in workers if worker.pack is not None and worker.id in live},
        best=best,
        base=_base(tickets, trials),
        slot_epochs=sum(trial.epoch for trial in trials),
        eta_seconds=pace_left(config, tickets, reports, live),
        stop_reason=rows.record.stop_reason,
        stop_kind=rows.record.stop_kind,
        unsent=sum(ticket.state.is_final and not ticket.mirrored for ticket in tickets) * config.tracking.enabled,
        precisions=tuple(sorted({worker.device.rpartition(" ")[2] for worker in workers if " " in worker.device})),
        prepared=Prepared.of(rows.record.config),
        fidelity=None if config.fidelity is None else FidelityStatus.of(tickets, config.fidelity),
        reruns=_reruns(rows.reruns),
        at_bounds=_at_bounds(config, tickets, best),
        rerunning=tuple(sorted({one.worker for one in rows.reruns if one.worker and one.state is TicketState.RUNNING})),
        objectives=tuple(objective.name for objective in config.objectives),
        front=tuple(trials[tickets.index(ticket)] for ticket in front(tickets)),
    )


def _reruns(tickets: Sequence[Ticket]) -> dict[str, tuple[int, int]]:
    kinds = dict.fromkeys(ticket.kind for ticket in tickets)
    spent = {kind: [ticket.state.is_final for ticket in tickets if ticket.kind == kind] for kind in kinds}
    return {kind: (sum(ended), len(ended)) for kind, ended in spent.items()}


def _at_bounds(config: StudyConfig, tickets: Sequence[Ticket], best: TrialStatus | None) -> tuple[str, ...]:
    found = [ticket for ticket in tickets if best is not None and ticket.number == best.ticket != 0]
    return at_bounds(config, found[0].params or {}) if found else ()


def _base(tickets: Sequence[Ticket], trials: Sequence[TrialStatus]) -> TrialStatus | None:
    """The base's trial; its last retry where the first one failed."""
    numbers = base_numbers(tickets)
    found = [trial for ticket, trial in zip(tickets, trials, strict=True) if ticket.number in numbers]
    return found[-1] if found else None


def _trial_status(ticket: Ticket, rows: Sequence[EpochRow], config: StudyConfig) -> TrialStatus:
    last = next((row.value for row in reversed(rows) if row.value is not None), None)
    ended = ticket.finished or time.time()
    return TrialStatus(
        number=ticket.trial_number,
        ticket=ticket.number,
        state=ticket.state.value,
        epoch=max([ticket.epochs_done, *(row.epoch + 1 for row in rows)]),
        epochs=config.train.epochs,
        value=ticket.value if ticket.value is not None else last,
        params=shown_params(config, ticket.params or {}),
        attempt=ticket.attempt,
        worker=ticket.worker,
        reason=ticket.reason,
        seconds=None if ticket.started is None else ended - ticket.started,
        reported_at=rows[-1].stored_at if rows else None,
        values=ticket.objective_values,
    )


def epochs_enough(rows: StudyRows, config: StudyConfig) -> ShortAgainstFull:
    """Whether the study's own curves say that fewer epochs per trial would do."""
    return curves_of(config, rows.tickets, rows.reports)


def status_view(
    status: StudyStatus, curves: ShortAgainstFull, now: datetime, confirmed: str | None = None
) -> RenderableType:
    """What `status` prints: the live view, the confirmation's verdict, when it will be done, what the curves say."""
    of = f" (by {status.objectives[0]})" if status.objectives else ""
    lines = [f"short against full{of}: {curves.line()}"] if curves.trials else []
    if status.fidelity is not None:
        lines.append(status.fidelity.line())
    if confirmed is not None:
        lines.insert(0, f"confirmation: {confirmed}")
    if status.eta_seconds is not None and status.stop_reason is None and not status.finished:
        done = datetime.fromtimestamp(now.timestamp() + status.eta_seconds, now.tzinfo)
        lines.insert(0, f"at this pace it is done {done:%a %Y-%m-%d %H:%M %Z}".rstrip())
    shown = [front_table(status)] if status.front else []
    return Group(live_view(status), *shown, *map(Text, lines))


def live_view(status: StudyStatus) -> RenderableType:
    """What `run` shows while it works: the slots that train now, if any, and one line about the study."""
    table = new_table(f"study {status.study}", "trial", "epoch", "value", *LOSS_WEIGHT_KEYS)
    for trial in status.trials:
        if trial.state == TicketState.RUNNING:
            table.add_row(_name(trial), f"{trial.epoch}/{trial.epochs}", format_value(trial.value), *_weights(trial))
    prepared = [Text(f"{name} {text}", style="dim") for name, text in status.prepared.rows()]
    shown = [table] if table.rows else []
    return Group(*shown, *prepared, *bound_lines(status), Text(headline(status)))


def bound_lines(status: StudyStatus) -> list[Text]:
    """Warnings that the ranges are too narrow for the best trial."""
    return [
        Text(f"best trial: {line}; a wider range may give better ones", style="yellow") for line in status.at_bounds
    ]


def headline(status: StudyStatus, *, with_eta: bool = True) -> str:
    """One line: counts, best so far, base, time left."""
    counts = ", ".join(f"{count} {state.lower()}" for state, count in status.counts.items() if count)
    parts = [counts or "nothing yet"]
    if status.best is not None:
        parts.append(f"best {format_value(status.best.value)} (trial {status.best.number})")
    if status.front:
        parts.append(f"front of {len(status.front)}: trials {', '.join(str(trial.number) for trial in status.front)}")
    elif status.base is not None and status.base.value is not None:
        parts.append(f"base {format_value(status.base.value)}")
    parts += [f"{kind} {spent} of {count}" for kind, (spent, count) in status.reruns.items()]
    if status.unsent:
        parts.append(f"{status.unsent} to be sent to MLflow")
    if len(status.precisions) > 1:
        parts.append(f"trained in {' and '.join(status.precisions)}: set train.precision to compare like with like")
    if status.stop_reason is not None:
        parts.append(f"stopped: {status.stop_reason}")
    if status.packs and not status.over:
        parts.append(f"packs of {' and '.join(str(size) for size in sorted(set(status.packs.values())))}")
    if with_eta and status.eta_seconds is not None and status.stop_reason is None and not status.finished:
        parts.append(f"about {duration(status.eta_seconds)} left")
    return " | ".join(parts)


def trials_table(status: StudyStatus) -> RenderableType:
    """Every trial of the study, with the reasons of those that failed."""
    keys = sorted({key for trial in status.trials for key in trial.params}, key=_key_order)
    table = new_table(f"trials of {status.study}", "trial", "state", "epoch", "value", *keys, "sec")
    for trial in status.trials:
        style = STATE_STYLES[TicketState(trial.state)]
        params = [_number(trial.params.get(key)) for key in keys]
        seconds = "" if trial.seconds is None else f"{trial.seconds:.0f}"
        epoch = f"{trial.epoch}/{trial.epochs}"
        table.add_row(_name(trial), Text(trial.state, style=style), epoch, format_value(trial.value), *params, seconds)
    reasons = [Text(f"trial {_name(trial)}: {trial.reason}") for trial in status.trials if trial.reason]
    return Group(table, *reasons)


def front_table(status: StudyStatus) -> Table:
    """The Pareto front, and the base to compare it with."""
    keys = sorted({key for trial in status.front for key in trial.params}, key=_key_order)
    table = new_table(f"Pareto front of {status.study}", "trial", *status.objectives, *keys)
    base = status.base
    shown = [*([base] if base is not None and base not in status.front else []), *status.front]
    for trial in shown:
        values = [format_value(value) for value in trial.values or ()] or [""] * len(status.objectives)
        table.add_row(_name(trial), *values, *(_number(trial.params.get(key)) for key in keys))
    return table


def studies_table(rows: Sequence[StudyRow]) -> Table:
    """One line a study."""
    table = new_table("studies", "", "trials", "done", "running", "failed", "best", "created")
    for row in rows:
        done = row.counts[TicketState.COMPLETE] + row.counts[TicketState.PRUNED]
        numbers = (sum(row.counts.values()), done, row.counts[TicketState.RUNNING], row.counts[TicketState.FAIL])
        created = datetime.fromtimestamp(row.created, UTC).strftime("%Y-%m-%d %H:%M")
        name = row.name if row.stop_reason is None else f"{row.name} (stopped)"
        table.add_row(name, *map(str, numbers), format_value(row.best), created)
    return table


def comparison_table(status: StudyStatus, base: Mapping[str, float], best: Mapping[str, float]) -> Table:
    """Base against best: the objective and every hyp key in which they differ or that was searched."""
    table = new_table("base against best", "", "base", "best")
    if status.base is not None and status.best is not None:
        table.add_row("trial", str(status.base.number), str(status.best.number))
        table.add_row("objective", format_value(status.base.value), format_value(status.best.value))
    searched = {key for trial in status.trials for key in trial.params}
    for key in base:
        if key in searched or base[key] != best[key]:
            table.add_row(key, _number(base[key]), _number(best[key]))
    return table


def new_table(title: str, *columns: str) -> Table:
    """A table that fits 80 columns with six searched keys."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "state") else "right", no_wrap=True)
    return table


def _name(trial: TrialStatus) -> str:
    name = "-" if trial.number is None else str(trial.number)
    return f"base {name}" if trial.ticket == 0 else name


def format_value(value: float | None) -> str:
    """An objective in four digits; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"


def _weights(trial: TrialStatus) -> list[str]:
    return [_number(trial.params.get(key)) for key in LOSS_WEIGHT_KEYS]


def _key_order(key: str) -> tuple[int, str]:
    return (LOSS_WEIGHT_KEYS.index(key), key) if key in LOSS_WEIGHT_KEYS else (len(LOSS_WEIGHT_KEYS), key)


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def duration(seconds: float) -> str:
    """A time in words."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
