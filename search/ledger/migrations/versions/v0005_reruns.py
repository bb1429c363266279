"""Tickets beside the search's budget say whose hyperparameters they train, with which seed, and how long."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("candidate", "seed", "epochs"):
        op.add_column("yolosearch_ticket", sa.Column(name, sa.Integer))
