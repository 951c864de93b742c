"""The tables: jobs, their attempts, outputs and deletions, the workers, and the counts.

What the tables enforce by themselves (see `alembic/versions`): a terminal job row never changes, a
prediction belongs to one attempt only, and `job_counts` always equals `GROUP BY status`.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Enum,
    ForeignKey,
    Index,
    SmallInteger,
    String,
    Text,
    UniqueConstraint,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel
from uuid_utils.compat import uuid7

SQLModel.metadata.naming_convention = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class JobStatus(StrEnum):
    """Where a job is; the only moves are the ones named here."""

    PENDING = "pending"  # -> processing (claim), cancelled, failed (deadline)
    PROCESSING = "processing"  # -> completed, failed, cancelled, pending (retry, throttled)
    COMPLETED = "completed"  # terminal
    FAILED = "failed"  # terminal
    CANCELLED = "cancelled"  # terminal

    @property
    def is_terminal(self) -> bool:
        """True when the job can never change again."""
        return self in TERMINAL_STATUSES


TERMINAL_STATUSES = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})


class JobPhase(StrEnum):
    """How far a processing job has come; kept while it waits, so that the next worker resumes."""

    SUBMITTING = "submitting"  # an intent is committed, the create call may be under way
    WAITING = "waiting"  # the prediction runs
    STORING = "storing"  # the prediction has ended well, its outputs are being kept


class AttemptState(StrEnum):
    """How far one create call has come."""

    INTENT = "intent"  # committed before the call: the provider may or may not have it
    SUBMITTED = "submitted"  # the prediction id is known
    SETTLED = "settled"  # the outcome is known; nothing more can come of it


class Charged(StrEnum):
    """Whether the provider bills an attempt, as far as anybody can tell."""

    NO = "no"
    YES = "yes"
    UNKNOWN = "unknown"


def _words(values: type[StrEnum]) -> Enum:
    """A VARCHAR that holds the enum's values: a PostgreSQL ENUM would outlive `downgrade`."""
    return Enum(
        values,
        native_enum=False,
        length=16,
        values_callable=lambda members: [member.value for member in members],
    )


def _in(column: str, values: type[StrEnum]) -> str:
    return f"{column} IN ({', '.join(repr(value.value) for value in values)})"


UNCLAIMED = "worker_id IS NULL AND status IN ('pending', 'processing')"
CLAIMED = "worker_id IS NOT NULL AND status = 'processing'"
UNFINISHED = "status IN ('pending', 'processing')"
CANCELLING = f"cancel_requested_at IS NOT NULL AND {UNFINISHED}"
CRASHED = f"crash_count > 0 AND {UNFINISHED}"
BEGUN = f"worker_id IS NULL AND started_at IS NOT NULL AND {UNFINISHED}"
KEYED = "idempotency_key IS NOT NULL"
OPEN = "state <> 'settled'"
COMPLETED = "status = 'completed'"
UNPURGED = "purged_at IS NULL"


