"""Prediction services behind one Protocol; the settings choose which."""

from collections.abc import Callable

import structlog

from app.config import Settings
from app.providers.base import Provider
from app.providers.governor import RedisGovernor
from app.providers.replicate import ReplicateProvider
from app.redis import create_redis

REDIS_TIMEOUT_SECONDS = 1.0

log = structlog.get_logger(__name__)


def create_provider(settings: Settings, workers: Callable[[], int] = lambda: 1) -> Provider:
    """Return the mock for the demonstration token, Replicate for any other.

    `workers` tells how many processes share the provider's rate while Redis is away.
    """
    if settings.is_mock:
        from app.providers.mock import MockProvider  # draws: a tenth of a second of imports

        # A warning: an empty or missing token is enough to get pictures that nobody wanted.
        log.warning("provider_chosen", provider=MockProvider.name)
        return MockProvider(
            settings.replicate_mock_delay_min,
            settings.replicate_mock_delay_max,
            settings.replicate_mock_failure_rate,
        )
    log.info("provider_chosen", provider=ReplicateProvider.name)
    if settings.public_base_url and not settings.webhook_base_url:
        log.warning("webhooks_off", reason="PUBLIC_BASE_URL is not https")
    return ReplicateProvider(
        settings.replicate_api_token.get_secret_value(),
        settings.replicate_base_url,
        timeout_seconds=settings.replicate_timeout_seconds,
        prefer_wait_seconds=settings.replicate_prefer_wait_seconds,
        governor=_create_governor(settings, workers),
    )


def _create_governor(settings: Settings, workers: Callable[[], int]) -> RedisGovernor:
    return RedisGovernor(
        create_redis(settings.redis_url, REDIS_TIMEOUT_SECONDS),
        creates_per_minute=settings.replicate_creates_per_minute,
        others_per_minute=settings.replicate_calls_per_minute,
        workers=workers,
    )
