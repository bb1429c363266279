"""The Optuna study: one trial per ticket, pruning decisions asked once, a mirror that can be repeated."""

import functools
import itertools
import math
import multiprocessing
import sqlite3
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState, create_trial

from search.config import SAMPLERS, StudyConfig, parse_study
from search.database import init_lock, named_lock
from search.errors import DatabaseError, StudyConfigError, UnknownStudyError
from search.space import base_params, distributions
from search.study import (
    ASKED_ATTR,
    TICKET_ATTR,
    AskedTrial,
    ask,
    check_sampler,
    create_pruner,
    create_sampler,
    create_study,
    delete_study,
    load_study,
    mirror_reports,
    open_storage,
    orphans,
    should_prune,
    tell,
    ticket_seed,
    trial_value,
)

SPACE = {"box": {"low": 0.02, "high": 0.2, "log": True}, "obj": {"low": 0.3, "high": 2.1, "step": 0.1}}
GRID = {"box": [0.05, 0.1, 0.2], "obj": [0.7, 1.0]}


@dataclass(frozen=True)
class Row:
    epoch: int
    value: float | None


def rows(*values: float | None) -> list[Row]:
    return [Row(epoch, value) for epoch, value in enumerate(values)]


def study_config(**changes: Any) -> StudyConfig:
    defaults = {"name": "s", "data": "builtin:digits", "train": {"epochs": 9}, "space": SPACE, "trials": 6}
    return parse_study({**defaults, **changes}, source="study.yaml")


@pytest.fixture
def storage(sqlite_url: str) -> optuna.storages.RDBStorage:
    return open_storage(sqlite_url)


def start(config: StudyConfig, storage: optuna.storages.RDBStorage) -> tuple[optuna.Study, AskedTrial]:
    base = create_study(config, storage)
    return load_study(config, storage), base


def stored(study: optuna.Study, trial_id: int) -> optuna.trial.FrozenTrial:
    return study._storage.get_trial(trial_id)


# ---- storage and studies ---------------------------------------------------------------------------------------------


