"""Rings the doorbell for new jobs: in batches, off the event loop, never in a request."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from uuid import UUID

import structlog

BATCH = 200

log = structlog.get_logger(__name__)


class Dispatcher:
    """Publishes `generate(job_id)` soon after the commit that made the job.

    The job's row is its own outbox: what is lost here (a dead broker, a killed process) is rung
    by the sweep, so a failure costs latency and nothing else. `ring` blocks, and may raise.
    """

    def __init__(self, ring: Callable[[Sequence[UUID]], None]) -> None:
        self._ring = ring
        self._queue: asyncio.Queue[UUID] = asyncio.Queue(maxsize=10_000)
        self._task: asyncio.Task[None] | None = None

    def enqueue(self, job_id: UUID) -> None:
        """Note a committed job; never blocks, never raises."""
        with suppress(asyncio.QueueFull):
            self._queue.put_nowait(job_id)

    def start(self) -> None:
        """Begin dispatching on the running loop."""
        self._task = asyncio.create_task(self._run(), name="dispatcher")

    async def stop(self) -> None:
        """Ring for what is still queued (for at most 2 seconds), then end."""
        if self._task is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self._queue.join()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            batch = await self._next_batch()
            try:
                await asyncio.to_thread(self._ring, batch)
            except Exception as error:
                # Any broker error: the sweep rings for these jobs.
                log.warning("doorbell_failed", jobs=len(batch), error=type(error).__name__)
            for _ in batch:
                self._queue.task_done()

    async def _next_batch(self) -> list[UUID]:
        batch = [await self._queue.get()]
        while len(batch) < BATCH and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch
