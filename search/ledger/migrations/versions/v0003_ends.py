"""The latest end and the best value of a state are found without reading all its tickets."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in ("finished", "value"):
        op.create_index(f"ix_yolosearch_ticket_study_state_{column}", "yolosearch_ticket", ["study", "state", column])
