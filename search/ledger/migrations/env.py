"""Alembic's entry: migrates the ledger's tables on the connection that `search.ledger.schema` passes in."""

from typing import Any

from alembic import context

from search.ledger.tables import PREFIX, metadata


def _is_ours(_entry: object, name: str | None, kind: str, _reflected: bool, _other: object) -> bool:
    """Optuna's tables live in the same schema and are none of our business."""
    return kind != "table" or (name or "").startswith(PREFIX)


def _migrate(connection: Any) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=f"{PREFIX}alembic_version",
        include_object=_is_ours,
        # True for SQLite too: our engine begins its transactions itself, and a half-made schema is never committed.
        transactional_ddl=True,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()


_migrate(context.config.attributes["connection"])
