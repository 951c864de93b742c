"""Which files are deleted after their time."""

from collections.abc import Collection, Sequence
from datetime import timedelta
from uuid import UUID

from sqlalchemy import func, literal, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert

from app.jobs.models import Deletion, DeletionKind, JobStatus
from app.jobs.repository.statements import Repository, deletions, in_seconds, jobs

# Longer than any transaction: a job that completed before the last one marked may be seen later.
LATE_COMMIT_SECONDS = 3600.0


class RetentionSide(Repository):
    """The marks of deleted files."""

    async def mark_deleted(
        self, kind: DeletionKind, older_than_seconds: float, limit: int
    ) -> Sequence[UUID]:
        """Mark files of jobs that completed longer ago as deleted; return the jobs, oldest first.

        Each job is returned to one caller only. The marks are made in the order of completion,
        so the search begins near the last one, however many there are.
        """
        marked = deletions.job_id == jobs.id, deletions.kind == kind
        last = select(func.max(deletions.completed_at)).where(deletions.kind == kind)
        begin = last.scalar_subquery() - timedelta(seconds=LATE_COMMIT_SECONDS)
        due = (
            select(jobs.id, literal(kind.value), jobs.completed_at)
            .where(
                jobs.status == JobStatus.COMPLETED,
                jobs.completed_at < in_seconds(-older_than_seconds),
                jobs.completed_at >= func.coalesce(begin, text("'-infinity'::timestamptz")),
                ~select(deletions.job_id).where(*marked).exists(),
            )
            .order_by(jobs.completed_at)
            .limit(limit)
        )
        statement = (
            upsert(Deletion)
            .from_select(["job_id", "kind", "completed_at"], due)
            .on_conflict_do_nothing()
            .returning(deletions.job_id)
        )
        async with self._statements() as session:
            return (await session.scalars(statement)).all()

    async def unpurged(
        self, kind: DeletionKind, older_than_seconds: float, limit: int
    ) -> Sequence[UUID]:
        """Return jobs marked longer ago whose files are still there: whoever did it has died."""
        query = (
            select(deletions.job_id)
            .where(
                deletions.kind == kind,
                deletions.purged_at.is_(None),
                deletions.deleted_at < in_seconds(-older_than_seconds),
            )
            .order_by(deletions.deleted_at)
            .limit(limit)
        )
        async with self._statements() as session:
            return (await session.scalars(query)).all()

    async def note_purged(self, kind: DeletionKind, job_ids: Collection[UUID]) -> None:
        """Note that the marked files of these jobs are gone."""
        statement = (
            update(Deletion)
            .where(deletions.job_id.in_(job_ids), deletions.kind == kind)
            .values(purged_at=func.now())
        )
        async with self._statements() as session:
            await session.execute(statement)
