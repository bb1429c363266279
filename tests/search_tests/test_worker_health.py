"""The health check of a worker's container, where the clocks of host and database differ."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from search.database import make_engine
from search.ledger import Ledger, StudyRecord
from search.worker.host import process_identity

SCRIPT = Path(__file__).parents[2] / "docker" / "worker_health.py"


def health(url: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "s"],
        env={**os.environ, "YOLOSEARCH_STORAGE_URL": url, "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def set_clock(url: str, offset: str) -> None:
    """What the database takes for the time: a function of the name in a schema that is looked through first."""
    shifted = "SELECT pg_catalog.clock_timestamp() + interval"
    engine = make_engine(url, pooled=False)
    with engine.begin() as connection:
        for statement in (
            "CREATE SCHEMA IF NOT EXISTS shifted",
            "CREATE OR REPLACE FUNCTION shifted.clock_timestamp() RETURNS timestamptz LANGUAGE sql "
            f"AS $$ {shifted} '{offset}' $$",
            f"ALTER DATABASE {make_url(url).database} SET search_path = public, shifted, pg_catalog",
        ):
            connection.execute(sa.text(statement))


@pytest.mark.parametrize("offset", ["-1 hour", "1 hour"])
def test_worker_health_goes_by_the_clock_of_the_database(postgres_url: str, offset: str) -> None:
    set_clock(postgres_url, offset)
    ledger = Ledger(make_engine(postgres_url, pooled=False))
    ledger.initialise()
    ledger.create_study(StudyRecord(name="s", config={}, fingerprint="f", versions={}, created=0.0), [None], None)
    ledger.register_worker("near", "s", process_identity(), os.getpid(), "cpu")

    assert health(postgres_url) == (0, "")
    set_clock(postgres_url, f"{offset} 11 minutes")
    code, said = health(postgres_url)

    assert code == 1
    assert said.count("\n") == 1
    assert "beats for study s" in said
