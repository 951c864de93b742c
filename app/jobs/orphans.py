"""Stops the predictions of jobs that have ended without them: cancelled, say, or too late."""

import asyncio
from dataclasses import replace
from uuid import UUID

import structlog

from app.errors import FailureClass, ProviderError
from app.jobs.duty import repeat
from app.jobs.models import Attempt
from app.jobs.reconcile import check_provider, made_within_seconds, sought_by
from app.jobs.repository import JobRepository, Orphan
from app.jobs.settlement import Settlement, absent, settled, unknown
from app.providers.base import Prediction, Provider

# A create call that no list has shown after this long, and the grace of a reconcile, is taken for
# never received.
PATIENCE_SECONDS = 120.0
# Replicate forgets inputs after an hour, and no prediction runs as long.
MEMORY_SECONDS = 3600.0
# More would only queue before the provider's rate, and the poller's reads behind them.
STOPS_AT_ONCE = 8
# So many wait for that; the others are left to the next round, or to other workers.
IN_HAND = 64
SEARCHES_AT_ONCE = 500

log = structlog.get_logger(__name__)


class OrphanStopper:
    """Cancels orphaned predictions, and closes their attempts."""

    def __init__(self, repository: JobRepository, provider: Provider, grace_seconds: float) -> None:
        """`grace_seconds` is for how long the provider's list may not show a create."""
        self._repository = repository
        self._provider = provider
        self._grace_seconds = grace_seconds
        self._nudged, self._lost_nudged = asyncio.Event(), asyncio.Event()
        self._turns = asyncio.Semaphore(STOPS_AT_ONCE)
        self._in_hand: set[UUID] = set()  # the attempts

    async def run(self, seconds: float) -> None:
        """Look for orphans so often, for ever; cancel the task to end it."""
        async with asyncio.TaskGroup() as tasks:

            async def stop_orphans() -> None:
                await self.stop_orphans(tasks)

            tasks.create_task(repeat(seconds, stop_orphans, nudge=self._nudged))
            tasks.create_task(repeat(seconds, self.stop_lost_orphans, nudge=self._lost_nudged))

    def nudge(self) -> None:
        """Look now rather than at the next round: a job was cancelled."""
        self._nudged.set()
        self._lost_nudged.set()

    async def stop_orphans(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to stop those whose prediction is known.

        Not waited for: one call that hangs must not hold up a cancel that comes after it.
        """
        room = IN_HAND - len(self._in_hand)
        if room <= 0:
            return
        for orphan in await self._repository.take_orphans(room, known=True):
            if orphan.attempt.id not in self._in_hand:  # else it is still at it
                self._in_hand.add(orphan.attempt.id)
                tasks.create_task(self._stop_orphan(orphan))

    async def stop_lost_orphans(self) -> None:
        """Stop those whose create's answer was lost: they have to be found first.

        Searches share one reading of the provider's list, so all of them begin at once.
        """
        orphans = await self._repository.take_orphans(SEARCHES_AT_ONCE, known=False)
        await asyncio.gather(*(self._stop_orphan(orphan) for orphan in orphans))

    async def _stop_orphan(self, orphan: Orphan) -> None:
        """Never raises: others are being stopped beside it."""
        try:
            await self._try_to_stop(orphan)
        except Exception as error:
            log.warning("orphan_not_stopped", **_ids(orphan), error=type(error).__name__)
        finally:
            self._in_hand.discard(orphan.attempt.id)

    async def _try_to_stop(self, orphan: Orphan) -> None:
        attempt = orphan.attempt
        try:
            check_provider(attempt, self._provider)
            attempt.prediction_id = attempt.prediction_id or await self._find(orphan)
            async with self._turns:
                settlement = await self._stopped(orphan)
        except ProviderError as error:
            log.warning("orphan_not_stopped", **_ids(orphan), code=error.code)
            settlement = _given_up(orphan, error)
        if settlement is not None:
            await self._repository.settle_orphan(settlement)

    async def _stopped(self, orphan: Orphan) -> Settlement | None:
        """Cancel the prediction; return how the attempt has ended, None if nobody knows yet."""
        attempt, is_old = orphan.attempt, self._is_old(orphan)
        if attempt.prediction_id is None:
            return absent(attempt) if is_old else None
        prediction = await self._provider.cancel(attempt.prediction_id)
        if prediction is None and not is_old:
            return None  # the provider may not know yet what it has just made
        log.info("orphan_stopped", **_ids(orphan))
        return _ended(attempt, prediction)

    async def _find(self, orphan: Orphan) -> str | None:
        """Return the prediction of a create whose answer was lost, unless another job has it."""
        attempt = orphan.attempt
        sought = sought_by(attempt, orphan.given_seed)
        since = made_within_seconds(attempt, orphan.age_seconds)
        seen = await self._provider.find(sought, since)
        found = [prediction for prediction in seen if sought.is_surely(prediction)]
        if found and not sought.has_own_seed and await self._repository.has_twin(attempt):
            if self._is_old(orphan):
                raise _unknown("A prediction of this input may be another job's.")
            return None  # it may be the other's, and that one is wanted
        for prediction in found:
            if await self._repository.adopt(attempt.id, prediction):
                return prediction.id
        if self._is_old(orphan):
            strangers = [other for other in seen if not sought.is_surely(other)]
            if await self._repository.any_unknown(self._provider.name, strangers):
                raise _unknown("A prediction is listed that may be it, and is no other job's.")
        return None

    def _is_old(self, orphan: Orphan) -> bool:
        return orphan.age_seconds > PATIENCE_SECONDS + self._grace_seconds


def _unknown(message: str) -> ProviderError:
    return ProviderError(FailureClass.PERMANENT, "provider_outcome_unknown", message)


def _ids(orphan: Orphan) -> dict[str, str]:
    return {"job_id": str(orphan.attempt.job_id), "attempt_id": str(orphan.attempt.id)}


def _ended(attempt: Attempt, prediction: Prediction | None) -> Settlement:
    """Say how it ended: it may have been done before the cancel came."""
    if prediction is None:
        return unknown(attempt)
    is_over = prediction.is_terminal
    return settled(attempt, prediction if is_over else replace(prediction, status="canceled"))


def _given_up(orphan: Orphan, error: ProviderError) -> Settlement | None:
    """Close an attempt of which nobody will ever know; `Cancel-After` bounds what it costs."""
    lasting = error.failure_class is FailureClass.PERMANENT
    if not lasting and orphan.age_seconds < MEMORY_SECONDS:
        return None  # the provider is not well: later
    return unknown(orphan.attempt, error)
