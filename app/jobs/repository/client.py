"""The client's side: jobs are added, shown, counted and cancelled."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from datetime import datetime
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Integer,
    Select,
    Text,
    Uuid,
    and_,
    bindparam,
    cast,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from app.jobs.models import AttemptState, Deletion, DeletionKind, Job, JobStatus, Output
from app.jobs.repository.records import NewJob, Outputs, QueueStats
from app.jobs.repository.statements import (
    UNFINISHED,
    Repository,
    age_seconds,
    attempts,
    counts,
    deletions,
    finish_cancel,
    first_asked,
    in_seconds,
    is_alive,
    jobs,
    outputs,
    workers,
)

# A fresh job is rung by the API at once; the sweep rings only if that was lost.
FIRST_RING_SECONDS = 5
PAGE_BYTES = 4 << 20


class ClientSide(Repository):
    """What the API does with jobs."""

    async def add(self, new: NewJob, queue_deadline_seconds: float) -> Job:
        """Insert one pending job and commit it; it fails unless it is begun in time."""
        statement = insert(Job).values(**_pending(new, queue_deadline_seconds)).returning(Job)
        async with self._statements() as session:
            return (await session.execute(statement)).scalar_one()

    async def add_once(
        self, new: NewJob, queue_deadline_seconds: float, idempotency_key: str
    ) -> tuple[Job, bool]:
        """Insert the job unless there is one with this key; return it, and whether it is new.

        Whoever comes second with a key waits for the first one's commit, and gets its job.
        """
        values = _pending(new, queue_deadline_seconds)
        statement = (
            upsert(Job)
            .values(**values, idempotency_key=idempotency_key, fingerprint=new.fingerprint)
            .on_conflict_do_nothing(
                index_elements=["idempotency_key"], index_where=jobs.idempotency_key.is_not(None)
            )
            .returning(Job)
        )
        async with self._statements() as session:
            job = await session.scalar(statement)
        if job is not None:
            return job, True
        first = await self.with_key(idempotency_key)
        assert first is not None  # noqa: S101 - jobs are never deleted
        return first, False

    async def with_key(self, idempotency_key: str) -> Job | None:
        """Return the job that was made with this key, or None."""
        async with self._statements() as session:
            return await session.scalar(select(Job).where(jobs.idempotency_key == idempotency_key))

    async def get(self, job_id: UUID) -> Job | None:
        """Return the job, or None."""
        async with self._statements() as session:
            return await session.get(Job, job_id)

    async def newest(
        self,
        *,
        status: JobStatus | None = None,
        limit: int,
        offset: int = 0,
        before: tuple[datetime, UUID] | None = None,
    ) -> tuple[Sequence[Job], bool]:
        """Return a page of jobs, newest first, and whether there are more behind it.

        `before` is the last (created_at, id) seen. A page is shorter than `limit` where its
        parameters would be more than `PAGE_BYTES`: each job may have a megabyte of them.
        """
        given: dict[str, Any] = {"limit": limit + 1, "offset": offset, "bytes": PAGE_BYTES}
        if status is not None:
            given["status"] = status
        if before is not None:
            given["created_at"], given["id"] = before
        query = _page_query(of_status=status is not None, before=before is not None)
        async with self._statements() as session:
            rows = (await session.execute(query, given)).all()
        shown = [job for job, _ in rows[:limit]]
        return shown, bool(rows) and rows[0][1] > len(shown)

    async def outputs(self, job_ids: Collection[UUID]) -> dict[UUID, Outputs]:
        """Return the outputs of these jobs; jobs without any are left out."""
        query = _with_deletion().where(outputs.job_id.in_(job_ids))
        found: dict[UUID, Outputs] = defaultdict(Outputs)
        async with self._statements() as session:
            rows = await session.execute(query.order_by(outputs.job_id, outputs.index))
            for output, deleted_at in rows:
                found[output.job_id].append(output)
                found[output.job_id].deleted_at = deleted_at
        return found

    async def output_named(self, name: str) -> tuple[Output, datetime | None] | None:
        """Return the output stored under this file name, and when it was deleted; or None."""
        query = _with_deletion().where(outputs.name == name)
        async with self._statements() as session:
            found = (await session.execute(query)).one_or_none()
        return (found[0], found[1]) if found else None

    async def deleted_at(self, job_id: UUID, kind: DeletionKind) -> datetime | None:
        """Return when these files of the job were deleted, or None."""
        async with self._statements() as session:
            found = await session.get(Deletion, (job_id, kind))
        return found.deleted_at if found else None

    async def cancel(self, job_id: UUID) -> Job | None:
        """Cancel the job, or ask for it while a create call may be under way.

        Returns the job as it is afterwards, or None when there is no such job. It is
        `cancelled` at once unless it is being submitted: then `cancel_requested_at` is set,
        which stops any create that has not begun, and a call after `SUBMIT_WINDOW_SECONDS`
        (or the sweep) finishes the cancel. So no create follows a confirmed cancel.
        """
        unfinished = and_(jobs.id == job_id, jobs.status.in_(UNFINISHED))
        request = update(Job).where(unfinished).values(cancel_requested_at=first_asked())
        async with self._transactions.begin() as session:
            job = await session.scalar(finish_cancel(jobs.id == job_id))
            if job is None:
                job = await session.scalar(request.returning(Job))
            return job or await session.get(Job, job_id)

    async def check(self) -> None:
        """Raise unless the database answers and has the schema."""
        async with self._statements() as session:
            await session.execute(select(jobs.id).limit(1))

    async def stats(self, lease_seconds: float) -> QueueStats:
        """Return counts and ages, in a time that does not depend on how many jobs have ended."""
        oldest = (
            select(age_seconds(jobs.created_at))
            .where(jobs.status == JobStatus.PENDING)
            .order_by(jobs.created_at, jobs.id)
            .limit(1)
        )
        unstored = (
            select(func.count(), func.max(age_seconds(attempts.submitted_at)))
            .join(Job, jobs.id == attempts.job_id)
            .where(attempts.state == AttemptState.SUBMITTED, jobs.status.in_(UNFINISHED))
        )
        alive = select(func.count(), func.coalesce(func.sum(workers.concurrency), 0)).where(
            is_alive(lease_seconds)
        )
        async with self._statements() as session:
            by_status = await _counts(session)
            age = await session.scalar(oldest)
            unstored_count, unstored_age = (await session.execute(unstored)).one()
            alive_count, slots = (await session.execute(alive)).one()
        return QueueStats(
            jobs_by_status=by_status,
            oldest_pending_age_seconds=float(age or 0),
            unstored=unstored_count,
            oldest_unstored_age_seconds=float(unstored_age or 0),
            workers=alive_count,
            worker_slots=slots,
        )

    async def count(self, status: JobStatus | None) -> int:
        """Return how many jobs there are (of this status), from the trigger's counters."""
        async with self._statements() as session:
            by_status = await _counts(session)
        return by_status[status] if status else sum(by_status.values())


