"""Which trials no other one beats."""

import random

from search.pareto import non_dominated


def test_non_dominated_keeps_those_that_nobody_covers() -> None:
    values = [(0.5, 0.1), (0.4, 0.4), (0.3, 0.3), (0.1, 0.9), (0.5, 0.05)]

    assert non_dominated(values) == [0, 1, 3]


def test_non_dominated_of_equals_the_earliest() -> None:
    assert non_dominated([(0.2, 0.2), (0.2, 0.2), (0.1, 0.2)]) == [0]


def test_non_dominated_of_none_and_one() -> None:
    assert non_dominated([]) == []
    assert non_dominated([(0.0, 0.0, 0.0)]) == [0]


def test_non_dominated_agrees_with_the_definition() -> None:
    draw = random.Random(0)
    for _ in range(50):
        values = [tuple(draw.choice((0.0, 0.1, 0.2, 0.3, 0.4)) for _ in range(3)) for _ in range(30)]
        beaten = {
            index
            for index, mine in enumerate(values)
            for other, theirs in enumerate(values)
            if all(a >= b for a, b in zip(theirs, mine, strict=True)) and (theirs != mine or other < index)
        }
        assert set(non_dominated(values)) == set(range(30)) - beaten
