"""What reruns show: how much the base varies by itself, and whether the best trials are really better than it.

A rerun trains known hyperparameters with another seed. Those of one seed are a cohort: they see the same images in the
same order, so that their differences are paired. Seeds are other ones than the search's own, on which the candidates
were chosen: there the luck that made them the best would come again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from search.config import CONFIRM_TOP, RERUN_SEEDS, StudyConfig
from search.errors import UserInputError
from search.ledger import CONFIRM, NOISE, EpochRow, Ledger, Rerun, Ticket, TicketState
from search.statistics import (
    ALPHA,
    Comparison,
    Confirmation,
    Spread,
    compare,
    detectable_gain,
    sd_interval,
    seeds_needed,
    spread,
)
from search.weights import best_candidates, value_row

BASE = 0
"""What a rerun of the base has for its candidate."""

FEWEST_SEEDS = 2
"""One shows no spread."""

SHOWN_SEEDS = (3, 5, 8, 12, 20)
SHOWN_CANDIDATES = (1, 3)
"""For which the smallest gain is shown that a confirmation finds."""

SHOWN_GAINS = (0.005, 0.01, 0.02)
"""For which the seeds are shown that find them, unless the user names a gain."""

SD_CONFIDENCE = 0.95
"""With which the true standard deviation lies in the interval that `noise` gives."""

VALIDATION, TEST = "val", "test"
OBJECTIVE, FITNESS, CLASS_AP = "objective", "fitness", "class_ap/"


# ---- what to train ---------------------------------------------------------------------------------------------------


def rerun_seeds(config: StudyConfig, count: int) -> tuple[int, ...]:
    """The first `count` seeds of reruns; never the search's own."""
    return tuple(config.train.seed + index for index in range(1, count + 1))


def add_noise(ledger: Ledger, config: StudyConfig, seeds: int) -> tuple[Ticket, ...]:
    """Adds tickets that train the base on so many seeds, as far as there are none; those that were added."""
    if seeds == 0:
        return ()
    base, epochs = ledger.tickets(config.name)[0].params or {}, config.train.epochs
    reruns = [Rerun(candidate=BASE, seed=seed, epochs=epochs, params=base) for seed in rerun_seeds(config, seeds)]
    return ledger.add_reruns(config.name, NOISE, reruns)


def add_confirmation(ledger: Ledger, config: StudyConfig, top: int, seeds: int, epochs: int) -> tuple[Ticket, ...]:
    """Adds tickets, as far as there are none, that train the base and the best trials on so many seeds, seed by seed.

    Candidates of an earlier plan of the same length stay: who drops the losers and looks again finds winners by chance.

    Returns:
        Those that were added.

    Raises:
        UserInputError: no trial but the base is complete, or there are several objectives.
    """
    if config.objectives:
        raise UserInputError(
            f"study {config.name}: it maximises {len(config.objectives)} objectives, and a confirmation compares one; "
            "allowed: a study of one objective"
        )
    trials = ledger.tickets(config.name)
    best = [ticket.number for ticket in best_candidates(trials)[:top]]
    if not best:
        raise UserInputError(
            f"study {config.name}: none of {len(trials)} trials but the base is complete; "
            "allowed: a study with a complete trial besides its base"
        )
    known = [ticket for ticket in ledger.tickets(config.name, (CONFIRM,)) if ticket.epochs == epochs]
    chosen = dict.fromkeys([BASE, *best, *sorted({ticket.candidate or BASE for ticket in known})])
    count = max(seeds, len({ticket.seed for ticket in known}))
    params = {ticket.number: ticket.params or {} for ticket in trials}
    reruns = [
        Rerun(candidate=number, seed=seed, epochs=epochs, params=params[number])
        for seed in rerun_seeds(config, count)
        for number in chosen
    ]
    return ledger.add_reruns(config.name, CONFIRM, reruns)


def ask_confirmation(
    ledger: Ledger,
    config: StudyConfig,
    top: int | None = None,
    seeds: int | None = None,
    epochs: int | None = None,
    *,
    retry: bool = True,
) -> int:
    """Adds what a call of `confirm` asks for; the length of the confirmation that it is about.

    Without any wish it is the one that was asked for last: nothing is added, unless it ended with nothing to compare;
    then (with `retry`) what failed is tried again, since it would never say anything otherwise.

    Raises:
        UserInputError: as in `add_confirmation`.
    """
    latest = latest_confirmation(ledger, config)
    if latest is None or (top, seeds, epochs) != (None, None, None):
        length = epochs or config.train.epochs
        add_confirmation(ledger, config, top or CONFIRM_TOP, seeds or RERUN_SEEDS, length)
        return length
    if latest.is_stuck and retry:
        _try_again(ledger, config, latest)
    return latest.epochs


