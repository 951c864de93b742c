"""What every worker does beside its jobs: says that it lives, and finds what others left behind.

Each duty is a loop of its own, so that a broker or provider that hangs delays nothing else. All of
them may run in any number of workers at once: every write is guarded or skips locked rows.
"""

import asyncio
from uuid import UUID

import structlog

from app import clock
from app.jobs.duty import repeat
from app.jobs.orphans import OrphanStopper
from app.jobs.redelivery import Doorbell, Redelivery, Runs
from app.jobs.repository import JobRepository, Lease
from app.jobs.retention import RetentionPolicy, enforce_retention
from app.jobs.strays import remove_strays
from app.storage.base import Storage
from app.storage.workspaces import remove_leftovers

BATCH = 500
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

log = structlog.get_logger(__name__)


class Recovery:
    """The heartbeat and the sweep of one worker."""

    def __init__(
        self,
        repository: JobRepository,
        heartbeats: JobRepository,
        orphans: OrphanStopper,
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
        self._heard_at = clock.now()
        self._unheard_until = 0.0
        self.orphans = orphans
        self.redelivery = Redelivery(repository, doorbell, runs, concurrency=concurrency)
        self.living_workers = 1
        # Set by the first heartbeat: now this worker has a row, and may own jobs.
        self.is_known = asyncio.Event()

    async def run(self) -> None:
        """Do all duties for ever; cancel the task to end them."""
        # The database may have come back just now: the others are given two beats to say so.
        self._unheard_until = clock.now() + 2 * self._heartbeat_seconds
        async with asyncio.TaskGroup() as duties:
            # Never less often: after an outage it is this that says that the worker lives.
            beat = self._heartbeat_seconds
            duties.create_task(repeat(beat, self.heartbeat, longest_seconds=beat))
            for duty in (
                self.check_leases,
                self.sweep,
                self.redelivery.ring_due,
                self.redelivery.begin_unrung,
                self.redelivery.resume_unheard,
                self.redelivery.begin_again,
            ):
                duties.create_task(repeat(self._sweep_seconds, duty))
            duties.create_task(self.orphans.run(self._sweep_seconds))
            duties.create_task(repeat(HOUSEKEEPING_SECONDS, self.keep_house))
            duties.create_task(repeat(HOUSEKEEPING_SECONDS, self.enforce_retention))
            duties.create_task(repeat(STRAYS_SECONDS, self.remove_strays))

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

    async def keep_house(self) -> None:
        """Warn of outputs that may be lost soon; remove what dead processes left half-written."""
        await self._warn_of_risks()  # first: it is a storage that fails which puts them at risk
        removed = await remove_leftovers(self._storage.workspaces, LEFTOVER_SECONDS)
        if removed:
            log.info("leftovers_removed", files=removed)

    async def _warn_of_risks(self) -> None:
        for job_id, at in await self._repository.unstored(AT_RISK_SECONDS, BATCH):
            log.error("output_at_risk", job_id=str(job_id), submitted_at=at.isoformat())

    async def enforce_retention(self) -> None:
        """Delete what has been kept for its time; see `retention`."""
        await enforce_retention(self._repository, self._storage, self._retention)

    async def remove_strays(self) -> None:
        """Have one of the workers remove files that belong to nothing; see `strays`."""
        if await self._repository.is_eldest(self._worker_id, self._lease_seconds):
            await remove_strays(self._repository, self._storage)
