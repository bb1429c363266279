"""What reruns show: planted objectives, the plan of a confirmation, what is exported after it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from search.cli_common import out
from search.cli_confirm import _print_confirmation, _split_table
from search.config import StudyConfig, parse_study
from search.confirm import (
    Run,
    add_confirmation,
    add_noise,
    ask_confirmation,
    best_candidates,
    confirm_report,
    judge,
    latest_confirmation,
    noise_report,
    summary_metrics,
)
from search.database import make_engine
from search.errors import StudyStoppedError, UserInputError
from search.export import best_trial, header
from search.ledger import CONFIRM, NOISE, RERUN_KINDS, Ledger, StudyRecord, Ticket, TicketState
from search.review import read_study_data
from search.statistics import ALPHA, power, seeds_needed

SEED_SD, NOISE_SD = 0.012, 0.01


# ---- planted objectives, through the code that judges a confirmation -------------------------------------------------


def planted_runs(generator: np.random.Generator, gains: Sequence[float], seeds: int) -> list[Run]:
    """Reruns of a simulated objective: known gains, an effect of each seed that all share, and noise."""
    effect = generator.normal(0, SEED_SD, seeds)
    values = [0.37 + gain + effect + generator.normal(0, NOISE_SD, seeds) for gain in (0.0, *gains)]
    return [
        Run(candidate=candidate, seed=seed, metrics={"val/objective": float(value)})
        for candidate, row in enumerate(values)
        for seed, value in enumerate(row, start=1)
    ]


def winners(generator: np.random.Generator, gains: Sequence[float], seeds: int, repetitions: int) -> list[str | None]:
    """Who is called better in each of many confirmations; None: keep the defaults."""
    names = {number: f"trial {number}" for number in range(1, len(gains) + 1)}
    found = []
    for _ in range(repetitions):
        (judgement,) = judge(planted_runs(generator, gains, seeds), names, decides_by_fitness=True)
        best = judgement.result.winner
        found.append(None if best is None else best.candidate)
    return found


def test_judge_where_no_candidate_is_better_keeps_the_defaults() -> None:
    # One series of 200; how often any series errs is tested below.
    kept = winners(np.random.default_rng(0), [0.0, 0.0, 0.0], seeds=5, repetitions=200)

    assert kept.count(None) >= 190


def test_judge_over_thousands_of_repetitions_errs_in_less_than_five_percent() -> None:
    repetitions = 6000
    found = winners(np.random.default_rng(7), [0.0, 0.0, 0.0], seeds=5, repetitions=repetitions)

    wrong = 1 - found.count(None) / repetitions
    assert wrong < 0.05
    # Nor is it needlessly shy: three standard errors of so many draws.
    assert wrong == pytest.approx(ALPHA, abs=3 * np.sqrt(ALPHA / repetitions))


def test_judge_finds_a_planted_gain_of_three_standard_errors() -> None:
    seeds = 12
    gain = 3 * NOISE_SD * float(np.sqrt(2 / seeds))

    found = winners(np.random.default_rng(8), [gain], seeds, repetitions=200)

    assert found.count("trial 1") >= 160
    assert power(gain, NOISE_SD, seeds, 1) > 0.8


@pytest.mark.parametrize(("seeds", "errors"), [(5, 2.0), (5, 3.0), (8, 3.0)])
def test_judge_with_three_candidates_has_the_power_that_is_computed(seeds: int, errors: float) -> None:
    repetitions, gain = 1500, errors * NOISE_SD * float(np.sqrt(2 / seeds))

    found = winners(np.random.default_rng(9), [gain, 0.0, 0.0], seeds, repetitions)

    # Another candidate wins by chance where the better one was found as well: that counts for it.
    assert found.count("trial 1") / repetitions == pytest.approx(power(gain, NOISE_SD, seeds, 3), abs=0.05)


# ---- incomplete reruns -----------------------------------------------------------------------------------------------


def run(candidate: int, seed: int, **metrics: float) -> Run:
    return Run(candidate=candidate, seed=seed, metrics={key.replace("__", "/"): v for key, v in metrics.items()})


def test_judge_takes_only_seeds_on_which_all_have_values() -> None:
    runs = [run(c, s, val__objective=0.3 + c / 100 + s / 10) for c in (0, 1) for s in (1, 2, 3)]
    waiting = Run(candidate=1, seed=4, metrics=None)

    (judgement,) = judge([*runs, run(0, 4, val__objective=0.9), waiting], {1: "trial 1"})

    assert judgement.result.seeds == 3
    assert judgement.result.comparisons[0].gain == pytest.approx(0.01)


def test_judge_with_one_complete_seed_says_nothing() -> None:
    assert judge([run(0, 1, val__objective=0.3), run(1, 1, val__objective=0.4)], {1: "trial 1"}) == ()
    assert judge([run(0, 1, val__objective=0.3), run(0, 2, val__objective=0.4)], {}) == ()


def test_judge_leaves_out_what_not_every_run_has() -> None:
    def metrics(c: int, s: int) -> Mapping[str, float]:
        own = {"val/objective": 0.3, "val/class_ap/10": 0.1, "val/class_ap/2": 0.2, "test/objective": 0.4}
        return {**own, **({"test/class_ap/2": 0.5} if c == 0 else {})}

    runs = [Run(candidate=c, seed=s, metrics=metrics(c, s)) for c in (0, 1) for s in (1, 2)]

    shown = [(one.split, one.measure) for one in judge(runs, {1: "trial 1"})]

    assert shown == [("val", "objective"), ("val", "class_ap/2"), ("val", "class_ap/10"), ("test", "objective")]


# ---- a study with reruns ---------------------------------------------------------------------------------------------


@pytest.fixture
def config() -> StudyConfig:
    document = {"name": "s", "data": "builtin:digits", "space": {"box": {"low": 0.02, "high": 0.2}}, "trials": 6}
    return parse_study({**document, "train": {"seed": 7, "epochs": 3}}, source="study.yaml")


@pytest.fixture
def ledger(tmp_path: Path, config: StudyConfig) -> Ledger:
    """A finished search: the base has 0.30, and the trials 0.31 to 0.35, the last one with the base's parameters."""
    ledger = Ledger(make_engine(f"sqlite:///{tmp_path}/study.db"))
    ledger.initialise()
    record = StudyRecord(name="s", config=config.to_json(), fingerprint="feed", versions={}, created=0.0)
    ledger.create_study(record, [{"box": 0.05}, *[None] * 5], (1, 0, {"box": 0.05}))
    for number, ticket in enumerate(ledger.claim("s", "w", 6, 60.0)):
        if ticket.trial_id is None:
            box = 0.05 if number == 5 else 0.05 + number / 100
            ticket = ledger.link_trial(ticket, number + 1, number, {"box": box})
        finish(ledger, ticket, 0.30 + number / 100)
    return ledger


