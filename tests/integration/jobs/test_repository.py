"""The guarded transitions, raced against each other on real PostgreSQL."""

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import event

from app.errors import LeaseLost
from app.jobs.models import Charged, Job, JobPhase, JobStatus, Output
from app.jobs.repository import Claim, JobRepository, NewJob, client, ledger, statements
from app.jobs.settlement import Settlement
from app.providers.base import Prediction, PredictionRequest
from scripts.servers import Postgres

REQUEST = PredictionRequest("a/b", {"prompt": "p", "seed": 1}, 60)
WORKER = uuid4()


async def add(repository: JobRepository, deadline_seconds: float = 60) -> UUID:
    return (await repository.add(NewJob("p", "a/b", {"n": 1}), deadline_seconds)).id


async def claimed(repository: JobRepository, worker_id: UUID = WORKER) -> Claim:
    await repository.heartbeat(worker_id, "test", 1, 60)
    claim = await repository.claim(await add(repository), worker_id, 60)
    assert claim is not None
    return claim


async def reload(repository: JobRepository, job_id: UUID) -> Job:
    job = await repository.get(job_id)
    assert job is not None
    return job


def prediction(prediction_id: str = "p1", status: str = "succeeded") -> Prediction:
    return Prediction(prediction_id, status, "a/b", REQUEST.input)


def output(job_id: UUID) -> Output:
    return Output(
        job_id=job_id,
        index=0,
        name=f"{job_id}.png",
        media_type="image/png",
        size_bytes=1,
        sha256="0" * 64,
    )


async def complete(repository: JobRepository, claim: Claim) -> None:
    attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
    made = prediction(str(uuid4()))
    await repository.record_prediction(claim.lease, attempt.id, made)
    settlement = Settlement(attempt.id, made.id, "succeeded", Charged.YES, predict_time_seconds=1.5)
    await repository.complete(claim.lease, [output(claim.job.id)], settlement)


class TestClaim:
    async def test_one_of_many_racing_workers_wins(self, repository: JobRepository) -> None:
        ids = [await add(repository) for _ in range(10)]
        claims = await asyncio.gather(
            *(repository.claim(job_id, uuid4(), 60) for job_id in ids for _ in range(5))
        )
        assert sorted(c.job.id for c in claims if c) == ids

    async def test_sets_state_owner_and_start(self, repository: JobRepository) -> None:
        claim = await claimed(repository)
        job = await reload(repository, claim.job.id)
        assert (job.status, job.worker_id) == (JobStatus.PROCESSING, WORKER)
        assert job.started_at is not None
        assert claim.attempt is None

    async def test_an_unknown_job_is_not_claimed(self, repository: JobRepository) -> None:
        assert await repository.claim(uuid4(), WORKER, 60) is None

    async def test_a_retry_is_not_claimed_before_it_is_due(self, repository: JobRepository) -> None:
        claim = await claimed(repository)
        await repository.retry_later(
            claim.lease, delay_seconds=60, error_code="x", error_message="y", retries=1
        )
        assert await repository.claim(claim.job.id, WORKER, 60) is None
        job = await reload(repository, claim.job.id)
        assert (job.status, job.retry_count, job.error_code) == (JobStatus.PENDING, 1, "x")
        assert job.next_attempt_at is not None
        assert job.next_attempt_at > datetime.now(UTC)

    async def test_the_next_owner_gets_the_open_attempt(self, repository: JobRepository) -> None:
        first = await claimed(repository)
        attempt = await repository.begin_attempt(first.lease, "mock", REQUEST)
        await repository.release(first.lease)
        second = await repository.claim(first.job.id, uuid4(), 60)
        assert second is not None
        assert second.attempt is not None
        assert second.attempt.id == attempt.id
        assert second.attempt.input == REQUEST.input
        assert 0 <= second.attempt_age_seconds < 10


