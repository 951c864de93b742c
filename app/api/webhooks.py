"""POST /api/v1/webhooks/replicate/{attempt_id}: the provider rings when a prediction moves."""

import json
from uuid import UUID

import structlog
from fastapi import APIRouter, Request

from app.api.deps import App, Services
from app.api.problems import problem_responses
from app.errors import InvalidInput, ProviderError, ServiceUnavailable, Unauthorized
from app.jobs.reports import take_report
from app.providers.base import Prediction
from app.providers.replicate.answers import read_prediction
from app.wakeups import wake

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
    await take_report(app.repository, app.provider, attempt_id, prediction)
    await wake(app.redis, prediction.id)


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
    except (ValueError, RecursionError) as error:  # nested a thousand levels deep
        raise InvalidInput("The report is not a prediction.") from error