def finish(ledger: Ledger, ticket: Ticket, value: float, test: float | None = None) -> None:
    metrics = {"fitness": value, "class_ap/0": value / 2}
    if test is not None:
        metrics |= {"test/objective": test, "test/fitness": test}
    ledger.record_epoch(ticket, 2, value, metrics, 1.0)
    ledger.finish(ticket, TicketState.COMPLETE, value, None, 2)


def rerun_all(ledger: Ledger, kind: str, gains: Mapping[int, float], on_test: float = 0.0) -> None:
    """Ends all open reruns: the base at 0.3, candidates so much above it, with a little noise."""
    for ticket in ledger.claim("s", "w", 100, 60.0, kind=kind):
        noise = 0.001 * ((ticket.number * 7919) % 5)
        value = 0.30 + 0.02 * ((ticket.seed or 0) % 3) + gains.get(ticket.candidate or 0, 0.0) + noise
        finish(ledger, ticket, value, value + on_test)


def reruns(ledger: Ledger, kind: str = CONFIRM) -> list[tuple[int | None, int | None]]:
    return [(ticket.seed, ticket.candidate) for ticket in ledger.tickets("s", (kind,))]


def test_best_candidates_are_the_best_other_parameters_than_the_bases(ledger: Ledger) -> None:
    assert [ticket.number for ticket in best_candidates(ledger.tickets("s"))] == [4, 3, 2, 1]


def test_add_confirmation_asks_for_base_and_best_on_every_seed_but_the_searchs(
    ledger: Ledger, config: StudyConfig
) -> None:
    added = add_confirmation(ledger, config, top=2, seeds=2, epochs=3)

    assert reruns(ledger) == [(8, 0), (8, 4), (8, 3), (9, 0), (9, 4), (9, 3)]
    assert [ticket.params for ticket in added[:3]] == [{"box": 0.05}, {"box": 0.09}, {"box": 0.08}]
    assert {(ticket.epochs, ticket.trial_id) for ticket in added} == {(3, None)}
    assert add_confirmation(ledger, config, top=2, seeds=2, epochs=3) == ()


