"""Pictures of one colour, as some models make instead of refusing.

Revision ID: 0005
Revises: 0004
"""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op

revision: str = "0005"
down_revision: str | Sequence[str] | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    """Add the flag; nobody has looked at the outputs there are."""
    op.add_column(
        "outputs",
        sa.Column(
            "content_policy_suspected", sa.Boolean(), server_default=sa.false(), nullable=False
        ),
    )


def downgrade() -> None:
    """Take it back."""
    op.drop_column("outputs", "content_policy_suspected")
