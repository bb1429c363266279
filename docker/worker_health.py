"""Health check of a worker's container: the worker of this container beats in the studies' database.

`python worker_health.py STUDY` (a name, or its YAML) exits 0 if it does, else 1 with one line that says why.
"""

import os
import platform
import sys
from pathlib import Path

from search.config import load_study_config
from search.database import make_engine, mask_url
from search.errors import SearchError
from search.ledger import Ledger, WorkerState

SILENT_SECONDS = 600.0
"""Twice the default lease: a worker that is silent for so long has lost its trials to another."""


def silent_seconds(url: str, study: str) -> float | None:
    """For how long no running worker of this host was heard of; None if there is none.

    Both ends are on the database's clock, since this host's may be off.
    """
    ledger = Ledger(make_engine(url, create=False, pooled=False), patience=5.0)
    host = platform.node()
    beats = [
        row.heartbeat
        for row in ledger.workers(study)
        if row.state is WorkerState.RUNNING and row.host.partition("#")[0] == host
    ]
    return ledger.now() - max(beats) if beats else None


def main() -> int:
    """Returns the exit code."""
    study = sys.argv[1]
    try:
        name = load_study_config(Path(study)).name if study.endswith((".yaml", ".yml")) else study
        silent = silent_seconds(os.environ["YOLOSEARCH_STORAGE_URL"], name)
    except SearchError as error:
        print(mask_url(str(error)))
        return 1
    if silent is None or silent > SILENT_SECONDS:
        print(f"no worker of {platform.node()} beats for study {name}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
