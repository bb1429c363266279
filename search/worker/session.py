"""Opens everything a worker needs from a storage URL and a study's name, and runs it."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from search.config import StudyConfig
from search.demo import write_digits
from search.errors import SearchError, StudyConflictError
from search.ledger import KINDS, SEARCH, Ledger, StudyRecord
from search.paths import StudyFolder, data_on_this_host
from search.prepared import Prepared
from search.study import load_study, open_worker_storage, warm_up
from search.tracking import Tracker, open_tracker
from search.weights import WeightsStore
from search.worker.context import WorkerContext
from search.worker.existing import HANG_SECONDS, OUTAGE_SECONDS, open_existing, refuse_shared_database
from search.worker.host import process_identity
from search.worker.lease import DEFAULT_LEASE_SECONDS
from search.worker.mirror import Mirror
from search.worker.records import MirrorContext
from search.worker.stop import StopFlag
from search.worker.worker import Worker
from yolocore.data.dataset import fingerprint, load_dataset_config
from yolocore.device import resolve_device, resolve_precision
from yolocore.training.compiled import require_compiler

logger = logging.getLogger(__name__)

COMPILING_HANGS = 4
"""How many times as long a trainer may be silent whose network is compiled: it says nothing meanwhile."""

VERSIONED = ("yolosearch", "torch", "torchvision", "optuna", "mlflow", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What a worker is told; everything else is in the database.

    Attributes:
        storage_url: Database of the study.
        study: The study's name.
        runs_dir: Folder for checkpoints, weights and, by default, MLflow's files.
        worker_id: Name of this worker, unique over all hosts.
        device: Overrides the study's device on this host.
        data: The data set's YAML on this host, where it lies elsewhere; the fingerprint has to be the study's.
        parent: Process id of the launcher; the worker hands its tickets back when that process is gone.
        timeout: Seconds after which nothing new is claimed; None takes the study's.
        checkpoints: Folder or fsspec URL that all workers of the study see; by default below `runs_dir`.
        hang_seconds: A trainer that says nothing for so long is killed.
        stop_seconds: A worker that was asked to end does so within this time, whatever is away; None waits.
        kinds: Of the tickets that it takes, in this order.
        lease_seconds: How long a silent worker keeps its tickets. Longer than an outage that should be survived.
    """

    storage_url: str
    study: str
    runs_dir: Path
    worker_id: str
    device: str | None = None
    data: Path | None = None
    parent: int | None = None
    timeout: float | None = None
    lease_seconds: float = DEFAULT_LEASE_SECONDS
    checkpoints: str | None = None
    hang_seconds: float = HANG_SECONDS
    stop_seconds: float | None = None
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True, slots=True)
class WorkerOutcome:
    """How a worker's work ended."""

    ended: int
    """Trials that ended here."""
    interrupted: bool
    """Whether it was asked to end before the budget was spent."""


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def data_yaml(config: StudyConfig, runs_dir: Path) -> Path:
    """The study's data set YAML on this host; a built-in data set is written first where it is missing."""
    path = config.data_path(runs_dir)
    return data_on_this_host(path) if config.builtin_data is None else write_digits(path.parent)


def run_worker(options: WorkerOptions) -> WorkerOutcome:
    """Works on a study until its budget is spent or a signal arrives.

    Raises:
        UserInputError: No such study, or other data than the study was created with.
        StudyStoppedError: Too many trials in a row failed.
    """
    # At its end the interpreter would look through all that was imported, for seconds, before the kernel frees it.
    atexit.register(gc.freeze)
    ledger = open_existing(options.storage_url, options.study, patience=OUTAGE_SECONDS)
    ledger.initialise()
    record = ledger.study(options.study)
    config = StudyConfig.from_json(record.config)
    refuse_shared_database(config, options.storage_url, options.runs_dir)
    context = _open(options, ledger, record, config)
    warm_up(context.study)
    device = f"{context.train.device} {context.train.precision}"
    ledger.register_worker(options.worker_id, options.study, process_identity(), os.getpid(), device)
    with (
        StopFlag(options.parent, options.stop_seconds).installed() as stop,
        _mirror(options, context, record) as mirror,
    ):
        try:
            ended = Worker(context, mirror, stop).run()
            return WorkerOutcome(ended=ended, interrupted=stop.is_set)
        finally:
            ledger.retire_worker(options.worker_id)


def _open(options: WorkerOptions, ledger: Ledger, record: StudyRecord, config: StudyConfig) -> WorkerContext:
    data = options.data or data_yaml(config, options.runs_dir)
    dataset = load_dataset_config(data, single_class=config.train.single_cls)
    found = fingerprint(dataset)
    if found != record.fingerprint:
        raise StudyConflictError(
            f"{data}: fingerprint {found} is not that of study {config.name} ({record.fingerprint}): images, labels or "
            "names changed since it was created; allowed: the same data, or a study of another name"
        )
    train = replace(config.train_config(data), anchors=Prepared.of(record.config).anchors)
    device = resolve_device(options.device or train.device)
    train = replace(train, device=str(device), precision=resolve_precision(train.precision, device))
    require_compiler(train.compile, device.type)
    # The study's own timeout is the search's.
    timeout = config.timeout if options.timeout is None and SEARCH in options.kinds else options.timeout
    return WorkerContext(
        config=config,
        train=train,
        class_names=dataset.names,
        ledger=ledger,
        study=load_study(config, open_worker_storage(options.storage_url)),
        folder=StudyFolder(options.runs_dir, config.name),
        worker_id=options.worker_id,
        lease_seconds=options.lease_seconds,
        checkpoints=options.checkpoints or str(options.runs_dir),
        owner=record.owner,
        hang_seconds=options.hang_seconds * (1 if train.compile == "none" else COMPILING_HANGS),
        kinds=options.kinds,
        deadline=None if timeout is None else time.time() + timeout,
    )


def study_tracker(config: StudyConfig, runs_dir: Path) -> Tracker:
    """The tracker that a study's settings ask for."""
    tracking = config.tracking
    return open_tracker(enabled=tracking.enabled, uri=tracking.uri, runs_dir=runs_dir, experiment=tracking.experiment)


@contextmanager
def _mirror(options: WorkerOptions, context: WorkerContext, record: StudyRecord) -> Iterator[Mirror]:
    mirror_context = MirrorContext(
        config=context.config,
        record=record,
        folder=context.folder,
        class_names=context.class_names,
        storage_url=options.storage_url,
        weights=WeightsStore.open(context.checkpoints, context.config.name),
        worker_id=options.worker_id,
        tags={
            "yolosearch.sampler": context.config.sampler.name,
            "yolosearch.fingerprint": record.fingerprint,
            "yolosearch.host": platform.node(),
            "yolosearch.device": context.train.device,
            "yolosearch.precision": context.train.precision,
            **{f"yolosearch.version.{name}": number for name, number in versions().items()},
        },
    )
    tracker = study_tracker(context.config, options.runs_dir)
    with Mirror(context.ledger, context.study, tracker, mirror_context) as mirror:
        mirror.reconcile()
        try:
            yield mirror
        finally:
            # Also trials that others left, or that the ledger itself ended, get their final state.
            with suppress(SearchError):
                mirror.reconcile()
