"""What the parts of a worker share."""

from __future__ import annotations

from dataclasses import dataclass

import optuna

from search.config import StudyConfig
from search.fidelity import fidelity_train_config
from search.ledger import KINDS, Ledger
from search.paths import StudyFolder
from search.worker.existing import HANG_SECONDS
from search.worker.trainer_process import TrainerSettings
from yolocore.training.config import TrainConfig

PULSE_HANGS = 3
"""A call of the trainer that cannot say that it moves may take so many times the limit of a silent one before that
limit counts: a checkpoint on its way to a slow store, a large data set that is decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Everything a worker needs, opened once."""

    config: StudyConfig
    train: TrainConfig
    class_names: tuple[str, ...]
    ledger: Ledger
    study: optuna.Study
    folder: StudyFolder
    worker_id: str
    lease_seconds: float
    checkpoints: str
    """Root of the checkpoint store: the runs folder or a URL."""
    owner: str
    """Tells this study's checkpoints from those of an earlier one of the same name."""
    kinds: tuple[str, ...] = KINDS
    """Of the tickets that it takes, in the order in which it looks for them."""
    deadline: float | None = None
    hang_seconds: float = HANG_SECONDS
    """A trainer that says nothing for so long is taken for hung; longer than a batch, a start."""

    def trainer_settings(self) -> TrainerSettings:
        """What the trainer process has to know."""
        return TrainerSettings(
            train=self.train,
            folder=self.folder,
            checkpoints=self.checkpoints,
            owner=self.owner,
            objective=self.config.objective,
            fidelity=fidelity_train_config(self.config, self.train),
            class_names=self.class_names,
            pulse_seconds=PULSE_HANGS * self.hang_seconds,
            keep_weights=self.config.train.keep_weights != "none",
            keep_details=self.config.tracking.enabled and self.config.tracking.review,
        )
