"""What the API tells the workers, and what anybody may publish beside it."""

import asyncio
import time

import pytest
from redis.asyncio import Redis

from app import wakeups
from app.wakeups import CHANNEL, listen, wake
from scripts.servers import Valkey
from tests.faults.proxy import FaultProxy


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


async def test_silence_costs_a_ping_now_and_then(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "LISTEN_SECONDS", 0.2)
    pings = 0
    async with Redis.from_url(valkey.url) as redis, asyncio.timeout(20):
        await redis.config_resetstat()
        began_at = time.monotonic()
        listening = asyncio.create_task(listen(valkey.url, lambda _: None))
        while pings < 2:
            await asyncio.sleep(0.02)
            commands = await redis.info("commandstats")
            pings = commands.get("cmdstat_ping", {}).get("calls", 0)
    listening.cancel()
    assert pings <= (time.monotonic() - began_at) / 0.2


async def test_a_connection_gone_silent_is_left(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "REST_SECONDS", 0)
    monkeypatch.setattr(wakeups, "LISTEN_SECONDS", 0.2)
    heard: list[str] = []
    with FaultProxy(valkey.port) as proxy:
        url = valkey.url.replace(str(valkey.port), str(proxy.port))
        listening = asyncio.create_task(listen(url, heard.append))
        async with Redis.from_url(valkey.url) as redis, asyncio.timeout(20):
            while not await redis.publish(CHANNEL, "before"):
                await asyncio.sleep(0.02)
            proxy.hold()
            proxy.forget()
            while "after" not in heard:
                await wake(redis, "after")
                await asyncio.sleep(0.02)
        listening.cancel()
