"""What a study has found, in words and numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from made_up import data_of, made_up_study, rerun_base
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


# ---- several objectives ----------------------------------------------------------------------------------------------

TWO = {"objectives": ["fitness", "recall"], "pruner": None}
BASE_AND_FOUR = ((COMPLETE, 0.40), (COMPLETE, 0.50), (COMPLETE, 0.41), (COMPLETE, 0.30), (COMPLETE, 0.39))
RECALLS = {number: {"recall": recall} for number, recall in enumerate((0.40, 0.35, 0.45, 0.60, 0.38))}


def test_findings_front_names_its_size_and_which_beat_the_base_in_all(make: Make) -> None:
    data = data_of(make(*BASE_AND_FOUR, figures=RECALLS, **TWO))

    found = findings(data)

    assert (data.best, found.standing, found.gain, found.moves) == (None, "front", None, ())
    assert [trial.number for trial in found.front] == [1, 2, 3]
    assert [trial.beats_base for trial in found.front] == [False, True, False]
    assert found.front[1].gains == pytest.approx({"fitness": 0.01, "recall": 0.05})
    assert found.verdict == (
        "3 of 5 complete trials are on the front of fitness and recall; in one run trial 2 beats the defaults in both."
    )
    assert "How far equal runs are apart was not measured" in found.advice


@pytest.mark.parametrize(
    ("spread", "words"),
    [
        (0.001, ", by more than the noise of two runs in each."),
        (0.01, ", by no more than the noise of two runs in each."),
    ],
)
def test_findings_front_with_noise_says_whether_a_gain_is_clear(make: Make, spread: float, words: str) -> None:
    study = make(*BASE_AND_FOUR, figures=RECALLS, **TWO)
    rerun_base(study, [{"fitness": 0.40, "recall": 0.40}, {"fitness": 0.40 + spread, "recall": 0.40 + spread}])
    data = data_of(study)

    found = findings(data)

    assert data.objective_noise == pytest.approx(dict.fromkeys(("fitness", "recall"), spread / 2**0.5))
    assert found.verdict.endswith(f"trial 2 beats the defaults in both{words}")
    assert found.front[1].is_clear == (spread == 0.001)
    assert "not measured" not in found.advice


def test_findings_front_with_the_base_on_it_says_that_nothing_beats_it(make: Make) -> None:
    recalls = {0: {"recall": 0.7}, 1: {"recall": 0.5}}

    found = findings(data_of(make((COMPLETE, 0.4), (COMPLETE, 0.5), figures=recalls, **TWO)))

    assert found.verdict == (
        "2 of 2 complete trials are on the front of fitness and recall, the defaults among them: no trial beats them "
        "in both."
    )


def test_findings_front_where_somebody_equals_the_base_in_one_beats_it_in_no_more(make: Make) -> None:
    recalls = {0: {"recall": 0.5}, 1: {"recall": 0.5}}

    found = findings(data_of(make((COMPLETE, 0.4), (COMPLETE, 0.5), figures=recalls, **TWO)))

    assert found.verdict == (
        "1 of 2 complete trials is on the front of fitness and recall; none beats the defaults in both."
    )


def test_findings_front_without_a_base_has_nothing_to_compare_with(make: Make) -> None:
    found = findings(data_of(make((FAIL, 0.1), (COMPLETE, 0.5), base_hyp={"mosaic": 0}, **TWO)))

    assert found.verdict.endswith("; there is nothing to compare with: the base has no value.")
    assert found.front[0].gains == {}


def test_findings_several_objectives_nothing_complete_is_open(make: Make) -> None:
    found = findings(data_of(make(waiting=2, **TWO)))

    assert found.standing == "open"
    assert found.verdict == "Nothing to say yet: 0 of 2 trials have ended, none is complete."
    assert found.advice == "The study is not over: 2 trials are open."


def test_base_reruns_of_other_lengths_and_candidates_are_left_out(make: Make) -> None:
    from search.confirm import add_confirmation
    from search.ledger import CONFIRM

    study = make((COMPLETE, 0.4), (COMPLETE, 0.5))
    rerun_base(study, [{"fitness": 0.40}, {"fitness": 0.41}])
    for epochs in (4, 8):
        add_confirmation(study.ledger, study.config, top=1, seeds=3, epochs=epochs)
        for ticket in study.ledger.claim("tiny", "here", 100, 60.0, kind=CONFIRM):
            study.ledger.record_epoch(ticket, epochs - 1, 0.43, {"fitness": 0.43})
            study.ledger.finish(ticket, COMPLETE, 0.43, None, epochs - 1)

    data = data_of(study)

    # Two seeds of the noise, and the third one, which only the confirmation has.
    assert [ticket.kind for ticket in data.base_reruns] == ["noise", "noise", "confirm"]
    assert [ticket.value for ticket in data.base_reruns] == [0.40, 0.41, 0.43]
