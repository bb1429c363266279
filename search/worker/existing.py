"""What is looked at before anything is opened or created; nothing here imports torch or Optuna."""

from __future__ import annotations

from pathlib import Path

from search.config import StudyConfig
from search.database import database_errors, make_engine, mask_url, schema_owner, sqlite_path, wait_until_ready
from search.errors import UnknownStudyError
from search.ledger import Ledger
from search.tracking import default_tracking_uri, refuse_studys_database

OUTAGE_SECONDS = 600.0
"""How long those who work on a study wait for its database before they give up; training goes on meanwhile."""


HANG_SECONDS = 900.0
"""A trainer that says nothing for so long is taken for hung and killed."""


def open_existing(storage_url: str, study: str, patience: float = 60.0) -> Ledger:
    """The ledger of a database that holds studies.

    Args:
        storage_url: its URL.
        study: the study that is looked for; named in the error only.
        patience: seconds for which the ledger retries while the database is away.

    Raises:
        UnknownStudyError: there is no such database file, or no study in the database.
        DatabaseError: the database cannot be reached.
    """
    path = sqlite_path(storage_url)
    where = f"{mask_url(storage_url)}" if path is None else str(path)
    remedy = "allowed: a study that `yolosearch run` created; see --storage and --runs-dir"
    if path is not None and not path.is_file():
        raise UnknownStudyError(f"study {study}: no database {where}; {remedy}")
    wait_until_ready(storage_url)
    engine = make_engine(storage_url, create=False)
    with database_errors(storage_url):
        owner = schema_owner(engine)
    if owner == "empty":
        raise UnknownStudyError(f"study {study}: {where} holds no studies; {remedy}")
    return Ledger(engine, patience=patience)


def refuse_shared_database(config: StudyConfig, storage_url: str, runs_dir: Path) -> None:
    """Raises TrackingConfigError if MLflow was told to use the study's database, or one of other tables."""
    if config.tracking.enabled:
        refuse_studys_database(config.tracking.uri or default_tracking_uri(runs_dir), storage_url)
