"""Brings the ledger's tables to this version's schema, and refuses a schema that is not ours or is newer."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection, Engine

from search.database import READ_ONLY, database_errors, init_lock, mask_url, refuse_foreign_schema
from search.errors import DatabaseError, OlderSchemaError
from search.ledger.tables import PREFIX

VERSION_TABLE = f"{PREFIX}alembic_version"


def initialise(engine: Engine) -> None:
    """Creates or upgrades the tables, once however many processes call it at the same time.

    Raises:
        DatabaseError: the schema is another application's or a newer version's (nothing was written), or the database
            cannot be reached.
    """
    refuse_foreign_schema(engine)
    with database_errors(engine.url):
        if _is_current(engine):
            return
        with init_lock(engine.url):
            refuse_foreign_schema(engine)
            if not _is_current(engine):
                with engine.begin() as connection:
                    command.upgrade(_config(connection), "head")


def check_schema(engine: Engine) -> None:
    """For commands that only read.

    Raises:
        DatabaseError: there is no ledger, or one of another version.
    """
    refuse_foreign_schema(engine)
    with database_errors(engine.url):
        revision = stored_revision(engine)
    if revision is None:
        raise DatabaseError(f"{mask_url(engine.url)} holds no study yet; `yolosearch run` makes one")
    if revision != known_revisions()[0]:
        raise OlderSchemaError(
            f"{mask_url(engine.url)} has the ledger schema {revision} of an older yolosearch; "
            "`yolosearch create`, `run` or `worker` upgrades it"
        )


def _is_current(engine: Engine) -> bool:
    """Whether the schema is this version's; raises for one that this version does not know."""
    return stored_revision(engine) == known_revisions()[0]


def known_revisions() -> list[str]:
    """The revisions of this version, newest first."""
    script = ScriptDirectory.from_config(_config())
    return [entry.revision for entry in script.walk_revisions()]


def stored_revision(engine: Engine) -> str | None:
    """The schema's revision, None if there is none yet; raises for one that this version does not know."""
    with engine.connect().execution_options(**READ_ONLY) as connection:
        tables = set(sa.inspect(connection).get_table_names())
        if VERSION_TABLE not in tables:
            _refuse_leftovers(engine, {table for table in tables if table.startswith(PREFIX)})
            return None
        revision: str | None = connection.execute(
            sa.text(f"SELECT version_num FROM {VERSION_TABLE}")
        ).scalar_one_or_none()
    known = known_revisions()
    if revision is not None and revision not in known:
        raise DatabaseError(
            f"{mask_url(engine.url)} has the ledger schema {revision}, made by a newer yolosearch; "
            f"this one knows up to {known[0]}: update yolosearch"
        )
    return revision


def _refuse_leftovers(engine: Engine, tables: set[str]) -> None:
    if tables:
        raise DatabaseError(
            f"{mask_url(engine.url)} holds {', '.join(sorted(tables))} but no {VERSION_TABLE}: "
            "restore a complete backup or use an empty database"
        )


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config
