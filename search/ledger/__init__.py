"""The ledger: our own tables beside Optuna's, and the only truth of a trial's state."""

from search.ledger.claims import MAX_STALLED
from search.ledger.ledger import Ledger, TrialTakenError
from search.ledger.records import (
    CONFIRM,
    KINDS,
    NOISE,
    RERUN_KINDS,
    SEARCH,
    EpochRow,
    Rerun,
    StateCount,
    StopKind,
    StudyRecord,
    Ticket,
    TicketState,
    WorkerRow,
    WorkerState,
    base_numbers,
    front,
)

__all__ = [
    "CONFIRM",
    "KINDS",
    "MAX_STALLED",
    "NOISE",
    "RERUN_KINDS",
    "SEARCH",
    "EpochRow",
    "Ledger",
    "Rerun",
    "StateCount",
    "StopKind",
    "StudyRecord",
    "Ticket",
    "TicketState",
    "TrialTakenError",
    "WorkerRow",
    "WorkerState",
    "base_numbers",
    "front",
]
