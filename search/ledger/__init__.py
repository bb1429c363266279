"""The ledger: our own tables beside Optuna's, and the only truth of a trial's state."""

from search.ledger.claims import MAX_STALLED
from search.ledger.ledger import SEARCH, Ledger, TrialTakenError
from search.ledger.records import (
    EpochRow,
    StateCount,
    StudyRecord,
    Ticket,
    TicketState,
    WorkerRow,
    WorkerState,
    base_numbers,
)

__all__ = [
    "MAX_STALLED",
    "SEARCH",
    "EpochRow",
    "Ledger",
    "StateCount",
    "StudyRecord",
    "Ticket",
    "TicketState",
    "TrialTakenError",
    "WorkerRow",
    "WorkerState",
    "base_numbers",
]
