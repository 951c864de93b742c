"""Which provider the settings choose, and that the log says so."""

import pytest
from structlog.testing import capture_logs

from app.config import MOCK_TOKEN, Settings
from app.providers import create_provider


@pytest.mark.parametrize(
    ("token", "name", "level"),
    [(MOCK_TOKEN, "mock", "warning"), ("r8_secret", "replicate", "info")],
)
async def test_the_choice_is_logged(token: str, name: str, level: str) -> None:
    with capture_logs() as logged:
        provider = create_provider(Settings(_env_file=None, replicate_api_token=token))
    await provider.aclose()
    assert provider.name == name
    assert logged == [{"event": "provider_chosen", "provider": name, "log_level": level}]
