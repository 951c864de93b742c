"""What became of a create call whose answer nobody has: adopt, prove absent, or admit not to know.

The last owner committed its intent and was killed, paused or cut off; the provider may or may not
have accepted the call, and may still be about to.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

import structlog

from app.errors import FailureClass, ProviderError
from app.jobs.models import Attempt, Charged, JobPhase
from app.jobs.repository import SUBMIT_WINDOW_SECONDS, Claim, JobRepository, Settlement
from app.providers.base import (
    CLOCK_SKEW,
    LOGGED_ID_CHARS,
    Prediction,
    PredictionRequest,
    Provider,
)

log = structlog.get_logger(__name__)


class AttemptEnded(Exception):
    """The attempt is over without a stored output; the job may or may not get another.

    Without a `settlement` it stays open for the sweep, which goes on looking for its prediction.
    """

    def __init__(self, error: ProviderError, settlement: Settlement | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.settlement = settlement


@dataclass(frozen=True, slots=True)
class ReconcilePolicy:
    """How long what is believed; durations in seconds.

    A create call is over `call_seconds` after it was sent; what the provider's list does not show
    `grace_seconds` later was never accepted; a list that cannot be read for `deadline_seconds`
    never tells.
    """

    call_seconds: float
    grace_seconds: float
    deadline_seconds: float
    on_unknown_outcome: Literal["fail", "resubmit"]


@dataclass(slots=True)
class _Age:
    """The age of the intent, from the database's clock and then our own."""

    at_claim_seconds: float
    _claimed_at: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.at_claim_seconds + time.monotonic() - self._claimed_at


class Reconciler:
    """Resolves intents; one instance serves every job of the process."""

    def __init__(
        self, repository: JobRepository, provider: Provider, policy: ReconcilePolicy
    ) -> None:
        self._repository = repository
        self._provider = provider
        self._policy = policy

    async def resolve(self, claim: Claim, attempt: Attempt) -> Prediction:
        """Return the attempt's prediction.

        Raises: ProviderError to look again later; AttemptEnded when it is certain that there is
        none, or that nobody will ever know; LeaseLost.
        """
        age = _Age(claim.attempt_age_seconds)
        if claim.job.phase is JobPhase.SUBMITTING:
            prediction = await self._outwait(claim, attempt, age)
        else:
            # The call is over, and the pause before this run was the grace.
            prediction = await self._look(claim, attempt, age)
        if prediction is not None:
            return prediction
        log.info("create_proven_absent")
        raise AttemptEnded(
            ProviderError(
                FailureClass.TRANSIENT,
                "create_lost",
                "The provider never received the create call.",
            ),
            Settlement(attempt.id, None, "absent", Charged.NO),
        )

    async def _outwait(self, claim: Claim, attempt: Attempt, age: _Age) -> Prediction | None:
        """Look again and again until the last owner's call is over for certain.

        It may only have been paused, and sends its create until the window of the intent is
        over; while the phase says so, no cancel is confirmed.
        """
        await asyncio.sleep(SUBMIT_WINDOW_SECONDS - age.seconds)
        certain_at = SUBMIT_WINDOW_SECONDS + self._policy.call_seconds
        certain_at += self._policy.grace_seconds
        pause = 1.0
        while (left := certain_at - age.seconds) > 0:
            prediction = await self._look(claim, attempt, age)
            if prediction is not None:
                return prediction
            await asyncio.sleep(min(pause, left))
            pause *= 2
        return await self._look(claim, attempt, age)

    async def _look(self, claim: Claim, attempt: Attempt, age: _Age) -> Prediction | None:
        known = await self._repository.attempt(attempt.id)
        if known is not None and known.prediction_id is not None:  # by the provider's report
            return Prediction(known.prediction_id, "starting", known.model_name, known.input)
        own_seed = claim.job.parameters.get("seed") is None and "seed" in attempt.input
        request = PredictionRequest(attempt.model_name, attempt.input, 0, has_own_seed=own_seed)
        try:
            found = await self._provider.find(request, attempt.created_at - CLOCK_SKEW)
        except ProviderError as error:
            self._give_up_if_unprovable(attempt, age, error)
            raise
        for prediction in found:
            if await self._repository.record_prediction(claim.lease, attempt.id, prediction):
                log.info("prediction_adopted", prediction_id=prediction.id[:LOGGED_ID_CHARS])
                return prediction
        return None

    def _give_up_if_unprovable(self, attempt: Attempt, age: _Age, error: ProviderError) -> None:
        young = age.seconds < self._policy.deadline_seconds
        if young and error.failure_class is not FailureClass.PERMANENT:
            return
        log.error("provider_outcome_unknown", attempt_id=str(attempt.id))
        unknown = Settlement(
            attempt.id, None, "unknown", Charged.UNKNOWN, error.failure_class, error.message
        )
        resubmit = self._policy.on_unknown_outcome == "resubmit"
        raise AttemptEnded(
            ProviderError(
                FailureClass.TRANSIENT if resubmit else FailureClass.PERMANENT,
                "provider_outcome_unknown",
                "The provider never said whether it accepted the prediction;"
                " it was not submitted again, because it may have been paid.",
            ),
            # Left open, it is looked for by the sweep, and stopped if it runs after all.
            unknown if resubmit else None,
        ) from error
