"""The forms in which the best trial is given out: YOLOv5's hyp YAML, a YAML for Ultralytics models, JSON.

All say the same of where the values come from, and none says more than was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from search.config import StudyConfig
from search.errors import UserInputError
from search.export import (
    BestTrial,
    best_trial,
    export_best,
    export_text,
    export_weights,
    front_trials,
    header,
    standing,
    written_by,
)
from search.importers import NOT_ULTRALYTICS, ULTRALYTICS_KEYS
from search.ledger import Ledger
from search.paths import ExportFormat, StudyFolder
from search.weights import WeightsStore
from yolocore.hyperparameters import HYPERPARAMETER_KEYS

JSON_VERSION = 1
"""Of the JSON's layout: raised when a key changes its meaning or goes away."""


ALL = "all"
"""In place of a trial's number: the whole front."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What is to be written, as `yolosearch export` takes it."""

    path: Path | None = None
    """The file, a folder for the whole front; None for the names in the study's folder."""
    trial: int | None = None
    """This one, whatever was confirmed."""
    form: ExportFormat = ExportFormat.YOLOV5
    pareto: str | None = None
    """Of several objectives: a trial of the front by its number, or `all`."""
    weights: Path | None = None
    """Where its trained weights are to be written as well."""

    def check(self) -> None:
        """Raises UserInputError for what cannot be had together."""
        if self.pareto is None:
            return
        if self.pareto != ALL and not self.pareto.isdecimal():
            raise UserInputError(f"--pareto: got {self.pareto!r}; allowed: all, or the number of a trial of the front")
        if self.trial is not None:
            raise UserInputError(f"--trial: got {self.trial} with --pareto; allowed: one of the two")
        if self.weights is not None and self.pareto == ALL:
            raise UserInputError("--weights: got a file with --pareto all; allowed: with --pareto N")


@dataclass(frozen=True, slots=True)
class Exported:
    """A hyp file that was written."""

    path: Path
    best: BestTrial


def export_trials(
    ledger: Ledger, config: StudyConfig, folder: StudyFolder, asked: ExportRequest, checkpoints: str | Path
) -> tuple[Exported, ...]:
    """Writes the recommended trial, the one that is named, or those of the front.

    Args:
        ledger: The ledger in the study's database.
        config: The study.
        folder: Where files go by default.
        asked: What to write.
        checkpoints: Folder or URL of the trained weights.

    Returns:
        What was written: one file, except for the whole front.

    Raises:
        UserInputError: It does not exist, cannot be had, or cannot be written.
        SearchError: What was read back differs.
    """
    asked.check()
    if asked.pareto is None:
        found: tuple[BestTrial, ...] = (best_trial(ledger, config, asked.trial),)
    else:
        found = front_trials(ledger, config, None if asked.pareto == ALL else int(asked.pareto))
    written = tuple(Exported(export_as(one, _target(one, folder, asked), asked.form), one) for one in found)
    if asked.weights is not None:
        store = WeightsStore.open(checkpoints, config.name)
        export_weights(ledger, config, store, asked.weights, written[0].best.ticket)
    return written


def _target(best: BestTrial, folder: StudyFolder, asked: ExportRequest) -> Path:
    default = folder.exported(asked.form) if asked.pareto is None else folder.pareto_hyp(best.trial_number, asked.form)
    if asked.path is None:
        return default
    return asked.path / default.name if asked.pareto == ALL else asked.path


def export_as(best: BestTrial, path: Path, form: ExportFormat) -> Path:
    """Writes the trial in one of the forms and reads it back; the file appears whole or not at all.

    Returns:
        The path.

    Raises:
        UserInputError: it cannot be written, or nothing that was searched means the same in Ultralytics models.
        SearchError: what was read back differs.
    """
    if form is ExportFormat.YOLOV5:
        return export_best(best, path)
    if form is ExportFormat.JSON:
        document = to_document(best)
        return _export(path, json.dumps(document, indent=2, allow_nan=False) + "\n", document, json.loads)
    values = ultralytics_values(best)
    comments = "".join(f"# {line}".rstrip() + "\n" for line in ultralytics_header(best))
    return _export(path, comments + yaml.safe_dump(dict(values), sort_keys=False), values, yaml.safe_load)


def _export(path: Path, text: str, expected: Mapping[str, Any], read: Callable[[str], Any]) -> Path:
    return export_text(path, text, lambda file: read(file.read_text(encoding="utf-8")) == expected)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def to_document(best: BestTrial) -> dict[str, Any]:
    """All that is known of a trial, as plain data; `objective` is the first of `objectives`."""
    values = best.values or {best.objective: (best.value, best.base_value)}
    objectives = [{"name": name, "value": value, "base_value": base} for name, (value, base) in values.items()]
    return {
        "format": "yolosearch export",
        "version": JSON_VERSION,
        **written_by(),
        "study": {"name": best.study, "id": best.study_id},
        "data": {"fingerprint": best.fingerprint},
        "trial": best.trial_number,
        "is_base": best.is_base,
        "chosen": standing(best),
        "objective": objectives[0],
        "objectives": objectives,
        "confirmed": best.is_confirmed,
        "verdict": best.verdict,
        "looks": best.looks,
        "reruns": [asdict(gain) for gain in best.reruns],
        "metrics": {key: value if math.isfinite(value) else None for key, value in best.metrics.items()},
        "searched": list(best.searched),
        "at_bounds": list(best.at_bounds),
        "anchors": best.anchors,
        "hyp": best.hyperparameters.to_document(),
    }


# ---- Ultralytics models ----------------------------------------------------------------------------------------------


def ultralytics_values(best: BestTrial) -> dict[str, float]:
    """The values that mean the same in Ultralytics models (YOLOv8 and newer), in the order of a hyp file.

    Raises:
        UserInputError: nothing that was searched is among them.
    """
    if not ULTRALYTICS_KEYS & set(best.searched):
        raise UserInputError(
            f"study {best.study}: --format ultralytics: nothing that it searched carries over "
            f"({'; '.join(_reasons(best))}); allowed: yolov5, json"
        )
    values = best.hyperparameters.to_mapping()
    return {key: float(values[key]) for key in HYPERPARAMETER_KEYS if key in ULTRALYTICS_KEYS}


def _reasons(best: BestTrial) -> list[str]:
    return [f"{key}: {NOT_ULTRALYTICS[key]}" for key in best.searched if key not in ULTRALYTICS_KEYS]


def ultralytics_header(best: BestTrial) -> list[str]:
    """The comment lines of an exported file, without `#`."""
    carried = [key for key in best.searched if key in ULTRALYTICS_KEYS]
    lines = [
        "optimiser and augmentation values for Ultralytics models (YOLOv8 and newer): yolo train cfg=FILE",
        "they were found with a YOLOv5 model; what they do to another model was not measured",
        f"searched and carried over: {', '.join(carried)}",
        *(f"searched, NOT carried over: {reason}" for reason in _reasons(best)),
        "with optimizer=auto, the default there, lr0 and momentum are ignored: give optimizer=SGD",
        "",
        "of the YOLOv5 model:",
    ]
    return [*lines, *header(best, of_yolov5=False)]
