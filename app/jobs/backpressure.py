"""What is paid for and not stored yet: while it is much, nothing more is bought."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from app.errors import LeaseLost, ProviderError
from app.jobs.settlement import AttemptEnded

# With so many predictions that have ended and are not stored yet, no job is begun: what is paid for
# is kept before more is bought, however slow the disk, the network or this process is.
UNSTORED_LIMIT = 50
# A job that could not be stored is tried again after five seconds, by this worker or another.
REMEMBERED_SECONDS = 15.0


class Backpressure:
    """The ended predictions of this process; used on the event loop only."""

    def __init__(self) -> None:
        self._jobs: Counter[UUID] = Counter()
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def wait_for_room(self) -> None:
        """Return when fewer than `UNSTORED_LIMIT` wait to be stored."""
        await self._has_room.wait()

    @contextmanager
    def storing(self, job_id: UUID) -> Iterator[None]:
        """Count a job while it is being stored, and for a while if our storage has failed it.

        Were it forgotten while it waits for its next try, a disk that is full would let a whole
        backlog be bought. A file that its host refuses is not counted: one such job would stop all
        others.
        """
        self._change(job_id, 1)
        seconds = REMEMBERED_SECONDS
        try:
            yield
            seconds = 0
        except (ProviderError, LeaseLost, AttemptEnded, asyncio.CancelledError):
            seconds = 0
            raise
        finally:
            if seconds:
                asyncio.get_running_loop().call_later(seconds, self._change, job_id, -1)
            else:
                self._change(job_id, -1)

    def _change(self, job_id: UUID, change: int) -> None:
        self._jobs[job_id] += change
        if not self._jobs[job_id]:
            del self._jobs[job_id]
        if len(self._jobs) < UNSTORED_LIMIT:
            self._has_room.set()
        else:
            self._has_room.clear()
