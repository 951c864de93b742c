"""One job's run by one owner: claim, submit, wait, store, complete.

Every step is checkpointed in the job's row and its attempt, so a run can end at any line (a crash,
a hand-over, a lost lease) and the next owner goes on from there:

    no open attempt            -> submit a new one
    attempt `intent`           -> reconcile: did the provider get it?
    attempt `submitted`        -> wait for its prediction, however it stands by now
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import chain, repeat
from typing import Protocol
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.errors import FailureClass, LeaseLost, ProviderError, StorageError
from app.jobs.backpressure import Backpressure
from app.jobs.models import Attempt, JobPhase
from app.jobs.outputs import OutputKeeper
from app.jobs.reconcile import (
    ReconcilePolicy,
    Reconciler,
    check_provider,
    known_prediction,
)
from app.jobs.repository import Claim, JobRepository, Lease
from app.jobs.retry import Retry, RetryPolicy, decide
from app.jobs.settlement import AttemptEnded, Settlement, ending, settled
from app.jobs.submission import KnowsParameter, SubmitPolicy, Submitter, insistently
from app.jobs.watch import PredictionWatcher
from app.providers.base import Prediction, Provider
from app.providers.outcome import raise_for_outcome

# Jobs that are being begun at once in this process, from the claim until the answer to the create
# is kept; the others wait for their turn unclaimed. So a flood of new jobs can not get in the way
# of those that are paid for. As many as the Replicate adapter holds open by `Prefer: wait`
# (`HELD_WAITS`): at five seconds each, a dozen creates a second.
BEGUN_AT_ONCE = 64
# Fewer where the rate is low: whoever waits for it is claimed, and its deadline counts.
BEGUN_AHEAD_MINUTES = 0.5


def begun_at_once(creates_per_minute: float) -> int:
    """Return how many jobs a worker begins at once where the provider's rate is this."""
    return max(1, min(BEGUN_AT_ONCE, round(BEGUN_AHEAD_MINUTES * creates_per_minute)))


class RunObserver(Protocol):
    """Whoever started a run, and wants to know how far it is."""

    def begins(self) -> None:
        """Its turn has come: it claims the job."""
        ...

    def owns(self, lease: Lease) -> None:
        """It has claimed the job."""
        ...


log = structlog.get_logger(__name__)


class Outcome(StrEnum):
    """How one run of a job ended, for whoever shows it (Celery's events, say)."""

    COMPLETED = "completed"
    FAILED = "failed"
    RETRY = "retry"
    CANCELLED = "cancelled"  # while it was ours
    SKIPPED = "skipped"  # not ours: somebody else has it, or it is over


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outcome and, unless it went well, why; `retry_in_seconds` only for RETRY."""

    outcome: Outcome
    error_code: str | None = None
    retry_in_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class LifecyclePolicy:
    """What the settings say about a job's life; durations in seconds."""

    retry: RetryPolicy
    job_deadline_seconds: float
    begun_at_once: int
    submit: SubmitPolicy
    reconcile: ReconcilePolicy


