"""What is known already, from other tools and other studies, brought into a study.

Whatever a file says is turned into raw hyp values first, then into the study's search parameters (`search.transforms`).
Nothing is dropped silently: each value that is changed or left out gives a note, a line for people.

The *format* is told by the content, not by the name. What comes out are `Candidate`s: values to be tried here, with
this study's training. Only trials of another study with the same data, training and objective have a value that
counts here (`prior_trials`); they are told to the sampler, and spend none of the budget.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from search.config import StudyConfig
from search.errors import UserInputError
from search.ledger import Ledger, StudyRecord, Ticket
from search.settings import SpaceEntry
from search.space import complete_params
from search.transforms import NotInSpaceError, hyperparameters, moved_keys, search_params
from search.weights import complete_trials
from yolocore.errors import HyperparameterError
from yolocore.hyperparameters import (
    HYPERPARAMETER_KEYS,
    IGNORED_KEYS,
    PER_CLASS_KEY,
    RANGES,
    Hyperparameters,
)

Format = Literal["hyp YAML", "evolve.csv", "tune_results.csv", "Ultralytics YAML", "study"]

MAP50, MAP = "metrics/mAP_0.5", "metrics/mAP_0.5:0.95"
ULTRALYTICS_KEYS = frozenset(
    {
        *("lr0", "lrf", "momentum", "weight_decay", "warmup_epochs", "warmup_momentum", "warmup_bias_lr"),
        *("hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective"),
        *("flipud", "fliplr", "mosaic", "mixup", "copy_paste"),
    }
)
"""Keys that mean in Ultralytics models (YOLOv8 and newer) what they mean in YOLOv5: optimiser and augmentation."""

NOT_ULTRALYTICS: Mapping[str, str] = {
    "box": "a gain of another box loss (task-aligned assignment, 7.5 where YOLOv5 has 0.05)",
    "cls": "a gain of another class loss (all cells, soft targets)",
    "dfl": "YOLOv5 has no distribution focal loss",
    "obj": "Ultralytics models have no objectness",
    "obj_pw": "Ultralytics models have no objectness",
    "cls_pw": "another meaning there",
    "fl_gamma": "Ultralytics models have no focal loss",
    "anchor_t": "Ultralytics models have no anchors",
    "iou_t": "training does not use it",
    PER_CLASS_KEY: "a key of yolosearch",
}
"""Why the other keys have no counterpart."""

COMPARABLE_TRAIN = frozenset({"seed", "device", "cache", "workers", "pack", "keep_weights"})
"""Keys of `train` that may differ between studies whose values are compared: they change noise or speed only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Hyp values to try."""

    source: str
    """Where they come from, for people."""
    values: Mapping[str, Any]
    """Raw hyp values, as they were found: neither checked nor complete."""
    fitness: float | None = None
    """What they reached there, by which candidates are ordered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a file holds."""

    format: Format
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A candidate in the terms of a study."""

    candidate: Candidate
    params: Mapping[str, float]
    """Its search parameters."""
    notes: tuple[str, ...]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_candidates(path: Path) -> Found:
    """What a file of hyperparameters holds, best first.

    Raises:
        UserInputError: it cannot be read, or is none of the known formats; names file and line.
    """
    text = _text(path)
    first = next((line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")), "")
    if "," in first and ":" not in first.replace(MAP, "") and "{" not in first:
        return _read_csv(path, text)
    return _read_yaml(path, text)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserInputError(f"{path}: not a text file; allowed: {_FORMATS}") from None
    except OSError as error:
        raise UserInputError(f"{path}: cannot be read: {error.strerror}; allowed: {_FORMATS}") from None


_FORMATS = "a hyp YAML, an evolve.csv, a tune_results.csv, or the name of a study"


def _read_csv(path: Path, text: str) -> Found:
    rows = [
        [cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)
    ]
    names = rows[0]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserInputError(f"{path}:1: column {twice!r} stands twice; allowed: each once")
    if MAP in names and "box" in names:
        kind: Format = "evolve.csv"
    elif "fitness" in names and set(names) & ULTRALYTICS_KEYS:
        kind = "tune_results.csv"
    else:
        what = "the results of one training, without hyperparameters" if "epoch" in names else "an unknown table"
        raise UserInputError(f"{path}:1: {what} (columns {', '.join(names[:4])}, ...); allowed: {_FORMATS}")
    table = [_numbers(path, index + 2, names, row) for index, row in enumerate(rows[1:])]
    if not table:
        raise UserInputError(f"{path}: no rows below the names; allowed: {_FORMATS}")
    return _from_table(path, kind, table)


def _numbers(path: Path, line: int, names: Sequence[str], row: Sequence[str]) -> dict[str, float]:
    if len(row) != len(names):
        raise UserInputError(f"{path}:{line}: {len(row)} values; allowed: {len(names)}, as many as names in line 1")
    values = {}
    for name, cell in zip(names, row, strict=True):
        try:
            values[name] = float(cell)
        except ValueError:
            raise UserInputError(f"{path}:{line}: {name}: got {cell!r}; allowed: a number") from None
    return values


def _from_table(path: Path, kind: Format, table: Sequence[Mapping[str, float]]) -> Found:
    is_evolve = kind == "evolve.csv"
    keys = [key for key in table[0] if (key in HYPERPARAMETER_KEYS if is_evolve else key in ULTRALYTICS_KEYS)]
    candidates = []
    for index, row in enumerate(table):
        fitness = 0.1 * row[MAP50] + 0.9 * row[MAP] if is_evolve else row["fitness"]
        if math.isfinite(fitness):
            values = {key: row[key] for key in keys}
            candidates.append(Candidate(source=f"{path} row {index}", values=values, fitness=fitness))
    ordered = sorted(candidates, key=lambda one: -(one.fitness or 0.0))
    # One fitness of two rows: the first, as YOLOv5 chooses.
    return Found(format=kind, candidates=tuple(ordered), notes=tuple(_left_out(table[0], is_evolve=is_evolve)))


def _left_out(names: Mapping[str, Any], *, is_evolve: bool) -> Iterator[str]:
    if "anchors" in names:
        yield "anchors left out: with this key YOLOv5 throws the model's anchors away"
    foreign = {} if is_evolve else {key: why for key, why in NOT_ULTRALYTICS.items() if key in names}
    if foreign:
        yield "not carried over: " + "; ".join(f"{key}: {why}" for key, why in foreign.items())
    known = {*HYPERPARAMETER_KEYS, *foreign, PER_CLASS_KEY, "anchors", "fitness"}
    others = [key for key in names if key not in known and not key.startswith(("metrics/", "val/"))]
    if others:
        yield f"no hyp keys: {', '.join(others)}"


def _read_yaml(path: Path, text: str) -> Found:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise UserInputError(f"{path}{place}: neither YAML nor a table; allowed: {_FORMATS}") from None
    if isinstance(data, dict) and isinstance(data.get("hyp"), dict):
        data = data["hyp"]  # opt.yaml of a training
    if not isinstance(data, dict) or not set(data) & {*HYPERPARAMETER_KEYS}:
        hint = f" (it names {data['hyp']!r}: import that)" if isinstance(data, dict) and data.get("hyp") else ""
        raise UserInputError(f"{path}: holds no hyp keys{hint}; allowed: {_FORMATS}")
    foreign = "dfl" in data
    values = {key: value for key, value in data.items() if key in (ULTRALYTICS_KEYS if foreign else _OURS)}
    for key, value in values.items():
        _require_number(path, key, value)
    notes = tuple(_left_out({str(key): value for key, value in data.items()}, is_evolve=not foreign))
    found = Candidate(source=str(path), values=values)
    return Found(format="Ultralytics YAML" if foreign else "hyp YAML", candidates=(found,), notes=notes)


_OURS = frozenset({*HYPERPARAMETER_KEYS, PER_CLASS_KEY})


def _require_number(path: Path, key: str, value: object) -> None:
    numbers = value if key == PER_CLASS_KEY and isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserInputError(f"{path}: {key}: got {number!r}; allowed: a number")


# ---- fitting into a study --------------------------------------------------------------------------------------------


def fit(config: StudyConfig, candidate: Candidate) -> Fitted:
    """A candidate as search parameters of a study: what it searches from the candidate, all else from the base.

    Values outside what the study searches are moved to the nearest one, with a note.

    Args:
        config: the study, as its database has it.
        candidate: what to fit in.

    Raises:
        UserInputError: the study searches nothing of what the candidate has.
    """
    moved = moved_keys(config)
    if not set(moved) & set(candidate.values):
        have = ", ".join(candidate.values) or "no usable key"
        raise UserInputError(
            f"{candidate.source}: has {have}; allowed: keys that the study searches ({', '.join(moved)})"
        )
    base = config.base_hyperparameters()
    notes: list[str] = []
    values = {key: _possible(key, value, notes) for key, value in candidate.values.items() if key in moved}
    try:
        params = search_params(config, base.replace(**values))
    except (NotInSpaceError, HyperparameterError) as error:
        notes.append(f"{PER_CLASS_KEY} left out: {error}")
        values.pop(PER_CLASS_KEY, None)
        params = search_params(config, base.replace(**values))
    params = {key: _nearest(config, key, value, notes) for key, value in params.items()}
    notes += _not_searched(candidate, base, moved)
    return Fitted(candidate=candidate, params=complete_params(config, params), notes=tuple(notes))


def _possible(key: str, value: Any, notes: list[str]) -> Any:
    if key == PER_CLASS_KEY:
        return value
    low, high = RANGES[key]
    moved = min(max(float(value), low), high)
    if moved != value:
        notes.append(f"{key} {value:g} is outside what YOLOv5 can use: {moved:g}")
    return moved


def _nearest(config: StudyConfig, key: str, value: float, notes: list[str]) -> float:
    entry = config.space.get(key)
    if entry is None or entry.contains(value):
        return value
    nearest = _in_range(entry, value)
    notes.append(f"{key} {value:.5g} is outside the study's range ({entry.describe()}): {nearest:g}")
    return nearest


def _in_range(entry: SpaceEntry, value: float) -> float:
    if (grid := entry.grid()) is not None:
        return min(grid, key=lambda one: abs(one - value))
    assert entry.low is not None
    assert entry.high is not None
    return min(max(value, entry.low), entry.high)


def _not_searched(candidate: Candidate, base: Hyperparameters, moved: Sequence[str]) -> Iterator[str]:
    """Keys with other values than the base that this study keeps fixed."""
    differ = [
        f"{key} {value:g} (here {getattr(base, key):g})"
        for key, value in candidate.values.items()
        if key in HYPERPARAMETER_KEYS and key not in (*moved, *IGNORED_KEYS) and value != getattr(base, key)
    ]
    if PER_CLASS_KEY in candidate.values and PER_CLASS_KEY not in moved:
        yield f"{PER_CLASS_KEY} is not searched here, so left out"
    if differ:
        yield f"not searched here, so left as in the base: {', '.join(differ)}"


# ---- another study ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherStudy:
    """A study to learn from."""

    record: StudyRecord
    config: StudyConfig
    tickets: tuple[Ticket, ...]

    def complete(self) -> list[Ticket]:
        """Its complete trials with a value, best first."""
        return [ticket for ticket in complete_trials(self.tickets) if ticket.kind == "search" and ticket.params]

    def values(self, ticket: Ticket) -> dict[str, Any]:
        """Raw hyp values of one of its trials."""
        return hyperparameters(self.config, ticket.params or {}).to_document()


def differences(config: StudyConfig, fingerprint: str, other: OtherStudy) -> tuple[str, ...]:
    """Why the values of another study do not count here: the dotted keys that differ; none where they do."""
    mine, theirs = config.train.model_dump(mode="json"), other.config.train.model_dump(mode="json")
    found = ["data"] if fingerprint != other.record.fingerprint else []
    found += [f"train.{key}" for key in mine if key not in COMPARABLE_TRAIN and mine[key] != theirs.get(key)]
    # Of several objectives a trial has several values, and the sampler is told one.
    several = config.objectives or other.config.objectives
    return (*found, *(["objective"] if several or config.objective != other.config.objective else []))


def study_candidates(other: OtherStudy) -> Found:
    """The complete trials of another study as candidates, best first."""
    found = [
        Candidate(source=f"study {other.record.name} trial {one.number}", values=other.values(one), fitness=one.value)
        for one in other.complete()
    ]
    return Found(format="study", candidates=tuple(found))


def prior_trials(config: StudyConfig, other: OtherStudy) -> tuple[list[tuple[dict[str, float], float]], list[str]]:
    """Trials of a comparable study as search parameters and values, and a line for each that does not fit.

    Nothing is moved into a range here: a value belongs to its own parameters.
    """
    fitting, notes = [], []
    for ticket in other.complete():
        source = f"study {other.record.name} trial {ticket.number}"
        fitted = fit(config, Candidate(source=source, values=other.values(ticket)))
        if fitted.notes:
            notes.append(f"{source} left out: {fitted.notes[0]}")
        else:
            fitting.append((dict(fitted.params), float(ticket.value or 0.0)))
    return fitting, notes


def same_params(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether two sets of search parameters are the same trial."""
    return one.keys() == other.keys() and all(math.isclose(one[key], other[key], rel_tol=1e-9) for key in one)


# ---- into the study --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of one source."""

    source: str
    format: Format
    queued: Mapping[int, str]
    """Ticket number and where its values come from."""
    known: int
    """Finished trials that were told to the sampler."""
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def import_candidates(ledger: Ledger, config: StudyConfig, source: str, found: Found, top: int) -> Imported:
    """Gives the best candidates of a source to trials of the budget that nobody has begun.

    Args:
        ledger: of the study's database.
        config: the study, as its database has it.
        source: what to call it.
        found: its candidates, best first.
        top: how many of them at most.

    Raises:
        UserInputError: the study searches nothing of what they have, or has a grid of its own.
    """
    if config.sampler.name == "grid":
        raise UserInputError(f"study {config.name}: sampler grid has its own points; allowed: another sampler")
    notes = list(found.notes)
    known = [ticket.params or ticket.fixed_params or {} for ticket in ledger.tickets(config.name)]
    chosen: list[Fitted] = []
    for candidate in found.candidates:
        if len(chosen) == top:
            break
        fitted = fit(config, candidate)
        if any(same_params(fitted.params, other) for other in (*known, *(one.params for one in chosen))):
            notes.append(f"{candidate.source}: the study has this trial already")
            continue
        chosen.append(fitted)
        notes += [f"{candidate.source}: {note}" for note in fitted.notes]
    numbers = ledger.fix_params(config.name, [one.params for one in chosen])
    if left := len(chosen) - len(numbers):
        notes.append(f"{left} left out: no trial of the budget is untouched; --trials +{left} adds as many")
    queued = {number: one.candidate.source for number, one in zip(numbers, chosen, strict=False)}
    return Imported(source=source, format=found.format, queued=queued, known=0, notes=tuple(notes))


def import_study(
    ledger: Ledger,
    config: StudyConfig,
    other: OtherStudy,
    top: int,
    tell_sampler: Callable[[Sequence[tuple[Mapping[str, float], float]]], int],
) -> Imported:
    """Tells a comparable study's trials to the sampler; of another one queues the best, as of a file.

    Args:
        ledger: of the study's database.
        config: the study, as its database has it.
        other: the study to learn from.
        top: how many of its trials to queue where its values do not count here.
        tell_sampler: keeps search parameters and values as prior knowledge; returns how many were new.
    """
    source = f"study {other.record.name}"
    why = differences(config, ledger.study(config.name).fingerprint, other)
    if not why and config.sampler.name in ("tpe", "gp"):
        trials, notes = prior_trials(config, other)
        return Imported(source=source, format="study", queued={}, known=tell_sampler(trials), notes=tuple(notes))
    reason = f"its values do not count here, where {', '.join(why)} differ" if why else _NO_MEMORY
    found = study_candidates(other)
    return import_candidates(
        ledger, config, source, replace(found, notes=(f"{reason}: the best are tried again",)), top
    )


_NO_MEMORY = "this study's sampler does not learn from trials that it did not propose"
