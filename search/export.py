"""From the best trial to a hyp YAML that goes straight into `train.py --hyp`, with its provenance in comments."""

import importlib.metadata
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from search.config import StudyConfig
from search.confirm import TEST, VALIDATION, ConfirmReport, gain_in_words, latest_confirmation
from search.errors import SearchError, UserInputError
from search.ledger import Ledger, Ticket, base_numbers, front
from search.prepared import Prepared
from search.recommendation import recommend
from search.statistics import ALPHA
from search.transforms import at_bounds, hyperparameters, moved_keys
from search.weights import WeightsStore, complete_trials, value_row
from yolocore.hyperparameters import Hyperparameters

CLS_PW_NOTE = (
    "cls_pw is the positive weight of YOLOv5's class loss (1 = neutral). Later Ultralytics models",
    "(YOLOv8 and newer) give a key of this name another meaning: do not carry it over.",
)

_HOW_TO_READ = ("raw units as train.py --hyp reads them; nothing is rescaled", *CLS_PW_NOTE)

PER_CLASS_NOTE = (
    "cls_pw_per_class is a key of yolosearch: plain YOLOv5 ignores it and trains with cls_pw alone, which is",
    "the mean of these weights over the labels. The gain above was measured with the weights per class.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RerunGain:
    """What reruns of a trial beside the base show on one split."""

    split: str
    """val or test."""
    verdict: str
    gain: float
    """Of the objective, mean over the seeds."""
    low: float
    """Ends of its interval."""
    high: float
    p_value: float
    """One-sided, corrected for the number of candidates."""
    candidates: int
    seeds: int
    epochs: int
    is_final: bool
    """Whether no rerun waits or runs."""
    confidence: float = 1 - ALPHA
    """With which each end of the interval holds, for all candidates together."""
    looks: int = 0
    """How often seeds were added after reruns on earlier ones could be looked at."""


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
    value: float | None
    """The trial's objective; None for a base whose own trial failed."""
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
    ticket: int | None = None
    """Number of its ticket."""
    why: str | None = None
    """Why it is this one, where it is not the best of its search."""
    verdict: str | None = None
    """What the study's confirmation says, in one line; None without one."""
    gains: tuple[str, ...] = ()
    """Its confirmed gains, a line for each split."""
    looks: str | None = None
    """What it means that seeds were added after a look at the confirmation; None where that was not so."""
    at_bounds: tuple[str, ...] = ()
    """A line for each of its values that lies at an end of its range."""
    study_id: str = ""
    """Name and time of creation, which no other study shares."""
    reruns: tuple[RerunGain, ...] = ()
    """What `gains` says, as numbers."""
    values: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Of several objectives each one's value, and the base's."""
    bases: frozenset[int] = frozenset({0})
    """Numbers of the tickets that train the base."""

    @property
    def is_base(self) -> bool:
        """Whether it is the base: nothing beat it, or nothing is shown to."""
        return (self.trial_number if self.ticket is None else self.ticket) in self.bases

    @property
    def is_confirmed(self) -> bool:
        """Whether reruns show that it is better than the base, on the split that decides."""
        return any(gain.split == VALIDATION and gain.verdict == "better" and gain.is_final for gain in self.reruns)


def best_trial(ledger: Ledger, config: StudyConfig, trial: int | None = None) -> BestTrial:
    """The trial to export: the confirmed winner, or the base where a confirmation found none.

    Without a confirmation it is the complete trial with the highest objective; of equals the earliest, so that the base
    wins a tie.

    Args:
        ledger: of the study.
        config: the study.
        trial: number of the trial that is wanted instead.

    Raises:
        UserInputError: no trial is complete yet, not the one that is named, or there are several objectives.
    """
    if config.objectives and trial is None:
        names = " and ".join(objective.name for objective in config.objectives)
        raise UserInputError(
            f"study {config.name}: it maximises {names}, so no trial is the best; allowed: --pareto all, or --pareto N "
            "for trial N of the front that `yolosearch status` shows"
        )
    tickets = _search_tickets(ledger, config)
    report = latest_confirmation(ledger, config)
    best, why = _named(config, tickets, trial) if trial is not None else _recommended(tickets, report)
    return _exported(ledger, config, best, tickets, why, report)


def front_trials(ledger: Ledger, config: StudyConfig, number: int | None = None) -> tuple[BestTrial, ...]:
    """The trials that no other one beats in all objectives, by the first objective from the highest down.

    Args:
        ledger: the ledger in the study's database.
        config: the study.
        number: only this trial.

    Raises:
        UserInputError: no trial is complete yet, there is one objective only, or the trial is not on the front.
    """
    if not config.objectives:
        raise UserInputError(
            f"study {config.name}: --pareto: it has one objective ({config.objective.name}); allowed: export without it"
        )
    tickets = _search_tickets(ledger, config)
    found = {ticket.trial_number: ticket for ticket in front(tickets)}
    if number is not None and number not in found:
        allowed = ", ".join(map(str, found))
        raise UserInputError(f"study {config.name}: --pareto: got {number}; allowed: all, or one of {allowed}")
    chosen = found.values() if number is None else [found[number]]
    return tuple(_exported(ledger, config, ticket, tickets) for ticket in chosen)


def _search_tickets(ledger: Ledger, config: StudyConfig) -> tuple[Ticket, ...]:
    tickets = ledger.tickets(config.name)
    if not complete_trials(tickets):
        found = f"none of {len(tickets)} trials is complete"
        raise UserInputError(f"study {config.name}: {found}; allowed: a study with a complete trial")
    return tickets


def _exported(
    ledger: Ledger,
    config: StudyConfig,
    best: Ticket,
    tickets: Sequence[Ticket],
    why: str | None = None,
    report: ConfirmReport | None = None,
) -> BestTrial:
    complete = complete_trials(tickets)
    numbers = base_numbers(tickets)
    base = next((ticket for ticket in complete if ticket.number in numbers), None)
    rows = [row for row in ledger.reports(best.id) if best.best_epoch in (None, row.epoch)]
    record = ledger.study(config.name)
    anchors = Prepared.of(record.config).autoanchor
    return BestTrial(
        study=config.name,
        trial_number=best.number if best.trial_number is None else best.trial_number,
        hyperparameters=hyperparameters(config, best.params or {}),
        searched=moved_keys(config),
        at_bounds=at_bounds(config, best.params or {}) if best.number not in numbers else (),
        objective=config.objective_text(),
        value=best.value,
        base_value=None if base is None else base.value,
        complete=len(complete),
        fingerprint=record.fingerprint,
        anchors=None if anchors is None else anchors.describe(),
        metrics=rows[-1].metrics if rows else {},
        bases=numbers,
        finished=best.finished,
        ticket=best.number,
        why=why,
        verdict=None if report is None else report.verdict(),
        gains=() if report is None else tuple(_gains(report, best.number)),
        looks=None if report is None else report.looks_in_words(),
        study_id=f"{record.name}@{datetime.fromtimestamp(record.created, UTC).isoformat(timespec='milliseconds')}",
        reruns=() if report is None else tuple(_reruns(report, best.number)),
        values=_several_values(config, best, base),
    )


def _several_values(
    config: StudyConfig, best: Ticket, base: Ticket | None
) -> dict[str, tuple[float | None, float | None]]:
    names = [objective.name for objective in config.objectives]
    bases = (None if base is None else base.objective_values) or (None,) * len(names)
    values = zip(names, best.objective_values or (), bases, strict=False)
    return {name: (value, yardstick) for name, value, yardstick in values}


def _named(config: StudyConfig, tickets: Sequence[Ticket], trial: int) -> tuple[Ticket, str]:
    """The ticket that the user wants instead, and why it is exported."""
    complete = complete_trials(tickets)
    named = next((one for one in complete if trial in (one.trial_number, one.number)), None)
    if named is None:
        numbers = ", ".join(str(one.trial_number) for one in sorted(complete, key=lambda one: one.number)[:20])
        raise UserInputError(f"study {config.name}: --trial: got {trial}; allowed: a complete trial ({numbers})")
    return named, "chosen by hand"


def _recommended(tickets: Sequence[Ticket], report: ConfirmReport | None) -> tuple[Ticket, str | None]:
    """The ticket to export, and why it is that one if it is not simply the best."""
    found = recommend(tickets) if report is None else recommend(tickets, report.outcome, report.trials)
    assert found is not None  # there is a complete trial
    return found.ticket, found.why if found.is_decided else None


def _gains(report: ConfirmReport, number: int) -> Iterator[str]:
    for split, name in ((VALIDATION, "validation"), (TEST, "test")):
        if (gain := report.comparison(number, split)) is not None:
            yield f"{name}: {gain.verdict}, {gain_in_words(gain, report)}"


def _reruns(report: ConfirmReport, number: int) -> Iterator[RerunGain]:
    for split in (VALIDATION, TEST):
        if (found := report.comparison(number, split)) is not None:
            yield RerunGain(
                split=split,
                verdict=found.verdict,
                gain=found.gain,
                low=found.low,
                high=found.high,
                p_value=found.p_value,
                candidates=1 if report.decisive is None else len(report.decisive.comparisons),
                seeds=len(report.seeds),
                epochs=report.epochs,
                is_final=report.is_over,
                confidence=report.confidence,
                looks=report.looks,
            )


def export_weights(
    ledger: Ledger, config: StudyConfig, store: WeightsStore, output: Path, ticket: int | None = None
) -> Path:
    """Copies the trained weights of a trial, as the search trained it.

    Args:
        ledger: the ledger in the study's database.
        config: the study.
        store: where its weights are.
        output: the file to write.
        ticket: number of the trial's ticket; None for the best one.

    Returns:
        `output`.

    Raises:
        UserInputError: no trial is complete, its weights were not kept, or the file cannot be written.
        CheckpointError: the weights cannot be read.
    """
    complete = [one for one in complete_trials(ledger.tickets(config.name)) if ticket in (None, one.number)]
    row = value_row(complete[0], ledger.reports(complete[0].id)) if complete else None
    file = store.find(complete[0].number, row) if complete else None
    if file is None:
        which = "a complete trial" if not complete else f"trial {complete[0].trial_number}"
        found = f"no weights of {which} are in {store}"
        raise UserInputError(
            f"study {config.name}: {found}; allowed: a study with train.keep_weights best or all, and --checkpoints "
            "where its workers had it"
        )
    return store.copy(complete[0].number, file, output)


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
    return export_text(path, text, lambda file: Hyperparameters.from_yaml(file) == best.hyperparameters)


def export_text(path: Path, text: str, is_same: Callable[[Path], bool]) -> Path:
    """Writes a file that appears whole or not at all.

    Args:
        path: where to.
        text: what.
        is_same: whether a file with this text gives what was meant when it is read.

    Returns:
        The path.

    Raises:
        UserInputError: it cannot be written.
        SearchError: what was read back differs.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomic(path, text, is_same)
    except OSError as error:
        raise UserInputError(
            f"{path}: cannot be written: {error.strerror}; allowed: a path in a writable folder"
        ) from None
    return path


def written_by() -> dict[str, str]:
    """The version that writes, and when: UTC, ISO 8601."""
    return {
        "yolosearch": importlib.metadata.version("yolosearch"),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def header(best: BestTrial, *, of_yolov5: bool = True) -> Sequence[str]:
    """The comment lines of an exported file, without `#`.

    Args:
        best: the trial.
        of_yolov5: whether the values are YOLOv5's, with notes on how it reads them.
    """
    moment = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = [
        f"YOLOv5 hyperparameters found by yolosearch {importlib.metadata.version('yolosearch')}",
        f"study:      {best.study}, trial {best.trial_number}, {standing(best)}",
        *_objective_lines(best),
        f"metrics:    {', '.join(f'{key} {value:.4f}' for key, value in best.metrics.items() if key in _SHOWN)}",
        f"searched:   {', '.join(best.searched)}",
        f"data:       fingerprint {best.fingerprint}",
        f"study id:   {best.study_id}",
        f"anchors:    {best.anchors or 'as given, train with --noautoanchor'}",
        f"written:    {moment}",
        *_confirmation(best),
        *(_HOW_TO_READ if of_yolov5 else ()),
    ]
    lines += [f"at a bound: {line}; a wider range may give better values" for line in best.at_bounds]
    if of_yolov5 and best.hyperparameters.cls_pw_per_class is not None:
        lines += PER_CLASS_NOTE
    if best.is_base and best.why is None and not best.values:
        lines.insert(3, "no trial beat the base: these are the values that the study started from")
    return lines


_SHOWN = ("fitness", "map50", "map", "precision", "recall")


def _confirmation(best: BestTrial) -> list[str]:
    """What reruns with other seeds say of it."""
    unconfirmed = "unconfirmed: one training with one seed; a rerun with another seed may give less"
    if best.verdict is None:
        return [unconfirmed]
    known = [f"confirmation: {best.verdict}", *([] if best.looks is None else [f"looks:      {best.looks}"])]
    own = [f"confirmed on {line}" if ": better" in line else f"rerun on {line}" for line in best.gains]
    return [*known, *own] if own or best.is_base else [*known, unconfirmed]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.5f}"


def standing(best: BestTrial) -> str:
    """Why it is this trial, in words."""
    if best.why is not None:
        return best.why
    if best.values:
        return f"one of those that none of the {best.complete} complete trials beats in all objectives"
    return f"the best of {best.complete} complete trials"


def _objective_lines(best: BestTrial) -> list[str]:
    values = best.values or {best.objective: (best.value, best.base_value)}
    return [
        f"objective:  {name} = {_number(value)}, {_against_base(best, value, base)}"
        for name, (value, base) in values.items()
    ]


def _against_base(best: BestTrial, value: float | None, base: float | None) -> str:
    if best.is_base:
        return "the base itself"
    if base is None or value is None:
        return "the base has no value"
    return f"base {base:.5f} ({value - base:+.5f})"


def _write_atomic(path: Path, text: str, is_same: Callable[[Path], bool]) -> None:
    """Write beside the target, check what a reader would get, then rename over it."""
    # Not the process id: threads share it, and hosts with a common folder may have the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if not is_same(temporary):
            raise SearchError(f"{path}: the values read back differ from the trial's; nothing was written")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
