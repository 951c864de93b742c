"""The channel on which the API tells all workers to look now: a prediction has moved, or a job
was cancelled. A lost word costs latency: they look every second anyway.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

CHANNEL = "media:predictions"
# Instead of a prediction's id: some job has ended without its prediction.
CANCELLED = "cancelled"
PUBLISH_SECONDS = 0.1
REST_SECONDS = 5.0
LISTEN_SECONDS = 10.0

log = structlog.get_logger(__name__)


async def wake(redis: Redis, word: str) -> None:
    """Tell the workers: a prediction's id, or `CANCELLED`."""
    try:
        async with asyncio.timeout(PUBLISH_SECONDS):
            await redis.publish(CHANNEL, word)
    except (RedisError, OSError, RuntimeError) as error:
        # RuntimeError: what uvloop says when the connection has just been closed.
        log.warning("wakeup_lost", error=type(error).__name__)


async def listen(url: str, on_wakeup: Callable[[str], None]) -> None:
    """Call `on_wakeup` with every word that is told, for ever."""
    while True:
        redis = Redis.from_url(url, socket_timeout=LISTEN_SECONDS + 5, decode_responses=True)
        try:
            await _listen(redis, on_wakeup)
        except Exception as error:
            # Redis is away, or somebody published what is no text: neither may end the worker.
            log.warning("wakeups_away", error=type(error).__name__)
            await asyncio.sleep(REST_SECONDS)
        finally:
            await redis.aclose()


async def _listen(redis: Redis, on_wakeup: Callable[[str], None]) -> None:
    # Not `ignore_subscribe_messages`: what is ignored looks like silence, the answer to a ping too.
    async with redis.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        while True:
            message = await channel.get_message(timeout=LISTEN_SECONDS)
            if message is None:
                message = await _echo(channel)
            if message["type"] == "message":
                on_wakeup(message["data"])


async def _echo(channel: PubSub) -> dict[str, Any]:
    """Return whatever comes after a ping. Raises: TimeoutError - the connection is half open."""
    await channel.ping()
    message: dict[str, Any] | None = await channel.get_message(timeout=LISTEN_SECONDS)
    if message is None:
        raise TimeoutError
    return message