def test_add_confirmation_again_keeps_earlier_candidates_and_fills_all_seeds(
    ledger: Ledger, config: StudyConfig
) -> None:
    add_confirmation(ledger, config, top=1, seeds=2, epochs=3)
    add_confirmation(ledger, config, top=2, seeds=2, epochs=3)
    add_confirmation(ledger, config, top=1, seeds=3, epochs=3)

    assert sorted(reruns(ledger)) == [(seed, candidate) for seed in (8, 9, 10) for candidate in (0, 3, 4)]


def test_add_confirmation_tries_a_failed_rerun_again(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=1, seeds=2, epochs=3)
    (ticket,) = ledger.claim("s", "w", 1, 60.0, kind=CONFIRM)
    ledger.finish(ticket, TicketState.FAIL, None, "loss is not finite")

    (again,) = add_confirmation(ledger, config, top=1, seeds=2, epochs=3)

    assert (again.seed, again.candidate) == (ticket.seed, ticket.candidate)
    rerun_all(ledger, CONFIRM, {})
    assert confirm_report(ledger, config, 3).is_over


def test_add_confirmation_without_a_candidate_is_one_line(tmp_path: Path, config: StudyConfig) -> None:
    ledger = Ledger(make_engine(f"sqlite:///{tmp_path}/new.db"))
    ledger.initialise()
    record = StudyRecord(name="s", config=config.to_json(), fingerprint="feed", versions={}, created=0.0)
    ledger.create_study(record, [{"box": 0.05}], (1, 0, {"box": 0.05}))

    with pytest.raises(UserInputError, match="study s: none of 1 trials but the base is complete; allowed: "):
        add_confirmation(ledger, config, top=1, seeds=2, epochs=3)


def test_reruns_leave_the_searchs_numbers_and_counts_alone(ledger: Ledger, config: StudyConfig) -> None:
    before = [ledger.counts("s"), ledger.budget("s"), ledger.best("s"), ledger.state_counts(), ledger.tickets("s")]
    reports = ledger.all_reports("s")
    add_noise(ledger, config, 3)
    add_confirmation(ledger, config, top=2, seeds=2, epochs=3)
    rerun_all(ledger, CONFIRM, {4: 0.5})
    for ticket in ledger.claim("s", "w", 3, 60.0, kind=NOISE):
        ledger.finish(ticket, TicketState.FAIL, None, "broken")

    after = [ledger.counts("s"), ledger.budget("s"), ledger.best("s"), ledger.state_counts(), ledger.tickets("s")]

    assert after == before
    assert ledger.all_reports("s") == reports
    assert ledger.failures_in_a_row("s") == 0
    assert ledger.open_counts("s") == {TicketState.WAITING: 0, TicketState.RUNNING: 0}
    ledger.add_tickets("s", 1)
    assert [ticket.number for ticket in ledger.tickets("s")] == [0, 1, 2, 3, 4, 5, 6]


def test_claim_with_alike_takes_the_firsts_cohort_at_once(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=2, seeds=3, epochs=3)

    def claim() -> list[tuple[int | None, int | None]]:
        found = ledger.claim("s", "w", 8, 60.0, kind=CONFIRM, alike=lambda a, b: a.seed == b.seed)
        return [(ticket.seed, ticket.candidate) for ticket in found]

    assert claim() == [(8, 0), (8, 4), (8, 3)]
    assert claim() == [(9, 0), (9, 4), (9, 3)]
    assert ledger.largest_cohort("s") == 3


def test_claim_of_a_stopped_study_still_gives_reruns(ledger: Ledger, config: StudyConfig) -> None:
    add_noise(ledger, config, 2)
    ledger.stop("s", "nothing to gain below the noise")

    assert len(ledger.claim("s", "w", 5, 60.0, kind=NOISE)) == 2
    with pytest.raises(StudyStoppedError):
        ledger.claim("s", "w", 1, 60.0)


