"""A worker says how many trials its packs have."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("yolosearch_worker", sa.Column("pack", sa.Integer))
