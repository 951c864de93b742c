"""A duty: what a worker does again and again, whatever fails."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

LONGEST_PAUSE_SECONDS = 10.0

log = structlog.get_logger(__name__)


async def repeat(
    seconds: float,
    duty: Callable[[], Awaitable[None]],
    *,
    longest_seconds: float = LONGEST_PAUSE_SECONDS,
    nudge: asyncio.Event | None = None,
) -> None:
    """Repeat a duty for ever; while it fails, with growing pauses. A `nudge` ends a pause."""
    nudged = nudge or asyncio.Event()
    pause, fails = seconds, False
    while True:
        try:
            await duty()
            if fails:
                log.info("duty_recovered", duty=duty.__name__)
            pause, fails = seconds, False
        except Exception as error:
            fails = True
            # The database or the broker is away, say: nothing here may end the worker.
            pause = min(2 * pause, max(seconds, longest_seconds))
            # With the module: broker and database both have an OperationalError.
            name = f"{type(error).__module__}.{type(error).__name__}"
            log.warning("duty_failed", duty=duty.__name__, error=name, pause_seconds=pause)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await nudged.wait()
        nudged.clear()
