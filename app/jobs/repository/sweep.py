"""Every worker's side: the heartbeat, and what is done with jobs that nobody owns."""

from collections.abc import Collection, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, all_, and_, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from app.jobs.models import Job, JobStatus, Worker
from app.jobs.repository.records import Lease
from app.jobs.repository.statements import (
    IS_OPEN,
    MAX_CRASHES,
    UNFINISHED,
    Repository,
    attempts,
    ended,
    finish_cancel,
    in_seconds,
    is_alive,
    is_due,
    jobs,
    workers,
)

# How long the sweep leaves a rung job alone before it rings again.
RING_AGAIN_SECONDS = 15


class SweepSide(Repository):
    """What a worker does for the jobs of all."""

    async def heartbeat(
        self, worker_id: UUID, name: str, concurrency: int, lease_seconds: float
    ) -> int:
        """Say that this worker lives; return how many do."""
        statement = (
            upsert(Worker)
            .values(id=worker_id, name=name, concurrency=concurrency)
            .on_conflict_do_update(index_elements=["id"], set_={"heartbeat_at": func.now()})
        )
        alive = select(func.count()).where(is_alive(lease_seconds))
        async with self._statements() as session:
            await session.execute(statement)
            return (await session.execute(alive)).scalar_one()

    async def leases_of(self, worker_id: UUID) -> dict[UUID, UUID]:
        """Return the token of every job this worker still owns."""
        query = select(jobs.id, jobs.lease_token).where(
            jobs.worker_id == worker_id, jobs.status == JobStatus.PROCESSING
        )
        async with self._statements() as session:
            return {job_id: token for job_id, token in await session.execute(query) if token}

    async def release(self, lease: Lease) -> None:
        """Give up one job; the sweep rings for it."""
        condition = and_(jobs.id == lease.job_id, jobs.lease_token == lease.token)
        async with self._statements() as session:
            await session.execute(_release(condition))

    async def hand_back(self, worker_id: UUID) -> Sequence[UUID]:
        """Give up every job of a worker that is stopping; return their ids, to ring for."""
        async with self._transactions.begin() as session:
            ids = await session.scalars(_release(jobs.worker_id == worker_id))
            await session.execute(delete(Worker).where(workers.id == worker_id))
            return ids.all()

    async def release_dead(self, lease_seconds: float) -> Sequence[UUID]:
        """Free the jobs of workers that have been silent for longer than their lease."""
        # An array, read once: a NOT EXISTS would be asked again, of nobody, for a row that a
        # living worker has claimed just now, and take it away (EvalPlanQual, PostgreSQL's
        # "Read Committed Isolation Level").
        living = select(workers.id).where(is_alive(lease_seconds)).scalar_subquery()
        owner_is_silent = jobs.worker_id != all_(func.array(living))
        found = (
            select(jobs.id)
            .where(jobs.status == JobStatus.PROCESSING, owner_is_silent)
            .with_for_update(skip_locked=True)
        )
        gone = workers.heartbeat_at < in_seconds(-10 * lease_seconds)
        async with self._statements() as session:
            ids = await session.scalars(_release(and_(jobs.id.in_(found), owner_is_silent)))
            await session.execute(delete(Worker).where(gone))
            return ids.all()

    async def due(self, limit: int) -> Sequence[UUID]:
        """Return unowned jobs whose doorbell should ring now; each is left alone for a while."""
        return await self._take_due(jobs.ring_at <= func.now(), limit)

    async def unheard(
        self, patience_seconds: float, limit: int, *, paid: bool = True
    ) -> Sequence[UUID]:
        """Return due jobs that have begun and that nobody claimed so long after their ring.

        Either those with an open attempt, or the others: retries, and those that lost their worker
        before it. Their message waits behind others, or is lost. Each is left alone for a while.
        """
        has_attempt = select(attempts.id).where(attempts.job_id == jobs.id, IS_OPEN)
        kind = has_attempt.exists() if paid else ~has_attempt.exists()
        begun = jobs.started_at.is_not(None)
        is_unheard = _was_to_be_rung(patience_seconds)
        return await self._take_due(and_(is_due(), begun, is_unheard, kind), limit)

    async def unheard_new(self, patience_seconds: float, limit: int) -> Sequence[UUID]:
        """Return new jobs that nobody claimed so long after the sweep rang for them.

        Each is left alone for a while.
        """
        new = and_(
            jobs.started_at.is_(None),
            jobs.created_at <= in_seconds(-patience_seconds),  # the first ring is the API's
        )
        return await self._take_due(and_(new, _was_to_be_rung(patience_seconds)), limit)

    async def _take_due(self, condition: ColumnElement[bool], limit: int) -> Sequence[UUID]:
        found = (
            select(jobs.id)
            .where(jobs.worker_id.is_(None), jobs.status.in_(UNFINISHED), condition)
            .order_by(jobs.ring_at)
            .limit(limit)
            .with_for_update(skip_locked=True, of=Job)
        )
        statement = (
            update(Job)
            .where(jobs.id.in_(found))
            .values(ring_at=in_seconds(RING_AGAIN_SECONDS))
            .returning(jobs.id)
        )
        async with self._statements() as session:
            return (await session.scalars(statement)).all()

    async def expire(self, limit: int) -> dict[UUID, str]:
        """Fail unfinished jobs that are past their deadline; return their error codes."""
        late = jobs.deadline_at <= func.now()
        queued = await self._fail_all(
            and_(late, jobs.started_at.is_(None)),
            limit,
            "queue_deadline_exceeded",
            "No worker began the job before its deadline.",
        )
        begun = await self._fail_all(
            and_(late, jobs.started_at.is_not(None)),
            limit,
            "deadline_exceeded",
            "The job did not finish before its deadline.",
        )
        return {
            **dict.fromkeys(queued, "queue_deadline_exceeded"),
            **dict.fromkeys(begun, "deadline_exceeded"),
        }

    async def fail_poisoned(self, limit: int) -> Sequence[UUID]:
        """Fail unowned jobs whose worker crashed `MAX_CRASHES` times while decoding them."""
        poisoned = and_(jobs.worker_id.is_(None), jobs.crash_count >= MAX_CRASHES)
        return await self._fail_all(
            poisoned, limit, "poisoned", "Storing the output crashed the worker each time."
        )

    async def _fail_all(
        self, condition: ColumnElement[bool], limit: int, code: str, message: str
    ) -> Sequence[UUID]:
        found = (
            select(jobs.id)
            .where(jobs.status.in_(UNFINISHED), condition)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        statement = (
            update(Job)
            .where(jobs.id.in_(found))
            .values(
                status=JobStatus.FAILED,
                error_code=code,
                error_message=message,
                updated_at=func.now(),
                **ended(),
            )
            .returning(jobs.id)
        )
        async with self._statements() as session:
            return (await session.scalars(statement)).all()

    async def finish_cancels(self) -> None:
        """Finish cancels whose API process went away while it waited."""
        found = (
            select(jobs.id)
            .where(jobs.status.in_(UNFINISHED), jobs.cancel_requested_at.is_not(None))
            .with_for_update(skip_locked=True)
        )
        async with self._statements() as session:
            await session.execute(finish_cancel(jobs.id.in_(found)))

    async def ended_without_output(self, job_ids: Collection[UUID]) -> Collection[UUID]:
        """Return which of these jobs have failed or been cancelled: they will never own a file."""
        without = (JobStatus.FAILED, JobStatus.CANCELLED)
        query = select(jobs.id).where(jobs.id.in_(job_ids), jobs.status.in_(without))
        async with self._statements() as session:
            return (await session.scalars(query)).all()

    async def is_eldest(self, worker_id: UUID, lease_seconds: float) -> bool:
        """Tell whether this is the longest-lived worker: what one of them has to do is its duty."""
        eldest = (
            select(workers.id)
            .where(is_alive(lease_seconds))
            .order_by(workers.started_at, workers.id)
            .limit(1)
        )
        async with self._statements() as session:
            return await session.scalar(eldest) == worker_id


def _was_to_be_rung(seconds_ago: float) -> ColumnElement[bool]:
    """It was not rung at all (the broker is away), or was: then `ring_at` was put off."""
    never = jobs.ring_at <= in_seconds(-seconds_ago)
    rung = jobs.ring_at <= in_seconds(RING_AGAIN_SECONDS - seconds_ago)
    return or_(never, and_(jobs.ring_at > func.now(), rung))


def _release(condition: ColumnElement[bool]) -> Any:
    """Processing jobs stay `processing` without an owner: the next one resumes them."""
    return (
        update(Job)
        .where(jobs.status == JobStatus.PROCESSING, jobs.worker_id.is_not(None), condition)
        .values(worker_id=None, ring_at=func.now())
        .returning(jobs.id)
    )
