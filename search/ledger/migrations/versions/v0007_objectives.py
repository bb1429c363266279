"""A trial may have values under several objectives, and a study says what kind of end it has come to."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("yolosearch_ticket", sa.Column("objective_values", sa.Text))
    op.add_column("yolosearch_study", sa.Column("stop_kind", sa.String(16)))