def test_open_storage_sqlite_writes_ahead_and_begins_immediately(
    storage: optuna.storages.RDBStorage, tmp_path: Path
) -> None:
    assert sqlite3.connect(tmp_path / "study.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)

    with storage.engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")  # opens a transaction, which is a writing one from its start
        other = sqlite3.connect(tmp_path / "study.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_open_storage_foreign_schema_is_refused_and_untouched(sqlite_url: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("CREATE TABLE experiments (a)")
        connection.execute("CREATE TABLE runs (a)")

    with pytest.raises(DatabaseError, match="belongs to MLflow"):
        open_storage(sqlite_url)

    tables = sqlite3.connect(tmp_path / "study.db").execute("SELECT name FROM sqlite_master WHERE type='table'")
    assert sorted(tables) == [("experiments",), ("runs",)]


def test_create_study_makes_the_base_trial_zero_and_keeps_it_when_repeated(storage_url: str) -> None:
    config = study_config(base_hyp={"box": 0.07})
    storage = open_storage(storage_url)

    base = create_study(config, storage)
    again = create_study(config, storage)

    assert base == again
    assert (base.number, base.params) == (0, {"box": 0.07, "obj": 1.0})
    study = load_study(config, storage)
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    assert study.trials[0].user_attrs[TICKET_ATTR] == 0
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE


def test_load_study_unknown_name_is_one_line(storage: optuna.storages.RDBStorage) -> None:
    with pytest.raises(UnknownStudyError, match="study s: not in the database; allowed: "):
        load_study(study_config(), storage)


# ---- ask -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_ask_every_sampler_gives_distinct_points_of_the_space_without_warnings(
    storage: optuna.storages.RDBStorage, sampler: str
) -> None:
    config = study_config(sampler=sampler, space=GRID if sampler == "grid" else SPACE)
    space = distributions(config)
    check_sampler(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study, base = start(config, storage)
        asked = [base]
        for ticket in range(1, 6):
            asked.append(ask(study, config, ticket, linked={trial.trial_id for trial in asked}))
            if ticket > 2:
                tell(study, asked[ticket - 2].trial_id, "COMPLETE", asked[ticket - 2].params["box"])
        for trial in asked:
            tell(study, trial.trial_id, "COMPLETE", 0.5)

    assert [trial.number for trial in asked] == [0, 1, 2, 3, 4, 5]
    assert len({tuple(trial.params.values()) for trial in asked}) == 6
    for trial in asked:
        assert trial.params == stored(study, trial.trial_id).params
        assert list(trial.params) == list(space)
        assert all(space[key]._contains(space[key].to_internal_repr(value)) for key, value in trial.params.items())


def test_ask_ticket_beyond_the_grid_is_refused(storage: optuna.storages.RDBStorage) -> None:
    config = study_config(sampler="grid", space=GRID)
    study, _ = start(config, storage)

    with pytest.raises(StudyConfigError, match="ticket 6 is beyond the grid; allowed: 1 to 6"):
        ask(study, config, 6, linked=())


def test_ask_fixed_parameters_are_taken_and_completed_by_the_base(storage: optuna.storages.RDBStorage) -> None:
    config = study_config()
    study, base = start(config, storage)

    trial = ask(study, config, 1, linked={base.trial_id}, fixed_params={"box": 0.123})

    assert trial.params == {"box": 0.123, "obj": 1.0}
    assert stored(study, trial.trial_id).state is TrialState.RUNNING


def test_ask_again_after_a_crash_before_the_link_finds_the_same_trial(storage_url: str) -> None:
    config = study_config()
    study, base = start(config, open_storage(storage_url))

    lost = ask(study, config, 3, linked={base.trial_id})
    found = ask(study, config, 3, linked={base.trial_id})

    assert found == lost
    assert len(study.trials) == 2
    assert orphans(study, lambda _: {base.trial_id}) == (lost.trial_id,)
    assert orphans(study, lambda running: set(running)) == ()


def test_ask_after_a_crash_between_two_parameters_keeps_the_first(storage: optuna.storages.RDBStorage) -> None:
    config = study_config()
    study, base = start(config, storage)
    template = create_trial(state=TrialState.RUNNING, user_attrs={TICKET_ATTR: 1})
    trial_id = study._storage.create_new_trial(study._study_id, template_trial=template)
    optuna.Trial(study, trial_id).suggest_float("box", 0.02, 0.2, log=True)
    first = stored(study, trial_id).params["box"]

    trial = ask(study, config, 1, linked={base.trial_id})

    assert (trial.trial_id, trial.params["box"]) == (trial_id, first)
    assert 0.3 <= trial.params["obj"] <= 2.1
    assert stored(study, trial_id).params == trial.params


def test_ask_two_tickets_complete_one_trial_at_once_have_what_is_stored(
    storage: optuna.storages.RDBStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = study_config()
    study, base = start(config, storage)
    trial_id = study._storage.create_new_trial(
        study._study_id, template_trial=create_trial(state=TrialState.RUNNING, user_attrs={TICKET_ATTR: 1})
    )
    write = study._storage.set_trial_param

    def write_second(trial_id: int, name: str, value: float, distribution: Any) -> None:
        storage.set_trial_param(trial_id, name, 0.7 if name == "obj" else 0.1, distribution)
        write(trial_id, name, value, distribution)

    monkeypatch.setattr(study._storage, "set_trial_param", write_second)
    trial = ask(study, config, 1, linked={base.trial_id})

    assert trial.params == stored(study, trial_id).params == {"box": 0.1, "obj": 0.7}


@pytest.mark.parametrize(
    "sampler", [{"name": "tpe"}, {"name": "tpe", "multivariate": False}, {"name": "cmaes"}], ids=str
)
def test_ask_proposes_what_optuna_itself_would(storage: optuna.storages.RDBStorage, sampler: dict[str, Any]) -> None:
    config = study_config(sampler=sampler)
    study, base = start(config, storage)
    tell(study, base.trial_id, "COMPLETE", 0.0)
    space = distributions(config)
    for ticket in range(1, 25):
        twin = optuna.create_study(direction="maximize", sampler=create_sampler(config, ticket_seed(config, ticket)))
        twin.add_trials(study.trials)
        expected = optuna.Trial(twin, twin._storage.create_new_trial(twin._study_id))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = ask(study, config, ticket, linked=())
        assert trial.params == {key: expected._suggest(key, entry) for key, entry in space.items()}
        tell(study, trial.trial_id, "COMPLETE", -((trial.params["box"] - 0.1) ** 2) - (trial.params["obj"] - 1) ** 2)


def test_ask_adopts_another_tickets_orphan_unless_its_parameters_were_fixed(
    storage: optuna.storages.RDBStorage,
) -> None:
    config = study_config()
    study, base = start(config, storage)
    linked = {base.trial_id}
    fixed = ask(study, config, 1, linked=linked, fixed_params={"box": 0.1})
    free = ask(study, config, 2, linked=linked)

    assert ask(study, config, 4, linked=linked, fixed_params={"box": 0.15}).trial_id not in {
        fixed.trial_id,
        free.trial_id,
    }
    assert ask(study, config, 5, linked=linked) == free
    assert ask(study, config, 1, linked=linked, fixed_params={"box": 0.1}) == fixed


def test_ticket_seed_differs_between_tickets_studies_and_seeds() -> None:
    config = study_config()
    seeds = {ticket_seed(config, ticket) for ticket in range(1000)}

    assert len(seeds) == 1000
    assert ticket_seed(config, 1) == ticket_seed(study_config(), 1)
    assert ticket_seed(study_config(name="other"), 1) not in seeds
    assert ticket_seed(study_config(sampler={"name": "tpe", "seed": 1}), 1) not in seeds


def _create_and_ask(url: str, tickets: Sequence[int]) -> list[AskedTrial]:
    """What a worker does, in a process of its own: under locks, and knowing what others have linked."""
    config = study_config(trials=40)
    storage = open_storage(url)
    with init_lock(url):
        asked = [create_study(config, storage)]
    study = load_study(config, storage)
    for ticket in tickets:
        with named_lock(url, "ask", timeout=60):
            others = [trial._trial_id for trial in study.get_trials(deepcopy=False)]
            asked.append(ask(study, config, ticket, linked=others))
    return asked


def test_two_processes_on_an_empty_database_share_one_base_and_never_ask_the_same_point(storage_url: str) -> None:
    context = multiprocessing.get_context("spawn")

    with context.Pool(2) as pool:
        work = functools.partial(_create_and_ask, storage_url)
        first, second = pool.map(work, [range(1, 11, 2), range(2, 11, 2)], chunksize=1)

    assert first[0] == second[0]
    asked = [first[0], *first[1:], *second[1:]]
    assert sorted(trial.number for trial in asked) == list(range(11))
    assert len({tuple(trial.params.values()) for trial in asked}) == 11


# ---- the mirror ------------------------------------------------------------------------------------------------------


def test_mirror_reports_repeated_changes_nothing(storage_url: str) -> None:
    config = study_config()
    study, base = start(config, open_storage(storage_url))

    mirror_reports(study, base.trial_id, rows(0.1, 0.2, None, math.nan, 0.4))
    mirror_reports(study, base.trial_id, rows(0.1, 0.2, None, math.nan, 0.4))
    assert stored(study, base.trial_id).intermediate_values == {1: 0.1, 2: 0.2, 5: 0.4}
    mirror_reports(study, base.trial_id, rows(0.1, 0.2, None, math.nan, 0.4, 0.5))
    assert stored(study, base.trial_id).intermediate_values == {1: 0.1, 2: 0.2, 5: 0.4, 6: 0.5}


def test_mirror_reports_finished_trial_stays_as_it_is(storage: optuna.storages.RDBStorage) -> None:
    study, base = start(study_config(), storage)
    tell(study, base.trial_id, "COMPLETE", 0.5)

    mirror_reports(study, base.trial_id, rows(0.1))
    assert stored(study, base.trial_id).intermediate_values == {}


@pytest.mark.parametrize(
    ("state", "value", "expected", "kept"),
    [
        ("COMPLETE", 0.5, TrialState.COMPLETE, 0.5),
        ("COMPLETE", math.nan, TrialState.FAIL, None),
        ("COMPLETE", math.inf, TrialState.FAIL, None),
        ("COMPLETE", None, TrialState.FAIL, None),
        ("PRUNED", None, TrialState.PRUNED, 0.2),
        ("PRUNED", 0.7, TrialState.PRUNED, 0.2),
        ("FAIL", None, TrialState.FAIL, None),
    ],
)
def test_tell_each_state_once_and_for_all(
    storage: optuna.storages.RDBStorage, state: str, value: float | None, expected: TrialState, kept: float | None
) -> None:
    study, base = start(study_config(), storage)
    mirror_reports(study, base.trial_id, rows(0.3, 0.2))

    tell(study, base.trial_id, state, value)
    tell(study, base.trial_id, "COMPLETE", 0.9)

    trial = stored(study, base.trial_id)
    assert (trial.state, trial.values) == (expected, None if kept is None else [kept])


@pytest.mark.parametrize(
    ("at", "values", "expected"),
    [
        ("last", (0.1, 0.5, 0.3), (0.3, 2)),
        ("best", (0.1, 0.5, 0.3), (0.5, 1)),
        ("best", (0.1, 0.5, 0.5), (0.5, 1)),
        ("best", (0.1, None, math.nan), (0.1, 0)),
        ("last", (0.1, None), None),
        ("last", (), None),
        ("best", (None, math.nan), None),
    ],
)
def test_trial_value_counts_the_last_or_the_best_epoch(
    at: str, values: tuple[float | None, ...], expected: tuple[float, int] | None
) -> None:
    objective = study_config(objective={"metric": "fitness", "at": at}).objective

    assert trial_value(objective, rows(*values)) == expected
    assert trial_value(objective, rows(*values)[::-1]) == expected


# ---- pruning ---------------------------------------------------------------------------------------------------------


def start_trials(
    study: optuna.Study, config: StudyConfig, base: AskedTrial, histories: Sequence[Sequence[float]]
) -> list[AskedTrial]:
    """Trials 1, 2, ... with their values mirrored."""
    trials: list[AskedTrial] = []
    for ticket, history in enumerate(histories, 1):
        linked = {base.trial_id, *(trial.trial_id for trial in trials)}
        trials.append(ask(study, config, ticket, linked=linked))
        mirror_reports(study, trials[-1].trial_id, rows(*history))
    return trials


def test_should_prune_median_stops_what_is_below_the_finished_trials(storage_url: str) -> None:
    config = study_config(pruner={"name": "median", "min_epochs": 2, "n_startup_trials": 2})
    study, base = start(config, open_storage(storage_url))
    histories = [(0.2, 0.3, 0.4), (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), (0.5, 0.5, 0.55)]
    good, better, bad, fine = start_trials(study, config, base, histories)

    assert not should_prune(study, config, bad.trial_id, 3)  # no trial has finished
    tell(study, good.trial_id, "COMPLETE", 0.9)
    tell(study, better.trial_id, "COMPLETE", 0.9)

    assert should_prune(study, config, bad.trial_id, 3)
    assert not should_prune(study, config, fine.trial_id, 3)


def test_should_prune_before_the_first_rung_and_at_the_last_epoch_is_false(storage: optuna.storages.RDBStorage) -> None:
    config = study_config(train={"epochs": 4}, pruner={"name": "threshold", "lower": 0.5, "min_epochs": 2})
    study, base = start(config, storage)
    trial = ask(study, config, 1, linked={base.trial_id})
    decisions = []
    for epoch in range(4):
        mirror_reports(study, trial.trial_id, [Row(epoch, 0.1)])
        decisions.append(should_prune(study, config, trial.trial_id, epoch + 1))

    assert decisions == [False, True, True, False]


def test_should_prune_never_stops_the_base_but_fills_its_rungs(storage: optuna.storages.RDBStorage) -> None:
    config = study_config(pruner={"name": "asha", "min_epochs": 1})
    study, base = start(config, storage)
    first, second = start_trials(study, config, base, [(0.9,), (0.5,)])
    assert not should_prune(study, config, first.trial_id, 1)

    mirror_reports(study, base.trial_id, rows(0.1))

    assert not should_prune(study, config, base.trial_id, 1)
    assert stored(study, base.trial_id).system_attrs["completed_rung_0"] == 0.1
    assert should_prune(study, config, second.trial_id, 1)


def test_should_prune_never_stops_a_retry_of_the_base(storage: optuna.storages.RDBStorage) -> None:
    config = study_config(pruner={"name": "threshold", "lower": 1.0, "min_epochs": 1})
    study, _ = start(config, storage)
    retry = ask(study, config, 1, linked=(), fixed_params=base_params(config))
    other = ask(study, config, 2, linked=(retry.trial_id,))
    for trial in (retry, other):
        mirror_reports(study, trial.trial_id, rows(0.1))

    assert not should_prune(study, config, retry.trial_id, 1)
    assert should_prune(study, config, other.trial_id, 1)


@pytest.mark.parametrize("pruner", ["asha", "hyperband"])
def test_should_prune_asked_again_after_a_lost_answer_says_the_same(
    storage: optuna.storages.RDBStorage, pruner: str
) -> None:
    config = study_config(train={"epochs": 9}, pruner={"name": pruner, "min_epochs": 3})
    study, base = start(config, storage)
    histories = [(0.6, 0.7, 0.8)] * 4 + [(0.1, 0.1, 0.1)] * 4
    trials = start_trials(study, config, base, histories)

    answers = [should_prune(study, config, trial.trial_id, 3) for trial in trials]
    repeated = [should_prune(study, config, trial.trial_id, 3) for trial in trials]

    assert answers == repeated
    assert any(answers)
    assert not all(answers)


def test_should_prune_asked_again_does_not_count_its_own_rung_as_a_rival(storage: optuna.storages.RDBStorage) -> None:
    config = study_config(pruner={"name": "asha", "min_epochs": 1, "reduction_factor": 2})
    study, base = start(config, storage)
    trial, *others = reversed(start_trials(study, config, base, [(0.4,), (0.6,), (0.5,)]))
    for other in others:
        should_prune(study, config, other.trial_id, 1)

    # One of three goes on. Counted twice it would be the second of four.
    assert [should_prune(study, config, trial.trial_id, 1) for _ in range(2)] == [True, True]


def test_optuna_asha_asked_twice_contradicts_itself(storage: optuna.storages.RDBStorage) -> None:
    """Why `should_prune` remembers its rungs; if this fails, Optuna has changed and the memory may go."""
    config = study_config(train={"epochs": 9}, pruner={"name": "asha", "min_epochs": 3})
    study, base = start(config, storage)
    good, bad = start_trials(study, config, base, [(0.6, 0.7, 0.8), (0.1, 0.1, 0.1)])
    study.pruner.prune(study, stored(study, good.trial_id))

    answers = [study.pruner.prune(study, stored(study, bad.trial_id)) for _ in range(2)]

    assert answers == [True, False]


def test_should_prune_keeps_rungs_of_earlier_epochs(storage: optuna.storages.RDBStorage) -> None:
    config = study_config(train={"epochs": 9}, pruner={"name": "asha", "min_epochs": 1})
    study, base = start(config, storage)
    (trial,) = start_trials(study, config, base, [(0.5,)])
    for epoch in range(3):
        mirror_reports(study, trial.trial_id, [Row(epoch, 0.5 + epoch / 10)])
        assert not should_prune(study, config, trial.trial_id, epoch + 1)

    attrs = stored(study, trial.trial_id).system_attrs
    assert {key: attrs[key] for key in attrs if key.startswith("completed")} == {
        "completed_rung_0": 0.5,
        "completed_rung_1": 0.7,
    }
    assert stored(study, trial.trial_id).user_attrs[ASKED_ATTR] == {"step": 3, "rungs": ["completed_rung_0"]}


@pytest.mark.parametrize(
    ("pruner", "expected"),
    [
        ("none", "NopPruner"),
        ("median", "MedianPruner"),
        ("asha", "SuccessiveHalvingPruner"),
        ("hyperband", "HyperbandPruner"),
        ({"name": "threshold", "upper": 1}, "ThresholdPruner"),
        ({"name": "patient", "patience": 2, "wrapped": "median"}, "PatientPruner"),
    ],
)
def test_create_pruner_of_each_name(pruner: Any, expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(create_pruner(study_config(pruner=pruner))).__name__ == expected


def test_should_prune_patient_waits_for_its_patience(storage: optuna.storages.RDBStorage) -> None:
    config = study_config(pruner={"name": "patient", "patience": 2, "min_epochs": 1})
    study, base = start(config, storage)
    (trial,) = start_trials(study, config, base, [()])
    decisions = []
    for epoch, value in enumerate([0.5, 0.4, 0.4, 0.4, 0.4]):
        mirror_reports(study, trial.trial_id, [Row(epoch, value)])
        decisions.append(should_prune(study, config, trial.trial_id, epoch + 1))

    assert decisions == [False, False, False, True, True]


# ---- outages ---------------------------------------------------------------------------------------------------------


class Cutter:
    """Ends the database's other connections just before the n-th statement of an engine."""

    def __init__(self, url: str, engine: sa.Engine) -> None:
        self.url = url
        self.left = -1
        sa.event.listen(engine, "before_cursor_execute", self.count)

    def count(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
            with psycopg.connect(self.url, autocommit=True) as connection:
                connection.execute(f"{query} AND pid <> pg_backend_pid()")

    def each(self, operation: Callable[[int], None], stride: int = 1) -> int:
        """Runs `operation` with the connection cut before its 1st, (1 + stride)th, ... statement, to its last.

        Returns:
            How often it was cut.
        """
        for cuts in itertools.count():
            self.left = 1 + cuts * stride
            operation(cuts + 1)
            if self.left > 0:
                return cuts
        raise AssertionError


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_call_survives_a_connection_cut_before_any_of_its_statements(postgres_url: str, stride: int) -> None:
    config = study_config(pruner={"name": "asha", "min_epochs": 1}, sampler="random")
    storage = open_storage(postgres_url)
    study, base = start(config, storage)
    cutter = Cutter(postgres_url, storage.engine)
    asked = {0: base}

    def ask_next(ticket: int) -> None:
        asked[ticket] = ask(study, config, ticket, linked={trial.trial_id for trial in asked.values()})

    cut_asks = cutter.each(ask_next, stride)
    cut_reports = cutter.each(lambda epoch: mirror_reports(study, base.trial_id, [Row(epoch - 1, 0.1)]))
    cutter.left = 3
    assert not should_prune(study, config, base.trial_id, 1)
    tickets = iter(asked.values())
    cut_tells = cutter.each(lambda _: tell(study, next(tickets).trial_id, "COMPLETE", 0.5), stride)
    for trial in tickets:
        tell(study, trial.trial_id, "COMPLETE", 0.5)

    trials = load_study(config, open_storage(postgres_url)).trials
    assert cut_asks * stride >= 10
    assert cut_reports >= 3
    assert cut_tells >= 2
    assert [trial.number for trial in trials] == [asked[ticket].number for ticket in range(cut_asks + 2)]
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert trials[0].intermediate_values == dict.fromkeys(range(1, cut_reports + 2), 0.1)


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_delete_study_takes_its_trials_and_leaves_other_studies(storage_url: str) -> None:
    storage = open_storage(storage_url)
    kept, gone = study_config(name="kept"), study_config(name="gone")
    for config in (kept, gone):
        create_study(config, storage)
    assert delete_study("gone", storage)
    assert not delete_study("gone", storage)
    with pytest.raises(UnknownStudyError):
        load_study(gone, storage)
    assert len(load_study(kept, storage).trials) == 1
    with sa.create_engine(storage_url).connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM trials")).scalar() == 1
        assert connection.execute(sa.text("SELECT count(*) FROM trial_params")).scalar() == 2


CONDITIONAL = {"box": SPACE["box"], "fl_gamma": {"low": 0.3, "high": 2.0, "off": 0.25}, "obj": SPACE["obj"]}


def planted(params: dict[str, float]) -> float:
    """Best with the focal loss on, at 1.2, and with a large box gain."""
    focal = 1.0 - abs(params["fl_gamma"] - 1.2) if params["fl_gamma.switch"] > 0.25 else -1.0
    return focal + math.log(params["box"])


@pytest.mark.parametrize("sampler", ["tpe", {"name": "tpe", "multivariate": False}, "random", "qmc"])
def test_ask_conditional_key_is_there_only_where_its_switch_is_on(tmp_path: Path, sampler: Any) -> None:
    config = study_config(space=CONDITIONAL, sampler=sampler, trials=60)
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    base = create_study(config, storage)
    study = load_study(config, storage)
    tell(study, base.trial_id, "COMPLETE", planted(base.params))

    for number in range(1, 60):
        asked = ask(study, config, number, linked=())
        tell(study, asked.trial_id, "COMPLETE", planted(asked.params))

    trials = study.get_trials()
    assert trials[0].params == base_params(config) == {"box": 0.05, "fl_gamma.switch": 0.125, "obj": 1.0}
    for trial in trials:
        on = trial.params["fl_gamma.switch"] == 0.625
        assert on or trial.params["fl_gamma.switch"] == 0.125
        assert list(trial.params) == ["box", "fl_gamma.switch", *(["fl_gamma"] if on else []), "obj"]
    off = [trial for trial in trials[1:] if "fl_gamma" not in trial.params]
    if sampler == "tpe":
        # It has learned both levels: the switch, and the value of those that have one.
        late = trials[40:]
        assert sum("fl_gamma" in trial.params for trial in late) >= 16
        assert math.dist([1.2], [sorted(t.params.get("fl_gamma", 0.0) for t in late)[10]]) < 0.25
    elif sampler in ("random", "qmc"):
        # A quarter, as `off` says: 14.75 of 59 expected, with a standard deviation of 3.3.
        assert 5 <= len(off) <= 25


def test_ask_fixed_parameters_may_switch_a_key_on_or_off(tmp_path: Path) -> None:
    config = study_config(space=CONDITIONAL)
    storage = open_storage(f"sqlite:///{tmp_path}/s.db")
    create_study(config, storage)
    study = load_study(config, storage)

    on = ask(study, config, 1, linked=(), fixed_params={"fl_gamma": 1.5})
    off = ask(study, config, 2, linked=(), fixed_params={"fl_gamma": 0.0, "box": 0.1})

    assert on.params == {"box": 0.05, "fl_gamma.switch": 0.625, "fl_gamma": 1.5, "obj": 1.0}
    assert off.params == {"box": 0.1, "fl_gamma.switch": 0.125, "obj": 1.0}
    with pytest.raises(StudyConfigError, match="fixed parameter fl_gamma: missing, although it is switched on"):
        ask(study, config, 3, linked=(), fixed_params={"fl_gamma.switch": 0.9})
