"""What the database says of itself, for `doctor`; writes nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from search.database import READ_ONLY, SchemaOwner, database_errors, make_engine, schema_owner
from search.ledger.rows import clock
from search.ledger.schema import known_revisions, stored_revision


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseFacts:
    """One look at a database."""

    product: str
    """Name and version."""
    owner: SchemaOwner
    revision: str | None
    """Of the ledger's tables; None if there are none."""
    newest_revision: str
    """That this version of the program makes."""
    clock_offset: float
    """Seconds by which the database's clock is ahead of this host's."""
    encryption: str | None
    """TLS version and cipher of the connection; None if it is not encrypted, or goes through no network."""
    is_local: bool
    """A file, or a server that was reached by a socket of this host."""


def database_facts(url: str) -> DatabaseFacts:
    """Connects once.

    Raises:
        DatabaseError: it cannot be reached, or holds a ledger that this version cannot read.
        UserInputError: the URL cannot be used.
    """
    engine = make_engine(url, create=False, pooled=False)
    with database_errors(url), engine.connect().execution_options(**READ_ONLY) as connection:
        is_sqlite = connection.dialect.name == "sqlite"
        name = "SQLite" if is_sqlite else "PostgreSQL"
        version = ".".join(map(str, connection.dialect.server_version_info or ()))
        return DatabaseFacts(
            product=f"{name} {version}",
            owner=schema_owner(engine),
            revision=stored_revision(engine),
            newest_revision=known_revisions()[0],
            clock_offset=0.0 if is_sqlite else _clock_offset(connection),
            encryption=None if is_sqlite else _encryption(connection),
            is_local=is_sqlite or _by_socket(connection),
        )


def _clock_offset(connection: Connection) -> float:
    before = time.time()
    there = clock(connection)
    return there - (before + time.time()) / 2


def _encryption(connection: Connection) -> str | None:
    query = sa.text("SELECT ssl, version, cipher FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    row = connection.execute(query).one_or_none()
    return f"{row.version} {row.cipher}" if row is not None and row.ssl else None


def _by_socket(connection: Connection) -> bool:
    return connection.execute(sa.text("SELECT inet_server_addr()")).scalar() is None
