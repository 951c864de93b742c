"""What a provider's report about a prediction means for the attempt that it names."""

from contextlib import suppress
from uuid import UUID

import structlog

from app.errors import JobNotFound, ProviderError, ServiceUnavailable, Unauthorized
from app.jobs.models import Attempt, AttemptState
from app.jobs.reconcile import sought_by
from app.jobs.repository import JobRepository
from app.providers.base import Prediction, Provider

log = structlog.get_logger(__name__)


async def take_report(
    repository: JobRepository, provider: Provider, attempt_id: UUID, prediction: Prediction
) -> None:
    """Adopt the reported prediction if the answer to its attempt's create was lost.

    Repeated, late or out of order, a report does no harm.
    Raises: JobNotFound; Unauthorized - it is about another attempt's prediction;
    ServiceUnavailable - the job has another prediction under way.
    """
    attempt = await repository.attempt(attempt_id)
    if attempt is None:
        raise JobNotFound("There is no such attempt.")
    if not await _speaks_of(repository, attempt, prediction):
        log.warning("webhook_misdirected", attempt_id=str(attempt_id))
        raise Unauthorized("This report is about another attempt's prediction.")
    if attempt.prediction_id is None:
        await _adopt(repository, provider, attempt, prediction)


async def _speaks_of(repository: JobRepository, attempt: Attempt, prediction: Prediction) -> bool:
    """The signature covers the body, not the address: the two must belong together."""
    if attempt.prediction_id is not None:
        return attempt.prediction_id == prediction.id
    job = await repository.get(attempt.job_id)
    return sought_by(attempt, job.parameters.get("seed") if job else None).may_be(prediction)


async def _adopt(
    repository: JobRepository, provider: Provider, attempt: Attempt, prediction: Prediction
) -> None:
    if await repository.adopt(attempt.id, prediction):
        return
    if not await repository.is_known(attempt.provider, prediction.id):
        # It was called absent, and the job has another by now. The last report comes again, and
        # can be written down once the job is over.
        log.error("prediction_unwanted", job_id=str(attempt.job_id), attempt_id=str(attempt.id))
        if await _has_its_own(repository, attempt.job_id) and not prediction.is_terminal:
            with suppress(ProviderError):  # `Cancel-After` bounds what it costs
                await provider.cancel(prediction.id)
        raise ServiceUnavailable("Another prediction of this job is under way.")


async def _has_its_own(repository: JobRepository, job_id: UUID) -> bool:
    """Tell whether the job's open attempt has a prediction: else it may find this one yet."""
    attempts = await repository.attempts(job_id)
    return any(attempt.state == AttemptState.SUBMITTED for attempt in attempts)
