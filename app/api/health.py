"""Health now: every dependency asked at the same time, each under a short limit."""

import asyncio
import time
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Literal, TypeVar

import structlog
from pydantic import BaseModel, Field

from app import __version__
from app.api.deps import Services
from app.errors import StorageError

SERVICE = "fleek-media-service"
TIMEOUT_SECONDS = 2.0

T = TypeVar("T")

log = structlog.get_logger(__name__)


class HealthView(BaseModel):
    """The process answers."""

    status: Literal["healthy"] = "healthy"
    service: str = SERVICE
    version: str = __version__


class CheckView(BaseModel):
    """One dependency, measured now."""

    status: Literal["healthy", "unhealthy"]
    latency_ms: float


class WorkersCheckView(CheckView):
    """The workers: healthy when at least one has a fresh heartbeat."""

    count: int


class ChecksView(BaseModel):
    """Every dependency."""

    database: CheckView
    redis: CheckView
    storage: CheckView
    workers: WorkersCheckView


class DetailedHealthView(BaseModel):
    """The process and what it depends on."""

    status: Literal["healthy", "degraded", "unhealthy"] = Field(
        description="unhealthy: the database or the storage is away. degraded: Redis (that of"
        " `REDIS_URL` or the broker) or every worker is; jobs are accepted and wait."
    )
    service: str = SERVICE
    version: str = __version__
    timestamp: datetime
    checks: ChecksView


async def measure_health(app: Services) -> DetailedHealthView:
    """Ask every dependency; takes `TIMEOUT_SECONDS` at most."""
    (database, _), (redis, _), (storage, _), (alive, count) = await asyncio.gather(
        _measured("database", app.repository.check()),
        _measured("redis", _ping(app)),
        _measured("storage", app.storage.check()),
        _measured("workers", _living_workers(app)),
    )
    workers = WorkersCheckView(
        status="healthy" if count else "unhealthy", latency_ms=alive.latency_ms, count=count or 0
    )
    checks = ChecksView(database=database, redis=redis, storage=storage, workers=workers)
    return DetailedHealthView(status=_overall(checks), timestamp=datetime.now(UTC), checks=checks)


async def _ping(app: Services) -> None:
    await asyncio.gather(*(server.ping() for server in {app.redis, app.broker}))


async def _living_workers(app: Services) -> int:
    return (await app.repository.stats(app.settings.worker_lease_seconds)).workers


async def _measured(name: str, check: Awaitable[T]) -> tuple[CheckView, T | None]:
    started_at = time.perf_counter()
    status: Literal["healthy", "unhealthy"] = "healthy"
    result = None
    try:
        result = await asyncio.wait_for(check, TIMEOUT_SECONDS)
    except Exception as error:
        # Whatever it is, it makes the dependency unhealthy; only our own texts hold no secrets.
        status = "unhealthy"
        reason = str(error) if isinstance(error, StorageError) else type(error).__name__
        log.warning("health_check_failed", check=name, error=reason)
    latency_ms = round((time.perf_counter() - started_at) * 1000, 1)
    return CheckView(status=status, latency_ms=latency_ms), result


def _overall(checks: ChecksView) -> Literal["healthy", "degraded", "unhealthy"]:
    if "unhealthy" in (checks.database.status, checks.storage.status):
        return "unhealthy"
    if "unhealthy" in (checks.redis.status, checks.workers.status):
        return "degraded"
    return "healthy"
