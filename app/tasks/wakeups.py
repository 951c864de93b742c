"""The channel on which the API tells all workers that a prediction has moved."""

import asyncio
from collections.abc import Callable

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

CHANNEL = "media:predictions"
REST_SECONDS = 5.0
LISTEN_SECONDS = 10.0

log = structlog.get_logger(__name__)


async def listen(url: str, on_wakeup: Callable[[str], None]) -> None:
    """Call `on_wakeup(prediction_id)` for every message, for ever; a lost one costs latency."""
    while True:
        redis = Redis.from_url(url, socket_timeout=LISTEN_SECONDS + 5, decode_responses=True)
        try:
            await _listen(redis, on_wakeup)
        except (RedisError, OSError) as error:
            log.warning("wakeups_away", error=type(error).__name__)
            await asyncio.sleep(REST_SECONDS)
        finally:
            await redis.aclose()


async def _listen(redis: Redis, on_wakeup: Callable[[str], None]) -> None:
    async with redis.pubsub(ignore_subscribe_messages=True) as channel:
        await channel.subscribe(CHANNEL)
        while True:
            message = await channel.get_message(timeout=LISTEN_SECONDS)
            if message is None:
                await channel.ping()  # a half-open connection answers nothing, and fails
            elif message["type"] == "message":
                on_wakeup(message["data"])
