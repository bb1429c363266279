"""The Optuna study: who proposes, who prunes, and the mirror of the ledger's trials.

Optuna holds a copy of what the ledger knows, in the form that samplers and pruners read. Every function here can be
repeated without changing the outcome, and waits out a database that is away for a while.

Three rules make many workers safe:

- `ask` is called with a ticket in hand and needs no lock: a trial appears with its ticket's number and all its
  parameters in one transaction, so that after a crash the same ticket finds it again, and the ledger's link decides
  who owns it.
- The sampler of ticket n is seeded from the study's name, its seed and n. Two workers that shared a seed would propose
  the same point; here a repeat of the same ticket does, and nobody else.
- Steps are epochs done, counted from 1, on the study-wide grid of evaluated epochs.
"""

import copy
import hashlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, Protocol, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, distribution_to_json
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb import storage as rdb
from optuna.trial import FrozenTrial, TrialState

from search.config import StudyConfig, conditional_keys
from search.database import (
    committing,
    configure_sqlite,
    database_errors,
    engine_options,
    init_lock,
    make_engine,
    mask_url,
    refuse_foreign_schema,
    retry,
    watch_commits,
)
from search.errors import DatabaseError, StudyConfigError, UnknownStudyError, UserInputError, install_extra
from search.pareto import non_dominated
from search.settings import (
    AshaPruner,
    CmaesSampler,
    GpSampler,
    GridSampler,
    HyperbandPruner,
    MedianPruner,
    NonePruner,
    Nsga2Sampler,
    ObjectiveConfig,
    PatientPruner,
    PrunerConfig,
    QmcSampler,
    RandomSampler,
    ThresholdPruner,
    TpeSampler,
)
from search.space import base_params, complete_params, distributions, grid_points, settled
from search.transforms import active_keys, is_off

PATIENCE_SECONDS = 600.0
"""How long a storage call is retried while the database is away."""

GRPC_VARIABLE = "YOLOSEARCH_OPTUNA_GRPC"
GRPC_SECONDS = 30.0

TICKET_ATTR = "yolosearch:ticket"
"""Attribute of a trial: number of the ticket that it was created for."""

FIXED_ATTR = "yolosearch:fixed"
"""Attribute of a trial whose parameters belong to its ticket alone."""

ASKED_ATTR = "yolosearch:asked"
"""Attribute of a trial: the step at which its pruner was asked last, and the rungs it had before."""

PRIOR_ATTR = "yolosearch:prior"
"""Attribute of a study: finished trials of other studies, as [parameters, value]; only the sampler sees them."""

TPE_HISTORY = 1000
"""Trials that TPE learns from: the best `TPE_BEST` and the latest. A study of up to so many is used whole."""

TPE_BEST = 100
"""Many more than the 25 that TPE counts as good, so that these are the same ones with and without the limit."""

_RUNG_PREFIX = "completed_rung_"
_UNBORN = -1
"""Id of a trial that the sampler proposes to and that is not in the storage yet."""

T = TypeVar("T")


class AskedTrial(NamedTuple):
    """A trial in Optuna, ready to be linked to its ticket."""

    trial_id: int
    number: int
    params: dict[str, Any]


class Report(Protocol):
    """An evaluated epoch as the ledger stores it."""

    @property
    def epoch(self) -> int:
        """Epoch, counted from 0."""

    @property
    def value(self) -> float | None:
        """The objective; None if it was not finite."""


# ---- storage ---------------------------------------------------------------------------------------------------------


def open_worker_storage(url: str) -> BaseStorage:
    """Optuna's tables for a worker: through the gRPC proxy that `YOLOSEARCH_OPTUNA_GRPC` names, else as `open_storage`.

    Raises:
        UserInputError: the variable is not `host:port`, or the packages for it are missing.
        DatabaseError: nobody answers there.
    """
    address = os.environ.get(GRPC_VARIABLE)
    if not address:
        return open_storage(url)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserInputError(f"{GRPC_VARIABLE}: {address!r}; allowed: HOST:PORT of `python -m search.optuna_proxy`")
    if importlib.util.find_spec("grpc") is None:
        raise UserInputError(f"{GRPC_VARIABLE} needs packages that are not installed: {install_extra('grpc')}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    try:
        proxy.wait_server_ready(timeout=GRPC_SECONDS)
    except ConnectionError:
        raise DatabaseError(f"{GRPC_VARIABLE}: nobody answers at {address} for {GRPC_SECONDS:g} s") from None
    return proxy


def open_storage(url: str, connections: int | None = None) -> RDBStorage:
    """Optuna's tables in the database, created under a lock if they are missing.

    SQLite gets WAL and BEGIN IMMEDIATE, PostgreSQL connections that are tested before use.

    Args:
        url: of the database.
        connections: how many to keep where many threads share this storage; by default as few as a worker needs.

    Raises:
        DatabaseError: the database cannot be reached, or its schema belongs to something else.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    refuse_foreign_schema(make_engine(url, pooled=False))
    try:
        with database_errors(url), init_lock(url):
            storage = RDBStorage(url, engine_kwargs=engine_options(url, connections))
            configure_sqlite(storage.engine)
            watch_commits(storage.engine)
    except (StorageInternalError, RuntimeError) as error:
        raise DatabaseError(f"{mask_url(url)}: {_first_line(error.__cause__ or error)}") from error
    return storage


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return mask_url(lines[0].strip()) if lines else type(error).__name__


def _retry(operation: Callable[[], T], patience: float = PATIENCE_SECONDS) -> T:
    """Repeats an idempotent storage call while the database is away.

    Raises:
        DatabaseError: it was still away after `patience` seconds.
    """
    return retry(operation, patience, gives_up=_gone)


def _gone(error: Exception, patience: float) -> DatabaseError:
    reason = _first_line(error.__cause__ or error)
    return DatabaseError(f"the study's database did not answer for {patience:g} s: {reason}")


# ---- samplers and pruners --------------------------------------------------------------------------------------------


def ticket_seed(config: StudyConfig, ticket_number: int) -> int:
    """The sampler's seed for one ticket, 32 bits: a function of the study's name, its seed and the ticket's number."""
    text = f"{config.name}:{config.sampler.seed}:{ticket_number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def check_sampler(config: StudyConfig) -> None:
    """Call before the start: samplers import what they need only in mid-study.

    Raises:
        StudyConfigError: a package that the sampler needs is not installed.
    """
    needs = {"gp": ("torch", "scipy"), "cmaes": ("cmaes",), "qmc": ("scipy",)}.get(config.sampler.name, ())
    for package in needs:
        if importlib.util.find_spec(package) is None:
            name = config.sampler.name
            raise StudyConfigError(
                f"study {config.name}: sampler.name: {name} needs the package {package}, which is not installed; "
                f"allowed: pip install {package}, or another sampler"
            )


def create_sampler(config: StudyConfig, seed: int) -> BaseSampler:
    """The study's sampler.

    Args:
        config: the study.
        seed: `ticket_seed` of the ticket it will serve. A QMC sequence is the study's own and takes the study's seed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _create_sampler(config, seed)


def _create_sampler(config: StudyConfig, seed: int) -> BaseSampler:
    samplers = optuna.samplers
    options = config.sampler.model_dump(exclude={"name", "seed"})
    match config.sampler:
        case TpeSampler():
            return samplers.TPESampler(seed=seed, group=_groups(config), **options)
        case GpSampler():
            return samplers.GPSampler(seed=seed, warn_independent_sampling=False, **options)
        case CmaesSampler():
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, **options)
        case Nsga2Sampler():
            return samplers.NSGAIISampler(seed=seed, **options)
        case QmcSampler():
            return samplers.QMCSampler(seed=config.sampler.seed, warn_independent_sampling=False, **options)
        case RandomSampler() | GridSampler():
            return samplers.RandomSampler(seed=seed)


def create_pruner(config: StudyConfig) -> BasePruner:
    """The study's pruner; its steps are epochs done."""
    return _create_pruner(config.pruner, config.train.epochs)


def _create_pruner(pruner: PrunerConfig, epochs: int) -> BasePruner:
    pruners = optuna.pruners
    if isinstance(pruner, NonePruner):
        return pruners.NopPruner()
    first = pruner.min_epochs or 1
    options = pruner.model_dump(exclude={"name", "min_epochs", "wrapped"})
    match pruner:
        case MedianPruner():
            return pruners.MedianPruner(n_warmup_steps=first, **options)
        case AshaPruner():
            return pruners.SuccessiveHalvingPruner(min_resource=first, **options)
        case HyperbandPruner():
            return pruners.HyperbandPruner(min_resource=first, max_resource=epochs, **options)
        case ThresholdPruner():
            return pruners.ThresholdPruner(n_warmup_steps=first, **options)
        case PatientPruner():
            wrapped = None if pruner.wrapped is None else _create_pruner(pruner.wrapped, epochs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return pruners.PatientPruner(wrapped, **options)


# ---- studies ---------------------------------------------------------------------------------------------------------


def create_study(config: StudyConfig, storage: BaseStorage) -> AskedTrial:
    """Create the Optuna study and its trial 0, the base; what exists already is kept.

    Call it under `init_lock`: of two processes that create a study at once, one has to see the other's trial.

    Returns:
        Trial 0, RUNNING, to be linked to ticket 0.
    """
    study = _retry(
        lambda: optuna.create_study(
            study_name=config.name,
            storage=storage,
            directions=["maximize"] * len(config.all_objectives),
            sampler=create_sampler(config, ticket_seed(config, 0)),
            pruner=create_pruner(config),
            load_if_exists=True,
        )
    )
    return ask(study, config, 0, linked=())


def load_study(config: StudyConfig, storage: BaseStorage) -> optuna.Study:
    """The Optuna study of a configuration, with its pruner.

    Raises:
        UnknownStudyError: the database has no study of that name.
    """
    sampler = create_sampler(config, ticket_seed(config, 0))
    try:
        return _retry(
            lambda: optuna.load_study(
                study_name=config.name, storage=storage, sampler=sampler, pruner=create_pruner(config)
            )
        )
    except KeyError:
        raise UnknownStudyError(
            f"study {config.name}: not in the database; allowed: a study that `run` created"
        ) from None


def delete_study(name: str, storage: BaseStorage) -> bool:
    """Delete the Optuna study with its trials; False if there is none of that name."""

    def delete() -> bool:
        try:
            optuna.delete_study(study_name=name, storage=storage)
        except KeyError:
            return False
        return True

    return _retry(delete)


def ask(
    study: optuna.Study,
    config: StudyConfig,
    ticket_number: int,
    linked: Collection[int] | Callable[[Mapping[int, int | None]], Collection[int]],
    fixed_params: Mapping[str, float] | None = None,
    condition: Callable[[Any], None] | None = None,
) -> AskedTrial:
    """The trial of a ticket that has none yet, to be linked to it.

    A RUNNING trial that nobody owns is adopted before another one is created: the ticket's own, or one whose
    parameters any ticket may take. Needs no lock: of two tickets that adopt the same trial, the ledger links one.

    Args:
        study: the Optuna study.
        config: its configuration.
        ticket_number: number of the ticket.
        linked: ids of the trials that other tickets own or may still link; or a function that finds them, given the
            RUNNING trials as id and the number of the ticket that each was made for.
        fixed_params: parameters that ride on the ticket; the base's values complete them.
        condition: called inside the transaction that makes the trial; what it raises undoes that.

    Raises:
        StudyConfigError: fixed parameters outside the space, or a ticket beyond the end of a grid.
    """
    fixed = _fixed_params(config, ticket_number, fixed_params)
    tries = 0

    def find_or_create() -> AskedTrial:
        nonlocal tries
        tries += 1
        if tries > 1:
            _wait_for_creators(study)
        trials = study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        tickets = {trial._trial_id: trial.user_attrs.get(TICKET_ATTR) for trial in running}
        owned = linked(tickets) if callable(linked) else linked
        left = [trial for trial in running if trial._trial_id not in owned]
        adopted = _adoptable(left, ticket_number, is_fixed=fixed is not None)
        if adopted is not None:
            return _with_params(study, config, ticket_number, adopted._trial_id)
        template = _template(study, config, ticket_number, fixed, trials)
        with committing(condition) if condition is not None else nullcontext():
            trial_id, number = _create(study, template)
        return AskedTrial(trial_id, number, template.params)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _retry(find_or_create)


def warm_up(study: optuna.Study) -> None:
    """Reads the finished trials once, for seconds where there are ten thousand; later reads get what is new."""
    _retry(lambda: study.get_trials(deepcopy=False))


def _fixed_params(
    config: StudyConfig, ticket_number: int, given: Mapping[str, float] | None
) -> dict[str, float] | None:
    if given is not None:
        return complete_params(config, given)
    if ticket_number == 0:
        return base_params(config)
    if not isinstance(config.sampler, GridSampler):
        return None
    points = grid_points(config)
    if ticket_number >= len(points):
        raise StudyConfigError(
            f"study {config.name}: trials: ticket {ticket_number} is beyond the grid; allowed: 1 to {len(points)}"
        )
    return points[ticket_number]


def _adoptable(left: Sequence[FrozenTrial], ticket_number: int, *, is_fixed: bool) -> FrozenTrial | None:
    own = [trial for trial in left if trial.user_attrs.get(TICKET_ATTR) == ticket_number]
    free = [] if is_fixed else [trial for trial in left if not trial.user_attrs.get(FIXED_ATTR)]
    return next(iter([*own, *free]), None)


def _template(
    study: optuna.Study,
    config: StudyConfig,
    ticket_number: int,
    fixed: Mapping[str, float] | None,
    trials: Sequence[FrozenTrial],
) -> FrozenTrial:
    """A RUNNING trial that knows its ticket and has its parameters."""
    space = distributions(config)
    params, notes = (dict(fixed), {}) if fixed is not None else _propose(study, config, ticket_number, trials, {})
    return optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions={key: space[key] for key in params},
        user_attrs={TICKET_ATTR: ticket_number, **({FIXED_ATTR: True} if fixed is not None else {})},
        system_attrs=notes,
    )


def _create(study: optuna.Study, template: FrozenTrial) -> tuple[int, int]:
    """Id and number of the new trial.

    Optuna's `create_new_trial` asks the database four times per parameter while it locks the study's row, which is
    where many workers would queue. The rows written here are the same, in one round trip per table; that a parameter
    fits earlier ones needs no check, since a study's space is frozen.
    """
    storage = getattr(study._storage, "_backend", study._storage)
    if not isinstance(storage, RDBStorage):
        created = study._storage.create_new_trial(study._study_id, template_trial=template)
        return created, study._storage.get_trial_number_from_id(created)
    with rdb._create_scoped_session(storage.scoped_session) as session:
        models.StudyModel.find_or_raise_by_id(study._study_id, session, for_update=True)
        trial = models.TrialModel(
            study_id=study._study_id, number=None, state=template.state, datetime_start=template.datetime_start
        )
        session.add(trial)
        session.flush()  # gives the id
        trial_id: int = trial.trial_id  # type: ignore[assignment]
        session.add_all(_rows(template, trial_id))
        number: int = trial.count_past_trials(session)
        trial.number = number
    return trial_id, number


def _wait_for_creators(study: optuna.Study) -> None:
    """Returns once nobody creates a trial in this study.

    A commit whose connection was lost goes on in the server: until it is done, its trial cannot be seen.
    """
    storage = getattr(study._storage, "_backend", study._storage)
    if isinstance(storage, RDBStorage):
        with rdb._create_scoped_session(storage.scoped_session) as session:
            models.StudyModel.find_or_raise_by_id(study._study_id, session, for_update=True)


def _rows(template: FrozenTrial, trial_id: int) -> Iterator[Any]:
    """A trial's parameters and attributes as Optuna stores them."""
    for name, value in template.params.items():
        distribution = template.distributions[name]
        yield models.TrialParamModel(
            trial_id=trial_id,
            param_name=name,
            param_value=distribution.to_internal_repr(value),
            distribution_json=distribution_to_json(distribution),
        )
    for key, value in template.user_attrs.items():
        yield models.TrialUserAttributeModel(trial_id=trial_id, key=key, value_json=json.dumps(value))
    for key, value in template.system_attrs.items():
        yield models.TrialSystemAttributeModel(trial_id=trial_id, key=key, value_json=json.dumps(value))


def _with_params(study: optuna.Study, config: StudyConfig, ticket_number: int, trial_id: int) -> AskedTrial:
    """What an adopted trial has; earlier versions wrote parameters one by one, so some may be missing."""
    space = distributions(config)
    frozen = study._storage.get_trial(trial_id)
    params = dict(frozen.params)
    if not set(params) >= set(active_keys(config, params)):
        others = [trial for trial in study.get_trials(deepcopy=False) if trial._trial_id != trial_id]
        params, _ = _propose(study, config, ticket_number, others, params)
        for key in [key for key in params if key not in frozen.params]:
            study._storage.set_trial_param(trial_id, key, space[key].to_internal_repr(params[key]), space[key])
        # Another ticket may be adopting the same trial: what was written first stays, and is what both have to train.
        params = dict(study._storage.get_trial(trial_id).params)
    return AskedTrial(trial_id, frozen.number, {key: params[key] for key in space if key in params})


def _running(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


# ---- proposals -------------------------------------------------------------------------------------------------------


def _propose(
    study: optuna.Study,
    config: StudyConfig,
    ticket_number: int,
    trials: Sequence[FrozenTrial],
    known: Mapping[str, float],
) -> tuple[dict[str, float], dict[str, Any]]:
    """What the sampler proposes to a trial that does not exist yet.

    Optuna's own `suggest` writes every parameter in a transaction of its own to a trial that others see half made.
    Here the sampler runs first, on one reading of the history, and holds nothing up however long it takes.

    Args:
        study: the Optuna study.
        config: its configuration; its space is every trial's.
        ticket_number: seeds the sampler.
        trials: all trials, by number.
        known: parameters that the trial has already.

    Returns:
        All parameters, and what the sampler wants to find on the trial later (its system attributes).
    """
    space = distributions(config)
    sampler = create_sampler(config, ticket_seed(config, ticket_number))
    if isinstance(sampler, optuna.samplers.QMCSampler):
        # The sequence's own counter in the study would give one point to two tickets at the same time.
        sampler._find_sample_id = lambda *_: ticket_number - 1  # type: ignore[method-assign]
    trial = optuna.trial.create_trial(state=TrialState.RUNNING, params={}, distributions={})
    trial.number, trial._trial_id = len(trials), _UNBORN
    view = copy.copy(study)
    view.sampler = sampler
    view._storage = reading = _Reading(study._storage, trial, [*_prior(study, config), *_history(config, trials)])  # type: ignore[assignment]
    sampler.before_trial(view, trial)
    if _groups(config):
        sampler.infer_relative_search_space(view, trial)  # keeps the groups to itself
    # Trial 0 had all that is in every trial, so what samplers infer from the history is the space, once there is some.
    open_space = {key: entry for key, entry in space.items() if not entry.single() and key not in known}
    drawn = sampler.sample_relative(view, trial, open_space) if trials and _draws_together(config) else {}
    params = dict(known)
    for key, entry in space.items():
        if key not in known and not (key in config.space and is_off(config, key, params)):
            params[key] = float(_value(view, trial, key, entry, drawn))
    return settled(config, params), reading.notes


def _groups(config: StudyConfig) -> bool:
    """Whether the sampler models the keys that only some trials have apart from those of all trials."""
    return isinstance(config.sampler, TpeSampler) and config.sampler.multivariate and bool(conditional_keys(config))


def _draws_together(config: StudyConfig) -> bool:
    """Whether the sampler chooses all keys at once, not each by itself."""
    if isinstance(config.sampler, TpeSampler):
        return config.sampler.multivariate
    return not isinstance(config.sampler, RandomSampler | GridSampler)


def _value(
    view: optuna.Study, trial: FrozenTrial, key: str, entry: BaseDistribution, drawn: Mapping[str, Any]
) -> float:
    """As Optuna's `Trial.suggest` chooses between the two ways of sampling."""
    if isinstance(entry, CategoricalDistribution) and entry.single():
        return float(entry.choices[0])  # type: ignore[arg-type]
    if isinstance(entry, FloatDistribution) and entry.single():
        return entry.low
    if key in drawn and entry._contains(entry.to_internal_repr(drawn[key])):
        return float(drawn[key])
    return float(view.sampler.sample_independent(view, trial, key, entry))


def _history(config: StudyConfig, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """What the sampler learns from. TPE's cost grows with it, so it gets the best and the latest of a long one."""
    if not isinstance(config.sampler, TpeSampler) or len(trials) <= TPE_HISTORY:
        return list(trials)
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if config.objectives:
        best = [complete[index] for index in non_dominated([trial.values for trial in complete])][:TPE_BEST]
    else:
        best = sorted(complete, key=lambda trial: trial.values[0], reverse=True)[:TPE_BEST]
    kept = {trial.number: trial for trial in [*best, *trials[-(TPE_HISTORY - TPE_BEST) :]]}
    return [kept[number] for number in sorted(kept)]


def add_prior(study: optuna.Study, config: StudyConfig, trials: Sequence[tuple[Mapping[str, float], float]]) -> int:
    """Keep finished trials of comparable studies for the sampler to learn from; they are no trials of this study.

    Args:
        study: the Optuna study.
        config: its configuration.
        trials: search parameters, all inside the study's ranges, and the value of each.

    Returns:
        How many of them were not known yet.

    Raises:
        UserInputError: the study has several objectives.
    """
    if len(study.directions) > 1:
        raise UserInputError(f"study {config.name}: has several objectives; allowed here: a study of one, or a file")
    for params, value in trials:
        _prior_trial(config, params, value, 0)  # raises where Optuna would later

    def add() -> int:
        stored = study._storage.get_study_user_attrs(study._study_id).get(PRIOR_ATTR, [])
        new = [entry for params, value in trials if (entry := [dict(params), value]) not in stored]
        study._storage.set_study_user_attr(study._study_id, PRIOR_ATTR, [*stored, *new])
        return len(new)

    return _retry(add)


def _prior(study: optuna.Study, config: StudyConfig) -> list[FrozenTrial]:
    """What `add_prior` kept, for the samplers that learn from trials which they did not propose."""
    if not isinstance(config.sampler, TpeSampler | GpSampler):
        return []
    stored = study._storage.get_study_user_attrs(study._study_id).get(PRIOR_ATTR, ())
    return [_prior_trial(config, params, value, index) for index, (params, value) in enumerate(stored)]


def _prior_trial(config: StudyConfig, params: Mapping[str, float], value: float, index: int) -> FrozenTrial:
    space = distributions(config)
    trial = optuna.trial.create_trial(
        params=dict(params), distributions={key: space[key] for key in params}, value=value
    )
    trial.number = trial._trial_id = _UNBORN - 1 - index
    return trial


class _Reading:
    """One reading of the trials, as a sampler's storage.

    What the sampler notes on the trial that does not exist yet is kept in `notes`; all else goes to the storage.
    """

    def __init__(self, storage: BaseStorage, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> None:
        self._storage = storage
        self._trial = trial
        self._trials = trials
        self._noted: dict[str, Any] = {}

    @property
    def notes(self) -> dict[str, Any]:
        """Attributes for the new trial. TPE notes a proposal until the parameters are there, and here they are."""
        return {key: value for key, value in self._noted.items() if not key.startswith("tpe:relative_params")}

    def get_all_trials(
        self, _study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The trials as they were read."""
        found = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """The new trial, or one that exists."""
        return self._trial if trial_id == _UNBORN else self._storage.get_trial(trial_id)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keeps a note on the new trial, writes one on another."""
        if trial_id != _UNBORN:
            self._storage.set_trial_system_attr(trial_id, key, value)
            return
        self._noted[key] = value
        self._trial.system_attrs[key] = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def orphans(study: optuna.Study, owned: Callable[[Mapping[int, int | None]], Collection[int]]) -> tuple[int, ...]:
    """Ids of the RUNNING trials that have lost their worker.

    `ask` adopts them; what is left when all tickets are spent can be told FAIL.

    Args:
        study: the Optuna study.
        owned: finds those that tickets own or may still link, as for `ask`. Called after the trials were read, so that
            one that is made meanwhile is not taken for lost.
    """
    running = {trial._trial_id: trial.user_attrs.get(TICKET_ATTR) for trial in _retry(lambda: _running(study))}
    taken = owned(running)
    return tuple(trial_id for trial_id in running if trial_id not in taken)


# ---- the mirror ------------------------------------------------------------------------------------------------------


def mirror_reports(study: optuna.Study, trial_id: int, rows: Iterable[Report]) -> None:
    """Copy the ledger's rows into Optuna's intermediate values; a finished trial stays as it is.

    Args:
        study: the Optuna study.
        trial_id: the trial.
        rows: evaluated epochs; one without a finite value is left out.
    """
    values = {row.epoch + 1: row.value for row in rows if row.value is not None and math.isfinite(row.value)}

    def write() -> None:
        for step, value in sorted(values.items()):
            study._storage.set_trial_intermediate_value(trial_id, step, value)

    with suppress(UpdateFinishedTrialError):
        _retry(write)


def should_prune(study: optuna.Study, config: StudyConfig, trial_id: int, epochs_done: int) -> bool:
    """Whether the trial should stop after `epochs_done` epochs. Its values have to be mirrored before.

    Ask once per evaluation and keep the answer in the ledger: successive halving writes its rung before it answers. If
    the answer is lost on the way to the ledger, asking again at the same epoch starts from the same rung.

    Returns:
        False for the base (the yardstick, trial 0 or a retry of it, always runs to its end), before the first rung, and
        at the last epoch, where nothing is left to save.
    """
    pruner = config.pruner
    if isinstance(pruner, NonePruner) or not (pruner.min_epochs or 1) <= epochs_done < config.train.epochs:
        return False

    def decide() -> bool:
        trials = study.get_trials(deepcopy=False)
        trial = next(trial for trial in trials if trial._trial_id == trial_id)
        if trial.state.is_finished() or trial.last_step != epochs_done:
            return False
        if _has_rungs(pruner):
            trial = _before_asking(study._storage, trial, epochs_done)
            # Among its rivals as well, or a rung that a lost question has written would count twice.
            trials = [trial if other._trial_id == trial_id else other for other in trials]
        view = copy.copy(study)
        view._storage = _Reading(study._storage, trial, trials)  # type: ignore[assignment]
        return bool(study.pruner.prune(view, trial)) and not _is_base(config, trial)

    try:
        return _retry(decide)
    except UpdateFinishedTrialError:
        return False


def _is_base(config: StudyConfig, trial: FrozenTrial) -> bool:
    return trial.number == 0 or trial.params == base_params(config)


def _has_rungs(pruner: PrunerConfig) -> bool:
    """Whether asking the pruner changes the trial."""
    inner = pruner.wrapped if isinstance(pruner, PatientPruner) else pruner
    return isinstance(inner, AshaPruner | HyperbandPruner)


def _before_asking(storage: BaseStorage, trial: FrozenTrial, step: int) -> FrozenTrial:
    """The trial without the rungs that an earlier, lost question at the same step has written."""
    rungs = {key for key in trial.system_attrs if key.startswith(_RUNG_PREFIX)}
    asked = trial.user_attrs.get(ASKED_ATTR)
    if asked is None or asked["step"] != step:
        storage.set_trial_user_attr(trial._trial_id, ASKED_ATTR, {"step": step, "rungs": sorted(rungs)})
        return trial
    repeated = rungs - set(asked["rungs"])
    copied = copy.deepcopy(trial)
    copied.system_attrs = {key: value for key, value in trial.system_attrs.items() if key not in repeated}
    return copied


def trial_value(objective: ObjectiveConfig, rows: Sequence[Report]) -> tuple[float, int] | None:
    """What a trial is worth, and the epoch (from 0) it is worth it at; None if that is not finite.

    Args:
        objective: the last evaluated epoch counts, or the best one (the first of equals).
        rows: all its evaluated epochs.
    """
    ordered = sorted(rows, key=lambda row: row.epoch)
    finite = [(row.value, row.epoch) for row in ordered if row.value is not None and math.isfinite(row.value)]
    if not finite:
        return None
    if objective.at == "best":
        return max(finite, key=lambda pair: (pair[0], -pair[1]))
    return finite[-1] if finite[-1][1] == ordered[-1].epoch else None


def tell(study: optuna.Study, trial_id: int, state: str, value: float | Sequence[float] | None = None) -> None:
    """Finish a trial in Optuna; one that is finished already stays as it is.

    Args:
        study: the Optuna study.
        trial_id: the trial.
        state: COMPLETE, PRUNED (Optuna takes the last intermediate value) or FAIL.
        value: the objective of a COMPLETE trial, or its values where there are several; unless all are finite the trial
            is FAIL.
    """
    final = TrialState[str(state)]
    told = [value] if isinstance(value, int | float) else list(value or ())
    if final is TrialState.COMPLETE and not (told and all(map(math.isfinite, told))):
        final = TrialState.FAIL

    def finish() -> None:
        trial = study._storage.get_trial(trial_id)
        if trial.state.is_finished():
            return
        values = told if final is TrialState.COMPLETE else None
        if final is TrialState.PRUNED and trial.last_step is not None:
            values = [trial.intermediate_values[trial.last_step]]
        # What `Study.tell` does beyond this serves samplers with constraints.
        study._storage.set_trial_state_values(trial_id, final, values)

    with suppress(UpdateFinishedTrialError):
        _retry(finish)
