"""How long a video or a sound plays.

Revision ID: 0004
Revises: 0003
"""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op

revision: str = "0004"
down_revision: str | Sequence[str] | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Add the duration; of the outputs there are it is not known."""
    op.add_column("outputs", sa.Column("duration_seconds", sa.Float(), nullable=True))


def downgrade() -> None:
    """Take it back."""
    op.drop_column("outputs", "duration_seconds")
