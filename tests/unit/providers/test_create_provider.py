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


async def test_an_address_without_tls_is_warned_of() -> None:
    settings = Settings(
        _env_file=None, replicate_api_token="r8_secret", public_base_url="http://media.example.com"
    )
    with capture_logs() as logged:
        await create_provider(settings).aclose()
    assert [line["event"] for line in logged] == ["provider_chosen", "webhooks_off"]
