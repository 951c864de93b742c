"""The owner's side: a run claims its job, and takes it from state to state under its lease."""

from collections.abc import Sequence
from uuid import UUID, uuid4

from sqlalchemy import Update, case, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from app.errors import LeaseLost
from app.jobs.models import Attempt, AttemptState, Job, JobPhase, JobStatus, Output
from app.jobs.repository.records import Claim, Lease
from app.jobs.repository.statements import (
    IS_OPEN,
    MAX_CRASHES,
    UNFINISHED,
    Repository,
    age_seconds,
    attempts,
    ended,
    expect,
    expect_settled,
    expect_unchanged,
    give_prediction,
    guarded,
    has_prediction,
    in_seconds,
    is_due,
    jobs,
    owned,
)
from app.jobs.settlement import Settlement
from app.providers.base import Prediction, PredictionRequest


class OwnerSide(Repository):
    """What the run of a job does with it."""

    async def claim(
        self, job_id: UUID, worker_id: UUID, job_deadline_seconds: float
    ) -> Claim | None:
        """Take an unowned job that is due, or return None: somebody has it, or it is over.

        The first claim begins the job: from now on `job_deadline_seconds` count.
        """
        lease = Lease(job_id, uuid4())
        statement = _claiming(lease, worker_id, job_deadline_seconds)
        age = age_seconds(attempts.created_at)
        open_attempt = select(Attempt, age).where(attempts.job_id == job_id, IS_OPEN)
        async with self._statements() as session:
            job = await session.scalar(statement.returning(Job))
            if job is None:
                return None
            found = (await session.execute(open_attempt)).one_or_none()
            attempt, attempt_age = found or (None, 0)
            return Claim(job, lease, attempt, float(attempt_age))

    async def begin_attempt(
        self, lease: Lease, provider: str, request: PredictionRequest
    ) -> Attempt:
        """Commit the intent to create a prediction; only after this may the call be made.

        Raises: LeaseLost - also when a cancel has been asked for, or the deadline has passed.
        """
        number = select(func.count() + 1).where(attempts.job_id == lease.job_id)
        async with self._transactions.begin() as session:
            await expect(session, _submitting(lease))
            result = await session.execute(
                insert(Attempt)
                .values(
                    job_id=lease.job_id,
                    number=number.scalar_subquery(),
                    provider=provider,
                    model_name=request.model_name,
                    input=request.input,
                )
                .returning(Attempt)
            )
            return result.scalar_one()

    async def may_still_submit(self, lease: Lease, attempt_id: UUID) -> bool:
        """Tell whether the create call of a committed intent may begin now; if so, renew it.

        Asked when more than `SUBMIT_WINDOW_SECONDS` have gone by since the intent (the process
        was paused, say): by now a cancel may be confirmed or another worker in charge. Who takes
        over from now on waits as long as after a fresh intent before it calls the create lost.
        """
        intent = (
            update(Attempt)
            .where(attempts.id == attempt_id, attempts.state == AttemptState.INTENT)
            .values(created_at=func.now())
            .returning(attempts.id)
        )
        try:
            async with self._transactions.begin() as session:
                await expect(session, _submitting(lease))
                return await session.scalar(intent) is not None
        except LeaseLost:
            return False

    async def record_prediction(
        self, lease: Lease, attempt_id: UUID, prediction: Prediction
    ) -> bool:
        """Commit the id of the attempt's prediction; False if it belongs to another attempt,
        or the attempt has another prediction.

        The id is kept even when a cancel came first: the sweep needs it to stop the prediction.
        Raises: LeaseLost - the job is no longer ours, whether the id could be kept or not.
        """
        still_last_claim = (
            select(jobs.id).where(jobs.id == lease.job_id, jobs.lease_token == lease.token).exists()
        )
        # Not what is settled: it was called absent, and is for `adopt` to open again.
        is_open = attempts.state == AttemptState.INTENT
        attempt = give_prediction(attempt_id, prediction).where(is_open, still_last_claim)
        job = guarded(lease, cancelling=True).values(
            phase=JobPhase.WAITING, external_job_id=prediction.id
        )
        try:
            async with self._transactions.begin() as session:
                ours = await session.scalar(job.returning(jobs.id))
                await session.execute(attempt)
                # The provider's report may have come first, of this prediction or another.
                if ours and not await has_prediction(session, attempt_id, prediction):
                    await session.rollback()
                    return False
        except IntegrityError:
            return False
        if ours is None:
            raise LeaseLost
        return True

    async def begin_storing(self, lease: Lease) -> None:
        """Note that the prediction has ended well and its outputs are being kept.

        Raises: LeaseLost.
        """
        async with self._statements() as session:
            await expect(session, guarded(lease).values(phase=JobPhase.STORING))

    async def check_owned(self, lease: Lease) -> None:
        """Raise LeaseLost unless the job is ours and no cancel has been asked for.

        One round trip, nothing written: it is asked before each thing that others could see.
        """
        query = select(jobs.id).where(*owned(lease), jobs.cancel_requested_at.is_(None))
        async with self._statements() as session:
            if await session.scalar(query) is None:
                raise LeaseLost

    async def begin_decoding(self, lease: Lease, crash_count: int) -> None:
        """Count a crash in advance: decoding a file is what may kill the worker.

        The new count is given, not added to the old: the write may be repeated.
        Raises: LeaseLost.
        """
        async with self._statements() as session:
            await expect(session, guarded(lease).values(crash_count=crash_count))

    async def end_decoding(self, lease: Lease, crash_count: int) -> None:
        """Take back what `begin_decoding` has counted: the worker lives."""
        statement = guarded(lease, cancelling=True).values(crash_count=crash_count)
        async with self._statements() as session:
            await session.execute(statement)

    async def retry_later(
        self,
        lease: Lease,
        *,
        delay_seconds: float,
        error_code: str,
        error_message: str,
        retries: int = 0,
        throttles: int = 0,
        phase: JobPhase | None = None,
        settlement: Settlement | None = None,
    ) -> None:
        """processing -> pending, due again after the delay.

        Raises: LeaseLost.
        """
        statement = guarded(lease).values(
            status=JobStatus.PENDING,
            phase=phase,
            worker_id=None,
            next_attempt_at=in_seconds(delay_seconds),
            ring_at=in_seconds(delay_seconds),
            retry_count=jobs.retry_count + retries,
            throttle_count=jobs.throttle_count + throttles,
            error_code=error_code,
            error_message=error_message,
        )
        async with self._transactions.begin() as session:
            await expect(session, statement)
            if settlement is not None:
                await expect_settled(session, settlement)

    async def fail(
        self,
        lease: Lease,
        *,
        error_code: str,
        error_message: str,
        settlement: Settlement | None = None,
        left_open: Attempt | None = None,
    ) -> None:
        """processing -> failed, with words that the client may read.

        Without a settlement the sweep goes on with the attempt that is `left_open`.
        Raises: LeaseLost - also when an attempt has got a prediction that its owner knows nothing
        of, by the provider's report: there is something to wait for.
        """
        statement = guarded(lease).values(
            status=JobStatus.FAILED, error_code=error_code, error_message=error_message, **ended()
        )
        async with self._transactions.begin() as session:
            await expect(session, statement)
            if settlement is not None:
                await expect_settled(session, settlement)
            elif left_open is not None:
                await expect_unchanged(session, left_open)

    async def complete(
        self, lease: Lease, outputs: Sequence[Output], settlement: Settlement
    ) -> None:
        """processing -> completed, with its outputs; every file is already durable.

        Raises: LeaseLost - also when a cancel has been asked for: a late success does not revive.
        """
        statement = guarded(lease).values(
            status=JobStatus.COMPLETED, error_code=None, error_message=None, **ended()
        )
        rows = [output.model_dump() for output in outputs]
        async with self._transactions.begin() as session:
            await expect(session, statement)
            await session.execute(insert(Output), rows)
            await expect_settled(session, settlement)


def _claiming(lease: Lease, worker_id: UUID, job_deadline_seconds: float) -> Update:
    """pending, or processing without an owner -> processing, under a new token."""
    return (
        update(Job)
        .where(
            jobs.id == lease.job_id,
            jobs.status.in_(UNFINISHED),
            jobs.worker_id.is_(None),
            jobs.cancel_requested_at.is_(None),
            jobs.deadline_at > func.now(),  # what is late is not begun, nor poison tried again
            jobs.crash_count < MAX_CRASHES,
            is_due(),
        )
        .values(
            status=JobStatus.PROCESSING,
            worker_id=worker_id,
            lease_token=lease.token,
            next_attempt_at=None,
            deadline_at=case(
                (jobs.started_at.is_(None), in_seconds(job_deadline_seconds)),
                else_=jobs.deadline_at,
            ),
            started_at=func.coalesce(jobs.started_at, func.now()),
            updated_at=func.now(),
        )
    )


def _submitting(lease: Lease) -> Update:
    """What is past its deadline is not paid for any more."""
    in_time = jobs.deadline_at > func.now()
    return guarded(lease).where(in_time).values(phase=JobPhase.SUBMITTING)
