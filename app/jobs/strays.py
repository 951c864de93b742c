"""Stored files of jobs that ended without completing: no row will ever name them."""

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from uuid import UUID

import structlog

from app.errors import StorageError
from app.jobs.repository import JobRepository
from app.storage.base import Storage, StoredFile, job_id_of

BATCH = 100

log = structlog.get_logger(__name__)


async def remove_strays(repository: JobRepository, storage: Storage) -> None:
    """Remove the files of jobs that have failed or been cancelled.

    They were in place when a cancel, a deadline or a lost lease came before the commit. Files of
    which no row knows the job stay: the database may have been restored from a backup.
    Raises: StorageError - one of them cannot be removed; the others are.
    """
    failure = None
    async for job_id, folder, name in _strays(repository, storage):
        try:
            await storage.delete(f"{folder}/{name}")
        except StorageError as error:
            failure = error
        else:
            log.info("stray_removed", job_id=str(job_id), name=name)
    if failure is not None:
        raise failure


async def _strays(
    repository: JobRepository, storage: Storage
) -> AsyncIterator[tuple[UUID, str, str]]:
    for folder in ("media", "metadata"):
        async for files in batches(storage.names(folder)):
            by_job = _by_job(files)
            for job_id in await repository.ended_without_output(by_job.keys()):
                for name in by_job[job_id]:
                    yield job_id, folder, name


async def batches(files: AsyncIterator[StoredFile]) -> AsyncIterator[list[StoredFile]]:
    """Yield the files of a listing in lists, as many as a query may ask for at once."""
    batch: list[StoredFile] = []
    async for file in files:
        batch.append(file)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _by_job(files: Sequence[StoredFile]) -> dict[UUID, list[str]]:
    """Group the files' names by job; leave out those that are no job's."""
    by_job = defaultdict(list)
    for file in files:
        if job_id := job_id_of(file.name):
            by_job[job_id].append(file.name)
    return by_job
