"""How fast a study will train: measured on this host, or as earlier studies of the same kind did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from search.config import StudyConfig
from search.database import make_engine
from search.errors import DatabaseError, SearchError, StudyConfigError
from search.forecast import Speed
from search.housekeeping import study_databases
from search.ledger import EpochRow, Ledger, Ticket
from search.outlook import LEAST_EPOCHS, speed_of
from search.space import pack_limit
from yolocore.training.capacity import best_size, epoch_seconds, measure_capacity
from yolocore.training.config import TrainConfig
from yolocore.training.trainer import TrainingData

LATEST_TRIALS = 16
"""Of an earlier study; so many say how fast it was."""

SAME_KEYS = ("model", "image_size", "batch_size", "optimizer", "rect", "multi_scale", "freeze", "compile")
"""Settings of `train` on which an epoch's time depends."""


def measure_speed(config: StudyConfig, train: TrainConfig) -> Speed:
    """Trains packs of growing size for a few steps each, and takes the fastest; a minute or two, and nothing is kept.

    Args:
        config: The study.
        train: Its training on this host.

    Raises:
        yolocore.errors.InputError: Data, weights or device cannot be used.
        SearchError: The device has no memory for it.
    """
    base = config.base_hyperparameters()
    data = TrainingData.load(train, base)
    try:
        largest = min(pack_limit(config), config.trials)
        tried = list(measure_capacity(train, data, base, largest))
        found = [one for one in tried if one.steps_per_second > 0]
        if not found:
            raise SearchError(f"study {config.name}: not even one trial trains on {train.device}: {tried[0].note}")
        slots = best_size(found) if config.train.pack == "auto" else max(one.slots for one in found)
        chosen = next(one for one in found if one.slots == slots)
        seconds = epoch_seconds(train, data, base, chosen) / slots
    finally:
        data.close()
    how = "" if train.compile == "none" else ", not compiled"
    return Speed(seconds=seconds, slots=slots, source=f"measured here on {train.device} {train.precision}{how}")


def earlier_speed(config: StudyConfig, fingerprint: str, device: str, storage_url: str, runs_dir: Path) -> Speed | None:
    """What the latest study with the same data and training reached on such a device; None if there is none.

    Args:
        config: The study to come.
        fingerprint: Of its data.
        device: And precision, as workers register them.
        storage_url: Its database, which may hold earlier studies.
        runs_dir: Folder of all studies.
    """
    urls = dict.fromkeys([storage_url, *study_databases(None, runs_dir)])
    alike = [pair for url in urls for pair in _alike(url, config, fingerprint)]
    for ledger, name, _ in sorted(alike, key=lambda entry: -entry[2]):
        rows = list(_rows_on(ledger, name, device))
        if len(rows) >= LEAST_EPOCHS:
            return speed_of(rows, config.train.eval_every, f"as study {name}")
    return None


def _alike(url: str, config: StudyConfig, fingerprint: str) -> Iterator[tuple[Ledger, str, float]]:
    """Studies of a database whose epochs cost the same: ledger, name, time of creation."""
    try:
        ledger = Ledger(make_engine(url, create=False), patience=0.0)
        ledger.check_schema()
        for record in ledger.studies():
            stored = StudyConfig.from_json(record.config)
            same = all(getattr(stored.train, key) == getattr(config.train, key) for key in SAME_KEYS)
            if same and record.fingerprint == fingerprint:
                yield ledger, record.name, record.created
    except (DatabaseError, StudyConfigError):
        return  # a database that cannot be read says nothing about speed


def _rows_on(ledger: Ledger, study: str, device: str) -> Iterator[EpochRow]:
    """The epochs that the latest trials made on such a device."""
    workers = {worker.id for worker in ledger.workers(study) if worker.device == device}
    trained: Iterable[Ticket] = (ticket for ticket in ledger.tickets(study) if ticket.worker in workers)
    latest = sorted(trained, key=lambda ticket: -(ticket.started or 0.0))[:LATEST_TRIALS]
    for ticket in latest:
        yield from (row for row in ledger.reports(ticket.id) if row.metrics.get("seconds", 0.0) > 0)
