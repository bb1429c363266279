"""What a study has found, as plain data and in words: what `report`, MLflow's note and the plots are made from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from search.config import StudyConfig
from search.confirm import CLASS_AP, VALIDATION, ConfirmReport, latest_confirmation, noise_report
from search.ledger import KINDS, SEARCH, EpochRow, Ledger, StudyRecord, Ticket, TicketState, base_numbers, front
from search.recommendation import Recommendation, recommend
from search.settings import SpaceEntry
from search.statistics import Comparison, Confirmation, spread
from search.transforms import hyperparameters, moved_keys
from search.weights import complete_trials, value_row

BAND = 1.96 * math.sqrt(2)
"""Half the noise band in standard deviations of one run: two runs of equal settings differ by more once in twenty."""

NAMED_KEYS = 3
"""Hyperparameters that the verdict names; the others are counted."""

NAMED_TRIALS = 4
"""Trials of a front that the verdict names; the others are counted."""

SMALL_MOVE = 0.05
"""A change of less than this share of its range is not worth naming."""

MAIN_SHARE = 0.5
"""A class that has more than this share of all gains in AP is what the gain mostly is."""

Standing = Literal["confirmed", "unconfirmed", "keep", "open", "front"]


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """A study's rows at one moment; picklable, so that another process can draw them."""

    record: StudyRecord
    config: StudyConfig
    class_names: tuple[str, ...]
    """Empty where the data set is not known on this host: classes are then called by their numbers."""
    every_ticket: tuple[Ticket, ...]
    """Of all kinds, by number."""
    reports: Mapping[int, tuple[EpochRow, ...]]
    """Evaluated epochs by ticket id."""
    now: float
    """UTC epoch seconds."""
    confirmation: Confirmation | None = None
    """Candidates against the base over paired seeds, where that was done."""
    noise: float | None = None
    """Standard deviation of one run, where it was measured."""
    candidates: Mapping[str, int] = field(default_factory=dict)
    """Trial number of each candidate of the confirmation."""
    class_confirmations: Mapping[int, Confirmation] = field(default_factory=dict)
    """The same of each class's AP on the validation split, by its number."""

    @cached_property
    def tickets(self) -> tuple[Ticket, ...]:
        """The trials of the search, without reruns for noise or confirmation."""
        return tuple(ticket for ticket in self.every_ticket if ticket.kind == SEARCH)

    @cached_property
    def complete(self) -> tuple[Ticket, ...]:
        """Complete trials, the best first."""
        return tuple(complete_trials(self.tickets))

    @cached_property
    def base(self) -> Ticket | None:
        """The base's trial, as far as it is complete."""
        numbers = base_numbers(self.tickets)
        return next((ticket for ticket in self.complete if ticket.number in numbers), None)

    @cached_property
    def recommendation(self) -> Recommendation | None:
        """What the study recommends; of several objectives nothing: there is a front."""
        if self.config.objectives:
            return None
        return recommend(self.every_ticket, self.confirmation, self.candidates)

    @property
    def best(self) -> Ticket | None:
        """The trial that it recommends, which is the base where a confirmation found no winner."""
        return None if self.recommendation is None else self.recommendation.ticket

    @cached_property
    def front(self) -> tuple[Ticket, ...]:
        """The trials that no other one beats in all of several objectives, by the first; () with one objective."""
        return tuple(front(self.tickets))

    @cached_property
    def base_reruns(self) -> tuple[Ticket, ...]:
        """The base's complete trainings on other seeds, as long as the search's, one of each seed."""
        found: dict[int | None, Ticket] = {}
        for ticket in self.every_ticket:
            is_base = ticket.is_rerun and not ticket.candidate and ticket.epochs == self.config.train.epochs
            if is_base and ticket.state is TicketState.COMPLETE:
                found.setdefault(ticket.seed, ticket)
        return tuple(found.values())

    @cached_property
    def metric_noise(self) -> dict[str, float]:
        """Standard deviation of each metric over the base's reruns; empty with fewer than two."""
        return _deviations([self.metrics(ticket) for ticket in self.base_reruns])

    @property
    def class_noise(self) -> dict[str, float]:
        """The same of each class's AP, by its name; of the means over paired seeds where those are compared."""
        if confirmed := self.confirmed_classes:
            return {name: result.noise / math.sqrt(result.seeds) for name, (result, _) in confirmed.items()}
        return _deviations([self.class_ap(ticket) for ticket in self.base_reruns])

    @property
    def confirmed_classes(self) -> dict[str, tuple[Confirmation, Comparison]]:
        """What the confirmation says about each class under its winner; empty without a winner."""
        if self.recommendation is None or self.recommendation.standing != "confirmed":
            return {}
        results = {index: (result, self.line_of(result)) for index, result in self.class_confirmations.items()}
        return {self.class_name(index): (result, line) for index, (result, line) in results.items() if line is not None}

    def line_of(self, result: Confirmation) -> Comparison | None:
        """What a confirmation says about the recommended trial."""
        number = None if self.best is None else self.best.trial_number
        return next((line for line in result.comparisons if self.candidates.get(line.candidate) == number), None)

    @property
    def objective_noise(self) -> dict[str, float]:
        """The same of several objectives."""
        return _deviations([self.objective_values(ticket) for ticket in self.base_reruns])

    def objective_values(self, ticket: Ticket) -> dict[str, float]:
        """A trial's values under several objectives, by their names; {} with one, or as long as it is not complete."""
        return dict(zip(self.objective_names, ticket.objective_values or (), strict=False))

    @property
    def objective_names(self) -> tuple[str, ...]:
        """Of several objectives."""
        return tuple(objective.name for objective in self.config.objectives)

    @property
    def run_noise(self) -> float | None:
        """Standard deviation of one run, from reruns or from the confirmation."""
        if self.noise is not None:
            return self.noise
        return None if self.confirmation is None else self.confirmation.noise

    @property
    def band(self) -> tuple[float, float] | None:
        """Values that do not differ from the base by more than two runs of equal settings would."""
        if self.base is None or self.base.value is None or self.run_noise is None:
            return None
        half = half_band(self.run_noise)
        return self.base.value - half, self.base.value + half

    @property
    def metric(self) -> str:
        """The objective's name in running text."""
        weights = self.config.objective.weights
        return next(iter(weights)) if len(weights) == 1 else "the objective"

    @property
    def base_name(self) -> str:
        """What the base is called."""
        return self.config.base_name

    def rows(self, ticket: Ticket) -> tuple[EpochRow, ...]:
        """Its evaluated epochs."""
        return self.reports.get(ticket.id, ())

    def value(self, ticket: Ticket) -> float | None:
        """Its value, or where it has none (yet) that of its last evaluated epoch."""
        if ticket.value is not None:
            return ticket.value
        return next((row.value for row in reversed(self.rows(ticket)) if row.value is not None), None)

    def metrics(self, ticket: Ticket) -> Mapping[str, float]:
        """Its metrics at the epoch that gave it its value."""
        row = value_row(ticket, self.rows(ticket))
        return {} if row is None else row.metrics

    def class_name(self, index: int) -> str:
        """The name of a class."""
        return self.class_names[index] if index < len(self.class_names) else f"class {index}"

    def class_ap(self, ticket: Ticket) -> dict[str, float]:
        """AP (mean over IoU 0.50 to 0.95) by class name, of the classes that have labels."""
        prefix = "class_ap/"
        found = {
            int(key.removeprefix(prefix)): ap for key, ap in self.metrics(ticket).items() if key.startswith(prefix)
        }
        return {self.class_name(index): found[index] for index in sorted(found)}


