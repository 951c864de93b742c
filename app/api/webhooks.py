"""POST /api/v1/webhooks/replicate/{attempt_id}: the provider rings when a prediction moves."""

import json
from contextlib import suppress
from uuid import UUID

import structlog
from fastapi import APIRouter, Request

from app.api.deps import App, Services
from app.api.problems import problem_responses
from app.errors import InvalidInput, JobNotFound, ProviderError, ServiceUnavailable, Unauthorized
from app.jobs.models import Attempt, AttemptState
from app.jobs.reconcile import sought_by
from app.providers.base import Prediction
from app.providers.replicate.answers import read_prediction
from app.tasks.wakeups import wake

router = APIRouter(prefix="/api/v1/webhooks", tags=["webhooks"])

log = structlog.get_logger(__name__)


@router.post(
    "/replicate/{attempt_id}",
    status_code=204,
    summary="Replicate reports on a prediction",
    responses=problem_responses(401, 403, 404, 408, 413, 422, 503),
)
async def replicate(attempt_id: UUID, request: Request, app: App) -> None:
    """Take a signed report as a doorbell; repeated, late or out of order, it does no harm.

    It adopts the prediction for an attempt whose create answer was lost, and makes the worker
    look now. What the prediction made is read from the API alone.
    """
    body = await request.body()
    await _verify(app, attempt_id, body, request)
    key = attempt_id, request.headers["webhook-id"]
    await app.reports.do(key, lambda: _take(app, attempt_id, _prediction(body)))


async def _take(app: Services, attempt_id: UUID, prediction: Prediction) -> None:
    attempt = await app.repository.attempt(attempt_id)
    if attempt is None:
        raise JobNotFound("There is no such attempt.")
    if not await _speaks_of(app, attempt, prediction):
        log.warning("webhook_misdirected", attempt_id=str(attempt_id))
        raise Unauthorized("This report is about another attempt's prediction.")
    if attempt.prediction_id is None:
        await _adopt(app, attempt, prediction)
    await wake(app.redis, prediction.id)


async def _adopt(app: Services, attempt: Attempt, prediction: Prediction) -> None:
    if await app.repository.adopt(attempt.id, prediction):
        return
    if not await app.repository.is_known(attempt.provider, prediction.id):
        # It was called absent, and the job has another by now. The last report comes again, and
        # can be written down once the job is over.
        log.error("prediction_unwanted", job_id=str(attempt.job_id), attempt_id=str(attempt.id))
        await _stop_unless_wanted(app, attempt, prediction)
        raise ServiceUnavailable("Another prediction of this job is under way.")


async def _stop_unless_wanted(app: Services, attempt: Attempt, prediction: Prediction) -> None:
    """Cancel it if the job's open attempt has one of its own: else it may find this one yet."""
    others = await app.repository.attempts(attempt.job_id)
    has_its_own = any(other.state == AttemptState.SUBMITTED for other in others)
    if has_its_own and not prediction.is_terminal:
        with suppress(ProviderError):  # `Cancel-After` bounds what it costs
            await app.provider.cancel(prediction.id)


async def _verify(app: Services, attempt_id: UUID, body: bytes, request: Request) -> None:
    try:
        fault = await app.webhooks.fault(body, request.headers)
    except ProviderError as error:
        raise ServiceUnavailable("The signature cannot be checked right now.") from error
    if fault:
        log.warning("webhook_refused", attempt_id=str(attempt_id), reason=fault)
        raise Unauthorized("The signature is missing, wrong or too old.")


def _prediction(body: bytes) -> Prediction:
    try:
        return read_prediction(json.loads(body))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput("The report is not a prediction.") from error


async def _speaks_of(app: Services, attempt: Attempt, prediction: Prediction) -> bool:
    """The signature covers the body, not the address: the two must belong together."""
    if attempt.prediction_id is not None:
        return attempt.prediction_id == prediction.id
    job = await app.repository.get(attempt.job_id)
    return sought_by(attempt, job.parameters.get("seed") if job else None).may_be(prediction)
