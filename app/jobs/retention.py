"""Deleting what has been kept for its time: the files of completed jobs, not their rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import structlog

from app.jobs.models import DeletionKind
from app.jobs.repository import JobRepository
from app.storage.base import (
    THUMBNAIL_SIZES,
    Storage,
    media_key,
    metadata_key,
    thumbnail_key,
)

BATCH = 500
# Then the worker's other duties have their turn; the next round goes on.
BATCHES_PER_ROUND = 10
# Nobody takes this long for a batch: who has marked it is gone.
ABANDONED_SECONDS = 600.0
DAY_SECONDS = 86_400.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How many days after its completion a job's files are kept; None: for ever."""

    media_days: int | None
    metadata_days: int | None


async def enforce_retention(
    repository: JobRepository, storage: Storage, policy: RetentionPolicy
) -> None:
    """Delete what is due: a bounded part of it, in any number of workers at once.

    First the mark, by which clients see the files no more; then the files; then the note that
    they are gone. A crash in between leaves marks without that note: they are taken up again
    by any worker, and deleting twice does no harm.

    Raises: StorageError - the rest is deleted later.
    """
    days = {
        DeletionKind.MEDIA: policy.media_days,
        DeletionKind.METADATA: policy.metadata_days,
    }
    for kind, kept_days in days.items():
        abandoned = await repository.unpurged(kind, ABANDONED_SECONDS, BATCH)
        await _purge(repository, storage, kind, abandoned)
        if kept_days is not None:
            await _delete_due(repository, storage, kind, kept_days * DAY_SECONDS)


async def _delete_due(
    repository: JobRepository, storage: Storage, kind: DeletionKind, older_than_seconds: float
) -> None:
    for _ in range(BATCHES_PER_ROUND):
        marked = await repository.mark_deleted(kind, older_than_seconds, BATCH)
        await _purge(repository, storage, kind, marked)
        if len(marked) < BATCH:
            return


async def _purge(
    repository: JobRepository, storage: Storage, kind: DeletionKind, job_ids: Sequence[UUID]
) -> None:
    if not job_ids:
        return
    for key in await _keys(repository, kind, job_ids):
        await storage.delete(key)
    await repository.note_purged(kind, job_ids)
    log.info("files_deleted", kind=kind, jobs=len(job_ids))


async def _keys(
    repository: JobRepository, kind: DeletionKind, job_ids: Sequence[UUID]
) -> list[str]:
    if kind is DeletionKind.METADATA:
        return [metadata_key(job_id) for job_id in job_ids]
    found = await repository.outputs(job_ids)
    names = [output.name for outputs in found.values() for output in outputs]
    thumbnails = [thumbnail_key(name, size) for name in names for size in THUMBNAIL_SIZES]
    return [*map(media_key, names), *thumbnails]
