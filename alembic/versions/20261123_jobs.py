"""Jobs, attempts, outputs, workers, the counts, and the triggers that guard them.

Revision ID: 0001
Revises:
"""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from alembic import op

revision: str = "0001"
down_revision: str | Sequence[str] | None = None
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

# Promise: terminal is terminal. Whatever the code does, the database refuses.
GUARD = """
CREATE FUNCTION refuse_terminal_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'job % is %: a terminal job never changes', OLD.id, OLD.status
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER jobs_terminal_guard BEFORE UPDATE ON jobs FOR EACH ROW
    WHEN (OLD.status IN ('completed', 'failed', 'cancelled') AND OLD IS DISTINCT FROM NEW)
    EXECUTE FUNCTION refuse_terminal_change();
"""

# Statement-level, so a batch costs one update; 16 slots keep concurrent writers off one row.
COUNTS = """
CREATE FUNCTION add_job_counts(statuses text[], deltas bigint[]) RETURNS void LANGUAGE sql AS $$
    INSERT INTO job_counts AS c (status, slot, count)
    SELECT s, pg_backend_pid() % 16, sum(d) FROM unnest(statuses, deltas) AS u(s, d)
    GROUP BY s HAVING sum(d) <> 0 ORDER BY s
    ON CONFLICT (status, slot) DO UPDATE SET count = c.count + EXCLUDED.count
$$;
CREATE FUNCTION count_inserted_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM add_job_counts(array_agg(status::text), array_agg(1::bigint)) FROM new_rows;
    RETURN NULL;
END $$;
CREATE FUNCTION count_updated_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM add_job_counts(array_agg(s), array_agg(d)) FROM (
        SELECT status::text AS s, -1::bigint AS d FROM old_rows
        UNION ALL SELECT status::text, 1 FROM new_rows) AS changes;
    RETURN NULL;
END $$;
CREATE FUNCTION count_deleted_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM add_job_counts(array_agg(status::text), array_agg(-1::bigint)) FROM old_rows;
    RETURN NULL;
END $$;
CREATE FUNCTION forget_job_counts() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM job_counts;
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_count_insert AFTER INSERT ON jobs
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION count_inserted_jobs();
CREATE TRIGGER jobs_count_update AFTER UPDATE ON jobs
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION count_updated_jobs();
CREATE TRIGGER jobs_count_delete AFTER DELETE ON jobs
    REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION count_deleted_jobs();
CREATE TRIGGER jobs_count_truncate AFTER TRUNCATE ON jobs
    FOR EACH STATEMENT EXECUTE FUNCTION forget_job_counts();
"""


def upgrade() -> None:
    op.create_table(
        "job_counts",
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("slot", sa.SmallInteger(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("status", "slot", name=op.f("pk_job_counts")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("parameters", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.Column(
            "status",
            sa.Enum(
                "pending",
                "processing",
                "completed",
                "failed",
                "cancelled",
                name="jobstatus",
                native_enum=False,
                length=16,
            ),
            server_default="pending",
            nullable=False,
        ),
        sa.Column(
            "phase",
            sa.Enum(
                "submitting", "waiting", "storing", name="jobphase", native_enum=False, length=16
            ),
            nullable=True,
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "updated_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("completed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("retry_count", sa.SmallInteger(), nullable=False),
        sa.Column("throttle_count", sa.Integer(), nullable=False),
        sa.Column("crash_count", sa.SmallInteger(), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ring_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("worker_id", sa.Uuid(), nullable=True),
        sa.Column("lease_token", sa.Uuid(), nullable=True),
        sa.Column("external_job_id", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "phase IN ('submitting', 'waiting', 'storing')", name=op.f("ck_jobs_phase")
        ),
        sa.CheckConstraint(
            "status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')",
            name=op.f("ck_jobs_status"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index(
        "ix_jobs_cancelling",
        "jobs",
        ["cancel_requested_at"],
        unique=False,
        postgresql_where=sa.text("cancel_requested_at IS NOT NULL AND status = 'processing'"),
    )
    op.create_index(
        "ix_jobs_deadline_at",
        "jobs",
        ["deadline_at"],
        unique=False,
        postgresql_where=sa.text("status IN ('pending', 'processing')"),
    )
    op.create_index(
        "ix_jobs_newest",
        "jobs",
        [sa.literal_column("created_at DESC"), sa.literal_column("id DESC")],
        unique=False,
    )
    op.create_index(
        "ix_jobs_ring_at",
        "jobs",
        ["ring_at"],
        unique=False,
        postgresql_where=sa.text("worker_id IS NULL AND status IN ('pending', 'processing')"),
    )
    op.create_index(
        "ix_jobs_status_newest",
        "jobs",
        ["status", sa.literal_column("created_at DESC"), sa.literal_column("id DESC")],
        unique=False,
    )
    op.create_index(
        "ix_jobs_worker_id",
        "jobs",
        ["worker_id"],
        unique=False,
        postgresql_where=sa.text("worker_id IS NOT NULL AND status = 'processing'"),
    )
    op.create_index(
        "uq_jobs_idempotency_key",
        "jobs",
        ["idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("concurrency", sa.Integer(), nullable=False),
        sa.Column(
            "started_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "heartbeat_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "attempts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.SmallInteger(), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("input", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column(
            "state",
            sa.Enum(
                "intent", "submitted", "settled", name="attemptstate", native_enum=False, length=16
            ),
            server_default="intent",
            nullable=False,
        ),
        sa.Column("prediction_id", sa.Text(), nullable=True),
        sa.Column("version", sa.Text(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("error_class", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column(
            "charged",
            sa.Enum("no", "yes", "unknown", name="charged", native_enum=False, length=16),
            server_default="unknown",
            nullable=False,
        ),
        sa.Column("predict_time_seconds", sa.Float(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("submitted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("charged IN ('no', 'yes', 'unknown')", name=op.f("ck_attempts_charged")),
        sa.CheckConstraint(
            "state IN ('intent', 'submitted', 'settled')", name=op.f("ck_attempts_state")
        ),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_attempts_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("job_id", "number", name=op.f("uq_attempts_job_id_number")),
        sa.UniqueConstraint(
            "provider", "prediction_id", name=op.f("uq_attempts_provider_prediction_id")
        ),
    )
    op.create_index(
        "uq_attempts_open",
        "attempts",
        ["job_id"],
        unique=True,
        postgresql_where=sa.text("state <> 'settled'"),
    )
    op.create_table(
        "outputs",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.SmallInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("width", sa.Integer(), nullable=True),
        sa.Column("height", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_outputs_job_id_jobs"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "index", name=op.f("pk_outputs")),
        sa.UniqueConstraint("name", name=op.f("uq_outputs_name")),
    )
    op.execute(GUARD)
    op.execute(COUNTS)


def downgrade() -> None:
    op.drop_table("outputs")
    op.drop_table("attempts")
    op.drop_table("workers")
    op.drop_table("jobs")
    op.drop_table("job_counts")
    op.execute("DROP FUNCTION refuse_terminal_change")
    op.execute(
        "DROP FUNCTION count_inserted_jobs, count_updated_jobs, count_deleted_jobs,"
        " forget_job_counts, add_job_counts"
    )
