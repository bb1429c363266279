"""Studies, tickets, epoch reports and workers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_study()
    _create_ticket()
    _create_epoch()
    _create_worker()


def _create_study() -> None:
    op.create_table(
        "yolosearch_study",
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.String(128), nullable=False),
        sa.Column("versions", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("summary_run_id", sa.String(64)),
        sa.Column("stop_reason", sa.Text),
        sa.Column("resumed", sa.Double),
        sa.Column("token", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_yolosearch_study"),
    )


def _create_ticket() -> None:
    op.create_table(
        "yolosearch_ticket",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("study", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("worker", sa.String(128)),
        sa.Column("lease_expires", sa.Double),
        sa.Column("fixed_params", sa.Text),
        sa.Column("trial_id", sa.Integer),
        sa.Column("trial_number", sa.Integer),
        sa.Column("params", sa.Text),
        sa.Column("run_id", sa.String(64)),
        sa.Column("epochs_done", sa.Integer, nullable=False),
        sa.Column("epochs_at_claim", sa.Integer, nullable=False),
        sa.Column("checkpoint", sa.Text),
        sa.Column("value", sa.Double),
        sa.Column("best_epoch", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("stalled_attempts", sa.Integer, nullable=False),
        sa.Column("history", sa.Text, nullable=False),
        sa.Column("mirrored", sa.Boolean(create_constraint=False), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("started", sa.Double),
        sa.Column("finished", sa.Double),
        sa.Column("token", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_yolosearch_ticket"),
        sa.ForeignKeyConstraint(["study"], ["yolosearch_study.name"], name="fk_yolosearch_ticket_study"),
        sa.UniqueConstraint("study", "kind", "number", name="uq_yolosearch_ticket_study_kind_number"),
        sa.UniqueConstraint("study", "trial_id", name="uq_yolosearch_ticket_study_trial_id"),
    )
    op.create_index("ix_yolosearch_ticket_study_state_number", "yolosearch_ticket", ["study", "state", "number"])
    op.create_index("ix_yolosearch_ticket_worker_state", "yolosearch_ticket", ["worker", "state"])


def _create_epoch() -> None:
    op.create_table(
        "yolosearch_epoch",
        sa.Column("ticket_id", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("stored_at", sa.Double, nullable=False),
        sa.Column("prune", sa.Boolean(create_constraint=False)),
        sa.PrimaryKeyConstraint("ticket_id", "epoch", name="pk_yolosearch_epoch"),
        sa.ForeignKeyConstraint(["ticket_id"], ["yolosearch_ticket.id"], name="fk_yolosearch_epoch_ticket_id"),
    )


def _create_worker() -> None:
    op.create_table(
        "yolosearch_worker",
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("study", sa.String(128), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("started", sa.Double, nullable=False),
        sa.Column("heartbeat", sa.Double, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_yolosearch_worker"),
        sa.ForeignKeyConstraint(["study"], ["yolosearch_study.name"], name="fk_yolosearch_worker_study"),
    )
    op.create_index("ix_yolosearch_worker_study", "yolosearch_worker", ["study"])