class Lifecycle:
    """Runs jobs; one instance serves every job of the process."""

    def __init__(
        self,
        repository: JobRepository,
        beginnings: JobRepository,
        provider: Provider,
        watcher: PredictionWatcher,
        keeper: OutputKeeper,
        knows_parameter: KnowsParameter,
        policy: LifecyclePolicy,
    ) -> None:
        """`beginnings` is the repository on connections for what is not paid for yet.

        However many jobs wait to be begun, none that has begun stands behind them.
        """
        self._repository = repository
        self._beginnings = beginnings
        self._provider = provider
        self._watcher = watcher
        self._keeper = keeper
        self._policy = policy
        self._submitter = Submitter(
            repository, beginnings, provider, knows_parameter, policy.submit
        )
        self._reconciler = Reconciler(repository, provider, policy.reconcile)
        self._turns = asyncio.Semaphore(policy.begun_at_once)
        self._backpressure = Backpressure()

    async def run(
        self, job_id: UUID, worker_id: UUID, observer: RunObserver, *, at_once: bool = False
    ) -> RunResult:
        """Claim the job and bring it as far as it goes; `at_once` if it has begun before.

        From pending (or processing without an owner) to completed, failed, or pending again
        for a retry. Raises only when the database fails; the job then stays claimed.
        """
        async with AsyncExitStack() as turn:
            if not at_once:
                await turn.enter_async_context(self._turns)
                await self._backpressure.wait_for_room()
            observer.begins()
            claim = await self._claim(job_id, worker_id, at_once=at_once)
            if claim is None:
                return RunResult(Outcome.SKIPPED)
            observer.owns(claim.lease)
            with structlog.contextvars.bound_contextvars(
                job_id=str(job_id),
                attempt=claim.attempt.number if claim.attempt else None,
                request_id=claim.job.request_id,
            ):
                return await self._run_claimed(claim, turn)

    async def _claim(self, job_id: UUID, worker_id: UUID, *, at_once: bool) -> Claim | None:
        repository = self._repository if at_once else self._beginnings
        return await repository.claim(job_id, worker_id, self._policy.job_deadline_seconds)

    async def _run_claimed(self, claim: Claim, turn: AsyncExitStack) -> RunResult:
        log.info("job_claimed", phase=claim.job.phase, resumed=claim.attempt is not None)
        try:
            await self._advance(claim, turn)
        except LeaseLost:
            log.info("lease_lost")
            return RunResult(Outcome.SKIPPED)
        except AttemptEnded as ended:
            return await self._conclude(claim, ended.error, ended.settlement)
        except ProviderError as error:
            return await self._conclude(claim, _uncounted(error), None)
        except StorageError as error:
            log.error("storage_failed", error=str(error))
            return await self._conclude(claim, _internal("storage_unavailable"), None)
        except (SQLAlchemyError, OSError) as error:
            # The database failed, or this process was paused for longer than it waits.
            log.warning("run_interrupted", error=type(error).__name__)
            return await self._conclude(claim, _internal("internal_error"), None)
        except Exception:
            log.exception("run_failed")
            return await self._conclude(claim, _internal("internal_error"), None)
        log.info("job_completed")
        return RunResult(Outcome.COMPLETED)

    async def _advance(self, claim: Claim, turn: AsyncExitStack) -> None:
        """Make or find the prediction, wait for its end, store what it made.

        The turn is given back as soon as nothing more will be created.
        """
        if claim.attempt is not None:
            await turn.aclose()
        attempt, prediction = await self._prediction(claim)
        await turn.aclose()
        attempt.prediction_id = prediction.id
        if not prediction.is_terminal:
            # One that is lost or can not be ended fails the job, but does not close the attempt:
            # the sweep goes on stopping it.
            prediction = await self._watcher.wait(prediction.id)
        with self._backpressure.storing(claim.job.id):
            await self._finish(claim, attempt, prediction)

    async def _finish(self, claim: Claim, attempt: Attempt, prediction: Prediction) -> None:
        log.info("prediction_ended", prediction_id=prediction.id, status=prediction.status)
        with ending(attempt, prediction):
            raise_for_outcome(prediction)
        await self._store(claim, attempt, prediction)

    async def _prediction(self, claim: Claim) -> tuple[Attempt, Prediction]:
        """Return the job's open attempt and its prediction: see the table above."""
        attempt = claim.attempt
        if attempt is None:
            return await self._submitter.submit(claim)
        check_provider(attempt, self._provider)
        # Not asked about one by one: a page of the list tells of a hundred that are resumed.
        known = known_prediction(attempt)
        return attempt, known or await self._reconciler.resolve(claim, attempt)

    async def _store(self, claim: Claim, attempt: Attempt, prediction: Prediction) -> None:
        """Keep the outputs, then commit `completed`.

        If we die anywhere in here, the next owner downloads again and writes the same files.
        """
        still_ours = self._ownership(claim.lease)
        decoding = partial(self._decoding, claim)
        with ending(attempt, prediction, permanent_only=True):
            outputs = await self._keeper.keep(claim.job, attempt, prediction, still_ours, decoding)
        await self._repository.complete(claim.lease, outputs, settled(attempt, prediction))

    def _ownership(self, lease: Lease) -> Callable[[], Awaitable[None]]:
        """Return a check that raises LeaseLost; its first call says that the outputs are stored."""
        checks = chain([self._repository.begin_storing], repeat(self._repository.check_owned))
        return lambda: next(checks)(lease)

    @asynccontextmanager
    async def _decoding(self, claim: Claim) -> AsyncIterator[None]:
        """Have the row say that this job will have crashed the worker, if it does."""
        crash_count = claim.job.crash_count
        try:
            # In here: its commit may be done although its answer is lost, or we are stopped.
            await self._repository.begin_decoding(claim.lease, crash_count + 1)
            yield
        finally:
            # Three crashes that never were would fail the job.
            end = self._repository.end_decoding
            await insistently(partial(end, claim.lease, crash_count))

    async def _conclude(
        self, claim: Claim, error: ProviderError, settlement: Settlement | None
    ) -> RunResult:
        decision = decide(
            error,
            retry_count=claim.job.retry_count,
            throttle_count=claim.job.throttle_count,
            policy=self._policy.retry,
            jitter=random.random(),
        )
        try:
            if decision is None:
                return await self._fail(claim, error, settlement)
            return await self._retry_later(claim, error, settlement, decision)
        except LeaseLost:
            log.info("lease_lost")
            return RunResult(Outcome.SKIPPED)

    async def _fail(
        self, claim: Claim, error: ProviderError, settlement: Settlement | None
    ) -> RunResult:
        await self._repository.fail(
            claim.lease,
            error_code=error.code,
            error_message=error.message,
            settlement=settlement,
            left_open=claim.attempt,
        )
        log.warning("job_failed", code=error.code)
        return RunResult(Outcome.FAILED, error.code)

    async def _retry_later(
        self, claim: Claim, error: ProviderError, settlement: Settlement | None, decision: Retry
    ) -> RunResult:
        await self._repository.retry_later(
            claim.lease,
            delay_seconds=decision.delay_seconds,
            error_code=error.code,
            error_message=error.message,
            retries=decision.retries,
            throttles=decision.throttles,
            phase=None if settlement else _phase_to_keep(claim, error),
            settlement=settlement,
        )
        log.info("job_retries", code=error.code, delay_seconds=round(decision.delay_seconds, 2))
        return RunResult(Outcome.RETRY, error.code, decision.delay_seconds)


def _phase_to_keep(claim: Claim, error: ProviderError) -> JobPhase | None:
    """Keep the phase of an attempt without an id: the next owner outwaits a create under way.

    One that has ended AMBIGUOUS is over, and the pause before the retry is its grace.
    """
    attempt = claim.attempt
    unresolved = attempt is not None and attempt.prediction_id is None
    is_over = error.failure_class is FailureClass.AMBIGUOUS
    return claim.job.phase if unresolved and not is_over else None


def _uncounted(error: ProviderError) -> ProviderError:
    """The attempt goes on: a failed read or download must not use up a retry."""
    if error.failure_class is not FailureClass.TRANSIENT:
        return error
    return ProviderError(FailureClass.INTERNAL, error.code, error.message)


def _internal(code: str) -> ProviderError:
    return ProviderError(
        FailureClass.INTERNAL, code, "The service could not finish this step; it will try again."
    )
