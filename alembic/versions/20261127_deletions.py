"""Deletions: whose files are gone because their retention time is over.

The index on `jobs` is built while writers wait: seconds for millions of jobs.

Revision ID: 0003
Revises: 0002
"""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op

revision: str = "0003"
down_revision: str | Sequence[str] | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "deletions",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column(
            "kind",
            sa.Enum("media", "metadata", name="deletionkind", native_enum=False, length=16),
            nullable=False,
        ),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "deleted_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("purged_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('media', 'metadata')", name=op.f("ck_deletions_kind")),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_deletions_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "kind", name=op.f("pk_deletions")),
    )
    op.create_index(
        "ix_deletions_completed_at", "deletions", ["kind", "completed_at"], unique=False
    )
    op.create_index(
        "ix_deletions_unpurged",
        "deletions",
        ["kind", "deleted_at"],
        unique=False,
        postgresql_where=sa.text("purged_at IS NULL"),
    )
    op.create_index(
        "ix_jobs_completed_at",
        "jobs",
        ["completed_at"],
        unique=False,
        postgresql_where=sa.text("status = 'completed'"),
    )


def downgrade() -> None:
    """Forget which files are deleted: their jobs answer 404 instead of 410 again."""
    op.drop_index("ix_jobs_completed_at", "jobs")
    op.drop_table("deletions")
