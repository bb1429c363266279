"""What the ledger hands out: frozen copies of its rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from search.pareto import non_dominated

SEARCH = "search"
"""Tickets that train what the sampler proposes: the study's budget."""

NOISE = "noise"
"""Tickets that train the base again with other seeds."""

CONFIRM = "confirm"
"""Tickets that train the base and the best trials again, on the same seeds."""

RERUN_KINDS = (NOISE, CONFIRM)
"""Beside the search's budget: their hyperparameters are known, and Optuna has nothing to do with them."""

KINDS = (*RERUN_KINDS, SEARCH)
"""In the order in which workers take them."""


class TicketState(StrEnum):
    """WAITING and RUNNING are open; COMPLETE, PRUNED and FAIL are final and have spent the ticket."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"

    @property
    def is_final(self) -> bool:
        """Whether the ticket is spent."""
        return self in {TicketState.COMPLETE, TicketState.PRUNED, TicketState.FAIL}


class StopKind(StrEnum):
    """What ended a study before its budget was spent."""

    FAILED = "FAILED"
    """Too many trials failed, or something else went wrong."""
    TIME = "TIME"
    NOISE = "NOISE"
    """Less is left to gain than a rerun varies."""
    ASKED = "ASKED"
    """By `yolosearch stop`; running trials go to their ends."""
    NOW = "NOW"
    """By `yolosearch stop --now`; running trials are handed back."""

    @property
    def is_planned(self) -> bool:
        """Whether somebody wanted it so."""
        return self is not StopKind.FAILED


class WorkerState(StrEnum):
    """RUNNING until the worker leaves by itself (EXITED) or its launcher sees it die (DEAD)."""

    RUNNING = "RUNNING"
    EXITED = "EXITED"
    DEAD = "DEAD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One unit of a study's budget and the trial that it pays for, as stored when it was read.

    `attempt` grows by one with every claim. Whoever holds (id, attempt) while the state is RUNNING owns the trial.
    """

    id: int
    study: str
    number: int
    kind: str
    state: TicketState
    attempt: int
    worker: str | None
    lease_expires: float | None
    """UTC epoch seconds on the database's clock."""
    fixed_params: dict[str, Any] | None
    """Parameters that the trial must have (the base hyp); None lets the sampler choose."""
    trial_id: int | None
    trial_number: int | None
    params: dict[str, Any] | None
    run_id: str | None
    epochs_done: int
    """Epochs that a checkpoint holds; the next attempt starts here."""
    epochs_at_claim: int
    """`epochs_done` when the current attempt began."""
    checkpoint: str | None
    value: float | None
    best_epoch: int | None
    reason: str | None
    stalled_attempts: int
    """Attempts in a row that ended in a crash or an expired lease without a new checkpoint."""
    history: tuple[str, ...]
    """One line for each attempt that ended that way."""
    mirrored: bool
    """Whether Optuna and MLflow have the final state."""
    created: float
    started: float | None
    finished: float | None
    retry_of: int | None = None
    """Number of the failed ticket that this one gives another chance."""
    fidelity_value: float | None = None
    """The objective after the cheap training, in studies that have one; None if it was not finite."""
    promoted: bool | None = None
    """Whether the cheap training led to the full one; None as long as that is open."""
    candidate: int | None = None
    """Of a rerun: number of the search's ticket whose hyperparameters it trains; 0 is the base."""
    seed: int | None = None
    """Of a rerun: of its initialisation and its image stream."""
    epochs: int | None = None
    """Of a rerun: how long it trains."""
    objective_values: tuple[float, ...] | None = None
    """Of a complete trial of a study with several objectives; `value` is the first of them."""

    @property
    def told(self) -> float | tuple[float, ...] | None:
        """What Optuna is told of a finished trial."""
        return self.value if self.objective_values is None else self.objective_values

    @property
    def is_rerun(self) -> bool:
        """Whether it is beside the search's budget, and no trial of Optuna's."""
        return self.kind != SEARCH

    @property
    def label(self) -> str:
        """What messages call it."""
        if self.is_rerun:
            return f"{self.kind} run {self.number} (seed {self.seed})"
        return f"trial {self.number if self.trial_number is None else self.trial_number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerun:
    """Known hyperparameters to be trained with a seed; those of one seed and length are a cohort."""

    candidate: int
    """Number of the search's ticket that they are from; 0 is the base."""
    seed: int
    epochs: int
    params: Mapping[str, Any]


def front(tickets: Iterable[Ticket]) -> list[Ticket]:
    """The complete search trials that no other one beats in all objectives, by the first objective; [] with one."""
    complete = [
        (ticket, ticket.objective_values)
        for ticket in sorted(tickets, key=lambda ticket: ticket.number)
        if ticket.kind == "search" and ticket.state is TicketState.COMPLETE and ticket.objective_values is not None
    ]
    return [complete[index][0] for index in non_dominated([values for _, values in complete])]


def base_numbers(tickets: Iterable[Ticket]) -> frozenset[int]:
    """Numbers of the tickets that train the base: the first one, its retry if it failed, and that one's retry."""
    numbers = {0}
    for ticket in sorted(tickets, key=lambda ticket: ticket.number):
        if ticket.retry_of in numbers:
            numbers.add(ticket.number)
    return frozenset(numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCount:
    """The search tickets of one study that are in one state."""

    study: str
    state: TicketState
    count: int
    best: float | None
    """The largest value among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRow:
    """What the ledger holds of one evaluated epoch. The first commit wins; mirrors send exactly these numbers."""

    ticket_id: int
    epoch: int
    attempt: int
    value: float | None
    """The objective; None if it was not finite."""
    metrics: dict[str, float]
    stored_at: float
    """UTC epoch seconds; sent to MLflow as the time of every metric of this epoch."""
    prune: bool | None
    """The pruner's decision; None as long as it has not been asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """A study's frozen configuration and where it stands."""

    name: str
    config: Mapping[str, Any]
    fingerprint: str
    versions: Mapping[str, Any]
    created: float
    summary_run_id: str | None = None
    stop_reason: str | None = None
    """Why no more tickets are given out; None while the study may go on."""
    stop_kind: StopKind | None = None
    resumed: float | None = None
    """When it was taken up again last, UTC epoch seconds."""

    @property
    def owner(self) -> str:
        """Tells this study from an earlier one of the same name, where files or runs of that one are left."""
        return f"{self.created:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """A worker process that has registered; times on the database's clock."""

    id: str
    study: str
    host: str
    pid: int
    device: str
    started: float
    heartbeat: float
    state: WorkerState = field(default=WorkerState.RUNNING)
    pack: int | None = None
    """Trials that its packs have at most; None as long as it has not found out."""