def _try_again(ledger: Ledger, config: StudyConfig, report: ConfirmReport) -> None:
    """Adds a ticket for each rerun that failed."""
    params = {ticket.number: ticket.params or {} for ticket in ledger.tickets(config.name)}
    failed = [
        Rerun(candidate=one.candidate, seed=one.seed, epochs=report.epochs, params=params[one.candidate])
        for one in report.failures
    ]
    ledger.add_reruns(config.name, CONFIRM, failed)


# ---- what they gave --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One rerun as far as it is."""

    candidate: int
    seed: int
    metrics: Mapping[str, float] | None
    """By split and name (`val/fitness`); None as long as it is not complete."""
    failure: str | None = None
    """Why it gave none."""


def runs_of(ledger: Ledger, config: StudyConfig, kind: str, epochs: int) -> list[Run]:
    """The reruns of one kind and length; of one that failed and was tried again the last attempt."""
    tickets = [ticket for ticket in ledger.tickets(config.name, (kind,)) if ticket.epochs == epochs]
    latest = {(ticket.seed, ticket.candidate): ticket for ticket in tickets}
    reports = ledger.all_reports(config.name, (kind,))
    return [_run(ticket, reports.get(ticket.id, ())) for ticket in latest.values()]


def _run(ticket: Ticket, rows: Sequence[EpochRow]) -> Run:
    is_complete = ticket.state is TicketState.COMPLETE
    return Run(
        candidate=ticket.candidate or BASE,
        seed=ticket.seed or 0,
        metrics=run_metrics(ticket, rows) if is_complete else None,
        failure=None if is_complete or not ticket.state.is_final else ticket.reason or "no reason known",
    )


def run_metrics(ticket: Ticket, rows: Sequence[EpochRow]) -> dict[str, float]:
    """On the validation split those of the epoch that gave the value, on the test split those of the last one."""
    row, last = value_row(ticket, rows), rows[-1] if rows else None
    own = {} if row is None else row.metrics
    found = {f"{VALIDATION}/{key}": value for key, value in own.items() if not key.startswith(f"{TEST}/")}
    if last is not None:
        found |= {key: value for key, value in last.metrics.items() if key.startswith(f"{TEST}/")}
    if ticket.value is not None:
        found[f"{VALIDATION}/{OBJECTIVE}"] = ticket.value
    return found


# ---- noise -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseReport:
    """How much the objective of the base varies from seed to seed."""

    study: str
    objective: str
    epochs: int
    asked: int
    """Reruns that there are tickets for."""
    failures: tuple[str, ...]
    """Reasons of those that failed."""
    spread: Spread | None
    """None with fewer than two values."""
    sd_low: float | None
    """The true standard deviation lies between this and `sd_high` with 95 %: few seeds say little about it."""
    sd_high: float | None
    detectable: Mapping[int, Mapping[int, float]]
    """For a number of seeds and of candidates the smallest gain that a confirmation finds with a chance of 80 %."""

    @property
    def done(self) -> int:
        """Reruns that have a value."""
        return 0 if self.spread is None else len(self.spread.values)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**asdict(self), "done": self.done, "confidence": SD_CONFIDENCE}


def noise_report(ledger: Ledger, config: StudyConfig) -> NoiseReport:
    """What the study's noise tickets show so far."""
    runs = runs_of(ledger, config, NOISE, config.train.epochs)
    values = [run.metrics[f"{VALIDATION}/{OBJECTIVE}"] for run in runs if run.metrics is not None]
    found = spread(values) if len(values) >= FEWEST_SEEDS else None
    low, high = (None, None) if found is None else sd_interval(found, SD_CONFIDENCE)
    return NoiseReport(
        study=config.name,
        objective=config.objective.describe(),
        epochs=config.train.epochs,
        asked=len(runs),
        failures=tuple(run.failure for run in runs if run.failure is not None),
        spread=found,
        sd_low=low,
        sd_high=high,
        detectable={} if found is None else detectable_gains(found.sd),
    )


