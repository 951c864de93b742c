"""What became of a create call whose answer nobody has: adopt, prove absent, or admit not to know.

The last owner committed its intent and was killed, paused or cut off; the provider may or may not
have accepted the call, and may still be about to.
"""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

import structlog

from app import clock
from app.errors import FailureClass, ProviderError
from app.jobs.models import Attempt, JobPhase
from app.jobs.repository import SUBMIT_WINDOW_SECONDS, Claim, JobRepository
from app.jobs.settlement import AttemptEnded, absent, unknown
from app.providers.base import Prediction, Provider, Sought

# Failures with more than this between them are not taken for one long silence.
LONGEST_GAP_SECONDS = 60.0

log = structlog.get_logger(__name__)


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
    _claimed_at: float = field(default_factory=clock.now)

    @property
    def seconds(self) -> float:
        return self.at_claim_seconds + clock.now() - self._claimed_at


@dataclass(slots=True)
class _Silence:
    """For how long the provider's list could not be read, as far as this process knows.

    Not how old the intent is: after an outage of ours one failed look would decide of money.
    """

    _since: float | None = None
    _last: float = 0.0

    def heard(self) -> None:
        self._since = None

    def failed(self, asked_at: float) -> float:
        """Return the seconds since the first of the failures that came one after the other."""
        now = time.monotonic()
        if self._since is None or asked_at - self._last > LONGEST_GAP_SECONDS:
            self._since = now
        self._last = now
        return now - self._since


def made_within_seconds(attempt: Attempt, age_seconds: float) -> float:
    """Return how far back to look for an attempt of this age: further where its writer says so.

    The database's clock may have been set back since, and what is not looked at is taken for lost.
    """
    written_at = (attempt.id.int >> 80) / 1000  # UUIDv7 begins with milliseconds
    return max(age_seconds, time.time() - written_at)


def sought_by(attempt: Attempt, given_seed: object) -> Sought:
    """Return what an attempt asked for, to look for it; `given_seed` is the client's, or None.

    A seed that we have drawn is nobody else's. A model may have none: that is null as well.
    """
    is_ours = given_seed is None and attempt.input.get("seed") is not None
    return Sought(attempt.model_name, attempt.input, has_own_seed=is_ours)


def check_provider(attempt: Attempt, provider: Provider) -> None:
    """Raise ProviderError if the attempt was begun at another provider, which alone knows of it.

    A worker that was started without its token has the mock: it must not draw what is paid for.
    """
    if attempt.provider != provider.name:
        raise ProviderError(
            FailureClass.INTERNAL,
            "provider_changed",
            f"This was begun at the provider {attempt.provider}; the service has another one now.",
        )


def known_prediction(attempt: Attempt) -> Prediction | None:
    """Return the attempt's prediction, to be waited for however it stands by now; None: no id."""
    if attempt.prediction_id is None:
        return None
    return Prediction(attempt.prediction_id, "starting", attempt.model_name, attempt.input)


class Reconciler:
    """Resolves intents; one instance serves every job of the process."""

    def __init__(
        self, repository: JobRepository, provider: Provider, policy: ReconcilePolicy
    ) -> None:
        self._repository = repository
        self._provider = provider
        self._policy = policy
        self._silence = _Silence()

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
            prediction = await self._look(claim, attempt, age, is_last=True)
        if prediction is not None:
            return prediction
        log.info("create_proven_absent")
        raise AttemptEnded(
            ProviderError(
                FailureClass.TRANSIENT,
                "create_lost",
                "The provider never received the create call.",
            ),
            absent(attempt),
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
        return await self._look(claim, attempt, age, is_last=True)

    async def _look(
        self, claim: Claim, attempt: Attempt, age: _Age, *, is_last: bool = False
    ) -> Prediction | None:
        reported = await self._repository.attempt(attempt.id)
        if reported is not None and (known := known_prediction(reported)):
            return known
        sought = sought_by(attempt, claim.job.parameters.get("seed"))
        found = await self._find(attempt, sought, age)
        for prediction in found:
            if not sought.is_surely(prediction):
                continue
            if await self._repository.record_prediction(claim.lease, attempt.id, prediction):
                log.info("prediction_adopted", prediction_id=prediction.id)
                return prediction
        if is_last:
            await self._doubt_strangers(attempt, found, sought, age)
        return None

    async def _find(self, attempt: Attempt, sought: Sought, age: _Age) -> list[Prediction]:
        asked_at = time.monotonic()
        try:
            found = await self._provider.find(sought, made_within_seconds(attempt, age.seconds))
        except ProviderError as error:
            silent_seconds = 0.0
            if error.failure_class is not FailureClass.THROTTLED:  # an answer, of a kind
                silent_seconds = self._silence.failed(asked_at)
            lasting = min(age.seconds, silent_seconds) >= self._policy.deadline_seconds
            if lasting or error.failure_class is FailureClass.PERMANENT:
                raise self._unprovable(attempt, error) from error
            raise
        self._silence.heard()
        return found

    async def _doubt_strangers(
        self, attempt: Attempt, found: list[Prediction], sought: Sought, age: _Age
    ) -> None:
        """Raise if one that may be it, but is not by model or input, is no job's.

        It may be another job's whose create is still under way, or is being looked for itself.
        """
        strangers = [seen for seen in found if not sought.is_surely(seen)]
        for pause_seconds in (0, self._policy.call_seconds):
            await asyncio.sleep(pause_seconds)
            if not await self._repository.any_unknown(self._provider.name, strangers):
                return
        doubt = ProviderError(
            FailureClass.TRANSIENT,
            "provider_outcome_pending",
            "A prediction is listed that may be this one, and is no other job's.",
        )
        if age.seconds < self._policy.deadline_seconds:
            raise doubt
        raise self._unprovable(attempt, doubt)

    def _unprovable(self, attempt: Attempt, error: ProviderError) -> AttemptEnded:
        log.error("provider_outcome_unknown", attempt_id=str(attempt.id))
        message = "The provider never said whether it accepted the prediction"
        if self._policy.on_unknown_outcome == "resubmit":
            again = ProviderError(FailureClass.TRANSIENT, "provider_outcome_unknown", f"{message}.")
            return AttemptEnded(again, unknown(attempt, error))
        message += "; it was not submitted again, because it may have been paid."
        given_up = ProviderError(FailureClass.PERMANENT, "provider_outcome_unknown", message)
        # Left open, it is looked for by the sweep, and stopped if it runs after all.
        return AttemptEnded(given_up, None)
