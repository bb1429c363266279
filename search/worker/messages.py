"""What a worker's supervisor and its trainer process say to each other. Plain frozen data, pickled by the pipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from yolocore.hyperparameters import Hyperparameters
from yolocore.metrics import DetectionMetrics
from yolocore.training.capacity import Capacity
from yolocore.training.optim import EarlyStopping
from yolocore.training.trainer import EpochReport


@dataclass(frozen=True, slots=True)
class TrialStart:
    """One trial that enters a pack; `key` is its ticket's id."""

    key: str
    number: int
    """The ticket's number: names its files."""
    attempt: int
    hyperparameters: Hyperparameters
    epochs_done: int
    """Epochs that its checkpoint should hold; 0 starts anew."""
    checkpoint: str | None = None
    """Its reference in the checkpoint store."""
    best_value: float | None = None
    """The best objective of its epochs so far; matters where a trial's best epoch counts."""
    stopping: EarlyStopping = field(default_factory=lambda: EarlyStopping(0))
    """What its epochs so far leave of its patience; matters where the last epoch counts."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """Trainings that are to be compared: all on the images of one seed, from its first epoch on; nobody joins."""

    kind: str
    """Of their tickets; names the folder of their checkpoints."""
    seed: int
    epochs: int


@dataclass(frozen=True, slots=True)
class StartPack:
    """Supervisor to trainer: train these together.

    A cohort whose members turn out to stand at different epochs is not trained: whoever trains must see the images of
    its own epoch. `PackEnded` follows their `Standing` at once, and those at the same epoch can be sent again.
    """

    trials: tuple[TrialStart, ...]
    in_fidelity: bool = False
    """Whether this is the cheap training before the full one; it keeps no checkpoints and no weights."""
    cohort: Cohort | None = None
    """None for the search's trials."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Trainer to supervisor, whenever trials enter the pack: at which epoch they really are.

    A trial whose checkpoint was lost or damaged stands at an earlier epoch than asked, with the reasons in `notes`.
    """

    epochs: Mapping[str, tuple[int, str | None]]
    """For every trial the epochs that it really has behind it, and the checkpoint that says so."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Alive:
    """Trainer to supervisor, at most once a second: it is still moving."""


@dataclass(frozen=True, slots=True)
class EpochDone:
    """Trainer to supervisor: the reports of all slots after one pack epoch."""

    reports: tuple[EpochReport, ...]
    test: Mapping[str, DetectionMetrics] = field(default_factory=dict)
    """Of a cohort's members that have ended, by key: their metrics on the test split, where there is one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Supervisor to trainer, the answer to `EpochDone`: who leaves and who comes in.

    The trainer waits for it for a short time only: while the database is away training goes on, and a verdict that
    comes late takes effect at the next epoch boundary. With nothing left to train it waits as long as it takes.
    """

    drop: tuple[str, ...] = ()
    join: tuple[TrialStart, ...] = ()


@dataclass(frozen=True, slots=True)
class Secured:
    """Trainer to supervisor: checkpoints that are on disk now, by key: epochs in it, and its name."""

    checkpoints: Mapping[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class MeasureCapacity:
    """Supervisor to trainer, between packs: find out how many slots are fastest."""

    hyperparameters: Hyperparameters
    largest: int
    """The most that are wanted."""
    share: int
    """Workers that have the memory to share."""


@dataclass(frozen=True, slots=True)
class CapacityMeasured:
    """Trainer to supervisor: what one size gave."""

    capacity: Capacity


@dataclass(frozen=True, slots=True)
class Measured:
    """Trainer to supervisor: no further size will be tried."""


@dataclass(frozen=True, slots=True)
class PackEnded:
    """Trainer to supervisor: nothing is left to train in this pack."""


@dataclass(frozen=True, slots=True)
class PackCrashed:
    """Trainer to supervisor: an exception ended the pack. The trainer itself lives on."""

    reason: str
    fixable: bool
    """Whether it is the user's to mend (data, weights, device), so that no trial is to blame."""
    out_of_memory: bool = False
    started: bool = True
    """False if it happened while the states of the first trials were put together."""
