"""A trial may have a cheap training before the full one."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("yolosearch_ticket", sa.Column("fidelity_value", sa.Double))
    op.add_column("yolosearch_ticket", sa.Column("promoted", sa.Boolean(create_constraint=False)))
    op.create_table(
        "yolosearch_fidelity",
        sa.Column("ticket_id", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("value", sa.Double),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("stored_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("ticket_id", "epoch", name="pk_yolosearch_fidelity"),
        sa.ForeignKeyConstraint(["ticket_id"], ["yolosearch_ticket.id"], name="fk_yolosearch_fidelity_ticket_id"),
    )