def detectable_gains(sd: float) -> dict[int, dict[int, float]]:
    """By seeds and candidates, as long as pairing takes nothing out of the noise: what it does take only helps."""
    return {
        seeds: {count: detectable_gain(sd, seeds, count) for count in SHOWN_CANDIDATES} for seeds in sorted(SHOWN_SEEDS)
    }


# ---- confirmation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A trial that is confirmed."""

    number: int
    """Of its ticket."""
    trial: int
    """Number of the trial, as people know it."""
    params: Mapping[str, Any]
    search_value: float | None
    """The objective that it had in the search."""
    failure: str | None = None
    """Why a rerun of it failed; then it is not compared."""

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"trial {self.trial}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RerunFailure:
    """A rerun that gave no value, where no later attempt did either."""

    name: str
    """base, or trial N."""
    candidate: int
    seed: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """All candidates against the base by one measure."""

    split: str
    measure: str
    """objective, fitness or class_ap/INDEX."""
    result: Confirmation


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmReport:
    """What a confirmation shows so far."""

    study: str
    objective: str
    epochs: int
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    """On which base and all candidates have values."""
    asked: int
    """Reruns that there are tickets for."""
    done: int
    """Those that are complete."""
    open: int
    """Those that wait or run."""
    judgements: tuple[Judgement, ...]
    """The first one decides: the objective on the validation split. Empty with fewer than two seeds."""
    failures: tuple[RerunFailure, ...]
    """Of base and candidates. A seed on which the base failed compares nothing; a candidate is left out altogether."""
    looks: int
    """How often seeds were added after reruns on earlier ones could be looked at."""
    base_name: str
    """What the base is called: the defaults, unless the study has a base of its own."""

    @property
    def base_failures(self) -> tuple[RerunFailure, ...]:
        """Those of the base."""
        return tuple(one for one in self.failures if one.candidate == BASE)

    @property
    def is_stuck(self) -> bool:
        """Whether nothing can be compared and nothing is left to train: too much failed."""
        return self.open == 0 and not self.judgements and bool(self.failures)

    @property
    def false_winners(self) -> float:
        """Upper bound of the chance to call a candidate better at any of the looks where none is."""
        return min(1.0, (1 + self.looks) * (1 - self.confidence))

    @property
    def confidence(self) -> float:
        """With which each end of the intervals holds, for all candidates together."""
        return 1 - ALPHA if self.decisive is None else self.decisive.confidence

    @property
    def again(self) -> str:
        """The command that tries again what failed."""
        count = len(self.candidates)
        return (
            f"yolosearch confirm {self.study} --top {count} --seeds {self.asked // (count + 1)} --epochs {self.epochs}"
        )

    @property
    def is_over(self) -> bool:
        """Whether it says something that will not change by itself."""
        return self.open == 0 and bool(self.judgements)

    @property
    def decisive(self) -> Confirmation | None:
        """By what is decided, None as long as there is nothing to decide by."""
        return self.judgements[0].result if self.judgements else None

    @property
    def outcome(self) -> Confirmation | None:
        """The same, None as long as it may still change by itself."""
        return self.decisive if self.is_over else None

    @property
    def trials(self) -> dict[str, int]:
        """The trial of each candidate, by what tables call it."""
        return {one.name: one.trial for one in self.candidates}

    @property
    def winner(self) -> Candidate | None:
        """The candidate that is better than the base; of several the one with the largest gain."""
        best = None if self.decisive is None else self.decisive.winner
        return None if best is None else next(one for one in self.candidates if one.name == best.candidate)

    def comparison(self, number: int, split: str = VALIDATION) -> Comparison | None:
        """How a candidate (by its ticket's number) did by the objective on a split."""
        name = next((one.name for one in self.candidates if one.number == number), None)
        found = [one.result for one in self.judgements if one.split == split][:1]
        return next((entry for result in found for entry in result.comparisons if entry.candidate == name), None)

    def seeds_for(self, gains: Iterable[float]) -> dict[float, int | None]:
        """How many seeds find a true gain with a chance of 80 %, at the noise that was measured; None: far too many."""
        if self.decisive is None:
            return {}
        noise, count = self.decisive.noise, len(self.decisive.comparisons)
        return {gain: seeds_needed(gain, noise, count) for gain in gains}

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        winner = self.winner
        return {
            **asdict(self),
            "is_over": self.is_over,
            "confidence": self.confidence,
            "false_winners_at_most": self.false_winners,
            "base_failures": [asdict(one) for one in self.base_failures],
            "winner": None if winner is None else winner.trial,
            "verdict": self.verdict(),
            "detectable_gain": None if self.decisive is None else _detectable(self.decisive),
            "seeds_needed": {f"{gain:g}": seeds for gain, seeds in self.seeds_for(SHOWN_GAINS).items()},
        }

    def verdict(self) -> str:
        """The outcome in one line."""
        if self.decisive is None:
            return self._nothing_to_compare()
        so_far = "" if self.is_over else f", so far ({self.done} of {self.asked} reruns are complete)"
        lost = [str(one.seed) for one in self.base_failures]
        left_out = f"; seed {', '.join(lost)} left out, where the base failed" if lost else ""
        winner = self.winner
        if winner is None:
            count = len(self.decisive.comparisons)
            who = "the candidate is not" if count == 1 else f"none of {count} candidates is"
            over = f"over {len(self.seeds)} seeds{so_far}{left_out}"
            return f"keep {self.base_name}: {who} shown to be better than the base {over}"
        gain = self.comparison(winner.number)
        assert gain is not None
        return f"{winner.name} is better than the base: {gain_in_words(gain, self)}{so_far}{left_out}"

    def _nothing_to_compare(self) -> str:
        if not self.is_stuck:
            return f"nothing to compare yet: {self.done} of {self.asked} reruns are complete"
        first = self.base_failures[0] if self.base_failures else self.failures[0]
        seeds = [str(one.seed) for one in self.failures if one.candidate == first.candidate]
        return (
            f"no verdict: {len(self.failures)} of {self.asked} reruns failed, {first.name} on seed {', '.join(seeds)} "
            f"({first.reason}); `yolosearch confirm {self.study}` trains them again"
        )

    def looks_in_words(self) -> str | None:
        """What it means that seeds were added after a look; None where that was not so."""
        if self.looks == 0:
            return None
        times = "once" if self.looks == 1 else f"{self.looks} times"
        return (
            f"seeds were added {times} after a look at the results: the chance of a false winner is at most "
            f"{percent(self.false_winners)}, not {percent(1 - self.confidence)}"
        )


