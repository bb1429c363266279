"""What a study will cost, when it will be done, and whether shorter trainings would have ranked its trials alike.

Everything here is a function of plain data: curves, budgets, seconds. Nothing reads a database or a clock.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from search.config import CONFIRM_TOP, RERUN_SEEDS, StudyConfig
from search.settings import AshaPruner, HyperbandPruner, MedianPruner, NonePruner, PrunerConfig

ENOUGH_TRIALS = 8
"""Fewer trials that ran to the end say nothing about ranks: their interval would reach from none to perfect."""

GOOD_AGREEMENT = 0.9
"""Rank correlation from which on a shorter training counts as ranking trials like the full one."""

LISTED_EPOCHS = 25
DRAWS = 1000
"""Bootstrap samples; fewer among thousands of trials, where the interval is narrow anyway."""

REPETITIONS = 200
"""Simulated studies of 100 trials; fewer of larger ones, whose cost varies less."""

START_SECONDS = 60.0
"""What a worker may take before its first epoch begins; a longer silence is time in which nobody worked."""

RECENT_EPOCHS = 5
"""A worker's speed is that of its last few epochs: packs grow, shrink and share their machine."""


# ---- short against full ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How the trials stood after some epochs, compared with the end."""

    epochs: int
    """Epochs done, counted from 1."""
    correlation: float | None
    """Spearman's rank correlation with the values at the end; None where all are equal."""
    low: float | None
    """Lower end of its 95 % bootstrap interval over trials; None where there are too few."""
    high: float | None
    regret: float
    """What choosing the best of this epoch loses: the best final value minus that trial's final value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortAgainstFull:
    """Whether fewer epochs per trial would have ranked the trials as the full number does."""

    trials: int
    """Those that ran to the end, whose curves these are."""
    epochs: int
    """The full number."""
    agreements: tuple[Agreement, ...]
    """By epochs, the last epoch left out."""

    @property
    def is_enough(self) -> bool:
        """Whether there are trials enough to say anything."""
        return self.trials >= ENOUGH_TRIALS and bool(self.agreements)

    @property
    def enough_epochs(self) -> int | None:
        """The fewest epochs from which on the ranks agree well with the end's; None: no shorter training's do."""
        found = None
        for agreement in reversed(self.agreements):
            if agreement.correlation is None or agreement.correlation < GOOD_AGREEMENT:
                break
            found = agreement.epochs
        return found if self.is_enough else None

    def line(self) -> str:
        """The answer to "how many epochs per trial?" in one line."""
        ran = f"{self.trials} trial{'' if self.trials == 1 else 's'} ran to the end"
        if not self.is_enough:
            return f"{ran}, too few to say what shorter trainings would have shown (at least {ENOUGH_TRIALS})"
        first = self.enough_epochs
        shown = self.agreements[-1] if first is None else next(a for a in self.agreements if a.epochs == first)
        what = f"after {shown.epochs} of {self.epochs} epochs their ranks agree {_correlation(shown)} with the end's"
        if first is None:
            return f"{ran}: {what}, so no shorter training would do (at least {GOOD_AGREEMENT:g})"
        return f"{ran}: {what}, and choosing there loses {shown.regret:.4f}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        rows = [
            {"epochs": a.epochs, "correlation": a.correlation, "low": a.low, "high": a.high, "regret": a.regret}
            for a in self.agreements
        ]
        return {"trials": self.trials, "epochs": self.epochs, "enough_epochs": self.enough_epochs, "by_epoch": rows}


def _correlation(agreement: Agreement) -> str:
    if agreement.correlation is None:
        return "not at all"
    if agreement.low is None or agreement.high is None:
        return f"{agreement.correlation:.2f}"
    return f"{agreement.correlation:.2f} ({agreement.low:.2f} to {agreement.high:.2f})"


def short_against_full(curves: Sequence[Mapping[int, float | None]], epochs: int, *, best: bool) -> ShortAgainstFull:
    """Compares every evaluated epoch with the last one.

    Args:
        curves: Of each trial the objective by epochs done, counted from 1. Those that did not run to the end, or have a
            value that is not finite, are left out.
        epochs: The full number.
        best: Whether a trial counts with its best epoch so far, not with its last.
    """
    full = [curve for curve in curves if curve.get(epochs) is not None]
    grid = sorted(set.intersection(*(set(curve) for curve in full))) if full else []
    rows = [[curve[epoch] for epoch in grid] for curve in full]
    finite = [row for row in rows if None not in row]
    values = np.array(finite, dtype=np.float64).reshape(len(finite), len(grid))
    if best and values.size:
        values = np.maximum.accumulate(values, axis=1)
    listed = _spread_out(len(grid) - 1)
    agreements = tuple(_agreement(grid[index], values[:, index], values[:, -1]) for index in listed if len(values))
    return ShortAgainstFull(trials=len(values), epochs=epochs, agreements=agreements)


def _spread_out(count: int) -> list[int]:
    """At most `LISTED_EPOCHS` of the indices 0 to count - 1, the first and the last among them."""
    if count < 1:
        return []
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, LISTED_EPOCHS))})


def _agreement(epochs: int, early: NDArray[np.float64], final: NDArray[np.float64]) -> Agreement:
    found = rank_correlation(early[None], final[None])[0]
    low, high = bootstrap_interval(early, final) if len(final) >= ENOUGH_TRIALS else (None, None)
    regret = float(final.max() - final[int(early.argmax())])
    correlation = None if math.isnan(found) else float(found)
    return Agreement(epochs=epochs, correlation=correlation, low=low, high=high, regret=regret)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spearman's correlation of each row, ties sharing their mean rank.

    Args:
        first: [R, n].
        second: [R, n].

    Returns:
        [R]; NaN where all values of a row are equal.
    """
    from scipy import stats  # a second of imports, which commands that print no ranks need not wait for

    ranks = [stats.rankdata(values, axis=1) - (values.shape[1] + 1) / 2 for values in (first, second)]
    product = (ranks[0] * ranks[1]).sum(axis=1)
    sizes = [(centred**2).sum(axis=1) for centred in ranks]
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = product / np.sqrt(sizes[0] * sizes[1])
    return found


