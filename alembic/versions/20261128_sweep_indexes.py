"""Indexes for the sweep: it looks every second, however many jobs wait.

Revision ID: 0006
Revises: 0005
"""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op

revision: str = "0006"
down_revision: str | Sequence[str] | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

UNFINISHED = "status IN ('pending', 'processing')"


def upgrade() -> None:
    """Find what is to be cancelled in either state, what crashed, what waits after its start."""
    op.drop_index("ix_jobs_cancelling", table_name="jobs")
    _index("ix_jobs_cancelling", "cancel_requested_at", "cancel_requested_at IS NOT NULL")
    _index("ix_jobs_crashed", "crash_count", "crash_count > 0")
    _index("ix_jobs_begun", "ring_at", "worker_id IS NULL AND started_at IS NOT NULL")


def downgrade() -> None:
    """Take them back."""
    for name in ("ix_jobs_begun", "ix_jobs_crashed", "ix_jobs_cancelling"):
        op.drop_index(name, table_name="jobs")
    op.create_index(
        "ix_jobs_cancelling",
        "jobs",
        ["cancel_requested_at"],
        postgresql_where=sa.text("cancel_requested_at IS NOT NULL AND status = 'processing'"),
    )


def _index(name: str, column: str, condition: str) -> None:
    where = sa.text(f"{condition} AND {UNFINISHED}")
    op.create_index(name, "jobs", [column], postgresql_where=where)
