"""When a study ends before its budget is spent: by time, by noise, by command; and how it is taken up again."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from tiny import NAME, TinyStudy, make_study, wait_for

from search.config import parse_study
from search.errors import StudyStoppedError, UserInputError
from search.launch.prepare import create_or_resume, plan_study
from search.ledger import NOISE, StopKind, StudyRecord, Ticket, TicketState
from search.report import headline, study_status
from search.stopping import LEAST_TRIALS, StoppingRules, gain_left, measured_noise, out_of_time, require_noise
from search.study import load_study, open_storage, tell
from search.worker.linking import link_trial

START = 1_700_000_000.0
SPACE = {key: FloatDistribution(0.0, 1.0) for key in "abcde"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("MLFLOW_TRACKING_URI", "YOLOSEARCH_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyStudy]:
    shared = tmp_path_factory.getbasetemp()
    return lambda **options: make_study(tmp_path / "study", shared, **options)


# ---- rules -----------------------------------------------------------------------------------------------------------


def record(**changes: Any) -> StudyRecord:
    return StudyRecord(**{"name": "s", "config": {}, "fingerprint": "f", "versions": {}, "created": START, **changes})


def test_out_of_time_counts_from_the_creation_or_from_when_it_was_taken_up() -> None:
    assert out_of_time(record(), START + 3599, 1.0) is None
    stop = out_of_time(record(), START + 3600, 1.0)
    assert stop is not None
    assert (stop.kind, stop.reason) == (StopKind.TIME, "its 1 hours are over (stop.hours)")
    assert out_of_time(record(resumed=START + 3000), START + 3600, 1.0) is None


def simulated(count: int, depth: float, noise: float) -> list[optuna.trial.FrozenTrial]:
    """Trials at random points of a bowl of this depth, seen with noise."""
    draw = np.random.default_rng(3)
    trials = []
    for _ in range(count):
        params = {key: float(draw.random()) for key in SPACE}
        value = 0.36 - depth * sum((x - 0.6) ** 2 for x in params.values()) + draw.normal(0, noise)
        trials.append(create_trial(params=params, distributions=SPACE, value=value, state=TrialState.COMPLETE))
    return trials


def test_gain_left_where_nothing_matters_is_below_the_noise_and_where_much_does_it_is_not() -> None:
    assert gain_left(simulated(60, depth=0.0, noise=0.014)) < 0.014
    assert gain_left(simulated(60, depth=1.0, noise=0.014)) > 5 * 0.014


def noise_tickets(study: TinyStudy, values: list[float]) -> tuple[Ticket, ...]:
    study.ledger.add_tickets(NAME, len(values), kind=NOISE, fixed_params=[{}] * len(values))
    for value in values:
        (ticket,) = study.ledger.claim(NAME, "noisy", 1, 60.0, kind=NOISE)
        study.ledger.finish(ticket, TicketState.COMPLETE, value, None, 1)
    return study.ledger.tickets(NAME, (NOISE,))


def test_measured_noise_is_the_spread_of_the_noise_tickets(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()

    assert measured_noise(noise_tickets(study, [0.30, 0.34])) is None
    assert measured_noise(noise_tickets(study, [0.32])) == pytest.approx(0.02)


def test_require_noise_without_any_is_one_line(make: Callable[..., TinyStudy]) -> None:
    study = make(stop={"below_noise": True})

    with pytest.raises(UserInputError, match=r"stop\.below_noise: got true, and nothing measures the noise; allowed: "):
        study.create()
    study.write()
    study.create()
    study.write(stop={"below_noise": True})
    noise_tickets(study, [0.30, 0.34, 0.32])
    require_noise(study.config, study.ledger)
    assert study.create() is False
    assert study.ledger.study(NAME).config["stop"] == {"hours": None, "below_noise": True}


def finish_trials(study: TinyStudy, count: int, value: Callable[[dict[str, float]], float]) -> None:
    """Ends the next trials with made-up values, in the ledger and in Optuna."""
    optuna_study = load_study(study.config, open_storage(study.storage_url))
    for ticket in study.ledger.claim(NAME, "here", count, 60.0):
        ticket = link_trial(study.ledger, optuna_study, study.config, ticket)
        assert ticket.params is not None
        assert ticket.trial_id is not None
        result = value(ticket.params)
        study.ledger.finish(ticket, TicketState.COMPLETE, result, None, 1)
        tell(optuna_study, ticket.trial_id, "COMPLETE", result)


def rules_of(study: TinyStudy) -> StoppingRules:
    config = study.config
    return StoppingRules(config, study.ledger, load_study(config, open_storage(study.storage_url)))


def test_stopping_rules_end_a_study_in_which_nothing_matters_but_chance(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=60)
    study.create()
    noise_tickets(study, [0.30, 0.34, 0.32, 0.33])
    study.write(trials=60, stop={"below_noise": True})
    draw, rules = np.random.default_rng(0), rules_of(study)
    values = lambda _: 0.32 + float(draw.normal(0, 0.017))  # noqa: E731

    finish_trials(study, LEAST_TRIALS - 1, values)
    early = rules.apply()
    finish_trials(study, 31, values)

    assert early is False
    assert rules.apply() is True
    stored = study.ledger.study(NAME)
    assert stored.stop_kind is StopKind.NOISE
    assert stored.stop_reason is not None
    assert "less than the noise of a rerun (0.0171, stop.below_noise) after 50 complete trials" in stored.stop_reason
    assert "stopped: at most 0.0" in headline(study_status(study.ledger, study.config))
    with pytest.raises(StudyStoppedError) as error:
        study.ledger.claim(NAME, "here", 1, 60.0)
    assert error.value.planned

    # Taken up again it gets a few more trials before it is judged again.
    study.ledger.stop(NAME, None)
    finish_trials(study, 1, values)
    assert rules.apply() is False
    assert study.ledger.study(NAME).stop_kind is None


def test_stopping_rules_let_a_study_go_on_that_has_much_to_gain(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=30)
    study.create()
    noise_tickets(study, [0.300, 0.301, 0.302])
    study.write(trials=30, stop={"below_noise": True})

    finish_trials(study, 25, lambda params: -abs(math.log(params["box"] / 0.03)) - abs(math.log(params["cls"])))

    assert rules_of(study).apply() is False
    assert study.ledger.study(NAME).stop_kind is None


def test_stop_section_unknown_key_and_bad_value_are_one_line_each() -> None:
    document = {"name": "s", "data": "builtin:digits", "space": {"box": [0.05, 0.1]}, "trials": 3}

    with pytest.raises(UserInputError) as error:
        parse_study({**document, "stop": {"hour": 1, "hours": 0}}, source="study.yaml")

    first, second = sorted(str(error.value).splitlines())
    assert first.startswith("study.yaml: stop.hour: unknown key (value 1), did you mean hours?")
    assert second == "study.yaml: stop.hours: got 0; allowed: a number > 0"


# ---- with real workers -----------------------------------------------------------------------------------------------


def test_run_worker_hours_that_are_over_end_it_well_and_a_resume_goes_on(make: Callable[..., TinyStudy]) -> None:
    study = make(tracked=True, trials=3, stop={"hours": 1e-6})
    study.create()

    assert study.work("first") == 0

    status = study_status(study.ledger, study.config)
    assert (status.stop_kind, status.over, status.finished) == (StopKind.TIME, True, False)
    study.write(trials=3, tracking={"enabled": True, "review": False}, stop={"hours": 5.0})
    assert study.create() is False
    assert study.work("second") == 3
    assert study.ledger.study(NAME).stop_reason is None
    assert study.mlflow_runs()["summary"].info.status == "FINISHED"


def test_stop_command_lets_running_trials_end_and_the_worker_ends_well(make: Callable[..., TinyStudy]) -> None:
    # Long enough for the command to start while the first trials train, whatever the machine.
    study = make(tracked=True, trials=6, train={"epochs": 60, "pack": 2, "eval_every": 10})
    run = study.start("run")
    wait_for(lambda: any(ticket.epochs_done >= 1 for ticket in study.tickets()), run)

    stopped = study.start("stop", "--json")
    told = json.loads(stopped.communicate(timeout=300)[0])
    output, _ = run.communicate(timeout=300)

    assert run.returncode == 0, output
    assert told["stopped"] == "by `yolosearch stop`"
    states = study.states()
    assert states.count(TicketState.RUNNING) == 0
    assert states.count(TicketState.COMPLETE) >= told["running"] >= 1
    assert states.count(TicketState.WAITING) >= 1
    assert [ticket.attempt for ticket in study.tickets() if ticket.state is TicketState.COMPLETE] == [1] * states.count(
        TicketState.COMPLETE
    )
    assert "stopped: by `yolosearch stop`" in output
    assert "best hyp:" in output
    summary = study.mlflow_runs()["summary"]
    assert (summary.info.status, summary.data.tags["yolosearch.stopped"]) == ("FINISHED", "by `yolosearch stop`")


def test_stop_now_hands_running_trials_back_and_resume_continues_them(make: Callable[..., TinyStudy]) -> None:
    study = make(trials=2, train={"epochs": 400, "pack": 2})
    run = study.start("run")
    wait_for(lambda: [ticket.epochs_done >= 1 for ticket in study.tickets()] == [True] * 2, run)

    study.start("stop", "--now").communicate(timeout=300)
    output, _ = run.communicate(timeout=300)

    assert run.returncode == 0, output
    tickets = study.tickets()
    assert study.states() == [TicketState.WAITING] * 2
    assert [ticket.history for ticket in tickets] == [(), ()]
    assert all(1 <= ticket.epochs_done < 400 for ticket in tickets)
    assert "nothing exported" in output

    # A worker that comes meanwhile ends at once, and well.
    worker = study.start("worker")
    text, _ = worker.communicate(timeout=300)
    assert (worker.returncode, study.states()) == (0, [TicketState.WAITING] * 2), text
    resumed, _ = study.start("resume").communicate(timeout=300)
    assert "goes on" in resumed
    taken = study.ledger.claim(NAME, "next", 2, 60.0)
    assert [ticket.epochs_done for ticket in taken] == [ticket.epochs_done for ticket in tickets]


def test_create_or_resume_takes_up_a_stopped_study(make: Callable[..., TinyStudy]) -> None:
    study = make()
    study.create()
    study.ledger.stop(NAME, "by `yolosearch stop`", StopKind.ASKED)

    assert create_or_resume(plan_study(study.config, study.storage_url, study.runs)) is False

    stored = study.ledger.study(NAME)
    assert (stored.stop_kind, stored.stop_reason) == (None, None)
    assert stored.resumed is not None
