"""What the API tells the workers, and what anybody may publish beside it."""

import asyncio

import pytest
from redis.asyncio import Redis

from app.tasks import wakeups
from app.tasks.wakeups import CHANNEL, listen, wake
from scripts.servers import Valkey


async def test_nonsense_on_the_channel_ends_nothing(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "REST_SECONDS", 0)
    heard: list[str] = []
    listening = asyncio.create_task(listen(valkey.url, heard.append))
    async with Redis.from_url(valkey.url) as redis, asyncio.timeout(10):
        for word in (b"\xff\xfe", b"p1"):
            while not await redis.publish(CHANNEL, word):  # nobody has subscribed (again) yet
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.1)
        while "p1" not in heard:
            await wake(redis, "p1")
            await asyncio.sleep(0.02)
    assert not listening.done()
    listening.cancel()