@cache
def _page_query(*, of_status: bool, before: bool) -> Select[Job, int]:
    """Return a page's query, made once: to make it would take longer than to run it."""
    query = select(Job).order_by(jobs.created_at.desc(), jobs.id.desc())
    if of_status:
        query = query.where(jobs.status == bindparam("status"))
    if before:
        given = bindparam("created_at", type_=jobs.created_at.type), bindparam("id", type_=Uuid)
        query = query.where(func.row(jobs.created_at, jobs.id) < func.row(*given))
    limit, offset = (bindparam(name, type_=Integer) for name in ("limit", "offset"))
    return _bounded(query.limit(limit).offset(offset))


def _bounded(query: Select[Job]) -> Select[Job, int]:
    """Leave out what is behind so many bytes of parameters, and count the rows of all."""
    page = query.subquery()
    newest_first = page.c.created_at.desc(), page.c.id.desc()
    size_bytes = func.octet_length(cast(page.c.parameters, Text))
    above = func.sum(size_bytes).over(order_by=newest_first, rows=(None, -1))
    bytes_before = func.coalesce(above, 0)
    sized = select(page, bytes_before.label("bytes_before"), func.count().over().label("rows"))
    found = sized.subquery()
    return (
        select(aliased(Job, found), found.c.rows)
        .where(found.c.bytes_before < bindparam("bytes", type_=Integer))
        .order_by(found.c.created_at.desc(), found.c.id.desc())
    )


def _with_deletion() -> Select[Output, datetime | None]:
    gone = and_(deletions.job_id == outputs.job_id, deletions.kind == DeletionKind.MEDIA)
    return select(Output, deletions.deleted_at).outerjoin(Deletion, gone)


def _pending(new: NewJob, queue_deadline_seconds: float) -> dict[str, Any]:
    return {
        "prompt": new.prompt,
        "model_name": new.model_name,
        "parameters": dict(new.parameters),
        "request_id": new.request_id,
        "deadline_at": in_seconds(queue_deadline_seconds),
        "ring_at": in_seconds(FIRST_RING_SECONDS),
    }


async def _counts(session: AsyncSession) -> dict[str, int]:
    query = select(counts.status, func.sum(counts.count)).group_by(counts.status)
    by_status = dict.fromkeys((status.value for status in JobStatus), 0)
    by_status.update({status: int(total) for status, total in await session.execute(query)})
    return by_status
