"""Prediction services behind one Protocol; the settings choose which."""

from app.config import Settings
from app.providers.base import Provider
from app.providers.mock import MockProvider
from app.providers.replicate import ReplicateProvider


def create_provider(settings: Settings) -> Provider:
    """Return the mock for the demonstration token, Replicate for any other."""
    if settings.is_mock:
        return MockProvider(
            settings.replicate_mock_delay_min,
            settings.replicate_mock_delay_max,
            settings.replicate_mock_failure_rate,
        )
    return ReplicateProvider(
        settings.replicate_api_token.get_secret_value(),
        settings.replicate_base_url,
        timeout_seconds=settings.replicate_timeout_seconds,
        prefer_wait_seconds=settings.replicate_prefer_wait_seconds,
    )
