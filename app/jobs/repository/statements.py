"""Conditions and guarded updates that more than one part of the repository is made of."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Update, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from app.db import Sessions, autocommitting
from app.errors import LeaseLost
from app.jobs.models import Attempt, AttemptState, Charged, Job, JobPhase, JobStatus
from app.jobs.repository.records import Lease
from app.jobs.settlement import Settlement
from app.providers.base import Prediction

# A create call begins within this time of its intent (see `Submitter`), or not at all.
SUBMIT_WINDOW_SECONDS = 1.0
MAX_CRASHES = 3

UNFINISHED = (JobStatus.PENDING, JobStatus.PROCESSING)

# The tables' columns, typed for SQLAlchemy's expressions.
jobs = SQLModel.metadata.tables["jobs"].c
attempts = SQLModel.metadata.tables["attempts"].c
outputs = SQLModel.metadata.tables["outputs"].c
deletions = SQLModel.metadata.tables["deletions"].c
workers = SQLModel.metadata.tables["workers"].c
counts = SQLModel.metadata.tables["job_counts"].c

IS_OPEN = attempts.state != AttemptState.SETTLED


class Repository:
    """Jobs in short transactions of their own; never held across a network call.

    A statement that is a transaction by itself goes without BEGIN and COMMIT, each of which would
    be a round trip: of 31 that a job took, 9 are left out.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._transactions = sessions
        self._statements = autocommitting(sessions)


def guarded(lease: Lease, *, cancelling: bool = False) -> Update:
    """Start an UPDATE that changes nothing unless the lease is the last claim's.

    Once a cancel has been asked for, only what `cancelling` allows may still be written.
    """
    statement = update(Job).where(*owned(lease))
    if not cancelling:
        statement = statement.where(jobs.cancel_requested_at.is_(None))
    return statement.values(updated_at=func.now())


def owned(lease: Lease) -> Sequence[ColumnElement[bool]]:
    """The job is the one that this lease was given for by its last claim."""
    return (
        jobs.id == lease.job_id,
        jobs.status == JobStatus.PROCESSING,
        jobs.lease_token == lease.token,
    )


def finish_cancel(condition: ColumnElement[bool]) -> Any:
    """pending | processing -> cancelled, unless a create call may be just under way.

    The phase is read from the job's own row, so a concurrent `begin_attempt` is seen: a
    sub-query on attempts would be answered from the older snapshot.
    """
    no_create_under_way = or_(
        jobs.status == JobStatus.PENDING,
        jobs.phase.is_distinct_from(JobPhase.SUBMITTING),
        jobs.cancel_requested_at <= in_seconds(-SUBMIT_WINDOW_SECONDS),
    )
    return (
        update(Job)
        .where(condition, jobs.status.in_(UNFINISHED), no_create_under_way)
        .values(
            status=JobStatus.CANCELLED,
            cancel_requested_at=first_asked(),
            updated_at=func.now(),
            **ended(),
        )
        .returning(Job)
    )


def first_asked() -> ColumnElement[datetime]:
    """When the cancel was asked for: the first time counts."""
    # Not `now()`: the transaction may have begun before the intent that it must outwait.
    return func.coalesce(jobs.cancel_requested_at, func.clock_timestamp())


def ended() -> dict[str, Any]:
    """What every job has that is over, whatever its end."""
    return {"phase": None, "worker_id": None, "next_attempt_at": None, "completed_at": func.now()}


def give_prediction(attempt_id: UUID, prediction: Prediction) -> Any:
    """Give an attempt its prediction, if it has none; whatever it was taken for before."""
    return (
        update(Attempt)
        .where(attempts.id == attempt_id, attempts.prediction_id.is_(None))
        .values(
            state=AttemptState.SUBMITTED,
            prediction_id=prediction.id,
            version=prediction.version,
            submitted_at=func.now(),
            stop_at=func.now(),  # should it be an orphan's: now, not when it was to be looked for
            charged=Charged.UNKNOWN,
            outcome=None,
            error_class=None,
            error_message=None,
            settled_at=None,
        )
        .returning(attempts.id)
    )


def settle(settlement: Settlement) -> Update:
    """Close an attempt that is open and has the prediction that the settlement knows of."""
    return (
        update(Attempt)
        .where(
            attempts.id == settlement.attempt_id,
            IS_OPEN,
            attempts.prediction_id.is_not_distinct_from(settlement.prediction_id),
        )
        .values(
            state=AttemptState.SETTLED,
            outcome=settlement.outcome,
            charged=settlement.charged,
            error_class=settlement.error_class,
            error_message=settlement.error_message,
            predict_time_seconds=settlement.predict_time_seconds,
            version=func.coalesce(settlement.version, attempts.version),
            settled_at=func.now(),
        )
    )


async def expect(session: AsyncSession, statement: Update) -> None:
    """Run a guarded update; zero rows mean that the job is no longer ours."""
    if await session.scalar(statement.returning(jobs.id)) is None:
        raise LeaseLost


async def has_prediction(session: AsyncSession, attempt_id: UUID, prediction: Prediction) -> bool:
    """Tell whether the attempt has this prediction."""
    query = select(attempts.prediction_id).where(attempts.id == attempt_id)
    return await session.scalar(query) == prediction.id


async def expect_settled(session: AsyncSession, settlement: Settlement) -> None:
    """Settle the attempt; raise (and so take back the job's new state) if it is not as known."""
    if await session.scalar(settle(settlement).returning(attempts.id)) is None:
        raise LeaseLost


async def expect_unchanged(session: AsyncSession, attempt: Attempt) -> None:
    """Raise (and so take back the job's new state) if the attempt has another prediction by now."""
    known = attempts.prediction_id.is_not_distinct_from(attempt.prediction_id)
    if await session.scalar(select(attempts.id).where(attempts.id == attempt.id, known)) is None:
        raise LeaseLost


def in_seconds(seconds: float) -> ColumnElement[datetime]:
    """The time so long after now (before, if negative) by the database's clock."""
    return func.now() + timedelta(seconds=seconds)


def age_seconds(since: ColumnElement[datetime]) -> ColumnElement[Any]:
    """How long ago that was, in seconds."""
    return func.extract("epoch", func.now() - since)


def is_due() -> ColumnElement[bool]:
    """The job does not wait for its next attempt any longer."""
    return or_(jobs.next_attempt_at.is_(None), jobs.next_attempt_at <= func.now())


def is_alive(lease_seconds: float) -> ColumnElement[bool]:
    """The worker was heard within the lease."""
    return workers.heartbeat_at >= in_seconds(-lease_seconds)