def bootstrap_interval(
    early: NDArray[np.float64], final: NDArray[np.float64]
) -> tuple[float, float] | tuple[None, None]:
    """The 95 % percentile interval of the rank correlation over resampled trials; the same in every call."""
    count = len(final)
    draws = max(200, min(DRAWS, 200_000 // count))
    chosen = np.random.default_rng(0).integers(0, count, size=(draws, count))
    found = rank_correlation(early[chosen], final[chosen])
    found = found[~np.isnan(found)]
    if not len(found):
        return None, None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


# ---- cost ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a budget of trials amounts to. A slot-epoch is one epoch of one trial, alone or in a pack."""

    epochs: int
    """Of a full training."""
    expected: float
    """Slot-epochs if the first rung already shows how trials will rank; real pruning stops some later."""
    most: int
    """Slot-epochs if nothing is pruned."""
    pruner: str
    is_known: bool = True
    """Whether it can be said what the pruner will stop; if not, nothing is taken off for it."""
    cheap: int = 0
    """Epochs of cheap trainings before the full ones; not in `expected` and `most`."""
    promoted: int | None = None
    """Trials that go on from the cheap training, where there is one."""
    reruns: int = 0
    """Full trainings of the base that measure the noise; not in `expected` and `most` either."""
    confirmation: int = 0
    """Full trainings of a confirmation afterwards, which nobody has to ask for; in none of the sums."""

    @property
    def slot_epochs(self) -> float:
        """All that is expected, reruns and cheap trainings included."""
        return self.expected + self.cheap + self.reruns * self.epochs

    @property
    def trainings(self) -> float:
        """The expected cost in full trainings."""
        return self.expected / self.epochs

    def text(self) -> str:
        """The cost in words."""
        parts = [self._full_text()]
        if self.promoted is not None:
            parts.append(f"for {self.promoted} trials that go on after {self.cheap} cheap slot-epochs")
        if self.reruns:
            parts.append(f"and {self.reruns} trainings for the noise")
        return ", ".join(parts)

    def _full_text(self) -> str:
        if self.expected == self.most and self.is_known:
            return f"{self.trainings:.0f} trainings ({self.most} slot-epochs)"
        if not self.is_known:
            of = f"{self.expected:.0f} slot-epochs"
            return f"at most {self.trainings:.0f} trainings ({of}), less what {self.pruner} stops"
        of = f"{self.expected:.0f} of at most {self.most} slot-epochs"
        return f"about {self.trainings:.1f} trainings ({of}, if {self.pruner} knows the good ones at its first rung)"


@lru_cache(maxsize=64)
def expected_cost(pruner: PrunerConfig, trials: int, epochs: int, eval_every: int = 1) -> Cost:
    """The cost of a budget under a pruner.

    The pruner's own rule is applied to trials of random quality that arrive one after the other and rank at every epoch
    as they will in the end. Of patient and threshold, which look at a single curve, nothing can be said before.

    Args:
        pruner: With its `min_epochs` filled in.
        trials: How many, the base included, which is never stopped.
        epochs: Of a full training.
        eval_every: Pruning decides at multiples of this.
    """
    most = trials * epochs
    if not isinstance(pruner, MedianPruner | AshaPruner | HyperbandPruner):
        is_known = isinstance(pruner, NonePruner)
        return Cost(epochs=epochs, expected=most, most=most, pruner=pruner.name, is_known=is_known)
    randoms = random.Random(0)
    repetitions = max(10, min(REPETITIONS, 100 * REPETITIONS // trials))
    total = sum(sum(simulated_lengths(pruner, trials, epochs, eval_every, randoms)) for _ in range(repetitions))
    return Cost(epochs=epochs, expected=total / repetitions, most=most, pruner=pruner.name)


def study_cost(config: StudyConfig) -> Cost:
    """The cost of a study: with a fidelity of those that will be promoted, and the cheap trainings beside it."""
    fidelity, epochs, every = config.fidelity, config.train.epochs, config.train.eval_every
    noise, confirmation = config.noise.seeds, _confirmation(config)
    if fidelity is None:
        alone = expected_cost(config.pruner, config.trials, epochs, every)
        return replace(alone, reruns=noise, confirmation=confirmation)
    promoted = 1 + math.ceil((config.trials - 1) / fidelity.reduction_factor)
    full = expected_cost(config.pruner, promoted, epochs, every)
    cheap = config.trials * fidelity.epochs
    return replace(full, cheap=cheap, promoted=promoted, reruns=noise, confirmation=confirmation)


def _confirmation(config: StudyConfig) -> int:
    """Trainings of `confirm` as it is usually called: base and best trials on every seed; it compares one objective."""
    candidates = min(CONFIRM_TOP, config.trials - 1)
    return 0 if config.objectives or candidates < 1 else (1 + candidates) * RERUN_SEEDS


def simulated_lengths(
    pruner: MedianPruner | AshaPruner | HyperbandPruner, trials: int, epochs: int, eval_every: int, draw: random.Random
) -> list[int]:
    """Epochs of each trial in one simulated study."""
    first = pruner.min_epochs or 1
    rule: Rule
    match pruner:
        case MedianPruner():
            rule = _Median(pruner.n_startup_trials, pruner.n_min_trials, first)
        case AshaPruner():
            rule = _Halving(rung_epochs(first, pruner.reduction_factor, epochs), pruner.reduction_factor)
        case HyperbandPruner():
            rule = _Hyperband(first, pruner.reduction_factor, epochs, draw)
    lengths = []
    for index in range(trials):
        quality = draw.random()
        length = math.ceil(rule.length(quality, epochs) / eval_every) * eval_every
        is_full = index == 0 or length >= epochs
        lengths.append(epochs if is_full else length)
        if is_full:
            rule.completed(quality)
    return lengths


def rung_epochs(first: int, factor: int, epochs: int) -> tuple[int, ...]:
    """Where successive halving decides: first, times factor, times this again, ... below the full number."""
    rungs = []
    while first < epochs:
        rungs.append(first)
        first *= factor
    return tuple(rungs)


class Rule(Protocol):
    """A pruner's rule for trials whose quality shows at once."""

    def length(self, quality: float, epochs: int) -> int:
        """Epochs that the next trial gets."""

    def completed(self, quality: float) -> None:
        """Takes note of a trial that ran to its end."""


class _Median:
    def __init__(self, startup: int, least: int, first: int) -> None:
        self._least = max(startup, least, 1)
        self._first = first
        self._complete: list[float] = []

    def length(self, quality: float, epochs: int) -> int:
        count = len(self._complete)
        if count < self._least:
            return epochs
        middle = (self._complete[(count - 1) // 2] + self._complete[count // 2]) / 2
        return epochs if quality >= middle else self._first

    def completed(self, quality: float) -> None:
        bisect.insort(self._complete, quality)


class _Halving:
    def __init__(self, rungs: Sequence[int], factor: int) -> None:
        self._factor = factor
        self._rungs: list[tuple[int, list[float]]] = [(rung, []) for rung in rungs]

    def length(self, quality: float, epochs: int) -> int:
        for rung, rivals in self._rungs:
            bisect.insort(rivals, quality)
            # As in Optuna: with fewer than `factor` rivals the best so far goes on.
            promoted = max(1, len(rivals) // self._factor)
            if quality < rivals[-promoted]:
                return rung
        return epochs

    def completed(self, quality: float) -> None:
        pass


class _Hyperband:
    """Trials are dealt out to brackets at random, in the proportions that Optuna uses."""

    def __init__(self, first: int, factor: int, epochs: int, draw: random.Random) -> None:
        count = int(math.log(epochs / first, factor) + 1e-9) + 1
        self._draw = draw
        self._brackets = [
            _Halving(rung_epochs(first * factor**index, factor, epochs), factor) for index in range(count)
        ]
        self._weights = [math.ceil(count * factor ** (count - 1 - index) / (count - index)) for index in range(count)]

    def length(self, quality: float, epochs: int) -> int:
        bracket = self._draw.choices(self._brackets, self._weights)[0]
        return bracket.length(quality, epochs)

    def completed(self, quality: float) -> None:
        pass


# ---- speed and time --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast one worker trains."""

    seconds: float
    """Per slot-epoch, evaluation included: a pack's epoch divided by its slots."""
    slots: int
    """Trials in such a pack."""
    source: str
    """Where this is known from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What `check` says before a launch."""

    cost: Cost
    speed: Speed | None

    @property
    def seconds(self) -> float | None:
        """With one worker; None where no speed is known. A cheap epoch takes no longer than a full one."""
        return None if self.speed is None else self.cost.slot_epochs * self.speed.seconds

    def rows(self, now: datetime) -> list[tuple[str, str]]:
        """The forecast as name and text."""
        rows = [("cost", self.cost.text()), ("time", self._time(now))]
        return [*rows, ("then confirm", self._confirmation())] if self.cost.confirmation else rows

    @property
    def confirmation_seconds(self) -> float | None:
        """What a confirmation afterwards takes with one worker; None where no speed is known."""
        if self.speed is None:
            return None
        return self.cost.confirmation * self.cost.epochs * self.speed.seconds

    def _confirmation(self) -> str:
        seconds, candidates = self.confirmation_seconds, self.cost.confirmation // RERUN_SEEDS - 1
        time = "" if seconds is None else f", about {hours(seconds)} with one worker"
        call = f"`yolosearch confirm STUDY --top {candidates} --seeds {RERUN_SEEDS}`"
        return f"{self.cost.confirmation} more trainings for {call}{time}"

    def _time(self, now: datetime) -> str:
        if self.speed is None or self.seconds is None:
            return "unknown: no earlier study has trained this here; `yolosearch check --measure` measures it"
        done = datetime.fromtimestamp(now.timestamp() + self.seconds, now.tzinfo)
        packs = f"{self.speed.seconds:.2g} s per slot-epoch in packs of {self.speed.slots}"
        least = "about" if self.cost.is_known and not self.cost.cheap else "at most"
        return (
            f"{least} {hours(self.seconds)} with one worker ({packs}, {self.speed.source}); started now, it is done "
            f"{done:%a %Y-%m-%d %H:%M %Z}".rstrip()
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        speed = None if self.speed is None else {name: getattr(self.speed, name) for name in Speed.__dataclass_fields__}
        return {
            "trainings": self.cost.trainings,
            "slot_epochs": self.cost.expected,
            "slot_epochs_at_most": self.cost.most,
            "cheap_slot_epochs": self.cost.cheap,
            "noise_trainings": self.cost.reruns,
            "confirmation_trainings": self.cost.confirmation,
            "confirmation_seconds_with_one_worker": self.confirmation_seconds,
            "pruning_is_known": self.cost.is_known,
            "speed": speed,
            "seconds_with_one_worker": self.seconds,
        }


def hours(seconds: float) -> str:
    """A time in hours, or in minutes where it is short."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1.0, seconds / 60):.0f} min"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What the ledger knows of one trial's time, for the forecast of a study that runs."""

    state: str
    worker: str | None
    started: float | None
    """UTC epoch seconds, as all times here."""
    done: int
    """Evaluated epochs that are stored."""
    moments: tuple[tuple[int, float], ...]
    """Attempt and time of each of them, in order."""

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("WAITING", "RUNNING")


def remaining_epochs(spans: Sequence[Span], epochs: int, typical: float | None = None) -> float:
    """Evaluated epochs that open trials will still take: of those that ended, the mean of the longer ones.

    Args:
        spans: All trials.
        epochs: Evaluated epochs of a full training.
        typical: What a trial takes as long as none has ended; by default the full number.
    """
    ended = sorted(span.done for span in spans if not span.is_open and span.state != "FAIL")
    return sum(max(0.0, _length(ended, span.done, epochs, typical) - span.done) for span in spans if span.is_open)


def _length(ended: Sequence[int], done: int, epochs: int, typical: float | None) -> float:
    """What a trial takes that has so many epochs behind it."""
    longer = ended[bisect.bisect_left(ended, max(done, 1)) :] if done else ended
    if longer:
        return sum(longer) / len(longer)
    return float(epochs) if typical is None or typical < done else typical


def seconds_left(
    spans: Sequence[Span], live_workers: Iterable[str], epochs: int, typical: float | None = None
) -> float | None:
    """Seconds until no trial is open: at the speed of the workers that train now, else at the pace so far.

    Args:
        spans: All trials.
        live_workers: Names of the workers that were heard of lately.
        epochs: Evaluated epochs of a full training.
        typical: As in `remaining_epochs`.
    """
    left = remaining_epochs(spans, epochs, typical)
    rate = workers_rate(spans, live_workers)
    if rate is not None:
        return left / rate
    done = sum(span.done for span in spans)
    return left * busy_seconds(spans) / done if done and any(not span.is_open for span in spans) else None


def workers_rate(spans: Sequence[Span], live_workers: Iterable[str]) -> float | None:
    """Slot-epochs per second of the workers that hold trials; None as long as none of them has two reports.

    A worker's trials share its pack's epochs, so that it makes as many slot-epochs in an epoch's time.
    """
    live = set(live_workers)
    held: dict[str, list[Span]] = {}
    for span in spans:
        if span.state == "RUNNING" and span.worker in live:
            held.setdefault(str(span.worker), []).append(span)
    paces = [(len(trials), _epoch_seconds(trials)) for trials in held.values()]
    known = [count / seconds for count, seconds in paces if seconds]
    # One that has not reported twice is as fast as the others.
    return sum(known) * len(paces) / len(known) if known else None


def _epoch_seconds(trials: Sequence[Span]) -> float | None:
    """Time between a worker's latest reports of one trial."""
    gaps = [
        later - earlier
        for trial in trials
        for (before, earlier), (after, later) in list(pairwise(trial.moments))[-RECENT_EPOCHS:]
        if before == after and later > earlier
    ]
    return sum(gaps) / len(gaps) if gaps else None


def busy_seconds(spans: Sequence[Span]) -> float:
    """How long anybody has trained: between reports, without the time in which nobody worked on the study."""
    started = [span.started for span in spans if span.started is not None]
    moments = sorted([*started, *(moment for span in spans for _, moment in span.moments)])
    # Within an attempt nobody was idle; a first epoch may take as long again, and some start.
    paces = [
        later - earlier
        for span in spans
        for (before, earlier), (after, later) in pairwise(span.moments)
        if before == after
    ]
    longest = max(paces, default=0.0)
    idle = 2 * longest + START_SECONDS
    return sum(gap if gap <= idle else longest for gap in (later - earlier for earlier, later in pairwise(moments)))
