"""Deleting what has been kept for its time: the files of completed jobs, not their rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import structlog

from app.errors import StorageError
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
# Hardly anybody takes this long for a batch: who has marked it is gone, or its storage fails.
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

    Raises: StorageError - what can not be deleted is tried again later; all else is deleted.
    """
    days = {
        DeletionKind.MEDIA: policy.media_days,
        DeletionKind.METADATA: policy.metadata_days,
    }
    failures: list[StorageError] = []
    for kind, kept_days in days.items():
        if kept_days is not None:
            failures += await _delete_due(repository, storage, kind, kept_days * DAY_SECONDS)
        abandoned = await repository.unpurged(kind, ABANDONED_SECONDS, BATCH)
        failures += await _purge(repository, storage, kind, abandoned)
    if failures:
        raise failures[0]


async def _delete_due(
    repository: JobRepository, storage: Storage, kind: DeletionKind, older_than_seconds: float
) -> list[StorageError]:
    failures: list[StorageError] = []
    for _ in range(BATCHES_PER_ROUND):
        marked = await repository.mark_deleted(kind, older_than_seconds, BATCH)
        failures += await _purge(repository, storage, kind, marked)
        if len(marked) < BATCH:
            break
    return failures


async def _purge(
    repository: JobRepository, storage: Storage, kind: DeletionKind, job_ids: Sequence[UUID]
) -> list[StorageError]:
    """Delete these jobs' files; return why some are still there: one must not keep all others."""
    if not job_ids:
        return []
    gone, failures = [], []
    for job_id, keys in (await _keys(repository, kind, job_ids)).items():
        try:
            for key in keys:
                await storage.delete(key)
            gone.append(job_id)
        except StorageError as error:
            failures.append(error)
    await repository.note_purged(kind, gone)
    if gone:
        log.info("files_deleted", kind=kind, jobs=len(gone))
    return failures


async def _keys(
    repository: JobRepository, kind: DeletionKind, job_ids: Sequence[UUID]
) -> dict[UUID, list[str]]:
    if kind is DeletionKind.METADATA:
        return {job_id: [metadata_key(job_id)] for job_id in job_ids}
    found = await repository.outputs(job_ids)
    return {
        job_id: [key for output in found.get(job_id, ()) for key in _media_keys(output.name)]
        for job_id in job_ids
    }


def _media_keys(name: str) -> list[str]:
    return [media_key(name), *(thumbnail_key(name, size) for size in THUMBNAIL_SIZES)]
