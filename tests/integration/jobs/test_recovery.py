"""What a worker does beside its jobs: heartbeat, sweep, lost leases and orphaned predictions."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock
from uuid import UUID, uuid4

import psycopg
import pytest
from structlog.testing import CapturingLogger

from app import clock
from app.config import Settings
from app.errors import FailureClass, ProviderError, StorageError
from app.jobs import orphans, recovery, redelivery
from app.jobs.models import Charged, JobStatus
from app.jobs.orphans import OrphanStopper
from app.jobs.recovery import Recovery
from app.jobs.repository import Claim, JobRepository, Lease, NewJob, client, ledger, statements
from app.jobs.retention import RetentionPolicy
from app.providers.base import Prediction, PredictionRequest
from app.providers.replicate import ReplicateProvider
from app.storage import create_storage
from scripts.servers import Postgres
from tests.doubles.replicate_server import ReplicateServer
from tests.doubles.ungoverned import Ungoverned

REQUEST = PredictionRequest("acme/painter", {"prompt": "p", "seed": 1}, 60)


@dataclass
class RecordingDoorbell:
    """Notes who was rung for; the queue is as long as the test says."""

    length: int = 0
    rung: list[UUID] = field(default_factory=list)

    def ring(self, job_ids: Sequence[UUID]) -> None:
        self.rung += job_ids

    def queue_length(self) -> int:
        return self.length


@dataclass
class FixedRuns:
    """The runs that the test says there are."""

    leases: list[Lease] = field(default_factory=list)
    stopped: list[Lease] = field(default_factory=list)
    started: list[UUID] = field(default_factory=list)
    begun: list[UUID] = field(default_factory=list)
    unclaimed: list[UUID] = field(default_factory=list)
    line: list[UUID] = field(default_factory=list)

    def waiting(self) -> Collection[UUID]:
        return self.line

    def resuming(self) -> Collection[UUID]:
        return self.unclaimed

    def claimed(self) -> Collection[Lease]:
        return self.leases

    def job_ids(self) -> Collection[UUID]:
        return [lease.job_id for lease in self.leases]

    def start(self, job_id: UUID, *, at_once: bool) -> None:
        (self.started if at_once else self.begun).append(job_id)

    def stop(self, lease: Lease) -> None:
        self.stopped.append(lease)


@dataclass
class Worker:
    """One worker's recovery with what stands around it."""

    id: UUID
    recovery: Recovery
    repository: JobRepository
    provider: ReplicateProvider
    doorbell: RecordingDoorbell
    runs: FixedRuns

    async def claim(self, **parameters: Any) -> Claim:
        job = await self.repository.add(NewJob("p", "acme/painter", parameters), 60)
        claim = await self.repository.claim(job.id, self.id, 60)
        assert claim is not None
        return claim

    async def submit(self) -> tuple[Claim, Prediction]:
        """Claim a new job and create its prediction."""
        claim = await self.claim()
        attempt = await self.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        prediction = await self.provider.create(REQUEST)
        await self.repository.record_prediction(claim.lease, attempt.id, prediction)
        return claim, prediction

    async def lose(self) -> Prediction:
        """Have a create's answer lost, and its job cancelled meanwhile, out of its window."""
        claim = await self.claim()
        await self.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        prediction = await self.provider.create(REQUEST)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
            for _ in range(2):
                await self.repository.cancel(claim.job.id)
        return prediction

    async def stop_orphans(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            await self.recovery.orphans.stop_orphans(tasks)

    async def status(self, claim: Claim) -> JobStatus:
        job = await self.repository.get(claim.job.id)
        assert job is not None
        return job.status


def strangers(count: int) -> list[UUID]:
    """Jobs of no matter what."""
    return [uuid4() for _ in range(count)]


@pytest.fixture
async def worker(
    settings: Settings, repository: JobRepository, replicate: ReplicateServer
) -> AsyncIterator[Worker]:
    provider = ReplicateProvider(
        replicate.token,
        replicate.origin,
        timeout_seconds=20,
        prefer_wait_seconds=0,
        governor=Ungoverned(),
    )
    worker_id, doorbell, runs = uuid4(), RecordingDoorbell(), FixedRuns()
    recovery = Recovery(
        repository,
        repository,
        OrphanStopper(repository, provider, grace_seconds=0),
        doorbell,
        runs,
        create_storage(settings),
        RetentionPolicy(media_days=1, metadata_days=None),
        worker_id=worker_id,
        worker_name="test",
        concurrency=10,
        heartbeat_seconds=0.05,
        lease_seconds=30,
        sweep_seconds=0.05,
    )
    yield Worker(worker_id, recovery, repository, provider, doorbell, runs)
    await provider.aclose()


class TestLeases:
    async def test_a_run_whose_job_was_taken_is_stopped(self, worker: Worker) -> None:
        claim = await worker.claim()
        worker.runs.leases = [claim.lease]
        await worker.recovery.check_leases()
        await worker.repository.release(claim.lease)
        await worker.repository.claim(claim.job.id, uuid4(), 60)
        await worker.recovery.check_leases()
        assert worker.runs.stopped == []  # it might just have ended by itself
        await worker.recovery.check_leases()
        assert worker.runs.stopped == [claim.lease]

    async def test_a_run_that_owns_its_job_is_left_alone(self, worker: Worker) -> None:
        worker.runs.leases = [(await worker.claim()).lease]
        for _ in range(3):
            await worker.recovery.check_leases()
        assert worker.runs.stopped == []

    async def test_a_job_without_a_run_is_freed(self, worker: Worker) -> None:
        claim = await worker.claim()
        await worker.recovery.check_leases()
        assert await worker.repository.claim(claim.job.id, uuid4(), 60) is not None


class TestRinging:
    @pytest.fixture(autouse=True)
    def _due_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(client, "FIRST_RING_SECONDS", -1)

    async def test_due_jobs_are_rung_once(self, worker: Worker) -> None:
        job = await worker.repository.add(NewJob("p", "a/b", {}), 60)
        await worker.recovery.redelivery.ring_due()
        await worker.recovery.redelivery.ring_due()
        assert worker.doorbell.rung == [job.id]

    async def test_a_long_queue_is_hardly_made_longer(self, worker: Worker) -> None:
        await self._is_hardly_made_longer(worker, queue=redelivery.QUEUE_TARGET)

    async def test_a_worker_with_a_long_line_rings_for_few(self, worker: Worker) -> None:
        await self._is_hardly_made_longer(worker, line=redelivery.LINE_TARGET)

    async def _is_hardly_made_longer(self, worker: Worker, queue: int = 0, line: int = 0) -> None:
        """But whose message was lost meanwhile gets its turn."""
        jobs = [await worker.repository.add(NewJob("p", "a/b", {}), 60) for _ in range(8)]
        worker.doorbell.length, worker.runs.line = queue, strangers(line)
        await worker.recovery.redelivery.ring_due()
        assert len(worker.doorbell.rung) == redelivery.RINGS_AT_LEAST
        await worker.recovery.redelivery.ring_due()
        assert set(worker.doorbell.rung) == {job.id for job in jobs}

    async def test_freed_jobs_of_a_dead_worker_are_rung(self, worker: Worker) -> None:
        claim = await worker.claim()  # by a worker that has never said that it lives
        await worker.recovery.sweep()
        await worker.recovery.redelivery.ring_due()
        assert worker.doorbell.rung == [claim.job.id]


class TestUnrung:
    """No job waits for a broker that is away."""

    @pytest.fixture(autouse=True)
    def _due_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(client, "FIRST_RING_SECONDS", -1)

    @pytest.fixture
    def without_broker(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Worker:
        def away() -> int:
            raise ConnectionRefusedError

        monkeypatch.setattr(worker.doorbell, "queue_length", away)
        return worker

    async def test_due_jobs_begin_without_a_message(self, without_broker: Worker) -> None:
        job = await without_broker.repository.add(NewJob("p", "a/b", {}), 60)
        with pytest.raises(ConnectionRefusedError):
            await without_broker.recovery.redelivery.ring_due()
        for _ in range(2):  # the other workers leave it alone
            await without_broker.recovery.redelivery.begin_unrung()
        assert without_broker.runs.begun == [job.id]

    async def test_only_as_many_as_there_is_room_for(self, without_broker: Worker) -> None:
        for _ in range(5):
            await without_broker.repository.add(NewJob("p", "a/b", {}), 60)
        with pytest.raises(ConnectionRefusedError):
            await without_broker.recovery.redelivery.ring_due()
        without_broker.runs.line = strangers(8)  # of 10
        await without_broker.recovery.redelivery.begin_unrung()
        assert len(without_broker.runs.begun) == 2

    async def test_so_do_those_whose_ring_fails(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: Sequence[UUID]) -> None:
            raise MemoryError

        monkeypatch.setattr(worker.doorbell, "ring", full)
        job = await worker.repository.add(NewJob("p", "a/b", {}), 60)
        with pytest.raises(MemoryError):
            await worker.recovery.redelivery.ring_due()
        assert worker.runs.begun == [job.id]

    async def test_a_database_that_fails_is_not_the_broker(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(worker.repository, "due", lambda _: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                await worker.recovery.redelivery.ring_due()
        await worker.repository.add(NewJob("p", "a/b", {}), 60)
        await worker.recovery.redelivery.begin_unrung()
        assert worker.runs.begun == []

    async def test_while_it_answers_they_wait_for_their_message(self, worker: Worker) -> None:
        await worker.repository.add(NewJob("p", "a/b", {}), 60)
        await worker.recovery.redelivery.begin_unrung()
        assert worker.runs.begun == []

    async def test_not_if_nothing_is_heard_of_them_by_an_idle_worker(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The consumer has stalled, and neither broker nor heartbeat shows it."""
        monkeypatch.setattr(redelivery, "UNHEARD_NEW_SECONDS", 0)
        jobs = [await worker.repository.add(NewJob("p", "a/b", {}), 60) for _ in range(3)]
        busy = [Lease(job_id, uuid4()) for job_id in strangers(5)]  # of 10
        for worker.runs.line, worker.runs.leases in ((strangers(1), []), ([], busy)):
            await worker.recovery.redelivery.begin_unrung()
            assert worker.runs.begun == []
        worker.runs.leases = busy[1:]
        await worker.recovery.redelivery.begin_unrung()
        assert set(worker.runs.begun) == {job.id for job in jobs}

    async def test_once_it_is_back_as_well(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(worker.doorbell, "queue_length", lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                await worker.recovery.redelivery.ring_due()
        await worker.recovery.redelivery.ring_due()
        await worker.repository.add(NewJob("p", "a/b", {}), 60)
        await worker.recovery.redelivery.begin_unrung()
        assert worker.runs.begun == []


class TestUnheard:
    """Jobs that have begun do not wait for their message behind a queue of new ones."""

    async def _freed(self, worker: Worker) -> UUID:
        claim = await worker.claim()
        await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        await worker.recovery.sweep()  # by a worker that has never said that it lives
        return claim.job.id

    async def test_one_that_was_rung_for_is_run_soon_without(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = await self._freed(worker)
        await worker.recovery.redelivery.ring_due()
        await worker.recovery.redelivery.resume_unheard()
        assert (worker.doorbell.rung, worker.runs.started) == ([job_id], [])
        monkeypatch.setattr(redelivery, "UNHEARD_SECONDS", 0)
        for _ in range(2):
            await worker.recovery.redelivery.resume_unheard()
        assert worker.runs.started[0] == job_id

    async def test_one_that_nobody_can_ring_for_is_run_as_well(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = await self._freed(worker)
        await worker.recovery.redelivery.resume_unheard()
        assert worker.runs.started == []
        monkeypatch.setattr(redelivery, "UNHEARD_SECONDS", 0)
        await worker.recovery.redelivery.resume_unheard()
        assert worker.runs.started == [job_id]

    async def test_one_that_waits_for_its_claim_here_is_not_begun_again(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redelivery, "UNHEARD_SECONDS", 0)
        worker.runs.unclaimed = [await self._freed(worker)]
        await worker.recovery.redelivery.resume_unheard()
        assert worker.runs.started == []

    async def test_no_more_are_begun_than_the_database_takes(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redelivery, "UNHEARD_SECONDS", 0)
        monkeypatch.setattr(redelivery, "RESUMES_AT_ONCE", 2)
        for _ in range(3):
            await self._freed(worker)
        worker.runs.unclaimed = [uuid4()]
        await worker.recovery.redelivery.resume_unheard()
        assert len(worker.runs.started) == 1

    async def test_new_jobs_and_retries_that_are_not_due_are_not(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redelivery, "UNHEARD_SECONDS", -60)
        await worker.repository.add(NewJob("p", "a/b", {}), 60)
        claim = await worker.claim()
        await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        await worker.repository.retry_later(
            claim.lease, delay_seconds=9, error_code="x", error_message="y"
        )
        await worker.recovery.redelivery.resume_unheard()
        await worker.recovery.redelivery.begin_again()
        assert (worker.runs.started, worker.runs.begun) == ([], [])

    async def test_what_is_not_paid_for_goes_in_line_before_the_new_ones(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those whose worker died before it had created anything, and retries that are due."""
        monkeypatch.setattr(redelivery, "UNHEARD_SECONDS", 0)
        paid = await self._freed(worker)
        claims = [await worker.claim() for _ in range(2)]
        retried = claims[0].lease
        await worker.repository.retry_later(
            retried, delay_seconds=0, error_code="x", error_message="y"
        )
        await worker.recovery.sweep()
        worker.runs.line = strangers(redelivery.AGAIN_TARGET)
        await worker.recovery.redelivery.begin_again()
        assert worker.runs.begun == []
        worker.runs.line = [*strangers(500), retried.job_id]
        await worker.recovery.redelivery.begin_again()
        assert worker.runs.begun == [claims[1].job.id]
        await worker.recovery.redelivery.resume_unheard()
        assert worker.runs.started == [paid]


class TestOutage:
    """While the database is away nobody is heard, and nobody is dead for that."""

    async def test_nobody_is_robbed_until_a_lease_after_it(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claim = await worker.claim()
        heartbeat = worker.repository.heartbeat

        async def away(*_: object) -> int:
            raise ConnectionRefusedError

        monkeypatch.setattr(worker.repository, "heartbeat", away)
        with pytest.raises(ConnectionRefusedError):
            await worker.recovery.heartbeat()
        monkeypatch.setattr(worker.repository, "heartbeat", heartbeat)
        await worker.recovery.heartbeat()
        await worker.recovery.sweep()
        assert await worker.repository.leases_of(worker.id)
        worker.recovery._unheard_until = clock.now()  # a lease later
        await worker.repository.hand_back(uuid4())
        monkeypatch.setattr(worker.recovery, "_lease_seconds", 0)
        await worker.recovery.sweep()
        assert claim.lease.job_id not in await worker.repository.leases_of(worker.id)

    @pytest.mark.parametrize("first", ["sweep", "heartbeat"])
    async def test_nor_after_the_machine_has_slept(self, worker: Worker, first: str) -> None:
        """All on it have been silent then, and beat again soon."""
        await worker.recovery.heartbeat()
        job = await worker.repository.add(NewJob("p", "acme/painter", {}), 60)
        neighbour = uuid4()
        assert await worker.repository.claim(job.id, neighbour, 60)
        worker.recovery._heard_at = clock.now() - 31
        await getattr(worker.recovery, first)()
        await worker.recovery.sweep()
        assert job.id in await worker.repository.leases_of(neighbour)
        worker.recovery._heard_at = worker.recovery._unheard_until = clock.now()  # a lease later
        await worker.recovery.sweep()
        assert job.id not in await worker.repository.leases_of(neighbour)

    async def test_the_living_are_counted(self, worker: Worker) -> None:
        """The rate of calls is shared by as many while Redis is away."""
        await worker.recovery.heartbeat()
        assert worker.recovery.living_workers == 1
        await worker.repository.heartbeat(uuid4(), "another", 1, 30)
        await worker.recovery.heartbeat()
        assert worker.recovery.living_workers == 2

    async def test_a_worker_that_has_just_started_gives_the_others_two_beats(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The database may have come back with it: nobody has beaten for long, and all live."""
        neighbour = uuid4()
        job = await worker.repository.add(NewJob("p", "acme/painter", {}), 60)
        assert await worker.repository.claim(job.id, neighbour, 60)
        monkeypatch.setattr(worker.recovery, "_heartbeat_seconds", 30)
        duties = asyncio.create_task(worker.recovery.run())
        await asyncio.sleep(0.5)  # ten rounds
        duties.cancel()
        assert job.id in await worker.repository.leases_of(neighbour)


async def test_a_worker_is_known_from_its_first_heartbeat(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(worker.repository, "heartbeat", Mock(side_effect=ConnectionRefusedError))
        with pytest.raises(ConnectionRefusedError):
            await worker.recovery.heartbeat()
    assert not worker.recovery.is_known.is_set()
    await worker.recovery.heartbeat()
    assert worker.recovery.is_known.is_set()


class TestOrphans:
    @pytest.fixture(autouse=True)
    def _left_to_nobody(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger, "STOP_AGAIN_SECONDS", 0)

    async def test_the_prediction_of_a_cancelled_job_is_cancelled(
        self, worker: Worker, replicate: ReplicateServer
    ) -> None:
        replicate.configure(latency_seconds=30)
        claim, prediction = await worker.submit()
        await worker.repository.cancel(claim.job.id)
        await worker.stop_orphans()
        assert (await worker.provider.get(prediction.id)).status == "canceled"
        assert await worker.repository.take_orphans(10) == []

    async def test_a_nudge_stops_it_at_once(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker.recovery, "_sweep_seconds", 60)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        replicate.configure(latency_seconds=30)
        (claim, known), lost = await worker.submit(), await worker.claim(seed=1)
        await worker.repository.begin_attempt(lost.lease, "replicate", REQUEST)
        predictions = [known, await worker.provider.create(REQUEST)]
        duties = asyncio.create_task(worker.recovery.run())
        await asyncio.sleep(0.2)  # the first round is over, the next one a minute away
        for cancelled in (claim, lost, lost):
            await worker.repository.cancel(cancelled.job.id)
        worker.recovery.orphans.nudge()
        async with asyncio.timeout(5):
            for prediction in predictions:
                while (await worker.provider.get(prediction.id)).status != "canceled":
                    await asyncio.sleep(0.02)
        duties.cancel()

    async def test_it_is_found_although_its_id_was_lost(
        self, worker: Worker, replicate: ReplicateServer
    ) -> None:
        replicate.configure(latency_seconds=30)
        prediction = await worker.lose()
        await worker.recovery.orphans.stop_lost_orphans()
        assert (await worker.provider.get(prediction.id)).status == "canceled"
        assert await worker.repository.take_orphans(10, known=False) == []

    async def test_it_is_found_although_the_databases_clock_was_set_back(
        self, worker: Worker, replicate: ReplicateServer, database: Postgres
    ) -> None:
        replicate.configure(latency_seconds=30)
        prediction = await worker.lose()
        with psycopg.connect(database.sync_url) as connection:
            connection.execute("UPDATE attempts SET created_at = now() + interval '5 min'")
        await worker.recovery.orphans.stop_lost_orphans()
        assert (await worker.provider.get(prediction.id)).status == "canceled"

    async def test_it_is_left_alone_while_the_service_has_another_provider(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replicate.configure(latency_seconds=30)
        claim, prediction = await worker.submit()
        await worker.repository.cancel(claim.job.id)
        with monkeypatch.context() as patch:
            patch.setattr(worker.provider, "name", "mock")
            await worker.stop_orphans()
        assert replicate.creates()[0].cancel_calls == []
        await worker.stop_orphans()
        assert (await worker.provider.get(prediction.id)).status == "canceled"

    async def test_it_is_stopped_at_once_when_its_id_comes(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Just after it was looked for in vain."""
        monkeypatch.setattr(ledger, "STOP_AGAIN_SECONDS", 60)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        replicate.configure(latency_seconds=30)
        claim = await worker.claim()
        attempt = await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        for _ in range(2):
            await worker.repository.cancel(claim.job.id)
        await worker.recovery.orphans.stop_lost_orphans()
        prediction = await worker.provider.create(REQUEST)
        assert await worker.repository.adopt(attempt.id, prediction)
        await worker.stop_orphans()
        assert (await worker.provider.get(prediction.id)).status == "canceled"

    async def test_one_that_never_was_is_given_up_in_time(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claim = await worker.claim()
        await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        for _ in range(2):
            await worker.repository.cancel(claim.job.id)
        await worker.recovery.orphans.stop_lost_orphans()
        assert len(await worker.repository.take_orphans(10, known=False)) == 1
        monkeypatch.setattr(orphans, "PATIENCE_SECONDS", 0)
        await worker.recovery.orphans.stop_lost_orphans()
        assert await worker.repository.take_orphans(10, known=False) == []
        assert replicate.creates() == []

    async def test_one_is_looked_for_until_the_list_must_show_it(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claim = await worker.claim()
        await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        monkeypatch.setattr(orphans, "PATIENCE_SECONDS", 0)
        for _ in range(2):
            await worker.repository.cancel(claim.job.id)
        for grace_seconds, left in ((600, 1), (0, 0)):
            stopper = OrphanStopper(worker.repository, worker.provider, grace_seconds)
            await stopper.stop_lost_orphans()
            assert len(await worker.repository.take_orphans(10, known=False)) == left

    async def test_one_that_nobody_can_tell_of_does_not_stop_the_others(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replicate.configure(latency_seconds=30)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        lost, known = await worker.claim(), await worker.claim()
        await worker.repository.begin_attempt(lost.lease, "replicate", REQUEST)
        attempt = await worker.repository.begin_attempt(known.lease, "replicate", REQUEST)
        prediction = await worker.provider.create(REQUEST)
        await worker.repository.record_prediction(known.lease, attempt.id, prediction)
        for claim in (lost, known):
            for _ in range(2):
                await worker.repository.cancel(claim.job.id)

        async def find(*_: object) -> None:
            raise ProviderError(FailureClass.PERMANENT, "input_deleted", "")

        monkeypatch.setattr(worker.provider, "find", find)
        await worker.recovery.orphans.stop_lost_orphans()
        await worker.stop_orphans()
        assert (await worker.provider.get(prediction.id)).status == "canceled"
        for is_known in (True, False):
            assert await worker.repository.take_orphans(10, known=is_known) == []

    async def test_a_call_that_hangs_does_not_hold_up_the_next(
        self, worker: Worker, replicate: ReplicateServer
    ) -> None:
        replicate.configure(latency_seconds=30)
        replicate.push_fault("cancel", "delay", seconds=30)
        claims = [(await worker.submit())[0] for _ in range(2)]
        duties = asyncio.create_task(worker.recovery.run())
        async with asyncio.timeout(15):
            for number, claim in enumerate(claims, 1):
                await worker.repository.cancel(claim.job.id)
                worker.recovery.orphans.nudge()
                while replicate.ledger().requests.get("cancel", 0) < number:
                    await asyncio.sleep(0.02)
            while not replicate.creates()[1].cancel_calls:
                await asyncio.sleep(0.05)
        duties.cancel()
        assert replicate.creates()[0].cancel_calls == []

    @pytest.mark.parametrize(
        ("latency_seconds", "outcome", "charged"),
        [(0, "succeeded", Charged.YES), (30, "canceled", Charged.UNKNOWN)],
    )
    async def test_the_ledger_says_how_it_ended(
        self,
        worker: Worker,
        replicate: ReplicateServer,
        latency_seconds: float,
        outcome: str,
        charged: Charged,
    ) -> None:
        """One that was done before the cancel came has cost its time."""
        replicate.configure(latency_seconds=latency_seconds, starting_seconds=latency_seconds)
        claim, _ = await worker.submit()
        await worker.repository.cancel(claim.job.id)
        await worker.stop_orphans()
        [settled] = await worker.repository.attempts(claim.job.id)
        assert (settled.outcome, settled.charged) == (outcome, charged)

    async def test_one_that_may_be_it_is_not_called_absent(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(orphans, "PATIENCE_SECONDS", 0)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        claim = await worker.claim(seed=1)
        await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        await worker.provider.create(PredictionRequest("acme/other", REQUEST.input, 60))
        for _ in range(2):
            await worker.repository.cancel(claim.job.id)
        await worker.recovery.orphans.stop_lost_orphans()
        [settled] = await worker.repository.attempts(claim.job.id)
        assert (settled.outcome, settled.charged) == ("unknown", Charged.UNKNOWN)

    async def test_a_cancel_that_is_refused_while_it_runs_is_tried_again(
        self, worker: Worker, replicate: ReplicateServer
    ) -> None:
        replicate.configure(latency_seconds=30)
        replicate.push_fault("cancel", "status", status=404)
        claim, prediction = await worker.submit()
        await worker.repository.cancel(claim.job.id)
        for state in ("submitted", "settled"):
            await worker.stop_orphans()
            [row] = await worker.repository.attempts(claim.job.id)
            assert row.state == state
        assert (await worker.provider.get(prediction.id)).status == "canceled"

    async def test_one_that_the_provider_does_not_know_yet_is_not_given_up(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claim, _ = await worker.submit()
        await worker.repository.cancel(claim.job.id)
        for patience_seconds, state in ((120, "submitted"), (0, "settled")):
            monkeypatch.setattr(orphans, "PATIENCE_SECONDS", patience_seconds)
            for kind in ("cancel", "get"):
                replicate.push_fault(kind, "status", status=404)
            await worker.stop_orphans()
            [row] = await worker.repository.attempts(claim.job.id)
            assert row.state == state
        assert (row.outcome, row.charged) == ("unknown", Charged.UNKNOWN)

    async def test_one_that_cannot_be_stopped_is_tried_for_an_hour(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replicate.configure(latency_seconds=30)
        replicate.push_fault("cancel", "status", status=500, times=None)
        claim, _ = await worker.submit()
        await worker.repository.cancel(claim.job.id)
        for memory_seconds, state in ((3600, "submitted"), (0, "settled")):
            monkeypatch.setattr(orphans, "MEMORY_SECONDS", memory_seconds)
            await worker.stop_orphans()
            [row] = await worker.repository.attempts(claim.job.id)
            assert row.state == state
        assert (row.outcome, row.error_class) == ("unknown", FailureClass.TRANSIENT)

    @pytest.mark.parametrize("version", ["", f":{'0' * 64}"])
    async def test_the_prediction_of_an_equal_create_is_left_alone(
        self,
        worker: Worker,
        replicate: ReplicateServer,
        monkeypatch: pytest.MonkeyPatch,
        version: str,
    ) -> None:
        """A client cancels a job whose create was lost, and asks for the same again."""
        replicate.configure(latency_seconds=30)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        cancelled, again = await worker.claim(seed=1), await worker.claim(seed=1)
        for claim, name in ((cancelled, "acme/painter"), (again, f"acme/painter{version}")):
            request = replace(REQUEST, model_name=name)
            await worker.repository.begin_attempt(claim.lease, "replicate", request)
        prediction = await worker.provider.create(REQUEST)  # and its answer is still on its way
        for _ in range(2):
            await worker.repository.cancel(cancelled.job.id)
        await worker.recovery.orphans.stop_lost_orphans()
        assert (await worker.provider.get(prediction.id)).status in ("starting", "processing")
        monkeypatch.setattr(orphans, "PATIENCE_SECONDS", 0)
        await worker.recovery.orphans.stop_lost_orphans()
        [settled] = await worker.repository.attempts(cancelled.job.id)
        assert (settled.outcome, settled.charged) == ("unknown", Charged.UNKNOWN)

    async def test_an_equal_create_that_nobody_wants_either_is_stopped_as_well(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replicate.configure(latency_seconds=30)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        claims = [await worker.claim(seed=1) for _ in range(2)]
        for claim in claims:
            await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        predictions = [await worker.provider.create(REQUEST) for _ in claims]
        for claim in claims * 2:
            await worker.repository.cancel(claim.job.id)
        await worker.recovery.orphans.stop_lost_orphans()
        await worker.stop_orphans()
        for prediction in predictions:
            assert (await worker.provider.get(prediction.id)).status == "canceled"

    async def test_one_of_our_own_seed_is_found_under_any_model_name(
        self, worker: Worker, replicate: ReplicateServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replicate.configure(latency_seconds=30)
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        claim = await worker.claim()
        await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        elsewhere = PredictionRequest("acme/sculptor", REQUEST.input, 60)
        prediction = await worker.provider.create(elsewhere)
        for _ in range(2):
            await worker.repository.cancel(claim.job.id)
        await worker.recovery.orphans.stop_lost_orphans()
        assert (await worker.provider.get(prediction.id)).status == "canceled"


class TestHousekeeping:
    async def test_old_leftovers_are_removed_and_young_ones_stay(
        self, worker: Worker, settings: Settings
    ) -> None:
        workspace = settings.storage_path / ".incoming"
        old, young = workspace / "old", workspace / "young"
        old.touch()
        young.touch()
        an_hour_ago = time.time() - 3600
        os.utime(old, (an_hour_ago, an_hour_ago))
        await worker.recovery.keep_house()
        assert list(workspace.iterdir()) == [young]

    async def test_files_of_jobs_that_ended_without_completing_are_removed(
        self, worker: Worker, settings: Settings
    ) -> None:
        await worker.recovery.heartbeat()
        failed, cancelled, running = [await worker.claim() for _ in range(3)]
        await worker.repository.fail(failed.lease, error_code="x", error_message="y")
        await worker.repository.cancel(cancelled.job.id)
        ended = [claim.job.id for claim in (failed, cancelled)]
        stay = [running.job.id, uuid4(), "readme"]
        for job_id in (*ended, *stay):
            for name in (f"{job_id}.png", f"{job_id}-1.png"):
                (settings.media_directory / name).touch()
            (settings.metadata_directory / f"{job_id}.json").touch()
        await worker.recovery.remove_strays()
        left = {path.name for path in settings.media_directory.glob("[!.]*")}
        assert left == {f"{job_id}{end}" for job_id in stay for end in (".png", "-1.png")}
        left = {path.name for path in settings.metadata_directory.glob("[!.]*")}
        assert left == {f"{job_id}.json" for job_id in stay}

    async def test_one_that_cannot_be_removed_keeps_no_other(
        self, worker: Worker, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await worker.recovery.heartbeat()
        claim = await worker.claim()
        await worker.repository.cancel(claim.job.id)
        stuck = settings.media_directory / f"{claim.job.id}.png"
        stuck.touch()
        (settings.media_directory / f"{claim.job.id}-1.png").touch()
        (settings.metadata_directory / f"{claim.job.id}.json").touch()
        unlink = Path.unlink

        def denied(path: Path, *args: Any) -> None:
            if path == stuck:
                raise PermissionError
            unlink(path, *args)

        monkeypatch.setattr(Path, "unlink", denied)
        with pytest.raises(StorageError):
            await worker.recovery.remove_strays()
        assert list(settings.media_directory.glob("[!.]*")) == [stuck]
        assert list(settings.metadata_directory.glob("[!.]*")) == []

    async def test_only_the_eldest_living_worker_looks_at_every_file(
        self, worker: Worker, settings: Settings
    ) -> None:
        claim = await worker.claim()
        await worker.repository.cancel(claim.job.id)
        stray = settings.media_directory / f"{claim.job.id}.png"
        stray.touch()
        await worker.repository.heartbeat(uuid4(), "an elder one", 1, 60)
        await worker.recovery.heartbeat()
        await worker.recovery.remove_strays()
        assert stray.exists()

    def test_long_is_well_before_the_provider_deletes_it(self) -> None:
        assert recovery.AT_RISK_SECONDS <= 1800  # of 3600

    async def test_an_output_that_waits_long_is_reported(
        self,
        worker: Worker,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        logged = CapturingLogger()
        monkeypatch.setattr(recovery, "log", logged)
        monkeypatch.setattr(recovery, "AT_RISK_SECONDS", 0)
        claim = await worker.claim()
        attempt = await worker.repository.begin_attempt(claim.lease, "replicate", REQUEST)
        await worker.recovery.keep_house()
        assert logged.calls == []
        prediction = await worker.provider.create(REQUEST)
        await worker.repository.record_prediction(claim.lease, attempt.id, prediction)
        # The storage that fails is what puts it at risk.
        monkeypatch.setattr(recovery, "remove_leftovers", AsyncMock(side_effect=StorageError))
        with pytest.raises(StorageError):
            await worker.recovery.keep_house()
        [call] = logged.calls
        assert (call.method_name, call.args) == ("error", ("output_at_risk",))
        assert call.kwargs["job_id"] == str(claim.job.id)


DUTIES = {
    "recovery": (
        "heartbeat",
        "check_leases",
        "sweep",
        "keep_house",
        "enforce_retention",
        "remove_strays",
    ),
    "redelivery": ("ring_due", "begin_unrung", "resume_unheard", "begin_again"),
    "orphans": ("stop_lost_orphans", "stop_orphans"),
}


async def test_every_duty_is_done_from_the_start(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[AsyncMock] = []
    recovery = worker.recovery
    rooms = {"recovery": recovery, "redelivery": recovery.redelivery, "orphans": recovery.orphans}
    for room, names in DUTIES.items():
        for name in names:
            done.append(duty := AsyncMock())
            monkeypatch.setattr(rooms[room], name, duty)
    duties = asyncio.create_task(recovery.run())
    async with asyncio.timeout(5):
        while not all(duty.called for duty in done):
            await asyncio.sleep(0.02)
    duties.cancel()


async def test_the_duties_survive_failures(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = []

    async def failing() -> None:
        failures.append(True)
        raise ConnectionRefusedError

    monkeypatch.setattr(worker.repository, "finish_cancels", failing)
    duties = asyncio.create_task(worker.recovery.run())
    async with asyncio.timeout(5):
        while len(failures) < 2 or not (await worker.repository.stats(30)).workers:
            await asyncio.sleep(0.02)
    assert not duties.done()
    duties.cancel()
