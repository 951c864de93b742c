"""The broker's transport: kombu's for Redis, which neither nonsense nor a long outage puts off."""

from typing import Any, Self

import structlog
from celery.app.amqp import AMQP
from kombu import Connection
from kombu.transport import TRANSPORT_ALIASES, redis

# What kombu raises on an item that is no message of Celery's: it would end the worker.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)
# Between two tries to connect; a try itself takes up to 5 s with a broker that is silent.
RECONNECT_SECONDS = 4

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


class PersistentConnection(Connection):
    """Tries again as often after an hour as at first: kombu's pauses grow to half a minute."""

    def ensure_connection(self, *arguments: Any, **options: Any) -> Self:
        """See `Connection.ensure_connection`; Celery has no setting for the pauses."""
        options["interval_max"] = RECONNECT_SECONDS
        return super().ensure_connection(*arguments, **options)


class PersistentAMQP(AMQP):
    """See `PersistentConnection`."""

    Connection = PersistentConnection


def use() -> None:
    """Have `redis://` and `rediss://` mean this transport."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
