"""A ticket may be the retry of a failed one."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("yolosearch_ticket", sa.Column("retry_of", sa.Integer))
    op.create_index(
        "ix_yolosearch_ticket_study_kind_retry_of", "yolosearch_ticket", ["study", "kind", "retry_of"], unique=True
    )