def half_band(sd: float) -> float:
    """Half the noise band of something with this standard deviation from run to run."""
    return BAND * sd


def _deviations(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Standard deviation of what all these runs have."""
    if len(runs) < 2:
        return {}
    shared = [key for key in runs[0] if all(key in run for run in runs)]
    return {key: spread([run[key] for run in runs]).sd for key in shared}


def read_study_data(ledger: Ledger, config: StudyConfig, class_names: Sequence[str] = ()) -> StudyData:
    """Reads a study's rows, and what its reruns say; a confirmation that is under way says nothing yet."""
    report = latest_confirmation(ledger, config)
    if report is not None and report.outcome is None:
        report = None
    spread = noise_report(ledger, config).spread
    return StudyData(
        record=ledger.study(config.name),
        config=config,
        class_names=tuple(class_names),
        every_ticket=ledger.tickets(config.name, KINDS),
        reports=ledger.all_reports(config.name, KINDS),
        now=ledger.now(),
        confirmation=None if report is None else report.outcome,
        noise=None if spread is None else spread.sd,
        candidates={} if report is None else report.trials,
        class_confirmations={} if report is None else _by_class(report),
    )


def _by_class(report: ConfirmReport) -> dict[int, Confirmation]:
    measures = {one.measure: one.result for one in report.judgements if one.split == VALIDATION}
    return {int(key.removeprefix(CLASS_AP)): result for key, result in measures.items() if key.startswith(CLASS_AP)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One hyperparameter of the best trial against the base's."""

    key: str
    base: float
    best: float
    share: float
    """How far it moved, as a share of its range."""

    @property
    def text(self) -> str:
        """For example `obj_pw 2.4`."""
        return f"{self.key} {short(self.best)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassChange:
    """A class's AP under the base and under the best trial: means over paired seeds where confirmed, else one run's."""

    name: str
    base: float
    best: float

    @property
    def change(self) -> float:
        """Best minus base."""
        return self.best - self.base


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontTrial:
    """One trial of the Pareto front of several objectives."""

    number: int
    """Of the trial."""
    is_base: bool
    values: Mapping[str, float]
    """By objective."""
    gains: Mapping[str, float]
    """Against the base; empty where that has no values."""
    is_clear: bool
    """Whether every gain is more than two runs of equal settings differ by; False where that was not measured."""

    @property
    def beats_base(self) -> bool:
        """Whether it is better than the base in every objective."""
        return bool(self.gains) and all(gain > 0 for gain in self.gains.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the study took so far."""

    slot_epochs: int
    """Epochs that trials trained, of all kinds of tickets."""
    search_epochs: int
    """Those of the search."""
    unpruned_epochs: int
    """What the same trials of the search would have taken without pruning."""
    device_seconds: float
    """Training and evaluation; what a pack shares is divided among its slots."""
    wall_seconds: float
    """From the first start to the last report."""

    @property
    def saved(self) -> float:
        """Share of the epochs that pruning saved."""
        return 1 - self.search_epochs / self.unpruned_epochs if self.unpruned_epochs else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """A study in sentences and numbers."""

    standing: Standing
    verdict: str
    """One sentence."""
    advice: str
    """What to do about it."""
    gain: float | None
    """Best minus base: over paired seeds where confirmed, otherwise of one run each."""
    margin: float | None
    """Half the interval of a confirmed gain."""
    moves: tuple[Move, ...]
    """The searched keys, the most important first."""
    classes: tuple[ClassChange, ...]
    """The largest gain first."""
    cost: Cost
    counts: Mapping[str, int]
    """Trials of the search by state."""
    failures: tuple[tuple[str, tuple[int, ...]], ...]
    """Reasons, each with the numbers of the trials that failed for it."""
    front: tuple[FrontTrial, ...] = ()
    """Of several objectives, by the first."""


def findings(data: StudyData, importance: Mapping[str, float] | None = None) -> Findings:
    """Sums a study up.

    Args:
        data: The study.
        importance: Of the searched keys, to name those first that matter; None names those first that moved most.
    """
    if data.config.objectives:
        return _front_findings(data)
    moves, classes = _moves(data, importance or {}), _class_changes(data)
    comparison = None if data.confirmation is None else data.line_of(data.confirmation)
    standing = _standing(data)
    gain = comparison.gain if comparison is not None else _single_gain(data)
    return Findings(
        standing=standing,
        verdict=_verdict(data, standing, moves, classes, comparison),
        advice=_advice(data, standing),
        gain=gain,
        margin=None if comparison is None else (comparison.high - comparison.low) / 2,
        moves=moves,
        classes=classes,
        cost=_cost(data),
        counts=_state_counts(data),
        failures=_failures(data),
    )


def _state_counts(data: StudyData) -> dict[str, int]:
    return {state.value: sum(ticket.state is state for ticket in data.tickets) for state in TicketState}


def short(value: float) -> str:
    """A hyperparameter in few digits."""
    return f"{value:.2g}" if 0.01 <= abs(value) < 10 else f"{value:.3g}"


def _standing(data: StudyData) -> Standing:
    found = data.recommendation
    if found is None or (data.base is None and not found.is_decided):
        return "open"
    return found.standing


def _single_gain(data: StudyData) -> float | None:
    if data.base is None or data.best is None or data.base.value is None or data.best.value is None:
        return None
    return data.best.value - data.base.value


def _moves(data: StudyData, importance: Mapping[str, float]) -> tuple[Move, ...]:
    """What the best trial has otherwise than the base, and every searched key."""
    if data.best is None:
        return ()
    base = data.config.base_hyperparameters().to_mapping()
    best = hyperparameters(data.config, data.best.params or {}).to_mapping()
    moved = moved_keys(data.config)
    moves = [
        Move(key=key, base=base[key], best=best[key], share=_share(data.config.space.get(key), base[key], best[key]))
        for key in base
        if key in moved or best[key] != base[key]
    ]
    return tuple(sorted(moves, key=lambda move: -move.share * (0.05 + importance.get(move.key, 1.0))))


def _share(entry: SpaceEntry | None, base: float, best: float) -> float:
    """How far apart two values are, as a share of the range (in logarithms where it is searched so)."""
    if entry is None:  # follows from other keys
        return 0.0 if base == best else 0.5
    values = [base, best, *(entry.choices or (entry.low, entry.high))]
    numbers = [float(value) for value in values if value is not None]
    if entry.log and min(numbers) > 0:
        numbers = [math.log(number) for number in numbers]
    width = max(numbers) - min(numbers)
    return abs(numbers[1] - numbers[0]) / width if width else 0.0


def _class_changes(data: StudyData) -> tuple[ClassChange, ...]:
    if confirmed := data.confirmed_classes:
        means = {name: (result.base.mean, line.gain) for name, (result, line) in confirmed.items()}
        changes = [ClassChange(name=name, base=base, best=base + gain) for name, (base, gain) in means.items()]
    elif data.base is None or data.best is None:
        return ()
    else:
        single, best = data.class_ap(data.base), data.class_ap(data.best)
        changes = [ClassChange(name=name, base=single[name], best=best[name]) for name in single if name in best]
    return tuple(sorted(changes, key=lambda change: -change.change))


def _verdict(
    data: StudyData,
    standing: Standing,
    moves: Sequence[Move],
    classes: Sequence[ClassChange],
    comparison: Comparison | None,
) -> str:
    if standing == "open":
        return _open_verdict(data)
    if standing == "keep":
        return _keep_verdict(data)
    assert data.best is not None
    what, verb = _moved_text(moves)
    if comparison is not None:
        gain = f"{comparison.gain:.3f} ± {(comparison.high - comparison.low) / 2:.3f}"
        return f"{what} {verb} {data.metric} by {gain} over {data.base_name}{_mostly(classes)}."
    gain = f"{_single_gain(data) or 0.0:.3f}"
    raised = f"{what} raised {data.metric} by {gain} over {data.base_name} in one run"
    return f"Unconfirmed: {raised}{_mostly(classes)}{_against_noise(data)}."


def _open_verdict(data: StudyData) -> str:
    ended = sum(ticket.state.is_final for ticket in data.tickets)
    if data.best is None:
        return f"Nothing to say yet: {ended} of {len(data.tickets)} trials have ended, none is complete."
    best = f"trial {data.best.trial_number} has {data.metric} {data.best.value:.3f}"
    return f"Nothing to compare with: {best}, and {data.base_name} {_has(data)} no value."


def _keep_verdict(data: StudyData) -> str:
    keep = f"Keep {data.base_name}"
    if data.confirmation is not None:
        count, seeds = len(data.confirmation.comparisons), data.confirmation.seeds
        best = max(data.confirmation.comparisons, key=lambda line: line.gain)
        gain = f"the best of {count} gained {best.gain:+.3f} ± {(best.high - best.low) / 2:.3f}"
        return f"{keep}: over {seeds} paired seeds no candidate is shown to be better ({gain})."
    others = len(data.complete) - 1
    whose = "their" if _plural(data) else "its"
    return f"{keep}: none of {others} other complete trials beats {whose} value of {_best_value(data)} ({data.metric})."


def _best_value(data: StudyData) -> str:
    return "" if data.best is None or data.best.value is None else f"{data.best.value:.3f}"


def _plural(data: StudyData) -> bool:
    return data.config.base_is_default


def _has(data: StudyData) -> str:
    return "have" if _plural(data) else "has"


def _moved_text(moves: Sequence[Move]) -> tuple[str, str]:
    """The moved keys, and the verb that goes with them."""
    moved = [move for move in moves if move.share >= SMALL_MOVE] or list(moves[:1])
    named = [move.text for move in moved[:NAMED_KEYS]]
    if len(moved) > NAMED_KEYS:
        named.append(f"{len(moved) - NAMED_KEYS} more")
    return listed(named), "raises" if len(moved) == 1 else "raise"


def _mostly(classes: Sequence[ClassChange]) -> str:
    """Which class has most of the gain, where one does."""
    gains = [change.change for change in classes if change.change > 0]
    if len(classes) < 2 or not gains or max(gains) <= MAIN_SHARE * sum(gains):
        return ""
    return f"; mostly {classes[0].name}"


def _against_noise(data: StudyData) -> str:
    gain = _single_gain(data)
    if data.run_noise is None or gain is None:
        return ""
    times = gain / data.run_noise if data.run_noise else math.inf
    where = "inside" if times <= BAND else "outside"
    return f"; {where} the noise of two runs (± {BAND * data.run_noise:.3f})"


def _advice(data: StudyData, standing: Standing) -> str:
    texts = {
        "confirmed": "Train with the file below.",
        "unconfirmed": "A gain in one run may be luck, all the more as it is the largest of many. "
        "Rerun base and best with a few seeds before you believe it.",
        "keep": "Nothing has to change in your training.",
        "open": "",
    }
    return (_still_open(data) + texts[standing]).strip()


def _still_open(data: StudyData) -> str:
    count = sum(not ticket.state.is_final for ticket in data.tickets)
    return f"The study is not over: {count} trials are open. " if count else ""


# ---- several objectives ----------------------------------------------------------------------------------------------


def _front_findings(data: StudyData) -> Findings:
    trials = tuple(_front_trial(data, ticket) for ticket in data.front)
    return Findings(
        standing="front" if trials else "open",
        verdict=_front_verdict(data, trials) if trials else _open_verdict(data),
        advice=_front_advice(data, trials),
        gain=None,
        margin=None,
        moves=(),
        classes=(),
        cost=_cost(data),
        counts=_state_counts(data),
        failures=_failures(data),
        front=trials,
    )


def _front_trial(data: StudyData, ticket: Ticket) -> FrontTrial:
    values, noise = data.objective_values(ticket), data.objective_noise
    base = {} if data.base is None else data.objective_values(data.base)
    gains = {name: value - base[name] for name, value in values.items() if name in base}
    return FrontTrial(
        number=_number(ticket),
        is_base=data.base is not None and ticket.id == data.base.id,
        values=values,
        gains=gains,
        is_clear=bool(gains) and all(name in noise and gains[name] > half_band(noise[name]) for name in gains),
    )


def _front_verdict(data: StudyData, trials: Sequence[FrontTrial]) -> str:
    names = data.objective_names
    verb = "is" if len(trials) == 1 else "are"
    front = f"{len(trials)} of {len(data.complete)} complete trials {verb} on the front of {listed(names)}"
    if data.base is None:
        return f"{front}; there is nothing to compare with: {data.base_name} {_has(data)} no value."
    everything = "both" if len(names) == 2 else f"all {len(names)}"
    better = [trial for trial in trials if trial.beats_base]
    if not better and any(trial.is_base for trial in trials):
        whom = "them" if _plural(data) else "it"
        return f"{front}, {data.base_name} among them: no trial beats {whom} in {everything}."
    if not better:
        return f"{front}; none beats {data.base_name} in {everything}."
    who = _trials_text([trial.number for trial in better])
    verb = "beats" if len(better) == 1 else "beat"
    return f"{front}; in one run {who} {verb} {data.base_name} in {everything}{_clearly(data, better)}."


def _clearly(data: StudyData, better: Sequence[FrontTrial]) -> str:
    """How many of them by more than noise, where that is known."""
    if not data.objective_noise:
        return ""
    count = sum(trial.is_clear for trial in better)
    if len(better) == 1:
        return f", by {'more' if count else 'no more'} than the noise of two runs in each"
    return f", {count or 'none'} of them by more than the noise of two runs in each"


def _front_advice(data: StudyData, trials: Sequence[FrontTrial]) -> str:
    if not trials:
        return _still_open(data).strip()
    advice = (
        "Choose by what matters to you and train the choice again on a few other seeds: the more objectives and trials "
        "there are, the more of them are on the front by luck."
    )
    measure = "" if data.objective_noise else " How far equal runs are apart was not measured; `yolosearch noise` does."
    return f"{_still_open(data)}{advice}{measure}"


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _trials_text(numbers: Sequence[int]) -> str:
    """Their numbers, of many only the first."""
    shown = [str(number) for number in sorted(numbers)]
    if len(shown) > NAMED_TRIALS + 1:  # "1 more" is no shorter than its number
        shown[NAMED_TRIALS:] = [f"{len(shown) - NAMED_TRIALS} more"]
    return f"trial{'' if len(numbers) == 1 else 's'} {listed(shown)}"


# ---- cost and failures -----------------------------------------------------------------------------------------------


def _cost(data: StudyData) -> Cost:
    rows = [row for found in data.reports.values() for row in found]
    searched = [ticket for ticket in data.tickets if ticket.state.is_final and ticket.state is not TicketState.FAIL]
    starts = [ticket.started for ticket in data.every_ticket if ticket.started is not None]
    return Cost(
        slot_epochs=sum(_epochs(data, ticket) for ticket in data.every_ticket),
        search_epochs=sum(_epochs(data, ticket) for ticket in searched),
        unpruned_epochs=sum(
            data.config.train.epochs if ticket.state is TicketState.PRUNED else _epochs(data, ticket)
            for ticket in searched
        ),
        device_seconds=sum(_device_seconds(found) for found in data.reports.values()),
        wall_seconds=max((row.stored_at for row in rows), default=0.0) - min(starts, default=0.0) if rows else 0.0,
    )


def _device_seconds(rows: Sequence[EpochRow]) -> float:
    """A trial's share of its packs' time; the epochs between two evaluations took as long, without evaluating."""
    total, before = 0.0, -1
    for row in rows:
        seconds, evaluating = row.metrics.get("seconds", 0.0), row.metrics.get("eval_seconds", 0.0)
        spent = (seconds - evaluating) * (row.epoch - before) + evaluating
        total += spent / max(1.0, row.metrics.get("slots", 1.0))
        before = row.epoch
    return total


def _epochs(data: StudyData, ticket: Ticket) -> int:
    return max((row.epoch + 1 for row in data.rows(ticket)), default=0)


def _failures(data: StudyData) -> tuple[tuple[str, tuple[int, ...]], ...]:
    failed = [ticket for ticket in data.every_ticket if ticket.state is TicketState.FAIL]
    reasons = Counter(ticket.reason or "no reason known" for ticket in failed)
    return tuple(
        (reason, tuple(_number(ticket) for ticket in failed if (ticket.reason or "no reason known") == reason))
        for reason, _ in reasons.most_common()
    )


def _number(ticket: Ticket) -> int:
    return ticket.number if ticket.trial_number is None else ticket.trial_number
