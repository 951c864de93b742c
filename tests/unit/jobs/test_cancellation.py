"""What a cancel answers, whatever the job does meanwhile."""

from types import SimpleNamespace
from typing import cast
from uuid import UUID, uuid4

import pytest

from app.errors import JobAlreadyFinished, JobNotFound
from app.jobs import cancellation
from app.jobs.cancellation import cancel_job
from app.jobs.models import Job, JobStatus
from app.jobs.repository import JobRepository


class Scripted:
    """A repository whose job has these statuses: as read first, then after each cancel."""

    def __init__(self, *statuses: JobStatus | None) -> None:
        self._statuses = list(statuses)
        self.cancels = 0

    async def get(self, job_id: UUID) -> Job | None:
        return self._next()

    async def cancel(self, job_id: UUID) -> Job | None:
        self.cancels += 1
        return self._next()

    def _next(self) -> Job | None:
        status = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
        return None if status is None else cast(Job, SimpleNamespace(status=status))


PENDING, PROCESSING, COMPLETED, FAILED, CANCELLED = JobStatus


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "ASK_AGAIN_SECONDS", 0)
    monkeypatch.setattr(cancellation, "WAIT_SECONDS", 0.05)


async def run(*statuses: JobStatus | None) -> tuple[Job, int]:
    repository = Scripted(*statuses)
    job = await cancel_job(cast(JobRepository, repository), uuid4())
    return job, repository.cancels


@pytest.mark.parametrize(
    ("statuses", "cancels"),
    [
        ([PENDING, CANCELLED], 1),
        ([PROCESSING, CANCELLED], 1),
        ([PROCESSING, PROCESSING, PROCESSING, CANCELLED], 3),
    ],
)
async def test_it_asks_until_the_cancel_is_certain(statuses: list[JobStatus], cancels: int) -> None:
    job, asked = await run(*statuses)
    assert (job.status, asked) == (CANCELLED, cancels)


@pytest.mark.parametrize("status", [COMPLETED, FAILED, CANCELLED])
async def test_a_job_that_had_ended_is_left_alone(status: JobStatus) -> None:
    with pytest.raises(JobAlreadyFinished, match=status):
        await run(status)


@pytest.mark.parametrize("status", [COMPLETED, FAILED])
async def test_a_job_that_ends_by_itself_meanwhile_was_not_cancelled(status: JobStatus) -> None:
    with pytest.raises(JobAlreadyFinished, match=status):
        await run(PROCESSING, PROCESSING, status)


async def test_it_gives_up_waiting_and_shows_the_job_as_it_is() -> None:
    job, asked = await run(PROCESSING)
    assert job.status is PROCESSING
    assert asked > 1


@pytest.mark.parametrize("statuses", [[None], [PENDING, None]])
async def test_a_job_that_does_not_exist(statuses: list[JobStatus | None]) -> None:
    with pytest.raises(JobNotFound):
        await run(*statuses)
