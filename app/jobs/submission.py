"""The one create call of an attempt: its input, its intent, the call, and the id that it gives."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app import clock
from app.errors import FailureClass, LeaseLost, ProviderError
from app.jobs.models import Attempt, Job, JobPhase
from app.jobs.repository import SUBMIT_WINDOW_SECONDS, Claim, JobRepository, Lease
from app.jobs.settlement import ending
from app.providers.base import Prediction, PredictionRequest, Provider

# A seed is drawn below the first limit that the model takes. Fewer than 2**16 would not tell two
# creates apart: a model that takes only smaller ones is left to draw its own.
SEED_LIMITS = (2**31, 2**16)
CREATE_GRACE_SECONDS = 2.0
# For a database that is away just when something must be written down.
RECORD_SECONDS = 30.0
RECORD_PAUSE_SECONDS = 1.0

# Whether a model has a parameter, and takes a value for it: `ParameterChecker.knows`.
KnowsParameter = Callable[..., Awaitable[bool]]

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class SubmitPolicy:
    """What is sent with every create."""

    cancel_after_seconds: float
    webhook_base_url: str | None
    ask_for_png: bool = True


class Submitter:
    """Submits attempts; one instance serves every job of the process."""

    def __init__(
        self,
        repository: JobRepository,
        beginnings: JobRepository,
        provider: Provider,
        knows_parameter: KnowsParameter,
        policy: SubmitPolicy,
    ) -> None:
        """`beginnings`: see `Lifecycle`."""
        self._repository = repository
        self._beginnings = beginnings
        self._provider = provider
        self._knows_parameter = knows_parameter
        self._policy = policy

    async def submit(self, claim: Claim) -> tuple[Attempt, Prediction]:
        """Return the job's new attempt and its prediction; the claim has them from then on.

        Raises: AttemptEnded when it is certain that nothing was created; ProviderError(AMBIGUOUS)
        when it is not; LeaseLost.
        """
        request = await self._request(claim.job)
        await self._provider.admit()
        intended_at = clock.now()
        attempt = await self._beginnings.begin_attempt(claim.lease, self._provider.name, request)
        claim.attempt, claim.job.phase = attempt, JobPhase.SUBMITTING
        structlog.contextvars.bind_contextvars(attempt=attempt.number)
        creating = self._create(claim.lease, attempt, request, intended_at)
        prediction = await _uninterrupted(creating)
        log.info("prediction_created", prediction_id=prediction.id, status=prediction.status)
        return attempt, prediction

    async def _create(
        self, lease: Lease, attempt: Attempt, request: PredictionRequest, intended_at: float
    ) -> Prediction:
        """Make the one create call of a committed intent, and commit the id it gives.

        If we die before the call, or before the commit, the attempt stays `intent` and the
        next owner reconciles.
        """

        async def may_send() -> bool:
            nonlocal intended_at
            while clock.now() - intended_at > SUBMIT_WINDOW_SECONDS:
                intended_at = clock.now()
                if not await self._repository.may_still_submit(lease, attempt.id):
                    return False
            return True

        base_url = self._policy.webhook_base_url
        webhook = f"{base_url}/{attempt.id}" if base_url else None
        with ending(attempt):
            prediction = await self._provider.create(replace(request, webhook=webhook), may_send)
        await self._record(lease, attempt, prediction)
        return prediction

    async def _record(self, lease: Lease, attempt: Attempt, prediction: Prediction) -> None:
        """Commit the id, insistently: nobody but this process knows it yet."""
        record = partial(self._repository.record_prediction, lease, attempt.id, prediction)
        try:
            if await insistently(record):
                return
        except LeaseLost:
            await self._leave(attempt, prediction)
            raise
        await self._leave(attempt, prediction)
        # Another attempt with the same input adopted it, so that one's own may be ours.
        raise ProviderError(
            FailureClass.AMBIGUOUS,
            "provider_outcome_pending",
            "The prediction was taken over by another job.",
        )

    async def _leave(self, attempt: Attempt, prediction: Prediction) -> None:
        """Leave a prediction to whoever its attempt belongs to by now; stop it if to nobody."""
        await insistently(partial(self._repository.adopt, attempt.id, prediction))
        if await self._repository.is_known(self._provider.name, prediction.id):
            return
        log.error("prediction_unwanted", prediction_id=prediction.id)
        with suppress(ProviderError):  # `Cancel-After` bounds what it costs
            await self._provider.cancel(prediction.id)

    async def _request(self, job: Job) -> PredictionRequest:
        """Build the input: the client's parameters unchanged, with what only we know to want.

        A seed makes the result reproducible and the input recognisable in the provider's list; a
        PNG is kept as it is, where anything else would be decoded and encoded once more.
        """
        given: dict[str, Any] = {**job.parameters, "prompt": job.prompt}
        knows = partial(self._knows_parameter, job.model_name)
        if given.get("seed") is None and (seed := await _draw_seed(knows)) is not None:
            given["seed"] = seed
        wants_png = self._policy.ask_for_png and given.get("output_format") is None
        if wants_png and await knows("output_format", "png"):
            given["output_format"] = "png"
        return PredictionRequest(job.model_name, given, round(self._policy.cancel_after_seconds))


async def insistently(write: Callable[[], Awaitable[T]]) -> T:
    """Make a write that must not be lost, again and again while the database is away."""
    give_up_at = time.monotonic() + RECORD_SECONDS
    while True:
        try:
            return await write()
        except (SQLAlchemyError, OSError) as error:
            if time.monotonic() > give_up_at:
                raise
            log.warning("write_repeated", error=type(error).__name__)
            await asyncio.sleep(RECORD_PAUSE_SECONDS)


async def _draw_seed(knows: KnowsParameter) -> int | None:
    for limit in SEED_LIMITS:
        seed = secrets.randbelow(limit)
        if await knows("seed", seed):
            return seed
    return None


async def _uninterrupted(creating: Coroutine[Any, Any, Prediction]) -> Prediction:
    """Let a create end although its job is being stopped: half a create may be a paid one.

    For at most `CREATE_GRACE_SECONDS`; what is abandoned then is reconciled by the next owner.
    """
    task = asyncio.create_task(creating)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # Retrieved whenever it comes, or asyncio would report the failure as forgotten.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait([task], timeout=CREATE_GRACE_SECONDS)
        raise
