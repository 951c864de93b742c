"""The ledger of attempts: one row for each create call that may have been made."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import case, func, select, update
from sqlalchemy.exc import IntegrityError

from app.jobs.models import (
    TERMINAL_STATUSES,
    Attempt,
    AttemptState,
    Job,
    JobPhase,
    JobStatus,
)
from app.jobs.repository.records import Orphan
from app.jobs.repository.statements import (
    IS_OPEN,
    UNFINISHED,
    Repository,
    age_seconds,
    attempts,
    give_prediction,
    has_prediction,
    in_seconds,
    jobs,
    settle,
)
from app.jobs.settlement import Settlement
from app.providers.base import Prediction

# How long an orphan is left to the worker that tries to stop it.
STOP_AGAIN_SECONDS = 5


class Ledger(Repository):
    """Which prediction belongs to which attempt, whoever learns it."""

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
                if await session.scalar(give_prediction(attempt_id, prediction)):
                    await session.execute(job)
                return await has_prediction(session, attempt_id, prediction)
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

    async def take_orphans(self, limit: int, *, known: bool = True) -> list[Orphan]:
        """Return open attempts of jobs that have ended: their predictions should be stopped.

        Either those whose prediction is known, or those whose prediction has yet to be found;
        the oldest first. Each is left to the caller for `STOP_AGAIN_SECONDS`.
        """
        found = (
            select(attempts.id)
            .join(Job, jobs.id == attempts.job_id)
            .where(
                IS_OPEN,
                attempts.prediction_id.is_not(None) if known else attempts.prediction_id.is_(None),
                attempts.stop_at <= func.now(),
                jobs.status.in_(TERMINAL_STATUSES),
            )
            .order_by(attempts.created_at)
            .limit(limit)
            .with_for_update(of=Attempt, skip_locked=True)
        )
        age = age_seconds(attempts.created_at)
        given_seed = (
            select(jobs.parameters["seed"].astext)
            .where(jobs.id == attempts.job_id)
            .scalar_subquery()
        )
        statement = (
            update(Attempt)
            .where(attempts.id.in_(found))
            .values(stop_at=in_seconds(STOP_AGAIN_SECONDS))
            .returning(Attempt, age, given_seed)
        )
        async with self._statements() as session:
            return [
                Orphan(attempt, float(orphan_age), given_seed)
                for attempt, orphan_age, given_seed in await session.execute(statement)
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

    async def unstored(
        self, older_than_seconds: float, limit: int
    ) -> Sequence[tuple[UUID, datetime]]:
        """Return which jobs go on although their prediction was submitted long ago, and when.

        Without the inputs: each may be large, and this is asked while nothing can be stored.
        """
        query = (
            select(attempts.job_id, attempts.submitted_at)
            .join(Job, jobs.id == attempts.job_id)
            .where(
                attempts.state == AttemptState.SUBMITTED,
                attempts.submitted_at < in_seconds(-older_than_seconds),
                jobs.status.in_(UNFINISHED),
            )
            .order_by(attempts.submitted_at)
            .limit(limit)
        )
        async with self._statements() as session:
            return [(job_id, at) for job_id, at in await session.execute(query)]

    async def settle_orphan(self, settlement: Settlement) -> None:
        """Close the attempt of a job that has ended."""
        async with self._statements() as session:
            await session.execute(settle(settlement))