class Job(SQLModel, table=True):
    """One request for a generation: the truth about it, and its own outbox.

    A claimed job has a `worker_id`; an unclaimed one has none, and the sweep rings for it at
    `ring_at`. `lease_token` is the last claim's: a write that does not name it changes nothing.
    All times are the database's clock.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_in("status", JobStatus), name="status"),
        CheckConstraint(_in("phase", JobPhase), name="phase"),
        Index("ix_jobs_newest", text("created_at DESC"), text("id DESC")),
        Index("ix_jobs_status_newest", "status", text("created_at DESC"), text("id DESC")),
        Index(
            "uq_jobs_idempotency_key", "idempotency_key", unique=True, postgresql_where=text(KEYED)
        ),
        Index("ix_jobs_ring_at", "ring_at", postgresql_where=text(UNCLAIMED)),
        Index("ix_jobs_worker_id", "worker_id", postgresql_where=text(CLAIMED)),
        Index("ix_jobs_deadline_at", "deadline_at", postgresql_where=text(UNFINISHED)),
        Index("ix_jobs_completed_at", "completed_at", postgresql_where=text(COMPLETED)),
        Index("ix_jobs_cancelling", "cancel_requested_at", postgresql_where=text(CANCELLING)),
        Index("ix_jobs_crashed", "crash_count", postgresql_where=text(CRASHED)),
        Index("ix_jobs_begun", "ring_at", postgresql_where=text(BEGUN)),
    )

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    prompt: str = Field(sa_type=Text)
    model_name: str = Field(sa_type=Text)
    parameters: dict[str, Any] = Field(default_factory=dict, sa_type=JSONB)
    request_id: str | None = Field(default=None, sa_type=Text)
    idempotency_key: str | None = Field(default=None, sa_type=Text)
    fingerprint: str | None = Field(default=None, sa_type=Text)

    status: JobStatus = Field(
        default=JobStatus.PENDING,
        sa_column=Column(_words(JobStatus), nullable=False, server_default=JobStatus.PENDING),
    )
    phase: JobPhase | None = Field(default=None, sa_column=Column(_words(JobPhase)))
    created_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})
    started_at: datetime | None = None
    completed_at: datetime | None = None
    deadline_at: datetime
    cancel_requested_at: datetime | None = None

    retry_count: int = Field(default=0, sa_type=SmallInteger)
    throttle_count: int = Field(default=0)
    crash_count: int = Field(default=0, sa_type=SmallInteger)
    next_attempt_at: datetime | None = None
    ring_at: datetime
    error_code: str | None = Field(default=None, sa_type=Text)
    error_message: str | None = Field(default=None, sa_type=Text)

    worker_id: UUID | None = None
    lease_token: UUID | None = None
    external_job_id: str | None = Field(default=None, sa_type=Text)


class Attempt(SQLModel, table=True):
    """One create call, committed before it is made: the ledger of what may have been paid."""

    __tablename__ = "attempts"
    __table_args__ = (
        CheckConstraint(_in("state", AttemptState), name="state"),
        CheckConstraint(_in("charged", Charged), name="charged"),
        UniqueConstraint("job_id", "number"),
        UniqueConstraint("provider", "prediction_id"),
        # Never two open attempts for one job: whatever the code does, the database refuses.
        Index("uq_attempts_open", "job_id", unique=True, postgresql_where=text(OPEN)),
    )

    id: UUID = Field(default_factory=uuid7, primary_key=True)
    job_id: UUID = Field(
        sa_column=Column(ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False)
    )
    number: int = Field(sa_type=SmallInteger)
    provider: str = Field(sa_type=Text)
    model_name: str = Field(sa_type=Text)
    input: dict[str, Any] = Field(sa_type=JSONB)
    state: AttemptState = Field(
        default=AttemptState.INTENT,
        sa_column=Column(_words(AttemptState), nullable=False, server_default=AttemptState.INTENT),
    )
    prediction_id: str | None = Field(default=None, sa_type=Text)
    version: str | None = Field(default=None, sa_type=Text)
    outcome: str | None = Field(default=None, sa_type=Text)
    error_class: str | None = Field(default=None, sa_type=Text)
    error_message: str | None = Field(default=None, sa_type=Text)
    charged: Charged = Field(
        default=Charged.UNKNOWN,
        sa_column=Column(_words(Charged), nullable=False, server_default=Charged.UNKNOWN),
    )
    predict_time_seconds: float | None = None
    created_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})
    submitted_at: datetime | None = None
    settled_at: datetime | None = None
    # When the sweep may (again) try to stop it, should its job have ended without it.
    stop_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})


class Output(SQLModel, table=True):
    """One stored file of a completed job; written in the same transaction as `completed`."""

    __tablename__ = "outputs"

    job_id: UUID = Field(
        sa_column=Column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    )
    index: int = Field(sa_type=SmallInteger, primary_key=True)
    name: str = Field(sa_type=Text, unique=True)
    media_type: str = Field(sa_type=Text)
    size_bytes: int = Field(sa_type=BigInteger)
    sha256: str = Field(sa_type=String(64))
    width: int | None = None
    height: int | None = None
    duration_seconds: float | None = None
    # Every pixel has the same colour: what some models make instead of refusing.
    content_policy_suspected: bool = Field(
        default=False, sa_column_kwargs={"server_default": false()}
    )


class DeletionKind(StrEnum):
    """What is deleted when its retention time is over; each has its own."""

    MEDIA = "media"  # every output of the job, and the thumbnails
    METADATA = "metadata"


class Deletion(SQLModel, table=True):
    """Files of a completed job that are deleted: for clients at once, in the storage by and by.

    The mark comes first, so that no row ever promises a file that is gone; `purged_at` is set
    when the files are gone, so that a crash in between is found. (The job's own row is terminal
    and never changes.)
    """

    __tablename__ = "deletions"
    __table_args__ = (
        CheckConstraint(_in("kind", DeletionKind), name="kind"),
        Index("ix_deletions_completed_at", "kind", "completed_at"),
        Index("ix_deletions_unpurged", "kind", "deleted_at", postgresql_where=text(UNPURGED)),
    )

    job_id: UUID = Field(
        sa_column=Column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    )
    kind: DeletionKind = Field(sa_column=Column(_words(DeletionKind), primary_key=True))
    completed_at: datetime
    deleted_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})
    purged_at: datetime | None = None


class Worker(SQLModel, table=True):
    """One living worker process; silent for longer than its lease, it loses its jobs."""

    __tablename__ = "workers"

    id: UUID = Field(primary_key=True)
    name: str = Field(sa_type=Text)
    concurrency: int
    started_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})
    heartbeat_at: datetime = Field(default=None, sa_column_kwargs={"server_default": func.now()})


class JobCount(SQLModel, table=True):
    """Jobs by status, kept by triggers; the slots keep concurrent writers off one row."""

    __tablename__ = "job_counts"

    status: str = Field(sa_type=String(16), primary_key=True)
    slot: int = Field(sa_type=SmallInteger, primary_key=True)
    count: int = Field(sa_type=BigInteger)
