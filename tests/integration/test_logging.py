"""What a process writes to its log, each as a process of its own."""

import sys

from tests.doubles.replicate_server import ReplicateServer
from tests.process import run

CREATE = """
import asyncio
from app.config import get_settings
from app.logging import configure_logging
from app.providers import create_provider
from app.providers.base import PredictionRequest

async def main():
    provider = create_provider(get_settings())
    await provider.create(PredictionRequest("acme/painter", {"prompt": "private words"}, 60))
    await provider.aclose()

configure_logging(get_settings().log_level)
asyncio.run(main())
"""


def test_debug_shows_no_prompt_and_no_token(replicate: ReplicateServer) -> None:
    ended = run(
        [sys.executable, "-c", CREATE],
        LOG_LEVEL="DEBUG",
        REPLICATE_API_TOKEN=replicate.token,
        REPLICATE_BASE_URL=replicate.origin,
    )
    assert ended.returncode == 0, ended.stderr
    assert "provider_chosen" in ended.stderr
    assert "asyncio" in ended.stderr  # debug lines are there
    assert len(replicate.creates()) == 1
    assert "private words" not in ended.stderr
    assert replicate.token not in ended.stderr
