"""What a study costs, when it is done, and what its own curves say about shorter trainings."""

import random
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from search.config import parse_study
from search.forecast import (
    ENOUGH_TRIALS,
    Cost,
    Forecast,
    Span,
    Speed,
    bootstrap_interval,
    busy_seconds,
    expected_cost,
    rank_correlation,
    remaining_epochs,
    rung_epochs,
    seconds_left,
    short_against_full,
    simulated_lengths,
    study_cost,
    workers_rate,
)
from search.settings import AshaPruner, HyperbandPruner, MedianPruner, NonePruner, PatientPruner

# ---- short against full ----------------------------------------------------------------------------------------------


def test_rank_correlation_of_known_ranks() -> None:
    first = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 2.0, 4.0, 5.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    second = np.array([[10.0, 30.0, 20.0, 50.0, 40.0], [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])

    found = rank_correlation(first, second)

    # 1 - 6 * 4 / (5 * 24); with one tie 9.5 / sqrt(9.5 * 10), falling.
    assert found[:2] == pytest.approx([0.8, -np.sqrt(0.95)])
    assert np.isnan(found[2])


def curve(*values: float | None) -> dict[int, float | None]:
    return dict(enumerate(values, start=1))


def test_short_against_full_correlation_regret_and_the_epochs_that_are_enough() -> None:
    # Ten trials: the first epoch turns the order around, the second swaps the two best, the third is the last's order.
    ends = [float(value) for value in range(10)]
    seconds = [*ends[:8], 9.0, 8.0]
    curves = [curve(-end, second, end, end / 10) for end, second in zip(ends, seconds, strict=True)]

    found = short_against_full(curves, 4, best=False)

    assert found.trials == 10
    assert [a.epochs for a in found.agreements] == [1, 2, 3]
    assert [a.correlation for a in found.agreements] == pytest.approx([-1.0, 1 - 6 * 2 / 990, 1.0])
    assert [a.regret for a in found.agreements] == pytest.approx([0.9, 0.1, 0.0])
    assert found.enough_epochs == 2
    assert found.agreements[2].low == found.agreements[2].high == 1.0
    assert found.line().startswith("10 trials ran to the end: after 2 of 4 epochs their ranks agree 0.99 (")
    assert found.line().endswith("and choosing there loses 0.1000")


def test_short_against_full_best_epoch_counts_what_was_reached_so_far() -> None:
    curves = [curve(0.5, 0.1, 0.6), curve(0.4, 0.45, 0.7)]

    last, best = (short_against_full(curves, 3, best=best) for best in (False, True))

    assert [a.correlation for a in last.agreements] == pytest.approx([-1.0, 1.0])
    assert [a.correlation for a in best.agreements] == pytest.approx([-1.0, -1.0])


def test_short_against_full_trials_without_an_end_do_not_count() -> None:
    pruned, broken = curve(0.1, 0.2), curve(0.1, None, 0.3)

    found = short_against_full([curve(0.1, 0.2, 0.3), pruned, broken], 3, best=False)

    assert found.trials == 1
    assert found.enough_epochs is None
    assert found.line() == (
        f"1 trial ran to the end, too few to say what shorter trainings would have shown (at least {ENOUGH_TRIALS})"
    )
    assert short_against_full([], 3, best=False).agreements == ()


def test_short_against_full_disagreement_at_the_end_says_that_no_shorter_training_would_do() -> None:
    curves = [curve(value, -value, value) for value in range(10)]

    found = short_against_full(curves, 3, best=False)

    assert found.enough_epochs is None
    assert "after 2 of 3 epochs their ranks agree -1.00" in found.line()
    assert "no shorter training would do" in found.line()


def test_short_against_full_long_trainings_list_few_epochs_with_first_and_last() -> None:
    found = short_against_full([curve(*range(1, 301)), curve(*range(2, 302))], 300, best=False)

    assert len(found.agreements) == 25
    assert (found.agreements[0].epochs, found.agreements[-1].epochs) == (1, 299)


def test_bootstrap_interval_of_unrelated_values_is_wide_and_repeats() -> None:
    early, final = np.random.default_rng(1).random((2, 12))

    low, high = bootstrap_interval(early, final)

    assert low is not None
    assert high is not None
    assert high - low > 0.8
    assert bootstrap_interval(early, final) == (low, high)
    assert bootstrap_interval(np.ones(12), final) == (None, None)


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_expected_cost_without_a_pruner_is_every_epoch() -> None:
    cost = expected_cost(NonePruner(name="none"), 12, 15)

    assert (cost.expected, cost.most, cost.trainings) == (180, 180, 12)
    assert cost.text() == "12 trainings (180 slot-epochs)"


def test_expected_cost_of_a_pruner_that_looks_at_single_curves_is_at_most_everything() -> None:
    cost = expected_cost(PatientPruner(name="patient", patience=3), 10, 20)

    assert (cost.expected, cost.is_known) == (200, False)
    assert cost.text() == "at most 10 trainings (200 slot-epochs), less what patient stops"


def test_study_cost_with_a_cheap_training_counts_those_that_go_on(tmp_path: Path) -> None:
    weights = tmp_path / "start.pt"
    weights.touch()
    space = {"box": {"low": 0.02, "high": 0.2}}
    document = {"name": "s", "data": "builtin:digits", "space": space, "trials": 31, "pruner": "none"}
    train = {"epochs": 20, "weights": str(weights)}
    config = parse_study({**document, "train": train, "fidelity": {"epochs": 4}}, source="study.yaml")

    cost = study_cost(config)

    # The base and a third of the others.
    assert (cost.promoted, cost.expected, cost.cheap) == (11, 220, 124)
    assert cost.text() == "11 trainings (220 slot-epochs), for 11 trials that go on after 124 cheap slot-epochs"
    speed = Speed(seconds=10.0, slots=4, source="as study before")
    assert Forecast(cost=cost, speed=speed).seconds == 3440.0


def test_study_cost_counts_the_trainings_that_measure_the_noise() -> None:
    document = {"name": "s", "data": "builtin:digits", "space": {"box": [0.05, 0.1]}, "trials": 2, "pruner": "none"}
    config = parse_study({**document, "train": {"epochs": 10}, "noise": {"seeds": 3}}, source="study.yaml")

    cost = study_cost(config)

    assert cost.text() == "2 trainings (20 slot-epochs), and 3 trainings for the noise"
    assert cost.slot_epochs == 50


def test_rung_epochs_multiply_until_the_full_training() -> None:
    assert rung_epochs(2, 3, 54) == (2, 6, 18)
    assert rung_epochs(5, 4, 5) == ()


class Qualities(random.Random):
    """Trials of given quality."""

    def __init__(self, *values: float) -> None:
        super().__init__(0)
        self._values = iter(values)

    def random(self) -> float:
        return next(self._values)


def test_simulated_lengths_of_asha_at_its_rungs() -> None:
    pruner = AshaPruner(name="asha", min_epochs=2, reduction_factor=2)

    lengths = simulated_lengths(pruner, 5, 10, 1, Qualities(0.5, 0.4, 0.7, 0.6, 0.9))

    # The base runs on. 0.4 is the worse of two, 0.7 the best of three and of two at the second rung and alone at the
    # third; 0.6 is second of four and goes on, then third of three; 0.9 beats all.
    assert lengths == [10, 2, 10, 4, 10]


def test_simulated_lengths_of_median_after_its_start() -> None:
    pruner = MedianPruner(name="median", min_epochs=3, n_startup_trials=2)

    assert simulated_lengths(pruner, 5, 10, 1, Qualities(0.5, 0.3, 0.39, 0.41, 0.45)) == [10, 10, 3, 10, 10]
    # Decisions fall on evaluated epochs.
    assert simulated_lengths(pruner, 3, 10, 4, Qualities(0.5, 0.3, 0.1)) == [10, 10, 4]


def test_expected_cost_of_asha_is_the_sum_over_its_rungs() -> None:
    cost = expected_cost(AshaPruner(name="asha", min_epochs=1, reduction_factor=3), 300, 27)

    # A third goes on at 1, 3 and 9 epochs: 1 + 2/3 + 6/9 + 18/27 = 3 epochs a trial, a little more as rungs fill up.
    assert 3.0 < cost.expected / 300 < 3.6


def test_expected_cost_of_hyperband_lies_between_its_brackets() -> None:
    cost = expected_cost(HyperbandPruner(name="hyperband", min_epochs=1, reduction_factor=3), 300, 27)

    assert 4.0 < cost.expected / 300 < 12.0
    assert cost.most == 8100


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_expected_cost_agrees_with_optunas_own_pruner(name: str) -> None:
    """The same simulated trials, given to the pruner that a study would use."""
    import optuna
    from optuna.trial import TrialState, create_trial

    from search.study import create_pruner

    space = {"box": {"low": 0.02, "high": 0.2}}
    document = {"name": "s", "data": "builtin:digits", "space": space, "trials": 40, "train": {"epochs": 9}}
    config = parse_study({**document, "pruner": {"name": name, "min_epochs": 1}}, source="study.yaml")
    total, studies = 0, 6
    for repetition in range(studies):
        draw = random.Random(repetition)
        study = optuna.create_study(direction="maximize", pruner=create_pruner(config), study_name=f"s{repetition}")
        for number in range(40):
            quality = draw.random()
            study.add_trial(create_trial(state=TrialState.RUNNING))
            trial = optuna.trial.Trial(study, study.trials[-1]._trial_id)
            length = 9
            for step in range(1, 9):
                trial.report(quality, step)
                if trial.should_prune() and number:
                    length = step
                    break
            total += length
            study._storage.set_trial_state_values(
                trial._trial_id, TrialState.PRUNED if length < 9 else TrialState.COMPLETE, [quality]
            )

    cost = expected_cost(config.pruner, 40, 9)

    assert total / studies == pytest.approx(cost.expected, rel=0.15)


def test_forecast_time_is_cost_times_speed() -> None:
    cost = Cost(epochs=10, expected=60.0, most=100, pruner="median")
    speed = Speed(seconds=90.0, slots=4, source="as study before")
    now = datetime(2026, 1, 31, 23, 0, tzinfo=UTC)

    rows = dict(Forecast(cost=cost, speed=speed).rows(now))

    assert rows["cost"].startswith("about 6.0 trainings (60 of at most 100 slot-epochs")
    assert rows["time"] == (
        "about 1.5 h with one worker (90 s per slot-epoch in packs of 4, as study before); started now, it is done "
        "Sun 2026-02-01 00:30 UTC"
    )
    assert Forecast(cost=cost, speed=speed).to_json()["seconds_with_one_worker"] == 5400.0
    assert "check --measure" in dict(Forecast(cost=cost, speed=None).rows(now))["time"]


# ---- a study that runs -----------------------------------------------------------------------------------------------


def span(state: str, done: int, *, worker: str | None = None, start: float = 0.0, pace: float = 10.0) -> Span:
    moments = tuple((1, start + pace * (epoch + 1)) for epoch in range(done))
    return Span(state=state, worker=worker, started=start if done else None, done=done, moments=moments)


def test_remaining_epochs_of_those_that_ended_the_longer_ones_count() -> None:
    ended = [span("COMPLETE", 10), span("PRUNED", 2), span("PRUNED", 3), span("FAIL", 1)]
    # One that waits takes (10 + 2 + 3) / 3; with three behind it (10 + 3) / 2; with five it is one of the long ones.
    assert remaining_epochs([*ended, span("WAITING", 0)], 10) == 5.0
    assert remaining_epochs([*ended, span("RUNNING", 3)], 10) == 3.5
    assert remaining_epochs([*ended, span("RUNNING", 5), span("RUNNING", 10)], 10) == 5.0


def test_remaining_epochs_before_any_has_ended_is_the_forecast() -> None:
    spans = [span("RUNNING", 2), span("WAITING", 0)]

    assert remaining_epochs(spans, 10) == 18.0
    assert remaining_epochs(spans, 10, typical=6.0) == 10.0
    # One that is beyond the typical length may go on to the end.
    assert remaining_epochs([span("RUNNING", 7)], 10, typical=6.0) == 3.0


def test_workers_rate_is_that_of_live_workers_and_their_packs() -> None:
    fast = [span("RUNNING", 4, worker="a", pace=10.0), span("RUNNING", 4, worker="a", pace=10.0)]
    slow, dead = span("RUNNING", 3, worker="b", pace=40.0), span("RUNNING", 3, worker="gone", pace=1.0)

    assert workers_rate([*fast, slow, dead], ["a", "b"]) == pytest.approx(2 / 10 + 1 / 40)
    # A third worker that has said nothing yet is taken to be like the others.
    silent = Span(state="RUNNING", worker="c", started=0.0, done=0, moments=())
    assert workers_rate([*fast, slow, silent], ["a", "b", "c"]) == pytest.approx((2 / 10 + 1 / 40) * 3 / 2)
    assert workers_rate([silent, dead], ["c"]) is None


def test_seconds_left_prefers_what_workers_do_now_to_the_past() -> None:
    past = [span("COMPLETE", 10, pace=100.0)]
    running = span("RUNNING", 4, worker="a", pace=5.0)

    assert seconds_left([*past, running], ["a"], 10) == pytest.approx(6 * 5.0)
    # Nobody is alive: 14 epochs took 1000 s.
    assert seconds_left([*past, running], [], 10) == pytest.approx(6 * 1000 / 14)
    assert seconds_left([span("WAITING", 0)], [], 10) is None


def test_busy_seconds_leave_out_a_night() -> None:
    night = Span(state="RUNNING", worker=None, started=0.0, done=3, moments=((1, 10.0), (1, 20.0), (2, 30_000.0)))

    assert busy_seconds([night]) == pytest.approx(30.0)


def test_forecast_of_a_confirmation_counts_base_and_candidates_on_each_seed() -> None:
    document = {"name": "s", "data": "builtin:digits", "space": {"box": [0.05, 0.1]}, "pruner": "none"}
    texts = {}
    for trials in (1, 2, 30):
        config = parse_study({**document, "trials": trials, "train": {"epochs": 10}}, source="study.yaml")
        forecast = Forecast(cost=study_cost(config), speed=Speed(seconds=36.0, slots=4, source="as study before"))
        texts[trials] = dict(forecast.rows(datetime.now().astimezone())).get("then confirm")

    assert texts == {
        1: None,
        2: "10 more trainings for `yolosearch confirm STUDY --top 1 --seeds 5`, about 1.0 h with one worker",
        30: "20 more trainings for `yolosearch confirm STUDY --top 3 --seeds 5`, about 2.0 h with one worker",
    }
    assert forecast.seconds == 30 * 10 * 36.0  # it is no part of the study
    assert forecast.to_json()["confirmation_trainings"] == 20
    assert forecast.to_json()["confirmation_seconds_with_one_worker"] == 7200.0