def test_noise_report_has_mean_spread_and_the_gains_that_show(ledger: Ledger, config: StudyConfig) -> None:
    add_noise(ledger, config, 3)
    for ticket, value in zip(ledger.claim("s", "w", 3, 60.0, kind=NOISE), (0.30, 0.32, 0.34), strict=True):
        finish(ledger, ticket, value)

    report = noise_report(ledger, config)

    assert (report.done, report.asked) == (3, 3)
    assert report.spread is not None
    assert (report.spread.mean, report.spread.sd) == (pytest.approx(0.32), pytest.approx(0.02))
    # chi-squared with 2 degrees of freedom: 0.0506 and 7.378 are its 2.5 % and 97.5 % points.
    assert report.sd_low == pytest.approx(0.02 * np.sqrt(2 / 7.3778), rel=1e-4)
    assert report.sd_high == pytest.approx(0.02 * np.sqrt(2 / 0.050636), rel=1e-4)
    gain = report.detectable[5][3]
    assert seeds_needed(gain * 1.0001, 0.02, 3) == 5
    assert summary_metrics(report)["noise/sd"] == pytest.approx(0.02)


def test_confirm_report_of_a_better_candidate_names_it(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=3, seeds=5, epochs=3)
    rerun_all(ledger, CONFIRM, {3: 0.02, 4: -0.02})

    report = confirm_report(ledger, config, 3)

    assert report.winner is not None
    assert report.winner.number == 3
    assert report.seeds == (8, 9, 10, 11, 12)
    assert [(c.candidate, c.verdict) for c in report.judgements[0].result.comparisons] == [
        ("trial 4", "worse"),
        ("trial 3", "better"),
        ("trial 2", "no difference shown"),
    ]
    assert {(one.split, one.measure) for one in report.judgements} == {
        ("val", "objective"),
        ("val", "class_ap/0"),
        ("test", "objective"),
    }
    assert report.verdict().startswith("trial 3 is better than the base: gain +0.0")
    assert report.to_json()["winner"] == 3
    assert summary_metrics(report)["confirm/val/trial_3/gain"] > 0


def test_split_table_fits_80_columns_uncut(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=3, seeds=5, epochs=3)
    rerun_all(ledger, CONFIRM, {3: 0.02, 4: -0.02})
    report = confirm_report(ledger, config, 3)
    console = Console(width=80, force_terminal=False)

    with console.capture() as capture:
        console.print(_split_table(report, report.judgements[:2], ["a class name"]))

    text = capture.get()
    assert "…" not in text
    assert max(map(len, map(str.rstrip, text.splitlines()))) <= 80
    assert "AP a class name" in text
    assert [word in text for word in ("better", "worse", "none shown", " <0.001 ")] == [True] * 4


def test_split_table_class_name_that_looks_like_markup_printed_as_it_is(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=3, seeds=5, epochs=3)
    rerun_all(ledger, CONFIRM, {3: 0.02, 4: -0.02})
    report = confirm_report(ledger, config, 3)

    with out.capture() as capture:
        out.print(_split_table(report, report.judgements[:2], ["[/x]\n:cat:"]))

    assert "AP [/x]\\n:cat:" in capture.get()


def test_confirm_report_under_way_is_not_over(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=1, seeds=2, epochs=3)
    rerun_all(ledger, CONFIRM, {4: 0.1})
    assert confirm_report(ledger, config, 3).is_over
    add_confirmation(ledger, config, top=1, seeds=3, epochs=3)

    report = confirm_report(ledger, config, 3)

    assert (report.is_over, report.done, report.asked) == (False, 4, 6)
    assert "so far (4 of 6 reruns are complete)" in report.verdict()


def test_confirm_report_candidate_that_failed_is_not_compared(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=2, seeds=2, epochs=3)
    cohort = ledger.claim("s", "w", 2, 60.0, kind=CONFIRM)
    ledger.finish(cohort[1], TicketState.FAIL, None, "loss is not finite")
    finish(ledger, cohort[0], 0.3)
    rerun_all(ledger, CONFIRM, {3: 0.1})

    report = confirm_report(ledger, config, 3)

    assert [(one.number, one.failure) for one in report.candidates] == [(4, "loss is not finite"), (3, None)]
    assert [c.candidate for c in report.judgements[0].result.comparisons] == ["trial 3"]
    assert report.is_over


def fail_base(ledger: Ledger, seeds: Sequence[int], reason: str = "loss is not finite") -> None:
    """Ends all open reruns, those of the base on these seeds as failures."""
    for ticket in ledger.claim("s", "w", 100, 60.0, kind=CONFIRM):
        if ticket.candidate == 0 and ticket.seed in seeds:
            ledger.finish(ticket, TicketState.FAIL, None, reason)
        else:
            finish(ledger, ticket, 0.3 + 0.001 * ((ticket.number * 7919) % 5))


