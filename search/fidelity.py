"""The first fidelity: a cheap training with frozen layers, and how well it foretells the full one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from search.config import StudyConfig
from search.ledger import SEARCH, Ticket, TicketState
from search.settings import FidelityConfig

if TYPE_CHECKING:
    from yolocore.training.config import TrainConfig

FEWEST_PAIRS = 3
"""A rank correlation of fewer pairs says nothing."""


def in_fidelity(config: StudyConfig, ticket: Ticket) -> bool:
    """Whether a trial still has the cheap training before it."""
    return config.fidelity is not None and ticket.kind == SEARCH and not ticket.promoted


def fidelity_train_config(config: StudyConfig, train: TrainConfig) -> TrainConfig | None:
    """How the cheap training differs from the full one; None if the study has none."""
    fidelity = config.fidelity
    if fidelity is None:
        return None
    every = min(train.eval_every, fidelity.epochs)
    freeze_bn = fidelity.freeze_bn or train.freeze_bn
    return replace(
        train, freeze=fidelity.freeze, freeze_bn=freeze_bn, epochs=fidelity.epochs, eval_every=every, patience=0
    )


def is_promoted(value: float | None, values: Iterable[float], reduction_factor: int) -> bool:
    """Whether a value is among the best 1/reduction_factor, as asynchronous successive halving asks.

    Args:
        value: Of the trial in question; None if it was not finite.
        values: Of all trials that have one by now, this one included. The first few compete for one place.
        reduction_factor: At least 2.
    """
    ranked = sorted(values, reverse=True)
    if value is None or not ranked:
        return False
    return value >= ranked[max(len(ranked) // reduction_factor, 1) - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityStatus:
    """What the first fidelity of a study has done so far."""

    valued: int
    """Trials that have its value."""
    epochs: int
    """Epochs that they trained in it together; no part of the study's `slot_epochs`."""
    promoted: int
    """Of these, those that went on to the full training."""
    pairs: int
    """Of these, those that are complete: they have both values."""
    correlation: float | None
    """Spearman's rank correlation of the two values over the pairs; None for fewer than three, or without a spread."""

    @classmethod
    def of(cls, tickets: Sequence[Ticket], fidelity: FidelityConfig) -> FidelityStatus:
        """Sums up a study's tickets."""
        valued = [ticket for ticket in tickets if ticket.fidelity_value is not None]
        pairs = value_pairs(valued)
        return cls(
            valued=len(valued),
            epochs=len(valued) * fidelity.epochs,
            promoted=sum(bool(ticket.promoted) for ticket in valued),
            pairs=len(pairs),
            correlation=spearman(pairs),
        )

    def line(self) -> str:
        """For people."""
        parts = [f"fidelity: {self.valued} trials ({self.epochs} epochs), {self.promoted} promoted"]
        if self.correlation is not None:
            parts.append(f"rank correlation with the full training {self.correlation:.2f} over {self.pairs} trials")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def value_pairs(tickets: Iterable[Ticket], until: float = float("inf")) -> list[tuple[float, float]]:
    """(fidelity value, final value) of the complete trials that ended by a time, UTC epoch seconds."""
    return [
        (ticket.fidelity_value, ticket.value)
        for ticket in tickets
        if ticket.state is TicketState.COMPLETE
        and ticket.kind == SEARCH
        and ticket.fidelity_value is not None
        and ticket.value is not None
        and (ticket.finished or 0.0) <= until
    ]


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation; equal values share the mean of their ranks. None for too few pairs, or without a spread."""
    if len(pairs) < FEWEST_PAIRS:
        return None
    first, second = (_centred_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    spread = (sum(a * a for a in first) * sum(b * b for b in second)) ** 0.5
    return sum(a * b for a, b in zip(first, second, strict=True)) / spread if spread else None


def _centred_ranks(values: Sequence[float]) -> list[float]:
    below = [sum(other < value for other in values) for value in values]
    equal = [values.count(value) for value in values]
    middle = (len(values) - 1) / 2
    return [less + (same - 1) / 2 - middle for less, same in zip(below, equal, strict=True)]
