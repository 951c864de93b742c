"""Brings jobs that nobody works on to a worker: by their message once more, or without one.

ring_due        whatever is due and was not picked up: its message is sent again
begin_unrung    new jobs, while the broker is away or the consumer has stalled
resume_unheard  jobs with an open attempt: what is paid for waits in no line
begin_again     others that have begun: they take a place in line here
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, TypeVar
from uuid import UUID

import structlog

from app.jobs.repository import JobRepository, Lease

BATCH = 500
# Enough messages to keep workers busy until the next round; more would only pile up.
QUEUE_TARGET = 1000
# A worker with so many jobs in line rings for few: it would hear the same ones again and again.
LINE_TARGET = 100
RINGS_AT_LEAST = 5
# Jobs that have begun are run without a message when theirs is not heard for so long.
UNHEARD_SECONDS = 3.0
# New ones by a worker that is idle; seldom, as each of them may have its message yet.
UNHEARD_NEW_SECONDS = 10.0
RESUMES_AT_ONCE = 50
# With so many in line here, jobs that begin again are left to other workers, or to their message.
AGAIN_TARGET = 1000

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Doorbell(Protocol):
    """The broker, as the sweep sees it. Both methods block and may raise."""

    def ring(self, job_ids: Sequence[UUID]) -> None:
        """Publish one message per job."""
        ...

    def queue_length(self) -> int:
        """Return how many messages wait."""
        ...


class Runs(Protocol):
    """The runs of this process."""

    def waiting(self) -> Collection[UUID]:
        """Return the jobs that wait for their turn to be begun."""
        ...

    def resuming(self) -> Collection[UUID]:
        """Return the jobs that `start` was called for and that are not claimed yet."""
        ...

    def claimed(self) -> Collection[Lease]:
        """Return the leases of runs that have claimed their job."""
        ...

    def job_ids(self) -> Collection[UUID]:
        """Return the job of every run that has claimed it or is just about to."""
        ...

    def start(self, job_id: UUID, *, at_once: bool) -> None:
        """Run a job without a message: `at_once` if it has begun before, else in its turn."""
        ...

    def stop(self, lease: Lease) -> None:
        """Stop the run that holds this lease; it writes nothing more."""
        ...


class Redelivery:
    """Rings again for jobs whose message was lost, and begins some here without a message."""

    def __init__(
        self, repository: JobRepository, doorbell: Doorbell, runs: Runs, *, concurrency: int
    ) -> None:
        self._repository = repository
        self._doorbell = doorbell
        self._runs = runs
        self._concurrency = concurrency
        self._broker_answers = True

    async def ring_due(self) -> None:
        """Ring for jobs that are due and that nobody has picked up.

        Never far beyond what the workers can take: the queue is only topped up, and only by
        workers that have room. Every message costs both sides time, also one that is not needed;
        but a few are always sent, for a message may be lost while the queue stays long.
        """
        waiting = await self._ask_broker(self._doorbell.queue_length)
        has_room = len(self._runs.waiting()) < LINE_TARGET
        room = min(BATCH, QUEUE_TARGET - waiting) if has_room else 0
        due = await self._repository.due(max(room, RINGS_AT_LEAST))
        if not due:
            return
        try:
            await self._ask_broker(lambda: self._doorbell.ring(due))
        except Exception:
            self._begin(due)  # or they would be left alone for a while
            raise

    async def _ask_broker(self, call: Callable[[], T]) -> T:
        try:
            answer = await asyncio.to_thread(call)
        except Exception:
            self._broker_answers = False
            raise
        self._broker_answers = True
        return answer

    async def begin_unrung(self) -> None:
        """While the broker is away, begin jobs without a message, as many as there is room for.

        Also if it is there, but new jobs stay where they are although this worker has little to
        do: somebody takes the messages, or the consumer has stalled and does not know it.
        """
        room = self._room()
        if not self._broker_answers and room > 0:
            self._begin(await self._repository.due(room))
        elif room > 0 and self._is_idle():
            self._begin(await self._repository.unheard_new(UNHEARD_NEW_SECONDS, room))

    def _is_idle(self) -> bool:
        return not self._runs.waiting() and 2 * len(self._runs.job_ids()) < self._concurrency

    def _begin(self, job_ids: Sequence[UUID]) -> None:
        self._start(job_ids[: max(0, self._room())])

    def _start(self, job_ids: Collection[UUID]) -> None:
        for job_id in job_ids:
            log.info("job_begun_without_message", job_id=str(job_id))
            self._runs.start(job_id, at_once=False)

    def _room(self) -> int:
        waiting, begun = len(self._runs.waiting()), len(self._runs.job_ids())
        return min(LINE_TARGET - waiting, self._concurrency - waiting - begun)

    async def resume_unheard(self) -> None:
        """Run jobs that are paid for without waiting for their message any longer.

        What is paid for must not stand behind a queue of new jobs, nor wait for a slot: it needs
        none, and Replicate deletes outputs after an hour. A few at a time: more claims than the
        database takes would only queue, and be begun again and again.
        """
        resuming = self._runs.resuming()
        room = RESUMES_AT_ONCE - len(resuming)
        if room <= 0:
            return
        unheard = await self._repository.unheard(UNHEARD_SECONDS, room)
        for job_id in set(unheard) - set(resuming):
            log.info("job_resumed_without_message", job_id=str(job_id))
            self._runs.start(job_id, at_once=True)

    async def begin_again(self) -> None:
        """Put other jobs that have begun in line here: no queue of new ones stands before them.

        Retries that are due, and what lost its worker before anything was paid.
        """
        waiting = self._runs.waiting()
        if len(waiting) < AGAIN_TARGET:
            limit = RESUMES_AT_ONCE
            unheard = await self._repository.unheard(UNHEARD_SECONDS, limit, paid=False)
            self._start([job_id for job_id in unheard if job_id not in waiting])