def test_confirm_report_base_that_failed_everywhere_says_so_and_confirm_again_retries(
    ledger: Ledger, config: StudyConfig
) -> None:
    length = ask_confirmation(ledger, config, top=1, seeds=3)
    fail_base(ledger, (8, 9, 10))

    report = confirm_report(ledger, config, length)

    assert (report.is_over, report.is_stuck, report.decisive) == (False, True, None)
    assert report.verdict() == (
        "no verdict: 3 of 6 reruns failed, base on seed 8, 9, 10 (loss is not finite); "
        "`yolosearch confirm s` trains them again"
    )
    assert [failure["seed"] for failure in report.to_json()["base_failures"]] == [8, 9, 10]
    assert any("no verdict: 3 of 6 reruns failed" in line for line in header(best_trial(ledger, config)))

    assert ask_confirmation(ledger, config, retry=False) == length
    assert len(reruns(ledger)) == 6
    assert ask_confirmation(ledger, config) == length
    assert reruns(ledger)[6:] == [(8, 0), (9, 0), (10, 0)]
    assert confirm_report(ledger, config, length).verdict() == "nothing to compare yet: 3 of 6 reruns are complete"
    assert ask_confirmation(ledger, config) == length
    assert len(reruns(ledger)) == 9
    rerun_all(ledger, CONFIRM, {})
    assert confirm_report(ledger, config, length).is_over


