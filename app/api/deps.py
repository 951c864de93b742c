"""What the handlers work with: made once in the lifespan, found on the application's state."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from redis.asyncio import Redis

from app.api.dispatcher import Dispatcher
from app.api.recent import RecentFiles
from app.api.singleflight import SingleFlight
from app.api.thumbnails import Thumbnails
from app.config import Settings
from app.db import create_engine, create_sessions
from app.errors import JobNotFound, JobNotReady, StorageError
from app.jobs.models import Job, JobStatus
from app.jobs.parameters import ParameterChecker
from app.jobs.repository import JobRepository
from app.providers.base import Provider
from app.providers.replicate.webhooks import WebhookVerifier
from app.redis import create_redis
from app.storage import create_storage
from app.storage.base import Storage

Ring = Callable[[Sequence[UUID]], None]

# Shorter than the health check's own limit, so that the check ends by itself.
REDIS_TIMEOUT_SECONDS = 1.5

# A report is known by its attempt, and by the id under which it is signed and sent again.
ReportKey = tuple[UUID, str]
REPORTS_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that lives as long as the API process."""

    settings: Settings
    repository: JobRepository
    storage: Storage
    thumbnails: Thumbnails
    recent: RecentFiles
    provider: Provider
    parameters: ParameterChecker
    dispatcher: Dispatcher
    redis: Redis
    broker: Redis  # the same one, unless CELERY_BROKER_URL names another
    webhooks: WebhookVerifier
    reports: SingleFlight[ReportKey, None]


async def get_services(request: Request) -> Services:
    """Return what `open_services` made."""
    services: Services = request.app.state.services
    return services


App = Annotated[Services, Depends(get_services)]


async def find_job(app: Services, job_id: UUID) -> Job:
    """Return the job that a client names. Raises: JobNotFound."""
    job = await app.repository.get(job_id)
    if job is None:
        raise JobNotFound("There is no such job.")
    return job


async def check_completed(app: Services, job_id: UUID) -> None:
    """Return only if the job has files. Raises: JobNotFound, JobNotReady."""
    job = await find_job(app, job_id)
    if job.status is not JobStatus.COMPLETED:
        raise JobNotReady(f"The job is {job.status}: it has no files.")


@asynccontextmanager
async def open_services(
    settings: Settings, provider: Provider, ring: Ring
) -> AsyncIterator[Services]:
    """Make the services on the running loop; close them, and the provider, at the end.

    Nothing is connected yet: the API starts, and says what is missing, while a server is away.
    """
    storage = _create_storage(settings)
    engine = create_engine(settings)
    redis = create_redis(settings.redis_url, REDIS_TIMEOUT_SECONDS)
    has_own_broker = settings.broker_url != settings.redis_url
    broker = create_redis(settings.broker_url, REDIS_TIMEOUT_SECONDS) if has_own_broker else redis
    repository = JobRepository(create_sessions(engine))
    parameters = ParameterChecker(provider.input_schema)
    webhooks = WebhookVerifier(settings.webhook_secrets, provider.webhook_secret)
    dispatcher = Dispatcher(ring)
    dispatcher.start()
    try:
        yield Services(
            settings=settings,
            repository=repository,
            storage=storage,
            thumbnails=Thumbnails(storage, settings.max_output_pixels),
            recent=RecentFiles(),
            provider=provider,
            parameters=parameters,
            dispatcher=dispatcher,
            redis=redis,
            broker=broker,
            webhooks=webhooks,
            reports=SingleFlight(REPORTS_REMEMBERED),
        )
    finally:
        await dispatcher.stop()
        await parameters.aclose()
        await provider.aclose()
        await redis.aclose()
        await broker.aclose()
        await engine.dispose()


def _create_storage(settings: Settings) -> Storage:
    try:
        return create_storage(settings)
    except StorageError as error:
        setting = "STORAGE_URL" if settings.storage_url else "STORAGE_PATH"
        raise SystemExit(f"{setting}: {error}") from error