class TestBacklog:
    async def test_a_sweep_reads_no_job_that_it_has_nothing_to_do_with(
        self, repository: JobRepository, database: Postgres
    ) -> None:
        """It looks every second, in every worker, however many jobs wait."""
        with psycopg.connect(database.sync_url, autocommit=True) as connection:
            connection.execute(WAITING_JOBS)
            connection.execute("ANALYZE jobs")
        engine = repository._statements.kw["bind"].sync_engine
        asked: list[tuple[str, Any]] = []

        def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
            asked.append((statement, parameters))

        event.listen(engine, "before_cursor_execute", note)
        await repository.finish_cancels()
        await repository.expire(10)
        await repository.fail_poisoned(10)
        await repository.release_dead(10)
        await repository.unheard(10, 10)
        await repository.unheard(10, 10, paid=False)
        event.remove(engine, "before_cursor_execute", note)
        assert len(asked) >= 7
        async with repository._statements() as session:
            connection_ = await session.connection()
            for statement, parameters in asked:
                explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
                plan = (await connection_.exec_driver_sql(explain, parameters)).scalar_one()
                assert _dropped_rows(plan[0]["Plan"]) < 100, statement


WAITING_JOBS = """
    INSERT INTO jobs (id, prompt, model_name, parameters, status, deadline_at, ring_at,
                      retry_count, throttle_count, crash_count)
    SELECT gen_random_uuid(), 'p', 'm', '{}', 'pending', now() + interval '1 h',
           now() - interval '1 min', 0, 0, 0
    FROM generate_series(1, 20000)
"""


def _dropped_rows(plan: dict[str, Any]) -> int:
    """Return how many rows were read and found to be of no interest."""
    parts = plan.get("Plans", [])
    own = plan.get("Rows Removed by Filter", 0) * plan.get("Actual Loops", 1)
    return int(own) + sum(map(_dropped_rows, parts))


class TestLease:
    async def test_a_replaced_lease_changes_nothing(self, repository: JobRepository) -> None:
        old = await claimed(repository)
        attempt = await repository.begin_attempt(old.lease, "mock", REQUEST)
        await repository.release(old.lease)
        new = await repository.claim(old.job.id, uuid4(), 60)
        assert new is not None
        before = (await reload(repository, old.job.id)).model_dump()
        settlement = Settlement(attempt.id, "p1", "succeeded", Charged.YES)
        for late_write in (
            repository.begin_attempt(old.lease, "mock", REQUEST),
            repository.record_prediction(old.lease, attempt.id, prediction()),
            repository.begin_storing(old.lease),
            repository.complete(old.lease, [output(old.job.id)], settlement),
            repository.fail(old.lease, error_code="x", error_message="y"),
            repository.retry_later(old.lease, delay_seconds=0, error_code="x", error_message="y"),
        ):
            with pytest.raises(LeaseLost):
                await late_write
        assert not await repository.may_still_submit(old.lease, attempt.id)
        assert (await reload(repository, old.job.id)).model_dump() == before
        assert await repository.outputs([old.job.id]) == {}

    async def test_completion_is_written_whole(self, repository: JobRepository) -> None:
        claim = await claimed(repository)
        await complete(repository, claim)
        job = await reload(repository, claim.job.id)
        assert job.status is JobStatus.COMPLETED
        assert job.completed_at is not None
        assert job.worker_id is None
        stored = (await repository.outputs([job.id]))[job.id]
        assert [found.name for found in stored] == [f"{job.id}.png"]
        assert await repository.take_orphans(10) == []


