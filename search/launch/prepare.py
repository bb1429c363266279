"""From a study file to a study in the database: what `check` prints and `run` starts from."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from search.config import NO_OFF_SAMPLERS, StudyConfig, check_objective, require_resumable, shared_keys
from search.confirm import add_noise
from search.data_facts import DataFacts
from search.database import database_errors, init_lock, make_engine, mask_url, schema_owner, sqlite_path
from search.errors import DatabaseError, StudyConfigError, StudyConflictError, UnknownStudyError
from search.forecast import Forecast, study_cost
from search.launch.speed import earlier_speed, measure_speed
from search.ledger import Ledger, StudyRecord
from search.paths import StudyFolder
from search.prepared import Prepared
from search.ranges import CLS_TO_OBJ, POWER_KEY
from search.settings import FidelityConfig, TrainSettings
from search.space import base_params, grid_points, pack_limit
from search.stopping import require_noise
from search.study import AskedTrial, check_sampler, create_study, open_storage
from search.transforms import base_text, compensates, excess_gain, largest_gamma
from search.worker.existing import refuse_shared_database
from search.worker.session import data_yaml, study_tracker, versions
from yolocore.autoanchor import ENOUGH_RECALL, AnchorFit, AnchorTuple, autoanchor, current_fit
from yolocore.data.dataset import DatasetConfig, LabelledImage, Split, fingerprint, load_dataset_config, scan_split
from yolocore.device import resolve_device, resolve_precision
from yolocore.errors import DeviceError
from yolocore.hyperparameters import RANGES, Hyperparameters
from yolocore.initial import initial_levels
from yolocore.training.compiled import require_compiler
from yolocore.training.optim import NOMINAL_BATCH_SIZE, Clock, Schedule
from yolocore.training.start import start_weights

logger = logging.getLogger(__name__)

FOCAL_LOW = 0.3
"""Of the range that `check` proposes for `fl_gamma` when it is on."""

RANKING_PRUNERS = frozenset(("median", "asha", "hyperband"))
"""Those that compare trials with each other."""

STEPS_FROM_SCRATCH = 500
STEPS_FROM_WEIGHTS = 100
"""Optimiser steps below which a trial has hardly left its start. Measured on small data sets; a rule of thumb."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """A checked study: nothing in it can fail for a reason that the user could have been told before."""

    config: StudyConfig
    """Without the keys that do nothing on this data."""
    given: StudyConfig
    """As in the study file."""
    storage_url: str
    folder: StudyFolder
    data: Path
    dataset: DatasetConfig
    fingerprint: str
    device: str
    precision: str
    pack: int | None
    """Trials that train together; None: each worker measures how many are fastest."""
    images: dict[str, int]
    labels_per_class: dict[str, int]
    training: Split
    """The images and labels to train on."""
    anchors: AnchorTuple
    """Those of the weights, or YOLOv5's; pixels."""
    transferred: str | None
    """How many of the model's tensors the weights file gives, as 343/349."""
    forecast: Forecast
    notices: tuple[str, ...]
    noise_seeds: int = 0
    """Reruns of the base that the caller adds beside those of the study file."""
    prepared: Prepared | None = None
    """What `prepare` gives, where it was needed to check the space."""

    def rows(self) -> list[tuple[str, str]]:
        """What `check` and `run` show, as name and text."""
        config, train = self.config, self.config.train
        size = f"yolov5{train.model}, {train.image_size} px, batch {train.batch_size}, {train.epochs} epochs"
        space = [
            (f"space.{key}", f"{entry.describe()} (base {base_text(config, key)})")
            for key, entry in config.space.items()
        ]
        return [
            ("study", config.name),
            ("data", f"{self.data} (fingerprint {self.fingerprint})"),
            ("images", ", ".join(f"{count} {name}" for name, count in self.images.items())),
            ("training labels", ", ".join(f"{name} {count}" for name, count in self.labels_per_class.items())),
            ("model", f"{size}, from {self._start()}"),
            *([("anchors", self._anchors())] if train.autoanchor else []),
            ("device", f"{self.device}, {self.precision}, {_packs(self.pack)}"),
            ("objective", config.objective_text()),
            ("trials", f"{config.trials}, sampler {config.sampler.name}, pruner {config.pruner.name}"),
            *space,
            *self.forecast.rows(datetime.now().astimezone()),
            ("database", f"{mask_url(self.storage_url)}{self._database_note()}"),
        ]

    def _start(self) -> str:
        weights = self.config.train.weights
        return "scratch" if weights is None else f"{weights} ({self.transferred} tensors transferred)"

    def anchor_fit(self) -> AnchorFit:
        """How well the anchors fit the labels."""
        return current_fit(*self._anchor_question())

    def prepare(self) -> Prepared:
        """What is worked out once for all trials; takes seconds where the anchors do not fit, more with many labels."""
        if self.prepared is not None:
            return self.prepared
        found = autoanchor(*self._anchor_question()) if self.config.train.autoanchor else None
        prepared = Prepared(autoanchor=found, transferred=self.transferred)
        return replace(prepared, facts=self._facts(prepared.anchors or self.anchors))

    def _facts(self, anchors: AnchorTuple) -> DataFacts | None:
        """What the space needs to know of the data."""
        needs_levels = compensates(self.config)
        if not needs_levels and POWER_KEY not in self.config.space:
            return None
        anchor_t = self.config.base_hyperparameters().anchor_t
        size = self.config.train.image_size
        levels = initial_levels(self.training.images, anchors, size, anchor_t) if needs_levels else ()
        counts = _class_counts(self.training)
        return DataFacts(class_counts=tuple(counts[index] for index in range(self.dataset.num_classes)), levels=levels)

    def _anchor_question(self) -> tuple[tuple[LabelledImage, ...], AnchorTuple, int, float, int]:
        train = self.config.train
        anchor_t = self.config.base_hyperparameters().anchor_t
        return self.training.images, self.anchors, train.image_size, anchor_t, train.seed

    def _anchors(self) -> str:
        fit = self.anchor_fit()
        text = f"best possible recall {fit.bpr:.4f}, {fit.aat:.2f} anchors per label"
        return (
            text if fit.bpr > ENOUGH_RECALL else f"{text}: AutoAnchor looks for better ones when the study is created"
        )

    def _database_note(self) -> str:
        # A file's locks, and a lease on this host's clock, do not reach other hosts.
        return " (for workers of this host only)" if sqlite_path(self.storage_url) is not None else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`; no password in it."""
        return {
            "study": self.config.name,
            "storage": mask_url(self.storage_url),
            "data": str(self.data),
            "fingerprint": self.fingerprint,
            "device": self.device,
            "precision": self.precision,
            "pack": "auto" if self.pack is None else self.pack,
            "images": self.images,
            "labels_per_class": self.labels_per_class,
            "transferred": self.transferred,
            "anchor_fit": asdict(self.anchor_fit()),
            "space": {key: entry.describe() for key, entry in self.config.space.items()},
            "base": base_params(self.config),
            "objective": self.config.objective_text(),
            "forecast": self.forecast.to_json(),
            "config": self.config.to_json(),
            "notices": list(self.notices),
        }


def plan_study(
    config: StudyConfig, storage_url: str, runs_dir: Path, data: Path | None = None, noise_seeds: int = 0
) -> StudyPlan:
    """Checks a study against its data and this machine; writes nothing but a built-in data set.

    Args:
        config: The study.
        storage_url: Its database.
        runs_dir: Folder of all studies.
        data: The data set's YAML, where it lies elsewhere on this host.
        noise_seeds: Reruns of the base that the caller will add beside those of the study file.

    Raises:
        UserInputError, yolocore.errors.InputError: One line per mistake.
    """
    check_sampler(config)
    study_tracker(config, runs_dir)  # refuses a store that MLflow cannot use; opens nothing
    refuse_shared_database(config, storage_url, runs_dir)
    earlier = _earlier(config.name, storage_url)
    if earlier.is_known:
        require_noise(config, earlier.ledger, noise_seeds)
    data = data or data_yaml(config, runs_dir)
    dataset = load_dataset_config(data, single_class=config.train.single_cls)
    splits = {name: scan_split(dataset, name) for name in ("train", "val")}
    given, config = config, without_idle_keys(config, dataset.num_classes)
    device = resolve_device(config.train.device)
    check_objective(config, dataset.names, _labelled_classes(splits["val"]))
    counts = _class_counts(splits["train"])
    precision, found = resolve_precision(config.train.precision, device), fingerprint(dataset)
    start = start_weights(config.train_config(data), dataset.num_classes)
    plan = StudyPlan(
        config=config,
        given=given,
        storage_url=storage_url,
        folder=StudyFolder(runs_dir, config.name),
        data=data,
        dataset=dataset,
        fingerprint=found,
        device=str(device),
        precision=precision,
        pack=None if config.train.pack == "auto" and pack_limit(config) > 1 else pack_limit(config),
        images={name: len(split.images) for name, split in splits.items()},
        labels_per_class={name: counts[index] for index, name in enumerate(dataset.names)},
        training=splits["train"],
        anchors=start.anchors,
        transferred=f"{start.transferred}/{start.total}" if config.train.weights else None,
        forecast=Forecast(
            cost=study_cost(config),
            speed=earlier_speed(config, found, f"{device} {precision}", storage_url, runs_dir),
        ),
        notices=(
            *_idle_notices(given, config),
            *_compile_notices(config.train, device.type),
            *_notices(config, dataset, splits),
        ),
        noise_seeds=noise_seeds,
    )
    return _with_checked_gains(plan, earlier)


@dataclass(frozen=True, slots=True)
class _Earlier:
    """Whether a study exists already."""

    is_known: bool
    """False where the database cannot be read now, for example since it is to be upgraded first."""
    ledger: Ledger | None
    """In the study's database; None where the study does not exist."""


def _earlier(study: str, storage_url: str) -> _Earlier:
    """Looks whether a study exists; writes nothing."""
    path = sqlite_path(storage_url)
    if path is not None and not path.is_file():
        return _Earlier(True, None)
    try:
        engine = make_engine(storage_url, create=False)
        with database_errors(storage_url):
            if schema_owner(engine) == "empty":
                return _Earlier(True, None)
        ledger = Ledger(engine, patience=0.0)
        ledger.check_schema()
        return _Earlier(True, ledger if _exists(ledger, study) else None)
    except DatabaseError:
        return _Earlier(False, None)


def _with_checked_gains(plan: StudyPlan, earlier: _Earlier) -> StudyPlan:
    """Refuses a new study whose computed gains leave their limits somewhere; of one that exists it is a notice.

    Raises:
        StudyConfigError: names key, value and what helps.
    """
    if not compensates(plan.config):
        return _noted_excess(plan, plan.config, earlier)
    stored = None if earlier.ledger is None else Prepared.of(earlier.ledger.study(plan.config.name).config)
    if stored is None or stored.facts is None:
        plan = replace(plan, prepared=plan.prepare())
        stored = plan.prepared
    assert stored is not None
    return _noted_excess(plan, _with_facts(plan.config, stored), earlier)


def _noted_excess(plan: StudyPlan, config: StudyConfig, earlier: _Earlier) -> StudyPlan:
    problem = excess_text(config)
    if problem is None:
        return plan
    if earlier.is_known and earlier.ledger is None:
        raise StudyConfigError(f"study {config.name}: {problem}")
    return replace(plan, notices=(*plan.notices, f"{problem}; trials beyond that fail"))


def _with_facts(config: StudyConfig, prepared: Prepared) -> StudyConfig:
    """The study as its database will have it."""
    return StudyConfig.from_json(prepared.added_to(config.to_json()))


def excess_text(config: StudyConfig) -> str | None:
    """Which computed gain leaves its limits somewhere in the space, where, and what helps; None where none does."""
    found = excess_gain(config)
    if found is None:
        return None
    end = RANGES[found.gain][found.value > 1]
    others = {key: value for key, value in found.at.items() if key != "fl_gamma"}
    at = f" (at {', '.join(f'{key} {value:g}' for key, value in others.items())})" if others else ""
    reaches = f"{found.gain} reaches {found.value:.4g}{at}, beyond {end:g}"
    if "fl_gamma" not in found.at:
        return f"space: the gain {reaches}; allowed: narrower ranges of {', '.join(others)}"
    key = "space.fl_gamma" if config.space["fl_gamma"].choices else "space.fl_gamma.high"
    gamma = largest_gamma(config)
    remedies = [f"at most {gamma:g}"] if gamma is not None else []
    remedies += [f"narrower ranges of {', '.join(others)}"] if others else []
    remedies += ["no `compensate`"]
    got = f"got {found.at['fl_gamma']:g}, with which the compensated gain {reaches}"
    return f"{key}: {got}; allowed: {', or '.join(remedies)}"


def with_measured_speed(plan: StudyPlan) -> StudyPlan:
    """The plan with a forecast from a measurement on this host, which takes a minute or two."""
    train = replace(plan.config.train_config(plan.data), device=plan.device, precision=plan.precision)
    return replace(plan, forecast=replace(plan.forecast, speed=measure_speed(plan.config, train)))


CLASS_KEYS = ("cls", "cls_pw", POWER_KEY, CLS_TO_OBJ)
"""Search keys that act in the class loss alone, which one class does not have."""
MOSAIC_KEYS = ("mosaic", "mixup", "copy_paste")
"""Search keys that act in mosaics alone, which `train.rect` does not make."""


def without_idle_keys(config: StudyConfig, num_classes: int) -> StudyConfig:
    """The study without the searched keys that do nothing: each would be one more dimension of noise to the sampler.

    Raises:
        StudyConfigError: nothing would be left to search.
    """
    idle = {*(CLASS_KEYS if num_classes == 1 else ()), *(MOSAIC_KEYS if config.train.rect else ())}
    left = {key: entry for key, entry in config.space.items() if key not in idle}
    if len(left) == len(config.space):
        return config
    if not left:
        found = f"{', '.join(config.space)}: nothing in it has an effect on this data"
        raise StudyConfigError(f"study {config.name}: space: {found}; allowed: a key that has one, such as box or obj")
    kept = config.model_copy(update={"space": left})
    _check_grid(kept, kept.trials)
    return kept


def _idle_notices(given: StudyConfig, config: StudyConfig) -> Iterator[str]:
    dropped = [key for key in given.space if key not in config.space]
    for keys, why in ((CLASS_KEYS, "with one class"), (MOSAIC_KEYS, "with train.rect")):
        if names := [key for key in dropped if key in keys]:
            yield f"space: {', '.join(names)} would do nothing {why}, so not searched"


def _packs(size: int | None) -> str:
    return "packs as large as is fastest" if size is None else f"packs of {size}"


def _class_counts(split: Split) -> Counter[int]:
    return Counter(int(row[0]) for image in split.images for row in image.labels)


def _labelled_classes(split: Split) -> list[int]:
    return sorted(_class_counts(split))


def _notices(config: StudyConfig, dataset: DatasetConfig, splits: dict[str, Split]) -> Iterator[str]:
    """What a user should know before hours are spent."""
    if config.train.image_weights and config.train.pack != 1:
        yield "train.image_weights: which images are drawn depends on the model, so trials train one at a time"
    elif shared := ", ".join(shared_keys(config)):
        reason = f"space: the slots of a pack share {shared}"
        if pack_limit(config) == 1:
            yield f"{reason}, and no two trials will agree in it: trials train one at a time; choices would allow packs"
        else:
            yield f"{reason}: trials of equal values are packed together, the others wait for a pack of their own"
    counts = _class_counts(splits["train"])
    missing = [name for index, name in enumerate(dataset.names) if not counts[index]]
    if missing:
        yield f"data: no training labels of {', '.join(missing)}"
    if config.train.freeze and config.train.weights is None:
        yield "train.freeze: without train.weights the frozen layers keep random weights"
    if config.fidelity is not None:
        yield from _fidelity_notices(config, config.fidelity)
    patience = config.train.patience
    if 0 < patience < config.train.epochs and config.objective.at == "last":
        yield (
            f"train.patience: a trial that ends early counts with its last epoch, {patience} epochs after its best; "
            "with `at: best` in the objective its best epoch counts"
        )
    yield from _focal_notices(config)
    if config.objectives:
        yield "objectives: of several nothing is pruned, no trial is the best: `status` shows the Pareto front"
    yield from _step_notices(config, len(splits["train"].images))
    yield from _rung_notices(config, len(splits["train"].images))
    for split in splits.values():
        yield from split.problems[:5]


def _focal_notices(config: StudyConfig) -> Iterator[str]:
    """The focal loss is a switch and a value; a range that touches 0 hides the switch from the sampler."""
    entry = config.space.get("fl_gamma")
    if entry is None or entry.low != 0 or entry.off is not None or entry.high is None:
        return
    jump = "just above 0 positives already count a quarter and negatives three quarters, at 0 both count in full"
    low = min(FOCAL_LOW, entry.high / 2)
    instead = f"`fl_gamma: {{low: {low:g}, high: {entry.high:g}, off: 0.5}}`"
    if config.sampler.name in NO_OFF_SAMPLERS:
        instead += " with sampler tpe"
    yield f"space.fl_gamma: its range touches 0, where the loss jumps: {jump}; {instead} searches off and on apart"


def _fidelity_notices(config: StudyConfig, fidelity: FidelityConfig) -> Iterator[str]:
    promoted = 1 + math.ceil((config.trials - 1) / fidelity.reduction_factor)
    yield (
        f"fidelity: every trial first trains {fidelity.epochs} epochs with {fidelity.freeze} layers frozen; about "
        f"{promoted} of {config.trials} go on to the full training"
    )


def _step_notices(config: StudyConfig, images: int) -> Iterator[str]:
    """Says when trials are too short to learn anything, so that the study would rank noise."""
    enough = STEPS_FROM_SCRATCH if config.train.weights is None else STEPS_FROM_WEIGHTS
    if config.train.optimizer != "SGD" or config.train.epochs * images > enough * NOMINAL_BATCH_SIZE:
        return
    steps = _optimiser_steps(config, images)
    if steps < enough:
        start = "from scratch" if config.train.weights is None else "from weights"
        yield (
            f"train.epochs: a trial makes {steps} optimiser steps (after warm-up YOLOv5 gathers {NOMINAL_BATCH_SIZE} "
            f"images into each); {start} that is little, so look at the base's curve before you believe a ranking"
        )


def _optimiser_steps(config: StudyConfig, images: int) -> int:
    train = config.train
    schedule = base_schedule(config.base_hyperparameters(), train.epochs, images, train.batch_size)
    clock = Clock()
    for iteration in range(schedule.epochs * schedule.batches_per_epoch):
        clock, _ = clock.advance(schedule.at(iteration).accumulate)
    return clock.updates


def _compile_notices(train: TrainSettings, device_type: str) -> Iterator[str]:
    """Says that this host cannot compile. Workers on others may; with a device that is named none is expected to.

    Raises:
        DeviceError: This host cannot, and the study names its device.
    """
    try:
        require_compiler(train.compile, device_type)
    except DeviceError as error:
        if train.device != "auto":
            raise
        yield f"train.{error}; a worker on this host will refuse the study"


def _rung_notices(config: StudyConfig, images: int) -> Iterator[str]:
    """Says when a pruner ranks trials that still warm up (docs/performance.md, "Where a rung may stand")."""
    if config.pruner.name not in RANKING_PRUNERS:
        return
    train, first = config.train, getattr(config.pruner, "min_epochs", None) or 1
    warm = base_schedule(config.base_hyperparameters(), train.epochs, images, train.batch_size).warmup_epochs
    is_meant = config.base_hyperparameters().warmup_epochs >= train.epochs  # then every decision lies inside it
    if not is_meant and first < after_warmup(warm, train.epochs):
        surer = math.ceil(min(2 * warm, train.epochs / 2) / train.eval_every) * train.eval_every
        yield (
            f"pruner: its first decision is after {first} epochs, inside the warm-up, which takes {warm} here (never "
            f"less than 100 iterations), where ranks say little about the end; `min_epochs: {surer}` is surer"
        )


def after_warmup(warm: int, epochs: int) -> int:
    """The first epoch after which a pruner should decide: past the warm-up, or half-way where that comes earlier.

    Args:
        warm: Epochs that the warm-up takes.
        epochs: Of a trial.
    """
    return min(warm, math.ceil(epochs / 2))


def base_schedule(hyperparameters: Hyperparameters, epochs: int, images: int, batch_size: int) -> Schedule:
    """The schedule of a training on so many images."""
    batches = -(-images // min(batch_size, images))
    return Schedule(hyperparameters=hyperparameters, epochs=epochs, batches_per_epoch=batches, batch_size=batch_size)


def create_or_resume(plan: StudyPlan, more_trials: int = 0) -> bool:
    """Creates the study with its tickets, or takes up the one that exists.

    Args:
        plan: The checked study.
        more_trials: Tickets to add to what the study file says, or to what an existing study has.

    Returns:
        True if it was created now.

    Raises:
        StudyConflictError: It exists with another configuration or other data.
        StudyConfigError: More trials than a grid has points.
    """
    ledger = Ledger(make_engine(plan.storage_url))
    ledger.initialise()
    plan.folder.root.mkdir(parents=True, exist_ok=True)
    storage = open_storage(plan.storage_url)
    # Outside the lock: it takes its time, and two who create the same study find the same.
    prepared = None if _exists(ledger, plan.config.name) else plan.prepare()
    with init_lock(plan.storage_url):
        try:
            record = ledger.study(plan.config.name)
        except UnknownStudyError:
            _check_grid(plan.config, plan.config.trials + more_trials)
            require_noise(plan.config, None, plan.noise_seeds)
            prepared = prepared or plan.prepare()
            _refuse_excess(plan.config, prepared)
            base = create_study(plan.config, storage)
            _create(ledger, plan, prepared, base, more_trials)
            return True
        _resume(ledger, plan, record, more_trials)
        return False


def _refuse_excess(config: StudyConfig, prepared: Prepared) -> None:
    """Again, where the database could not be looked into before."""
    if (problem := excess_text(_with_facts(config, prepared))) is not None:
        raise StudyConfigError(f"study {config.name}: {problem}")


def _check_grid(config: StudyConfig, trials: int) -> None:
    if config.sampler.name != "grid":
        return
    points = len(grid_points(config))
    if trials > points:
        raise StudyConfigError(f"study {config.name}: trials: got {trials}; allowed: 1 to {points}, the whole grid")


def _exists(ledger: Ledger, name: str) -> bool:
    try:
        ledger.study(name)
    except UnknownStudyError:
        return False
    return True


def _create(ledger: Ledger, plan: StudyPlan, prepared: Prepared, base: AskedTrial, more_trials: int) -> None:
    if prepared.anchors is not None:
        logger.warning("study %s: anchors %s", plan.config.name, dict(prepared.rows())["anchors"])
    record = StudyRecord(
        name=plan.config.name,
        config=prepared.added_to(plan.config.to_json()),
        fingerprint=plan.fingerprint,
        versions=versions(),
        created=time.time(),
    )
    tickets = [base.params, *[None] * (plan.config.trials + more_trials - 1)]
    ledger.create_study(record, tickets, base)
    add_noise(ledger, plan.config, plan.config.noise.seeds)


def _resume(ledger: Ledger, plan: StudyPlan, record: StudyRecord, more_trials: int) -> None:
    """Takes the study up again; only the budget may differ, and it never shrinks."""
    frozen = StudyConfig.from_json(record.config)
    # Earlier versions searched keys that do nothing, too.
    require_resumable(frozen, plan.given if set(frozen.space) == set(plan.given.space) else plan.config)
    require_noise(plan.config, ledger, plan.noise_seeds)
    if record.fingerprint != plan.fingerprint:
        raise StudyConflictError(
            f"{plan.data}: fingerprint {plan.fingerprint} is not that of study {frozen.name} ({record.fingerprint}): "
            "images, labels or names changed since it was created; allowed: the same data, or another study name"
        )
    have = ledger.budget(frozen.name)
    missing = max(0, plan.config.trials - have) + more_trials
    _check_grid(plan.config, have + missing)
    if missing:
        # With retries among them the tickets' numbers are no places in the grid, so each gets its point here.
        is_grid = plan.config.sampler.name == "grid"
        points = grid_points(plan.config)[have : have + missing] if is_grid else ()
        ledger.add_tickets(frozen.name, missing, fixed_params=points)
    add_noise(ledger, frozen, plan.config.noise.seeds)
    ledger.update_config(frozen.name, {key: plan.config.to_json()[key] for key in ("timeout", "stop")})
    ledger.stop(frozen.name, None)