def test_confirm_report_base_that_failed_on_a_seed_is_told_with_the_command_that_retries(
    ledger: Ledger, config: StudyConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    length = ask_confirmation(ledger, config, top=2, seeds=4)
    fail_base(ledger, (9,))

    report = confirm_report(ledger, config, length)
    _print_confirmation(report, (), None)

    assert (report.is_over, report.seeds) == (True, (8, 10, 11))
    assert report.verdict().endswith("over 3 seeds; seed 9 left out, where the base failed")
    told = " ".join(capsys.readouterr().out.split())
    assert "seed 9 compares nothing, the base failed on it: loss is not finite" in told
    assert "`yolosearch confirm s --top 2 --seeds 4 --epochs 3` trains again what failed" in told
    assert "lie above their `from` with 96 %" in told
    # What it says is shown by `confirm` alone, and tried again when it is asked for.
    ask_confirmation(ledger, config)
    assert len(reruns(ledger)) == 12
    ask_confirmation(ledger, config, top=2, seeds=4, epochs=3)
    assert reruns(ledger)[12:] == [(9, 0)]


def test_confirm_report_counts_the_looks_after_which_seeds_were_added(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=1, seeds=2, epochs=3)
    add_confirmation(ledger, config, top=1, seeds=3, epochs=3)  # nothing to be seen yet
    rerun_all(ledger, CONFIRM, {4: 0.1})
    assert confirm_report(ledger, config, 3).looks_in_words() is None
    add_confirmation(ledger, config, top=2, seeds=3, epochs=3)  # another candidate is corrected for
    rerun_all(ledger, CONFIRM, {4: 0.1})
    assert confirm_report(ledger, config, 3).looks == 0
    for seeds in (5, 6):
        add_confirmation(ledger, config, top=2, seeds=seeds, epochs=3)
        rerun_all(ledger, CONFIRM, {4: 0.1})

    report = confirm_report(ledger, config, 3)

    assert (report.looks, report.false_winners) == (2, pytest.approx(0.12))
    said = "seeds were added 2 times after a look at the results: the chance of a false winner is at most 12 %, not 4 %"
    assert report.looks_in_words() == said
    assert report.to_json()["looks"] == 2
    best = best_trial(ledger, config)
    assert f"looks:      {said}" in header(best)
    assert best.reruns[0].looks == 2


def test_confirm_report_names_the_level_of_its_intervals(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=1, seeds=4, epochs=3)
    rerun_all(ledger, CONFIRM, {4: 0.1})

    report = confirm_report(ledger, config, 3)

    assert report.to_json()["confidence"] == 0.96
    assert "), each end with 96 %, p = " in report.verdict()
    assert any("), each end with 96 %, p = " in line for line in header(best_trial(ledger, config)))


def test_confirm_report_without_a_winner_keeps_the_base_of_the_study(ledger: Ledger, config: StudyConfig) -> None:
    own = config.model_copy(update={"base_hyp": {"box": 0.06}})
    add_confirmation(ledger, config, top=1, seeds=4, epochs=3)
    rerun_all(ledger, CONFIRM, {})

    assert confirm_report(ledger, config, 3).verdict().startswith("keep the defaults: the candidate is not")
    assert confirm_report(ledger, own, 3).verdict().startswith("keep the base: the candidate is not")


def test_read_study_data_has_what_the_reruns_say_once_it_is_said(ledger: Ledger, config: StudyConfig) -> None:
    add_noise(ledger, config, 2)
    rerun_all(ledger, NOISE, {})
    add_confirmation(ledger, config, top=2, seeds=4, epochs=3)
    assert read_study_data(ledger, config).confirmation is None
    rerun_all(ledger, CONFIRM, {3: 0.05})

    data = read_study_data(ledger, config)

    assert data.best is not None
    assert (data.best.number, data.candidates) == (3, {"trial 4": 4, "trial 3": 3})
    assert list(data.class_confirmations) == [0]
    assert list(data.confirmed_classes) == ["class 0"]
    assert data.noise == pytest.approx(noise_report(ledger, config).spread.sd)  # type: ignore[union-attr]


# ---- export ----------------------------------------------------------------------------------------------------------


def test_best_trial_unconfirmed_is_the_best_of_the_search(ledger: Ledger, config: StudyConfig) -> None:
    best = best_trial(ledger, config)

    assert (best.trial_number, best.verdict) == (5, None)
    assert any(line.startswith("unconfirmed: ") for line in header(best))


def test_best_trial_confirmed_is_the_winner_with_its_gain(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=3, seeds=5, epochs=3)
    rerun_all(ledger, CONFIRM, {3: 0.02})

    best = best_trial(ledger, config)
    lines = header(best)

    assert (best.trial_number, best.ticket, best.hyperparameters.box) == (3, 3, pytest.approx(0.08))
    assert any(line.startswith("confirmed on validation: better, gain +0.0") for line in lines)
    assert any("5 paired seeds of 3 epochs, corrected for 3 candidates" in line for line in lines)
    assert any("on test: " in line for line in lines)
    assert not any("unconfirmed" in line for line in lines)
    assert "study id:   s@1970-01-01T00:00:00.000+00:00" in lines
    assert best.is_confirmed
    val, test = best.reruns
    assert (val.split, test.split, val.verdict, val.candidates, val.seeds) == ("val", "test", "better", 3, 5)
    assert 0 < val.low < val.gain < val.high
    assert f"gain {val.gain:+.4f} ({val.low:+.4f} to {val.high:+.4f})" in best.gains[0]


def test_best_trial_confirmation_without_a_winner_is_the_base_and_says_so(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=2, seeds=4, epochs=3)
    rerun_all(ledger, CONFIRM, {})

    best = best_trial(ledger, config)

    assert best.is_base
    assert best.hyperparameters == config.base_hyperparameters()
    verdict = "keep the defaults: none of 2 candidates is shown to be better than the base over 4 seeds"
    assert best.verdict == verdict
    assert f"confirmation: {verdict}" in header(best)


def test_best_trial_named_is_that_one_and_its_reruns_are_told(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=1, seeds=4, epochs=3)
    rerun_all(ledger, CONFIRM, {})

    named, other = best_trial(ledger, config, 4), best_trial(ledger, config, 2)

    assert (named.trial_number, other.trial_number) == (4, 2)
    assert any(line.startswith("rerun on validation: no difference shown") for line in header(named))
    assert any(line.startswith("unconfirmed: ") for line in header(other))
    with pytest.raises(UserInputError, match=r"--trial: got 77; allowed: a complete trial \(0, 1, 2, 3, 4, 5\)"):
        best_trial(ledger, config, 77)


def test_best_trial_confirmation_under_way_is_unconfirmed(ledger: Ledger, config: StudyConfig) -> None:
    add_confirmation(ledger, config, top=1, seeds=4, epochs=3)

    best = best_trial(ledger, config)

    assert (best.trial_number, best.is_confirmed) == (5, False)
    assert any("nothing to compare yet: 0 of 8 reruns are complete" in line for line in header(best))
    assert any(line.startswith("unconfirmed: ") for line in header(best))
    assert latest_confirmation(ledger, config) is not None
    assert [ticket.kind for ticket in ledger.tickets("s", RERUN_KINDS)] == [CONFIRM] * 8
