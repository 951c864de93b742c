"""Clients of Redis or Valkey for what must answer soon or not at all."""

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

CONNECTIONS = 4


def create_redis(url: str, timeout_seconds: float) -> Redis:
    """Make a client with few connections, and no repeats hidden in it; connects when first used.

    Blocking, for as long as the time-out: redis-py's plain pool raises instead of waiting when
    many calls come at once.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=timeout_seconds,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
    )
    return Redis.from_pool(pool)
