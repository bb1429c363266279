"""Several objectives at once: which trials no other one beats."""

from __future__ import annotations

from collections.abc import Sequence


def non_dominated(values: Sequence[Sequence[float]]) -> list[int]:
    """The Pareto front, all objectives maximised.

    Args:
        values: of each trial its objectives.

    Returns:
        Indices of the trials that no other one equals or exceeds in every objective, by the first objective from the
        highest down. Of equals only the earliest is among them.
    """
    # Nothing can dominate what comes before it in this order.
    order = sorted(range(len(values)), key=lambda index: ([-value for value in values[index]], index))
    front: list[int] = []
    for index in order:
        if not any(_covers(values[other], values[index]) for other in front):
            front.append(index)
    return front


def _covers(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(mine >= theirs for mine, theirs in zip(first, second, strict=True))
