"""The ledger's tables. A change here needs a migration in `migrations/versions`; a test compares the two."""

import json
import math
import numbers
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

PREFIX = "yolosearch_"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json_value(value: Any) -> Any:
    """A copy of `value` that strict JSON can hold.

    NaN and infinities become the strings "NaN", "Infinity" and "-Infinity", NumPy scalars plain numbers, tuples lists.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, dict):
        return {str(key): to_json_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(entry) for entry in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return finite_or_name(float(value))
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be stored as JSON")


def finite_or_name(value: float) -> float | str:
    """`value`, or the name that stands for a number JSON does not have."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def from_json_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The inverse of `to_json_value` for a flat mapping of numbers."""
    return {key: _NON_FINITE[value] if isinstance(value, str) else float(value) for key, value in metrics.items()}


class StrictJson(TypeDecorator[Any]):
    """JSON text that every reader accepts (see `to_json_value`); None is SQL's NULL. Keeps the order of keys."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Python to text."""
        return None if value is None else json.dumps(to_json_value(value), allow_nan=False, ensure_ascii=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        """Text to Python."""
        return None if value is None else json.loads(value)


metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

study_table = sa.Table(
    f"{PREFIX}study",
    metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("config", StrictJson, nullable=False),
    sa.Column("fingerprint", sa.String(128), nullable=False),
    sa.Column("versions", StrictJson, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("summary_run_id", sa.String(64)),
    sa.Column("stop_reason", sa.Text),
    # What stopped it, for programs: see `StopKind`.
    sa.Column("stop_kind", sa.String(16)),
    # Failures before this moment no longer count towards stopping the study again.
    sa.Column("resumed", sa.Double),
    # Who created it: lets a writer whose commit was not acknowledged see that it went through.
    sa.Column("token", sa.String(32), nullable=False),
)

ticket_table = sa.Table(
    f"{PREFIX}ticket",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study", sa.String(128), sa.ForeignKey(study_table.c.name), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("worker", sa.String(128)),
    sa.Column("lease_expires", sa.Double),
    sa.Column("fixed_params", StrictJson),
    sa.Column("trial_id", sa.Integer),
    sa.Column("trial_number", sa.Integer),
    sa.Column("params", StrictJson),
    sa.Column("run_id", sa.String(64)),
    sa.Column("epochs_done", sa.Integer, nullable=False),
    sa.Column("epochs_at_claim", sa.Integer, nullable=False),
    sa.Column("checkpoint", sa.Text),
    sa.Column("value", sa.Double),
    # Of a study of several objectives all values; `value` is the first of them.
    sa.Column("objective_values", StrictJson),
    sa.Column("best_epoch", sa.Integer),
    sa.Column("reason", sa.Text),
    sa.Column("stalled_attempts", sa.Integer, nullable=False),
    sa.Column("history", StrictJson, nullable=False),
    sa.Column("mirrored", sa.Boolean(create_constraint=False), nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("started", sa.Double),
    sa.Column("finished", sa.Double),
    # Number of the failed ticket that this one gives another chance.
    sa.Column("retry_of", sa.Integer),
    # Of the cheap training before the full one, and whether it led to that; NULL as long as that is open.
    sa.Column("fidelity_value", sa.Double),
    sa.Column("promoted", sa.Boolean(create_constraint=False)),
    # Of a rerun (kinds noise and confirm): whose hyperparameters, with which seed, for how many epochs.
    sa.Column("candidate", sa.Integer),
    sa.Column("seed", sa.Integer),
    sa.Column("epochs", sa.Integer),
    # The claim (or the addition) that wrote this row last; see study_table.c.token.
    sa.Column("token", sa.String(32), nullable=False),
    sa.UniqueConstraint("study", "kind", "number"),
    # Two tickets can never own one trial, even if both try to adopt it.
    sa.UniqueConstraint("study", "trial_id"),
    # Of two processes that retry a ticket at the same time, one fails.
    sa.Index(None, "study", "kind", "retry_of", unique=True),
    sa.Index(None, "study", "state", "number"),
    # The latest end and the best value per state, however many trials there are.
    sa.Index(None, "study", "state", "finished"),
    sa.Index(None, "study", "state", "value"),
    sa.Index(None, "worker", "state"),
)

epoch_table = sa.Table(
    f"{PREFIX}epoch",
    metadata,
    sa.Column("ticket_id", sa.Integer, sa.ForeignKey(ticket_table.c.id), primary_key=True),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("metrics", StrictJson, nullable=False),
    sa.Column("stored_at", sa.Double, nullable=False),
    sa.Column("prune", sa.Boolean(create_constraint=False)),
)

fidelity_table = sa.Table(
    f"{PREFIX}fidelity",
    metadata,
    sa.Column("ticket_id", sa.Integer, sa.ForeignKey(ticket_table.c.id), primary_key=True),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("value", sa.Double),
    sa.Column("metrics", StrictJson, nullable=False),
    sa.Column("stored_at", sa.Double, nullable=False),
)

worker_table = sa.Table(
    f"{PREFIX}worker",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("study", sa.String(128), sa.ForeignKey(study_table.c.name), nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("device", sa.String(64), nullable=False),
    sa.Column("started", sa.Double, nullable=False),
    sa.Column("heartbeat", sa.Double, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    # Trials that its packs have; NULL as long as it is not known.
    sa.Column("pack", sa.Integer),
    sa.Index(None, "study"),
)