def gain_in_words(gain: Comparison, report: ConfirmReport) -> str:
    """A candidate's gain with its interval, its level, p-value, and what they rest on."""
    count = len(report.decisive.comparisons) if report.decisive is not None else 1
    corrected = f", corrected for {count} candidates" if count > 1 else ""
    return (
        f"gain {gain.gain:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}), each end with {percent(report.confidence)}, "
        f"p = {gain.p_value:.2g}, {len(report.seeds)} paired seeds of {report.epochs} epochs{corrected}"
    )


def percent(share: float) -> str:
    """A share as people read it."""
    return f"{100 * share:.0f} %"


def _detectable(result: Confirmation) -> float:
    return detectable_gain(result.noise, result.seeds, len(result.comparisons))


def confirm_report(ledger: Ledger, config: StudyConfig, epochs: int) -> ConfirmReport:
    """What the study's confirmation of one length shows so far."""
    tickets = [ticket for ticket in ledger.tickets(config.name, (CONFIRM,)) if ticket.epochs == epochs]
    runs = runs_of(ledger, config, CONFIRM, epochs)
    trials = {ticket.number: ticket for ticket in ledger.tickets(config.name)}
    numbers = sorted({run.candidate for run in runs} - {BASE}, key=lambda number: -(trials[number].value or 0.0))
    failures = {run.candidate: run.failure for run in runs if run.failure is not None}
    candidates = tuple(_candidate(trials[number], failures.get(number)) for number in numbers)
    names = {one.number: one.name for one in candidates if one.failure is None}
    return ConfirmReport(
        study=config.name,
        objective=config.objective.describe(),
        epochs=epochs,
        candidates=candidates,
        seeds=complete_seeds(runs, names),
        asked=len(runs),
        done=sum(run.metrics is not None for run in runs),
        open=sum(run.metrics is None and run.failure is None for run in runs),
        judgements=judge(runs, names, decides_by_fitness=config.objective.weights == {FITNESS: 1.0}),
        failures=tuple(_failures(runs, {BASE: "base", **{one.number: one.name for one in candidates}})),
        looks=looks_of(tickets),
        base_name=config.base_name,
    )


def _failures(runs: Iterable[Run], names: Mapping[int, str]) -> Iterator[RerunFailure]:
    for run in runs:
        if run.failure is not None:
            yield RerunFailure(name=names[run.candidate], candidate=run.candidate, seed=run.seed, reason=run.failure)


