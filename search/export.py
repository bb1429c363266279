"""From the best trial to a hyp YAML that goes straight into `train.py --hyp`, with its provenance in comments."""

import importlib.metadata
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from search.config import StudyConfig
from search.errors import SearchError, UserInputError
from search.ledger import Ledger, Ticket, base_numbers
from search.prepared import Prepared
from search.space import hyperparameters
from search.weights import WeightsStore, complete_trials, value_row
from yolocore.hyperparameters import Hyperparameters

CLS_PW_NOTE = (
    "cls_pw is the positive weight of YOLOv5's class loss (1 = neutral). Later Ultralytics models",
    "(YOLOv8 and newer) give a key of this name another meaning: do not carry it over.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestTrial:
    """The trial to export and what stands in the header: plain data."""

    study: str
    trial_number: int
    hyperparameters: Hyperparameters
    searched: tuple[str, ...]
    """The keys that were searched."""
    objective: str
    """The objective in words."""
    value: float
    """The trial's objective."""
    base_value: float | None
    """The base's objective; None if its trial has no value."""
    complete: int
    """Number of complete trials that it is the best of."""
    fingerprint: str
    """Of the data set."""
    metrics: Mapping[str, float]
    """Its metrics at the epoch that gave it its value."""
    anchors: str | None = None
    """What AutoAnchor found; None where it was switched off."""
    finished: float | None = None
    """When it ended, UTC epoch seconds."""

    @property
    def is_base(self) -> bool:
        """Whether nothing beat the base."""
        return self.trial_number == 0


def best_trial(ledger: Ledger, config: StudyConfig) -> BestTrial:
    """The complete trial with the highest objective; of equals the earliest, so that the base wins a tie.

    Raises:
        UserInputError: no trial is complete yet.
    """
    tickets = [ticket for ticket in ledger.tickets(config.name) if ticket.kind == "search"]
    complete = complete_trials(tickets)
    if not complete:
        found = f"none of {len(tickets)} trials is complete"
        raise UserInputError(f"study {config.name}: {found}; allowed: a study with a complete trial")
    best = complete[0]
    numbers = base_numbers(tickets)
    base = next((ticket for ticket in complete if ticket.number in numbers), None)
    rows = [row for row in ledger.reports(best.id) if best.best_epoch in (None, row.epoch)]
    record = ledger.study(config.name)
    anchors = Prepared.of(record.config).autoanchor
    return BestTrial(
        study=config.name,
        trial_number=best.number if best.trial_number is None else best.trial_number,
        hyperparameters=hyperparameters(config, best.params or {}),
        searched=tuple(config.space),
        objective=config.objective.describe(),
        value=_value(best),
        base_value=None if base is None else _value(base),
        complete=len(complete),
        fingerprint=record.fingerprint,
        anchors=None if anchors is None else anchors.describe(),
        metrics=rows[-1].metrics if rows else {},
        finished=best.finished,
    )


def export_weights(ledger: Ledger, config: StudyConfig, store: WeightsStore, output: Path) -> Path:
    """Copies the trained weights of the best trial.

    Returns:
        `output`.

    Raises:
        UserInputError: no trial is complete, its weights were not kept, or the file cannot be written.
        CheckpointError: the weights cannot be read.
    """
    complete = complete_trials(ledger.tickets(config.name))
    row = value_row(complete[0], ledger.reports(complete[0].id)) if complete else None
    file = store.find(complete[0].number, row) if complete else None
    if file is None:
        found = f"no weights of {'a complete' if not complete else 'its best'} trial are in {store}"
        raise UserInputError(
            f"study {config.name}: {found}; allowed: a study with train.keep_weights best or all, and --checkpoints "
            "where its workers had it"
        )
    return store.copy(complete[0].number, file, output)


def _value(ticket: Ticket) -> float:
    assert ticket.value is not None
    return ticket.value


def export_best(best: BestTrial, path: Path) -> Path:
    """Write the hyp YAML and read it back.

    The file has every hyp key of YOLOv5 in raw units, and no `anchors`. It appears whole or not at all.

    Returns:
        The path.

    Raises:
        UserInputError: the file cannot be written.
        SearchError: what was read back differs.
    """
    text = best.hyperparameters.to_yaml(header(best))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomic(path, text, best.hyperparameters)
    except OSError as error:
        raise UserInputError(
            f"{path}: cannot be written: {error.strerror}; allowed: a path in a writable folder"
        ) from None
    return path


def header(best: BestTrial) -> Sequence[str]:
    """The comment lines of an exported file, without `#`."""
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [
        f"YOLOv5 hyperparameters found by yolosearch {importlib.metadata.version('yolosearch')}",
        f"study:      {best.study}, trial {best.trial_number}, the best of {best.complete} complete trials",
        f"objective:  {best.objective} = {best.value:.5f}, {_against_base(best)}",
        f"metrics:    {', '.join(f'{key} {value:.4f}' for key, value in best.metrics.items() if key in _SHOWN)}",
        f"searched:   {', '.join(best.searched)}",
        f"data:       fingerprint {best.fingerprint}",
        f"anchors:    {best.anchors or 'as given, train with --noautoanchor'}",
        f"written:    {moment}",
        "unconfirmed: one training with one seed; a rerun with another seed may give less",
        "raw units as train.py --hyp reads them; nothing is rescaled",
        *CLS_PW_NOTE,
    ]
    if best.is_base:
        lines.insert(3, "no trial beat the base: these are the values that the study started from")
    return lines


_SHOWN = ("fitness", "map50", "map", "precision", "recall")


def _against_base(best: BestTrial) -> str:
    if best.is_base:
        return "the base itself"
    if best.base_value is None:
        return "the base has no value"
    return f"base {best.base_value:.5f} ({best.value - best.base_value:+.5f})"


def _write_atomic(path: Path, text: str, expected: Hyperparameters) -> None:
    """Write beside the target, check what a reader would get, then rename over it."""
    # Not the process id: threads share it, and hosts with a common folder may have the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if Hyperparameters.from_yaml(temporary) != expected:
            raise SearchError(f"{path}: the values read back differ from the trial's; nothing was written")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
