"""Every file name of a study, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

RUNS_DIR_VARIABLE = "YOLOSEARCH_RUNS_DIR"


def default_runs_dir() -> Path:
    """The folder for everything that is written: `YOLOSEARCH_RUNS_DIR` where set, otherwise `runs`."""
    return Path(os.environ.get(RUNS_DIR_VARIABLE) or "runs")


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """The files of one study below the runs folder."""

    runs_dir: Path
    study: str

    @property
    def root(self) -> Path:
        """Folder of the study."""
        return self.runs_dir / self.study

    @property
    def best_hyp(self) -> Path:
        """Where `export` writes the best hyp unless told otherwise."""
        return self.root / "hyp.best.yaml"

    def trial(self, ticket_number: int) -> Path:
        """Folder of one trial's files."""
        return self.root / "trials" / f"{ticket_number:05d}"

    def weights(self, ticket_number: int) -> Path:
        """Best weights (EMA) of one trial under official key names."""
        return self.trial(ticket_number) / "best.safetensors"

    def log(self, worker: str) -> Path:
        """What one worker printed."""
        return self.root / "logs" / f"{worker}.log"
