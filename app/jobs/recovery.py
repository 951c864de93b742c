"""What every worker does beside its jobs: says that it lives, and finds what others left behind.

Each duty is a loop of its own, so that a broker or provider that hangs delays nothing else. All of
them may run in any number of workers at once: every write is guarded or skips locked rows.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar
from uuid import UUID

import structlog

from app import clock
from app.errors import FailureClass, ProviderError
from app.jobs.charge import charged
from app.jobs.models import Charged
from app.jobs.reconcile import asked_for
from app.jobs.repository import JobRepository, Lease, Orphan, Settlement
from app.jobs.retention import RetentionPolicy, enforce_retention
from app.jobs.strays import remove_strays
from app.providers.base import Prediction, Provider, is_of
from app.storage.base import Storage

BATCH = 500
# Enough messages to keep workers busy until the next round; more would only pile up.
QUEUE_TARGET = 1000
# A worker with so many jobs in line rings for few: it would hear the same ones again and again.
LINE_TARGET = 100
RINGS_AT_LEAST = 5
# A create call that no list has shown after this long is taken for never received.
ORPHAN_PATIENCE_SECONDS = 120.0
# Replicate forgets inputs after an hour, and no prediction runs as long.
ORPHAN_MEMORY_SECONDS = 3600.0
# Jobs that have begun are run without a message when theirs is not heard for so long.
UNHEARD_SECONDS = 3.0
# New ones by a worker that is idle; seldom, as each of them may have its message yet.
UNHEARD_NEW_SECONDS = 10.0
RESUMES_AT_ONCE = 50
# With so many in line here, jobs that begin again are left to other workers, or to their message.
AGAIN_TARGET = 1000
# More would only queue before the provider's rate, and the poller's reads behind them.
STOPS_AT_ONCE = 8
# So many wait for that; the others are left to the next round, or to other workers.
ORPHANS_IN_HAND = 64
LONGEST_PAUSE_SECONDS = 10.0
LOGGED_JOBS = 20

HOUSEKEEPING_SECONDS = 60.0
# A look at every stored file: seldom.
STRAYS_SECONDS = 3600.0
# Nobody writes to a file whose last byte came so long ago. With the rounds of housekeeping and a
# worker's restart it is gone within ten minutes.
LEFTOVER_SECONDS = 480.0
# Replicate deletes outputs an hour after the end; a prediction that was submitted half an hour ago
# and is not stored deserves a person's attention.
AT_RISK_SECONDS = 1800.0

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


class Recovery:
    """The heartbeat and the sweep of one worker."""

    def __init__(
        self,
        repository: JobRepository,
        heartbeats: JobRepository,
        provider: Provider,
        doorbell: Doorbell,
        runs: Runs,
        storage: Storage,
        retention: RetentionPolicy,
        *,
        worker_id: UUID,
        worker_name: str,
        concurrency: int,
        heartbeat_seconds: float,
        lease_seconds: float,
        sweep_seconds: float,
    ) -> None:
        """`heartbeats` is the repository on a connection that nothing else uses."""
        self._repository = repository
        self._heartbeats = heartbeats
        self._provider = provider
        self._doorbell = doorbell
        self._runs = runs
        self._storage = storage
        self._retention = retention
        self._worker_id = worker_id
        self._worker_name = worker_name
        self._concurrency = concurrency
        self._heartbeat_seconds = heartbeat_seconds
        self._lease_seconds = lease_seconds
        self._sweep_seconds = sweep_seconds
        self._lost: set[Lease] = set()
        self._broker_answers = True
        self._heard_at = clock.now()
        self._unheard_until = 0.0
        self._cancelled = asyncio.Event()
        self._stopping = asyncio.Semaphore(STOPS_AT_ONCE)
        self._orphans: set[UUID] = set()  # the attempts that are being stopped
        self.living_workers = 1
        # Set by the first heartbeat: now this worker has a row, and may own jobs.
        self.is_known = asyncio.Event()

    async def run(self) -> None:
        """Do all duties for ever; cancel the task to end them."""
        async with asyncio.TaskGroup() as duties:
            # Never less often: after an outage it is this that says that the worker lives.
            beat = self._heartbeat_seconds
            duties.create_task(_every(beat, self.heartbeat, longest_seconds=beat))
            for duty in (
                self.check_leases,
                self.sweep,
                self.ring_due,
                self.begin_unrung,
                self.resume_unheard,
                self.begin_again,
                self.stop_lost_orphans,
            ):
                duties.create_task(_every(self._sweep_seconds, duty))

            async def stop_orphans() -> None:
                await self.stop_orphans(duties)

            stopping = _every(self._sweep_seconds, stop_orphans, nudge=self._cancelled)
            duties.create_task(stopping)
            duties.create_task(_every(HOUSEKEEPING_SECONDS, self.keep_house))
            duties.create_task(_every(HOUSEKEEPING_SECONDS, self.enforce_retention))
            duties.create_task(_every(STRAYS_SECONDS, self.remove_strays))

    def nudge(self) -> None:
        """Stop orphans now rather than at the next round: a job was cancelled."""
        self._cancelled.set()

    async def heartbeat(self) -> None:
        """Renew this worker's row, and with it the lease on all of its jobs."""
        beat_at = clock.now()
        self._doubt_after_silence()
        try:
            self.living_workers = await self._heartbeats.heartbeat(
                self._worker_id, self._worker_name, self._concurrency, self._lease_seconds
            )
        except Exception:
            self._unheard_until = clock.now() + self._lease_seconds
            raise
        self._heard_at = beat_at
        self.is_known.set()

    def _doubt_after_silence(self) -> None:
        """Whoever has been silent for a lease itself, asleep say, has not heard the others."""
        if clock.now() - self._heard_at > self._lease_seconds:
            self._unheard_until = clock.now() + self._lease_seconds

    async def check_leases(self) -> None:
        """Stop runs whose job was cancelled or taken over; free jobs that no run stands behind."""
        claimed = self._runs.claimed()  # before the query: what is claimed now must be in it
        owned = await self._repository.leases_of(self._worker_id)
        lost = {lease for lease in claimed if owned.get(lease.job_id) != lease.token}
        # Seen lost twice: a run that has just committed its own end is gone by then.
        for lease in lost & self._lost:
            log.info("run_stopped", job_id=str(lease.job_id))
            self._runs.stop(lease)
        self._lost = lost
        running = set(self._runs.job_ids())
        for job_id, token in owned.items():
            if job_id not in running:
                log.warning("job_abandoned", job_id=str(job_id))
                await self._repository.release(Lease(job_id, token))

    async def sweep(self) -> None:
        """Finish cancels, fail what is past its deadline, free the jobs of silent workers."""
        await self._repository.finish_cancels()
        for job_id, code in (await self._repository.expire(BATCH)).items():
            log.warning("job_expired", job_id=str(job_id), code=code)
        for job_id in await self._repository.fail_poisoned(BATCH):
            log.error("job_poisoned", job_id=str(job_id))
        self._doubt_after_silence()
        if clock.now() < self._unheard_until:
            # The database was away, or we were: all others live until a lease has gone by.
            return
        freed = await self._repository.release_dead(self._lease_seconds)
        if freed:
            shown = [str(job_id) for job_id in freed[:LOGGED_JOBS]]
            log.warning("jobs_taken_from_silent_worker", jobs=len(freed), job_ids=shown)

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

    async def stop_orphans(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to stop predictions whose job has ended without them (cancelled, say, or late).

        Not waited for: one call that hangs must not hold up a cancel that comes after it.
        """
        room = ORPHANS_IN_HAND - len(self._orphans)
        if room <= 0:
            return
        for orphan in await self._repository.take_orphans(room, known=True):
            if orphan.attempt.id not in self._orphans:  # else it is still at it
                self._orphans.add(orphan.attempt.id)
                tasks.create_task(self._stop_orphan(orphan))

    async def stop_lost_orphans(self) -> None:
        """The same for creates whose answer was lost: they have to be found first.

        Searches share one reading of the provider's list, so all of them begin at once.
        """
        orphans = await self._repository.take_orphans(BATCH, known=False)
        await asyncio.gather(*(self._stop_orphan(orphan) for orphan in orphans))

    async def keep_house(self) -> None:
        """Remove what dead processes left half-written; warn of outputs that may be lost soon."""
        removed = await self._storage.clean(LEFTOVER_SECONDS)
        if removed:
            log.info("leftovers_removed", files=removed)
        for attempt in await self._repository.unstored(AT_RISK_SECONDS, BATCH):
            at = attempt.submitted_at
            shown = at.isoformat() if at else None
            log.error("output_at_risk", job_id=str(attempt.job_id), submitted_at=shown)

    async def enforce_retention(self) -> None:
        """Delete what has been kept for its time; see `retention`."""
        await enforce_retention(self._repository, self._storage, self._retention)

    async def remove_strays(self) -> None:
        """Have one of the workers remove files that belong to nothing; see `strays`."""
        if await self._repository.is_eldest(self._worker_id, self._lease_seconds):
            await remove_strays(self._repository, self._storage)

    async def _stop_orphan(self, orphan: Orphan) -> None:
        """Never raises: others are being stopped beside it."""
        try:
            await self._try_to_stop(orphan)
        except Exception as error:
            log.warning("orphan_not_stopped", **_names(orphan), error=type(error).__name__)
        finally:
            self._orphans.discard(orphan.attempt.id)

    async def _try_to_stop(self, orphan: Orphan) -> None:
        attempt = orphan.attempt
        try:
            prediction_id = attempt.prediction_id or await self._find(orphan)
            async with self._stopping:
                settlement = await self._stopped(orphan, prediction_id)
        except ProviderError as error:
            log.warning("orphan_not_stopped", **_names(orphan), code=error.code)
            settlement = _given_up(orphan, error)
        if settlement is not None:
            await self._repository.settle_orphan(settlement)

    async def _stopped(self, orphan: Orphan, prediction_id: str | None) -> Settlement | None:
        """Cancel the prediction; return how the attempt has ended, None if nobody knows yet."""
        attempt = orphan.attempt
        if prediction_id is not None:
            prediction = await self._provider.cancel(prediction_id)
            if prediction is None and orphan.age_seconds < ORPHAN_PATIENCE_SECONDS:
                return None  # the provider may not know yet what it has just made
            log.info("orphan_stopped", **_names(orphan))
            return _settled(attempt.id, prediction_id, prediction)
        if orphan.age_seconds > ORPHAN_PATIENCE_SECONDS:
            return Settlement(attempt.id, None, "absent", Charged.NO)
        return None

    async def _find(self, orphan: Orphan) -> str | None:
        """Return the prediction of a create whose answer was lost, unless another job has it."""
        attempt = orphan.attempt
        request = asked_for(attempt, orphan.given_seed)
        seen = await self._provider.find(request, orphan.age_seconds)
        found = [prediction for prediction in seen if is_of(prediction, request)]
        if found and not request.has_own_seed and await self._repository.has_twin(attempt):
            if orphan.age_seconds > ORPHAN_PATIENCE_SECONDS:
                raise _unknown("A prediction of this input may be another job's.")
            return None  # it may be the other's, and that one is wanted
        for prediction in found:
            if await self._repository.adopt(attempt.id, prediction):
                return prediction.id
        if orphan.age_seconds > ORPHAN_PATIENCE_SECONDS:
            strangers = [other for other in seen if not is_of(other, request)]
            if await self._repository.any_unknown(self._provider.name, strangers):
                raise _unknown("A prediction is listed that may be it, and is no other job's.")
        return None


def _unknown(message: str) -> ProviderError:
    return ProviderError(FailureClass.PERMANENT, "provider_outcome_unknown", message)


def _names(orphan: Orphan) -> dict[str, str]:
    return {"job_id": str(orphan.attempt.job_id), "attempt_id": str(orphan.attempt.id)}


def _settled(attempt_id: UUID, prediction_id: str, prediction: Prediction | None) -> Settlement:
    """Say how it ended: it may have been done before the cancel came."""
    if prediction is None:
        return Settlement(attempt_id, prediction_id, "unknown", Charged.UNKNOWN)
    return Settlement(
        attempt_id,
        prediction_id,
        prediction.status if prediction.is_terminal else "canceled",
        charged(prediction),
        predict_time_seconds=prediction.predict_time_seconds,
        version=prediction.version,
    )


def _given_up(orphan: Orphan, error: ProviderError) -> Settlement | None:
    """Close an attempt of which nobody will ever know; `Cancel-After` bounds what it costs."""
    lasting = error.failure_class is FailureClass.PERMANENT
    if not lasting and orphan.age_seconds < ORPHAN_MEMORY_SECONDS:
        return None  # the provider is not well: later
    attempt = orphan.attempt
    known = attempt.prediction_id
    return Settlement(attempt.id, known, "unknown", Charged.UNKNOWN, error.failure_class)


async def _every(
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
