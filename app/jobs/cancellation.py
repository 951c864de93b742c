"""Cancels a job and waits until the cancel is certain."""

import asyncio
import time
from uuid import UUID

from app.errors import JobAlreadyFinished, JobNotFound
from app.jobs.models import Job, JobStatus
from app.jobs.repository import SUBMIT_WINDOW_SECONDS, JobRepository

WAIT_SECONDS = SUBMIT_WINDOW_SECONDS + 1
ASK_AGAIN_SECONDS = 0.05


async def cancel_job(repository: JobRepository, job_id: UUID) -> Job:
    """pending | processing -> cancelled.

    A create call that is just under way delays it by `SUBMIT_WINDOW_SECONDS`; should that not
    be enough, the job is returned as it is, with the cancel on record for the sweep to finish.
    Raises: JobNotFound; JobAlreadyFinished.
    """
    job = await repository.get(job_id)
    if job is not None and not job.status.is_terminal:
        job = await _cancel(repository, job_id)
        if job is not None and job.status not in (JobStatus.COMPLETED, JobStatus.FAILED):
            return job
    if job is None:
        raise JobNotFound("There is no such job.")
    raise JobAlreadyFinished(f"The job is {job.status} already: nothing is left to cancel.")


async def _cancel(repository: JobRepository, job_id: UUID) -> Job | None:
    give_up_at = time.monotonic() + WAIT_SECONDS
    job = await repository.cancel(job_id)
    while job is not None and not job.status.is_terminal and time.monotonic() < give_up_at:
        await asyncio.sleep(ASK_AGAIN_SECONDS)
        job = await repository.cancel(job_id)
    return job
