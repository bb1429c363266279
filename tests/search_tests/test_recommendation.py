"""Which trial a study recommends."""

from collections.abc import Callable
from pathlib import Path

import pytest
from made_up import confirm_made_up, data_of, made_up_study
from tiny import TinyStudy

from search.confirm import add_confirmation
from search.export import best_trial
from search.ledger import TicketState
from search.recommendation import Recommendation, recommended
from search.review import findings

COMPLETE, FAIL = TicketState.COMPLETE, TicketState.FAIL
Make = Callable[..., TinyStudy]


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return lambda *fates: made_up_study(tmp_path / "study", tmp_path_factory.getbasetemp(), fates)


def found(study: TinyStudy) -> Recommendation:
    """What the study recommends; export and review say the same."""
    recommendation = recommended(study.ledger, study.config)
    assert recommendation is not None
    assert data_of(study).recommendation == recommendation
    assert best_trial(study.ledger, study.config).ticket == recommendation.ticket.number
    return recommendation


def test_recommended_without_a_complete_trial_is_none(make: Make) -> None:
    study = make((FAIL, 0.4))
    assert recommended(study.ledger, study.config) is None


def test_recommended_without_a_finished_confirmation_is_the_best_single_run(make: Make) -> None:
    study = make((COMPLETE, 0.4), (COMPLETE, 0.45), (COMPLETE, 0.6))
    add_confirmation(study.ledger, study.config, top=2, seeds=2, epochs=4)

    best = found(study)

    assert (best.trial, best.standing, best.is_decided) == (2, "unconfirmed", False)


def test_recommended_where_nothing_beat_the_base_is_the_base(make: Make) -> None:
    best = found(make((COMPLETE, 0.4), (COMPLETE, 0.4)))

    assert (best.trial, best.standing, best.is_decided) == (0, "keep", False)


def test_recommended_after_a_confirmation_is_its_winner_not_the_best_single_run(make: Make) -> None:
    study = make((COMPLETE, 0.4), (COMPLETE, 0.45), (COMPLETE, 0.6))
    confirm_made_up(study, {1: 0.1})

    best = found(study)

    assert (best.trial, best.standing, best.is_decided) == (1, "confirmed", True)


@pytest.mark.parametrize("base", [COMPLETE, FAIL])
def test_recommended_after_a_confirmation_without_winner_is_the_base_also_if_it_failed_in_the_search(
    make: Make, base: TicketState
) -> None:
    study = make((base, 0.4), (COMPLETE, 0.45), (COMPLETE, 0.6))
    confirm_made_up(study, {})

    best = found(study)

    assert (best.trial, best.standing, best.is_decided) == (0, "keep", True)
    review = findings(data_of(study))
    assert (review.standing, review.verdict[:14]) == ("keep", "Keep the base:")
    assert not any(move.share for move in review.moves)
