"""Every SQL statement about jobs, and every change of a job's status.

Each transition is one guarded UPDATE: it names the state it leaves and the lease token of the
claim, so whoever comes second changes nothing and learns it (`LeaseLost`). All times are the
database's.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import (
    ColumnElement,
    Select,
    Update,
    all_,
    and_,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlmodel import SQLModel

from app.db import Sessions, autocommitting
from app.errors import FailureClass, LeaseLost
from app.jobs.models import (
    TERMINAL_STATUSES,
    Attempt,
    AttemptState,
    Charged,
    Deletion,
    DeletionKind,
    Job,
    JobPhase,
    JobStatus,
    Output,
    Worker,
)
from app.providers.base import Prediction, PredictionRequest

# A fresh job is rung by the API at once; the sweep rings only if that was lost.
FIRST_RING_SECONDS = 5
# How long the sweep leaves a rung job alone before it rings again.
RING_AGAIN_SECONDS = 15
# A create call begins within this time of its intent (see `Lifecycle`), or not at all.
SUBMIT_WINDOW_SECONDS = 1.0

# The tables' columns, typed for SQLAlchemy's expressions.
jobs = SQLModel.metadata.tables["jobs"].c
attempts = SQLModel.metadata.tables["attempts"].c
outputs = SQLModel.metadata.tables["outputs"].c
deletions = SQLModel.metadata.tables["deletions"].c
workers = SQLModel.metadata.tables["workers"].c
counts = SQLModel.metadata.tables["job_counts"].c

MAX_CRASHES = 3
# How long an orphan is left to the worker that tries to stop it.
STOP_AGAIN_SECONDS = 5
# Longer than any transaction: a job that completed before the last one marked may be seen later.
LATE_COMMIT_SECONDS = 3600.0

UNFINISHED = (JobStatus.PENDING, JobStatus.PROCESSING)


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a client may say about a job."""

    prompt: str
    model_name: str
    parameters: Mapping[str, Any]
    request_id: str | None = None

    @property
    def fingerprint(self) -> str:
        """Return what tells this request from any other: a SHA-256 of what it asks for."""
        asked = [self.prompt, self.model_name, self.parameters]
        return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Outputs(list[Output]):
    """The outputs of one job in order, and since when their files are deleted, if they are."""

    deleted_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to change one job, until another claim replaces the token."""

    job_id: UUID
    token: UUID


@dataclass(slots=True)
class Claim:
    """A claimed job with its open attempt: one that an earlier owner left, or our own by now."""

    job: Job
    lease: Lease
    attempt: Attempt | None
    attempt_age_seconds: float


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an attempt ended, written in the same transaction as the job's next state.

    `prediction_id` is what the writer knows: should the attempt have got another one meanwhile
    (by the provider's report, say), nothing is written.
    """

    attempt_id: UUID
    prediction_id: str | None
    outcome: str
    charged: Charged
    error_class: FailureClass | None = None
    error_message: str | None = None
    predict_time_seconds: float | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Orphan:
    """An open attempt of a job that has ended, and how long ago its intent was committed.

    `given_seed` is the client's, or None.
    """

    attempt: Attempt
    age_seconds: float
    given_seed: str | None


@dataclass(frozen=True, slots=True)
class QueueStats:
    """The queue and the workers as of now; ages in seconds."""

    jobs_by_status: dict[str, int]
    oldest_pending_age_seconds: float
    workers: int
    worker_slots: int


