"""The broker's transport: kombu's for Redis, which an unreadable message does not end."""

import structlog
from kombu.transport import TRANSPORT_ALIASES, redis

# What kombu raises on an item that is no message of Celery's: it would end the worker.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)

log = structlog.get_logger(__name__)


class Channel(redis.Channel):
    """Drops what it cannot read; it has been taken off the queue by then."""

    def _brpop_read(self, **options: object) -> object:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc] # kombu's stubs lack it
        except UNREADABLE as error:
            log.warning("message_unreadable", error=type(error).__name__)
            return True


class Transport(redis.Transport):
    """See `Channel`."""

    Channel = Channel


def use() -> None:
    """Have `redis://` and `rediss://` mean this transport."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
