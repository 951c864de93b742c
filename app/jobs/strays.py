"""Stored files of jobs that ended without completing: no row will ever name them."""

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from uuid import UUID

import structlog

from app.errors import StorageError
from app.jobs.repository import JobRepository
from app.storage.base import Storage, StoredFile

BATCH = 500
JOB_ID_CHARS = 36

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
        async for names in _batches(storage.names(folder)):
            by_job = _by_job(names)
            for job_id in await repository.ended_without_output(by_job.keys()):
                for name in by_job[job_id]:
                    yield job_id, folder, name


async def _batches(files: AsyncIterator[StoredFile]) -> AsyncIterator[list[str]]:
    names: list[str] = []
    async for file in files:
        names.append(file.name)
        if len(names) == BATCH:
            yield names
            names = []
    if names:
        yield names


def _by_job(names: Sequence[str]) -> dict[UUID, list[str]]:
    """Group file names by the job id that they begin with; leave out names without one."""
    by_job = defaultdict(list)
    for name in names:
        try:
            by_job[UUID(name[:JOB_ID_CHARS])].append(name)
        except ValueError:
            continue
    return by_job
