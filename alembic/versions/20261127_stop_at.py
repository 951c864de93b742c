"""When the sweep may try to stop the prediction of a job that has ended.

Revision ID: 0002
Revises: 0001
"""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op

revision: str = "0002"
down_revision: str | Sequence[str] | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Add the time; the attempts there are may be stopped at once."""
    op.add_column(
        "attempts",
        sa.Column(
            "stop_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False
        ),
    )


def downgrade() -> None:
    """Take it back."""
    op.drop_column("attempts", "stop_at")