class JobRepository:
    """The jobs, in short transactions of their own; never held across a network call.

    A statement that is a transaction by itself goes without BEGIN and COMMIT, each of which would
    be a round trip: of 31 that a job took, 9 are left out.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._transactions = sessions
        self._statements = autocommitting(sessions)

    # --- the client's side -------------------------------------------------------------------

    async def add(self, new: NewJob, queue_deadline_seconds: float) -> Job:
        """Insert one pending job and commit it; it fails unless it is begun in time."""
        statement = insert(Job).values(**_pending(new, queue_deadline_seconds)).returning(Job)
        async with self._statements() as session:
            return (await session.execute(statement)).scalar_one()

    async def add_once(
        self, new: NewJob, queue_deadline_seconds: float, idempotency_key: str
    ) -> tuple[Job, bool]:
        """Insert the job unless there is one with this key; return it, and whether it is new.

        Whoever comes second with a key waits for the first one's commit, and gets its job.
        """
        values = _pending(new, queue_deadline_seconds)
        statement = (
            upsert(Job)
            .values(**values, idempotency_key=idempotency_key, fingerprint=new.fingerprint)
            .on_conflict_do_nothing(
                index_elements=["idempotency_key"], index_where=jobs.idempotency_key.is_not(None)
            )
            .returning(Job)
        )
        async with self._statements() as session:
            job = await session.scalar(statement)
        if job is not None:
            return job, True
        first = await self.with_key(idempotency_key)
        assert first is not None  # noqa: S101 - jobs are never deleted
        return first, False

    async def with_key(self, idempotency_key: str) -> Job | None:
        """Return the job that was made with this key, or None."""
        async with self._statements() as session:
            return await session.scalar(select(Job).where(jobs.idempotency_key == idempotency_key))

    async def get(self, job_id: UUID) -> Job | None:
        """Return the job, or None."""
        async with self._statements() as session:
            return await session.get(Job, job_id)

    async def newest(
        self,
        *,
        status: JobStatus | None = None,
        limit: int,
        offset: int = 0,
        before: tuple[datetime, UUID] | None = None,
    ) -> Sequence[Job]:
        """Return a page of jobs, newest first; `before` is the last (created_at, id) seen."""
        query = select(Job).order_by(jobs.created_at.desc(), jobs.id.desc())
        if status is not None:
            query = query.where(jobs.status == status)
        if before is not None:
            key = func.row(jobs.created_at, jobs.id)
            query = query.where(key < func.row(*before))
        async with self._statements() as session:
            return (await session.scalars(query.limit(limit).offset(offset))).all()

    async def outputs(self, job_ids: Collection[UUID]) -> dict[UUID, Outputs]:
        """Return the outputs of these jobs; jobs without any are left out."""
        query = _with_deletion().where(outputs.job_id.in_(job_ids))
        found: dict[UUID, Outputs] = defaultdict(Outputs)
        async with self._statements() as session:
            rows = await session.execute(query.order_by(outputs.job_id, outputs.index))
            for output, deleted_at in rows:
                found[output.job_id].append(output)
                found[output.job_id].deleted_at = deleted_at
        return found

    async def attempts(self, job_id: UUID) -> Sequence[Attempt]:
        """Return the job's attempts in order: every create call that may have been made."""
        query = select(Attempt).where(attempts.job_id == job_id).order_by(attempts.number)
        async with self._statements() as session:
            return (await session.scalars(query)).all()

    async def attempt(self, attempt_id: UUID) -> Attempt | None:
        """Return one attempt, or None."""
        async with self._statements() as session:
            return await session.get(Attempt, attempt_id)

    async def adopt(self, attempt_id: UUID, prediction: Prediction) -> bool:
        """Note the found prediction of an attempt; tell whether the attempt has it now.

        For what was learned from outside a run: by the provider's report, or by the sweep for
        a job that has ended; the job's create is no longer under way. An attempt that was called
        absent is opened again: whoever is next goes on with it, or stops it. Not while the job has
        another open attempt.
        """
        job_id = select(attempts.job_id).where(attempts.id == attempt_id).scalar_subquery()
        job = (
            update(Job)
            .where(jobs.id == job_id, jobs.status.in_(UNFINISHED))
            .values(
                external_job_id=prediction.id,
                phase=case((jobs.status == JobStatus.PROCESSING, JobPhase.WAITING.value)),
                updated_at=func.now(),
            )
        )
        try:
            async with self._transactions.begin() as session:
                # The job before its attempt, as everywhere: or this and the run that has just got
                # its answer would wait for each other.
                await session.execute(select(jobs.id).where(jobs.id == job_id).with_for_update())
                if await session.scalar(_found(attempt_id, prediction)):
                    await session.execute(job)
                return await _has(session, attempt_id, prediction)
        except IntegrityError:  # another attempt has it
            return False

    async def is_known(self, provider: str, prediction_id: str) -> bool:
        """Tell whether the prediction belongs to any attempt."""
        query = select(attempts.id).where(
            attempts.provider == provider, attempts.prediction_id == prediction_id
        )
        async with self._statements() as session:
            return await session.scalar(query) is not None

    async def any_unknown(self, provider: str, predictions: Sequence[Prediction]) -> bool:
        """Tell whether one of the predictions belongs to no attempt."""
        ids = {prediction.id for prediction in predictions}
        query = select(func.count()).where(
            attempts.provider == provider, attempts.prediction_id.in_(ids)
        )
        async with self._statements() as session:
            return (await session.execute(query)).scalar_one() < len(ids)

    async def output_named(self, name: str) -> tuple[Output, datetime | None] | None:
        """Return the output stored under this file name, and when it was deleted; or None."""
        query = _with_deletion().where(outputs.name == name)
        async with self._statements() as session:
            found = (await session.execute(query)).one_or_none()
        return (found[0], found[1]) if found else None

    async def deleted_at(self, job_id: UUID, kind: DeletionKind) -> datetime | None:
        """Return when these files of the job were deleted, or None."""
        async with self._statements() as session:
            found = await session.get(Deletion, (job_id, kind))
        return found.deleted_at if found else None

    async def cancel(self, job_id: UUID) -> Job | None:
        """Cancel the job, or ask for it while a create call may be under way.

        Returns the job as it is afterwards, or None when there is no such job. It is
        `cancelled` at once unless it is being submitted: then `cancel_requested_at` is set,
        which stops any create that has not begun, and a call after `SUBMIT_WINDOW_SECONDS`
        (or the sweep) finishes the cancel. So no create follows a confirmed cancel.
        """
        unfinished = and_(jobs.id == job_id, jobs.status.in_(UNFINISHED))
        request = update(Job).where(unfinished).values(cancel_requested_at=_first_asked())
        async with self._transactions.begin() as session:
            job = await session.scalar(_finish_cancel(jobs.id == job_id))
            if job is None:
                job = await session.scalar(request.returning(Job))
            return job or await session.get(Job, job_id)

    async def check(self) -> None:
        """Raise unless the database answers and has the schema."""
        async with self._statements() as session:
            await session.execute(select(jobs.id).limit(1))

    async def stats(self, lease_seconds: float) -> QueueStats:
        """Return counts and ages; constant time, however many jobs there are."""
        oldest = (
            select(func.extract("epoch", func.now() - jobs.created_at))
            .where(jobs.status == JobStatus.PENDING)
            .order_by(jobs.created_at, jobs.id)
            .limit(1)
        )
        alive = select(func.count(), func.coalesce(func.sum(workers.concurrency), 0)).where(
            workers.heartbeat_at >= _in_seconds(-lease_seconds)
        )
        async with self._statements() as session:
            by_status = await _counts(session)
            age = await session.scalar(oldest)
            alive_count, slots = (await session.execute(alive)).one()
        return QueueStats(by_status, float(age or 0), alive_count, slots)

    async def count(self, status: JobStatus | None) -> int:
        """Return how many jobs there are (of this status), from the trigger's counters."""
        async with self._statements() as session:
            by_status = await _counts(session)
        return by_status[status] if status else sum(by_status.values())

    # --- the owner's side --------------------------------------------------------------------

    async def claim(
        self, job_id: UUID, worker_id: UUID, job_deadline_seconds: float
    ) -> Claim | None:
        """Take an unowned job that is due, or return None: somebody has it, or it is over.

        The first claim begins the job: from now on `job_deadline_seconds` count.
        """
        token = uuid4()
        statement = (
            update(Job)
            .where(
                jobs.id == job_id,
                jobs.status.in_(UNFINISHED),
                jobs.worker_id.is_(None),
                jobs.cancel_requested_at.is_(None),
                jobs.deadline_at > func.now(),  # what is late is not begun, nor poison tried again
                jobs.crash_count < MAX_CRASHES,
                or_(jobs.next_attempt_at.is_(None), jobs.next_attempt_at <= func.now()),
            )
            .values(
                status=JobStatus.PROCESSING,
                worker_id=worker_id,
                lease_token=token,
                next_attempt_at=None,
                deadline_at=case(
                    (jobs.started_at.is_(None), _in_seconds(job_deadline_seconds)),
                    else_=jobs.deadline_at,
                ),
                started_at=func.coalesce(jobs.started_at, func.now()),
                updated_at=func.now(),
            )
            .returning(Job)
        )
        age = func.extract("epoch", func.now() - attempts.created_at)
        open_attempt = select(Attempt, age).where(
            attempts.job_id == job_id, attempts.state != AttemptState.SETTLED
        )
        async with self._statements() as session:
            job = await session.scalar(statement)
            if job is None:
                return None
            found = (await session.execute(open_attempt)).one_or_none()
            attempt, age_seconds = found or (None, 0)
            return Claim(job, Lease(job_id, token), attempt, float(age_seconds))

    async def begin_attempt(
        self, lease: Lease, provider: str, request: PredictionRequest
    ) -> Attempt:
        """Commit the intent to create a prediction; only after this may the call be made.

        Raises: LeaseLost - also when a cancel has been asked for, or the deadline has passed.
        """
        number = select(func.count() + 1).where(attempts.job_id == lease.job_id)
        async with self._transactions.begin() as session:
            await _expect(session, _submitting(lease))
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
                await _expect(session, _submitting(lease))
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
        attempt = _found(attempt_id, prediction).where(is_open, still_last_claim)
        job = _guarded(lease, cancelling=True).values(
            phase=JobPhase.WAITING, external_job_id=prediction.id
        )
        try:
            async with self._transactions.begin() as session:
                ours = await session.scalar(job.returning(jobs.id))
                await session.execute(attempt)
                # The provider's report may have come first, of this prediction or another.
                if ours and not await _has(session, attempt_id, prediction):
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
            await _expect(session, _guarded(lease).values(phase=JobPhase.STORING))

    async def check_owned(self, lease: Lease) -> None:
        """Raise LeaseLost unless the job is ours and no cancel has been asked for.

        One round trip, nothing written: it is asked before each thing that others could see.
        """
        query = select(jobs.id).where(*_owned(lease), jobs.cancel_requested_at.is_(None))
        async with self._statements() as session:
            if await session.scalar(query) is None:
                raise LeaseLost

    async def begin_decoding(self, lease: Lease, crash_count: int) -> None:
        """Count a crash in advance: decoding a file is what may kill the worker.

        The new count is given, not added to the old: the write may be repeated.
        Raises: LeaseLost.
        """
        async with self._statements() as session:
            await _expect(session, _guarded(lease).values(crash_count=crash_count))

    async def end_decoding(self, lease: Lease, crash_count: int) -> None:
        """Take back what `begin_decoding` has counted: the worker lives."""
        statement = _guarded(lease, cancelling=True).values(crash_count=crash_count)
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
        statement = _guarded(lease).values(
            status=JobStatus.PENDING,
            phase=phase,
            worker_id=None,
            next_attempt_at=_in_seconds(delay_seconds),
            ring_at=_in_seconds(delay_seconds),
            retry_count=jobs.retry_count + retries,
            throttle_count=jobs.throttle_count + throttles,
            error_code=error_code,
            error_message=error_message,
        )
        await self._finish(statement, settlement)

    async def fail(
        self,
        lease: Lease,
        *,
        error_code: str,
        error_message: str,
        settlement: Settlement | None = None,
    ) -> None:
        """processing -> failed, with words that the client may read.

        Raises: LeaseLost.
        """
        statement = _guarded(lease).values(
            status=JobStatus.FAILED, error_code=error_code, error_message=error_message, **_ended()
        )
        await self._finish(statement, settlement)

    async def complete(
        self, lease: Lease, outputs: Sequence[Output], settlement: Settlement
    ) -> None:
        """processing -> completed, with its outputs; every file is already durable.

        Raises: LeaseLost - also when a cancel has been asked for: a late success does not revive.
        """
        statement = _guarded(lease).values(
            status=JobStatus.COMPLETED, error_code=None, error_message=None, **_ended()
        )
        rows = [output.model_dump() for output in outputs]
        async with self._transactions.begin() as session:
            await _expect(session, statement)
            await session.execute(insert(Output), rows)
            await _expect_settled(session, settlement)

    async def _finish(self, statement: Update, settlement: Settlement | None) -> None:
        async with self._transactions.begin() as session:
            await _expect(session, statement)
            if settlement is not None:
                await _expect_settled(session, settlement)

    # --- every worker's side: heartbeat and sweep ----------------------------------------------

    async def heartbeat(
        self, worker_id: UUID, name: str, concurrency: int, lease_seconds: float
    ) -> int:
        """Say that this worker lives; return how many do."""
        statement = (
            upsert(Worker)
            .values(id=worker_id, name=name, concurrency=concurrency)
            .on_conflict_do_update(index_elements=["id"], set_={"heartbeat_at": func.now()})
        )
        alive = select(func.count()).where(workers.heartbeat_at >= _in_seconds(-lease_seconds))
        async with self._statements() as session:
            await session.execute(statement)
            return (await session.execute(alive)).scalar_one()

    async def leases_of(self, worker_id: UUID) -> dict[UUID, UUID]:
        """Return the token of every job this worker still owns."""
        query = select(jobs.id, jobs.lease_token).where(
            jobs.worker_id == worker_id, jobs.status == JobStatus.PROCESSING
        )
        async with self._statements() as session:
            return {job_id: token for job_id, token in await session.execute(query) if token}

    async def release(self, lease: Lease) -> None:
        """Give up one job; the sweep rings for it."""
        condition = and_(jobs.id == lease.job_id, jobs.lease_token == lease.token)
        async with self._statements() as session:
            await session.execute(_release(condition))

    async def hand_back(self, worker_id: UUID) -> Sequence[UUID]:
        """Give up every job of a worker that is stopping; return their ids, to ring for."""
        async with self._transactions.begin() as session:
            ids = await session.scalars(_release(jobs.worker_id == worker_id))
            await session.execute(delete(Worker).where(workers.id == worker_id))
            return ids.all()

    async def release_dead(self, lease_seconds: float) -> Sequence[UUID]:
        """Free the jobs of workers that have been silent for longer than their lease."""
        fresh = workers.heartbeat_at >= _in_seconds(-lease_seconds)
        # An array, read once: a NOT EXISTS would be asked again, of nobody, for a row that a
        # living worker has claimed just now, and take it away (EvalPlanQual, PostgreSQL's
        # "Read Committed Isolation Level").
        living = select(workers.id).where(fresh).scalar_subquery()
        owner_is_silent = jobs.worker_id != all_(func.array(living))
        found = (
            select(jobs.id)
            .where(jobs.status == JobStatus.PROCESSING, owner_is_silent)
            .with_for_update(skip_locked=True)
        )
        gone = workers.heartbeat_at < _in_seconds(-10 * lease_seconds)
        async with self._statements() as session:
            ids = await session.scalars(_release(and_(jobs.id.in_(found), owner_is_silent)))
            await session.execute(delete(Worker).where(gone))
            return ids.all()

    async def due(self, limit: int) -> Sequence[UUID]:
        """Return unowned jobs whose doorbell should ring now; each is left alone for a while."""
        return await self._take_due(jobs.ring_at <= func.now(), limit)

    async def unheard(
        self, patience_seconds: float, limit: int, *, paid: bool = True
    ) -> Sequence[UUID]:
        """Return due jobs that have begun and that nobody claimed so long after their ring.

        Either those with an open attempt, or the others: retries, and those that lost their worker
        before it. Their message waits behind others, or is lost. Each is left alone for a while.
        """
        is_due = or_(jobs.next_attempt_at.is_(None), jobs.next_attempt_at <= func.now())
        has_attempt = select(attempts.id).where(
            attempts.job_id == jobs.id, attempts.state != AttemptState.SETTLED
        )
        kind = has_attempt.exists() if paid else ~has_attempt.exists()
        begun = jobs.started_at.is_not(None)
        is_unheard = _was_to_be_rung(patience_seconds)
        return await self._take_due(and_(is_due, begun, is_unheard, kind), limit)

    async def unheard_new(self, patience_seconds: float, limit: int) -> Sequence[UUID]:
        """Return new jobs that nobody claimed so long after the sweep rang for them.

        Each is left alone for a while.
        """
        new = and_(
            jobs.started_at.is_(None),
            jobs.created_at <= _in_seconds(-patience_seconds),  # the first ring is the API's
        )
        return await self._take_due(and_(new, _was_to_be_rung(patience_seconds)), limit)

    async def _take_due(self, condition: ColumnElement[bool], limit: int) -> Sequence[UUID]:
        found = (
            select(jobs.id)
            .where(jobs.worker_id.is_(None), jobs.status.in_(UNFINISHED), condition)
            .order_by(jobs.ring_at)
            .limit(limit)
            .with_for_update(skip_locked=True, of=Job)
        )
        statement = (
            update(Job)
            .where(jobs.id.in_(found))
            .values(ring_at=_in_seconds(RING_AGAIN_SECONDS))
            .returning(jobs.id)
        )
        async with self._statements() as session:
            return (await session.scalars(statement)).all()

    async def expire(self, limit: int) -> dict[UUID, str]:
        """Fail unfinished jobs that are past their deadline; return their error codes."""
        late = jobs.deadline_at <= func.now()
        queued = await self._fail_all(
            and_(late, jobs.started_at.is_(None)),
            limit,
            "queue_deadline_exceeded",
            "No worker began the job before its deadline.",
        )
        begun = await self._fail_all(
            and_(late, jobs.started_at.is_not(None)),
            limit,
            "deadline_exceeded",
            "The job did not finish before its deadline.",
        )
        return {
            **dict.fromkeys(queued, "queue_deadline_exceeded"),
            **dict.fromkeys(begun, "deadline_exceeded"),
        }

    async def fail_poisoned(self, limit: int) -> Sequence[UUID]:
        """Fail unowned jobs whose worker crashed `MAX_CRASHES` times while decoding them."""
        poisoned = and_(jobs.worker_id.is_(None), jobs.crash_count >= MAX_CRASHES)
        return await self._fail_all(
            poisoned, limit, "poisoned", "Storing the output crashed the worker each time."
        )

    async def _fail_all(
        self, condition: ColumnElement[bool], limit: int, code: str, message: str
    ) -> Sequence[UUID]:
        found = (
            select(jobs.id)
            .where(jobs.status.in_(UNFINISHED), condition)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        statement = (
            update(Job)
            .where(jobs.id.in_(found))
            .values(
                status=JobStatus.FAILED,
                error_code=code,
                error_message=message,
                updated_at=func.now(),
                **_ended(),
            )
            .returning(jobs.id)
        )
        async with self._statements() as session:
            return (await session.scalars(statement)).all()

    async def finish_cancels(self) -> None:
        """Finish cancels whose API process went away while it waited."""
        found = (
            select(jobs.id)
            .where(jobs.status.in_(UNFINISHED), jobs.cancel_requested_at.is_not(None))
            .with_for_update(skip_locked=True)
        )
        async with self._statements() as session:
            await session.execute(_finish_cancel(jobs.id.in_(found)))

    async def take_orphans(self, limit: int, *, known: bool = True) -> list[Orphan]:
        """Return open attempts of jobs that have ended: their predictions should be stopped.

        Either those whose prediction is known, or those whose prediction has yet to be found;
        the oldest first. Each is left to the caller for `STOP_AGAIN_SECONDS`.
        """
        found = (
            select(attempts.id)
            .join(Job, jobs.id == attempts.job_id)
            .where(
                attempts.state != AttemptState.SETTLED,
                attempts.prediction_id.is_not(None) if known else attempts.prediction_id.is_(None),
                attempts.stop_at <= func.now(),
                jobs.status.in_(TERMINAL_STATUSES),
            )
            .order_by(attempts.created_at)
            .limit(limit)
            .with_for_update(of=Attempt, skip_locked=True)
        )
        age = func.extract("epoch", func.now() - attempts.created_at)
        given_seed = (
            select(jobs.parameters["seed"].astext)
            .where(jobs.id == attempts.job_id)
            .scalar_subquery()
        )
        statement = (
            update(Attempt)
            .where(attempts.id.in_(found))
            .values(stop_at=_in_seconds(STOP_AGAIN_SECONDS))
            .returning(Attempt, age, given_seed)
        )
        async with self._statements() as session:
            return [
                Orphan(attempt, float(age_seconds), given_seed)
                for attempt, age_seconds, given_seed in await session.execute(statement)
            ]

    async def has_twin(self, attempt: Attempt) -> bool:
        """Tell whether a job that goes on may be creating exactly this input.

        Of whatever model: one model has several names, with and without a version.
        """
        query = (
            select(attempts.id)
            .join(Job, jobs.id == attempts.job_id)
            .where(
                attempts.state == AttemptState.INTENT,
                attempts.id != attempt.id,
                attempts.input == attempt.input,
                jobs.status.in_(UNFINISHED),  # what has ended wants no prediction
            )
        )
        async with self._statements() as session:
            return await session.scalar(query.limit(1)) is not None

    async def ended_without_output(self, job_ids: Collection[UUID]) -> Collection[UUID]:
        """Return which of these jobs have failed or been cancelled: they will never own a file."""
        without = (JobStatus.FAILED, JobStatus.CANCELLED)
        query = select(jobs.id).where(jobs.id.in_(job_ids), jobs.status.in_(without))
        async with self._statements() as session:
            return (await session.scalars(query)).all()

    async def is_eldest(self, worker_id: UUID, lease_seconds: float) -> bool:
        """Tell whether this is the longest-lived worker: what one of them has to do is its duty."""
        eldest = (
            select(workers.id)
            .where(workers.heartbeat_at >= _in_seconds(-lease_seconds))
            .order_by(workers.started_at, workers.id)
            .limit(1)
        )
        async with self._statements() as session:
            return await session.scalar(eldest) == worker_id

    async def unstored(self, older_than_seconds: float, limit: int) -> Sequence[Attempt]:
        """Return attempts whose prediction was submitted long ago and whose job goes on."""
        query = (
            select(Attempt)
            .join(Job, jobs.id == attempts.job_id)
            .where(
                attempts.state == AttemptState.SUBMITTED,
                attempts.submitted_at < _in_seconds(-older_than_seconds),
                jobs.status.in_(UNFINISHED),
            )
            .order_by(attempts.submitted_at)
            .limit(limit)
        )
        async with self._statements() as session:
            return (await session.scalars(query)).all()

    async def settle_orphan(self, settlement: Settlement) -> None:
        """Close the attempt of a job that has ended."""
        async with self._statements() as session:
            await session.execute(_settle(settlement))

    # --- retention ---------------------------------------------------------------------------

    async def mark_deleted(
        self, kind: DeletionKind, older_than_seconds: float, limit: int
    ) -> Sequence[UUID]:
        """Mark files of jobs that completed longer ago as deleted; return the jobs, oldest first.

        Each job is returned to one caller only. The marks are made in the order of completion,
        so the search begins near the last one, however many there are.
        """
        marked = deletions.job_id == jobs.id, deletions.kind == kind
        last = select(func.max(deletions.completed_at)).where(deletions.kind == kind)
        begin = last.scalar_subquery() - timedelta(seconds=LATE_COMMIT_SECONDS)
        due = (
            select(jobs.id, literal(kind.value), jobs.completed_at)
            .where(
                jobs.status == JobStatus.COMPLETED,
                jobs.completed_at < _in_seconds(-older_than_seconds),
                jobs.completed_at >= func.coalesce(begin, text("'-infinity'::timestamptz")),
                ~select(deletions.job_id).where(*marked).exists(),
            )
            .order_by(jobs.completed_at)
            .limit(limit)
        )
        statement = (
            upsert(Deletion)
            .from_select(["job_id", "kind", "completed_at"], due)
            .on_conflict_do_nothing()
            .returning(deletions.job_id)
        )
        async with self._statements() as session:
            return (await session.scalars(statement)).all()

    async def unpurged(
        self, kind: DeletionKind, older_than_seconds: float, limit: int
    ) -> Sequence[UUID]:
        """Return jobs marked longer ago whose files are still there: whoever did it has died."""
        query = (
            select(deletions.job_id)
            .where(
                deletions.kind == kind,
                deletions.purged_at.is_(None),
                deletions.deleted_at < _in_seconds(-older_than_seconds),
            )
            .order_by(deletions.deleted_at)
            .limit(limit)
        )
        async with self._statements() as session:
            return (await session.scalars(query)).all()

    async def note_purged(self, kind: DeletionKind, job_ids: Collection[UUID]) -> None:
        """Note that the marked files of these jobs are gone."""
        statement = (
            update(Deletion)
            .where(deletions.job_id.in_(job_ids), deletions.kind == kind)
            .values(purged_at=func.now())
        )
        async with self._statements() as session:
            await session.execute(statement)


def _was_to_be_rung(seconds_ago: float) -> ColumnElement[bool]:
    """It was not rung at all (the broker is away), or was: then `ring_at` was put off."""
    never = jobs.ring_at <= _in_seconds(-seconds_ago)
    rung = jobs.ring_at <= _in_seconds(RING_AGAIN_SECONDS - seconds_ago)
    return or_(never, and_(jobs.ring_at > func.now(), rung))


def _with_deletion() -> Select[Output, datetime | None]:
    gone = and_(deletions.job_id == outputs.job_id, deletions.kind == DeletionKind.MEDIA)
    return select(Output, deletions.deleted_at).outerjoin(Deletion, gone)


def _pending(new: NewJob, queue_deadline_seconds: float) -> dict[str, Any]:
    return {
        "prompt": new.prompt,
        "model_name": new.model_name,
        "parameters": dict(new.parameters),
        "request_id": new.request_id,
        "deadline_at": _in_seconds(queue_deadline_seconds),
        "ring_at": _in_seconds(FIRST_RING_SECONDS),
    }


async def _expect(session: AsyncSession, statement: Update) -> None:
    """Run a guarded update; zero rows mean that the job is no longer ours."""
    if await session.scalar(statement.returning(jobs.id)) is None:
        raise LeaseLost


async def _has(session: AsyncSession, attempt_id: UUID, prediction: Prediction) -> bool:
    query = select(attempts.prediction_id).where(attempts.id == attempt_id)
    return await session.scalar(query) == prediction.id


async def _expect_settled(session: AsyncSession, settlement: Settlement) -> None:
    """Settle the attempt; raise (and so take back the job's new state) if it is not as known."""
    if await session.scalar(_settle(settlement).returning(attempts.id)) is None:
        raise LeaseLost


async def _counts(session: AsyncSession) -> dict[str, int]:
    query = select(counts.status, func.sum(counts.count)).group_by(counts.status)
    by_status = dict.fromkeys((status.value for status in JobStatus), 0)
    by_status.update({status: int(total) for status, total in await session.execute(query)})
    return by_status


def _guarded(lease: Lease, *, cancelling: bool = False) -> Update:
    """Start an UPDATE that changes nothing unless the lease is the last claim's.

    Once a cancel has been asked for, only what `cancelling` allows may still be written.
    """
    statement = update(Job).where(*_owned(lease))
    if not cancelling:
        statement = statement.where(jobs.cancel_requested_at.is_(None))
    return statement.values(updated_at=func.now())


def _owned(lease: Lease) -> Sequence[ColumnElement[bool]]:
    return (
        jobs.id == lease.job_id,
        jobs.status == JobStatus.PROCESSING,
        jobs.lease_token == lease.token,
    )


def _submitting(lease: Lease) -> Update:
    """What is past its deadline is not paid for any more."""
    in_time = jobs.deadline_at > func.now()
    return _guarded(lease).where(in_time).values(phase=JobPhase.SUBMITTING)


def _found(attempt_id: UUID, prediction: Prediction) -> Any:
    """Give an attempt its prediction, if it has none; whatever it was taken for before."""
    return (
        update(Attempt)
        .where(attempts.id == attempt_id, attempts.prediction_id.is_(None))
        .values(
            state=AttemptState.SUBMITTED,
            prediction_id=prediction.id,
            version=prediction.version,
            submitted_at=func.now(),
            stop_at=func.now(),  # should it be an orphan's: now, not when it was to be looked for
            charged=Charged.UNKNOWN,
            outcome=None,
            error_class=None,
            error_message=None,
            settled_at=None,
        )
        .returning(attempts.id)
    )


def _settle(settlement: Settlement) -> Update:
    return (
        update(Attempt)
        .where(
            attempts.id == settlement.attempt_id,
            attempts.state != AttemptState.SETTLED,
            attempts.prediction_id.is_not_distinct_from(settlement.prediction_id),
        )
        .values(
            state=AttemptState.SETTLED,
            outcome=settlement.outcome,
            charged=settlement.charged,
            error_class=settlement.error_class,
            error_message=settlement.error_message,
            predict_time_seconds=settlement.predict_time_seconds,
            version=func.coalesce(settlement.version, attempts.version),
            settled_at=func.now(),
        )
    )


def _release(condition: ColumnElement[bool]) -> Any:
    """Processing jobs stay `processing` without an owner: the next one resumes them."""
    return (
        update(Job)
        .where(jobs.status == JobStatus.PROCESSING, jobs.worker_id.is_not(None), condition)
        .values(worker_id=None, ring_at=func.now())
        .returning(jobs.id)
    )


def _finish_cancel(condition: ColumnElement[bool]) -> Any:
    """pending | processing -> cancelled, unless a create call may be just under way.

    The phase is read from the job's own row, so a concurrent `begin_attempt` is seen: a
    sub-query on attempts would be answered from the older snapshot.
    """
    no_create_under_way = or_(
        jobs.status == JobStatus.PENDING,
        jobs.phase.is_distinct_from(JobPhase.SUBMITTING),
        jobs.cancel_requested_at <= _in_seconds(-SUBMIT_WINDOW_SECONDS),
    )
    return (
        update(Job)
        .where(condition, jobs.status.in_(UNFINISHED), no_create_under_way)
        .values(
            status=JobStatus.CANCELLED,
            cancel_requested_at=_first_asked(),
            updated_at=func.now(),
            **_ended(),
        )
        .returning(Job)
    )


def _first_asked() -> ColumnElement[datetime]:
    # Not `now()`: the transaction may have begun before the intent that it must outwait.
    return func.coalesce(jobs.cancel_requested_at, func.clock_timestamp())


def _ended() -> dict[str, Any]:
    return {"phase": None, "worker_id": None, "next_attempt_at": None, "completed_at": func.now()}


def _in_seconds(seconds: float) -> ColumnElement[datetime]:
    return func.now() + timedelta(seconds=seconds)