class TestPredictionIds:
    async def test_a_prediction_is_not_shared(self, repository: JobRepository) -> None:
        first, second = await claimed(repository), await claimed(repository)
        for claim, kept in ((first, True), (second, False)):
            attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
            assert await repository.record_prediction(claim.lease, attempt.id, prediction()) is kept
        assert (await reload(repository, second.job.id)).external_job_id is None

    async def test_the_id_is_kept_although_a_cancel_came_first(
        self, repository: JobRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        claim = await claimed(repository)
        attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
        await repository.cancel(claim.job.id)
        cancelled = await repository.cancel(claim.job.id)
        assert cancelled is not None
        assert cancelled.status is JobStatus.CANCELLED
        with pytest.raises(LeaseLost):
            await repository.record_prediction(claim.lease, attempt.id, prediction())
        [orphan] = await repository.take_orphans(10)
        assert orphan.attempt.prediction_id == "p1"

    async def test_an_orphan_is_left_to_whoever_took_it_for_a_while(
        self, repository: JobRepository
    ) -> None:
        claim = await claimed(repository)
        attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
        await repository.record_prediction(claim.lease, attempt.id, prediction())
        await repository.cancel(claim.job.id)
        taken = await asyncio.gather(*(repository.take_orphans(10) for _ in range(5)))
        assert sorted(map(len, taken)) == [0, 0, 0, 0, 1]

    async def test_an_orphan_that_was_not_stopped_comes_again(
        self, repository: JobRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ledger, "STOP_AGAIN_SECONDS", 0)
        claim = await claimed(repository)
        attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
        await repository.record_prediction(claim.lease, attempt.id, prediction())
        await repository.cancel(claim.job.id)
        for _ in range(2):
            [orphan] = await repository.take_orphans(10)
            assert orphan.attempt.id == attempt.id
            assert 0 <= orphan.age_seconds < 60

    async def test_an_attempt_that_got_a_prediction_meanwhile_is_not_settled_as_absent(
        self, repository: JobRepository
    ) -> None:
        """The provider's report comes while a worker concludes that there is no prediction."""
        claim = await claimed(repository)
        attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
        assert await repository.adopt(attempt.id, prediction("paid"))
        absent = Settlement(attempt.id, None, "absent", Charged.NO)
        with pytest.raises(LeaseLost):
            await repository.retry_later(
                claim.lease, delay_seconds=0, error_code="x", error_message="y", settlement=absent
            )
        with pytest.raises(LeaseLost):
            await repository.fail(claim.lease, error_code="x", error_message="y", settlement=absent)
        job = await reload(repository, claim.job.id)
        assert (job.status, job.external_job_id) == (JobStatus.PROCESSING, "paid")
        [kept] = await repository.attempts(job.id)
        assert (kept.state, kept.prediction_id) == ("submitted", "paid")

    async def test_an_attempt_never_gets_a_second_prediction(
        self, repository: JobRepository
    ) -> None:
        claim = await claimed(repository)
        attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
        assert await repository.adopt(attempt.id, prediction("reported"))
        lease = claim.lease
        assert not await repository.record_prediction(lease, attempt.id, prediction("found"))
        assert await repository.record_prediction(lease, attempt.id, prediction("reported"))
        assert not await repository.adopt(attempt.id, prediction("found"))
        assert (await reload(repository, claim.job.id)).external_job_id == "reported"
        known = [await repository.is_known("mock", name) for name in ("reported", "found")]
        assert known == [True, False]


class TestCancel:
    async def test_a_pending_job_is_cancelled_at_once(self, repository: JobRepository) -> None:
        job_id = await add(repository)
        job = await repository.cancel(job_id)
        assert job is not None
        assert job.status is JobStatus.CANCELLED
        assert await repository.claim(job_id, WORKER, 60) is None

    async def test_no_create_begins_after_it_was_asked_for(self, repository: JobRepository) -> None:
        claim = await claimed(repository)
        attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
        job = await repository.cancel(claim.job.id)
        assert job is not None
        assert (job.status, job.phase) == (JobStatus.PROCESSING, JobPhase.SUBMITTING)
        assert job.cancel_requested_at is not None
        assert not await repository.may_still_submit(claim.lease, attempt.id)

    async def test_a_waiting_job_is_cancelled_at_once_and_sticks(
        self, repository: JobRepository
    ) -> None:
        claim = await claimed(repository)
        attempt = await repository.begin_attempt(claim.lease, "mock", REQUEST)
        await repository.record_prediction(claim.lease, attempt.id, prediction())
        job = await repository.cancel(claim.job.id)
        assert job is not None
        assert job.status is JobStatus.CANCELLED
        with pytest.raises(LeaseLost):
            await repository.complete(
                claim.lease,
                [output(job.id)],
                Settlement(attempt.id, "p1", "succeeded", Charged.YES),
            )
        assert (await reload(repository, job.id)).status is JobStatus.CANCELLED

    async def test_the_sweep_finishes_a_forgotten_cancel(
        self, repository: JobRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claim = await claimed(repository)
        await repository.begin_attempt(claim.lease, "mock", REQUEST)
        await repository.cancel(claim.job.id)
        await repository.finish_cancels()
        assert (await reload(repository, claim.job.id)).status is JobStatus.PROCESSING
        monkeypatch.setattr(statements, "SUBMIT_WINDOW_SECONDS", 0)
        await repository.finish_cancels()
        assert (await reload(repository, claim.job.id)).status is JobStatus.CANCELLED

    async def test_racing_with_completion_one_wins(self, repository: JobRepository) -> None:
        for _ in range(20):
            claim = await claimed(repository)
            results = await asyncio.gather(
                complete(repository, claim),
                repository.cancel(claim.job.id),
                return_exceptions=True,
            )
            job = await reload(repository, claim.job.id)
            lost = isinstance(results[0], LeaseLost)
            asked = job.cancel_requested_at is not None
            assert lost == asked
            assert (job.status is JobStatus.COMPLETED) == (not asked)


class TestSweep:
    async def test_fresh_jobs_are_left_to_the_api(self, repository: JobRepository) -> None:
        await add(repository)
        assert await repository.due(10) == []

    async def test_a_due_job_is_rung_once_by_many_sweeps(
        self, repository: JobRepository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "FIRST_RING_SECONDS", -1)
        ids = [await add(repository) for _ in range(20)]
        rounds = await asyncio.gather(*(repository.due(20) for _ in range(5)))
        assert sorted(job_id for due in rounds for job_id in due) == ids

    @pytest.mark.parametrize(
        ("age_seconds", "ring_in_seconds", "is_unheard"),
        [
            (1, 4, False),  # the API has rung
            (9, 11, False),  # the sweep has, 4 s ago
            (12, 8, False),
            (16, 4, True),  # 11 s ago
            (100, 14, False),  # once more, just now
            (100, 4, True),
            (100, -1, False),  # it is about to
            (100, -11, True),  # there is nobody to ring
        ],
    )
    async def test_a_new_job_is_unheard_when_its_ring_was_long_ago(
        self,
        repository: JobRepository,
        database: Postgres,
        age_seconds: float,
        ring_in_seconds: float,
        is_unheard: bool,
    ) -> None:
        job_id = await add(repository)
        with psycopg.connect(database.sync_url, autocommit=True) as connection:
            connection.execute(
                "UPDATE jobs SET created_at = now() - %s * interval '1 s',"
                " ring_at = now() + %s * interval '1 s'",
                [age_seconds, ring_in_seconds],
            )
        assert await repository.unheard_new(10, 5) == ([job_id] if is_unheard else [])
        assert await repository.unheard_new(10, 5) == []  # others leave it alone
        assert await repository.unheard(10, 5) == []
        assert await repository.unheard(10, 5, paid=False) == []

    async def test_jobs_of_a_silent_worker_are_freed(self, repository: JobRepository) -> None:
        alive, silent = await claimed(repository), await claimed(repository, uuid4())
        assert await repository.release_dead(60) == []
        await asyncio.sleep(2.1)
        await repository.heartbeat(WORKER, "test", 1, 60)
        assert await repository.release_dead(2) == [silent.job.id]
        assert (await reload(repository, alive.job.id)).worker_id == WORKER
        freed = await reload(repository, silent.job.id)
        assert (freed.status, freed.worker_id) == (JobStatus.PROCESSING, None)
        assert await repository.due(10) == [silent.job.id]

    async def test_a_job_of_a_worker_without_a_row_is_freed(
        self, repository: JobRepository
    ) -> None:
        job_id = await add(repository)
        await repository.claim(job_id, uuid4(), 60)
        assert await repository.release_dead(60) == [job_id]

    async def test_a_job_that_nobody_begins_in_time_fails(self, repository: JobRepository) -> None:
        late, early = await add(repository, -1), await add(repository)
        assert await repository.expire(10) == {late: "queue_deadline_exceeded"}
        job = await reload(repository, late)
        assert (job.status, job.error_code) == (JobStatus.FAILED, "queue_deadline_exceeded")
        assert (await reload(repository, early)).status is JobStatus.PENDING

    async def test_a_begun_job_has_a_deadline_of_its_own(
        self, repository: JobRepository, database: Postgres
    ) -> None:
        late, early = await add(repository), await add(repository, 30)
        for job_id, seconds in ((late, -1), (early, 60)):
            assert await repository.claim(job_id, WORKER, seconds)
        with psycopg.connect(database.sync_url, autocommit=True) as connection:  # 30 s later
            connection.execute("UPDATE jobs SET deadline_at = deadline_at - interval '30 s'")
        assert await repository.expire(10) == {late: "deadline_exceeded"}
        assert (await reload(repository, late)).error_code == "deadline_exceeded"

    async def test_what_is_late_is_not_begun(self, repository: JobRepository) -> None:
        assert await repository.claim(await add(repository, -1), WORKER, 60) is None
        claim = await repository.claim(await add(repository), WORKER, 0)
        assert claim is not None
        with pytest.raises(LeaseLost):
            await repository.begin_attempt(claim.lease, "replicate", REQUEST)
        assert await repository.attempts(claim.job.id) == []
        assert len(await repository.expire(10)) == 2

    async def test_of_many_each_is_told_which_deadline(self, repository: JobRepository) -> None:
        begun, *queued = [await add(repository, -1 if n else 60) for n in range(3)]
        assert await repository.claim(begun, WORKER, -1)
        ended = {**await repository.expire(1), **await repository.expire(1)}
        late = "queue_deadline_exceeded"
        assert ended == {begun: "deadline_exceeded", queued[0]: late, queued[1]: late}

    async def test_what_another_looks_at_is_left_for_later(
        self, repository: JobRepository, postgres: Postgres
    ) -> None:
        held, free = [await claimed(repository, uuid4()) for _ in range(2)]
        with psycopg.connect(postgres.sync_url) as other:
            other.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", [held.job.id])
            async with asyncio.timeout(2):
                assert await repository.release_dead(0) == [free.job.id]
        with psycopg.connect(postgres.sync_url) as other:
            assert await repository.release_dead(0) == [held.job.id]
            other.execute("SELECT FROM jobs WHERE id = %s FOR UPDATE", [held.job.id])
            async with asyncio.timeout(2):
                assert await repository.due(10) == [free.job.id]

    async def test_hand_back_frees_all_and_forgets_the_worker(
        self, repository: JobRepository
    ) -> None:
        mine = [await claimed(repository) for _ in range(3)]
        other = await claimed(repository, uuid4())
        handed_back = await repository.hand_back(WORKER)
        assert sorted(handed_back) == [claim.job.id for claim in mine]
        assert (await reload(repository, other.job.id)).worker_id is not None
        assert (await repository.stats(60)).workers == 1


class TestAbsent:
    """An attempt that was called absent, and of which the provider reports after all."""

    async def absent(self, repository: JobRepository) -> Claim:
        claim = await claimed(repository)
        attempt = await repository.begin_attempt(claim.lease, "replicate", REQUEST)
        await repository.retry_later(
            claim.lease,
            delay_seconds=0,
            error_code="create_lost",
            error_message="",
            settlement=Settlement(attempt.id, None, "absent", Charged.NO),
        )
        claim.attempt = attempt
        return claim

    async def test_the_next_owner_goes_on_with_it(self, repository: JobRepository) -> None:
        absent = await self.absent(repository)
        assert absent.attempt is not None
        assert await repository.adopt(absent.attempt.id, prediction())
        claim = await repository.claim(absent.job.id, WORKER, 60)
        assert claim is not None
        assert claim.attempt is not None
        assert (claim.attempt.id, claim.attempt.prediction_id) == (absent.attempt.id, "p1")
        assert (claim.attempt.outcome, claim.attempt.charged) == (None, Charged.UNKNOWN)

    async def test_of_a_job_that_is_over_it_is_stopped(self, repository: JobRepository) -> None:
        absent = await self.absent(repository)
        assert absent.attempt is not None
        await repository.cancel(absent.job.id)
        assert await repository.take_orphans(10) == []
        assert await repository.adopt(absent.attempt.id, prediction())
        [orphan] = await repository.take_orphans(10)
        assert orphan.attempt.prediction_id == "p1"

    async def test_not_beside_another_open_one(self, repository: JobRepository) -> None:
        absent = await self.absent(repository)
        assert absent.attempt is not None
        claim = await repository.claim(absent.job.id, WORKER, 60)
        assert claim is not None
        again = await repository.begin_attempt(claim.lease, "replicate", REQUEST)
        assert not await repository.adopt(absent.attempt.id, prediction())
        assert await repository.adopt(again.id, prediction("p2"))


class TestPoison:
    async def crash(self, repository: JobRepository, job_id: UUID, *, decoding: bool) -> None:
        claim = await repository.claim(job_id, uuid4(), 60)
        assert claim is not None
        await repository.begin_storing(claim.lease)
        await repository.begin_decoding(claim.lease, claim.job.crash_count + 1)
        if not decoding:
            await repository.end_decoding(claim.lease, claim.job.crash_count)
        await repository.release_dead(60)

    async def test_a_job_that_crashes_its_worker_each_time_fails(
        self, repository: JobRepository
    ) -> None:
        job_id = await add(repository)
        for crashes in range(3):
            assert await repository.fail_poisoned(10) == [], crashes
            await self.crash(repository, job_id, decoding=True)
        assert await repository.claim(job_id, uuid4(), 60) is None
        assert await repository.fail_poisoned(10) == [job_id]
        assert (await reload(repository, job_id)).error_code == "poisoned"

    async def test_jobs_that_were_not_decoded_just_then_are_unharmed(
        self, repository: JobRepository
    ) -> None:
        job_id = await add(repository)
        for _ in range(5):
            await self.crash(repository, job_id, decoding=False)
        assert await repository.fail_poisoned(10) == []

    async def test_one_that_is_counted_twice_is_one(self, repository: JobRepository) -> None:
        """As when the answer to the commit is lost."""
        claim = await claimed(repository)
        for _ in range(2):
            await repository.begin_decoding(claim.lease, 1)
        assert (await reload(repository, claim.job.id)).crash_count == 1
        for _ in range(2):
            await repository.end_decoding(claim.lease, 0)
        assert (await reload(repository, claim.job.id)).crash_count == 0

    async def test_a_hand_back_is_no_crash(self, repository: JobRepository) -> None:
        claim = await claimed(repository)
        await repository.begin_storing(claim.lease)
        await repository.hand_back(WORKER)
        assert (await reload(repository, claim.job.id)).crash_count == 0


class TestStats:
    async def test_counts_ages_and_workers(self, repository: JobRepository) -> None:
        await add(repository)
        await complete(repository, await claimed(repository))
        stats = await repository.stats(60)
        assert stats.jobs_by_status == {
            "pending": 1,
            "processing": 0,
            "completed": 1,
            "failed": 0,
            "cancelled": 0,
        }
        assert 0 < stats.oldest_pending_age_seconds < 10
        assert (stats.workers, stats.worker_slots) == (1, 1)