def looks_of(tickets: Sequence[Ticket]) -> int:
    """How often seeds were added to reruns of one length that had given two of them a value by then."""
    first: dict[int | None, float] = {}
    for ticket in tickets:
        first.setdefault(ticket.seed, ticket.created)
    complete = [ticket for ticket in tickets if ticket.state is TicketState.COMPLETE and ticket.finished is not None]
    return sum(
        len({ticket.seed for ticket in complete if (ticket.finished or 0.0) <= added}) >= FEWEST_SEEDS
        for added in set(first.values())
        if added > min(first.values())
    )


def _candidate(trial: Ticket, failure: str | None) -> Candidate:
    number = trial.number if trial.trial_number is None else trial.trial_number
    return Candidate(
        number=trial.number, trial=number, params=trial.params or {}, search_value=trial.value, failure=failure
    )


def latest_confirmation(ledger: Ledger, config: StudyConfig) -> ConfirmReport | None:
    """The confirmation that was asked for last; None if there is none."""
    tickets = ledger.tickets(config.name, (CONFIRM,))
    epochs = tickets[-1].epochs if tickets else None
    return None if epochs is None else confirm_report(ledger, config, epochs)


def complete_seeds(runs: Iterable[Run], names: Iterable[int]) -> tuple[int, ...]:
    """The seeds on which the base and all these candidates have values."""
    having: dict[int, set[int]] = {}
    for run in runs:
        if run.metrics is not None:
            having.setdefault(run.seed, set()).add(run.candidate)
    needed = {BASE, *names}
    return tuple(sorted(seed for seed, found in having.items() if found >= needed))


def judge(runs: Sequence[Run], names: Mapping[int, str], *, decides_by_fitness: bool = False) -> tuple[Judgement, ...]:
    """Compares candidates with the base by every measure that all of them have.

    Args:
        runs: All reruns of one length.
        names: What the candidates are called, by number; those that are to be compared.
        decides_by_fitness: The objective is the fitness, which need not be shown twice.

    Returns:
        First the objective on the validation split, then the other measures, then all on the test split; nothing with
        fewer than two complete seeds or no candidate.
    """
    seeds = complete_seeds(runs, names)
    if len(seeds) < FEWEST_SEEDS or not names:
        return ()
    table = {(run.candidate, run.seed): run.metrics for run in runs if run.metrics is not None}
    used = [table[number, seed] for number in (BASE, *names) for seed in seeds]
    judgements = []
    for split, measure in _measures(used, decides_by_fitness):
        key = f"{split}/{measure}"
        values = {number: [table[number, seed][key] for seed in seeds] for number in (BASE, *names)}
        result = compare(values[BASE], {name: values[number] for number, name in names.items()})
        judgements.append(Judgement(split=split, measure=measure, result=result))
    return tuple(judgements)


def _measures(used: Sequence[Mapping[str, float]], decides_by_fitness: bool) -> list[tuple[str, str]]:
    """Split and name of what every run has."""
    classes = sorted(
        {key.partition("/")[2] for metrics in used for key in metrics if f"/{CLASS_AP}" in key},
        key=lambda key: int(key.removeprefix(CLASS_AP)),
    )
    shown = [OBJECTIVE, *([] if decides_by_fitness else [FITNESS]), *classes]
    pairs = [(split, measure) for split in (VALIDATION, TEST) for measure in shown]
    return [pair for pair in pairs if all("/".join(pair) in metrics for metrics in used)]


# ---- for MLflow ------------------------------------------------------------------------------------------------------


def summary_metrics(report: NoiseReport | ConfirmReport) -> dict[str, float]:
    """What a report says, as metrics of the study's summary run."""
    if isinstance(report, NoiseReport):
        if report.spread is None:
            return {}
        gains = {f"noise/detectable_gain_{seeds}_seeds": gain[1] for seeds, gain in report.detectable.items()}
        return {"noise/mean": report.spread.mean, "noise/sd": report.spread.sd, **gains}
    found = {} if report.decisive is None else {"confirm/noise": report.decisive.noise}
    for split in (VALIDATION, TEST):
        for one in report.candidates:
            gain = report.comparison(one.number, split)
            if gain is not None:
                where = f"confirm/{split}/trial_{one.trial}"
                found |= {f"{where}/gain": gain.gain, f"{where}/low": gain.low, f"{where}/p_value": gain.p_value}
    return found
