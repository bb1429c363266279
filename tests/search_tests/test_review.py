"""What a study has found, in words and numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from made_up import data_of, made_up_study
from tiny import TinyStudy

from search.ledger import TicketState
from search.review import BAND, findings
from search.statistics import compare

COMPLETE, PRUNED, FAIL = TicketState.COMPLETE, TicketState.PRUNED, TicketState.FAIL
Make = Callable[..., TinyStudy]


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    return lambda *fates, **changes: made_up_study(
        tmp_path / "study", tmp_path_factory.getbasetemp(), fates, **{"base_hyp": None, **changes}
    )


def test_findings_nothing_complete_says_so(make: Make) -> None:
    found = findings(data_of(make((PRUNED, 0.1), waiting=2)))

    assert found.standing == "open"
    assert found.verdict == "Nothing to say yet: 1 of 3 trials have ended, none is complete."
    assert "2 trials are open" in found.advice
    assert (found.gain, found.moves, found.classes) == (None, (), ())


def test_findings_base_without_value_has_nothing_to_compare_with(make: Make) -> None:
    found = findings(data_of(make((FAIL, 0.1), (COMPLETE, 0.5))))

    assert found.verdict == "Nothing to compare with: trial 1 has fitness 0.500, and the defaults have no value."
    assert found.failures == (("the loss is not finite (epoch 1, batch 3)", (0,)),)


def test_findings_best_in_one_run_is_unconfirmed_and_names_what_moved(make: Make) -> None:
    study = make((COMPLETE, 0.4), (COMPLETE, 0.45), (PRUNED, 0.1))
    best = study.tickets()[1].params
    assert best is not None

    found = findings(data_of(study), {"box": 0.9, "cls": 0.1})

    assert found.standing == "unconfirmed"
    assert found.verdict.startswith("Unconfirmed: ")
    assert f"box {best['box']:.2g} and cls" in found.verdict
    assert "raised fitness by 0.050 over the defaults in one run" in found.verdict
    assert found.verdict.endswith("; mostly cat.")
    assert found.gain == pytest.approx(0.05)
    assert found.margin is None
    assert [move.key for move in found.moves] == ["box", "cls"]
    assert [(change.name, round(change.change, 6)) for change in found.classes] == [("cat", 0.05), ("dog", 0.025)]


def test_findings_measured_noise_says_whether_the_gain_is_within(make: Make) -> None:
    study = make((COMPLETE, 0.4), (COMPLETE, 0.45))

    inside = findings(data_of(study, noise=0.03))
    outside = findings(data_of(study, noise=0.01))

    assert f"inside the noise of two runs (± {BAND * 0.03:.3f})" in inside.verdict
    assert "outside the noise of two runs" in outside.verdict
    assert data_of(study, noise=0.01).band == pytest.approx((0.4 - BAND * 0.01, 0.4 + BAND * 0.01))
    assert data_of(study).band is None


def test_findings_confirmed_gives_gain_and_interval_over_seeds(make: Make) -> None:
    study = make((COMPLETE, 0.4), (COMPLETE, 0.45), (COMPLETE, 0.5))
    base = [0.40, 0.41, 0.39, 0.40]
    better = [value + gain for value, gain in zip(base, (0.020, 0.022, 0.021, 0.021), strict=True)]
    confirmation = compare(base, {"trial 1": better, "trial 2": [0.40, 0.40, 0.40, 0.40]})

    found = findings(data_of(study, confirmation=confirmation, candidates={"trial 1": 1, "trial 2": 2}))

    assert found.standing == "confirmed"
    # Trial 2 was the best of the search; the seeds decide.
    assert found.gain == pytest.approx(0.021)
    assert found.margin is not None
    assert f"raise fitness by 0.021 ± {found.margin:.3f} over the defaults" in found.verdict
    assert "Unconfirmed" not in found.verdict


def test_findings_confirmation_without_winner_keeps_the_defaults(make: Make) -> None:
    confirmation = compare([0.40, 0.42, 0.38, 0.41], {"trial 1": [0.41, 0.40, 0.40, 0.40]})

    found = findings(data_of(make((COMPLETE, 0.4), (COMPLETE, 0.45)), confirmation=confirmation))

    assert found.standing == "keep"
    assert found.verdict.startswith("Keep the defaults: over 4 paired seeds no candidate is shown to be better")


def test_findings_nothing_beats_the_base_keeps_it(make: Make) -> None:
    found = findings(data_of(make((COMPLETE, 0.4), (COMPLETE, 0.3), base_hyp={"mosaic": 0})))

    assert found.verdict == "Keep the base: none of 1 other complete trials beats its value of 0.400 (fitness)."
    assert found.gain == 0


def test_findings_cost_counts_epochs_and_what_pruning_spared(make: Make) -> None:
    cost = findings(data_of(make((COMPLETE, 0.4), (PRUNED, 0.1), (FAIL, 0.2)))).cost

    # 4 + 2 + 1 epochs of 4 s in packs of two; the failed trial is neither kept nor spared.
    assert (cost.slot_epochs, cost.search_epochs, cost.unpruned_epochs) == (7, 6, 8)
    assert cost.device_seconds == pytest.approx(14.0)
    assert cost.saved == pytest.approx(0.25)
