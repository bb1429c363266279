"""Every file name of a study, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from search.errors import UserInputError

RUNS_DIR_VARIABLE = "YOLOSEARCH_RUNS_DIR"
DATA_ROOT_VARIABLE = "YOLOSEARCH_DATA_ROOT"


class ExportFormat(StrEnum):
    """Forms in which the best trial is given out."""

    YOLOV5 = "yolov5"
    ULTRALYTICS = "ultralytics"
    JSON = "json"


_EXPORTED = {
    ExportFormat.YOLOV5: "hyp.best.yaml",
    ExportFormat.ULTRALYTICS: "hyp.ultralytics.yaml",
    ExportFormat.JSON: "hyp.best.json",
}


def default_runs_dir() -> Path:
    """The folder for everything that is written: `YOLOSEARCH_RUNS_DIR` where set, otherwise `runs`."""
    return Path(os.environ.get(RUNS_DIR_VARIABLE) or "runs")


def data_on_this_host(data: Path) -> Path:
    """Where the YAML of a study's data set lies on this host.

    With `YOLOSEARCH_DATA_ROOT` it is looked for below that folder under the longest end of its path that exists there:
    `/data/sets/pets/pets.yaml` as `ROOT/data/sets/pets/pets.yaml`, `ROOT/sets/pets/pets.yaml` and so on, then where the
    study says. Whether it is the study's data is for the caller to check, by the fingerprint.

    Raises:
        UserInputError: The variable is set and the file is in none of these places.
    """
    root = os.environ.get(DATA_ROOT_VARIABLE)
    if not root:
        return data
    ends = [Path(*data.parts[start:]) for start in range(1, len(data.parts))]
    found = next((Path(root) / end for end in ends if (Path(root) / end).is_file()), None)
    if found is None and not data.is_file():
        example = Path(root) / data.parent.name / data.name
        raise UserInputError(
            f"{DATA_ROOT_VARIABLE}: {root} holds nothing of the study's data {data}; "
            f"allowed: a folder that holds an end of that path, for example {example}"
        )
    return (found or data).resolve()


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
        return self.exported(ExportFormat.YOLOV5)

    def exported(self, form: ExportFormat) -> Path:
        """Where `export --format` writes unless told otherwise."""
        return self.root / _EXPORTED[form]

    def pareto_hyp(self, trial_number: int, form: ExportFormat = ExportFormat.YOLOV5) -> Path:
        """Where `export --pareto` writes the hyp of a trial of the front."""
        end = _EXPORTED[form].removeprefix("hyp.").removeprefix("best.")
        return self.root / f"hyp.pareto-{trial_number}.{end}"

    def trial(self, ticket_number: int, kind: str = "search") -> Path:
        """Folder of one trial's files, or of a ticket's of another kind."""
        return self.root / ("trials" if kind == "search" else kind) / f"{ticket_number:05d}"

    def log(self, worker: str) -> Path:
        """What one worker printed."""
        return self.root / "logs" / f"{worker}.log"
