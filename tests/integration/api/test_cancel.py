"""DELETE /api/v1/jobs/{job_id}."""

import asyncio
import time
from uuid import uuid4

import httpx2

from app.api.deps import Services
from app.jobs.models import JobStatus
from app.jobs.repository import SUBMIT_WINDOW_SECONDS
from app.providers.base import PredictionRequest
from tests.integration.api.conftest import Jobs, problem_of


async def test_a_pending_job_is_cancelled_at_once_and_stays_so(
    client: httpx2.AsyncClient, jobs: Jobs
) -> None:
    job = await jobs.pending()
    response = await client.delete(f"/api/v1/jobs/{job.id}")
    assert response.status_code == 200
    assert response.json()["status"] == "cancelled"
    assert response.json()["completed_at"]
    assert (await jobs.read(job.id)).status is JobStatus.CANCELLED


async def test_a_processing_job_is_cancelled(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    claim = await jobs.processing()
    response = await client.delete(f"/api/v1/jobs/{claim.job.id}")
    assert response.json()["status"] == "cancelled"


async def test_a_job_being_submitted_is_cancelled_when_no_create_can_begin_any_more(
    client: httpx2.AsyncClient, services: Services, jobs: Jobs
) -> None:
    claim = await jobs.processing()
    request = PredictionRequest("owner/name", {}, 60)
    started_at = time.monotonic()
    await services.repository.begin_attempt(claim.lease, "mock", request)
    response = await client.delete(f"/api/v1/jobs/{claim.job.id}")
    took = time.monotonic() - started_at
    assert response.json()["status"] == "cancelled"
    assert SUBMIT_WINDOW_SECONDS - 0.1 < took < SUBMIT_WINDOW_SECONDS + 1


async def test_a_finished_job_cannot_be_cancelled(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    completed, failed, cancelled = await jobs.completed(), await jobs.failed(), await jobs.pending()
    await client.delete(f"/api/v1/jobs/{cancelled.id}")
    for job, status in ((completed, "completed"), (failed, "failed"), (cancelled, "cancelled")):
        problem = problem_of(await client.delete(f"/api/v1/jobs/{job.id}"), 409)
        assert status in problem["detail"]
        assert (await jobs.read(job.id)).status == status


async def test_unknown_is_404_and_malformed_422(client: httpx2.AsyncClient) -> None:
    problem_of(await client.delete(f"/api/v1/jobs/{uuid4()}"), 404)
    problem_of(await client.delete("/api/v1/jobs/nope"), 422)


async def test_racing_cancels_end_one_job_once(client: httpx2.AsyncClient, jobs: Jobs) -> None:
    job = await jobs.pending()
    url = f"/api/v1/jobs/{job.id}"
    responses = await asyncio.gather(*(client.delete(url) for _ in range(8)))
    codes = [response.status_code for response in responses]
    assert 200 in codes
    assert set(codes) <= {200, 409}
